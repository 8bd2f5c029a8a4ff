// SPDX-License-Identifier: GPL-2.0
//! What values measured several times come to; touches nothing.

/// Their mean.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Their standard deviation; none of a single one.
pub fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() as f64 - 1.0)).sqrt())
}

/// Both as text, with so many digits behind the point.
pub fn spread(values: &[f64], digits: usize) -> String {
    let mean = mean(values);
    match deviation(values) {
        None => format!("{mean:.digits$}"),
        Some(deviation) => format!("{mean:.digits$} ± {deviation:.digits$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_has_no_deviation() {
        assert_eq!(spread(&[2.0], 1), "2.0");
        assert_eq!(spread(&[1.0, 3.0], 1), "2.0 ± 1.4");
        assert_eq!((mean(&[1.0, 3.0]), deviation(&[4.0])), (2.0, None));
    }
}
