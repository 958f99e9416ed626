//! The bottom of the charts: an SVG being written, axes and tick marks.

use std::fmt::Write as _;

use crate::format::sig;

/// Width of every chart in user units; the page scales it.
pub(crate) const WIDTH: f64 = 880.0;

/// About how wide `text` is in the charts' type size.
pub(crate) fn text_width(text: &str) -> f64 {
    6.9 * text.chars().count() as f64
}

/// `text` cut to about `width` user units, with an ellipsis.
pub(crate) fn fit(text: &str, width: f64) -> String {
    let most = (width / 6.9).max(2.0) as usize;
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(most - 1).collect();
    out.push('…');
    out
}

/// Colour of the `i`th variant: `c1` to `c8`, over again.
pub(crate) fn colour(i: usize) -> String {
    format!("{}", i % 8 + 1)
}

/// Text safe inside an element or a quoted attribute.
pub(crate) fn esc(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A coordinate with one decimal; never NaN.
pub(crate) fn at(v: f64) -> String {
    if v.is_finite() { format!("{v:.1}") } else { "0".to_owned() }
}

/// An SVG under construction.
pub(crate) struct Svg {
    height: f64,
    title: String,
    description: String,
    body: String,
}

impl Svg {
    /// `title` names the chart and `description` says what it shows, to who cannot see it.
    pub(crate) fn new(height: f64, title: &str, description: &str) -> Self {
        Self { height, title: esc(title), description: esc(description), body: String::new() }
    }

    pub(crate) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = write!(
            self.body,
            r#"<line class="{class}" x1="{}" y1="{}" x2="{}" y2="{}"/>"#,
            at(from.0),
            at(from.1),
            at(to.0),
            at(to.1)
        );
    }

    /// `anchor` is `start`, `middle` or `end`.
    pub(crate) fn text(&mut self, class: &str, anchor: &str, x: f64, y: f64, text: &str) {
        let _ = write!(
            self.body,
            r#"<text class="{class}" text-anchor="{anchor}" x="{}" y="{}">{}</text>"#,
            at(x),
            at(y),
            esc(text)
        );
    }

    /// A title along the vertical axis.
    pub(crate) fn vertical(&mut self, x: f64, y: f64, text: &str) {
        let _ = write!(
            self.body,
            r#"<text class="axis" text-anchor="middle" transform="translate({} {}) rotate(-90)">{}</text>"#,
            at(x),
            at(y),
            esc(text)
        );
    }

    pub(crate) fn rect(&mut self, class: &str, x: f64, y: f64, w: f64, h: f64, title: &str) {
        let _ = write!(
            self.body,
            r#"<rect class="{class}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>"#,
            at(x),
            at(y),
            at(w.max(0.0)),
            at(h.max(0.0)),
            esc(title)
        );
    }

    pub(crate) fn polyline(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{},{}", at(*x), at(*y))).collect();
        let _ = write!(self.body, r#"<polyline class="{class}" points="{}"/>"#, points.join(" "));
    }

    pub(crate) fn mark(&mut self, shape: usize, class: &str, x: f64, y: f64, title: &str) {
        let _ = write!(
            self.body,
            r#"<path class="mark {class}" d="{}"><title>{}</title></path>"#,
            mark_path(shape, x, y, 4.0),
            esc(title)
        );
    }

    /// Outlines of one class with one title: many small parts take few bytes this way.
    pub(crate) fn path(&mut self, class: &str, d: &str) {
        let _ = write!(self.body, r#"<path class="{class}" d="{d}"/>"#);
    }

    pub(crate) fn circle(&mut self, class: &str, (x, y): (f64, f64), r: f64, title: &str) {
        let (x, y, r) = (at(x), at(y), at(r));
        let _ = write!(
            self.body,
            r#"<circle class="{class}" cx="{x}" cy="{y}" r="{r}"><title>{}</title></circle>"#,
            esc(title)
        );
    }

    /// A line from `low` to `high` with ends across it.
    pub(crate) fn whisker(&mut self, low: (f64, f64), high: (f64, f64)) {
        self.line("whisker", low, high);
        let flat = (low.1 - high.1).abs() < 1e-9;
        let (dx, dy) = if flat { (0.0, 4.0) } else { (4.0, 0.0) };
        for (x, y) in [low, high] {
            self.line("whisker", (x - dx, y - dy), (x + dx, y + dy));
        }
    }

    /// The finished element in a box that scrolls where the screen is narrow.
    pub(crate) fn finish(self) -> String {
        format!(
            r#"<div class="chart scroll" role="region" aria-label="{}" tabindex="0"><svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg></div>"#,
            self.title,
            at(WIDTH),
            at(self.height),
            self.title,
            self.description,
            self.body
        )
    }
}

/// One of seven outlines, so that a series is told apart without its colour.
fn mark_path(shape: usize, x: f64, y: f64, r: f64) -> String {
    let unit: &[(f64, f64)] = match shape % 7 {
        0 => {
            let (left, d) = (at(x - r), at(2.0 * r));
            let r = at(r);
            return format!("M{left} {} a{r} {r} 0 1 0 {d} 0 a{r} {r} 0 1 0 -{d} 0z", at(y));
        }
        1 => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2 => &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
        3 => &[(0.0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
        4 => &[(0.0, 1.2), (1.15, -0.85), (-1.15, -0.85)],
        5 => &[(-1.2, 0.0), (0.85, -1.15), (0.85, 1.15)],
        _ => &[(1.2, 0.0), (-0.85, -1.15), (-0.85, 1.15)],
    };
    let points: Vec<String> = unit.iter().map(|(dx, dy)| format!("{} {}", at(x + dx * r), at(y + dy * r))).collect();
    format!("M{}z", points.join("L"))
}

/// A row of names with their marks. Entries are (shape, colour class, name).
pub(crate) fn legend(entries: &[(usize, String, String)]) -> String {
    let mut out = String::from(r#"<ul class="legend">"#);
    for (shape, class, name) in entries {
        let _ = write!(
            out,
            r#"<li><svg viewBox="0 0 12 12" aria-hidden="true"><path class="{class}" d="{}"/></svg>{}</li>"#,
            mark_path(*shape, 6.0, 6.0, 4.5),
            esc(name)
        );
    }
    out.push_str("</ul>");
    out
}

/// Values onto a stretch of user units.
pub(crate) struct Scale {
    log: bool,
    low: f64,
    high: f64,
    start: f64,
    end: f64,
}

impl Scale {
    /// From zero to the next round number above `max`.
    pub(crate) fn linear(max: f64, start: f64, end: f64) -> Self {
        let max = if max.is_finite() && max > 0.0 { max } else { 1.0 };
        let step = nice_step(max);
        Self { log: false, low: 0.0, high: (max / step - 1e-9).ceil() * step, start, end }
    }

    /// Round numbers around `low` to `high`, zero inside.
    pub(crate) fn around_zero(low: f64, high: f64, start: f64, end: f64) -> Self {
        let (low, high) =
            (if low.is_finite() { low.min(0.0) } else { 0.0 }, if high.is_finite() { high.max(0.0) } else { 0.0 });
        let span = if high - low > 0.0 { high - low } else { 1.0 };
        let step = nice_step(span);
        let (below, above) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
        let above = if above <= below { below + 1.0 } else { above };
        Self { log: false, low: below * step, high: above * step, start, end }
    }

    /// Logarithmic over whole thirds of decades (1, 2, 5); both ends positive.
    pub(crate) fn log(min: f64, max: f64, start: f64, end: f64) -> Self {
        let min = if min.is_finite() && min > 0.0 { min } else { 1e-3 };
        let max = if max.is_finite() && max > min { max } else { min * 10.0 };
        let (mut low, mut high) = (10f64.powf(min.log10().floor()), 10f64.powf(max.log10().ceil()));
        for m in [5.0, 2.0] {
            if low * m <= min {
                low *= m;
                break;
            }
        }
        for m in [5.0, 2.0] {
            if high / m >= max {
                high /= m;
                break;
            }
        }
        Self { log: true, low, high, start, end }
    }

    /// Where `v` is; values outside are moved to the border.
    pub(crate) fn at(&self, v: f64) -> f64 {
        let part = if self.log {
            (v.max(self.low) / self.low).log10() / (self.high / self.low).log10()
        } else {
            (v - self.low) / (self.high - self.low)
        };
        let part = if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
        self.start + part * (self.end - self.start)
    }

    /// Tick values with their labels.
    pub(crate) fn ticks(&self) -> Vec<(f64, String)> {
        if !self.log {
            let step = nice_step(self.high - self.low);
            let (from, to) = ((self.low / step - 1e-9).ceil() as i64, (self.high / step + 1e-9).floor() as i64);
            return (from..=to).map(|i| i as f64 * step).map(|v| (v, plain(v))).collect();
        }
        let (from, to) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let dense = to - from <= 3;
        let mut out = Vec::new();
        for e in from..=to {
            for m in if dense { &[1.0, 2.0, 5.0][..] } else { &[1.0][..] } {
                let v = m * 10f64.powi(e);
                if v >= self.low * 0.999 && v <= self.high * 1.001 {
                    out.push((v, plain(v)));
                }
            }
        }
        out
    }
}

/// A tick's label without trailing zeros.
fn plain(v: f64) -> String {
    let text = sig(v, 3);
    let (head, tail) = text.split_once(" × ").map_or((text.as_str(), ""), |(h, t)| (h, t));
    let head = if head.contains('.') { head.trim_end_matches('0').trim_end_matches('.') } else { head };
    match (head, tail) {
        (head, "") => head.to_owned(),
        ("1", tail) => tail.to_owned(),
        (head, tail) => format!("{head}×{tail}"),
    }
}

fn nice_step(max: f64) -> f64 {
    let raw = max / 5.0;
    let base = 10f64.powf(raw.log10().floor());
    let m = raw / base;
    base * if m <= 1.0 {
        1.0
    } else if m <= 2.0 {
        2.0
    } else if m <= 5.0 {
        5.0
    } else {
        10.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_round_and_finite() {
        let s = Scale::linear(988.0, 0.0, 100.0);
        assert_eq!(s.ticks().last().map(|t| t.1.clone()), Some("1,000".to_owned()));
        assert_eq!(s.at(f64::NAN), 0.0);
        let l = Scale::log(0.0, f64::NAN, 0.0, 100.0);
        assert!(l.at(0.0).is_finite() && l.ticks().len() > 1);
        let same = Scale::log(1.0, 1.0, 0.0, 1.0);
        assert!(same.at(1.0).is_finite());
        assert_eq!(plain(1e-7), "10⁻⁷");
        assert_eq!(plain(0.05), "0.05");
    }
}
