//! Where the records came from.

use std::collections::BTreeMap;

use lowbit_checkpoint::provenance::Provenance;
use serde_json::{Value, json};

use crate::format::{self as f, bytes, count};
use crate::{Records, Variant};

fn options(map: &BTreeMap<String, Value>) -> Vec<Value> {
    map.iter()
        .map(|(k, v)| {
            let text = v.as_str().map_or_else(|| v.to_string(), str::to_owned);
            json!([k, text])
        })
        .collect()
}

fn item(name: &str, text: impl Into<String>, code: bool) -> Value {
    json!({ "name": name, "text": text.into(), "code": code })
}

fn entries(p: &Provenance) -> Vec<Value> {
    let mut out = vec![
        item("Written", f::utc(p.unix_time), false),
        item("Tool", p.tool.as_str(), false),
        item("Commit", p.commit.as_deref().unwrap_or("not recorded"), true),
        item("Command", p.command.as_str(), true),
    ];
    if !p.model.is_empty() {
        out.push(item("Model", p.model.as_str(), false));
    }
    if !p.model_sha256.is_empty() {
        out.push(item("Model SHA-256", p.model_sha256.as_str(), true));
    }
    if let Some(reference) = &p.reference {
        out.push(item("Reference", reference.as_str(), false));
    }
    if let Some(hash) = &p.reference_sha256 {
        out.push(item("Reference SHA-256", hash.as_str(), true));
    }
    out.extend([
        item("Device", p.device.as_str(), false),
        item("CPU", p.cpu.as_str(), false),
        item("GPU", p.gpu.as_deref().unwrap_or("none"), false),
        item("Threads", p.threads.to_string(), false),
        item("Activations", p.dtype.as_str(), false),
        item("Seed", p.seed.to_string(), false),
    ]);
    out
}

/// The section on provenance: one block for each record.
pub(crate) fn provenance(variants: &[Variant]) -> Vec<Value> {
    variants.iter().flat_map(|v| of(&v.name, &v.records)).collect()
}

fn of(name: &str, r: &Records) -> Vec<Value> {
    let mut out = Vec::new();
    for (file, p) in r.provenance() {
        let mut entries = entries(p);
        let mut settings = options(&p.options);
        if let (Some(q), "quantize.json") = (&r.quantize, file) {
            settings.extend(options(&q.options).into_iter().filter(|o| !options(&p.options).contains(o)));
            match &q.calibration {
                Some(c) => entries.extend([
                    item("Calibration", c.source.as_str(), false),
                    item(
                        "Calibration windows",
                        format!(
                            "{} of {} tokens, {} in all, seed {}",
                            c.windows,
                            c.window_tokens,
                            count(c.tokens),
                            c.seed
                        ),
                        false,
                    ),
                    item("Calibration SHA-256", c.windows_sha256.as_str(), true),
                ]),
                None => entries.push(item("Calibration", "none", false)),
            }
            let stages: Vec<String> = q.stage_seconds.iter().map(|(k, v)| format!("{k} {}", f::seconds(*v))).collect();
            let stages = if stages.is_empty() { String::new() } else { format!(" ({})", stages.join(", ")) };
            entries.push(item("Wall time", format!("{}{stages}", f::seconds(q.seconds)), false));
            entries.push(item("Peak resident", q.peak_rss_bytes.map_or("not recorded".to_owned(), bytes), false));
        }
        if let (Some(plan), "plan.json") = (&r.plan, file) {
            entries.push(item("Peak memory, estimate", bytes(plan.peak_memory_bytes), false));
        }
        let file = if name.is_empty() { file.to_owned() } else { format!("{name}: {file}") };
        out.push(json!({ "file": file, "entries": entries, "options": settings }));
    }
    out
}
