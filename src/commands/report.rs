//! `lowbit report`.

use anyhow::Result;

use crate::args::ReportArgs;
use crate::context::Context;

/// Writes the reports from the records in a folder.
pub fn report(ctx: &Context, args: &ReportArgs) -> Result<()> {
    let written = lowbit_report::write(&args.dir)?;
    ctx.print(&serde_json::json!({"written": written}), || {
        written.iter().map(|p| format!("wrote {}", p.display())).collect::<Vec<_>>().join("\n")
    })
}
