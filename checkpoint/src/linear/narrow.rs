//! Weights of one byte or half a byte a value: int8, E4M3 and E2M1 matrices and their scales, and the rules of quantized inputs.

use lowbit_kernels::activation::{InputCode, InputRule, InputScale};
use lowbit_kernels::backend::{Bytes, HostWeight, PackedWeight};
use lowbit_kernels::floats::{FloatCode, FloatScales, FloatWeight, MXFP4_GROUP, NVFP4_GROUP};
use lowbit_kernels::{Fp8Scale, InputFormat, KernelError, LinearScheme, QuantizedWeight, Scheme, WeightFormat, pack};
use safetensors::Dtype;

use super::{finite, kernel_error, typed};
use crate::error::Result;
use crate::quant_config::{KvScheme, Layout};
use crate::store::TensorStore;
use crate::writer::Declared;

/// Reads the quantized weight of `module` where the config says `scheme` and the tensors are not packed words.
pub(super) fn read(
    store: &TensorStore,
    module: &str,
    scheme: LinearScheme,
    out: usize,
    n: usize,
) -> Result<HostWeight> {
    let (weight, packed) = (format!("{module}.weight"), format!("{module}.weight_packed"));
    let float = match scheme.weight {
        WeightFormat::Int(s) => return read_int8(store, module, s, out, n).map(HostWeight::Packed),
        WeightFormat::Fp8(scale) => {
            let codes = typed(store, &weight, Dtype::F8_E4M3, &[out, n])?.data.clone();
            let scales = fp8_scales(store, module, scale, out, n)?;
            FloatWeight { code: FloatCode::E4m3, out_features: out, in_features: n, codes, scales }
        }
        WeightFormat::Nvfp4 | WeightFormat::Mxfp4 => {
            // Model-Optimizer keeps the plain name.
            let name = if store.find(&packed).is_some() { &packed } else { &weight };
            let codes = typed(store, name, Dtype::U8, &[out, n / 2])?.data.clone();
            let scales = fp4_scales(store, module, scheme.weight, out, n)?;
            FloatWeight { code: FloatCode::E2m1, out_features: out, in_features: n, codes, scales }
        }
    };
    float.validate().map_err(kernel_error(store, &weight))?;
    Ok(HostWeight::Float(float))
}

/// Values of one or more elements, whatever their float type and shape.
fn floats(store: &TensorStore, name: &str, shapes: &[Vec<usize>]) -> Result<Vec<f32>> {
    let t = store.get(name)?;
    if !shapes.contains(&t.shape) {
        return Err(store.mismatch(name, format!("shape {:?}", shapes[0]), format!("{:?}", t.shape)));
    }
    let values = store.vector(name, t.shape.iter().product())?;
    finite(store, name, &values)?;
    Ok(values)
}

/// One number: shape `[1]` or none.
fn number(store: &TensorStore, name: &str) -> Result<f32> {
    Ok(floats(store, name, &[vec![1], vec![]])?.first().copied().unwrap_or(f32::NAN))
}

fn positive(store: &TensorStore, name: &str) -> Result<f32> {
    let v = number(store, name)?;
    if v > 0.0 { Ok(v) } else { Err(store.mismatch(name, "a positive scale".into(), v.to_string())) }
}

fn fp8_scales(store: &TensorStore, module: &str, scale: Fp8Scale, out: usize, n: usize) -> Result<FloatScales> {
    // DeepSeek's name; the value is a multiplier there, too.
    let inverse = format!("{module}.weight_scale_inv");
    let name = if store.find(&inverse).is_some() { inverse } else { format!("{module}.weight_scale") };
    let (rows, cols, shapes) = match scale {
        Fp8Scale::Tensor => (out.max(1), n.max(1), vec![vec![1], vec![], vec![1, 1]]),
        Fp8Scale::Channel => (1, n.max(1), vec![vec![out, 1], vec![out]]),
        Fp8Scale::Block(r, c) => (r, c, vec![vec![out.div_ceil(r), n.div_ceil(c)]]),
    };
    Ok(FloatScales::Blocks { values: floats(store, &name, &shapes)?, rows, cols })
}

fn fp4_scales(store: &TensorStore, module: &str, format: WeightFormat, out: usize, n: usize) -> Result<FloatScales> {
    let name = format!("{module}.weight_scale");
    if format == WeightFormat::Mxfp4 {
        let codes = typed(store, &name, Dtype::U8, &[out, n / MXFP4_GROUP])?.data.clone();
        return Ok(FloatScales::Exponents { codes });
    }
    let codes = typed(store, &name, Dtype::F8_E4M3, &[out, n / NVFP4_GROUP])?.data.clone();
    let reciprocal = format!("{module}.weight_scale_2");
    let global = match store.find(&reciprocal) {
        Some(_) => 1.0 / positive(store, &reciprocal)?,
        None => positive(store, &format!("{module}.weight_global_scale"))?,
    };
    Ok(FloatScales::Local { codes, global })
}

/// An int8 matrix as packed codes of eight bits: the zero point moves by 128.
fn read_int8(store: &TensorStore, module: &str, scheme: Scheme, out: usize, n: usize) -> Result<PackedWeight> {
    let name = format!("{module}.weight");
    if scheme.bits != 8 {
        return Err(store.mismatch(&name, "8-bit codes in an int8 matrix".into(), format!("{} bits", scheme.bits)));
    }
    let groups = scheme.groups(n).map_err(kernel_error(store, &name))?;
    let unsigned = |name: &str, shape: &[usize]| -> Result<Vec<u8>> {
        Ok(typed(store, name, Dtype::I8, shape)?.data.as_slice().iter().map(|c| c ^ 0x80).collect())
    };
    let codes = unsigned(&name, &[out, n])?;
    let words = pack::pack_rows(&codes, out, n, 8).map_err(kernel_error(store, &name))?;
    let mut scales =
        floats(store, &format!("{module}.weight_scale"), &[vec![out, groups], vec![out], vec![1], vec![]])?;
    if scales.len() == 1 {
        scales = vec![scales[0]; out * groups];
    }
    let zeros =
        if scheme.symmetric { None } else { Some(unsigned(&format!("{module}.weight_zero_point"), &[out, groups])?) };
    Ok(PackedWeight {
        scheme,
        out_features: out,
        in_features: n,
        words: Bytes::from_vec(words.iter().flat_map(|w| w.to_le_bytes()).collect()),
        scales,
        zeros,
        group_index: None,
    })
}

/// The scheme of weights that are packed into words: integers whose input is left alone. Everything else is written here.
pub(super) fn packed(scheme: LinearScheme) -> Option<Scheme> {
    scheme.int().filter(|_| scheme.input.is_none())
}

/// Names, dtypes and shapes, in the order of [`encode`].
pub(super) fn declare(
    module: &str,
    scheme: LinearScheme,
    layout: Layout,
    out: usize,
    n: usize,
) -> lowbit_kernels::Result<Vec<Declared>> {
    scheme.check_width(n)?;
    let t = |suffix: &str, dtype, shape: Vec<usize>| Declared { name: format!("{module}.{suffix}"), dtype, shape };
    let scale = layout.scale_dtype();
    let mut v = match scheme.weight {
        WeightFormat::Int(s) if s.bits == 8 && s.symmetric => {
            vec![t("weight", Dtype::I8, vec![out, n]), t("weight_scale", scale, vec![out, s.groups(n)?])]
        }
        WeightFormat::Int(s) => {
            let why = format!("{} weights beside quantized inputs", s.full_name());
            return Err(KernelError::Unsupported { backend: "int-quantized", op: "writing", why });
        }
        WeightFormat::Fp8(by) => {
            let shape = match by {
                Fp8Scale::Tensor => vec![1],
                Fp8Scale::Channel => vec![out, 1],
                Fp8Scale::Block(r, c) => vec![out.div_ceil(r), n.div_ceil(c)],
            };
            vec![t("weight", Dtype::F8_E4M3, vec![out, n]), t("weight_scale", scale, shape)]
        }
        WeightFormat::Nvfp4 => vec![
            t("weight_packed", Dtype::U8, vec![out, n / 2]),
            t("weight_scale", Dtype::F8_E4M3, vec![out, n / NVFP4_GROUP]),
            t("weight_global_scale", Dtype::F32, vec![1]),
        ],
        WeightFormat::Mxfp4 => vec![
            t("weight_packed", Dtype::U8, vec![out, n / 2]),
            t("weight_scale", Dtype::U8, vec![out, n / MXFP4_GROUP]),
        ],
    };
    match scheme.input {
        Some(InputFormat::Nvfp4) => v.push(t("input_global_scale", Dtype::F32, vec![1])),
        Some(i) if i.is_static() => v.push(t("input_scale", scale, vec![1])),
        _ => {}
    }
    Ok(v)
}

/// The bytes of each tensor [`declare`] lists.
pub(super) fn encode(
    w: &QuantizedWeight,
    input: Option<&InputRule>,
    layout: Layout,
) -> lowbit_kernels::Result<Vec<Vec<u8>>> {
    let mut v = match w {
        QuantizedWeight::Int(m) => {
            m.validate()?;
            vec![m.codes.iter().map(|c| c ^ 0x80).collect(), layout.scale_bytes(m.scales.iter().copied())]
        }
        QuantizedWeight::Float(f) => {
            f.validate()?;
            let mut v = vec![f.codes.as_slice().to_vec()];
            match &f.scales {
                FloatScales::Blocks { values, .. } => v.push(layout.scale_bytes(values.iter().copied())),
                FloatScales::Local { codes, global } => {
                    v.extend([codes.as_slice().to_vec(), global.to_le_bytes().to_vec()]);
                }
                FloatScales::Exponents { codes } => v.push(codes.as_slice().to_vec()),
            }
            v
        }
    };
    match input.map(|r| &r.scale) {
        Some(InputScale::Stored(scales)) => v.push(layout.scale_bytes(scales.iter().copied())),
        Some(InputScale::Local { global }) => v.push(global.to_le_bytes().to_vec()),
        _ => {}
    }
    Ok(v)
}

/// Names, dtypes and shapes of the scales of a layer's keys and values.
pub fn declare_kv(kv: KvScheme, attention: &str, heads: usize, layout: Layout) -> Vec<Declared> {
    let shape = if kv.per_head { vec![heads, 1, 1] } else { vec![1] };
    let t = |which| Declared {
        name: format!("{attention}.{which}_scale"),
        dtype: layout.scale_dtype(),
        shape: shape.clone(),
    };
    vec![t("k"), t("v")]
}

/// The rule of `module`'s input, with its stored scales.
pub(super) fn input_rule(store: &TensorStore, module: &str, format: InputFormat) -> Result<InputRule> {
    let stored = || positive(store, &format!("{module}.input_scale")).map(|s| InputScale::Stored(vec![s]));
    Ok(match format {
        InputFormat::Int8Token => InputRule { code: InputCode::Int8, scale: InputScale::Token },
        InputFormat::Int8Static => InputRule { code: InputCode::Int8, scale: stored()? },
        InputFormat::Fp8Token => InputRule { code: InputCode::Fp8, scale: InputScale::Token },
        InputFormat::Fp8Static => InputRule { code: InputCode::Fp8, scale: stored()? },
        InputFormat::Fp8Group(n) => InputRule { code: InputCode::Fp8, scale: InputScale::Group(n) },
        InputFormat::Nvfp4 => {
            // Model-Optimizer stores the reciprocal.
            let name = format!("{module}.input_global_scale");
            let global = match store.find(&name) {
                Some(_) => positive(store, &name)?,
                None => 1.0 / positive(store, &format!("{module}.input_scale"))?,
            };
            InputRule { code: InputCode::Fp4, scale: InputScale::Local { global } }
        }
    })
}

/// The rules of keys and values of a layer; `attention` is its module, `model.layers.0.self_attn`.
pub(crate) fn kv_rules(store: &TensorStore, kv: KvScheme, attention: &str, heads: usize) -> Result<[InputRule; 2]> {
    let rule = |which: &str| -> Result<InputRule> {
        // Model-Optimizer keeps them with the projections.
        let near = format!("{attention}.{which}_scale");
        let name = match store.find(&near) {
            Some(_) => near,
            None => format!("{attention}.{which}_proj.{which}_scale"),
        };
        let shapes: &[Vec<usize>] = if kv.per_head { &[vec![heads, 1, 1], vec![heads]] } else { &[vec![1], vec![]] };
        let scales = floats(store, &name, shapes)?;
        if let Some(bad) = scales.iter().find(|s| **s <= 0.0) {
            return Err(store.mismatch(&name, "positive scales".into(), bad.to_string()));
        }
        Ok(InputRule { code: kv.code, scale: InputScale::Stored(scales) })
    };
    Ok([rule("k")?, rule("v")?])
}
