//! gpt-oss as it is released: experts in MXFP4, the rest in floats; in two files, by the kind of their elements. Used by the tests of several
//! crates, beside `weights`.

use std::path::Path;

use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use super::weights::{self, Tensor};

/// A tensor of bytes.
struct Codes(Vec<usize>, Vec<u8>);

impl View for &Codes {
    fn dtype(&self) -> Dtype {
        Dtype::U8
    }
    fn shape(&self) -> &[usize] {
        &self.0
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.1[..]).into()
    }
    fn data_len(&self) -> usize {
        self.1.len()
    }
}

/// Random codes of MXFP4 for a tensor `[experts, in, out]` of gpt-oss, and scales of 2⁻³ to 2⁻¹, by name and shape.
fn mxfp4(name: &str, shape: &[usize]) -> [(String, Codes); 2] {
    let [experts, inner, out] = shape[..] else { panic!("{name}: three dimensions, found {shape:?}") };
    let bytes = |name: &str, count| weights::mixed(name, count).map(|x| (x >> 24) as u8).collect::<Vec<u8>>();
    let (blocks, scales) = (format!("{name}_blocks"), format!("{name}_scales"));
    let codes = bytes(&blocks, experts * inner * out / 2);
    let powers = bytes(&scales, experts * inner * out / 32).into_iter().map(|b| 124 + b % 3).collect();
    let shape = vec![experts, out, inner / 32];
    [(blocks, Codes([&shape[..], &[16]].concat(), codes)), (scales, Codes(shape, powers))]
}

/// Writes a checkpoint of [`weights::tensors`], with other experts: random codes in the place of their matrices.
pub fn write(dir: &Path, mut json: Value, tensors: Vec<(String, Tensor)>) {
    let (mut floats, mut codes) = (Vec::new(), Vec::new());
    for (name, t) in tensors {
        if ["experts.gate_up_proj", "experts.down_proj"].iter().any(|n| name.ends_with(n)) {
            codes.extend(mxfp4(&name, &t.shape));
        } else {
            floats.push((name, t));
        }
    }
    json["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
        "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]});
    weights::write(dir, &json, &floats);
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    std::fs::rename(dir.join("model.safetensors"), dir.join(first)).unwrap();
    let views = codes.iter().map(|(n, t)| (n.as_str(), t));
    safetensors::serialize_to_file(views, None, &dir.join(second)).unwrap();
    let places = floats.iter().map(|(n, _)| (n, first)).chain(codes.iter().map(|(n, _)| (n, second)));
    let map: Map<String, Value> = places.map(|(n, file)| (n.clone(), json!(file))).collect();
    std::fs::write(dir.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
}
