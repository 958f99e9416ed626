//! Models of a known shape with random weights, made on the device matrix by matrix: for measurements of speed and memory.
//!
//! Elements have a deviation of 0.02, as transformers initializes its models, so activations stay finite through any
//! number of blocks. What such a model writes means nothing.

use std::path::Path;

use lowbit_checkpoint::{ModelConfig, config};
use lowbit_kernels::backend::{Backend, FloatType, WeightHandle};
use lowbit_kernels::random::{RandomFormat, RandomWeight};
use lowbit_kernels::{GroupSize, Scheme};
use serde_json::{Value, json};

use crate::error::{At, ModelError, Result};
use crate::source::Source;

/// Standard deviation of every matrix.
const DEVIATION: f32 = 0.02;

/// Names of the shapes.
pub const SHAPES: [&str; 4] = ["llama-3.1-8b", "llama-3.2-1b", "qwen3-32b", "tiny"];

/// `config.json` of a shape, from the models' cards; `tiny` is a Qwen3 for tests.
fn config_json(name: &str) -> Option<Value> {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let mut llama3_small = llama3.clone();
    llama3_small["factor"] = json!(32.0);
    Some(match name {
        "llama-3.1-8b" => json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": llama3,
            "tie_word_embeddings": false,
        }),
        "llama-3.2-1b" => json!({
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "rope_scaling": llama3_small, "tie_word_embeddings": true,
        }),
        "qwen3-32b" => json!({
            "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
            "tie_word_embeddings": false,
        }),
        "tiny" => json!({
            "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 1000000.0,
            "tie_word_embeddings": false,
        }),
        _ => return None,
    })
}

/// `bf16`, `w4a16-g128`, `w8a16-channel`: a format by name.
pub fn parse_format(name: &str) -> Result<RandomFormat> {
    let bad = || ModelError::Argument(format!("unknown format `{name}`: expected bf16, or w4a16-g128, w8a16-channel"));
    if name == "bf16" {
        return Ok(RandomFormat::Dense(FloatType::Bf16));
    }
    let (scheme, group) = name.split_once('-').unwrap_or((name, "channel"));
    let group = match group {
        "channel" => GroupSize::PerChannel,
        g => match g.strip_prefix('g').and_then(|n| n.parse().ok()) {
            Some(n) if n > 0 => GroupSize::Cols(n),
            _ => return Err(bad()),
        },
    };
    Scheme::parse(scheme, group, true).map(RandomFormat::Packed).map_err(|_| bad())
}

/// The name [`parse_format`] reads.
pub fn format_name(format: RandomFormat) -> String {
    match format {
        RandomFormat::Dense(FloatType::F32) => "f32".to_string(),
        RandomFormat::Dense(FloatType::F16) => "f16".to_string(),
        RandomFormat::Dense(FloatType::Bf16) => "bf16".to_string(),
        RandomFormat::Packed(scheme) => scheme.full_name(),
    }
}

/// A shape with formats: the embedding is bf16, the blocks' linears and the head are as asked.
#[derive(Clone, Debug)]
pub struct Synthetic {
    config: ModelConfig,
    linears: RandomFormat,
    head: RandomFormat,
    seed: u32,
}

impl Synthetic {
    /// One of [`SHAPES`]. A tied head of another format than bf16 becomes a matrix of its own, as quantizing one makes it.
    pub fn new(shape: &str, linears: RandomFormat, head: RandomFormat, seed: u32) -> Result<Self> {
        let json = config_json(shape).ok_or_else(|| {
            ModelError::Argument(format!("unknown shape `{shape}`: expected one of {}", SHAPES.join(", ")))
        })?;
        let mut config = config::parse(Path::new(shape), &json)?;
        config.tie_word_embeddings &= head == RandomFormat::Dense(FloatType::Bf16);
        Ok(Self { config, linears, head, seed })
    }
}

impl Source for Synthetic {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefix(&self) -> Result<&str> {
        Ok("model")
    }

    fn weight(&self, backend: &dyn Backend, module: &str, out: usize, n: usize) -> Result<WeightHandle> {
        let format = match module {
            "lm_head" => self.head,
            "model.embed_tokens" => RandomFormat::Dense(FloatType::Bf16),
            _ => self.linears,
        };
        // FNV-1a: every module has numbers of its own.
        let seed = module.bytes().fold(0x811c_9dc5 ^ self.seed, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        let recipe = RandomWeight { format, out_features: out, in_features: n, deviation: DEVIATION, seed };
        backend.random_weight(&recipe).at(module)
    }

    fn bias(&self, _module: &str, _out: usize) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    fn vector(&self, _name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(vec![1.0 - self.config.norm_offset; len])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lowbit_kernels::backend::Segment;
    use lowbit_kernels::cpu::ScalarBackend;

    use super::*;
    use crate::Model;

    #[test]
    fn shapes_have_the_models_sizes() {
        // Parameters of the blocks and the head, from the models' cards (total less the embedding).
        let bytes = |name: &str| {
            let c = config::parse(Path::new(name), &config_json(name).unwrap()).unwrap();
            let linears: usize =
                crate::block::linear_shapes(&c, 0).iter().map(|s| s.out_features * s.in_features).sum();
            c.num_layers * linears + c.vocab_size * c.hidden_size
        };
        assert_eq!(bytes("llama-3.1-8b"), 7_504_658_432);
        assert_eq!(bytes("llama-3.2-1b"), 1_235_746_816);
        assert_eq!(bytes("qwen3-32b"), 31_983_534_080);
        assert!(SHAPES.iter().all(|s| config_json(s).is_some()));
        assert!(Synthetic::new("llama", parse_format("bf16").unwrap(), parse_format("bf16").unwrap(), 0).is_err());
    }

    #[test]
    fn formats_are_read_and_written() {
        for name in ["bf16", "w4a16-g128", "w8a16-g64", "w4a16-channel"] {
            assert_eq!(format_name(parse_format(name).unwrap()), name);
        }
        for bad in ["w4", "w4a16-128", "w4a16-g0", "fp8"] {
            assert!(parse_format(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn activations_stay_finite_and_depend_on_the_input() {
        for format in ["bf16", "w4a16-g32"] {
            let format = parse_format(format).unwrap();
            let source = Synthetic::new("tiny", format, parse_format("w8a16-channel").unwrap(), 3).unwrap();
            let model = Model::load(&source, Arc::new(ScalarBackend::new())).unwrap();
            let run = |ids: &[u32]| {
                let mut cache = model.new_cache(1, 4).unwrap();
                cache.fill_random(model.backend(), &[0], 2, 5).unwrap();
                let segments = [Segment { slot: 0, row: 0, tokens: ids.len(), past: 2 }];
                let hidden = model.forward(ids, &segments, &mut cache).unwrap();
                model.backend().download(&model.logits(&hidden).unwrap()).unwrap()
            };
            let (a, b) = (run(&[1, 2]), run(&[1, 3]));
            assert!(a.iter().chain(&b).all(|v| v.is_finite() && v.abs() < 50.0));
            assert_eq!(a[..512], b[..512]);
            assert_ne!(a[512..], b[512..]);
        }
    }
}
