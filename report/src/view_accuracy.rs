//! What the page shows of accuracy and of single layers.

use lowbit_eval::record::{EvalRecord, Interval, KlRecord};
use serde_json::{Value, json};

use crate::Records;
use crate::chart;
use crate::format::{self as f, NONE, count, interval, sig};
use crate::table::{Table, code};

/// Perplexities with everything that makes them comparable.
pub(crate) fn perplexity_table(e: &EvalRecord) -> Option<Table> {
    if e.perplexities.is_empty() {
        return None;
    }
    let mut t = Table::new(&[
        "Protocol",
        "#Float",
        "#Quantized [95 % CI]",
        "#Ratio [95 % CI]",
        "#Window",
        "#Windows",
        "#Tokens scored",
        "BOS",
        "Text",
        "SHA-256",
    ]);
    for p in &e.perplexities {
        t.row(vec![
            p.protocol.as_str().into(),
            p.reference.map_or(NONE.to_owned(), |i| sig(i.value, 4)).into(),
            interval(&p.perplexity, 4).into(),
            p.ratio.map_or(NONE.to_owned(), |i| interval(&i, 4)).into(),
            count(p.window as u64).into(),
            count(p.windows as u64).into(),
            count(p.scored_tokens).into(),
            p.bos.as_str().into(),
            f::short_name(&p.source).into(),
            code(f::short_hash(&p.source_sha256), &p.source_sha256),
        ]);
    }
    Some(t)
}

/// The statistics of the drift.
pub(crate) fn kl_table(k: &KlRecord) -> Table {
    let mut t = Table::new(&["Statistic", "#Value", "Unit"]);
    let mut add = |name: &str, value: String, unit: &str| t.row(vec![name.into(), value.into(), unit.into()]);
    add("KL mean [95 % CI]", f::interval(&Interval { value: k.mean, ..k.mean_interval }, 3), "nats/token");
    add("KL median", sig(k.median, 3), "nats/token");
    add("KL 99th percentile", sig(k.p99, 3), "nats/token");
    add("KL largest", sig(k.max, 3), "nats/token");
    add("KL smallest", sig(k.min, 3), "nats/token");
    let top = &k.top1_agreement;
    let agreement = Interval { value: top.value * 100.0, low: top.low * 100.0, high: top.high * 100.0 };
    add("Top-1 agreement [95 % CI]", interval(&agreement, 4), "% of tokens");
    add("Δp of the true token, mean", sig(k.delta_p_mean * 100.0, 3), "percentage points");
    add("Δp of the true token, root mean square", sig(k.delta_p_rms * 100.0, 3), "percentage points");
    add("Correlation of per-token NLL", sig(k.nll_correlation, 4), "");
    add("Perplexity on the same tokens, float", sig(k.reference_perplexity, 4), "");
    add("Perplexity on the same tokens, quantized", sig(k.perplexity, 4), "");
    t
}

/// The section on accuracy.
pub(crate) fn drift(r: &Records) -> Value {
    let Some(e) = &r.eval else { return Value::Null };
    let kl = e.kl.as_ref().map(|k| {
        let mut percentiles = Table::new(&["Percentile", "#KL, nats/token", "#Δp, percentage points"]);
        for (label, v) in &k.percentiles {
            let delta = k.delta_p_percentiles.iter().find(|p| p.0 == *label);
            let delta = delta.map_or(NONE.to_owned(), |p| sig(p.1 * 100.0, 3));
            percentiles.row(vec![label.as_str().into(), sig(*v, 3).into(), delta.into()]);
        }
        json!({
            "source": f::short_name(&k.source),
            "sha256": k.source_sha256,
            "hash": f::short_hash(&k.source_sha256),
            "scope": format!("{} tokens in {} windows of {}", count(k.tokens), count(k.windows as u64), count(k.window as u64)),
            "table": kl_table(k),
            "percentiles": percentiles,
            "chart": chart::percentiles(&k.percentiles, k.mean),
        })
    });
    json!({ "perplexity": perplexity_table(e), "kl": kl, "seconds": f::seconds(e.seconds) })
}

/// The section on layers.
pub(crate) fn layers(r: &Records) -> Value {
    let Some(q) = &r.quantize else {
        return Value::Null;
    };
    let mut worst: Vec<_> = q.layers.iter().collect();
    worst.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
    let mut t = Table::new(&[
        "Linear",
        "#Relative error",
        "#Proxy loss",
        "Shape (out × in)",
        "Method",
        "#Largest |input|",
        "#Dead columns",
        "#Damping",
    ]);
    for l in worst.into_iter().take(10) {
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
    let events: Vec<Value> =
        q.layers.iter().flat_map(|l| l.events.iter().map(move |e| json!({ "layer": l.name, "event": e }))).collect();
    json!({
        "count": q.layers.len(),
        "seconds": f::seconds(q.seconds),
        "chart": chart::layers(&q.layers),
        "table": t,
        "events": events,
    })
}
