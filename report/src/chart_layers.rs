//! The heat map of layers: a row for each kind of linear, a column for each block.

use std::collections::BTreeMap;

use lowbit_quantize::record::LayerRecord;

use crate::format::sig;
use crate::svg::{Svg, WIDTH, at, fit, text_width};

/// Kinds in the order of a block; others follow as they come.
const KINDS: [&str; 9] =
    ["qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj"];

/// Colour steps, `h0` to `h8`.
const STEPS: usize = 9;

/// Cells of more maps than this together carry no tooltip: a page has a limit.
const TITLED: usize = 1500;

/// Worst error of a cell, and how many linears share it.
struct Cell<'a> {
    worst: &'a LayerRecord,
    linears: usize,
}

/// `4` of `w4a16-g64`, `nvfp4` or `q4_k`.
fn bits(scheme: &str) -> &str {
    let rest = scheme.trim_start_matches(|c: char| !c.is_ascii_digit());
    rest.get(..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())).unwrap_or_default()
}

fn kind(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Rows and cells by (row, block).
fn cells(layers: &[LayerRecord]) -> (Vec<&str>, BTreeMap<(usize, usize), Cell<'_>>) {
    let placed = || layers.iter().filter(|l| l.block.is_some() && l.relative_error.is_finite());
    let mut rows: Vec<&str> = KINDS.into_iter().filter(|k| placed().any(|l| kind(&l.name) == *k)).collect();
    for l in placed() {
        if !rows.contains(&kind(&l.name)) {
            rows.push(kind(&l.name));
        }
    }
    let mut out: BTreeMap<(usize, usize), Cell> = BTreeMap::new();
    for l in placed() {
        let row = rows.iter().position(|r| *r == kind(&l.name)).unwrap_or(0);
        let cell = out.entry((row, l.block.unwrap_or(0))).or_insert(Cell { worst: l, linears: 0 });
        cell.linears += 1;
        if l.relative_error > cell.worst.relative_error {
            cell.worst = l;
        }
    }
    (rows, out)
}

/// How many cells a map has.
pub(crate) fn count(layers: &[LayerRecord]) -> usize {
    cells(layers).1.len()
}

/// Relative errors by colour; `all` counts the cells of every map of the page. `None` without a layer of a block.
pub(crate) fn heat_map(layers: &[LayerRecord], name: &str, all: usize) -> Option<String> {
    let (rows, cells) = cells(layers);
    let last = cells.keys().map(|k| k.1).max()?;
    let errors = || cells.values().map(|c| c.worst.relative_error);
    let max = errors().fold(0.0, f64::max);
    let least = errors().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
    // One scale for all steps: logarithmic where errors differ by much.
    let log = least.is_finite() && max / least > 20.0;
    let low = if log { least.max(max * 1e-6) } else { 0.0 };
    let step = |v: f64| {
        let part = match log {
            true => (v.max(low) / low).ln() / (max / low).ln(),
            false if max > 0.0 => v / max,
            false => 0.0,
        };
        ((part * STEPS as f64) as usize).min(STEPS - 1)
    };
    let labels = rows.iter().map(|r| text_width(r)).fold(0.0, f64::max).min(160.0);
    let (left, top) = (labels + 14.0, 8.0);
    let width = ((WIDTH - left - 8.0) / (last + 1) as f64).min(44.0);
    let height = 22.0;
    let bottom = top + height * rows.len() as f64;
    let worst = cells.values().max_by(|a, b| a.worst.relative_error.total_cmp(&b.worst.relative_error))?.worst;
    let title =
        if name.is_empty() { "Relative error by layer".to_owned() } else { format!("Relative error by layer, {name}") };
    let said = format!(
        "A colour for each kind of linear and block, darkest where the error is largest: {} at {}.",
        sig(worst.relative_error, 3),
        worst.name
    );
    let mut svg = Svg::new(bottom + 84.0, &title, &said);
    for (i, row) in rows.iter().enumerate() {
        svg.text("name", "end", left - 8.0, top + height * i as f64 + 15.0, &fit(row, labels));
    }
    let gap = if width > 6.0 { 1.0 } else { 0.0 };
    let place = |&(row, block): &(usize, usize)| (left + width * block as f64, top + height * row as f64);
    // Where linears have several schemes, each cell shows its bits.
    let several = cells.values().any(|c| c.worst.scheme != worst.scheme);
    if all <= TITLED {
        for (key, cell) in &cells {
            let (x, y) = place(key);
            let more = if cell.linears > 1 { format!(", the largest of {}", cell.linears) } else { String::new() };
            let scheme = if several { format!(", {}", cell.worst.scheme) } else { String::new() };
            let title = format!("{}: {}{more}{scheme}", cell.worst.name, sig(cell.worst.relative_error, 3));
            let class = format!("h{}", step(cell.worst.relative_error));
            svg.rect(&class, x, y, width - gap, height - 1.0, &title);
        }
    } else {
        let mut outlines = vec![String::new(); STEPS];
        for (key, cell) in &cells {
            let (x, y) = place(key);
            let (w, h) = (at(width - gap), at(height - 1.0));
            outlines[step(cell.worst.relative_error)] += &format!("M{} {}h{w}v{h}h-{w}z", at(x), at(y));
        }
        for (i, d) in outlines.iter().enumerate().filter(|o| !o.1.is_empty()) {
            svg.path(&format!("h{i}"), d);
        }
    }
    if several && width >= 9.0 {
        for (key, cell) in &cells {
            let (x, y) = place(key);
            svg.text("cell", "middle", x + (width - gap) / 2.0, y + 15.0, bits(&cell.worst.scheme));
        }
    }
    let every = [1, 2, 4, 5, 10, 20, 50].into_iter().find(|s| width * *s as f64 >= 30.0).unwrap_or(100);
    for block in (0..=last).step_by(every) {
        svg.text("tick", "middle", left + width * (block as f64 + 0.5), bottom + 16.0, &block.to_string());
    }
    svg.text("axis", "middle", left + width * (last + 1) as f64 / 2.0, bottom + 36.0, "block");
    let (y, part) = (bottom + 52.0, 34.0);
    svg.text("tick", "end", left - 8.0, y + 12.0, "error");
    for i in 0..STEPS {
        let from = |i: usize| match log {
            true => low * (max / low).powf(i as f64 / STEPS as f64),
            false => max * i as f64 / STEPS as f64,
        };
        let title = format!("{} – {}", sig(from(i), 2), sig(from(i + 1), 2));
        svg.rect(&format!("h{i}"), left + part * i as f64, y, part - 1.0, 14.0, &title);
    }
    svg.text("tick", "start", left, y + 29.0, &sig(low, 2));
    svg.text("tick", "end", left + part * STEPS as f64, y + 29.0, &sig(max, 2));
    let note = if log { "log scale" } else { "linear scale" };
    svg.text("tick", "start", left + part * STEPS as f64 + 10.0, y + 12.0, note);
    Some(svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str, block: usize, error: f64) -> LayerRecord {
        LayerRecord { name: name.into(), block: Some(block), relative_error: error, ..Default::default() }
    }

    #[test]
    fn bits_stand_in_the_cells_where_they_differ() {
        let with = |name: &str, scheme: &str| LayerRecord { scheme: scheme.into(), ..layer(name, 0, 0.1) };
        let mixed = [with("a.q_proj", "w3a16-g64"), with("a.o_proj", "w8a16-channel")];
        let text = heat_map(&mixed, "", 2).unwrap();
        assert!(
            text.contains(">3</text>") && text.contains(">8</text>") && text.contains("0.100, w3a16-g64"),
            "{text}"
        );
        let floats = [with("a.q_proj", "nvfp4"), with("a.o_proj", "fp8-dynamic")];
        let text = heat_map(&floats, "", 2).unwrap();
        assert!(text.contains(">4</text>") && text.contains(">8</text>"), "{text}");
        let same = [with("a.q_proj", "w4a16-g64"), with("a.o_proj", "w4a16-g64")];
        assert!(!heat_map(&same, "", 2).unwrap().contains("class=\"cell\""));
    }

    #[test]
    fn the_worst_of_a_cell_is_shown_and_nothing_is_nan() {
        assert!(heat_map(&[], "", 0).is_none());
        assert!(heat_map(&[layer("a.q_proj", 0, f64::NAN)], "", 1).is_none());
        let zero = heat_map(&[layer("a.q_proj", 0, 0.0)], "", 1).unwrap();
        assert!(!zero.contains("NaN") && !zero.contains("inf"), "{zero}");
        let experts = [layer("e.0.up_proj", 1, 0.1), layer("e.1.up_proj", 1, 0.3), layer("a.q_proj", 0, 0.001)];
        let text = heat_map(&experts, "", count(&experts)).unwrap();
        assert!(text.contains("e.1.up_proj: 0.300, the largest of 2") && count(&experts) == 2, "{text}");
        let plain = heat_map(&experts, "", TITLED + 1).unwrap();
        assert!(!plain.contains("largest of") && plain.contains("<path class=\"h8\""), "{plain}");
    }
}
