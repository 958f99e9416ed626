//! `quantization_config` in the dialects of compressed-tensors (`pack-quantized`), GPTQ and AWQ.
//!
//! Formats whose scheme is not built yet are refused by name.

use std::path::Path;

use lowbit_kernels::backend::FloatType;
use lowbit_kernels::{GroupSize, ScaleType, Scheme};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::error::{CheckpointError, Result};

/// On-disk layout of packed integer weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackFormat {
    /// compressed-tensors `pack-quantized`: `weight_packed` along rows.
    CompressedTensors,
    /// GPTQ v1: `qweight` along columns, zero points stored minus one.
    GptqV1,
    /// GPTQ v2: zero points stored as they are.
    GptqV2,
    /// AWQ GEMM: 4 bits along `out`, zero points always stored.
    Awq,
}

impl PackFormat {
    /// The name on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            PackFormat::CompressedTensors => "compressed-tensors",
            PackFormat::GptqV1 => "gptq",
            PackFormat::GptqV2 => "gptq_v2",
            PackFormat::Awq => "awq",
        }
    }

    /// Whether the layout has a place for a linear: whole words of codes and zero points, at widths that its readers know.
    pub fn holds(self, scheme: Scheme, out: usize, n: usize) -> bool {
        let whole = |x: usize| (x * scheme.bits as usize).is_multiple_of(32);
        match self {
            PackFormat::CompressedTensors => true,
            PackFormat::Awq => crate::awq::holds(scheme, out),
            PackFormat::GptqV1 | PackFormat::GptqV2 => matches!(scheme.bits, 2 | 3 | 4 | 8) && whole(out) && whole(n),
        }
    }

    /// Whether one scheme serves all packed linears of a checkpoint.
    pub fn is_uniform(self) -> bool {
        self != PackFormat::CompressedTensors
    }
}

/// How a packed linear is written: the layout and the dtype of its scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Tensor names and packing.
    pub format: PackFormat,
    /// Dtype of the scales; solvers round to it before they compute an error.
    pub scales: ScaleType,
}

impl Layout {
    /// GPTQ stores f16 scales; compressed-tensors the model's dtype (bf16 for f32 models, which lose nothing the codes
    /// would have kept).
    pub fn new(format: PackFormat, model: FloatType) -> Self {
        let half = format != PackFormat::CompressedTensors || model == FloatType::F16;
        Self { format, scales: if half { ScaleType::F16 } else { ScaleType::Bf16 } }
    }

    /// On disk.
    pub fn scale_dtype(self) -> Dtype {
        match self.scales {
            ScaleType::F16 => Dtype::F16,
            ScaleType::Bf16 => Dtype::BF16,
            ScaleType::F32 => Dtype::F32,
        }
    }

    /// Little-endian bytes of scales.
    pub fn scale_bytes(self, scales: impl Iterator<Item = f32>) -> Vec<u8> {
        match self.scales {
            ScaleType::F16 => scales.flat_map(|s| half::f16::from_f32(s).to_le_bytes()).collect(),
            ScaleType::Bf16 => scales.flat_map(|s| half::bf16::from_f32(s).to_le_bytes()).collect(),
            ScaleType::F32 => scales.flat_map(|s| s.to_le_bytes()).collect(),
        }
    }
}

/// One rule: modules that match get the scheme.
#[derive(Clone, Debug)]
pub struct QuantGroup {
    /// `Linear`, exact names, or `re:` patterns.
    pub targets: Vec<Target>,
    /// Number format.
    pub scheme: Scheme,
}

/// A target of a rule.
#[derive(Clone, Debug)]
pub enum Target {
    /// Every linear.
    Linear,
    /// One module.
    Name(String),
    /// A pattern.
    Pattern(regex::Regex),
}

impl Target {
    fn parse(path: &Path, text: &str) -> Result<Self> {
        Ok(match text.strip_prefix("re:") {
            Some(p) => Target::Pattern(
                regex::Regex::new(&format!("^(?:{p})"))
                    .map_err(|e| CheckpointError::invalid(path, format!("target `{text}`: {e}")))?,
            ),
            None if matches!(text, "Linear" | "Embedding") => Target::Linear,
            None => Target::Name(text.to_string()),
        })
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Target::Linear => true,
            Target::Name(n) => n == module,
            Target::Pattern(p) => p.is_match(module),
        }
    }

    fn is_specific(&self) -> bool {
        !matches!(self, Target::Linear)
    }
}

/// What `config.json` says about quantization.
#[derive(Clone, Debug)]
pub struct QuantConfig {
    /// Layout.
    pub format: PackFormat,
    /// Rules, in order.
    pub groups: Vec<QuantGroup>,
    /// Modules left alone.
    pub ignore: Vec<String>,
}

impl QuantConfig {
    /// Scheme of a module: a specific rule wins over `Linear`.
    pub fn scheme_of(&self, module: &str) -> Option<Scheme> {
        let hit = |specific: bool| {
            self.groups
                .iter()
                .find(|g| g.targets.iter().any(|t| t.is_specific() == specific && t.matches(module)))
                .map(|g| g.scheme)
        };
        hit(true).or_else(|| hit(false))
    }

    /// Parses the object found in `config.json` (or `quantize_config.json`).
    pub fn parse(path: &Path, q: &Value) -> Result<Self> {
        match q.get("quant_method").or_else(|| q.get("method")).and_then(Value::as_str) {
            Some("compressed-tensors") => parse_compressed_tensors(path, q),
            Some("gptq") => parse_gptq(path, q),
            Some("awq") => crate::awq::parse(path, q),
            None if q.get("bits").is_some() && q.get("desc_act").is_some() => parse_gptq(path, q),
            other => Err(refused(path, &format!("quantization method `{}`", other.unwrap_or("(none)")))),
        }
    }
}

pub(crate) fn refused(path: &Path, what: &str) -> CheckpointError {
    CheckpointError::Unsupported {
        what: format!("{}: {what} is not supported", path.display()),
        hint: Some(
            "supported: compressed-tensors pack-quantized, GPTQ with 2, 3, 4 or 8 bits, AWQ GEMM with 4 bits".into(),
        ),
    }
}

fn parse_compressed_tensors(path: &Path, q: &Value) -> Result<QuantConfig> {
    let format = q.get("format").and_then(Value::as_str).unwrap_or_default();
    if format != "pack-quantized" {
        return Err(refused(path, &format!("compressed-tensors format `{format}`")));
    }
    let groups = q
        .get("config_groups")
        .and_then(Value::as_object)
        .ok_or_else(|| CheckpointError::invalid(path, "quantization_config has no `config_groups`"))?;
    let mut out = Vec::new();
    for (name, g) in groups {
        if let Some(f) = g.get("format").and_then(Value::as_str).filter(|f| *f != "pack-quantized") {
            return Err(refused(path, &format!("{name}: compressed-tensors format `{f}`")));
        }
        if g.get("input_activations").is_some_and(|v| !v.is_null())
            || g.get("output_activations").is_some_and(|v| !v.is_null())
        {
            return Err(refused(path, &format!("{name}: quantized activations")));
        }
        let w = g
            .get("weights")
            .filter(|w| w.is_object())
            .ok_or_else(|| CheckpointError::invalid(path, format!("{name}: no `weights`")))?;
        let kind = w.get("type").and_then(Value::as_str).unwrap_or_default();
        let bits = w.get("num_bits").and_then(Value::as_u64).unwrap_or(0);
        if kind != "int" || !matches!(bits, 1..=8) {
            return Err(refused(path, &format!("{name}: {bits}-bit `{kind}` weights")));
        }
        let group = match w.get("strategy").and_then(Value::as_str) {
            Some("group") => GroupSize::Cols(
                w.get("group_size").and_then(Value::as_u64).filter(|g| *g > 0 && *g < 1 << 32).ok_or_else(|| {
                    CheckpointError::invalid(path, format!("{name}: strategy `group` needs a positive `group_size`"))
                })? as usize,
            ),
            Some("channel") => GroupSize::PerChannel,
            other => return Err(refused(path, &format!("{name}: strategy `{}`", other.unwrap_or("(none)")))),
        };
        let symmetric = w.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
        let targets = g.get("targets").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        out.push(QuantGroup {
            targets: targets.map(|t| Target::parse(path, t)).collect::<Result<_>>()?,
            scheme: Scheme { bits: bits as u8, symmetric, group },
        });
    }
    let ignore = q
        .get("ignore")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(String::from)
        .collect();
    Ok(QuantConfig { format: PackFormat::CompressedTensors, groups: out, ignore })
}

fn parse_gptq(path: &Path, q: &Value) -> Result<QuantConfig> {
    let bits = q.get("bits").and_then(Value::as_u64).unwrap_or(0);
    if !matches!(bits, 2 | 3 | 4 | 8) {
        return Err(refused(path, &format!("GPTQ with {bits} bits")));
    }
    let format = match q.get("checkpoint_format").or_else(|| q.get("format")).and_then(Value::as_str) {
        None | Some("gptq") => PackFormat::GptqV1,
        Some("gptq_v2") => PackFormat::GptqV2,
        Some(other) => return Err(refused(path, &format!("GPTQ checkpoint format `{other}`"))),
    };
    if q.get("dynamic").and_then(Value::as_object).is_some_and(|d| d.keys().any(|k| k.starts_with("+:"))) {
        return Err(refused(path, "GPTQ `dynamic` with per-module overrides"));
    }
    let group = parse_group_size(path, q)?;
    let symmetric = q.get("sym").and_then(Value::as_bool).unwrap_or(true);
    let scheme = Scheme { bits: bits as u8, symmetric, group };
    Ok(QuantConfig { format, groups: vec![QuantGroup { targets: vec![Target::Linear], scheme }], ignore: Vec::new() })
}

/// `group_size` of GPTQ and AWQ: −1 is one scale a row.
pub(crate) fn parse_group_size(path: &Path, q: &Value) -> Result<GroupSize> {
    match q.get("group_size").and_then(Value::as_i64) {
        Some(-1) => Ok(GroupSize::PerChannel),
        Some(n) if n > 0 && n < 1 << 32 => Ok(GroupSize::Cols(n as usize)),
        other => Err(CheckpointError::invalid(
            path,
            format!("`group_size`: expected -1 or a positive number, found {other:?}"),
        )),
    }
}

/// The other direction of [`parse_group_size`].
pub(crate) fn written_group_size(scheme: Scheme) -> Value {
    match scheme.group {
        GroupSize::Cols(n) => json!(n),
        GroupSize::PerChannel => json!(-1),
    }
}

/// Config of one compressed-tensors rule to write.
pub struct WrittenGroup<'a> {
    /// Number format.
    pub scheme: Scheme,
    /// Targets.
    pub targets: Vec<String>,
    /// Observer name to record (`minmax` or `mse`).
    pub observer: &'a str,
    /// Whether columns were quantized by falling Hessian diagonal with static groups.
    pub static_act_order: bool,
}

/// The `quantization_config` of a compressed-tensors checkpoint: exactly the field set of version 0.19.
pub fn write_compressed_tensors(groups: &[WrittenGroup<'_>], ignore: &[String]) -> Value {
    let mut config_groups = serde_json::Map::new();
    for (i, g) in groups.iter().enumerate() {
        let (strategy, size) = match g.scheme.group {
            GroupSize::Cols(n) => ("group", json!(n)),
            GroupSize::PerChannel => ("channel", Value::Null),
        };
        config_groups.insert(
            format!("group_{i}"),
            json!({
                "format": "pack-quantized", "input_activations": null, "output_activations": null, "targets": g.targets,
                "weights": {
                    "actorder": if g.static_act_order { json!("static") } else { Value::Null },
                    "block_structure": null, "dynamic": false, "group_size": size, "num_bits": g.scheme.bits,
                    "observer": g.observer, "observer_kwargs": {}, "scale_dtype": null, "strategy": strategy,
                    "symmetric": g.scheme.symmetric, "type": "int",
                    "zp_dtype": if g.scheme.symmetric { Value::Null } else { json!("torch.int8") },
                },
            }),
        );
    }
    json!({
        "config_groups": config_groups, "format": "pack-quantized", "global_compression_ratio": null, "ignore": ignore,
        "kv_cache_scheme": null, "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "version": "0.19.0",
    })
}

/// The `quantization_config` of a checkpoint whose packed linears all have `scheme`, in the dialect of `format`: GPTQ (also
/// written as `quantize_config.json`) or AWQ. `ignore` are the modules left alone; `damp_frac` is `None` for weights rounded
/// without data.
pub fn write_uniform(
    format: PackFormat,
    scheme: Scheme,
    damp_frac: Option<f64>,
    lm_head: bool,
    ignore: &[String],
) -> Value {
    match format {
        PackFormat::Awq => crate::awq::write_config(scheme, lm_head, ignore),
        _ => write_gptq(format, scheme, damp_frac, lm_head, ignore),
    }
}

/// Modules left alone are `-:` rules of `dynamic`.
fn write_gptq(format: PackFormat, scheme: Scheme, damp_frac: Option<f64>, lm_head: bool, ignore: &[String]) -> Value {
    let mut meta = json!({"quantizer": [format!("lowbit:{}", env!("CARGO_PKG_VERSION"))]});
    if let (Some(d), Some(m)) = (damp_frac, meta.as_object_mut()) {
        m.insert("damp_percent".into(), json!(d));
        m.insert("static_groups".into(), json!(true));
        m.insert("true_sequential".into(), json!(true));
    }
    let mut q = json!({
        "bits": scheme.bits, "checkpoint_format": format.name(), "desc_act": false,
        "group_size": written_group_size(scheme), "lm_head": lm_head,
        "meta": meta, "pack_dtype": "int32", "quant_method": "gptq", "sym": scheme.symmetric,
    });
    if let (false, Some(m)) = (ignore.is_empty(), q.as_object_mut()) {
        let rules: serde_json::Map<String, Value> =
            ignore.iter().map(|i| (format!("-:^{}$", regex::escape(i)), json!({}))).collect();
        m.insert("dynamic".into(), Value::Object(rules));
    }
    q
}
