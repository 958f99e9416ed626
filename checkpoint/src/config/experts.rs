//! Mixture of experts: how many, which layers, how tokens are routed, and what the tensors are called.

use std::path::Path;

use serde_json::Value;

use super::{needed, unsupported, whole};
use crate::error::{CheckpointError, Result};

/// Most experts a layer may have; models have up to 512.
const MOST: usize = 1 << 16;

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts of the layer.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
}

/// What a group of experts is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Its largest score (DeepSeek-V2).
    Largest,
    /// The sum of its two largest (DeepSeek-V3).
    TwoLargest,
}

/// Only experts of the best groups may be chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertGroups {
    /// Groups of equally many experts, in order.
    pub count: usize,
    /// Groups kept.
    pub kept: usize,
    /// What they are compared by.
    pub score: GroupScore,
}

/// Names of modules within a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// The MLP: an expert is `<mlp>.experts.<e>`.
    pub mlp: &'static str,
    /// What chooses experts, `<mlp>.<router>`.
    pub router: &'static str,
    /// Linear of an expert whose output is activated.
    pub gate: &'static str,
    /// Linear it is multiplied with.
    pub up: &'static str,
    /// Linear that leads back.
    pub down: &'static str,
    /// The expert that every token goes through, `<mlp>.<shared>`.
    pub shared: &'static str,
}

const MIXTRAL: ExpertNames =
    ExpertNames { mlp: "block_sparse_moe", router: "gate", gate: "w1", up: "w3", down: "w2", shared: "shared_expert" };
const QWEN: ExpertNames = ExpertNames {
    mlp: "mlp",
    router: "gate",
    gate: "gate_proj",
    up: "up_proj",
    down: "down_proj",
    shared: "shared_expert",
};
const DEEPSEEK: ExpertNames = ExpertNames { shared: "shared_experts", ..QWEN };

/// The activation of gpt-oss's experts: `g · sigmoid(alpha · g) · (u + 1)`, gate at most `limit` and up within ±`limit`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateClamp {
    /// Steepness of the sigmoid.
    pub alpha: f32,
    /// Bound.
    pub limit: f32,
}

/// The experts of a model's sparse layers.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Experts of a layer.
    pub count: usize,
    /// Experts of a token.
    pub per_token: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Which layers have experts; the others have a dense MLP.
    pub sparse: Vec<bool>,
    /// Scores.
    pub scoring: Scoring,
    /// Scores of the chosen are divided by their sum.
    pub normalize: bool,
    /// The weights are multiplied by this at the end.
    pub scaling: f32,
    /// Choice within the best groups.
    pub groups: Option<ExpertGroups>,
    /// `<mlp>.<router>.e_score_correction_bias` is added to scores for the choice, not for the weight.
    pub correction_bias: bool,
    /// Width of the shared expert.
    pub shared_size: Option<usize>,
    /// The shared expert's output is multiplied by `sigmoid(<mlp>.shared_expert_gate · x)`.
    pub shared_gate: bool,
    /// In place of the model's activation.
    pub clamp: Option<GateClamp>,
    /// Tensor names.
    pub names: ExpertNames,
}

/// Of the families that have experts; `None` for others, and where no layer has any.
pub(super) fn parse(path: &Path, c: &Value, family: &str, layers: usize) -> Result<Option<ExpertsConfig>> {
    let flag = |key: &str, default: bool| match c.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(b)) => Ok(*b),
        Some(v) => Err(CheckpointError::invalid(path, format!("`{key}`: expected true or false, found {v}"))),
    };
    // Newer configs may carry an alias of the number of experts in place of the family's own key.
    let first = |keys: &[&'static str]| keys.iter().copied().find(|k| c.get(*k).is_some_and(|v| !v.is_null()));
    let count_key = |own: &'static str| first(&[own, "num_local_experts", "num_experts"]).unwrap_or(own);
    let intermediate = |key: &str| needed(path, c, key, 1 << 24);
    let plain = ExpertsConfig {
        count: 0,
        per_token: 0,
        intermediate_size: 0,
        sparse: vec![true; layers],
        scoring: Scoring::Softmax,
        normalize: true,
        scaling: 1.0,
        groups: None,
        correction_bias: false,
        shared_size: None,
        shared_gate: false,
        clamp: None,
        names: QWEN,
    };
    let mut config = match family {
        "mixtral" => ExpertsConfig {
            count: needed(path, c, count_key("num_local_experts"), MOST)?,
            intermediate_size: intermediate("intermediate_size")?,
            names: MIXTRAL,
            ..plain
        },
        super::GPT_OSS => ExpertsConfig {
            count: needed(path, c, count_key("num_local_experts"), MOST)?,
            intermediate_size: intermediate("intermediate_size")?,
            clamp: Some(GateClamp { alpha: 1.702, limit: swiglu_limit(path, c)? }),
            names: ExpertNames { router: "router", ..QWEN },
            ..plain
        },
        "qwen2_moe" | "qwen3_moe" => {
            let key = count_key("num_experts");
            if whole(path, c, key)? == Some(0) {
                return Ok(None);
            }
            let shared = family == "qwen2_moe";
            ExpertsConfig {
                count: needed(path, c, key, MOST)?,
                intermediate_size: intermediate("moe_intermediate_size")?,
                sparse: qwen_layers(path, c, layers)?,
                normalize: flag("norm_topk_prob", false)?,
                shared_size: if shared { Some(intermediate("shared_expert_intermediate_size")?) } else { None },
                shared_gate: shared,
                ..plain
            }
        }
        "deepseek_v2" | "deepseek_v3" => {
            let size = intermediate("moe_intermediate_size")?;
            let dense = whole(path, c, "first_k_dense_replace")?.unwrap_or(0);
            if whole(path, c, "moe_layer_freq")?.is_some_and(|n| n != 1) {
                return Err(unsupported(path, "`moe_layer_freq` other than 1 is not supported".into()));
            }
            let shared = whole(path, c, "n_shared_experts")?.filter(|n| *n > 0);
            let shared_size = shared.map(|n| n.checked_mul(size).filter(|n| *n <= 1 << 24)).map(|n| {
                n.ok_or_else(|| CheckpointError::invalid(path, "the shared experts are wider than a model may be"))
            });
            ExpertsConfig {
                count: needed(path, c, count_key("n_routed_experts"), MOST)?,
                intermediate_size: size,
                sparse: (0..layers).map(|i| i >= dense).collect(),
                scaling: scaling(path, c)?,
                shared_size: shared_size.transpose()?,
                names: DEEPSEEK,
                ..deepseek_routing(path, c, family, plain, flag("norm_topk_prob", family == "deepseek_v3")?)?
            }
        }
        _ => return Ok(None),
    };
    config.per_token = needed(path, c, "num_experts_per_tok", config.count)?;
    if let Some(g) = &config.groups {
        let each = config.count / g.count.max(1);
        let two = g.score == GroupScore::TwoLargest;
        if !config.count.is_multiple_of(g.count.max(1)) || g.kept > g.count || (two && each < 2) {
            let problem = format!("{} experts in {} groups, of which {} are kept", config.count, g.count, g.kept);
            return Err(CheckpointError::invalid(path, problem));
        }
        if config.per_token > g.kept * each {
            let problem = format!("{} experts a token out of {} groups of {each}", config.per_token, g.kept);
            return Err(CheckpointError::invalid(path, problem));
        }
    }
    Ok(config.sparse.contains(&true).then_some(config))
}

/// Every `decoder_sparse_step`-th layer, less those of `mlp_only_layers`.
fn qwen_layers(path: &Path, c: &Value, layers: usize) -> Result<Vec<bool>> {
    let step = match whole(path, c, "decoder_sparse_step")? {
        None => 1,
        Some(_) => needed(path, c, "decoder_sparse_step", 1 << 16)?,
    };
    let dense: Vec<u64> = match c.get("mlp_only_layers") {
        None | Some(Value::Null) => Vec::new(),
        Some(v) => v
            .as_array()
            .and_then(|a| a.iter().map(Value::as_u64).collect::<Option<_>>())
            .ok_or_else(|| CheckpointError::invalid(path, "`mlp_only_layers`: expected a list of layers"))?,
    };
    Ok((0..layers).map(|i| (i + 1).is_multiple_of(step) && !dense.contains(&(i as u64))).collect())
}

/// Of gpt-oss: 7 in the code that has no key for it.
fn swiglu_limit(path: &Path, c: &Value) -> Result<f32> {
    match c.get("swiglu_limit") {
        None | Some(Value::Null) => Ok(7.0),
        Some(v) => v.as_f64().filter(|v| v.is_finite() && *v > 0.0).map(|v| v as f32).ok_or_else(|| {
            CheckpointError::invalid(path, format!("`swiglu_limit`: expected a positive number, found {v}"))
        }),
    }
}

fn scaling(path: &Path, c: &Value) -> Result<f32> {
    match c.get("routed_scaling_factor") {
        None | Some(Value::Null) => Ok(1.0),
        Some(v) => v.as_f64().filter(|v| v.is_finite()).map(|v| v as f32).ok_or_else(|| {
            CheckpointError::invalid(path, format!("`routed_scaling_factor`: expected a number, found {v}"))
        }),
    }
}

fn deepseek_routing(
    path: &Path,
    c: &Value,
    family: &str,
    plain: ExpertsConfig,
    normalize: bool,
) -> Result<ExpertsConfig> {
    let method = c.get("topk_method").and_then(Value::as_str);
    let scores = c.get("scoring_func").and_then(Value::as_str);
    let refuse = |key: &str, v: Option<&str>| {
        unsupported(path, format!("`{key}` = {} of `{family}` is not supported", v.unwrap_or("null")))
    };
    let groups = |score| -> Result<Option<ExpertGroups>> {
        let count = needed(path, c, "n_group", MOST)?;
        Ok(Some(ExpertGroups { count, kept: needed(path, c, "topk_group", count)?, score }))
    };
    if family == "deepseek_v3" {
        if !matches!(method, None | Some("noaux_tc")) {
            return Err(refuse("topk_method", method));
        }
        if !matches!(scores, None | Some("sigmoid")) {
            return Err(refuse("scoring_func", scores));
        }
        let groups = groups(GroupScore::TwoLargest)?;
        return Ok(ExpertsConfig { scoring: Scoring::Sigmoid, normalize, groups, correction_bias: true, ..plain });
    }
    if !matches!(scores, None | Some("softmax")) {
        return Err(refuse("scoring_func", scores));
    }
    // The published code and transformers disagree on what it does together with `routed_scaling_factor`.
    if normalize {
        return Err(unsupported(path, "`norm_topk_prob` = true of `deepseek_v2` is not supported".into()));
    }
    let groups = match method {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => groups(GroupScore::Largest)?,
        other => return Err(refuse("topk_method", other)),
    };
    Ok(ExpertsConfig { normalize: false, groups, ..plain })
}
