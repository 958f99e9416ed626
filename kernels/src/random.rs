//! Random weights of a given shape and format, for measurements that need no real model.
//!
//! Element i depends on seed and i alone, and everything before the last product is integer arithmetic, so a device that
//! makes them itself (`cuda/src/random.cu`) gets the host's bits.

use half::{bf16, f16};

use crate::backend::{Bytes, FloatType, HostWeight, PackedWeight};
use crate::error::{KernelError, Result};
use crate::pack::words_for;
use crate::scheme::Scheme;

/// Variance of the sum of four uniform bytes.
const SUM_VARIANCE: f32 = 4.0 * (256.0 * 256.0 - 1.0) / 12.0;

/// How elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RandomFormat {
    /// About normal floats.
    Dense(FloatType),
    /// Uniform codes of a symmetric scheme; scales vary by a quarter either way, rounded to bf16.
    Packed(Scheme),
}

/// A weight to be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomWeight {
    /// Storage.
    pub format: RandomFormat,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Standard deviation of the elements.
    pub deviation: f32,
    /// Different seeds give different matrices.
    pub seed: u32,
}

/// 32 random bits of counter `i`.
pub fn word(seed: u32, i: u64) -> u32 {
    let mut h = (i as u32).wrapping_mul(0x9e37_79b9).wrapping_add(seed);
    h = (h ^ h >> 16).wrapping_mul(0x85eb_ca6b) ^ ((i >> 32) as u32).wrapping_mul(0x27d4_eb2f);
    h = (h ^ h >> 13).wrapping_mul(0xc2b2_ae35);
    h ^ h >> 16
}

/// What the centred sum of four bytes is multiplied by.
pub fn normal_scale(deviation: f32) -> f32 {
    deviation / SUM_VARIANCE.sqrt()
}

/// `n` about normal values.
pub fn normals(n: usize, deviation: f32, seed: u32) -> Vec<f32> {
    let scale = normal_scale(deviation);
    let one = |i| word(seed, i).to_le_bytes().iter().map(|b| i32::from(*b)).sum::<i32>() - 510;
    (0..n as u64).map(|i| one(i) as f32 * scale).collect()
}

impl RandomWeight {
    /// Rows times columns.
    pub fn elements(&self) -> Result<usize> {
        self.out_features.checked_mul(self.in_features).ok_or(KernelError::Overflow("random weight"))
    }

    /// Codes of a row in 32-bit words.
    pub fn row_words(&self, scheme: Scheme) -> usize {
        words_for(self.in_features, scheme.bits)
    }

    /// `[out, groups]`, about one step of the grid that gives the deviation.
    pub fn scales(&self, scheme: Scheme) -> Result<Vec<f32>> {
        if !scheme.symmetric || !(2..=8).contains(&scheme.bits) {
            let why = format!("random codes of {}", scheme.full_name());
            return Err(KernelError::Unsupported { backend: "random", op: "random_weight", why });
        }
        let groups = scheme.groups(self.in_features)?;
        let n = self.out_features.checked_mul(groups).ok_or(KernelError::Overflow("random scales"))?;
        // Uniform over 2^bits codes: the deviation is sqrt((4^bits - 1) / 12) steps.
        let step = self.deviation / ((4f32.powi(i32::from(scheme.bits)) - 1.0) / 12.0).sqrt();
        let seed = self.seed ^ 0x5ca1_e5ed;
        let part = |i| (word(seed, i) >> 8) as f32 / (1u32 << 24) as f32;
        Ok((0..n as u64).map(|i| bf16::from_f32(step * (0.75 + 0.5 * part(i))).to_f32()).collect())
    }

    /// The weight on the host.
    pub fn host(&self) -> Result<HostWeight> {
        let (out_features, in_features) = (self.out_features, self.in_features);
        Ok(match self.format {
            RandomFormat::Dense(dtype) => {
                let values = normals(self.elements()?, self.deviation, self.seed);
                let data = match dtype {
                    FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    FloatType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
                    FloatType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
                };
                HostWeight::Dense { dtype, out_features, in_features, data: Bytes::from_vec(data) }
            }
            RandomFormat::Packed(scheme) => {
                let scales = self.scales(scheme)?;
                let n =
                    out_features.checked_mul(self.row_words(scheme)).ok_or(KernelError::Overflow("random codes"))?;
                let words = (0..n as u64).flat_map(|i| word(self.seed, i).to_le_bytes()).collect();
                let words = Bytes::from_vec(words);
                let (zeros, group_index) = (None, None);
                let p = PackedWeight { scheme, out_features, in_features, words, scales, zeros, group_index };
                HostWeight::Packed(p)
            }
        })
    }

    /// Bytes one pass reads, as [`HostWeight::stored_bytes`] counts them.
    pub fn stored_bytes(&self) -> Result<usize> {
        Ok(match self.format {
            RandomFormat::Dense(dtype) => self.elements()? * dtype.size(),
            RandomFormat::Packed(scheme) => {
                let groups = scheme.groups(self.in_features)?;
                self.out_features * (self.row_words(scheme) * 4 + groups * 2)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::cpu::ScalarBackend;
    use crate::scheme::GroupSize;

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        (mean, (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn values_have_the_deviation_asked_for() {
        let (mean, deviation) = moments(&normals(200_000, 0.02, 7));
        assert!(mean.abs() < 2e-4 && (deviation / 0.02 - 1.0).abs() < 0.01, "{mean} {deviation}");
        assert_ne!(normals(8, 1.0, 1), normals(8, 1.0, 2));
        assert_ne!(word(1, 5), word(1, 5 + (1 << 32)));
        // Neighbours are not correlated.
        let v = normals(100_000, 1.0, 3);
        let lag = v.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / 1e5;
        assert!(lag.abs() < 0.02, "{lag}");
    }

    #[test]
    fn codes_have_the_deviation_of_floats() {
        for bits in [4, 8] {
            let scheme = Scheme { bits, symmetric: true, group: GroupSize::Cols(32) };
            let format = RandomFormat::Packed(scheme);
            let w = RandomWeight { format, out_features: 64, in_features: 512, deviation: 0.02, seed: 4 };
            let host = w.host().unwrap();
            assert_eq!(host.stored_bytes(), w.stored_bytes().unwrap());
            let HostWeight::Packed(p) = host else { panic!("packed") };
            let words: Vec<u32> = p.words.as_slice().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            let codes = crate::pack::unpack_rows(&words, 64, 512, bits).unwrap();
            let value = |i: usize| (f32::from(codes[i]) - f32::from(scheme.mid_code())) * p.scales[i / 32];
            let (mean, deviation) = moments(&(0..64 * 512).map(value).collect::<Vec<f32>>());
            assert!(mean.abs() < 5e-3 && (deviation / 0.02 - 1.0).abs() < 0.05, "{bits} bits: {mean} {deviation}");
        }
        let asymmetric = Scheme { bits: 4, symmetric: false, group: GroupSize::Cols(32) };
        let format = RandomFormat::Packed(asymmetric);
        let w = RandomWeight { format, out_features: 2, in_features: 64, deviation: 1.0, seed: 0 };
        assert!(ScalarBackend::new().random_weight(&w).is_err());
    }
}
