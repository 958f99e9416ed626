//! The head of the page and its section on size, as text and tables.

use lowbit_quantize::record::ComponentSize;
use serde_json::{Value, json};

use crate::Records;
use crate::chart;
use crate::format::{self as f, NONE, bytes, count, interval, percent, sig};
use crate::table::Table;

/// Sizes: what happened, or else what was planned.
pub(crate) fn size_source(r: &Records) -> Option<(&[ComponentSize], u64, u64, bool)> {
    match (&r.quantize, &r.plan) {
        (Some(q), _) => Some((&q.sizes, q.before_bytes, q.after_bytes, false)),
        (None, Some(p)) => Some((&p.sizes, p.before_bytes, p.after_bytes, true)),
        (None, None) => None,
    }
}

/// The model as it was before quantization.
pub(crate) fn model(r: &Records) -> String {
    let first = [r.quantize.as_ref().map(|q| &q.provenance), r.plan.as_ref().map(|p| &p.provenance)];
    let measured = [r.eval.as_ref().map(|e| &e.provenance), r.bench.as_ref().map(|b| &b.provenance)];
    let name = first
        .into_iter()
        .flatten()
        .map(|p| p.model.as_str())
        .chain(measured.iter().flatten().filter_map(|p| p.reference.as_deref()))
        .chain(measured.iter().flatten().map(|p| p.model.as_str()))
        .find(|n| !n.is_empty());
    f::short_name(name.unwrap_or("unnamed model")).to_owned()
}

/// Scheme, method and format, as far as the records say.
pub(crate) fn scheme(r: &Records) -> Vec<String> {
    match (&r.quantize, &r.plan) {
        (Some(q), _) => vec![q.scheme.clone(), q.method.clone(), q.format.clone()],
        (None, Some(p)) => {
            let mut out: Vec<String> = Vec::new();
            for s in p.tensors.iter().filter_map(|t| t.scheme.as_ref()) {
                if !out.contains(s) {
                    out.push(s.clone());
                }
            }
            out
        }
        (None, None) => vec!["scheme not recorded".to_owned()],
    }
}

/// Title, scheme and where the checkpoint was measured.
pub(crate) fn header(r: &Records) -> Value {
    let measured = r.eval.as_ref().map(|e| &e.provenance).or(r.bench.as_ref().map(|b| &b.provenance));
    let all = r.provenance();
    let last = all.iter().map(|(_, p)| p).max_by_key(|p| p.unix_time);
    json!({
        "model": model(r),
        "scheme": scheme(r).iter().filter(|s| !s.is_empty()).cloned().collect::<Vec<_>>(),
        "candidate": measured.map(|p| f::short_name(&p.model)).unwrap_or_default(),
        "hash": measured.map(|p| f::short_hash(&p.model_sha256)).unwrap_or_default(),
        "date": last.map(|p| f::utc(p.unix_time)).unwrap_or_default(),
        "tool": last.map(|p| p.tool.as_str()).unwrap_or_default(),
    })
}

/// The decode speed-up to lead with: the smallest batch of the first `tg` test.
fn lead(r: &Records) -> Option<&lowbit_bench::record::SpeedUp> {
    r.bench.as_ref()?.speed_ups.iter().filter(|s| s.test.starts_with("tg")).min_by_key(|s| s.batch)
}

/// The headline figures as numbers.
pub(crate) fn headline(r: &Records) -> Value {
    let size = size_source(r);
    let first = r.eval.as_ref().and_then(|e| e.perplexities.first());
    let kl = r.eval.as_ref().and_then(|e| e.kl.as_ref());
    json!({
        "model": model(r),
        "scheme": scheme(r),
        "before_bytes": size.map(|s| s.1),
        "after_bytes": size.map(|s| s.2),
        "size_ratio": size.filter(|s| s.2 > 0).map(|s| s.1 as f64 / s.2 as f64),
        "size_is_planned": size.map(|s| s.3),
        "kl_mean": kl.map(|k| k.mean),
        "kl_mean_interval": kl.map(|k| k.mean_interval),
        "top1_agreement": kl.map(|k| k.top1_agreement),
        "perplexity": first.map(|p| p.perplexity),
        "reference_perplexity": first.and_then(|p| p.reference),
        "perplexity_ratio": first.and_then(|p| p.ratio),
        "decode_speed_up": lead(r),
    })
}

fn tile(label: &str, value: String, detail: String) -> Value {
    json!({ "label": label, "value": value, "detail": detail })
}

/// The four figures on top, as (label, value, detail).
pub(crate) fn tiles(r: &Records) -> Vec<Value> {
    let size = match size_source(r) {
        Some((_, before, after, planned)) => {
            let label = if planned { "Size (planned)" } else { "Size" };
            tile(label, f::shrink(before, after), format!("{} → {}", bytes(before), bytes(after)))
        }
        None => tile("Size", NONE.to_owned(), "quantize.json is missing".to_owned()),
    };
    let without = |what: &str| {
        if r.eval.is_none() { "eval.json is missing".to_owned() } else { format!("eval.json has no {what}") }
    };
    let kl = match r.eval.as_ref().and_then(|e| e.kl.as_ref()) {
        Some(k) => tile(
            "KL divergence, mean",
            format!("{} nats/token", sig(k.mean, 3)),
            format!(
                "95 % CI {} over {} tokens",
                f::range(k.mean_interval.low, k.mean_interval.high, 3),
                count(k.tokens)
            ),
        ),
        None => tile("KL divergence, mean", NONE.to_owned(), without("drift")),
    };
    let perplexity = match r.eval.as_ref().and_then(|e| e.perplexities.first()) {
        Some(p) => {
            let value = match &p.reference {
                Some(reference) => format!("{} → {}", sig(reference.value, 4), sig(p.perplexity.value, 4)),
                None => sig(p.perplexity.value, 4),
            };
            let detail = match &p.ratio {
                Some(ratio) => format!("ratio {}, {}", interval(ratio, 4), p.protocol),
                None => format!("{}, no reference", p.protocol),
            };
            tile("Perplexity, float → quantized", value, detail)
        }
        None => tile("Perplexity", NONE.to_owned(), without("perplexity")),
    };
    let decode = r.bench.as_ref().and_then(|b| {
        b.rows.iter().filter(|w| w.role == "candidate" && w.test.starts_with("tg")).min_by_key(|w| w.batch)
    });
    let speed = match (lead(r), decode) {
        (Some(s), _) => tile(
            "Decode speed-up",
            f::factor(s.ratio),
            format!("95 % CI {}, {}, batch {}", f::range(s.low, s.high, 3), s.test, s.batch),
        ),
        (None, Some(w)) => tile(
            "Decode speed",
            format!("{} tokens/s", sig(w.tokens_per_second, 3)),
            format!("{}, batch {}, no reference", w.test, w.batch),
        ),
        (None, None) if r.bench.is_some() => {
            tile("Decode speed", NONE.to_owned(), "bench.json has no decode test".to_owned())
        }
        (None, None) => tile("Decode speed", NONE.to_owned(), "bench.json is missing".to_owned()),
    };
    vec![size, kl, perplexity, speed]
}

/// Bytes by component.
pub(crate) fn size_table(r: &Records) -> Option<Table> {
    let (sizes, before, after, _) = size_source(r)?;
    let mut t = Table::new(&["Component", "#Before", "#After", "#Before ÷ after", "#Share after"]);
    let row = |name: &str, b: u64, a: u64| {
        let ratio = if a == 0 { NONE.to_owned() } else { f::factor(b as f64 / a as f64) };
        let share = if after == 0 { NONE.to_owned() } else { percent(a as f64 / after as f64, 3) };
        vec![name.into(), bytes(b).into(), bytes(a).into(), ratio.into(), share.into()]
    };
    for s in sizes {
        t.row(row(&s.component.replace('_', " "), s.before_bytes, s.after_bytes));
    }
    t.total(row("total", before, after));
    Some(t)
}

/// The section on size.
pub(crate) fn size(r: &Records) -> Value {
    let Some((sizes, _, _, planned)) = size_source(r) else {
        return Value::Null;
    };
    let linears = match (&r.quantize, &r.plan) {
        (_, Some(p)) => {
            format!("{} linears to quantize, {} kept as they are.", p.quantized_linears, p.kept_linears)
        }
        (Some(q), None) => format!("{} linears quantized.", q.layers.len()),
        (None, None) => String::new(),
    };
    json!({ "planned": planned, "chart": chart::sizes(sizes), "table": size_table(r), "linears": linears })
}
