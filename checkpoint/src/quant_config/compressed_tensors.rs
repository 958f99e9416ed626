//! Reading compressed-tensors' `quantization_config`: each group's weights and input activations, and the scheme of keys and values.

use std::path::Path;

use lowbit_kernels::activation::InputCode;
use lowbit_kernels::floats::{MXFP4_GROUP, NVFP4_GROUP};
use lowbit_kernels::{Fp8Scale, GroupSize, InputFormat, LinearScheme, Scheme, WeightFormat};
use serde_json::Value;

use super::{KvScheme, PackFormat, QuantConfig, QuantGroup, Target, refused};
use crate::error::{CheckpointError, Result};

/// Formats whose groups can be read. Which tensors a module has says which one it is in.
const FORMATS: [&str; 6] = [
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
];

/// The whole object.
pub(super) fn parse(path: &Path, q: &Value) -> Result<QuantConfig> {
    let format = q.get("format").and_then(Value::as_str).unwrap_or_default();
    if !FORMATS.contains(&format) && format != "mixed-precision" {
        return Err(refused(path, &format!("compressed-tensors format `{format}`")));
    }
    if q.get("transform_config").and_then(|t| t.get("config_groups")).is_some_and(|g| !empty(g)) {
        return Err(refused(path, "compressed-tensors `transform_config`"));
    }
    let groups = q
        .get("config_groups")
        .and_then(Value::as_object)
        .ok_or_else(|| CheckpointError::invalid(path, "quantization_config has no `config_groups`"))?;
    let mut out = Vec::new();
    for (name, g) in groups {
        if let Some(f) = g.get("format").and_then(Value::as_str).filter(|f| !FORMATS.contains(f)) {
            return Err(refused(path, &format!("{name}: compressed-tensors format `{f}`")));
        }
        if g.get("output_activations").is_some_and(|v| !v.is_null()) {
            return Err(refused(path, &format!("{name}: quantized output activations")));
        }
        let w = g
            .get("weights")
            .filter(|w| w.is_object())
            .ok_or_else(|| CheckpointError::invalid(path, format!("{name}: no `weights`")))?;
        let weight = weights(path, name, &Args(w))?;
        let input = match g.get("input_activations").filter(|v| !v.is_null()) {
            Some(a) => Some(inputs(path, name, &Args(a))?),
            None => None,
        };
        let targets = g.get("targets").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
        out.push(QuantGroup {
            targets: targets.map(|t| Target::parse(path, t)).collect::<Result<_>>()?,
            scheme: LinearScheme { weight, input },
        });
    }
    let ignore = q.get("ignore").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let ignore = ignore.map(String::from).collect();
    let kv = match q.get("kv_cache_scheme").filter(|v| !v.is_null()) {
        Some(a) => Some(keys_and_values(path, &Args(a))?),
        None => None,
    };
    Ok(QuantConfig { format: PackFormat::CompressedTensors, groups: out, ignore, kv })
}

fn empty(v: &Value) -> bool {
    v.as_object().is_none_or(serde_json::Map::is_empty)
}

/// The arguments of one quantization.
struct Args<'a>(&'a Value);

impl Args<'_> {
    fn text(&self, key: &str) -> &str {
        self.0.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    fn number(&self, key: &str) -> u64 {
        self.0.get(key).and_then(Value::as_u64).unwrap_or(0)
    }

    fn symmetric(&self) -> bool {
        self.0.get("symmetric").and_then(Value::as_bool).unwrap_or(true)
    }

    fn is_dynamic(&self) -> bool {
        self.0.get("dynamic").and_then(Value::as_bool).unwrap_or(false)
    }

    /// A positive group size.
    fn group(&self, path: &Path, name: &str) -> Result<usize> {
        let n = self.number("group_size");
        let bad = || CheckpointError::invalid(path, format!("{name}: this strategy needs a positive `group_size`"));
        if n == 0 || n >= 1 << 32 { Err(bad()) } else { Ok(n as usize) }
    }

    /// `8-bit float, strategy tensor`.
    fn describe(&self) -> String {
        format!(
            "{}-bit `{}`, strategy `{}`, {}{}",
            self.number("num_bits"),
            self.text("type"),
            self.text("strategy"),
            if self.symmetric() { "symmetric" } else { "asymmetric" },
            match self.0.get("dynamic") {
                Some(Value::Bool(true)) => ", dynamic",
                Some(Value::String(_)) => ", dynamic in part",
                _ => "",
            }
        )
    }
}

fn weights(path: &Path, name: &str, a: &Args<'_>) -> Result<WeightFormat> {
    let bits = a.number("num_bits");
    let strategy = a.text("strategy");
    let no = || refused(path, &format!("{name}: weights of {}", a.describe()));
    match (a.text("type"), bits) {
        ("int", 1..=8) => {
            let group = match strategy {
                "group" => GroupSize::Cols(a.group(path, name)?),
                // One scale for the matrix is read as one for each of its rows.
                "channel" | "tensor" => GroupSize::PerChannel,
                _ => return Err(no()),
            };
            Ok(WeightFormat::Int(Scheme { bits: bits as u8, symmetric: a.symmetric(), group }))
        }
        ("float", _) if !a.symmetric() => Err(no()),
        ("float", 8) => Ok(WeightFormat::Fp8(match strategy {
            "tensor" => Fp8Scale::Tensor,
            "channel" => Fp8Scale::Channel,
            "block" => block(path, &format!("{name}: `block_structure`"), a.0.get("block_structure"))?,
            _ => return Err(no()),
        })),
        ("float", 4) => match (strategy, a.group(path, name)?) {
            ("tensor_group", NVFP4_GROUP) => Ok(WeightFormat::Nvfp4),
            ("group", MXFP4_GROUP) => Ok(WeightFormat::Mxfp4),
            _ => Err(no()),
        },
        _ => Err(no()),
    }
}

/// `[rows, columns]`.
pub(super) fn block(path: &Path, what: &str, v: Option<&Value>) -> Result<Fp8Scale> {
    let sides: Vec<u64> = v.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64).collect();
    match sides[..] {
        [r, c] if (1..1 << 32).contains(&r) && (1..1 << 32).contains(&c) => Ok(Fp8Scale::Block(r as usize, c as usize)),
        _ => Err(CheckpointError::invalid(path, format!("{what}: expected two positive numbers, found {v:?}"))),
    }
}

fn inputs(path: &Path, name: &str, a: &Args<'_>) -> Result<InputFormat> {
    let no = || refused(path, &format!("{name}: input activations of {}", a.describe()));
    if !a.symmetric() {
        return Err(no());
    }
    match (a.text("type"), a.number("num_bits"), a.text("strategy"), a.is_dynamic()) {
        ("int", 8, "token", true) => Ok(InputFormat::Int8Token),
        ("int", 8, "tensor", false) => Ok(InputFormat::Int8Static),
        ("float", 8, "token", true) => Ok(InputFormat::Fp8Token),
        ("float", 8, "tensor", false) => Ok(InputFormat::Fp8Static),
        ("float", 8, "group", true) => Ok(InputFormat::Fp8Group(a.group(path, name)?)),
        ("float", 4, "tensor_group", false) if a.text("dynamic") == "local" && a.group(path, name)? == NVFP4_GROUP => {
            Ok(InputFormat::Nvfp4)
        }
        _ => Err(no()),
    }
}

fn keys_and_values(path: &Path, a: &Args<'_>) -> Result<KvScheme> {
    let no = || refused(path, &format!("kv_cache_scheme of {}", a.describe()));
    if !a.symmetric() || a.number("num_bits") != 8 || a.0.get("dynamic").is_some_and(|d| d.as_bool() != Some(false)) {
        return Err(no());
    }
    let code = match a.text("type") {
        "int" => InputCode::Int8,
        "float" => InputCode::Fp8,
        _ => return Err(no()),
    };
    match a.text("strategy") {
        "tensor" => Ok(KvScheme { code, per_head: false }),
        "attn_head" => Ok(KvScheme { code, per_head: true }),
        _ => Err(no()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(weights: Value, input: Value) -> std::result::Result<String, String> {
        let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": input});
        let q = json!({"format": "float-quantized", "config_groups": {"group_0": group}});
        let parsed = parse(Path::new("config.json"), &q).map_err(|e| e.to_string())?;
        Ok(parsed.groups[0].scheme.full_name())
    }

    #[test]
    fn schemes_are_told_apart_by_their_arguments() {
        let w = |kind, bits, strategy, group: Option<u64>| {
            json!({"type": kind, "num_bits": bits, "strategy": strategy, "group_size": group, "symmetric": true,
                   "block_structure": [128, 128]})
        };
        let a = |kind, bits, strategy, dynamic: Value, group: Option<u64>| json!({"type": kind, "num_bits": bits, "strategy": strategy, "dynamic": dynamic, "group_size": group});
        let cases = [
            (w("int", 8, "channel", None), a("int", 8, "token", true.into(), None), "w8a8-channel"),
            (w("int", 4, "group", Some(32)), Value::Null, "w4a16-g32"),
            (w("float", 8, "channel", None), a("float", 8, "token", true.into(), None), "fp8-dynamic"),
            (w("float", 8, "tensor", None), a("float", 8, "tensor", false.into(), None), "fp8-static"),
            (w("float", 8, "block", None), a("float", 8, "group", true.into(), Some(128)), "fp8-block"),
            (w("float", 8, "channel", None), Value::Null, "fp8a16"),
            (w("float", 4, "tensor_group", Some(16)), Value::Null, "nvfp4a16"),
            (w("float", 4, "tensor_group", Some(16)), a("float", 4, "tensor_group", "local".into(), Some(16)), "nvfp4"),
            (w("float", 4, "group", Some(32)), Value::Null, "mxfp4a16"),
        ];
        for (weights, input, name) in cases {
            assert_eq!(one(weights, input).as_deref(), Ok(name));
        }
        let token = || a("float", 8, "tensor", true.into(), None);
        for (weights, input) in [
            (w("float", 8, "group", Some(32)), Value::Null),
            (w("float", 4, "group", Some(16)), Value::Null),
            (w("int", 9, "channel", None), Value::Null),
            (w("float", 8, "tensor", None), token()),
            (w("float", 4, "group", Some(32)), a("float", 4, "group", true.into(), Some(32))),
        ] {
            let e = one(weights, input).unwrap_err();
            assert!(e.contains("group_0") && e.contains("not supported"), "{e}");
        }
    }

    #[test]
    fn keys_and_values_have_a_scheme_of_their_own() {
        let kv = |scheme: Value| {
            let q = json!({"format": "float-quantized", "config_groups": {}, "kv_cache_scheme": scheme});
            parse(Path::new("config.json"), &q).map(|q| q.kv).map_err(|e| e.to_string())
        };
        let args = |kind, strategy| json!({"num_bits": 8, "type": kind, "strategy": strategy, "dynamic": false});
        assert_eq!(kv(Value::Null), Ok(None));
        assert_eq!(kv(args("float", "tensor")), Ok(Some(KvScheme { code: InputCode::Fp8, per_head: false })));
        assert_eq!(kv(args("int", "attn_head")), Ok(Some(KvScheme { code: InputCode::Int8, per_head: true })));
        assert!(kv(json!({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": true})).is_err());
    }
}
