// SPDX-License-Identifier: GPL-2.0
//! Draws a saved trace: time to the right, addresses down. Writes one SVG file.

use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use clap::Args;
use plotters::prelude::*;
use trace::filter::Filter;
use trace::record::Record;
use trace::saved;

/// What to draw, and where to.
#[derive(Args)]
pub struct Options {
    /// What `record` wrote
    #[arg(default_value = crate::record::FILE)]
    file: PathBuf,
    /// The SVG file
    #[arg(short, long, default_value = "timeline.svg")]
    output: PathBuf,
    /// Only these records: `callback=NAME,... event=NAME,... range=START-END numa`
    #[arg(long, default_value = "", value_parser = |text: &str| Filter::parse(text).ok_or("see record --help"))]
    filter: Filter,
    /// Where to begin, in seconds from the first record
    #[arg(long, default_value_t = 0.0)]
    from: f64,
    /// How many seconds; all if not given
    #[arg(long)]
    seconds: Option<f64>,
}

// Okabe and Ito's palette.
const PAIRS: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const SCANS: RGBColor = RGBColor(0xe6, 0x9f, 0x00);
const REPORTS: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const SIZE: (u32, u32) = (1000, 600);

pub fn timeline(options: &Options) -> Result<()> {
    let (about, sequence) = saved::read(&options.file)?;
    let first = sequence.records.first().context("no records")?.time_ns;
    let seconds = |record: &Record| (record.time_ns - first) as f64 / 1e9;
    let last = sequence.records.last().map_or(0.0, seconds);
    let until = options.seconds.map_or(last, |length| options.from + length);
    let shown = |record: &Record| {
        options.filter.keeps(record) && (options.from..=until).contains(&seconds(record))
    };
    let pairs: Vec<_> = sequence
        .pairs
        .iter()
        .filter(|pair| shown(&pair.start))
        .collect();
    let stretches: Vec<_> = sequence.stretches().filter(|one| shown(one)).collect();
    // Whole address spaces would leave nothing to be seen.
    let is_part = |record: &&Record| record.end - record.start < 1 << 40;
    let parts = pairs
        .iter()
        .map(|pair| &pair.start)
        .chain(stretches.iter().copied());
    let parts = parts
        .filter(is_part)
        .map(|record| (record.start, record.end));
    let (low, high) = parts
        .reduce(|(low, high), (start, end)| (low.min(start), high.max(end)))
        .context("no pair of start and end to draw: see --filter, --from and --seconds")?;
    ensure!(
        until > options.from,
        "nothing from {} s to {until} s",
        options.from
    );

    let path = &options.output;
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = format!("{} ({}), Linux {}", about.command, about.pid, about.kernel);
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(120)
        // The lowest address is at the top.
        .build_cartesian_2d(options.from..until, (high as f64)..(low as f64))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("seconds")
        .y_label_formatter(&|address| format!("{:x}", *address as u64))
        .draw()?;
    let rectangle = |from: f64, to: f64, start: u64, end: u64, colour: RGBAColor| {
        // As wide as a pixel at least.
        let least = (until - options.from) / f64::from(SIZE.0);
        let corners = [
            (from, start.clamp(low, high) as f64),
            (to.max(from + least).min(until), end.clamp(low, high) as f64),
        ];
        Rectangle::new(corners, colour.filled())
    };
    let series = |numa: bool| {
        pairs
            .iter()
            .filter(move |pair| pair.is_numa() == numa)
            .map(move |pair| {
                let end = pair.end.as_ref().map_or(until, seconds);
                let colour = if numa { SCANS.mix(0.5) } else { PAIRS.mix(0.5) };
                rectangle(
                    seconds(&pair.start),
                    end,
                    pair.start.start,
                    pair.start.end,
                    colour,
                )
            })
    };
    let key = |colour: RGBColor| {
        move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled())
    };
    chart
        .draw_series(series(true))?
        .label("a scan that plants hints")
        .legend(key(SCANS));
    chart
        .draw_series(series(false))?
        .label("from start to end")
        .legend(key(PAIRS));
    chart
        .draw_series(stretches.iter().map(|one| {
            let at = seconds(one);
            rectangle(at, at, one.start, one.end, REPORTS.mix(1.0))
        }))?
        .label("reported as hinted")
        .legend(key(REPORTS));
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present().with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(())
}
