//! `lowbit verify`.

use anyhow::{Context as _, Result};
use lowbit_quantize::record::QuantizeRecord;
use lowbit_quantize::verify as check;

use crate::args::VerifyArgs;
use crate::context::Context;
use crate::models;

/// Re-opens an artefact and checks every tensor.
pub fn verify(ctx: &Context, args: &VerifyArgs) -> Result<()> {
    let located = models::locate(ctx, &args.model)?;
    let ckpt = located.open()?;
    // Beside the checkpoint (`quantize`) or one level up (`run`).
    let places = [located.dir.join("quantize.json"), located.dir.join("../quantize.json")];
    let record: Option<QuantizeRecord> = match places.iter().find(|p| p.exists()) {
        Some(p) => Some(
            serde_json::from_slice(&lowbit_checkpoint::files::read(p)?)
                .with_context(|| format!("{}: not a quantize record", p.display()))?,
        ),
        None => None,
    };
    let original = args.original.as_deref().map(|o| models::locate(ctx, o)?.open()).transpose()?;
    let done = check::verify(&ckpt, record.as_ref(), original.as_ref())?;
    ctx.print(&done, || {
        format!(
            "{}: {} packed and {} dense linears, {} float tensors, {} compared with the original: all as they should be{}",
            located.name,
            done.packed_linears,
            done.dense_linears,
            done.float_tensors,
            done.compared_with_original,
            if record.is_some() { "" } else { " (no quantize.json beside it)" }
        )
    })
}
