//! Intervals against a line: losses of tasks against the margin, and what swapping a layer back regains.

use crate::format::sig;
use crate::svg::{Scale, Svg, WIDTH, fit, text_width};

/// A row: a value with its interval.
pub(crate) struct Row {
    /// What it is of.
    pub label: String,
    /// Value, low, high.
    pub value: (f64, f64, f64),
    /// Colour class.
    pub class: &'static str,
    /// Shape of the mark.
    pub shape: usize,
    /// At the end of the row.
    pub note: String,
}

/// Title, axis and where else a line stands.
pub(crate) struct Frame<'a> {
    /// Of the chart.
    pub title: &'a str,
    /// Of the axis.
    pub axis: &'a str,
    /// A broken line with its name.
    pub limit: Option<(f64, &'a str)>,
    /// Fixed-width labels (names of modules) are longer.
    pub wide: bool,
}

/// A mark with a whisker for each row. `None` without a finite value.
pub(crate) fn intervals(rows: &[Row], frame: &Frame) -> Option<String> {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.value.0.is_finite()).collect();
    // An interval without end (one window) would stretch the axis to nothing: it is cut at three times the values.
    let most = rows.iter().map(|r| r.value.0.abs()).fold(0.0, f64::max);
    let reach = if most > 0.0 { 3.0 * most } else { 1.0 };
    let bound = |v: f64, near: f64| if v.is_finite() { v } else { near };
    let wide = |r: &Row| (r.value.2 - r.value.1) > 20.0 * reach;
    let ends: Vec<f64> = rows
        .iter()
        .flat_map(|r| {
            if wide(r) { [r.value.0, r.value.0] } else { [bound(r.value.1, r.value.0), bound(r.value.2, r.value.0)] }
        })
        .chain(frame.limit.map(|l| l.0))
        .collect();
    rows.first()?;
    let (low, high) =
        (ends.iter().copied().fold(f64::INFINITY, f64::min), ends.iter().copied().fold(f64::NEG_INFINITY, f64::max));
    let labels =
        rows.iter().map(|r| text_width(&r.label)).fold(0.0, f64::max).min(if frame.wide { 300.0 } else { 200.0 });
    let notes = rows.iter().map(|r| text_width(&r.note)).fold(0.0, f64::max).min(260.0);
    let (left, right) = (labels + 20.0, WIDTH - notes - 20.0);
    let scale = Scale::around_zero(low, high, left, right);
    let (top, step) = (if frame.limit.is_some() { 26.0 } else { 10.0 }, 24.0);
    let bottom = top + step * rows.len() as f64 + 4.0;
    let said: Vec<String> = rows
        .iter()
        .map(|r| format!("{} {}, from {} to {}", r.label, sig(r.value.0, 3), sig(r.value.1, 3), sig(r.value.2, 3)))
        .collect();
    let mut svg = Svg::new(bottom + 42.0, frame.title, &format!("{}: {}.", frame.axis, said.join("; ")));
    for (v, label) in scale.ticks() {
        let x = scale.at(v);
        svg.line(if v.abs() < 1e-12 { "axisline" } else { "grid" }, (x, top), (x, bottom));
        svg.text("tick", "middle", x, bottom + 16.0, &label);
    }
    svg.text("axis", "middle", (left + right) / 2.0, bottom + 37.0, frame.axis);
    if let Some((v, name)) = frame.limit {
        let x = scale.at(v);
        svg.line("limit", (x, top - 6.0), (x, bottom));
        svg.text("limitname", "middle", x, top - 10.0, name);
    }
    for (i, r) in rows.iter().enumerate() {
        let y = top + step * i as f64 + 14.0;
        svg.text("name", "end", left - 10.0, y + 4.0, &fit(&r.label, labels));
        let (low, high) = (bound(r.value.1, r.value.0), bound(r.value.2, r.value.0));
        if wide(r) {
            svg.line("whisker", (scale.at(low), y), (scale.at(high), y));
        } else if high > low {
            svg.whisker((scale.at(low), y), (scale.at(high), y));
        }
        let title = format!("{}: {} [{}, {}]", r.label, sig(r.value.0, 3), sig(r.value.1, 3), sig(r.value.2, 3));
        svg.mark(r.shape, r.class, scale.at(r.value.0), y, &title);
        svg.text("value", "start", right + 10.0, y + 4.0, &fit(&r.note, notes));
    }
    Some(svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_intervals_do_not_stretch_the_axis() {
        let row = |value| Row { label: "a".into(), value, class: "c1", shape: 0, note: "pass".into() };
        let frame = Frame { title: "t", axis: "pp", limit: Some((1.0, "margin")), wide: false };
        assert!(intervals(&[], &frame).is_none() && intervals(&[row((f64::NAN, 0.0, 1.0))], &frame).is_none());
        let text = intervals(&[row((0.2, f64::NEG_INFINITY, f64::INFINITY)), row((0.1, -1e9, 1e9))], &frame).unwrap();
        assert!(!text.contains("inf") && !text.contains("NaN"), "{text}");
        assert!(text.contains(">1<"), "the margin is on the axis: {text}");
    }
}
