//! A checkpoint folder: config, tensors, quantization.

use std::path::{Path, PathBuf};

use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::HostWeight;
use lowbit_kernels::{LinearScheme, WeightFormat};
use serde_json::Value;

use crate::config::{self, ModelConfig};
use crate::error::{CheckpointError, Result};
use crate::linear;
use crate::quant_config::QuantConfig;
use crate::store::{StoredTensor, TensorStore};

/// An opened checkpoint.
pub struct Checkpoint {
    /// Folder.
    pub dir: PathBuf,
    /// What the graph needs.
    pub config: ModelConfig,
    /// `config.json` as found.
    pub raw_config: Value,
    /// Quantization, where there is one.
    pub quantization: Option<QuantConfig>,
    /// Tensors by name.
    pub store: TensorStore,
}

impl Checkpoint {
    /// Opens and validates `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(CheckpointError::Invalid {
                file: dir.to_path_buf(),
                problem: "no such folder".into(),
                hint: Some("MODEL is a folder, a .gguf file, `demo`, or a hub id `org/name[@revision]`".into()),
            });
        }
        let path = dir.join("config.json");
        let raw_config = read_json(&path)?;
        let config = config::parse(&path, &raw_config)?;
        let external = ["quantize_config.json", "hf_quant_config.json"].map(|f| dir.join(f));
        let external = external.into_iter().find(|f| f.exists());
        let quantization = match raw_config.get("quantization_config").or_else(|| raw_config.get("compression_config"))
        {
            Some(q) if !q.is_null() => Some(QuantConfig::parse(&path, q)?),
            _ => external.map(|f| QuantConfig::parse(&f, &read_json(&f)?)).transpose()?,
        };
        let mut store = TensorStore::open(dir)?;
        match &config.experts {
            Some(experts) if config.gathers_experts() => store.split_gpt_oss(experts, config.hidden_size)?,
            Some(experts) => store.split_experts(experts, config.hidden_size)?,
            None => {}
        }
        Ok(Self { dir: dir.to_path_buf(), config, raw_config, quantization, store })
    }

    /// The checkpoint as what is to be quantized: where gpt-oss is as it was released (`quant_method: mxfp4`), the matrices of its experts
    /// become the bf16 floats that their codes stand for, exactly, made when they are first read. Any other checkpoint stays as it is.
    /// Fails with [`CheckpointError::MissingTensor`] or [`CheckpointError::Tensor`] where the scales do not go with the codes.
    pub fn with_floats(mut self) -> Result<Self> {
        let method = self.raw_config.get("quantization_config").and_then(|q| q.get("quant_method"));
        let released = self.config.gathers_experts() && method.and_then(Value::as_str) == Some("mxfp4");
        if let Some(experts) = self.config.experts.as_ref().filter(|_| released) {
            self.store.widen_experts(experts, self.config.hidden_size)?;
            self.quantization = None;
        }
        Ok(self)
    }

    /// The same checkpoint with some tensors replaced, or added: see [`TensorStore::overlay`].
    #[must_use]
    pub fn overlay(&self, tensors: impl IntoIterator<Item = (String, StoredTensor)>) -> Self {
        self.with_store(self.store.overlay(tensors))
    }

    /// The same checkpoint with some tensors afresh: see [`TensorStore::afresh`].
    pub fn afresh(&self, prefix: &str) -> Option<Self> {
        self.store.afresh(prefix).map(|store| self.with_store(store))
    }

    fn with_store(&self, store: TensorStore) -> Self {
        Self {
            dir: self.dir.clone(),
            config: self.config.clone(),
            raw_config: self.raw_config.clone(),
            quantization: self.quantization.clone(),
            store,
        }
    }

    /// The weight of a linear or embedding, dense or packed.
    pub fn linear(&self, module: &str, out_features: usize, in_features: usize) -> Result<HostWeight> {
        linear::read(&self.store, self.quantization.as_ref(), module, out_features, in_features)
    }

    /// The number formats of a linear whose `weight` was read; `None` where that is dense. Of integers the tensors may say more than the
    /// config: AWQ's does not know whether they are symmetric.
    pub fn scheme_of(&self, module: &str, weight: &HostWeight) -> Option<LinearScheme> {
        let named = self.quantization.as_ref().and_then(|q| q.scheme_of(module));
        match weight {
            HostWeight::Dense { .. } => None,
            HostWeight::Packed(p) => {
                Some(LinearScheme { weight: WeightFormat::Int(p.scheme), input: named.and_then(|s| s.input) })
            }
            HostWeight::Float(_) => named,
        }
    }

    /// How a linear's input is rounded, where it is.
    pub fn input_rule(&self, module: &str) -> Result<Option<InputRule>> {
        linear::read_input_rule(&self.store, self.quantization.as_ref(), module)
    }

    /// How keys and values are rounded before they are cached; `attention` is `model.layers.0.self_attn`.
    pub fn kv_rules(&self, attention: &str) -> Result<Option<[InputRule; 2]>> {
        let Some(kv) = self.quantization.as_ref().and_then(|q| q.kv) else { return Ok(None) };
        if self.config.latent.is_some() {
            // Their scale is that of the latent vector, which other engines cache in the place of keys and values.
            return Err(CheckpointError::Unsupported {
                what: format!("{}: `kv_cache_scheme` with latent attention is not supported", self.dir.display()),
                hint: Some(
                    "remove `kv_cache_scheme` from config.json: keys and values then keep full precision".into(),
                ),
            });
        }
        linear::narrow::kv_rules(&self.store, kv, attention, self.config.num_kv_heads).map(Some)
    }

    /// A linear's bias, where it has one.
    pub fn bias(&self, module: &str, out_features: usize) -> Result<Option<Vec<f32>>> {
        let name = format!("{module}.bias");
        match self.store.find(&name) {
            Some(_) => self.store.vector(&name, out_features).map(Some),
            None => Ok(None),
        }
    }

    /// Whether `module` has its own weight, dense or packed.
    pub fn has_weight(&self, module: &str) -> bool {
        ["weight", "weight_packed", "qweight"].iter().any(|s| self.store.find(&format!("{module}.{s}")).is_some())
    }
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = crate::files::read_text(path).map_err(|e| CheckpointError::io(path, e))?;
    serde_json::from_str(&text).map_err(|e| CheckpointError::invalid(path, format!("not valid JSON: {e}")))
}
