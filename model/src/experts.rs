//! Routing of tokens to experts, on the host in f32: the logits of a call are few, and the choice must not depend on the device.

use lowbit_checkpoint::config::{ExpertsConfig, GroupScore, Scoring};
use lowbit_kernels::backend::{Backend, Buffer};

use crate::block::Linear;
use crate::error::{At, ModelError, Result};
use crate::source::Source;

/// What chooses a block's experts.
pub struct Experts {
    config: ExpertsConfig,
    router: Linear,
    /// Added to scores for the choice alone, `[count]`.
    correction: Option<Vec<f32>>,
    shared_gate: Option<Linear>,
}

/// Tokens of one expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    /// Rows of the call, ascending.
    pub rows: Vec<u32>,
    /// What the expert's output of each is multiplied by.
    pub weights: Vec<f32>,
}

impl Routed {
    /// The rows as [`Backend::gather_rows`] takes them.
    pub fn indices(&self) -> Vec<usize> {
        self.rows.iter().map(|r| *r as usize).collect()
    }
}

/// Who goes where: one entry an expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// By expert.
    pub experts: Vec<Routed>,
}

impl Experts {
    /// Loads router, correction and shared gate; `prefix` is `model.layers.N`.
    pub fn load(from: &dyn Source, backend: &dyn Backend, prefix: &str, config: &ExpertsConfig) -> Result<Self> {
        let h = from.config().hidden_size;
        let mlp = format!("{prefix}.{}", config.names.mlp);
        let router = format!("{mlp}.{}", config.names.router);
        let correction = format!("{router}.e_score_correction_bias");
        let shared =
            |on: bool| on.then(|| Linear::load(from, backend, &format!("{mlp}.shared_expert_gate"), 1, h)).transpose();
        Ok(Self {
            router: Linear::load(from, backend, &router, config.count, h)?,
            correction: config.correction_bias.then(|| from.vector(&correction, config.count)).transpose()?,
            shared_gate: shared(config.shared_gate)?,
            config: config.clone(),
        })
    }

    /// Sizes.
    pub fn config(&self) -> &ExpertsConfig {
        &self.config
    }

    /// Bytes of the router and the shared gate.
    pub fn stored_bytes(&self) -> usize {
        self.router.weight.stored_bytes + self.shared_gate.as_ref().map_or(0, |g| g.weight.stored_bytes)
    }

    /// Experts of each row of `input` `[T, hidden]`.
    pub fn route(&self, b: &dyn Backend, input: &Buffer) -> Result<Routing> {
        let logits = b.download(&self.router.apply(b, input)?).at(&self.router.module)?;
        let mut experts = vec![Routed::default(); self.config.count];
        for (row, logits) in logits.chunks_exact(self.config.count).enumerate() {
            // Not a number would compare as nothing and choose at random.
            if let Some(e) = logits.iter().position(|v| !v.is_finite()) {
                let what = format!("{}: logit of expert {e} is {} at row {row}", self.router.module, logits[e]);
                return Err(ModelError::Argument(what));
            }
            for (e, weight) in choose(&self.config, logits, self.correction.as_deref()) {
                experts[e].rows.push(row as u32);
                experts[e].weights.push(weight);
            }
        }
        Ok(Routing { experts })
    }

    /// What the shared expert's output is multiplied by, row by row; `None` where it is not.
    pub fn shared_factors(&self, b: &dyn Backend, input: &Buffer) -> Result<Option<Vec<f32>>> {
        let Some(gate) = &self.shared_gate else { return Ok(None) };
        let logits = b.download(&gate.apply(b, input)?).at(&gate.module)?;
        Ok(Some(logits.into_iter().map(sigmoid).collect()))
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Indices of the `n` largest, larger first; of equals the first comes first.
fn largest(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(n);
    order
}

/// Experts of one token and their weights, by falling score.
///
/// Softmax or sigmoid over all experts; the best by score plus correction, within the best groups where there are groups; the weights are
/// the scores without correction, divided by their sum if `normalize`, times `scaling`. As transformers' Mixtral, Qwen2-MoE,
/// Qwen3-MoE, DeepSeek-V2 and DeepSeek-V3 do.
fn choose(c: &ExpertsConfig, logits: &[f32], correction: Option<&[f32]>) -> Vec<(usize, f32)> {
    let scores: Vec<f32> = match c.scoring {
        Scoring::Sigmoid => logits.iter().copied().map(sigmoid).collect(),
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let e: Vec<f32> = logits.iter().map(|v| (v - max).exp()).collect();
            let sum: f32 = e.iter().sum();
            e.into_iter().map(|v| v / sum).collect()
        }
    };
    let mut compared = scores.clone();
    if let Some(bias) = correction {
        compared.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
    }
    if let Some(g) = &c.groups {
        let each = c.count / g.count;
        let worth: Vec<f32> = compared
            .chunks_exact(each)
            .map(|group| {
                let best = largest(group, if g.score == GroupScore::Largest { 1 } else { 2 });
                best.iter().map(|i| group[*i]).sum()
            })
            .collect();
        let kept = largest(&worth, g.kept);
        for (i, s) in compared.iter_mut().enumerate() {
            if !kept.contains(&(i / each)) {
                *s = f32::NEG_INFINITY;
            }
        }
    }
    let chosen = largest(&compared, c.per_token);
    let sum: f32 = chosen.iter().map(|e| scores[*e]).sum::<f32>() + 1e-20;
    let weight = |e: usize| (if c.normalize { scores[e] / sum } else { scores[e] }) * c.scaling;
    chosen.into_iter().map(|e| (e, weight(e))).collect()
}

#[cfg(test)]
mod tests {
    use lowbit_checkpoint::config::{self, ExpertGroups};
    use serde_json::json;

    use super::*;

    fn config(per_token: usize) -> ExpertsConfig {
        let c = json!({"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 8, "num_local_experts": 4, "num_experts_per_tok": per_token});
        config::parse(std::path::Path::new("config.json"), &c).unwrap().experts.unwrap()
    }

    fn close(got: Vec<(usize, f32)>, want: &[(usize, f32)]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!(g.0 == w.0 && (g.1 - w.1).abs() <= 1e-6, "{got:?} {want:?}");
        }
    }

    #[test]
    fn weights_are_the_scores_of_the_chosen() {
        // Softmax of ln(1, 4, 3, 2): a tenth each of 1, 4, 3, 2.
        let logits = [1f32, 4.0, 3.0, 2.0].map(f32::ln);
        let mut c = config(2);
        close(choose(&c, &logits, None), &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
        c.normalize = false;
        c.scaling = 10.0;
        close(choose(&c, &logits, None), &[(1, 4.0), (2, 3.0)]);
        // Groups {0, 1} and {2, 3}: by the largest the first wins, by two the sums are 5 and 5 and the first wins the tie.
        c.groups = Some(ExpertGroups { count: 2, kept: 1, score: GroupScore::Largest });
        close(choose(&c, &logits, None), &[(1, 4.0), (0, 1.0)]);
        // A correction chooses and does not weigh: group 2 is then worth more.
        c.groups = Some(ExpertGroups { count: 2, kept: 1, score: GroupScore::TwoLargest });
        close(choose(&c, &logits, Some(&[0.0, 0.0, 0.0, 0.2])), &[(3, 2.0), (2, 3.0)]);
        c = ExpertsConfig { groups: None, scoring: Scoring::Sigmoid, normalize: true, scaling: 2.5, ..c };
        // Sigmoid of ln(1, 4, 3, 2) is 1/2, 4/5, 3/4, 2/3.
        close(choose(&c, &logits, None), &[(1, 2.5 * 0.8 / 1.55), (2, 2.5 * 0.75 / 1.55)]);
    }

    #[test]
    fn of_equals_the_first_is_chosen() {
        let chosen = |n, logits: &[f32]| choose(&config(n), logits, None).iter().map(|c| c.0).collect::<Vec<_>>();
        assert_eq!(chosen(2, &[1.0, 1.0, 2.0, 1.0]), [2, 0]);
        assert_eq!(chosen(3, &[0.0; 4]), [0, 1, 2]);
    }
}
