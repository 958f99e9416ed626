//! The charts, as inline SVG. Colours are classes (`c1` to `c8`) that the page sets per theme.

use lowbit_quantize::record::{ComponentSize, LayerRecord};

use crate::format::{bytes, percent, sig};
use crate::svg::{Scale, Svg, WIDTH, empty, legend};

/// Projections in the order of a block, with the suffix of their names.
const KINDS: [(&str, &str); 7] = [
    ("q", "q_proj"),
    ("k", "k_proj"),
    ("v", "v_proj"),
    ("o", "o_proj"),
    ("gate", "gate_proj"),
    ("up", "up_proj"),
    ("down", "down_proj"),
];

fn component_class(name: &str, index: usize) -> String {
    const KNOWN: [&str; 6] = ["embedding", "attention", "mlp", "norms", "lm_head", "other"];
    match KNOWN.iter().position(|k| *k == name) {
        Some(5) => "cx".to_owned(),
        Some(i) => format!("c{}", i + 1),
        None => format!("c{}", index % 8 + 1),
    }
}

/// Two stacked bars, before and after, by component.
pub(crate) fn sizes(sizes: &[ComponentSize]) -> String {
    let before: u64 = sizes.iter().map(|s| s.before_bytes).sum();
    let after: u64 = sizes.iter().map(|s| s.after_bytes).sum();
    let most = before.max(after);
    if most == 0 {
        return empty("no sizes were recorded");
    }
    let (unit, name) = if most >= 2_000_000_000 { (1e9, "GB") } else { (1e6, "MB") };
    let (left, right) = (64.0, WIDTH - 84.0);
    let scale = Scale::linear(most as f64 / unit, left, right);
    let mut svg = Svg::new(148.0, "Bytes by component before and after quantization");
    for (v, label) in scale.ticks() {
        let x = scale.at(v);
        svg.line("grid", (x, 8.0), (x, 108.0));
        svg.text("tick", "middle", x, 124.0, &label);
    }
    svg.text("axis", "middle", (left + right) / 2.0, 144.0, &format!("weights, {name}"));
    for (row, (label, total)) in [("before", before), ("after", after)].into_iter().enumerate() {
        let y = 14.0 + 48.0 * row as f64;
        svg.text("name", "end", left - 10.0, y + 24.0, label);
        let mut sum = 0u64;
        for (i, s) in sizes.iter().enumerate() {
            let part = if row == 0 { s.before_bytes } else { s.after_bytes };
            let (x0, x1) = (scale.at(sum as f64 / unit), scale.at((sum + part) as f64 / unit));
            sum += part;
            let gap = if x1 - x0 > 4.0 { 1.5 } else { 0.0 };
            let share = percent(part as f64 / total.max(1) as f64, 3);
            let title = format!("{} {label}: {} ({share})", s.component, bytes(part));
            svg.rect(&component_class(&s.component, i), x0, y, x1 - x0 - gap, 38.0, &title);
        }
        svg.text("value", "start", scale.at(total as f64 / unit) + 6.0, y + 24.0, &bytes(total));
    }
    let entries: Vec<_> = sizes
        .iter()
        .enumerate()
        .map(|(i, s)| (1, component_class(&s.component, i), s.component.replace('_', " ")))
        .collect();
    legend(&entries) + &svg.finish()
}

/// Percentiles on evenly spaced stops, logarithmic, with the mean as a broken line.
pub(crate) fn percentiles(points: &[(String, f64)], mean: f64) -> String {
    let usable: Vec<f64> = points.iter().map(|p| p.1).filter(|v| v.is_finite() && *v > 0.0).collect();
    if usable.is_empty() {
        return empty("no positive percentiles were recorded");
    }
    let max = usable.iter().copied().fold(f64::MIN, f64::max).max(if mean.is_finite() { mean } else { f64::MIN });
    // Rounding noise near zero would stretch the axis: seven decades, and what is below is left out.
    let min = usable.iter().copied().fold(f64::MAX, f64::min).max(max * 1e-7);
    let (left, right, top, bottom) = (84.0, WIDTH - 76.0, 16.0, 216.0);
    let scale = Scale::log(min, max, bottom, top);
    let mut svg = Svg::new(268.0, "Percentiles of the Kullback-Leibler divergence per token");
    for (v, label) in scale.ticks() {
        let y = scale.at(v);
        svg.line("grid", (left, y), (right, y));
        svg.text("tick", "end", left - 8.0, y + 4.0, &label);
    }
    let axis = if points.iter().all(|p| p.1 >= min) {
        "percentile of tokens, %"
    } else {
        "percentile of tokens, % (values near zero are left out)"
    };
    svg.vertical(18.0, (top + bottom) / 2.0, "KL, nats/token (log scale)");
    svg.text("axis", "middle", (left + right) / 2.0, 262.0, axis);
    let step = (right - left - 40.0) / (points.len().max(2) - 1) as f64;
    let mut line = Vec::new();
    for (i, (label, v)) in points.iter().enumerate() {
        let x = left + 20.0 + step * i as f64;
        svg.text("tick", "middle", x, bottom + 18.0, label);
        if *v >= min {
            line.push((x, scale.at(*v), format!("{label} % of tokens are below {} nats", sig(*v, 3))));
        }
    }
    if mean.is_finite() && mean > 0.0 {
        let y = scale.at(mean);
        svg.line("mean", (left, y), (right, y));
        svg.text("value", "start", right + 6.0, y + 4.0, "mean");
    }
    svg.polyline("line s1", &line.iter().map(|p| (p.0, p.1)).collect::<Vec<_>>());
    for (x, y, title) in &line {
        svg.mark(0, "c1", *x, *y, title);
    }
    svg.finish()
}

/// One series of the layer chart: name, mark, colour class and (block, error, layer).
type Series<'a> = (&'static str, usize, String, Vec<(usize, f64, &'a str)>);

fn series(layers: &[LayerRecord]) -> Vec<Series<'_>> {
    let mut out: Vec<Series> = KINDS
        .iter()
        .enumerate()
        .map(|(i, (name, _))| (*name, i, format!("{}", i + 1), Vec::new()))
        .chain([("other", 0, "x".to_owned(), Vec::new())])
        .collect();
    for layer in layers {
        let (Some(block), true) = (layer.block, layer.relative_error.is_finite()) else {
            continue;
        };
        let kind = KINDS.iter().position(|(_, suffix)| layer.name.ends_with(suffix)).unwrap_or(KINDS.len());
        if let Some(s) = out.get_mut(kind) {
            s.3.push((block, layer.relative_error, &layer.name));
        }
    }
    out.retain(|s| !s.3.is_empty());
    for s in &mut out {
        s.3.sort_by_key(|p| p.0);
    }
    out
}

/// Relative error by block, one line for each kind of projection.
pub(crate) fn layers(layers: &[LayerRecord]) -> String {
    let series = series(layers);
    let errors = || series.iter().flat_map(|s| s.3.iter().map(|p| p.1));
    let Some(last) = series.iter().flat_map(|s| s.3.iter().map(|p| p.0)).max() else {
        return empty("no layer errors were recorded");
    };
    let max = errors().fold(0.0, f64::max);
    let least = errors().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
    let (left, right, top, bottom) = (84.0, WIDTH - 16.0, 12.0, 292.0);
    let log = least.is_finite() && max / least > 20.0;
    let scale = if log { Scale::log(least.max(max * 1e-6), max, bottom, top) } else { Scale::linear(max, bottom, top) };
    let mut svg = Svg::new(344.0, "Relative error of every quantized linear by block");
    for (v, label) in scale.ticks() {
        let y = scale.at(v);
        svg.line("grid", (left, y), (right, y));
        svg.text("tick", "end", left - 8.0, y + 4.0, &label);
    }
    let note = if log { " (log scale)" } else { "" };
    svg.vertical(18.0, (top + bottom) / 2.0, &format!("relative error, no unit{note}"));
    svg.text("axis", "middle", (left + right) / 2.0, 338.0, "block");
    let width = right - left - 32.0;
    let x_of = |block: usize| {
        if last == 0 { left + 16.0 + width / 2.0 } else { left + 16.0 + width * block as f64 / last as f64 }
    };
    let every = [1, 2, 4, 5, 10, 20, 50].into_iter().find(|s| last / s <= 24).unwrap_or(last / 20 + 1);
    for block in (0..=last).step_by(every) {
        svg.text("tick", "middle", x_of(block), bottom + 20.0, &block.to_string());
    }
    for (_, _, class, points) in &series {
        let line: Vec<_> = points.iter().map(|p| (x_of(p.0), scale.at(p.1))).collect();
        svg.polyline(&format!("line s{class}"), &line);
    }
    for (_, shape, class, points) in &series {
        for (block, error, name) in points {
            let title = format!("{name}: {}", sig(*error, 3));
            svg.mark(*shape, &format!("c{class}"), x_of(*block), scale.at(*error), &title);
        }
    }
    let entries: Vec<_> =
        series.iter().map(|(name, shape, class, _)| (*shape, format!("c{class}"), (*name).to_owned())).collect();
    legend(&entries) + &svg.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gives_no_nan() {
        let layer = LayerRecord { name: "q_proj".into(), block: Some(0), relative_error: 0.0, ..Default::default() };
        let broken = LayerRecord { relative_error: f64::NAN, ..layer.clone() };
        for text in [
            sizes(&[]),
            sizes(&[ComponentSize::default()]),
            percentiles(&[], f64::NAN),
            percentiles(&[("50".into(), f64::NAN), ("99".into(), 0.0)], 0.0),
            percentiles(&[("50".into(), 1.0)], f64::NAN),
            layers(&[]),
            layers(&[layer, broken]),
        ] {
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
            assert!(!text.is_empty());
        }
    }
}
