//! Weights as the kernels read them.
//!
//! | host weight | on the device |
//! |---|---|
//! | dense f32, f16, bf16 | `raw` `[out, in]`, the stored bytes |
//! | 4 and 8 bits, no column → group table, group a multiple of 16 | `words` `[out, in·bits/32]` u32 as stored: column c of a row in bits `c·bits % 32 ..` of word `c·bits / 32`; `scales` `[out, groups]` f32; `zeros` `[out, groups]` u8, the middle code where the scheme is symmetric |
//! | float codes (E4M3, E2M1) | decoded at upload to dense f32: they save disk here, neither memory nor traffic. E4M3 with one scale a row, on a device with products of E4M3 (GPUs from sm_89 on with kernels compiled for them, the emulator), stays as codes as well, `[out, in]` bytes and `[out]` f32: products with inputs rounded to E4M3 read these ([`Fp8Codes`]), all others the f32 |
//! | everything else (2, 3, 5, 6, 7 bits, `g_idx`, other groups) | dequantized at upload to dense f32: those formats save disk here, neither memory nor traffic |
//!
//! Rows stay in checkpoint order, so one copy serves products and embedding: 16-byte loads from it fall straight into
//! tensor-core fragments, because a product may take columns in any order. Scales and zero points get a second layout for
//! the narrow products, see [`Narrow`].

use super::device::{Device, Memory};
use super::ops_narrow::Narrow;
use super::ops_w8a8::Fp8Codes;
use super::rows::bytes_of;
use crate::backend::{FloatType, HostWeight, PackedWeight};
use crate::error::{KernelError, Result, check_len};
use crate::pack::{unpack_rows, words_for};
use crate::quantized::QuantizedMatrix;
use crate::scheme::Scheme;

/// Columns that share a scale within one tensor-core step: groups must be multiples of it.
pub const GROUP_STEP: usize = 16;

/// A matrix `[out, in]` on the device.
pub struct DeviceWeight {
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Storage.
    pub layout: Layout,
    /// How the kernels for few tokens read it; `None` where they cannot.
    pub narrow: Option<Narrow>,
    /// E4M3 codes beside the layout, for products with inputs that are such codes too; `None` where there are none.
    pub fp8: Option<Fp8Codes>,
}

/// Device storage of a matrix; see the module's table.
pub enum Layout {
    /// Floats as stored.
    Dense {
        /// `[out, in]` of `dtype`.
        raw: Memory,
        /// Element type.
        dtype: FloatType,
    },
    /// Integer codes.
    Packed {
        /// `[out, in·bits/32]` u32.
        words: Memory,
        /// `[out, groups]` f32.
        scales: Memory,
        /// `[out, groups]` u8.
        zeros: Memory,
        /// 4 or 8.
        bits: u8,
        /// Columns per group, a multiple of [`GROUP_STEP`] that divides `in`.
        group_cols: usize,
    },
}

/// The number by which kernels know an element type.
pub fn dtype_code(dtype: FloatType) -> i32 {
    match dtype {
        FloatType::F32 => 0,
        FloatType::F16 => 1,
        FloatType::Bf16 => 2,
    }
}

impl DeviceWeight {
    /// Whether codes of `scheme` in rows of `cols`, in groups of neighbours, stay packed on the device.
    pub fn keeps_codes(scheme: Scheme, cols: usize) -> bool {
        matches!(scheme.bits, 4 | 8) && scheme.group_cols(cols).is_multiple_of(GROUP_STEP)
    }

    /// Checks every length and copies to the device.
    pub fn upload(d: &Device, w: &HostWeight) -> Result<Self> {
        let (out_features, in_features) = w.dims();
        let layout = match w {
            HostWeight::Dense { dtype, data, .. } => {
                let cells = product("weight", out_features, in_features)?;
                check_len("weight bytes", product("weight", cells, dtype.size())?, data.as_slice().len())?;
                Layout::Dense { raw: d.upload(data.as_slice())?, dtype: *dtype }
            }
            HostWeight::Packed(p) => {
                check_packed(d.name(), p)?;
                if is_direct(p) { packed(d, p)? } else { dequantized(d, p)? }
            }
            HostWeight::Float(f) => {
                Layout::Dense { raw: d.upload(&bytes_of(&f.dequantize()?))?, dtype: FloatType::F32 }
            }
        };
        let fp8 = if let HostWeight::Float(f) = w { Fp8Codes::of(d, f)? } else { None };
        Ok(Self { fp8, ..Self::new(d, out_features, in_features, layout)? })
    }

    /// A matrix that is on the device.
    pub fn new(d: &Device, out_features: usize, in_features: usize, layout: Layout) -> Result<Self> {
        let narrow = Narrow::of(d, out_features, in_features, &layout)?;
        Ok(Self { out_features, in_features, layout, narrow, fp8: None })
    }
}

fn product(what: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or(KernelError::Overflow(what))
}

/// Whether kernels read the codes as they are.
fn is_direct(p: &PackedWeight) -> bool {
    p.group_index.is_none() && DeviceWeight::keeps_codes(p.scheme, p.in_features)
}

fn packed(d: &Device, p: &PackedWeight) -> Result<Layout> {
    let zeros = match &p.zeros {
        Some(z) => d.upload(z)?,
        None => d.upload(&vec![p.scheme.mid_code(); p.scales.len()])?,
    };
    Ok(Layout::Packed {
        words: d.upload(p.words.as_slice())?,
        scales: d.upload(&bytes_of(&p.scales))?,
        zeros,
        bits: p.scheme.bits,
        group_cols: p.scheme.group_cols(p.in_features),
    })
}

fn dequantized(d: &Device, p: &PackedWeight) -> Result<Layout> {
    let words: Vec<u32> = p.words.as_slice().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let matrix = QuantizedMatrix {
        scheme: p.scheme,
        out_features: p.out_features,
        in_features: p.in_features,
        codes: unpack_rows(&words, p.out_features, p.in_features, p.scheme.bits)?,
        scales: p.scales.clone(),
        zeros: p.zeros.clone(),
        group_index: p.group_index.clone(),
    };
    Ok(Layout::Dense { raw: d.upload(&bytes_of(&matrix.dequantize()?))?, dtype: FloatType::F32 })
}

/// Lengths of codes, scales and zero points; what only the dequantizing path reads is checked there.
fn check_packed(backend: &'static str, p: &PackedWeight) -> Result<()> {
    let (rows, cols, bits) = (p.out_features, p.in_features, p.scheme.bits);
    if !(1..=8).contains(&bits) {
        return Err(KernelError::Unsupported { backend, op: "upload_weight", why: format!("{bits}-bit codes") });
    }
    let cells = product("scales", rows, p.scheme.groups(cols)?)?;
    product("codes", cols, usize::from(bits))?;
    let bytes = product("packed bytes", product("packed bytes", words_for(cols, bits), 4)?, rows)?;
    check_len("packed bytes", bytes, p.words.as_slice().len())?;
    check_len("scales", cells, p.scales.len())?;
    p.zeros.as_ref().map_or(Ok(()), |z| check_len("zero points", cells, z.len()))
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::*;
    use crate::backend::Bytes;
    use crate::cuda::rows::{floats_of, words_of};
    use crate::pack::pack_rows;
    use crate::scheme::GroupSize;

    const ROWS: usize = 3;
    const COLS: usize = 96;

    fn example(scheme: Scheme, shuffled: bool) -> PackedWeight {
        let code = |i: usize| ((i * 2_654_435_761) >> 7) as u8 & scheme.max_code();
        let codes: Vec<u8> = (0..ROWS * COLS).map(code).collect();
        let words = pack_rows(&codes, ROWS, COLS, scheme.bits).unwrap();
        let groups = scheme.groups(COLS).unwrap();
        PackedWeight {
            scheme,
            out_features: ROWS,
            in_features: COLS,
            words: Bytes::from_vec(bytes_of(&words)),
            scales: (0..ROWS * groups).map(|i| (i as f32 - 1.5) / 8.0).collect(),
            zeros: (!scheme.symmetric).then(|| (0..ROWS * groups).map(|i| code(i + 5)).collect()),
            group_index: shuffled.then(|| (0..COLS).map(|c| (c * 7 % groups) as u32).collect()),
        }
    }

    /// The matrix by the format's definition.
    fn meaning(p: &PackedWeight) -> Vec<f32> {
        let (groups, per_group) = (p.scheme.groups(COLS).unwrap(), p.scheme.group_cols(COLS));
        let codes = unpack_rows(&words_of(p.words.as_slice()), ROWS, COLS, p.scheme.bits).unwrap();
        let weight = |i: usize| {
            let (row, col) = (i / COLS, i % COLS);
            let at = row * groups + p.group_index.as_ref().map_or(col / per_group, |g| g[col] as usize);
            let zero = p.zeros.as_ref().map_or(p.scheme.mid_code(), |z| z[at]);
            (f32::from(codes[i]) - f32::from(zero)) * p.scales[at]
        };
        (0..ROWS * COLS).map(weight).collect()
    }

    /// The inverse of the device layout: the matrix back as floats.
    fn inverse(d: &Device, w: &DeviceWeight) -> Vec<f32> {
        let read = |m: &Memory| d.read(m, 0..m.bytes()).unwrap();
        let (rows, cols) = (w.out_features, w.in_features);
        match &w.layout {
            Layout::Dense { raw, dtype: FloatType::F32 } => floats_of(&read(raw)),
            Layout::Dense { .. } => unreachable!("only f32 comes of packed weights"),
            Layout::Packed { words, scales, zeros, bits, group_cols } => {
                let codes = unpack_rows(&words_of(&read(words)), rows, cols, *bits).unwrap();
                let (scales, zeros) = (floats_of(&read(scales)), read(zeros));
                let at = |i: usize| i / cols * (cols / group_cols) + i % cols / group_cols;
                let weight = |i: usize| (f32::from(codes[i]) - f32::from(zeros[at(i)])) * scales[at(i)];
                (0..rows * cols).map(weight).collect()
            }
        }
    }

    #[test]
    fn every_format_comes_back_as_it_was() {
        let d = Device::emulated(1).unwrap();
        for bits in 1..=8 {
            for group in [GroupSize::Cols(16), GroupSize::Cols(24), GroupSize::Cols(48), GroupSize::PerChannel] {
                for (symmetric, shuffled) in [(true, false), (false, false), (false, true)] {
                    let p = example(Scheme { bits, symmetric, group }, shuffled);
                    let w = DeviceWeight::upload(&d, &HostWeight::Packed(p.clone())).unwrap();
                    let packed = matches!(w.layout, Layout::Packed { .. });
                    let direct = matches!(bits, 4 | 8) && !shuffled && group != GroupSize::Cols(24);
                    assert_eq!(packed, direct, "{} shuffled={shuffled}", p.scheme.full_name());
                    assert_eq!(inverse(&d, &w), meaning(&p), "{} shuffled={shuffled}", p.scheme.full_name());
                }
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused_by_name() {
        let d = Device::emulated(1).unwrap();
        let scheme = Scheme { bits: 4, symmetric: false, group: GroupSize::Cols(32) };
        let refuse = |change: fn(&mut PackedWeight)| {
            let mut p = example(scheme, false);
            change(&mut p);
            match DeviceWeight::upload(&d, &HostWeight::Packed(p)) {
                Err(KernelError::Length { what, .. }) => what,
                _ => "accepted",
            }
        };
        assert_eq!(refuse(|p| p.words = Bytes::from_vec(vec![0; 7])), "packed bytes");
        assert_eq!(refuse(|p| p.scales.truncate(2)), "scales");
        assert_eq!(refuse(|p| p.zeros = Some(vec![1])), "zero points");
        let short = Bytes::from_vec(vec![0; 10]);
        let dense = HostWeight::Dense { dtype: FloatType::F16, out_features: 2, in_features: 3, data: short };
        let refused = DeviceWeight::upload(&d, &dense);
        assert!(matches!(refused, Err(KernelError::Length { what: "weight bytes", expected: 12, found: 10 })));
    }
}
