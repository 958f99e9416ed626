//! Tiny random dense models of every shape that transforms know: tied and not, grouped queries, biases, norms of heads, fused
//! projections, Gemma's norms. Used by unit and integration tests.

use std::path::Path;
use std::sync::Arc;

use lowbit_checkpoint::Checkpoint;
use lowbit_kernels::cpu::ScalarBackend;
use lowbit_model::Model;
use serde_json::{Value, json};

use self::weights::Tensor;

#[path = "../../../model/tests/experts/weights.rs"]
pub mod weights;

/// What [`write`] makes.
pub const FAMILIES: [&str; 5] = ["llama", "qwen2", "qwen3", "phi3", "gemma3_text"];
/// Blocks of each.
pub const BLOCKS: usize = 2;

/// A hidden size of 8 · 3 and heads of 2 · 3: neither is a power of two.
fn config(family: &str) -> Value {
    json!({
        "model_type": family, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": matches!(family, "llama" | "gemma3_text"),
    })
}

/// Writes a model after `edit` and opens it.
pub fn write(dir: &Path, family: &str, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) -> Checkpoint {
    let json = config(family);
    let mut tensors = weights::tensors(&json);
    tensors.retain(|(name, _)| name != "lm_head.weight" || json["tie_word_embeddings"] == Value::Bool(false));
    for block in 0..BLOCKS {
        let mut put = |suffix: &str, len: usize| {
            let values = (0..len).map(|i| 0.2 * ((i + 7 * block) as f32 * 1.7).sin()).collect();
            tensors.push((format!("model.layers.{block}.{suffix}"), Tensor { shape: vec![len], values }));
        };
        match family {
            // The graph reads a bias wherever there is one.
            "qwen2" => {
                put("self_attn.q_proj.bias", 24);
                put("self_attn.k_proj.bias", 12);
                put("self_attn.v_proj.bias", 12);
                put("self_attn.o_proj.bias", 24);
                put("mlp.up_proj.bias", 40);
                put("mlp.down_proj.bias", 24);
            }
            "gemma3_text" => {
                put("pre_feedforward_layernorm.weight", 24);
                put("post_feedforward_layernorm.weight", 24);
            }
            _ => {}
        }
    }
    edit(&mut tensors);
    weights::write(dir, &json, &tensors);
    Checkpoint::open(dir).unwrap()
}

/// Logits of some tokens, in plain f32 loops.
pub fn logits(ckpt: &Checkpoint) -> Vec<f32> {
    let ids: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 64).collect();
    Model::load(ckpt, Arc::new(ScalarBackend::new())).unwrap().logits_of(&ids).unwrap()
}

/// `‖a − b‖ / ‖b‖`.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}
