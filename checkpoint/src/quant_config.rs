//! `quantization_config` in the dialects of compressed-tensors, GPTQ, AWQ, DeepSeek's FP8, Model-Optimizer and gpt-oss.
//!
//! Formats whose scheme is not built yet are refused by name.

mod compressed_tensors;
mod vendors;
mod written;

pub use written::{WrittenGroup, by_scheme, write_compressed_tensors};

use std::path::Path;

use lowbit_kernels::activation::InputCode;
use lowbit_kernels::backend::FloatType;
use lowbit_kernels::{GroupSize, LinearScheme, ScaleType, Scheme};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::error::{CheckpointError, Result};

/// On-disk layout of quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackFormat {
    /// compressed-tensors: integers packed along rows (`pack-quantized`), and its formats of bytes and half bytes.
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

    /// Whether the layout has a place for a linear. What is not compressed-tensors holds integers whose input is left alone, in whole
    /// words of codes and zero points, at widths that its readers know.
    pub fn holds(self, scheme: LinearScheme, out: usize, n: usize) -> bool {
        let Some(int) = scheme.int().filter(|_| scheme.input.is_none()) else { return !self.is_uniform() };
        let whole = |x: usize| (x * int.bits as usize).is_multiple_of(32);
        match self {
            PackFormat::CompressedTensors => true,
            PackFormat::Awq => crate::awq::holds(int, out),
            PackFormat::GptqV1 | PackFormat::GptqV2 => matches!(int.bits, 2 | 3 | 4 | 8) && whole(out) && whole(n),
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
    /// Number formats.
    pub scheme: LinearScheme,
}

/// How keys and values are rounded before they are cached: stored scales, `k_scale` and `v_scale` of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvScheme {
    /// What they become.
    pub code: InputCode,
    /// A scale for each key/value head instead of one.
    pub per_head: bool,
}

impl KvScheme {
    /// `fp8`, `int8-head`, ...
    pub fn name(self) -> String {
        let code = if self.code == InputCode::Int8 { "int8" } else { "fp8" };
        format!("{code}{}", if self.per_head { "-head" } else { "" })
    }
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
    /// Keys and values, where they are quantized.
    pub kv: Option<KvScheme>,
}

impl QuantConfig {
    /// Scheme of a module: a specific rule wins over `Linear`.
    pub fn scheme_of(&self, module: &str) -> Option<LinearScheme> {
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
            Some("compressed-tensors") => compressed_tensors::parse(path, q),
            Some("fp8") => vendors::parse_fp8(path, q),
            Some("modelopt" | "modelopt_fp4") => vendors::parse_modelopt(path, q),
            Some("mxfp4") => Ok(vendors::parse_mxfp4(q)),
            Some("gptq") => parse_gptq(path, q),
            Some("awq") => crate::awq::parse(path, q),
            None if q.get("quantization").is_some_and(|i| i.get("quant_algo").is_some()) => {
                vendors::parse_modelopt(path, q)
            }
            None if q.get("bits").is_some() && q.get("desc_act").is_some() => parse_gptq(path, q),
            other => Err(refused(path, &format!("quantization method `{}`", other.unwrap_or("(none)")))),
        }
    }
}

pub(crate) fn refused(path: &Path, what: &str) -> CheckpointError {
    CheckpointError::Unsupported {
        what: format!("{}: {what} is not supported", path.display()),
        hint: Some(
            "supported: compressed-tensors (integers, FP8, NVFP4, MXFP4), GPTQ with 2, 3, 4 or 8 bits, AWQ GEMM with 4 bits, FP8 as DeepSeek stores it, FP8 and NVFP4 of Model-Optimizer, MXFP4 experts of gpt-oss"
                .into(),
        ),
    }
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
    let groups = vec![QuantGroup { targets: vec![Target::Linear], scheme: scheme.into() }];
    Ok(QuantConfig { format, groups, ignore: Vec::new(), kv: None })
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
