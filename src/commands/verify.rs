//! `lowbit verify`.

use std::path::Path;

use anyhow::{Context as _, Result};
use lowbit_quantize::record::QuantizeRecord;
use lowbit_quantize::{gguf, verify as check};

use crate::args::VerifyArgs;
use crate::context::Context;
use crate::models::{self, Located};

/// Re-opens an artefact and checks every tensor.
pub fn verify(ctx: &Context, args: &VerifyArgs) -> Result<()> {
    let file = models::gguf_file(Path::new(&args.model));
    let located = match &file {
        Some(f) => Located::new(args.model.clone(), f.parent().unwrap_or(Path::new(".")).to_path_buf()),
        None => models::locate(ctx, &args.model)?,
    };
    // Beside the checkpoint (`quantize`) or one level up (`run`).
    let places = [located.dir.join("quantize.json"), located.dir.join("../quantize.json")];
    let record: Option<QuantizeRecord> = match places.iter().find(|p| p.exists()) {
        Some(p) => Some(
            serde_json::from_slice(&lowbit_checkpoint::files::read(p)?)
                .with_context(|| format!("{}: not a quantize record", p.display()))?,
        ),
        None => None,
    };
    let original = args.original.as_deref().map(|o| models::locate_floats(ctx, o)?.open_floats()).transpose()?;
    let done = match &file {
        Some(f) => gguf::verify(f, record.as_ref(), original.as_ref())?,
        None => check::verify(&located.open()?, record.as_ref(), original.as_ref())?,
    };
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
