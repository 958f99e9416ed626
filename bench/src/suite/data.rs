//! Random operands, made on the host.

use half::{bf16, f16};
use lowbit_kernels::Scheme;
use lowbit_kernels::backend::{Bytes, FloatType, HostWeight, PackedWeight};
use lowbit_kernels::floats::{FloatCode, FloatScales, FloatWeight};
use lowbit_kernels::pack::words_for;

use super::cost::Format;

/// Elements of the noise large operands repeat: a prime, so that no two rows of a matrix are alike.
const PERIOD: usize = 1_048_573;

/// Seeded numbers.
pub struct Noise(pub u64);

impl Noise {
    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Uniform in [-1, 1).
    pub fn one(&mut self) -> f32 {
        self.bits() as f32 / 2f32.powi(31) - 1.0
    }

    /// `n` of them.
    pub fn many(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.one()).collect()
    }
}

/// `n` elements that repeat a period of what `one` gives.
fn repeated<T: Copy>(n: usize, mut one: impl FnMut() -> T) -> Vec<T> {
    let period: Vec<T> = (0..n.min(PERIOD)).map(|_| one()).collect();
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        out.extend_from_slice(&period[..period.len().min(n - out.len())]);
    }
    out
}

/// `n` floats in [-1, 1).
pub fn floats(n: usize) -> Vec<f32> {
    let mut noise = Noise(11);
    repeated(n, || noise.one())
}

/// A weight `[out, cols]` of the format, every element below 1.
pub fn weight(format: Format, out: usize, cols: usize) -> HostWeight {
    let mut noise = Noise(12);
    match format.scheme() {
        None if format == Format::Fp8 => fp8(&mut noise, out, cols),
        None => {
            let pairs = repeated(out * cols, || bf16::from_f32(noise.one()).to_le_bytes());
            let data = Bytes::from_vec(pairs.into_flattened());
            HostWeight::Dense { dtype: FloatType::Bf16, out_features: out, in_features: cols, data }
        }
        Some(scheme) => {
            let words = repeated(out * words_for(cols, scheme.bits), || noise.bits().to_le_bytes());
            // Every format here has whole groups.
            let groups = cols / scheme.group_cols(cols).max(1);
            // 16 bits, as checkpoints keep them.
            let scales =
                repeated(out * groups, || half::bf16::from_f32(noise.one() / f32::from(scheme.max_code())).to_f32());
            let words = Bytes::from_vec(words.into_flattened());
            HostWeight::Packed(PackedWeight {
                scheme,
                out_features: out,
                in_features: cols,
                words,
                scales,
                zeros: None,
                group_index: None,
            })
        }
    }
}

/// A weight of E4M3 with a scale a row, elements below 1.
pub fn fp8(noise: &mut Noise, out: usize, cols: usize) -> HostWeight {
    // No NaN: bit 0 is never set.
    let codes = Bytes::from_vec(repeated(out * cols, || noise.bits() as u8 & 0xfe));
    // 16 bits, as checkpoints keep them; 448 is the largest code.
    let values = (0..out).map(|_| bf16::from_f32((1.5 + noise.one() / 2.0) / 1024.0).to_f32()).collect();
    let scales = FloatScales::Blocks { values, rows: 1, cols };
    let code = FloatCode::E4m3;
    HostWeight::Float(FloatWeight { code, out_features: out, in_features: cols, codes, scales })
}

/// A small dense weight of any dtype.
pub fn dense(noise: &mut Noise, dtype: FloatType, out: usize, cols: usize) -> HostWeight {
    let mut raw = Vec::with_capacity(out * cols * dtype.size());
    for _ in 0..out * cols {
        let v = noise.one();
        match dtype {
            FloatType::F32 => raw.extend(v.to_le_bytes()),
            FloatType::F16 => raw.extend(f16::from_f32(v).to_le_bytes()),
            FloatType::Bf16 => raw.extend(bf16::from_f32(v).to_le_bytes()),
        }
    }
    HostWeight::Dense { dtype, out_features: out, in_features: cols, data: Bytes::from_vec(raw) }
}

/// A small packed weight of any scheme whose groups divide `cols`; some scales are negative, as the format allows.
pub fn packed(noise: &mut Noise, scheme: Scheme, out: usize, cols: usize) -> HostWeight {
    let words = (0..out * words_for(cols, scheme.bits)).flat_map(|_| noise.bits().to_le_bytes()).collect();
    let cells = out * (cols / scheme.group_cols(cols).max(1));
    let scales = (0..cells).map(|_| noise.one() / f32::from(scheme.max_code())).collect();
    let zeros = (!scheme.symmetric).then(|| (0..cells).map(|_| noise.bits() as u8 & scheme.max_code()).collect());
    HostWeight::Packed(PackedWeight {
        scheme,
        out_features: out,
        in_features: cols,
        words: Bytes::from_vec(words),
        scales,
        zeros,
        group_index: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_repeats_out_of_step_with_rows() {
        let x = floats(PERIOD + 5);
        assert_eq!(x[..5], x[PERIOD..]);
        assert!(x.iter().all(|v| (-1.0..1.0).contains(v)));
        assert_ne!(x[..4096], x[4096..8192]);
        assert_eq!(floats(3), x[..3]);
    }
}
