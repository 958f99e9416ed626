//! What the page shows of single layers: their errors, what happened to them, and whom the drift is blamed on.

use lowbit_eval::drift::blame::{Blame, Suspect, Unit};
use lowbit_quantize::record::QuantizeRecord;
use serde_json::{Value, json};

use crate::Variant;
use crate::chart_layers;
use crate::chart_tasks::{Frame, Row, intervals};
use crate::format::{self as f, bytes, count, sig};
use crate::table::{Table, code};

/// Layers in the table, suspects in the chart.
const WORST: usize = 10;
/// Events listed.
const EVENTS: usize = 100;

/// The section on layers: one entry for each variant that was quantized here.
pub(crate) fn layers(variants: &[Variant]) -> Vec<Value> {
    let quantized = || variants.iter().filter_map(|v| Some((v.name.as_str(), v.records.quantize.as_ref()?)));
    let all: usize = quantized().map(|(_, q)| chart_layers::count(&q.layers)).sum();
    let mut out = Vec::new();
    for (name, q) in quantized().filter(|(_, q)| !q.layers.is_empty()) {
        let mut worst: Vec<_> = q.layers.iter().collect();
        worst.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
        let mut t = Table::new(
            "Largest errors",
            &[
                "Linear",
                "#Relative error",
                "#Proxy loss",
                "Shape (out × in)",
                "Method",
                "#Largest |input|",
                "#Dead columns",
                "#Damping",
            ],
        );
        for l in worst.into_iter().take(WORST) {
            t.row(vec![
                code(l.name.clone(), &l.scheme),
                sig(l.relative_error, 3).into(),
                sig(l.proxy_loss, 3).into(),
                format!("{} × {}", l.out_features, l.in_features).into(),
                l.method.as_str().into(),
                sig(f64::from(l.input_abs_max), 3).into(),
                count(l.dead_columns as u64).into(),
                sig(l.damp_frac, 3).into(),
            ]);
        }
        let events = || q.layers.iter().flat_map(|l| l.events.iter().map(move |e| (&l.name, e)));
        let listed: Vec<Value> =
            events().take(EVENTS).map(|(layer, event)| json!({ "layer": layer, "event": event })).collect();
        out.push(json!({
            "name": name,
            "count": count(q.layers.len() as u64),
            "seconds": f::seconds(q.seconds),
            "chart": chart_layers::heat_map(&q.layers, name, all),
            "table": t,
            "coverage": coverage(q),
            "events": listed,
            "more": events().count().saturating_sub(EVENTS),
        }));
    }
    out
}

/// Calibration tokens of each block's experts; `None` without experts.
pub(crate) fn coverage(q: &QuantizeRecord) -> Option<Table> {
    let mut t = Table::new(
        "Calibration tokens of experts",
        &["#Block", "#Experts", "#Fewest tokens", "#Median", "#Needed", "#Starved", "#Dead"],
    );
    for e in &q.experts {
        let numbers =
            [e.block as u64, e.tokens.len() as u64, e.min, e.median, e.needed, e.starved as u64, e.dead as u64];
        t.row(numbers.map(|n| count(n).into()).into());
    }
    (!t.is_empty()).then_some(t)
}

fn short(module: &str) -> &str {
    module.strip_prefix("model.").unwrap_or(module)
}

fn blame_chart(name: &str, b: &Blame) -> Option<String> {
    let rows: Vec<Row> = b
        .suspects
        .iter()
        .take(WORST)
        .map(|s| Row {
            label: short(&s.module).to_owned(),
            value: (s.regained.value, s.regained.low, s.regained.high),
            class: "c1",
            shape: 0,
            note: format!("costs {}", bytes(s.bytes.unsigned_abs())),
        })
        .collect();
    let title = if name.is_empty() { "Blame".to_owned() } else { format!("Blame, {name}") };
    intervals(&rows, &Frame { title: &title, axis: "KL regained, nats/token", limit: None, wide: true })
}

fn blame_table(b: &Blame) -> Table {
    let mut t = Table::new(
        "What swapping back regains",
        &["Swapped back", "#KL left", "#KL regained [95 % CI]", "#Costs", "#KL regained a MB"],
    );
    let interval = |s: &Suspect| {
        let r = &s.regained;
        match r.low.is_finite() && r.high.is_finite() {
            true => format!("{} [{}, {}]", sig(r.value, 3), sig(r.low, 3), sig(r.high, 3)),
            false => sig(r.value, 3),
        }
    };
    for s in b.suspects.iter().take(2 * WORST) {
        t.row(vec![
            code(s.module.clone(), ""),
            sig(s.kl, 3).into(),
            interval(s).into(),
            bytes(s.bytes.unsigned_abs()).into(),
            sig(s.per_megabyte, 3).into(),
        ]);
    }
    t
}

/// The section on blame: one entry for each variant that was searched.
pub(crate) fn blame(variants: &[Variant]) -> Vec<Value> {
    let found = variants.iter().filter_map(|v| Some((v.name.as_str(), v.records.eval.as_ref()?.blame.as_ref()?)));
    found
        .filter(|(_, b)| !b.suspects.is_empty())
        .map(|(name, b)| {
            json!({
                "name": name,
                "unit": match b.unit { Unit::Linear => "linear", Unit::Block => "block" },
                "kl": sig(b.kl, 3),
                "scope": format!("{} windows of {}", count(b.windows as u64), count(b.window as u64)),
                "count": count(b.suspects.len() as u64),
                "chart": blame_chart(name, b),
                "table": blame_table(b),
            })
        })
        .collect()
}
