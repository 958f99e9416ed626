//! Where a decoder's tensors come from: a checkpoint, or nowhere ([`crate::synthetic`]).

use lowbit_checkpoint::{Checkpoint, ModelConfig};
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{Backend, WeightHandle};

use crate::error::{At, Result};

/// Tensors by their module's name; several blocks may be read at a time.
pub trait Source: Sync {
    /// What the graph needs to know.
    fn config(&self) -> &ModelConfig;
    /// What the decoder's modules are named under: `model`, or `language_model.model`.
    fn prefix(&self) -> Result<&str>;
    /// The weight `[out, in]` of a linear or of the embedding, on the device.
    fn weight(&self, backend: &dyn Backend, module: &str, out: usize, n: usize) -> Result<WeightHandle>;
    /// A linear's bias, where it has one.
    fn bias(&self, module: &str, out: usize) -> Result<Option<Vec<f32>>>;
    /// How a linear's input is rounded before the product, where it is.
    fn input_rule(&self, _module: &str) -> Result<Option<InputRule>> {
        Ok(None)
    }
    /// How keys and values are rounded before they are cached; `attention` is the module, `model.layers.0.self_attn`.
    fn kv_rules(&self, _attention: &str) -> Result<Option<[InputRule; 2]>> {
        Ok(None)
    }
    /// A vector of `len`, by its full name: the weight of a norm.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>>;
}

impl Source for Checkpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefix(&self) -> Result<&str> {
        crate::decoder::prefix(self)
    }

    fn weight(&self, backend: &dyn Backend, module: &str, out: usize, n: usize) -> Result<WeightHandle> {
        backend.upload_weight(&self.linear(module, out, n)?).at(module)
    }

    fn bias(&self, module: &str, out: usize) -> Result<Option<Vec<f32>>> {
        Ok(Checkpoint::bias(self, module, out)?)
    }

    fn input_rule(&self, module: &str) -> Result<Option<InputRule>> {
        Ok(Checkpoint::input_rule(self, module)?)
    }

    fn kv_rules(&self, attention: &str) -> Result<Option<[InputRule; 2]>> {
        Ok(Checkpoint::kv_rules(self, attention)?)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.store.vector(name, len)?)
    }
}
