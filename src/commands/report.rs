//! `lowbit report`.

use anyhow::{Result, bail};

use crate::args::ReportArgs;
use crate::commands::eval::refuse_existing;
use crate::context::Context;

/// What a report is made of.
pub const FILES: [&str; 3] = ["report.html", "report.md", "report.json"];

/// Writes the reports from the records in one folder, or in several side by side.
pub fn report(ctx: &Context, args: &ReportArgs) -> Result<()> {
    let output = match (&args.output, args.dirs.as_slice()) {
        (Some(dir), _) => {
            for file in FILES {
                refuse_existing(Some(&dir.join(file)), args.force)?;
            }
            dir
        }
        // A report beside its records is made anew from them.
        (None, [only]) => only,
        (None, _) => bail!(
            "{} folders are compared in one page, which belongs to none of them\nhint: give -o DIR",
            args.dirs.len()
        ),
    };
    let written = lowbit_report::write(&args.dirs, output)?;
    ctx.print(&serde_json::json!({"written": written}), || {
        written.iter().map(|p| format!("wrote {}", p.display())).collect::<Vec<_>>().join("\n")
    })
}
