//! Latencies over the offered load, and decode rates against the roofline.

use crate::format::sig;
use crate::svg::{Scale, Svg, WIDTH, legend, text_width};

/// A place of a line: x, y, and the interval of y.
pub(crate) type Place = (f64, f64, Option<(f64, f64)>);

/// A line.
pub(crate) struct Line {
    /// Name.
    pub name: String,
    /// Number of its colour and mark: `1` to `8`, or `x`.
    pub colour: String,
    /// Shape of its marks.
    pub shape: usize,
    /// By x.
    pub places: Vec<Place>,
}

/// What stands around the lines.
pub(crate) struct Frame<'a> {
    /// Of the chart.
    pub title: &'a str,
    /// Of x.
    pub x: &'a str,
    /// Of y.
    pub y: &'a str,
    /// Horizontal broken lines with their names.
    pub limits: &'a [(f64, String)],
    /// A curve `rate = bandwidth / x` above everything, with its name.
    pub roof: Option<(f64, String)>,
    /// Whether x is logarithmic too.
    pub log_x: bool,
}

/// Lines with marks and whiskers, y logarithmic. `None` without a finite place.
pub(crate) fn lines(lines: &[Line], frame: &Frame) -> Option<String> {
    let usable = |p: &&Place| p.0.is_finite() && p.1.is_finite() && p.1 > 0.0 && (!frame.log_x || p.0 > 0.0);
    let places = || lines.iter().flat_map(|l| l.places.iter().filter(usable));
    places().next()?;
    let extreme = |f: fn(f64, f64) -> f64, start: f64, v: &mut dyn Iterator<Item = f64>| v.fold(start, f);
    let positive = |v: &f64| v.is_finite() && *v > 0.0;
    let ys = || {
        places()
            .flat_map(|p| [Some(p.1), p.2.map(|i| i.0), p.2.map(|i| i.1)])
            .flatten()
            .chain(frame.limits.iter().map(|l| l.0))
            .chain(frame.roof.iter().flat_map(|r| places().flat_map(|p| [r.0 / (p.0 * 0.8), r.0 / (p.0 * 1.25)])))
            .filter(positive)
    };
    let (low, high) = (extreme(f64::min, f64::INFINITY, &mut ys()), extreme(f64::max, 0.0, &mut ys()));
    let (near, far) = (
        extreme(f64::min, f64::INFINITY, &mut places().map(|p| p.0)),
        extreme(f64::max, f64::NEG_INFINITY, &mut places().map(|p| p.0)),
    );
    let (left, right, top, bottom) = (84.0, WIDTH - 24.0, 16.0, 246.0);
    let y = Scale::log(low, high, bottom, top);
    let x = if frame.log_x { Scale::log(near * 0.8, far * 1.25, left, right) } else { Scale::linear(far, left, right) };
    let said: Vec<String> = lines
        .iter()
        .filter_map(|l| {
            let (first, last) = (l.places.iter().find(usable)?, l.places.iter().rfind(usable)?);
            Some(format!(
                "{}: {} at {}, {} at {}",
                l.name,
                sig(first.1, 3),
                sig(first.0, 3),
                sig(last.1, 3),
                sig(last.0, 3)
            ))
        })
        .collect();
    let mut svg = Svg::new(bottom + 54.0, frame.title, &format!("{} over {}. {}.", frame.y, frame.x, said.join("; ")));
    for (v, label) in y.ticks() {
        let at = y.at(v);
        svg.line("grid", (left, at), (right, at));
        svg.text("tick", "end", left - 8.0, at + 4.0, &label);
    }
    for (v, label) in x.ticks() {
        svg.text("tick", "middle", x.at(v), bottom + 18.0, &label);
    }
    svg.line("axisline", (left, bottom), (right, bottom));
    svg.text("axis", "middle", (left + right) / 2.0, bottom + 44.0, frame.x);
    svg.vertical(18.0, (top + bottom) / 2.0, frame.y);
    for (v, name) in frame.limits {
        let at = y.at(*v);
        svg.line("limit", (left, at), (right, at));
        svg.text("limitname", "start", left + 6.0, at - 5.0, name);
    }
    if let Some((bandwidth, name)) = &frame.roof {
        let ends = [near * 0.8, far * 1.25].map(|v| (x.at(v), y.at(bandwidth / v)));
        svg.polyline("line roof", &ends);
        let middle = (near * far).sqrt();
        let start = (x.at(middle) + 10.0).min(right - text_width(name));
        svg.text("limitname", "start", start, (y.at(bandwidth / middle) - 6.0).max(top + 8.0), name);
    }
    for l in lines {
        let own: Vec<&Place> = l.places.iter().filter(usable).collect();
        if !frame.log_x {
            svg.polyline(
                &format!("line s{}", l.colour),
                &own.iter().map(|p| (x.at(p.0), y.at(p.1))).collect::<Vec<_>>(),
            );
        }
        for p in own {
            if let Some((a, b)) = p.2.filter(|i| positive(&i.0) && positive(&i.1)) {
                svg.whisker((x.at(p.0), y.at(a)), (x.at(p.0), y.at(b)));
            }
            let range = p.2.map_or(String::new(), |i| format!(" [{}, {}]", sig(i.0, 3), sig(i.1, 3)));
            let title = format!("{}: {}{range} at {}", l.name, sig(p.1, 3), sig(p.0, 3));
            svg.mark(l.shape, &format!("c{}", l.colour), x.at(p.0), y.at(p.1), &title);
        }
    }
    let entries: Vec<_> = lines.iter().map(|l| (l.shape, format!("c{}", l.colour), l.name.clone())).collect();
    Some(legend(&entries) + &svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_places_are_left_out() {
        let line = |places| Line { name: "p50".into(), colour: "1".into(), shape: 0, places };
        let frame = Frame { title: "t", x: "load", y: "ms", limits: &[], roof: None, log_x: false };
        assert!(lines(&[], &frame).is_none());
        assert!(lines(&[line(vec![(1.0, f64::NAN, None), (f64::NAN, 1.0, None), (1.0, 0.0, None)])], &frame).is_none());
        let odd = vec![(1.0, 5.0, Some((f64::NAN, 6.0))), (2.0, 7.0, Some((6.0, f64::INFINITY)))];
        let limits = [(9.0, "limit".to_owned())];
        let frame = Frame { limits: &limits, ..frame };
        let text = lines(&[line(odd)], &frame).unwrap();
        assert!(!text.contains("NaN") && text.matches("class=\"mark").count() == 2, "{text}");
        assert!(text.contains(">limit<"));
        let frame = Frame { roof: Some((1e9, "20 GB/s".into())), log_x: true, ..frame };
        let text = lines(&[line(vec![(1e6, 500.0, None)])], &frame).unwrap();
        assert!(text.contains("20 GB/s") && !text.contains("inf"), "{text}");
    }
}
