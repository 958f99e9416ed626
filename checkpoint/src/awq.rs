//! AWQ checkpoints, version GEMM: 4-bit codes packed along `out`, a zero point for every group.
//!
//! A linear `[out, in]` is `qweight` i32 `[in, out/8]`, `qzeros` i32 `[groups, out/8]` and `scales` f16 `[groups, out]`. The
//! format knows no symmetric scheme: one is written with zero point 8 everywhere, and read back from that.

use std::path::Path;

use lowbit_kernels::backend::{Bytes, PackedWeight};
use lowbit_kernels::{KernelError, QuantizedMatrix, ScaleType, Scheme, pack};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::error::Result;
use crate::linear::{finite, kernel_error, transpose, words_of};
use crate::quant_config::{
    Layout, PackFormat, QuantConfig, QuantGroup, Target, parse_group_size, refused, written_group_size,
};
use crate::store::TensorStore;
use crate::writer::Declared;

/// Parses the object found in `config.json` (or `quantize_config.json`). Names of keys differ between writers: AutoAWQ's own
/// file has `w_bit` and `q_group_size`.
pub(crate) fn parse(path: &Path, q: &Value) -> Result<QuantConfig> {
    let bits = q.get("bits").or_else(|| q.get("w_bit")).and_then(Value::as_u64).unwrap_or(0);
    if bits != 4 {
        return Err(refused(path, &format!("AWQ with {bits} bits")));
    }
    let version = q.get("version").or_else(|| q.get("format")).and_then(Value::as_str).unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(refused(path, &format!("AWQ version `{version}`")));
    }
    let named = match q.get("group_size") {
        Some(_) => q.clone(),
        None => json!({"group_size": q.get("q_group_size")}),
    };
    let group = parse_group_size(path, &named)?;
    let symmetric = q.get("zero_point").and_then(Value::as_bool) == Some(false);
    let scheme = Scheme { bits: 4, symmetric, group };
    let names = q.get("modules_to_not_convert").and_then(Value::as_array).into_iter().flatten();
    Ok(QuantConfig {
        format: PackFormat::Awq,
        groups: vec![QuantGroup { targets: vec![Target::Linear], scheme: scheme.into() }],
        ignore: names.filter_map(Value::as_str).map(String::from).collect(),
        kv: None,
    })
}

/// The `quantization_config` of an AWQ checkpoint. `zero_point` is true for symmetric schemes, too: engines read `qzeros`.
pub(crate) fn write_config(scheme: Scheme, lm_head: bool, ignore: &[String]) -> Value {
    let mut left: Vec<&str> = ignore.iter().map(String::as_str).collect();
    if !lm_head && !left.contains(&"lm_head") {
        left.push("lm_head");
    }
    json!({
        "bits": scheme.bits, "group_size": written_group_size(scheme), "modules_to_not_convert": left,
        "quant_method": "awq", "version": "gemm", "zero_point": true,
    })
}

pub(crate) fn read(
    store: &TensorStore,
    module: &str,
    mut scheme: Scheme,
    out: usize,
    n: usize,
) -> Result<PackedWeight> {
    let (wname, zname, sname) = (format!("{module}.qweight"), format!("{module}.qzeros"), format!("{module}.scales"));
    let groups = scheme.groups(n).map_err(kernel_error(store, &wname))?;
    let words = words_of(store, &wname, [n, out / 8])?;
    let by_column = pack::unpack_rows_awq(&words, n, out).map_err(kernel_error(store, &wname))?;
    let codes = transpose(&by_column, n, out);
    let packed = pack::pack_rows(&codes, out, n, 4).map_err(kernel_error(store, &wname))?;
    let scales = transpose(&store.vector(&sname, groups * out)?, groups, out);
    finite(store, &sname, &scales)?;
    let zero_words = words_of(store, &zname, [groups, out / 8])?;
    let zeros = pack::unpack_rows_awq(&zero_words, groups, out).map_err(kernel_error(store, &zname))?;
    match zeros.iter().find(|z| **z != scheme.mid_code()) {
        Some(z) if scheme.symmetric => {
            return Err(store.mismatch(&zname, "zero point 8, since `zero_point` is false".into(), z.to_string()));
        }
        found => scheme.symmetric = found.is_none(),
    }
    Ok(PackedWeight {
        scheme,
        out_features: out,
        in_features: n,
        words: Bytes::from_vec(packed.iter().flat_map(|w| w.to_le_bytes()).collect()),
        scales,
        zeros: (!scheme.symmetric).then(|| transpose(&zeros, groups, out)),
        group_index: None,
    })
}

/// Whether the format can hold a linear: 4 bits, and whole words of eight rows.
pub(crate) fn holds(scheme: Scheme, out: usize) -> bool {
    scheme.bits == 4 && out.is_multiple_of(8)
}

fn check(scheme: Scheme, out: usize) -> lowbit_kernels::Result<()> {
    match holds(scheme, out) {
        true => Ok(()),
        false => Err(KernelError::Unsupported {
            backend: "AWQ GEMM",
            op: "the scheme",
            why: format!("{} with {out} rows: it holds 4 bits and a multiple of 8 rows", scheme.full_name()),
        }),
    }
}

pub(crate) fn declare(module: &str, scheme: Scheme, out: usize, n: usize) -> lowbit_kernels::Result<Vec<Declared>> {
    check(scheme, out)?;
    let groups = scheme.groups(n)?;
    let t = |suffix: &str, dtype, shape: Vec<usize>| Declared { name: format!("{module}.{suffix}"), dtype, shape };
    Ok(vec![
        t("qweight", Dtype::I32, vec![n, out / 8]),
        t("qzeros", Dtype::I32, vec![groups, out / 8]),
        t("scales", Dtype::F16, vec![groups, out]),
    ])
}

/// The bytes of each tensor [`declare`] lists. A column order (`g_idx`) has no place in the format; callers refuse it.
pub(crate) fn encode(q: &QuantizedMatrix) -> lowbit_kernels::Result<Vec<Vec<u8>>> {
    let (out, n) = (q.out_features, q.in_features);
    check(q.scheme, out)?;
    let groups = q.scheme.groups(n)?;
    let mid = vec![q.scheme.mid_code(); out * groups];
    let zeros = q.zeros.as_ref().unwrap_or(&mid);
    let layout = Layout { format: PackFormat::Awq, scales: ScaleType::F16 };
    let le = |w: Vec<u32>| -> Vec<u8> { w.iter().flat_map(|w| w.to_le_bytes()).collect() };
    Ok(vec![
        le(pack::pack_rows_awq(&transpose(&q.codes, out, n), n, out)?),
        le(pack::pack_rows_awq(&transpose(zeros, out, groups), groups, out)?),
        layout.scale_bytes(transpose(&q.scales, out, groups).into_iter()),
    ])
}
