//! What a user can choose, and what methods are made of.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lowbit_calibration::experts::HESSIAN_BYTES;
use lowbit_calibration::sequential::CHUNK_TOKENS;
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat};
use lowbit_checkpoint::writer::DEFAULT_SHARD_BYTES;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, InputFormat, LinearScheme, ScaleType, Scheme};
use serde_json::Value;

use crate::error::QuantizeError;
use crate::gguf::{GgufChoice, scheme_name};
use crate::learned::STEPS;
use crate::scale_search::{DataFree, ScaleSearch, SolverOptions};
use crate::target::Correction;
use crate::transform::Transform;

/// Which solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Round to nearest, no data.
    Rtn,
    /// Half-quadratic quantization, [`crate::hqq`], no data.
    Hqq,
    /// GPTQ (arXiv 2210.17323) on calibration data.
    Gptq,
    /// The most accurate composition: see [`Recipe`].
    Best,
    /// What is nearly free on top of GPTQ.
    Fast,
    /// Rounding learned on the outputs of whole blocks, [`crate::learned`].
    Round,
}

/// What a calibrated method does beside GPTQ.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recipe {
    /// Shares of the drift that are corrected; any needs the float stream.
    pub correction: Correction,
    /// Tokens of o and down weighted by 1 / rms of the residual.
    pub token_weights: bool,
    /// Sweeps of coordinate descent with scale refits.
    pub sweeps: usize,
    /// No solver at all: rounding is learned, block by block.
    pub learned: bool,
}

impl Recipe {
    /// Whether the float model runs beside the quantized one.
    pub fn float_stream(&self) -> bool {
        self.correction != Correction::default() || self.learned
    }
}

impl Method {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Method::Rtn => "rtn",
            Method::Hqq => "hqq",
            Method::Gptq => "gptq",
            Method::Best => "best",
            Method::Fast => "fast",
            Method::Round => "round",
        }
    }

    /// Whether it needs calibration data.
    pub fn calibrated(self) -> bool {
        !matches!(self, Method::Rtn | Method::Hqq)
    }

    /// Whether it solves under a Hessian: damping and the order of columns mean nothing to the others.
    pub fn by_hessian(self) -> bool {
        matches!(self, Method::Gptq | Method::Best | Method::Fast)
    }

    /// Whether its scales may be any number and its codes are integers: it knows neither float codes nor scales stored in steps.
    pub fn integers_only(self) -> bool {
        !matches!(self, Method::Rtn | Method::Gptq)
    }

    /// What it does beside GPTQ, or in its place.
    pub fn recipe(self) -> Recipe {
        match self {
            Method::Rtn | Method::Hqq | Method::Gptq => Recipe::default(),
            Method::Fast => Recipe { token_weights: true, sweeps: 1, ..Recipe::default() },
            Method::Best => Recipe {
                correction: Correction { input: 0.5, residual: 0.5 },
                token_weights: true,
                sweeps: 3,
                ..Recipe::default()
            },
            Method::Round => Recipe { learned: true, ..Recipe::default() },
        }
    }
}

/// Everything a user can choose.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// Number formats of the block linears.
    pub scheme: LinearScheme,
    /// Number formats of modules that match a pattern (an exact name, or `re:`), in the place of `scheme`; the first match counts.
    pub modules: Vec<(String, LinearScheme)>,
    /// How keys and values are quantized: stored scales from calibration.
    pub kv: Option<KvScheme>,
    /// Changes of the float model that leave what it computes, before it is quantized.
    pub transforms: Vec<Transform>,
    /// Solver.
    pub method: Method,
    /// Layout on disk.
    pub format: PackFormat,
    /// Damping as a fraction of mean(diag H).
    pub damp_frac: f64,
    /// Columns by falling Hessian diagonal, static groups.
    pub act_order: bool,
    /// How scales are chosen.
    pub scale_search: ScaleSearch,
    /// Steps of learned rounding on each block; at least 1.
    pub learn_steps: usize,
    /// Let the extreme weight take the code −2^(b−1) by a negative scale.
    pub signed_scales: bool,
    /// Quantize lm_head to 8 bits by rounding (it is untied when it shares the embedding's matrix).
    pub head_w8: bool,
    /// Quantize the token embedding to 8 bits by rounding. With a tied head this needs `head_w8`: both then carry the same codes.
    pub embedding_w8: bool,
    /// Modules to leave alone: exact names, or `re:` patterns.
    pub ignore: Vec<String>,
    /// Any event is an error.
    pub strict: bool,
    /// Largest shard.
    pub shard_bytes: u64,
    /// Folder for the carried activations; in memory when absent. Does not change the result.
    pub offload: Option<PathBuf>,
    /// Most bytes of experts' Hessians at once. Does not change the result.
    pub expert_bytes: u64,
    /// Most calibration tokens that go through a block together. Does not change the result.
    pub chunk_tokens: usize,
    /// Number formats of single modules, by full name, in the place of `scheme` (and of a table's 8 bits): a budget's choice.
    pub chosen: BTreeMap<String, LinearScheme>,
    /// Write one GGUF file with these types; `scheme`, `format` and `shard_bytes` are not read then.
    pub gguf: Option<GgufChoice>,
}

impl QuantizeOptions {
    /// The defaults for a scheme.
    pub fn new(scheme: impl Into<LinearScheme>) -> Self {
        Self {
            scheme: scheme.into(),
            modules: Vec::new(),
            kv: None,
            transforms: Vec::new(),
            method: Method::Gptq,
            format: PackFormat::CompressedTensors,
            damp_frac: 0.01,
            act_order: true,
            scale_search: ScaleSearch::Hessian,
            learn_steps: STEPS,
            signed_scales: true,
            head_w8: false,
            embedding_w8: false,
            ignore: Vec::new(),
            strict: false,
            shard_bytes: DEFAULT_SHARD_BYTES,
            offload: None,
            expert_bytes: HESSIAN_BYTES,
            chunk_tokens: CHUNK_TOKENS,
            chosen: BTreeMap::new(),
            gguf: None,
        }
    }

    /// Whether something of this is for integer codes with scales of any value, and what: neither for float codes nor for scales stored
    /// in steps.
    pub fn integers_only(&self) -> Option<String> {
        match self.method.integers_only() {
            true => Some(format!("method {}", self.method.name())),
            false => self.scale_search.integers_only().then(|| format!("--scale-search {}", self.scale_search.name())),
        }
    }

    /// What the linears of the blocks become: the full name of a scheme, or a type of GGUF.
    pub fn scheme_name(&self) -> String {
        self.gguf.map_or_else(|| self.scheme.full_name(), |g| scheme_name(g.kind))
    }

    /// The layout's name.
    pub fn format_name(&self) -> &'static str {
        if self.gguf.is_some() { "gguf" } else { self.format.name() }
    }

    /// Whether anything of a linear comes from calibration data: its codes, or a stored scale of its input.
    pub fn reads_inputs(&self) -> bool {
        let stored = |s: &LinearScheme| s.input.is_some_and(InputFormat::is_static);
        self.method.calibrated() || stored(&self.scheme) || self.modules.iter().any(|m| stored(&m.1))
    }

    /// Whether the work needs calibration data: for linears, for scales of keys and values, or for a transform.
    pub fn needs_data(&self) -> bool {
        self.reads_inputs() || self.kv.is_some() || self.transforms.iter().any(|t| t.calibrated())
    }

    /// What [`Self::needs_data`] is about, where there is none.
    pub fn no_data(&self) -> QuantizeError {
        let transform = self.transforms.iter().find(|t| t.calibrated());
        if let Some(transform) = transform.filter(|_| !self.method.calibrated()) {
            return QuantizeError::no_data(&format!("--transform {}", transform.name()), "no transform");
        }
        match self.method.calibrated() {
            true => QuantizeError::no_data(&format!("method {}", self.method.name()), "--method rtn"),
            false => QuantizeError::no_data(
                "a stored scale of inputs, keys or values",
                "a scheme without one, such as fp8-dynamic or w8a8, and no --kv-scheme",
            ),
        }
    }

    /// Solver settings for a scheme whose scales are stored as `scale_type`. Float codes have no integer scheme: theirs is not read.
    pub fn solver(&self, scheme: LinearScheme, scale_type: ScaleType) -> SolverOptions {
        let scheme = scheme.int().unwrap_or(Scheme { bits: 8, symmetric: true, group: GroupSize::PerChannel });
        SolverOptions {
            damp_frac: self.damp_frac,
            act_order: self.act_order && self.method.by_hessian(),
            scale_search: self.scale_search,
            signed_scales: self.signed_scales,
            min_zero: u8::from(self.format == PackFormat::GptqV1),
            correction: self.method.recipe().correction,
            sweeps: self.method.recipe().sweeps,
            data_free: if self.method == Method::Hqq { DataFree::HalfQuadratic } else { DataFree::Nearest },
            ..SolverOptions::new(scheme, scale_type)
        }
    }

    /// All options by name, for records.
    pub fn to_map(&self) -> BTreeMap<String, Value> {
        let mut m = BTreeMap::new();
        m.insert("scheme".into(), self.scheme_name().into());
        m.insert("method".into(), self.method.name().into());
        m.insert("format".into(), self.format_name().into());
        let recipe = self.method.recipe();
        m.insert("input_correction".into(), f64::from(recipe.correction.input).into());
        m.insert("residual_correction".into(), f64::from(recipe.correction.residual).into());
        m.insert("token_weights".into(), recipe.token_weights.into());
        m.insert("sweeps".into(), recipe.sweeps.into());
        if recipe.learned {
            m.insert("learn_steps".into(), self.learn_steps.into());
        }
        m.insert("damp_frac".into(), self.damp_frac.into());
        m.insert("act_order".into(), self.act_order.into());
        m.insert("scale_search".into(), self.scale_search.name().into());
        m.insert("signed_scales".into(), self.signed_scales.into());
        let table = |w8: bool, kind: fn(&GgufChoice) -> Option<GgmlType>| match self.gguf.as_ref().and_then(kind) {
            Some(kind) => scheme_name(kind),
            None => if w8 { "w8" } else { "keep" }.into(),
        };
        m.insert("head".into(), table(self.head_w8, |g| g.head).into());
        m.insert("embedding".into(), table(self.embedding_w8, |g| g.embedding).into());
        m.insert("ignore".into(), self.ignore.clone().into());
        m.insert("strict".into(), self.strict.into());
        let modules: Vec<String> = self.modules.iter().map(|(p, s)| format!("{p}={}", s.full_name())).collect();
        m.insert("modules".into(), modules.into());
        let transforms: Vec<String> = self.transforms.iter().map(|t| t.name()).collect();
        m.insert("transforms".into(), transforms.into());
        m.insert("kv_scheme".into(), self.kv.map(KvScheme::name).into());
        m.insert("shard_bytes".into(), self.shard_bytes.into());
        m
    }
}
