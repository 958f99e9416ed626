//! What of a block is not learned, from its checkpoint.

use lowbit_checkpoint::Checkpoint;
use lowbit_model::ModelError;
use lowbit_model::block::Block;

use super::graph::{Graph, LINEARS};
use crate::error::{QuantizeError, Result};

impl Graph {
    /// Norms, biases and shapes of `block`, whose tensors are named under `prefix` (`model.layers.N`). Of a dense decoder without norms
    /// after attention and MLP; a plan lets nothing else come here.
    pub fn load(ckpt: &Checkpoint, prefix: &str, block: &Block) -> Result<Self> {
        let c = &ckpt.config;
        let vector = |name: &str, len: usize| ckpt.store.vector(&format!("{prefix}.{name}.weight"), len);
        let per_head = |name: &str| c.qk_norm.then(|| vector(name, c.head_dim)).transpose();
        let dims: Vec<(usize, usize)> = block.shapes().iter().map(|s| (s.out_features, s.in_features)).collect();
        let mut biases = Vec::with_capacity(LINEARS);
        for (linear, (out, _)) in block.linears.iter().zip(&dims) {
            biases.push(ckpt.bias(&linear.module, *out)?);
        }
        Ok(Self {
            attention: *block.attention_shape(),
            rope: block.rope().clone(),
            eps: c.rms_norm_eps,
            dims: dims.try_into().map_err(|_| unlike(block.index))?,
            biases: biases.try_into().map_err(|_| unlike(block.index))?,
            input_norm: vector("input_layernorm", c.hidden_size)?,
            mlp_norm: vector("post_attention_layernorm", c.hidden_size)?,
            q_norm: per_head("self_attn.q_norm")?,
            k_norm: per_head("self_attn.k_norm")?,
        })
    }
}

/// A block with other linears.
pub(crate) fn unlike(index: usize) -> QuantizeError {
    ModelError::Argument(format!("block {index} does not have the {LINEARS} linears of a dense decoder")).into()
}
