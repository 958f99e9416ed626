//! `quantization_config` of DeepSeek's FP8 (`quant_method: fp8`), of Model-Optimizer (`quant_method: modelopt`) and of gpt-oss
//! (`quant_method: mxfp4`).

use std::path::Path;

use lowbit_kernels::activation::InputCode;
use lowbit_kernels::{Fp8Scale, InputFormat, LinearScheme, WeightFormat};
use serde_json::Value;

use super::compressed_tensors::block;
use super::{KvScheme, PackFormat, QuantConfig, QuantGroup, Target, refused};
use crate::error::Result;

fn names(q: &Value, keys: &[&str]) -> Vec<String> {
    let list = keys.iter().find_map(|k| q.get(k)).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(String::from).collect()
}

fn whole(scheme: LinearScheme, ignore: Vec<String>, kv: Option<KvScheme>) -> QuantConfig {
    let groups = vec![QuantGroup { targets: vec![Target::Linear], scheme }];
    QuantConfig { format: PackFormat::CompressedTensors, groups, ignore, kv }
}

/// With `weight_block_size` the blocks of DeepSeek-V3 (`weight_scale_inv`) and activations in groups of as many columns; without,
/// one scale a matrix and activations by `activation_scheme`.
pub(super) fn parse_fp8(path: &Path, q: &Value) -> Result<QuantConfig> {
    if let Some(fmt) = q.get("fmt").and_then(Value::as_str).filter(|f| *f != "e4m3") {
        return Err(refused(path, &format!("FP8 in the format `{fmt}`")));
    }
    let activation = q.get("activation_scheme").and_then(Value::as_str).unwrap_or("dynamic");
    let scheme = match (q.get("weight_block_size").filter(|b| !b.is_null()), activation) {
        (Some(b), "dynamic") => {
            let scale = block(path, "`weight_block_size`", Some(b))?;
            let Fp8Scale::Block(_, columns) = scale else { return Err(refused(path, "`weight_block_size`")) };
            LinearScheme { weight: WeightFormat::Fp8(scale), input: Some(InputFormat::Fp8Group(columns)) }
        }
        (None, "dynamic") => {
            LinearScheme { weight: WeightFormat::Fp8(Fp8Scale::Tensor), input: Some(InputFormat::Fp8Token) }
        }
        (None, "static") => {
            LinearScheme { weight: WeightFormat::Fp8(Fp8Scale::Tensor), input: Some(InputFormat::Fp8Static) }
        }
        (_, other) => return Err(refused(path, &format!("FP8 with `activation_scheme` `{other}`"))),
    };
    Ok(whole(scheme, names(q, &["modules_to_not_convert", "ignored_layers"]), None))
}

/// Experts in MXFP4; what has a plain weight is read as that, whatever is listed. Which tensors hold the codes: `store/gpt_oss.rs`.
pub(super) fn parse_mxfp4(q: &Value) -> QuantConfig {
    let scheme = LinearScheme { weight: WeightFormat::Mxfp4, input: None };
    whole(scheme, names(q, &["modules_to_not_convert"]), None)
}

/// The object in `config.json`, or `quantization` of `hf_quant_config.json`.
pub(super) fn parse_modelopt(path: &Path, q: &Value) -> Result<QuantConfig> {
    let inner = q.get("quantization").unwrap_or(q);
    let algorithm = inner.get("quant_algo").and_then(Value::as_str).unwrap_or("(none)");
    let scheme = match algorithm {
        "FP8" => LinearScheme { weight: WeightFormat::Fp8(Fp8Scale::Tensor), input: Some(InputFormat::Fp8Static) },
        "NVFP4" => LinearScheme { weight: WeightFormat::Nvfp4, input: Some(InputFormat::Nvfp4) },
        other => return Err(refused(path, &format!("Model-Optimizer's `quant_algo` `{other}`"))),
    };
    let kv = match inner.get("kv_cache_quant_algo").filter(|v| !v.is_null()) {
        None => None,
        Some(v) if v == "FP8" => Some(KvScheme { code: InputCode::Fp8, per_head: false }),
        Some(v) => return Err(refused(path, &format!("Model-Optimizer's `kv_cache_quant_algo` {v}"))),
    };
    Ok(whole(scheme, names(inner, &["ignore", "exclude_modules"]), kv))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn deepseek_and_model_optimizer() {
        let parse = |q: Value| {
            let parsed = QuantConfig::parse(Path::new("config.json"), &q).map_err(|e| e.to_string())?;
            Ok::<_, String>((parsed.groups[0].scheme.full_name(), parsed.ignore, parsed.kv.is_some()))
        };
        let q = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]});
        assert_eq!(parse(q), Ok(("fp8-block".into(), vec![], false)));
        let q = json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]});
        assert_eq!(parse(q), Ok(("fp8-static".into(), vec!["lm_head".into()], false)));
        let q = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]});
        assert_eq!(parse(q), Ok(("mxfp4a16".into(), vec!["model.layers.*.self_attn".into(), "lm_head".into()], false)));
        let q = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "kv_cache_quant_algo": "FP8"});
        assert_eq!(parse(q), Ok(("nvfp4".into(), vec!["lm_head".into()], true)));
        let q = json!({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": []}});
        assert_eq!(parse(q), Ok(("fp8-static".into(), vec![], false)));
        for (q, said) in [
            (json!({"quant_method": "fp8", "fmt": "e5m2"}), "e5m2"),
            (json!({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]}), "static"),
            (json!({"quant_method": "fp8", "weight_block_size": [128]}), "two positive numbers"),
            (json!({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}), "W4A8_AWQ"),
        ] {
            let e = parse(q).unwrap_err();
            assert!(e.contains(said), "{e}");
        }
    }
}
