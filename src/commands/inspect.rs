//! `lowbit inspect`.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::json;

use crate::args::InspectArgs;
use crate::commands::table::{megabytes, table};
use crate::context::Context;
use crate::models;

/// Architecture, tensors, dtypes, sizes, quantization found.
pub fn inspect(ctx: &Context, args: &InspectArgs) -> Result<()> {
    let located = models::locate(ctx, &args.model)?;
    let ckpt = located.open()?;
    let c = &ckpt.config;
    let mut dtypes: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    let mut tensors = Vec::new();
    for (name, t) in ckpt.store.iter() {
        let bytes = t.data.size() as u64;
        let e = dtypes.entry(format!("{:?}", t.dtype)).or_default();
        e.0 += 1;
        e.1 += bytes;
        tensors.push(json!({"name": name, "dtype": format!("{:?}", t.dtype), "shape": t.shape, "bytes": bytes}));
    }
    let total: u64 = dtypes.values().map(|d| d.1).sum();
    let quantization = ckpt.quantization.as_ref().map(|q| {
        let schemes: Vec<String> = q.groups.iter().map(|g| g.scheme.full_name()).collect();
        json!({"format": q.format.name(), "schemes": schemes, "kv": q.kv.map(|kv| kv.name()), "ignore": q.ignore})
    });
    let json = json!({
        "model": located.name, "dir": located.dir, "family": c.family, "layers": c.num_layers, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "heads": c.num_heads, "kv_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings, "tie_word_embeddings": c.tie_word_embeddings,
        "bytes": total, "quantization": quantization, "tensors": tensors,
        "experts": c.experts.as_ref().map(|e| json!({
            "count": e.count, "per_token": e.per_token, "intermediate_size": e.intermediate_size, "shared_size": e.shared_size,
            "sparse_layers": e.sparse.iter().filter(|s| **s).count(),
        })),
    });
    ctx.print(&json, || {
        let mut rows: Vec<Vec<String>> = dtypes.iter().map(|(d, (n, b))| vec![d.clone(), n.to_string(), megabytes(*b)]).collect();
        rows.push(vec!["total".into(), tensors.len().to_string(), megabytes(total)]);
        let experts = c.experts.as_ref().map_or(String::new(), |e| {
            let sparse = e.sparse.iter().filter(|s| **s).count();
            let shared = e.shared_size.map_or(String::new(), |n| format!(" and a shared one of {n}"));
            format!(" · {} experts of {}{shared}, {} a token, in {sparse} layers", e.count, e.intermediate_size, e.per_token)
        });
        let q = quantization.as_ref().map_or("none".to_string(), |q| q.to_string());
        format!(
            "{}: {} · {} layers · hidden {} · MLP {}{experts} · {} heads ({} KV) of {} · vocabulary {} · context {}{}\nquantization: {q}\n\n{}",
            located.name, c.family, c.num_layers, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size,
            c.max_position_embeddings, if c.tie_word_embeddings { " · tied embeddings" } else { "" },
            table(&["dtype", "tensors", "size"], &rows)
        )
    })
}
