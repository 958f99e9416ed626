//! The head of the page: what it is about, and three numbers.

use lowbit_quantize::record::ComponentSize;
use serde_json::{Value, json};

use crate::format::{self as f, bytes, count, interval, sig};
use crate::{Records, Variant};

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

/// Title, scheme and where the checkpoint was measured; of several variants what they share.
pub(crate) fn header(variants: &[Variant]) -> Value {
    let all: Vec<_> = variants.iter().flat_map(|v| v.records.provenance()).collect();
    let last = all.iter().map(|(_, p)| p).max_by_key(|p| p.unix_time);
    let mut models: Vec<String> = Vec::new();
    for name in variants.iter().map(|v| model(&v.records)) {
        if !models.contains(&name) {
            models.push(name);
        }
    }
    let single = match variants {
        [only] => Some(&only.records),
        _ => None,
    };
    let measured =
        single.and_then(|r| r.eval.as_ref().map(|e| &e.provenance).or(r.bench.as_ref().map(|b| &b.provenance)));
    let schemes = match single {
        Some(r) => scheme(r).into_iter().filter(|s| !s.is_empty()).collect(),
        None => vec![format!("{} variants", variants.len())],
    };
    json!({
        "model": models.join(", "),
        "scheme": schemes,
        "candidate": measured.map(|p| f::short_name(&p.model)).unwrap_or_default(),
        "hash": measured.map(|p| f::short_hash(&p.model_sha256)).unwrap_or_default(),
        "date": last.map(|p| f::utc(p.unix_time)).unwrap_or_default(),
        "tool": last.map(|p| p.tool.as_str()).unwrap_or_default(),
    })
}

/// The decode speed-up to lead with: the smallest batch of the first `tg` test.
pub(crate) fn lead(r: &Records) -> Option<&lowbit_bench::record::SpeedUp> {
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
        "verdict": r.gate.as_ref().map(|g| g.verdict),
        "verdict_reason": r.gate.as_ref().map(|g| g.reason.as_str()),
    })
}

fn number(label: &str, value: String, detail: String) -> Value {
    json!({ "label": label, "value": value, "detail": detail })
}

/// Bytes, drift and speed-up, each with its interval, as far as there are records: (label, value, detail).
pub(crate) fn numbers(r: &Records) -> Vec<Value> {
    let size = size_source(r).filter(|s| s.1 > 0 && s.2 > 0).map(|(_, before, after, planned)| {
        let label = if planned { "Size, planned" } else { "Size" };
        number(label, f::shrink(before, after), format!("{} → {}, exact", bytes(before), bytes(after)))
    });
    [size, drift(r), speed(r)].into_iter().flatten().collect()
}

fn drift(r: &Records) -> Option<Value> {
    let e = r.eval.as_ref();
    if let Some(k) = e.and_then(|e| e.kl.as_ref()) {
        let interval = f::range(k.mean_interval.low, k.mean_interval.high, 3);
        let detail = format!("mean KL from the float model; 95 % CI {interval}, {} tokens", count(k.tokens));
        return Some(number("Drift", format!("{} nats/token", sig(k.mean, 3)), detail));
    }
    if let Some((p, ratio)) = e.and_then(|e| e.perplexities.iter().find_map(|p| Some((p, p.ratio?)))) {
        let detail = format!("ratio of perplexities; 95 % CI {}, {}", f::range(ratio.low, ratio.high, 4), p.protocol);
        return Some(number("Drift", format!("{} ×", sig(ratio.value, 4)), detail));
    }
    let first = e.and_then(|e| e.perplexities.first())?;
    let detail = format!("{}, no reference", first.protocol);
    Some(number("Perplexity", interval(&first.perplexity, 4), detail))
}

fn speed(r: &Records) -> Option<Value> {
    if let Some(s) = lead(r) {
        let detail = format!("95 % CI {}, {}, batch {}", f::range(s.low, s.high, 3), s.test, s.batch);
        return Some(number("Decode speed-up", f::factor(s.ratio), detail));
    }
    let rows = r.bench.as_ref()?.rows.iter();
    let row = rows.filter(|w| w.role == "candidate" && w.test.starts_with("tg")).min_by_key(|w| w.batch)?;
    let detail = format!("{}, batch {}, no reference", row.test, row.batch);
    Some(number("Decode speed", format!("{} tokens/s", sig(row.tokens_per_second, 3)), detail))
}
