//! Tiny random models with experts: configs and weights as `logits.py` makes them. Used by the tests of several crates.

use std::path::Path;

use lowbit_checkpoint::config::{self, ModelConfig};
use lowbit_model::block::{linear_shapes, router_modules};
use safetensors::{Dtype, View};
use serde_json::Value;

/// A tensor of a checkpoint.
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into()
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

/// `config.json` of a family.
pub fn config_of(family: &str) -> Value {
    let all: Value = serde_json::from_str(include_str!("configs.json")).unwrap();
    all[family].clone()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
    })
}

/// Element i: a 32-bit mix of CRC-32 of the name and i.
pub fn mixed(name: &str, count: usize) -> impl Iterator<Item = u32> {
    let seed = crc32(name.as_bytes());
    (0..count).map(move |i| {
        let mut x = (i as u32).wrapping_mul(0x9E37_79B1).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^ (x >> 16)
    })
}

/// The upper 24 bits as a number from −1 to 1, times the tensor's scale.
fn values(name: &str, count: usize) -> Vec<f32> {
    let own = ["gate.weight", "router.weight", "sinks"];
    let scaled = |x: u32| match (x >> 8) as f32 / 8_388_608.0 - 1.0 {
        u if name.contains("norm") => 1.0 + 0.25 * u,
        u if name.ends_with("bias") => 0.125 * u,
        u if name.contains("embed_tokens") || own.iter().any(|o| name.ends_with(o)) => u,
        // A few activations beyond the clamp of gpt-oss.
        u if name.ends_with("gate_up_proj") => 0.5 * u,
        u => 0.25 * u,
    };
    mixed(name, count).map(scaled).collect()
}

/// All tensors of a model, by name.
pub fn tensors(json: &Value) -> Vec<(String, Tensor)> {
    let c: ModelConfig = config::parse(Path::new("config.json"), json).unwrap();
    let (h, vocab) = (c.hidden_size, c.vocab_size);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![vocab, h]),
        ("model.norm.weight".into(), vec![h]),
        ("lm_head.weight".into(), vec![vocab, h]),
    ];
    for i in 0..c.num_layers {
        let mut put = |suffix: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{i}.{suffix}"), shape));
        put("input_layernorm.weight", vec![h]);
        put("post_attention_layernorm.weight", vec![h]);
        if c.qk_norm {
            put("self_attn.q_norm.weight", vec![c.head_dim]);
            put("self_attn.k_norm.weight", vec![c.head_dim]);
        }
        if let Some(l) = &c.latent {
            put("self_attn.kv_a_layernorm.weight", vec![l.kv_rank]);
            if let Some(rank) = l.q_rank {
                put("self_attn.q_a_layernorm.weight", vec![rank]);
            }
        }
        if c.sinks {
            gpt_oss(&c, i, &mut put);
            continue;
        }
        for s in linear_shapes(&c, i) {
            put(&format!("{}.weight", s.suffix), vec![s.out_features, s.in_features]);
            if c.family == "qwen2_moe" && ["q_proj", "k_proj", "v_proj"].iter().any(|n| s.suffix.ends_with(n)) {
                put(&format!("{}.bias", s.suffix), vec![s.out_features]);
            }
        }
        for (module, rows) in router_modules(&c, i) {
            put(&format!("{module}.weight"), vec![rows, h]);
            if c.experts.as_ref().is_some_and(|e| e.correction_bias) {
                put(&format!("{module}.e_score_correction_bias"), vec![rows]);
            }
        }
    }
    let fill = |(name, shape): (String, Vec<usize>)| {
        let values = values(&name, shape.iter().product());
        (name, Tensor { shape, values })
    };
    shapes.into_iter().map(fill).collect()
}

/// A layer of gpt-oss under the names it is stored by, norms aside.
fn gpt_oss(c: &ModelConfig, layer: usize, put: &mut dyn FnMut(&str, Vec<usize>)) {
    let e = c.experts.as_ref().unwrap();
    let (h, width) = (c.hidden_size, e.intermediate_size);
    for s in linear_shapes(c, layer).iter().filter(|s| s.suffix.starts_with("self_attn.")) {
        put(&format!("{}.weight", s.suffix), vec![s.out_features, s.in_features]);
        put(&format!("{}.bias", s.suffix), vec![s.out_features]);
    }
    put("self_attn.sinks", vec![c.num_heads]);
    put("mlp.router.weight", vec![e.count, h]);
    put("mlp.router.bias", vec![e.count]);
    put("mlp.experts.gate_up_proj", vec![e.count, h, 2 * width]);
    put("mlp.experts.gate_up_proj_bias", vec![e.count, 2 * width]);
    put("mlp.experts.down_proj", vec![e.count, width, h]);
    put("mlp.experts.down_proj_bias", vec![e.count, h]);
}

/// Writes a checkpoint.
pub fn write(dir: &Path, json: &Value, tensors: &[(String, Tensor)]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    let views = tensors.iter().map(|(n, t)| (n.as_str(), t));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}
