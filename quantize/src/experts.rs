//! What a plan and a record say about the experts of a mixture, and what a budget does not know yet.

use lowbit_calibration::InputStats;
use lowbit_calibration::experts::{experts_at_once, tokens_needed};
use lowbit_checkpoint::ModelConfig;

use crate::error::{QuantizeError, Result};
use crate::plan::QuantizeOptions;
use crate::record::ExpertPlan;

/// What calibrating the experts of a block holds; `None` without experts or without calibration.
pub(crate) fn expert_plan(c: &ModelConfig, options: &QuantizeOptions) -> Option<ExpertPlan> {
    let e = c.experts.as_ref().filter(|_| options.needs_data())?;
    let (h, m, float) = (c.hidden_size, e.intermediate_size, options.method.recipe().float_stream());
    let at_once = experts_at_once(e.count, h, m, float, options.expert_bytes);
    let square = |n: usize| (n as u64).saturating_mul(n as u64);
    let all = square(h).max(2 * square(m)).saturating_mul(4 * (1 + u64::from(float)));
    Some(ExpertPlan {
        experts: e.count,
        per_token: e.per_token,
        at_once,
        passes: e.count.div_ceil(at_once),
        hessian_bytes: all.saturating_mul(e.count as u64),
        hessian_bytes_at_once: all.saturating_mul(at_once as u64),
        tokens_needed: tokens_needed(h, m),
    })
}

/// Fails where a budget would leave a part of the model out.
pub(crate) fn refuse_budget(c: &ModelConfig) -> Result<()> {
    let part = match (&c.experts, &c.latent) {
        (Some(_), _) => "experts",
        (None, Some(_)) => "latent attention",
        (None, None) => return Ok(()),
    };
    Err(QuantizeError::Plan {
        summary: format!("--bits, --size and --fit cannot weigh the {part} of a `{}` model yet", c.family),
        offenders: vec![],
        hint: Some("give all linears one scheme: --scheme w4a16".into()),
    })
}

/// The event of an expert that too few tokens reached.
pub(crate) fn starved(stats: &InputStats) -> Option<String> {
    let blend = stats.blend?;
    let share = 100.0 * (1.0 - stats.tokens as f64 / blend.needed.max(1) as f64);
    Some(format!(
        "{} expert: {} of the {} tokens it needs were routed to it; {share:.1} % of its Hessian is that of all {} tokens of the layer",
        if stats.tokens == 0 { "dead" } else { "starved" },
        stats.tokens,
        blend.needed,
        blend.layer,
    ))
}
