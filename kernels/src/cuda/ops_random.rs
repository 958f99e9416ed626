//! Launchers of `random.cu`: weights made on the device, bit for bit those of [`crate::random`].

use super::device::{Arg, Device, Memory};
use super::ops_elementwise::flat;
use super::rows::{bytes_of, size};
use super::weights::{DeviceWeight, Layout, dtype_code};
use crate::error::{KernelError, Result};
use crate::random::{RandomFormat, RandomWeight, normal_scale};
use crate::scheme::Scheme;

/// The kernel's number for random bits.
const BITS: i32 = 3;

/// `elements` of `width` bytes: floats of the kernel's dtype `kind`, or [`BITS`].
fn filled(d: &Device, elements: usize, width: usize, kind: i32, seed: u32, scale: f32) -> Result<Memory> {
    let bytes = elements.checked_mul(width).ok_or(KernelError::Overflow("random weight"))?;
    let to = d.alloc(bytes)?;
    if elements > 0 {
        let elements = Arg::I32(size("random weight", elements)?);
        let args = [Arg::Out(&to), elements, Arg::I32(kind), Arg::U32(seed), Arg::F32(scale)];
        d.launch("random_fill", flat(bytes.div_ceil(4), 1)?, &args)?;
    }
    Ok(to)
}

/// The weight; scales, one in many codes, come from the host.
pub fn weight(d: &Device, w: &RandomWeight) -> Result<DeviceWeight> {
    let elements = w.elements()?;
    let dtype = match w.format {
        RandomFormat::Packed(scheme) => return packed(d, w, scheme),
        RandomFormat::Dense(dtype) => dtype,
    };
    let raw = filled(d, elements, dtype.size(), dtype_code(dtype), w.seed, normal_scale(w.deviation))?;
    let layout = Layout::Dense { raw, dtype };
    DeviceWeight::new(d, w.out_features, w.in_features, layout)
}

fn packed(d: &Device, w: &RandomWeight, scheme: Scheme) -> Result<DeviceWeight> {
    if !DeviceWeight::keeps_codes(scheme, w.in_features) {
        return DeviceWeight::upload(d, &w.host()?);
    }
    let scales = w.scales(scheme)?;
    let words = w.out_features.checked_mul(w.row_words(scheme)).ok_or(KernelError::Overflow("random codes"))?;
    let layout = Layout::Packed {
        words: filled(d, words, 4, BITS, w.seed, 0.0)?,
        zeros: d.upload(&vec![scheme.mid_code(); scales.len()])?,
        scales: d.upload(&bytes_of(&scales))?,
        bits: scheme.bits,
        group_cols: scheme.group_cols(w.in_features),
    };
    DeviceWeight::new(d, w.out_features, w.in_features, layout)
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::*;
    use crate::backend::FloatType;
    use crate::scheme::GroupSize;

    fn stored(d: &Device, w: &DeviceWeight) -> Vec<Vec<u8>> {
        let all = |m: &Memory| d.read(m, 0..m.bytes()).unwrap();
        match &w.layout {
            Layout::Dense { raw, .. } => vec![all(raw)],
            Layout::Packed { words, scales, zeros, .. } => vec![all(words), all(scales), all(zeros)],
        }
    }

    #[test]
    fn the_device_makes_the_hosts_weights() {
        let d = Device::emulated(1).unwrap();
        let group = |n| GroupSize::Cols(n);
        let packed = |bits, group| RandomFormat::Packed(Scheme { bits, symmetric: true, group });
        let formats = [
            RandomFormat::Dense(FloatType::F32),
            RandomFormat::Dense(FloatType::F16),
            RandomFormat::Dense(FloatType::Bf16),
            packed(4, group(32)),
            packed(8, GroupSize::PerChannel),
            packed(3, group(32)),
        ];
        for format in formats {
            // An odd number of elements ends in half a word of 16-bit floats.
            let cols = if matches!(format, RandomFormat::Dense(_)) { 31 } else { 96 };
            let w = RandomWeight { format, out_features: 29, in_features: cols, deviation: 0.02, seed: 9 };
            let (made, host) = (weight(&d, &w).unwrap(), w.host().unwrap());
            let uploaded = DeviceWeight::upload(&d, &host).unwrap();
            assert!(stored(&d, &made) == stored(&d, &uploaded), "{format:?}");
            assert_eq!(w.stored_bytes().unwrap(), host.stored_bytes());
        }
    }
}
