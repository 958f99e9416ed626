//! `lowbit compare`: two load records against each other.

use anyhow::{Result, bail};
use lowbit_bench::load::compare::compare as compared;
use lowbit_bench::load::import;

use crate::args::CompareArgs;
use crate::commands::table::table;
use crate::context::Context;
use crate::exit::VerdictError;

/// `lowbit compare`.
pub fn compare(ctx: &Context, args: &CompareArgs) -> Result<()> {
    let rows = compared(&import::read(&args.before)?, &import::read(&args.after)?, args.seed);
    if rows.is_empty() {
        bail!("the records share no valid stage with 20 whole answers\nhint: run both with the same --profile");
    }
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|c| {
            let verdict = if c.slower() {
                "slower"
            } else if c.faster() {
                "faster"
            } else {
                "no difference shown"
            };
            vec![
                format!("{} {} p{:.0}", c.stage, c.measure, 100.0 * c.q),
                format!("{:.2}", c.a),
                format!("{:.2}", c.b),
                format!("{:.3} [{:.3}, {:.3}]", c.ratio, c.low, c.high),
                verdict.to_string(),
            ]
        })
        .collect();
    ctx.print(&rows, || table(&["", "before, ms", "after, ms", "ratio [95 % CI]", ""], &lines))?;
    match rows.iter().filter(|c| c.low > 1.0 + args.margin).count() {
        0 => Ok(()),
        n => Err(VerdictError {
            code: 1,
            text: format!("{n} latencies are slower by more than {:.0} %", 100.0 * args.margin),
        }
        .into()),
    }
}
