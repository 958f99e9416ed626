//! One linear between its tensors on disk and a [`HostWeight`] / [`QuantizedMatrix`].

pub mod narrow;

use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{Bytes, HostWeight, PackedWeight};
use lowbit_kernels::pack;
use lowbit_kernels::{KernelError, LinearScheme, QuantizedMatrix, QuantizedWeight, Scheme};
use safetensors::Dtype;

use crate::awq;
use crate::error::{CheckpointError, Result};
use crate::quant_config::{Layout, PackFormat, QuantConfig};
use crate::store::{StoredTensor, TensorStore};
use crate::writer::Declared;

/// Reads the weight of `module` (`model.layers.0.self_attn.q_proj`), dense or packed, with the shape the config asks for.
pub fn read(
    store: &TensorStore,
    quant: Option<&QuantConfig>,
    module: &str,
    out_features: usize,
    in_features: usize,
) -> Result<HostWeight> {
    let dense = format!("{module}.weight");
    if let Some(t) = store.find(&dense).filter(|t| !is_narrow(t)) {
        return read_dense(store, &dense, t, out_features, in_features);
    }
    let first = if store.find(&format!("{module}.qweight")).is_some() { "qweight" } else { "weight_packed" };
    let codes = store.find(&dense).or_else(|| store.find(&format!("{module}.{first}")));
    let Some(codes) = codes else {
        return Err(CheckpointError::MissingTensor { dir: store.dir().to_path_buf(), tensor: dense });
    };
    let unknown =
        |found: &str| store.mismatch(&dense, "a quantization_config that covers this module".into(), found.into());
    let quant = quant.ok_or_else(|| unknown("packed tensors and no quantization_config"))?;
    let scheme = quant.scheme_of(module).ok_or_else(|| unknown("no rule for it"))?;
    let Some(int) = scheme.int().filter(|_| codes.dtype == Dtype::I32) else {
        return narrow::read(store, module, scheme, out_features, in_features);
    };
    let packed = match quant.format {
        PackFormat::CompressedTensors => read_compressed_tensors(store, module, int, out_features, in_features)?,
        PackFormat::Awq => awq::read(store, module, int, out_features, in_features)?,
        v => read_gptq(store, module, int, v, out_features, in_features)?,
    };
    Ok(HostWeight::Packed(packed))
}

/// Whether a `weight` holds codes of a byte or less.
fn is_narrow(t: &StoredTensor) -> bool {
    matches!(t.dtype, Dtype::I8 | Dtype::U8 | Dtype::F8_E4M3)
}

/// How the input of `module` is rounded before the product; `None` where its weight is dense or the config leaves inputs alone.
pub fn read_input_rule(store: &TensorStore, quant: Option<&QuantConfig>, module: &str) -> Result<Option<InputRule>> {
    let Some(format) = quant.and_then(|q| q.scheme_of(module)).and_then(|s| s.input) else { return Ok(None) };
    match store.find(&format!("{module}.weight")) {
        Some(t) if !is_narrow(t) => Ok(None),
        _ => narrow::input_rule(store, module, format).map(Some),
    }
}

fn read_dense(
    store: &TensorStore,
    name: &str,
    t: &StoredTensor,
    out_features: usize,
    in_features: usize,
) -> Result<HostWeight> {
    if t.shape != [out_features, in_features] {
        return Err(store.mismatch(name, format!("shape [{out_features}, {in_features}]"), format!("{:?}", t.shape)));
    }
    let dtype =
        t.float_type().ok_or_else(|| store.mismatch(name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)))?;
    Ok(HostWeight::Dense { dtype, out_features, in_features, data: t.data.clone() })
}

pub(crate) fn kernel_error<'a>(
    store: &'a TensorStore,
    tensor: &'a str,
) -> impl Fn(lowbit_kernels::KernelError) -> CheckpointError + 'a {
    move |source| CheckpointError::Kernel { dir: store.dir().to_path_buf(), tensor: tensor.to_string(), source }
}

pub(crate) fn words_of(store: &TensorStore, name: &str, shape: [usize; 2]) -> Result<Vec<u32>> {
    let t = typed(store, name, Dtype::I32, &shape)?;
    Ok(t.data.as_slice().as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect())
}

pub(crate) fn typed<'a>(store: &'a TensorStore, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&'a StoredTensor> {
    let t = store.get(name)?;
    if t.dtype != dtype || t.shape != shape {
        return Err(store.mismatch(name, format!("{dtype:?} {shape:?}"), format!("{:?} {:?}", t.dtype, t.shape)));
    }
    Ok(t)
}

fn read_compressed_tensors(
    store: &TensorStore,
    module: &str,
    scheme: Scheme,
    out: usize,
    n: usize,
) -> Result<PackedWeight> {
    let name = format!("{module}.weight_packed");
    let groups = scheme.groups(n).map_err(kernel_error(store, &name))?;
    let padded = is_padded(store, &name, scheme, out, n)?;
    let words = if padded {
        let words = words_of(store, &name, [out, pack::padded_words_for(n, scheme.bits)])?;
        let codes = pack::unpack_rows_padded(&words, out, n, scheme.bits).map_err(kernel_error(store, &name))?;
        let dense = pack::pack_rows(&codes, out, n, scheme.bits).map_err(kernel_error(store, &name))?;
        Bytes::from_vec(dense.iter().flat_map(|w| w.to_le_bytes()).collect())
    } else {
        typed(store, &name, Dtype::I32, &[out, pack::words_for(n, scheme.bits)])?.data.clone()
    };
    let shape_name = format!("{module}.weight_shape");
    if let Some(t) = store.find(&shape_name) {
        let dims: Vec<i64> = t.data.as_slice().as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c)).collect();
        if t.dtype == Dtype::I64 && dims != [out as i64, n as i64] {
            return Err(store.mismatch(&shape_name, format!("[{out}, {n}]"), format!("{dims:?}")));
        }
    }
    let scale_name = format!("{module}.weight_scale");
    let s = store.get(&scale_name)?;
    if s.shape != [out, groups] {
        return Err(store.mismatch(&scale_name, format!("shape [{out}, {groups}]"), format!("{:?}", s.shape)));
    }
    let scales = store.vector(&scale_name, out * groups)?;
    finite(store, &scale_name, &scales)?;
    let zeros = if scheme.symmetric {
        None
    } else {
        let zname = format!("{module}.weight_zero_point");
        let rows = if padded { pack::padded_words_for(out, scheme.bits) } else { pack::words_for(out, scheme.bits) };
        let words = words_of(store, &zname, [rows, groups])?;
        let unpack = if padded { pack::unpack_columns_padded } else { pack::unpack_columns };
        Some(unpack(&words, out, groups, scheme.bits).map_err(kernel_error(store, &zname))?)
    };
    let group_index = read_group_index(store, module, "weight_g_idx", scheme, n, groups)?;
    Ok(PackedWeight { scheme, out_features: out, in_features: n, words, scales, zeros, group_index })
}

/// Whether a `weight_packed` has `floor(32 / bits)` codes a word, as writers until late 2025 made it for widths that do not
/// divide 32. Its shape tells; where both ways need the same number of words, a set top bit does, and without one the tensor
/// is refused.
fn is_padded(store: &TensorStore, name: &str, scheme: Scheme, out: usize, n: usize) -> Result<bool> {
    let (dense, padded) = (pack::words_for(n, scheme.bits), pack::padded_words_for(n, scheme.bits));
    let used = 32 / u32::from(scheme.bits) * u32::from(scheme.bits);
    if used == 32 || padded == 1 {
        return Ok(false);
    }
    if dense != padded {
        return Ok(store.get(name)?.shape == [out, padded]);
    }
    // An empty top in every word is one chance in 4^words under the dense packing.
    match words_of(store, name, [out, dense])?.iter().any(|w| w >> used != 0) {
        true => Ok(false),
        false => Err(store.mismatch(
            name,
            format!("{}-bit codes in one dense stream", scheme.bits),
            format!(
                "words that may be that or the packing of {} codes a word, which writers until late 2025 used",
                32 / scheme.bits
            ),
        )),
    }
}

fn read_group_index(
    store: &TensorStore,
    module: &str,
    suffix: &str,
    scheme: Scheme,
    n: usize,
    groups: usize,
) -> Result<Option<Vec<u32>>> {
    let name = format!("{module}.{suffix}");
    if store.find(&name).is_none() {
        return Ok(None);
    }
    let t = typed(store, &name, Dtype::I32, &[n])?;
    let index: Vec<i32> = t.data.as_slice().as_chunks::<4>().0.iter().map(|c| i32::from_le_bytes(*c)).collect();
    if let Some(bad) = index.iter().find(|g| **g < 0 || **g as usize >= groups) {
        return Err(store.mismatch(&name, format!("groups 0..{groups}"), bad.to_string()));
    }
    let cols = scheme.group_cols(n);
    let in_order = index.iter().enumerate().all(|(i, g)| *g as usize == i / cols);
    Ok((!in_order).then(|| index.into_iter().map(|g| g as u32).collect()))
}

fn read_gptq(
    store: &TensorStore,
    module: &str,
    scheme: Scheme,
    format: PackFormat,
    out: usize,
    n: usize,
) -> Result<PackedWeight> {
    let (wname, zname, sname) = (format!("{module}.qweight"), format!("{module}.qzeros"), format!("{module}.scales"));
    let groups = scheme.groups(n).map_err(kernel_error(store, &wname))?;
    let bits = scheme.bits;
    let words = words_of(store, &wname, [pack::words_for(n, bits), out])?;
    let by_column = pack::unpack_columns(&words, n, out, bits).map_err(kernel_error(store, &wname))?;
    let codes = transpose(&by_column, n, out);
    let packed = pack::pack_rows(&codes, out, n, bits).map_err(kernel_error(store, &wname))?;
    let scales = transpose(&store.vector(&sname, groups * out)?, groups, out);
    finite(store, &sname, &scales)?;
    let zero_words = words_of(store, &zname, [groups, pack::words_for(out, bits)])?;
    let stored = pack::unpack_rows(&zero_words, groups, out, bits).map_err(kernel_error(store, &zname))?;
    let mask = scheme.max_code();
    let shift = u8::from(format == PackFormat::GptqV1);
    let zeros: Vec<u8> = transpose(&stored, groups, out).into_iter().map(|z| z.wrapping_add(shift) & mask).collect();
    let zeros = if scheme.symmetric {
        // A label that disagrees with the one constant symmetric zero points can have means v1 and v2 were mixed up.
        if let Some(z) = zeros.iter().find(|z| **z != scheme.mid_code()) {
            let expected = format!("the symmetric zero point {} of format `{}`", scheme.mid_code(), format.name());
            return Err(store.mismatch(
                &zname,
                expected,
                format!("{z}: the checkpoint may carry the other GPTQ version's label"),
            ));
        }
        None
    } else {
        Some(zeros)
    };
    let group_index = read_group_index(store, module, "g_idx", scheme, n, groups)?;
    let bytes = packed.iter().flat_map(|w| w.to_le_bytes()).collect();
    Ok(PackedWeight {
        scheme,
        out_features: out,
        in_features: n,
        words: Bytes::from_vec(bytes),
        scales,
        zeros,
        group_index,
    })
}

pub(crate) fn finite(store: &TensorStore, name: &str, scales: &[f32]) -> Result<()> {
    match scales.iter().position(|s| !s.is_finite()) {
        Some(i) => Err(store.mismatch(name, "finite scales".into(), format!("{} at {i}", scales[i]))),
        None => Ok(()),
    }
}

pub(crate) fn transpose<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(x.len());
    for c in 0..cols {
        out.extend((0..rows).map(|r| x[r * cols + c]));
    }
    out
}

/// Unpacks to codes for verification and conversion.
pub fn unpack(p: &PackedWeight) -> lowbit_kernels::Result<QuantizedMatrix> {
    let words: Vec<u32> = p.words.as_slice().as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect();
    let q = QuantizedMatrix {
        scheme: p.scheme,
        out_features: p.out_features,
        in_features: p.in_features,
        codes: pack::unpack_rows(&words, p.out_features, p.in_features, p.scheme.bits)?,
        scales: p.scales.clone(),
        zeros: p.zeros.clone(),
        group_index: p.group_index.clone(),
    };
    q.validate()?;
    Ok(q)
}

/// For upload.
pub fn host_weight(w: &QuantizedWeight) -> lowbit_kernels::Result<HostWeight> {
    Ok(match w {
        QuantizedWeight::Int(m) => HostWeight::Packed(pack_matrix(m)?),
        QuantizedWeight::Float(f) => HostWeight::Float(f.clone()),
    })
}

/// Packs for upload, as compressed-tensors does.
pub fn pack_matrix(q: &QuantizedMatrix) -> lowbit_kernels::Result<PackedWeight> {
    q.validate()?;
    let words = pack::pack_rows(&q.codes, q.out_features, q.in_features, q.scheme.bits)?;
    Ok(PackedWeight {
        scheme: q.scheme,
        out_features: q.out_features,
        in_features: q.in_features,
        words: Bytes::from_vec(words.iter().flat_map(|w| w.to_le_bytes()).collect()),
        scales: q.scales.clone(),
        zeros: q.zeros.clone(),
        group_index: q.group_index.clone(),
    })
}

/// Names, dtypes and shapes that `module` will have on disk in `format`, in writing order.
pub fn declare(
    module: &str,
    scheme: impl Into<LinearScheme>,
    layout: Layout,
    out: usize,
    n: usize,
) -> lowbit_kernels::Result<Vec<Declared>> {
    let whole: LinearScheme = scheme.into();
    let Some(scheme) = narrow::packed(whole) else { return narrow::declare(module, whole, layout, out, n) };
    let groups = scheme.groups(n)?;
    let t = |suffix: &str, dtype, shape: Vec<usize>| Declared { name: format!("{module}.{suffix}"), dtype, shape };
    Ok(match layout.format {
        PackFormat::CompressedTensors => {
            let mut v = vec![
                t("weight_packed", Dtype::I32, vec![out, pack::words_for(n, scheme.bits)]),
                t("weight_scale", layout.scale_dtype(), vec![out, groups]),
                t("weight_shape", Dtype::I64, vec![2]),
            ];
            if !scheme.symmetric {
                v.push(t("weight_zero_point", Dtype::I32, vec![pack::words_for(out, scheme.bits), groups]));
            }
            v
        }
        PackFormat::Awq => awq::declare(module, scheme, out, n)?,
        _ => vec![
            t("qweight", Dtype::I32, vec![pack::words_for(n, scheme.bits), out]),
            t("qzeros", Dtype::I32, vec![groups, pack::words_for(out, scheme.bits)]),
            t("scales", layout.scale_dtype(), vec![groups, out]),
            t("g_idx", Dtype::I32, vec![n]),
        ],
    })
}

/// The bytes of each tensor [`declare`] lists, in the same order. `input` is the rule of the linear's input, where it is quantized.
pub fn encode_weight(
    w: &QuantizedWeight,
    scheme: LinearScheme,
    input: Option<&InputRule>,
    layout: Layout,
) -> lowbit_kernels::Result<Vec<Vec<u8>>> {
    match (w, narrow::packed(scheme)) {
        (QuantizedWeight::Int(m), Some(_)) => encode(m, layout),
        _ => narrow::encode(w, input, layout),
    }
}

/// [`encode_weight`] of packed integers whose input is left alone.
pub fn encode(q: &QuantizedMatrix, layout: Layout) -> lowbit_kernels::Result<Vec<Vec<u8>>> {
    q.validate()?;
    let (out, n, bits) = (q.out_features, q.in_features, q.scheme.bits);
    let groups = q.scheme.groups(n)?;
    let le = |w: Vec<u32>| -> Vec<u8> {
        let mut bytes = vec![0u8; 4 * w.len()];
        bytes.as_chunks_mut::<4>().0.iter_mut().zip(&w).for_each(|(b, w)| *b = w.to_le_bytes());
        bytes
    };
    match layout.format {
        PackFormat::CompressedTensors => {
            let mut v = vec![
                le(pack::pack_rows(&q.codes, out, n, bits)?),
                layout.scale_bytes(q.scales.iter().copied()),
                [out as i64, n as i64].iter().flat_map(|d| d.to_le_bytes()).collect(),
            ];
            if let Some(z) = &q.zeros {
                v.push(le(pack::pack_columns(z, out, groups, bits)?));
            }
            Ok(v)
        }
        PackFormat::Awq => awq::encode(q),
        _ => {
            let mid = vec![q.scheme.mid_code(); out * groups];
            let zeros = q.zeros.as_ref().unwrap_or(&mid);
            let shift = u8::from(layout.format == PackFormat::GptqV1);
            if shift == 1
                && let Some(i) = zeros.iter().position(|z| *z == 0)
            {
                // Stored as zero − 1 it would wrap; other engines add 1 without wrapping back.
                return Err(KernelError::ZeroPoint { row: i / groups, group: i % groups, format: "GPTQ v1" });
            }
            let stored: Vec<u8> = transpose(zeros, out, groups).into_iter().map(|z| z - shift).collect();
            let cols = q.scheme.group_cols(n);
            Ok(vec![
                le(pack::pack_columns(&transpose(&q.codes, out, n), n, out, bits)?),
                le(pack::pack_rows(&stored, groups, out, bits)?),
                layout.scale_bytes(transpose(&q.scales, out, groups).into_iter()),
                (0..n).flat_map(|i| ((i / cols) as i32).to_le_bytes()).collect(),
            ])
        }
    }
}
