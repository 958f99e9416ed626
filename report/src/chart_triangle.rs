//! Quality, latency and cost of every variant in one chart.

use crate::svg::{Scale, Svg, WIDTH, colour, fit, text_width};

/// One model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Point {
    /// Name.
    pub name: String,
    /// Latency, ms, from its fastest to its slowest.
    pub latency: (f64, f64, f64),
    /// What was lost, with its interval: value, low, high.
    pub loss: (f64, f64, f64),
    /// What it costs, in any unit.
    pub cost: f64,
    /// The same as text.
    pub cost_text: String,
    /// The float model: drawn in grey.
    pub float: bool,
}

/// What the axes are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Axes {
    /// Of latency.
    pub latency: String,
    /// Of loss.
    pub loss: String,
    /// What areas stand for.
    pub cost: String,
}

type Box4 = (f64, f64, f64, f64);

fn overlap(a: &Box4, b: &Box4) -> bool {
    a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
}

/// Latency to the right, loss upwards, the area of a disc for the cost: what lies lower, further left and is smaller is better.
/// `None` with fewer than two models.
pub(crate) fn triangle(points: &[Point], axes: &Axes) -> Option<String> {
    let finite = |p: &&Point| p.latency.0.is_finite() && p.loss.0.is_finite() && p.cost.is_finite() && p.cost > 0.0;
    let points: Vec<&Point> = points.iter().filter(finite).collect();
    if points.len() < 2 {
        return None;
    }
    let ends = |f: &dyn Fn(&Point) -> [f64; 3]| {
        let all: Vec<f64> = points.iter().flat_map(|p| f(p)).filter(|v| v.is_finite()).collect();
        (all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(f64::NEG_INFINITY, f64::max))
    };
    let (left, right, top, bottom) = (84.0, WIDTH - 24.0, 18.0, 330.0);
    let slowest = ends(&|p| [p.latency.0, p.latency.1, p.latency.2]).1;
    // A name stands beside its disc: room for the last one.
    let x = Scale::linear(slowest * 1.12, left, right);
    let (low, high) = ends(&|p| [p.loss.0, p.loss.1, p.loss.2]);
    // The disc of the float model lies on zero: room for its lower half.
    let floor = if low < 0.0 { bottom } else { bottom - 28.0 };
    let y = Scale::around_zero(low, high * 1.06, floor, top);
    let dearest = points.iter().map(|p| p.cost).fold(0.0, f64::max);
    let radius = |p: &Point| (22.0 * (p.cost / dearest).sqrt()).max(3.0);
    let sentence = |p: &Point| {
        let (latency, loss) = (crate::format::sig(p.latency.0, 3), crate::format::sig(p.loss.0, 3));
        format!("{}: {} {latency}, {} {loss}, {} {}", p.name, axes.latency, axes.loss, axes.cost, p.cost_text)
    };
    let said: Vec<String> = points.iter().map(|p| sentence(p)).collect();
    let mut svg = Svg::new(bottom + 54.0, "Quality, latency and cost", &format!("{}.", said.join("; ")));
    for (v, label) in y.ticks() {
        let at = y.at(v);
        svg.line(if v.abs() < 1e-12 { "axisline" } else { "grid" }, (left, at), (right, at));
        svg.text("tick", "end", left - 8.0, at + 4.0, &label);
    }
    for (v, label) in x.ticks() {
        svg.text("tick", "middle", x.at(v), bottom + 18.0, &label);
    }
    svg.text("axis", "middle", (left + right) / 2.0, bottom + 44.0, &axes.latency);
    svg.vertical(18.0, (top + bottom) / 2.0, &axes.loss);
    svg.text("tick", "start", left + 6.0, bottom - 8.0, "↙ better");
    let mut taken: Vec<Box4> = vec![(left, bottom - 22.0, left + 70.0, bottom)];
    // A disc with its whiskers.
    let extent = |p: &Point| -> Box4 {
        let (px, py, r) = (x.at(p.latency.0), y.at(p.loss.0), radius(p));
        let (fast, slow) = (x.at(p.latency.1.min(p.latency.0)), x.at(p.latency.2.max(p.latency.0)));
        let (most, least) = (y.at(p.loss.2.max(p.loss.0)), y.at(p.loss.1.min(p.loss.0)));
        (fast.min(px - r), most.min(py - r), slow.max(px + r), least.max(py + r))
    };
    taken.extend(points.iter().map(|p| extent(p)));
    // Large discs first, so that none hides a small one.
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|a, b| points[*b].cost.total_cmp(&points[*a].cost));
    for &i in &order {
        let p = points[i];
        let (px, py) = (x.at(p.latency.0), y.at(p.loss.0));
        let before = points.iter().take(i).filter(|q| !q.float).count();
        let class = if p.float { "cx".to_owned() } else { format!("c{}", colour(before)) };
        svg.circle(&format!("disc {class}"), (px, py), radius(p), &sentence(p));
        if p.loss.2 > p.loss.1 {
            svg.whisker((px, y.at(p.loss.1)), (px, y.at(p.loss.2)));
        }
        if p.latency.2 > p.latency.1 {
            svg.whisker((x.at(p.latency.1), py), (x.at(p.latency.2), py));
        }
    }
    for p in &points {
        let (px, py) = (x.at(p.latency.0), y.at(p.loss.0));
        let own = extent(p);
        let text = fit(&format!("{}, {}", p.name, p.cost_text), 300.0);
        let w = text_width(&text);
        let places = [
            (own.2 + 6.0, py - 6.0, "start"),
            (own.0 - 6.0, py - 6.0, "end"),
            (px, own.1 - 6.0, "middle"),
            (px, own.3 + 14.0, "middle"),
            (own.2 + 6.0, py - 22.0, "start"),
            (own.2 + 6.0, py + 18.0, "start"),
        ];
        let area = |&(tx, ty, anchor): &(f64, f64, &str)| -> Box4 {
            let start = match anchor {
                "start" => tx,
                "end" => tx - w,
                _ => tx - w / 2.0,
            };
            (start, ty - 11.0, start + w, ty + 4.0)
        };
        let inside = |b: &Box4| b.0 >= left && b.2 <= WIDTH && b.1 >= 0.0 && b.3 <= bottom + 2.0;
        let free = |b: &Box4| taken.iter().all(|t| *t == own || !overlap(t, b));
        let (tx, ty, anchor) = places.into_iter().find(|c| inside(&area(c)) && free(&area(c))).unwrap_or(places[0]);
        taken.push(area(&(tx, ty, anchor)));
        svg.text("name", anchor, tx, ty, &text);
    }
    Some(svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_models_are_a_chart_and_names_do_not_collide() {
        let axes = Axes { latency: "ms".into(), loss: "KL".into(), cost: "bytes".into() };
        let point = |name: &str, ms: f64, loss: f64| Point {
            name: name.into(),
            latency: (ms, ms, ms),
            loss: (loss, loss, loss),
            cost: 5.0,
            cost_text: "5 MB".into(),
            float: false,
        };
        assert!(triangle(&[point("a", 1.0, 0.0)], &axes).is_none());
        assert!(triangle(&[point("a", 1.0, 0.0), point("b", f64::NAN, 0.0)], &axes).is_none());
        let text = triangle(&[point("first", 1.0, 0.1), point("second", 1.0, 0.1)], &axes).unwrap();
        let place = |name: &str| {
            let end = text.find(&format!(">{name}, 5 MB<")).unwrap();
            text[..end].rfind("<text").map(|start| text[start..end].to_owned()).unwrap()
        };
        assert_ne!(place("first"), place("second"));
    }
}
