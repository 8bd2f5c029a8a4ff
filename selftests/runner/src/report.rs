// SPDX-License-Identifier: GPL-2.0
//! Draws what `designs` measured: one HTML page that needs nothing else, and its figures as SVG files. Reads one JSON file,
//! writes one folder; touches nothing else.

use std::fs;
use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use clap::Args;
use maud::{html, Markup, PreEscaped, DOCTYPE};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde_json::Value;

use crate::boot::Accel;
use crate::designs::{better, Data, Kind, Spread, LAYOUT};
use crate::timeline::LENGTH;

/// What to draw, and where to.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// What `designs` wrote
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// The design that the others are held against
    #[arg(long, value_name = "NAME", default_value = "numa-protect")]
    pub reference: String,
    /// The folder for index.html and the figures
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

/// The columns that have a figure.
const FIGURES: &[&str] = &[
    "dropped/step",
    "faults/step",
    "flush requests/step",
    "mmu_lock writes/step",
    "notifier calls/walk",
    "running: retries/scan",
];
/// The backing whose cells the figures show, on nested paging: all are in the tables.
const BACKING: &str = "anon.";

/// Width of a figure in pixels: a phone's.
const WIDTH: u32 = 360;
/// Height of one bar with its gap, and of a cell's title.
const BAR: u32 = 17;
const TITLE: u32 = 26;
/// Where bars begin; the designs' names are to the left.
const LEFT: u32 = 96;
/// Room for the number behind the longest bar.
const RIGHT: u32 = 104;

// Okabe and Ito's palette; ink follows the page, light or dark.
const INK: RGBColor = BLACK;
const FIRST: RGBColor = RGBColor(0x99, 0x99, 0x99);
const OTHERS: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const REPORTED: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const OURS: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const SVG_STYLE: &str =
    "<style>svg{--ink:#1b1b1b}@media(prefers-color-scheme:dark){svg{--ink:#e6e6e6}}\
    [fill=\"#000000\"]{fill:var(--ink)}[stroke=\"#000000\"]{stroke:var(--ink)}</style>";
const PAGE_STYLE: &str = "\
    :root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--line:#ccc;--ours:#b34d00}\
    @media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#16181b;--line:#444;--ours:#ff9d5c}}\
    body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;padding:1rem;max-width:76rem}\
    .figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.5rem}\
    figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto;max-width:26rem}\
    .wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}.designs{min-width:56rem}\
    th,td{border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}td:first-child{white-space:nowrap}\
    .figure-table td+td,.figure-table th+th{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}\
    .figure-table th+th{white-space:normal;min-width:4.2rem}\
    .timeline{overflow-x:auto}.timeline svg{min-width:40rem;max-width:60rem}.key{white-space:nowrap;margin-left:.8em}.key::before{content:\"\";display:inline-block;width:.8em;height:.8em;background:var(--key);margin-right:.3em}\
    .ours{color:var(--ours);font-weight:600}summary{cursor:pointer;padding:.3rem 0}";

/// Reads, draws, writes.
pub fn report(options: &Options) -> Result<bool> {
    let path = &options.data;
    let text =
        fs::read(path).with_context(|| format!("{}: make compare writes it", path.display()))?;
    let value: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    ensure!(
        value["layout"] == LAYOUT,
        "{}: layout {}, and this reads layout {LAYOUT} only: make compare writes it anew",
        path.display(),
        value["layout"]
    );
    let data: Data = serde_json::from_value(value).with_context(|| path.display().to_string())?;
    fs::create_dir_all(&options.output).with_context(|| options.output.display().to_string())?;
    let write = |name: &str, text: &str| {
        let path = options.output.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    let mut figures = Vec::new();
    for title in FIGURES {
        let svg = bars(&data, title, &options.reference)?;
        let name: String = title
            .chars()
            .map(|one| {
                if one.is_ascii_alphanumeric() {
                    one
                } else {
                    '-'
                }
            })
            .collect();
        write(&format!("{name}.svg"), &svg)?;
        figures.push((*title, svg));
    }
    let drawn = timelines(&data)?;
    write("timeline.svg", &drawn)?;
    write(
        "index.html",
        &page(&data, &figures, &drawn, &options.reference).into_string(),
    )?;
    println!("{}", options.output.join("index.html").display());
    Ok(true)
}

/// Bars of one column for each cell, a bar a design, with the range of its rounds.
fn bars(data: &Data, title: &str, reference: &str) -> Result<String> {
    let index = data
        .columns
        .iter()
        .position(|column| column.title == title)
        .with_context(|| format!("no column {title}"))?;
    let cells: Vec<_> = data
        .measured
        .iter()
        .filter(|one| one.paging == "nested" && one.cell.starts_with(BACKING))
        .collect();
    let rows = data.designs.len() as u32;
    let panel = TITLE + rows * BAR;
    let mut svg = String::new();
    {
        let size = (WIDTH, panel * cells.len().max(1) as u32 + 6);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let style = |size: f64, h| {
            ("sans-serif", size)
                .into_font()
                .color(&INK)
                .pos(Pos::new(h, VPos::Center))
        };
        for (number, cell) in cells.iter().enumerate() {
            let top = (number as u32 * panel) as i32;
            let heading = style(13.0, HPos::Left);
            root.draw(&Text::new(
                cell.cell.clone(),
                (4, top + TITLE as i32 / 2 + 3),
                heading,
            ))?;
            let spread = |name: &str| Spread::of(&cell.values.get(name)?[index]);
            let most = data
                .designs
                .iter()
                .filter_map(|note| spread(&note.name))
                .map(|spread| spread.most)
                .fold(0.0, f64::max);
            let x = |value: f64| {
                let room = f64::from(WIDTH - LEFT - RIGHT);
                let share = if most > 0.0 { value / most } else { 0.0 };
                LEFT as i32 + (share * room).round() as i32
            };
            for (row, note) in data.designs.iter().enumerate() {
                let y = top + (TITLE + row as u32 * BAR) as i32;
                let middle = y + BAR as i32 / 2;
                let name = Text::new(
                    note.name.clone(),
                    (LEFT as i32 - 6, middle),
                    style(11.0, HPos::Right),
                );
                root.draw(&name)?;
                let Some(spread) = spread(&note.name) else {
                    continue;
                };
                let colour = match row {
                    _ if note.name == reference => OURS,
                    0 => FIRST,
                    _ => OTHERS,
                };
                let corners = [(LEFT as i32, y + 3), (x(spread.mean), y + BAR as i32 - 3)];
                root.draw(&Rectangle::new(corners, colour.filled()))?;
                if spread.most > spread.least {
                    let ends = vec![(x(spread.least), middle), (x(spread.most), middle)];
                    root.draw(&PathElement::new(ends, INK.stroke_width(1)))?;
                }
                let text = spread.text(Kind::Count);
                let at = (x(spread.most) + 5, middle);
                root.draw(&Text::new(text, at, style(11.0, HPos::Left)))?;
            }
        }
        root.present()?;
    }
    Ok(styled(svg))
}

/// The time lines, one below the other.
fn timelines(data: &Data) -> Result<String> {
    let (name, high, axis) = (22, 150, 30);
    let (left, right) = (30, 630);
    let shown: Vec<_> = data
        .designs
        .iter()
        .filter_map(|note| Some((&note.name, data.timelines.get(&note.name)?)))
        .collect();
    let panel = name + high;
    let mut svg = String::new();
    {
        let height = (panel * shown.len() as i32 + axis) as u32;
        let root =
            SVGBackend::with_string(&mut svg, (right as u32 + 20, height)).into_drawing_area();
        let text = |h| {
            ("sans-serif", 13.0)
                .into_font()
                .color(&INK)
                .pos(Pos::new(h, VPos::Center))
        };
        for (number, (design, timeline)) in shown.iter().enumerate() {
            let top = number as i32 * panel + name;
            root.draw(&Text::new(
                design.to_string(),
                (left, top - name / 2),
                text(HPos::Left),
            ))?;
            let frame = [(left, top), (right, top + high - 6)];
            timeline.draw(&root, frame, [OTHERS, REPORTED, OURS, FIRST])?;
            root.draw(&Rectangle::new(frame, INK.stroke_width(1)))?;
        }
        let bottom = panel * shown.len() as i32;
        let [length, start] = LENGTH;
        for ms in (0..)
            .step_by(20)
            .take_while(|ms| f64::from(*ms) <= length - start)
        {
            let share = (f64::from(ms) + start) / length;
            let at = left + (share * f64::from(right - left)).round() as i32;
            root.draw(&PathElement::new(
                vec![(at, bottom - 6), (at, bottom - 1)],
                INK.stroke_width(1),
            ))?;
            root.draw(&Text::new(
                format!("{ms} ms"),
                (at, bottom + 10),
                text(HPos::Center),
            ))?;
        }
        root.present()?;
    }
    Ok(styled(svg))
}

/// With colours that follow the page's.
fn styled(mut svg: String) -> String {
    let at = svg.find('>').map_or(0, |at| at + 1);
    svg.insert_str(at, SVG_STYLE);
    svg
}

fn page(data: &Data, figures: &[(&str, String)], timeline: &str, reference: &str) -> Markup {
    let (worse, compared) = data.worse(reference);
    let class = |name: &str| (name == reference).then_some("ours");
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "What a NUMA hint scan costs a VM, by design" }
                style { (PreEscaped(PAGE_STYLE)) }
            }
            body {
                h1 { "What a NUMA hint scan costs a VM, by design" }
                p {
                    "Guest memory on one node, vCPUs on another, KVM "
                    @if data.accel == Accel::Kvm { "on hardware" } @else { "in emulation, so that times are worth little" } ". Mean and standard deviation over " (data.rounds) " boots of each kernel, taken in turn. "
                    "/walk: per walk of all guest memory by a scan. /step: for the scans between two sweeps over it by the vCPUs. "
                    "/scan: while the vCPUs run. Lines on the bars are the range of the rounds."
                }
                h2 { "The designs" }
                div.wide { table.designs {
                    tr { th { "design" } th { "idea" } th { "from" } th { "interface" } th { "sound" } th { "why" } th { "tests that every sound design holds" } }
                    @for note in &data.designs {
                        tr {
                            td class=[class(&note.name)] { (note.name) }
                            td { (note.idea) } td { (note.from) } td { (note.interface) }
                            td { @if note.sound { "yes" } @else { "no" } }
                            td { (note.why) }
                            td { (data.seen(&note.name)) }
                        }
                    }
                } }
                h2 { "Where another design is better than " (reference) }
                p { (better(reference, &worse, compared)) }
                ul { @for one in &worse { li { (one.text()) } } }
                @if !data.boots.is_empty() {
                    h2 { "Linux boots in a VM" }
                    p { "From the first instruction to the restart, under scans, with none of the guest's memory pinned and with all of it." }
                    div.wide { table.figure-table {
                        tr { th { "design" } @for title in data.boot_titles() { th { (title) } } }
                        @for (name, texts) in data.boot_rows() {
                            tr { td class=[class(name)] { (name) } @for text in texts { td { (text) } } }
                        }
                    } }
                }
                @if !data.timelines.is_empty() { h2 { "One scan while the guest runs: half pinned anonymous memory" }
                p { "Time goes to the right, guest memory down, every other MiB of it is pinned. "
                    span.key style="--key:#56b4e9" { "from start to end of the notification" } " "
                    span.key style="--key:#d55e00" { "KVM unmaps" } " "
                    span.key style="--key:#009e73" { "reported as hinted" } " "
                    span.key style="--key:#999999" { "a vCPU faults" } }
                div.timeline { (PreEscaped(timeline)) } }
                h2 { "Figures: anonymous memory, nested paging" }
                div.figures { @for (title, svg) in figures {
                    figure { figcaption { (title) } (PreEscaped(svg)) }
                } }
                h2 { "All cells" }
                p { "*: further from " (reference) " than chance explains. Times are ratios to " (data.designs[0].name) " in the same round." }
                @for measured in &data.measured {
                    details {
                        summary { (measured.cell) ", " (measured.paging) " paging" }
                        div.wide { table.figure-table {
                            tr { th { "design" } @for column in &data.columns { th { (column.title) } } }
                            @for note in &data.designs { @if measured.values.contains_key(&note.name) {
                                tr {
                                    td class=[class(&note.name)] { (note.name) }
                                    @for index in 0..data.columns.len() { td { (data.text(measured, &note.name, index, reference)) } }
                                }
                            } }
                        } }
                    }
                }
            }
        }
    }
}
