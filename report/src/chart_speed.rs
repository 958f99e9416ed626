//! The chart of rates, one panel for each test.

use lowbit_bench::record::BenchRow;

use crate::format::sig;
use crate::svg::{Scale, Svg, WIDTH, legend};

/// Tests in order of appearance, each with its rows by batch.
pub(crate) fn by_test(rows: &[BenchRow]) -> Vec<(&str, Vec<&BenchRow>)> {
    let mut out: Vec<(&str, Vec<&BenchRow>)> = Vec::new();
    for row in rows {
        match out.iter_mut().find(|t| t.0 == row.test) {
            Some(t) => t.1.push(row),
            None => out.push((&row.test, vec![row])),
        }
    }
    for t in &mut out {
        t.1.sort_by_key(|r| (r.batch, u8::from(r.role != "candidate")));
    }
    out
}

/// Smallest and largest finite sample.
pub(crate) fn spread(samples: &[f64]) -> Option<(f64, f64)> {
    let finite = || samples.iter().copied().filter(|v| v.is_finite());
    let low = finite().fold(f64::INFINITY, f64::min);
    let high = finite().fold(f64::NEG_INFINITY, f64::max);
    (low <= high).then_some((low, high))
}

/// One panel of bars for each test; whiskers reach from the slowest to the fastest repetition. `None` without rates.
pub(crate) fn throughput(rows: &[BenchRow]) -> Option<String> {
    let tests = by_test(rows);
    if !rows.iter().any(|r| r.tokens_per_second.is_finite()) {
        return None;
    }
    let mut out = String::new();
    if rows.iter().any(|r| r.role != "candidate") {
        out += &legend(&[(1, "c1".to_owned(), "candidate".to_owned()), (1, "cx".to_owned(), "reference".to_owned())]);
    }
    for (test, rows) in &tests {
        out += &panel(test, rows);
    }
    Some(out)
}

fn panel(test: &str, rows: &[&BenchRow]) -> String {
    const BAR: f64 = 18.0;
    let most = rows
        .iter()
        .flat_map(|r| [Some(r.tokens_per_second), spread(&r.samples).map(|s| s.1)])
        .flatten()
        .filter(|v| v.is_finite())
        .fold(0.0, f64::max);
    let (left, right) = (84.0, WIDTH - 84.0);
    let scale = Scale::linear(most, left, right);
    let mut places = Vec::with_capacity(rows.len());
    let mut y = 30.0;
    for (i, row) in rows.iter().enumerate() {
        if i > 0 {
            y += if rows[i - 1].batch == row.batch { BAR + 3.0 } else { BAR + 13.0 };
        }
        places.push(y);
    }
    let bottom = y + BAR + 6.0;
    let said: Vec<String> =
        rows.iter().map(|r| format!("{}, batch {}: {}", r.role, r.batch, sig(r.tokens_per_second, 3))).collect();
    let mut svg = Svg::new(bottom + 42.0, &format!("Tokens a second, {test}"), &format!("{}.", said.join("; ")));
    svg.text("head", "start", 0.0, 14.0, test);
    for (v, label) in scale.ticks() {
        let x = scale.at(v);
        svg.line("grid", (x, 24.0), (x, bottom));
        svg.text("tick", "middle", x, bottom + 16.0, &label);
    }
    svg.text("axis", "middle", (left + right) / 2.0, bottom + 36.0, "tokens/s");
    for (i, (row, y)) in rows.iter().zip(places).enumerate() {
        if i == 0 || rows[i - 1].batch != row.batch {
            let same = rows.iter().filter(|r| r.batch == row.batch).count() as f64;
            let middle = y + (same * BAR + (same - 1.0) * 3.0) / 2.0 + 4.0;
            svg.text("name", "end", left - 10.0, middle, &format!("batch {}", row.batch));
        }
        let rate = row.tokens_per_second;
        let range = spread(&row.samples);
        let x = scale.at(rate);
        let class = if row.role == "candidate" { "c1" } else { "cx" };
        let detail = range.map_or(String::new(), |(low, high)| {
            format!(", {} repetitions {} – {}", row.samples.len(), sig(low, 4), sig(high, 4))
        });
        let title =
            format!("{} ({}), {test}, batch {}: {} tokens/s{detail}", row.role, row.model, row.batch, sig(rate, 4));
        svg.rect(class, left, y, x - left, BAR, &title);
        let mut end = x;
        if let Some((low, high)) = range {
            let (a, b, middle) = (scale.at(low), scale.at(high), y + BAR / 2.0);
            svg.whisker((a, middle), (b, middle));
            end = end.max(b);
        }
        svg.text("value", "start", end + 6.0, y + BAR / 2.0 + 4.0, &sig(rate, 3));
    }
    svg.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gives_no_nan() {
        let row = BenchRow {
            role: "candidate".into(),
            model: "m".into(),
            test: "tg8".into(),
            batch: 1,
            tokens_per_second: 0.0,
            samples: vec![f64::NAN],
            samples_ns: vec![],
            bytes_per_step: 0,
            roofline_frac: None,
            flops: None,
            flops_frac: None,
        };
        assert!(throughput(&[]).is_none());
        let text = throughput(&[row]).unwrap();
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }
}
