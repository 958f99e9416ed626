//! The part of llm-compressor's recipes that has a counterpart here.

use std::sync::LazyLock;

use anyhow::{Result, bail};
use regex::Regex;
use serde_json::{Map, Value};

use super::Given;

/// How its writer spells an enumeration's member.
static MEMBER: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"!!python/object/apply:[\w.]*ActivationOrdering\s*\[\s*(\w+)\s*\]").ok());

/// Keys that change nothing of what is made.
const HARMLESS: [&str; 7] = [
    "bypass_divisibility_checks",
    "requires_calibration_data",
    "batched_quantization",
    "offload_hessians",
    "sequential_update",
    "sequential_targets",
    "block_size",
];

/// Modifiers that change the float model and quantize nothing themselves; AWQ does both where it has a scheme.
const TRANSFORMS: [&str; 3] = ["SmoothQuantModifier", "AWQModifier", "SpinQuantModifier"];

/// Reads a recipe: one modifier that quantizes, beside those that change the float model.
pub(super) fn read(text: &str) -> Result<Given> {
    let plain = match MEMBER.as_ref() {
        Some(member) => member.replace_all(text, "$1").into_owned(),
        None => text.to_string(),
    };
    let value: Value = match serde_saphyr::from_str(&plain) {
        Ok(v) => v,
        Err(e) => bail!("not valid YAML: {}", e.without_snippet().to_string().lines().next().unwrap_or_default()),
    };
    let mut modifiers = Vec::new();
    collect(&value, &mut modifiers);
    let (mut before, mut quantizers): (Vec<_>, Vec<_>) =
        modifiers.iter().partition(|m| TRANSFORMS.contains(&m.0.as_str()));
    if quantizers.is_empty() {
        // A map of modifiers has no order that counts: AWQ quantizes where nothing else does.
        let at = before.iter().position(|m| m.0 == "AWQModifier").unwrap_or(before.len().saturating_sub(1));
        quantizers.extend((at < before.len()).then(|| before.remove(at)));
    }
    let [(last, last_fields)] = quantizers.as_slice() else {
        if quantizers.is_empty() {
            bail!("no modifier found: expected GPTQModifier or QuantizationModifier");
        }
        let names: Vec<&str> = quantizers.iter().map(|m| m.0.as_str()).collect();
        bail!("{}: one modifier that quantizes is supported, beside {}", names.join(" and "), TRANSFORMS.join(", "));
    };
    let mut transforms = Vec::new();
    for (name, fields) in before {
        transforms.push(transform(name, fields_of(name, fields)?)?);
    }
    let mut out = quantizer(last, fields_of(last, last_fields)?, &mut transforms)?;
    if !transforms.is_empty() {
        out.push(("transform".into(), Some(transforms)));
    }
    Ok(out)
}

fn fields_of<'a>(name: &str, v: &'a Value) -> Result<&'a Map<String, Value>> {
    match v {
        Value::Object(fields) => Ok(fields),
        _ => bail!("{name}: expected a map of its fields"),
    }
}

/// A modifier that changes the float model.
fn transform(name: &str, fields: &Map<String, Value>) -> Result<String> {
    // Its own default; examples give 0.8.
    let mut strength = 0.5;
    let mut rotations = vec!["R1".to_string(), "R2".to_string()];
    for (key, value) in fields.iter().filter(|(_, v)| !v.is_null()) {
        match (name, key.as_str(), value) {
            ("SmoothQuantModifier", "smoothing_strength", v) if v.as_f64().is_some() => {
                strength = v.as_f64().unwrap_or(strength);
            }
            ("AWQModifier", key, v) if awq_as_here(key, v) => {}
            ("SpinQuantModifier", "rotations", v) if texts(v).is_some() => {
                rotations = texts(v).unwrap_or_default();
            }
            ("SpinQuantModifier", "transform_type", Value::String(t)) if t == "hadamard" || t == "random-hadamard" => {}
            ("SpinQuantModifier", "randomize" | "learnable", Value::Bool(false)) => {}
            (_, "ignore", v) if texts(v).is_some_and(|n| n.iter().all(|n| n == "lm_head")) => {}
            (_, "targets", v) if texts(v).as_deref() == Some(&["Linear".to_string()]) => {}
            (_, key, _) if HARMLESS.contains(&key) => {}
            (_, key, v) => bail!("{name}: `{key}: {v}` has no counterpart here"),
        }
    }
    Ok(match name {
        "SmoothQuantModifier" => format!("smoothquant={strength}"),
        "AWQModifier" => "awq".into(),
        _ => {
            rotations.sort();
            if rotations != ["R1", "R2"] {
                bail!(
                    "{name}: rotations {}: R1 and R2 are supported, the two that fold into weights",
                    rotations.join(", ")
                );
            }
            "rotate".into()
        }
    })
}

/// Fields of AWQModifier that ask for what is done here: the paper's scales, on its grid.
fn awq_as_here(key: &str, v: &Value) -> bool {
    match key {
        "duo_scaling" => v == &Value::Bool(false),
        "n_grid" => v.as_u64() == Some(20),
        "offload_device" => true,
        _ => false,
    }
}

/// The modifier that quantizes; AWQModifier adds itself to `transforms`.
fn quantizer(name: &str, fields: &Map<String, Value>, transforms: &mut Vec<String>) -> Result<Given> {
    if name != "AWQModifier" {
        return modifier(name, fields);
    }
    let (own, rest): (Vec<_>, Vec<_>) = fields
        .iter()
        .map(|(k, v)| (k.clone(), v.clone()))
        .partition(|(k, _)| ["duo_scaling", "n_grid", "offload_device", "mappings"].contains(&k.as_str()));
    transforms.push(transform(name, &own.into_iter().collect::<Map<_, _>>())?);
    modifier(name, &rest.into_iter().collect::<Map<_, _>>())
}

/// Modifiers stand in stages and lists of any depth, by names that end in `Modifier`.
fn collect(v: &Value, out: &mut Vec<(String, Value)>) {
    match v {
        Value::Object(map) => {
            for (k, v) in map {
                if k.ends_with("Modifier") { out.push((k.clone(), v.clone())) } else { collect(v, out) }
            }
        }
        Value::Array(items) => items.iter().for_each(|v| collect(v, out)),
        _ => {}
    }
}

fn modifier(name: &str, fields: &Map<String, Value>) -> Result<Given> {
    let mut out: Given = Vec::new();
    let mut set = |key: &str, value: String| out.push((key.to_string(), Some(vec![value])));
    match name {
        "GPTQModifier" => set("method", "gptq".into()),
        "QuantizationModifier" | "AWQModifier" => set("method", "rtn".into()),
        "SmoothQuantModifier" | "SpinQuantModifier" => {
            bail!("{name} quantizes nothing\nhint: add a GPTQModifier or a QuantizationModifier")
        }
        other => bail!(
            "{other} has no counterpart here\nhint: GPTQModifier and QuantizationModifier are read, alone or beside {}",
            TRANSFORMS.join(", ")
        ),
    }
    let mut act_order = None;
    let mut weights = None;
    for (key, value) in fields {
        match (key.as_str(), value) {
            (_, Value::Null) => {}
            ("targets", v) if texts(v).as_deref() == Some(&["Linear".to_string()]) => {}
            ("scheme", Value::String(s)) => weights = Some(preset(s)?),
            ("scheme", v) => bail!("{name}: scheme {v}: expected a preset's name"),
            ("config_groups", Value::Object(groups)) => {
                let (Some((group, v)), 1) = (groups.iter().next(), groups.len()) else {
                    bail!("{name}: config_groups: one group is supported, found {}", groups.len());
                };
                weights = Some(group_weights(name, group, v, &mut act_order)?);
            }
            ("ignore", v) => {
                let Some(names) = texts(v) else { bail!("{name}: ignore: expected a list of names") };
                // The head stays as it is unless it is asked for.
                let names: Vec<String> = names.into_iter().filter(|n| n != "lm_head").collect();
                if !names.is_empty() {
                    out.push(("ignore".into(), Some(names)));
                }
            }
            ("dampening_frac", Value::Number(n)) => out.push(("damp".into(), Some(vec![n.to_string()]))),
            ("actorder", Value::String(a)) => act_order = Some(a.clone()),
            (key, _) if HARMLESS.contains(&key) => {}
            (key, v) => bail!("{name}: `{key}: {v}` has no counterpart here"),
        }
    }
    match act_order.as_deref() {
        None | Some("none") => out.push(("no-act-order".into(), None)),
        Some("static" | "weight") => {}
        Some(other) => bail!("{name}: actorder {other}: static or weight is supported"),
    }
    let Some(weights) = weights else { bail!("{name}: neither `scheme` nor `config_groups`") };
    out.extend(weights);
    Ok(out)
}

fn texts(v: &Value) -> Option<Vec<String>> {
    match v {
        Value::String(s) => Some(vec![s.clone()]),
        Value::Array(items) => items.iter().map(|i| i.as_str().map(str::to_string)).collect(),
        _ => None,
    }
}

fn integers(bits: u64, group: String, symmetric: bool) -> Given {
    let mut out =
        vec![("scheme".to_string(), Some(vec![format!("w{bits}a16")])), ("group-size".to_string(), Some(vec![group]))];
    out.extend((!symmetric).then(|| ("asymmetric".to_string(), None)));
    out
}

/// Presets: groups of 128 for 4 bits, a scale a row for 8, from the extremes; schemes of floats and of quantized inputs as they are.
fn preset(name: &str) -> Result<Given> {
    let fixed = |scheme: &str| vec![("scheme".to_string(), Some(vec![scheme.to_string()]))];
    let mut out = match name.to_ascii_uppercase().as_str() {
        "W4A16" => integers(4, "128".into(), true),
        "W4A16_ASYM" => integers(4, "128".into(), false),
        "W8A16" => integers(8, "channel".into(), true),
        "W8A8" => fixed("w8a8"),
        "FP8" => fixed("fp8-static"),
        "FP8_DYNAMIC" => fixed("fp8-dynamic"),
        "FP8_BLOCK" => fixed("fp8-block"),
        "NVFP4A16" => fixed("nvfp4a16"),
        "NVFP4" => fixed("nvfp4"),
        _ => bail!(
            "scheme {name} has no counterpart here\nhint: W4A16, W4A16_ASYM, W8A16, W8A8, FP8, FP8_DYNAMIC, FP8_BLOCK, NVFP4A16 and NVFP4 are read"
        ),
    };
    out.push(("minmax-scales".into(), None));
    Ok(out)
}

fn group_weights(modifier: &str, group: &str, v: &Value, act_order: &mut Option<String>) -> Result<Given> {
    let place = format!("{modifier}: {group}");
    for key in ["input_activations", "output_activations"] {
        if v.get(key).is_some_and(|v| !v.is_null()) {
            bail!("{place}: {key} has no counterpart here");
        }
    }
    if v.get("targets").is_some_and(|t| texts(t).as_deref() != Some(&["Linear".to_string()])) {
        bail!("{place}: targets other than Linear have no counterpart here");
    }
    let Some(w) = v.get("weights").and_then(Value::as_object) else { bail!("{place}: no `weights`") };
    let field = |key: &str| w.get(key).filter(|v| !v.is_null());
    let text = |key: &str| field(key).and_then(Value::as_str);
    let Some(bits @ (2 | 3 | 4 | 8)) = field("num_bits").and_then(Value::as_u64) else {
        bail!("{place}: num_bits: 2, 3, 4 or 8 is supported");
    };
    if text("type").is_some_and(|t| t != "int") || field("dynamic").is_some_and(|d| d != &Value::Bool(false)) {
        bail!("{place}: weights other than static integers have no counterpart here");
    }
    let size = match (text("strategy"), field("group_size").and_then(Value::as_i64)) {
        (Some("channel"), None | Some(-1)) => "channel".to_string(),
        (Some("group") | None, Some(n)) if n > 0 => n.to_string(),
        (strategy, size) => bail!("{place}: strategy {strategy:?} with group_size {size:?} has no counterpart here"),
    };
    let mut out = integers(bits, size, field("symmetric").and_then(Value::as_bool).unwrap_or(true));
    match text("observer") {
        None | Some("minmax" | "memoryless_minmax" | "static_minmax") => out.push(("minmax-scales".into(), None)),
        Some("mse" | "memoryless_mse" | "imatrix_mse") => {}
        Some(other) => bail!("{place}: observer {other} has no counterpart here"),
    }
    if let Some(order) = text("actorder") {
        *act_order = Some(order.to_string());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(text: &str) -> String {
        let words = read(text).unwrap().into_iter().map(|(k, v)| match v {
            None => format!("--{k}"),
            Some(v) => format!("--{k} {}", v.join(",")),
        });
        words.collect::<Vec<_>>().join(" ")
    }

    const GROUPS: &str = "
default_stage:
  default_modifiers:
    GPTQModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: false, group_size: 64, strategy: group, dynamic: false,
            actorder: !!python/object/apply:compressed_tensors.quantization.quant_args.ActivationOrdering [
              static], observer: mse}
          input_activations: null
      ignore: [lm_head, 're:.*mlp.*']
      dampening_frac: 0.02
";

    #[test]
    fn modifiers_become_options() {
        assert_eq!(
            flags(
                "quant_stage:\n  quant_modifiers:\n    QuantizationModifier: {targets: Linear, scheme: W8A16, ignore: [lm_head]}\n"
            ),
            "--method rtn --no-act-order --scheme w8a16 --group-size channel --minmax-scales"
        );
        assert_eq!(
            flags("s:\n  m:\n    QuantizationModifier: {targets: Linear, scheme: FP8_DYNAMIC}\n"),
            "--method rtn --no-act-order --scheme fp8-dynamic --minmax-scales"
        );
        assert_eq!(
            flags(GROUPS),
            "--method gptq --ignore re:.*mlp.* --damp 0.02 --scheme w4a16 --group-size 64 --asymmetric"
        );
    }

    #[test]
    fn modifiers_that_change_the_float_model_become_transforms() {
        let list = |items: &[&str]| {
            let lines: String = items.iter().map(|i| format!("    - {i}\n")).collect();
            format!("s:\n  m:\n{lines}")
        };
        let w8a8 = "GPTQModifier: {scheme: W8A8, ignore: [lm_head]}";
        assert_eq!(
            flags(&list(&["SmoothQuantModifier: {smoothing_strength: 0.8, mappings: null}", w8a8])),
            "--method gptq --no-act-order --scheme w8a8 --minmax-scales --transform smoothquant=0.8"
        );
        assert_eq!(
            flags(&list(&[
                "AWQModifier: {scheme: W4A16_ASYM, targets: [Linear], ignore: [lm_head], duo_scaling: false}"
            ])),
            "--method rtn --no-act-order --scheme w4a16 --group-size 128 --asymmetric --minmax-scales --transform awq"
        );
        assert_eq!(
            flags(&list(&[
                "SpinQuantModifier: {rotations: [R2, R1], transform_type: hadamard}",
                "AWQModifier: {}",
                w8a8
            ])),
            "--method gptq --no-act-order --scheme w8a8 --minmax-scales --transform rotate,awq"
        );
        for (text, why) in [
            (
                list(&[w8a8, "QuantizationModifier: {scheme: W8A8}"]),
                "GPTQModifier and QuantizationModifier: one modifier that quantizes",
            ),
            (list(&["SpinQuantModifier: {rotations: [R1, R2, R4]}", w8a8]), "rotations R1, R2, R4"),
            (list(&["AWQModifier: {scheme: W4A16, duo_scaling: true}"]), "duo_scaling"),
            (list(&["AWQModifier: {scheme: W4A16, mappings: [1]}"]), "mappings"),
            (list(&["SmoothQuantModifier: {mappings: [1]}", w8a8]), "mappings"),
            (list(&["QuIPModifier: {}", w8a8]), "QuIPModifier"),
        ] {
            let error = format!("{:#}", read(&text).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn what_has_no_counterpart_is_named() {
        let one = |m: &str, fields: &str| format!("s:\n  m:\n    - {m}: {{{fields}}}\n");
        for (text, why) in [
            (one("AutoRoundModifier", "scheme: W4A16"), "AutoRoundModifier has no counterpart"),
            (one("AWQModifier", "n_grid: 20"), "AWQModifier: neither `scheme`"),
            (one("SmoothQuantModifier", "smoothing_strength: 0.8"), "SmoothQuantModifier quantizes nothing"),
            (one("QuantizationModifier", "scheme: W4A8"), "scheme W4A8"),
            (one("QuantizationModifier", "kv_cache_scheme: {num_bits: 8}, scheme: W4A16"), "kv_cache_scheme"),
            (one("GPTQModifier", "scheme: W4A16, actorder: group"), "actorder group"),
            (one("GPTQModifier", "targets: ['re:.*q_proj'], scheme: W4A16"), "targets"),
            (one("GPTQModifier", ""), "neither `scheme`"),
            (GROUPS.replace("num_bits: 4", "num_bits: 5"), "num_bits"),
            (GROUPS.replace("input_activations: null", "input_activations: {num_bits: 8}"), "input_activations"),
            ("a: [b".into(), "not valid YAML"),
            ("a: b".into(), "no modifier"),
        ] {
            let error = format!("{:#}", read(&text).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }
}
