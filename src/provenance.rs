//! Provenance of the records this process writes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use lowbit_checkpoint::provenance::Provenance;
use serde_json::Value;

use crate::context::{Context, Purpose};
use crate::models::Located;

/// Gathers it; hashing reads every weight file once.
pub fn gather(
    ctx: &Context,
    purpose: Purpose,
    model: &Located,
    reference: Option<&Located>,
    seed: u64,
    options: BTreeMap<String, Value>,
) -> Result<Provenance> {
    Ok(Provenance {
        model: model.name.clone(),
        model_sha256: model.sha256()?,
        reference: reference.map(|r| r.name.clone()),
        reference_sha256: reference.map(Located::sha256).transpose()?,
        ..without_model(ctx, purpose, seed, options)?
    })
}

/// Tool, command, machine and options: of a record that is about no model.
pub fn without_model(
    ctx: &Context,
    purpose: Purpose,
    seed: u64,
    options: BTreeMap<String, Value>,
) -> Result<Provenance> {
    Ok(Provenance {
        tool: format!("lowbit {}", env!("CARGO_PKG_VERSION")),
        commit: option_env!("LOWBIT_COMMIT").map(str::to_string),
        command: command_without_secrets(),
        unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        device: ctx.backend()?.name().into(),
        cpu: cpu_model(),
        gpu: ctx.gpu()?,
        kernels: ctx.kernels(purpose)?,
        threads: ctx.threads,
        dtype: "weights as stored, activations f32".into(),
        seed,
        options,
        ..Provenance::default()
    })
}

/// Of a client that computes nothing itself: no device is opened.
pub fn of_client(ctx: &Context, seed: u64, model: &str, options: BTreeMap<String, Value>) -> Provenance {
    Provenance {
        tool: format!("lowbit {}", env!("CARGO_PKG_VERSION")),
        commit: option_env!("LOWBIT_COMMIT").map(str::to_string),
        command: command_without_secrets(),
        unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        model: model.to_string(),
        device: "client".into(),
        cpu: cpu_model(),
        threads: ctx.threads,
        seed,
        options,
        ..Provenance::default()
    }
}

/// The command line, keys and headers hidden.
fn command_without_secrets() -> String {
    let mut hide = false;
    let words = std::env::args().map(|a| {
        let secret = ["--api-key", "--header"].iter().any(|s| a == *s || a.starts_with(&format!("{s}=")));
        match (std::mem::replace(&mut hide, secret && !a.contains('=')), secret) {
            (true, _) => "***".to_string(),
            (_, true) => {
                format!("{}{}", a.split('=').next().unwrap_or_default(), if a.contains('=') { "=***" } else { "" })
            }
            _ => a,
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn cpu_model() -> String {
    let info = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let name = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split(':').nth(1));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |n| n.trim().to_string())
}
