//! The distribution of KL over tokens: its percentiles, a line for each variant.

use crate::format::sig;
use crate::svg::{Scale, Svg, WIDTH, colour, legend};

/// One line: name, percentiles by label, mean.
pub(crate) type Line<'a> = (&'a str, &'a [(String, f64)], f64);

/// Percentiles on evenly spaced stops, logarithmic; of a single line the mean as a broken line. `None` without positive values.
pub(crate) fn percentiles(lines: &[Line]) -> Option<String> {
    let usable = || lines.iter().flat_map(|l| l.1.iter().map(|p| p.1)).filter(|v| v.is_finite() && *v > 0.0);
    usable().next()?;
    let alone = lines.len() == 1;
    let means = lines.iter().map(|l| l.2).filter(|m| alone && m.is_finite());
    let max = usable().chain(means).fold(f64::MIN, f64::max);
    // Rounding noise near zero would stretch the axis: seven decades, and what is below is left out.
    let min = usable().fold(f64::MAX, f64::min).max(max * 1e-7);
    let stops: Vec<&str> = lines.iter().max_by_key(|l| l.1.len())?.1.iter().map(|p| p.0.as_str()).collect();
    let (left, right, top, bottom) = (84.0, WIDTH - 76.0, 16.0, 216.0);
    let scale = Scale::log(min, max, bottom, top);
    let said: Vec<String> = lines
        .iter()
        .map(|(name, points, mean)| {
            let of = |label: &str| {
                let found = points.iter().find(|p| p.0 == label);
                found.map_or(String::new(), |p| format!(", {label}th percentile {}", sig(p.1, 3)))
            };
            let name = if name.is_empty() { String::new() } else { format!("{name}: ") };
            format!("{name}mean {}{}{}", sig(*mean, 3), of("50"), of("99"))
        })
        .collect();
    let title = "Percentiles of the Kullback-Leibler divergence per token";
    let mut svg = Svg::new(268.0, title, &format!("Nats per token. {}.", said.join("; ")));
    for (v, label) in scale.ticks() {
        let y = scale.at(v);
        svg.line("grid", (left, y), (right, y));
        svg.text("tick", "end", left - 8.0, y + 4.0, &label);
    }
    let hidden = lines.iter().any(|l| l.1.iter().any(|p| p.1 < min));
    let axis =
        if hidden { "percentile of tokens, % (values near zero are left out)" } else { "percentile of tokens, %" };
    svg.vertical(18.0, (top + bottom) / 2.0, "KL, nats/token (log scale)");
    svg.text("axis", "middle", (left + right) / 2.0, 262.0, axis);
    let step = (right - left - 40.0) / (stops.len().max(2) - 1) as f64;
    let x_of = |i: usize| left + 20.0 + step * i as f64;
    for (i, label) in stops.iter().enumerate() {
        svg.text("tick", "middle", x_of(i), bottom + 20.0, label);
    }
    for (n, (name, points, mean)) in lines.iter().enumerate() {
        let places: Vec<(f64, f64, String)> = stops
            .iter()
            .enumerate()
            .filter_map(|(i, label)| {
                let (_, value) = points.iter().find(|p| p.0 == *label)?;
                let told = if name.is_empty() { String::new() } else { format!("{name}, ") };
                (value.is_finite() && *value >= min)
                    .then(|| (x_of(i), scale.at(*value), format!("{told}{label} %: {}", sig(*value, 3))))
            })
            .collect();
        if alone && mean.is_finite() && *mean > 0.0 {
            let y = scale.at(*mean);
            svg.line("mean", (left, y), (right, y));
            svg.text("value", "start", right + 6.0, y + 4.0, "mean");
        }
        let colour = colour(n);
        svg.polyline(&format!("line s{colour}"), &places.iter().map(|p| (p.0, p.1)).collect::<Vec<_>>());
        for (x, y, title) in &places {
            svg.mark(n, &format!("c{colour}"), *x, *y, title);
        }
    }
    let entries: Vec<_> =
        lines.iter().enumerate().map(|(i, l)| (i, format!("c{}", colour(i)), l.0.to_owned())).collect();
    let legend = if alone { String::new() } else { legend(&entries) };
    Some(legend + &svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_left_out() {
        let odd: Vec<(String, f64)> = vec![("50".into(), f64::NAN), ("99".into(), 0.0)];
        assert!(percentiles(&[("", &odd, 0.0)]).is_none() && percentiles(&[]).is_none());
        let one: Vec<(String, f64)> = vec![("50".into(), 1.0), ("99".into(), f64::INFINITY)];
        let text = percentiles(&[("", &one, f64::NAN), ("b", &odd, 1.0)]).unwrap();
        assert!(
            !text.contains("NaN") && !text.contains("inf") && text.matches("<path class=\"mark").count() == 1,
            "{text}"
        );
    }
}
