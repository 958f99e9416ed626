//! Writing compressed-tensors' `quantization_config`: exactly the field set of version 0.19, arguments in full, never a preset's name.

use lowbit_kernels::activation::InputCode;
use lowbit_kernels::floats::{MXFP4_GROUP, NVFP4_GROUP};
use lowbit_kernels::{Fp8Scale, GroupSize, InputFormat, LinearScheme, WeightFormat};
use serde_json::{Value, json};

use super::KvScheme;

/// Config of one compressed-tensors rule to write.
pub struct WrittenGroup<'a> {
    /// Number formats.
    pub scheme: LinearScheme,
    /// Targets.
    pub targets: Vec<String>,
    /// Observer name to record for integer weights (`minmax` or `mse`).
    pub observer: &'a str,
    /// Whether columns were quantized by falling Hessian diagonal with static groups (recorded for integer weights).
    pub static_act_order: bool,
}

impl WrittenGroup<'static> {
    /// Rules of codes that are taken over as they are: how their scales were found is not known, and is recorded as the plainest way.
    pub fn taken_over(rules: Vec<(LinearScheme, Vec<String>)>) -> Vec<Self> {
        let rule = |(scheme, targets)| Self { scheme, targets, observer: "memoryless_minmax", static_act_order: false };
        rules.into_iter().map(rule).collect()
    }
}

/// Modules by their scheme, in the order in which schemes first come.
pub fn by_scheme(modules: impl IntoIterator<Item = (LinearScheme, String)>) -> Vec<(LinearScheme, Vec<String>)> {
    let mut rules: Vec<(LinearScheme, Vec<String>)> = Vec::new();
    for (scheme, module) in modules {
        match rules.iter_mut().find(|(s, _)| *s == scheme) {
            Some((_, names)) => names.push(module),
            None => rules.push((scheme, vec![module])),
        }
    }
    rules
}

/// One quantization's arguments.
struct Args {
    bits: u8,
    kind: &'static str,
    strategy: &'static str,
    group: Option<usize>,
    block: Option<(usize, usize)>,
    dynamic: Value,
    observer: Value,
    actorder: Value,
    scale_dtype: Value,
    symmetric: bool,
}

impl Args {
    fn float(bits: u8, strategy: &'static str) -> Self {
        Self {
            bits,
            kind: "float",
            strategy,
            group: None,
            block: None,
            dynamic: false.into(),
            observer: "memoryless_minmax".into(),
            actorder: Value::Null,
            scale_dtype: Value::Null,
            symmetric: true,
        }
    }

    /// Stored scales of what calibration saw.
    fn observed(self) -> Self {
        Self { observer: "static_minmax".into(), ..self }
    }

    fn dynamic(self) -> Self {
        Self { dynamic: true.into(), observer: Value::Null, ..self }
    }

    fn int8(strategy: &'static str) -> Self {
        Self { kind: "int", ..Self::float(8, strategy) }
    }

    fn json(self) -> Value {
        json!({
            "actorder": self.actorder, "block_structure": self.block.map(|(r, c)| [r, c]), "dynamic": self.dynamic,
            "group_size": self.group, "num_bits": self.bits, "observer": self.observer, "observer_kwargs": {},
            "scale_dtype": self.scale_dtype, "strategy": self.strategy, "symmetric": self.symmetric, "type": self.kind,
            "zp_dtype": if self.symmetric { Value::Null } else { json!("torch.int8") },
        })
    }
}

/// The name of the format that holds a scheme.
fn format(scheme: LinearScheme) -> &'static str {
    match (scheme.weight, scheme.input) {
        (WeightFormat::Int(s), Some(_)) if s.bits == 8 => "int-quantized",
        (WeightFormat::Int(_), _) => "pack-quantized",
        (WeightFormat::Fp8(_), Some(_)) => "float-quantized",
        (WeightFormat::Fp8(_), None) => "naive-quantized",
        (WeightFormat::Nvfp4, _) => "nvfp4-pack-quantized",
        (WeightFormat::Mxfp4, _) => "mxfp4-pack-quantized",
    }
}

fn weights(g: &WrittenGroup<'_>) -> Args {
    match g.scheme.weight {
        WeightFormat::Int(s) => {
            let (strategy, group) = match s.group {
                GroupSize::Cols(n) => ("group", Some(n)),
                GroupSize::PerChannel => ("channel", None),
            };
            Args {
                bits: s.bits,
                group,
                symmetric: s.symmetric,
                observer: g.observer.into(),
                actorder: if g.static_act_order { json!("static") } else { Value::Null },
                ..Args::int8(strategy)
            }
        }
        WeightFormat::Fp8(Fp8Scale::Tensor) => Args::float(8, "tensor"),
        WeightFormat::Fp8(Fp8Scale::Channel) => Args::float(8, "channel"),
        WeightFormat::Fp8(Fp8Scale::Block(r, c)) => Args { block: Some((r, c)), ..Args::float(8, "block") },
        WeightFormat::Nvfp4 => Args {
            group: Some(NVFP4_GROUP),
            scale_dtype: json!("torch.float8_e4m3fn"),
            ..Args::float(4, "tensor_group")
        },
        WeightFormat::Mxfp4 => {
            Args { group: Some(MXFP4_GROUP), scale_dtype: json!("torch.uint8"), ..Args::float(4, "group") }
        }
    }
}

fn input(format: InputFormat) -> Args {
    match format {
        InputFormat::Int8Token => Args::int8("token").dynamic(),
        InputFormat::Int8Static => Args::int8("tensor").observed(),
        InputFormat::Fp8Token => Args::float(8, "token").dynamic(),
        InputFormat::Fp8Static => Args::float(8, "tensor").observed(),
        InputFormat::Fp8Group(n) => Args { group: Some(n), ..Args::float(8, "group").dynamic() },
        InputFormat::Nvfp4 => Args {
            group: Some(NVFP4_GROUP),
            dynamic: "local".into(),
            scale_dtype: json!("torch.float8_e4m3fn"),
            ..Args::float(4, "tensor_group").observed()
        },
    }
}

fn keys_and_values(kv: KvScheme) -> Value {
    let strategy = if kv.per_head { "attn_head" } else { "tensor" };
    let args = if kv.code == InputCode::Int8 { Args::int8(strategy) } else { Args::float(8, strategy) };
    args.observed().json()
}

/// The `quantization_config` of a compressed-tensors checkpoint. Groups in different formats make it `mixed-precision`.
pub fn write_compressed_tensors(groups: &[WrittenGroup<'_>], ignore: &[String], kv: Option<KvScheme>) -> Value {
    let mut config_groups = serde_json::Map::new();
    let formats: Vec<&str> = groups.iter().map(|g| format(g.scheme)).collect();
    for (i, g) in groups.iter().enumerate() {
        config_groups.insert(
            format!("group_{i}"),
            json!({
                "format": formats[i], "input_activations": g.scheme.input.map(|f| input(f).json()),
                "output_activations": null, "targets": g.targets, "weights": weights(g).json(),
            }),
        );
    }
    let one = formats.first().filter(|f| formats.iter().all(|o| o == *f));
    json!({
        "config_groups": config_groups, "format": one.unwrap_or(&"mixed-precision"), "global_compression_ratio": null,
        "ignore": ignore, "kv_cache_scheme": kv.map(keys_and_values), "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.19.0",
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lowbit_kernels::LinearScheme;

    use super::super::QuantConfig;
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut groups = Vec::new();
        for (i, name) in LinearScheme::NAMES.iter().enumerate() {
            let scheme = LinearScheme::parse(name, GroupSize::Cols(32), i % 2 == 0).unwrap();
            let targets = vec![format!("model.layers.{i}")];
            groups.push(WrittenGroup { scheme, targets, observer: "mse", static_act_order: true });
        }
        for kv in [None, Some(KvScheme { code: InputCode::Fp8, per_head: true })] {
            let written = write_compressed_tensors(&groups, &["lm_head".into()], kv);
            assert_eq!(written["format"], "mixed-precision");
            let read = QuantConfig::parse(Path::new("config.json"), &written).unwrap();
            assert_eq!(read.kv, kv);
            for (i, g) in groups.iter().enumerate() {
                assert_eq!(read.scheme_of(&format!("model.layers.{i}")), Some(g.scheme), "{}", g.scheme.full_name());
            }
        }
        let one = write_compressed_tensors(&groups[4..5], &[], None);
        assert_eq!((one["format"].as_str(), one["kv_cache_scheme"].is_null()), (Some("int-quantized"), true));
    }
}
