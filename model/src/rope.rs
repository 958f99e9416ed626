//! Frequencies of rotary position embeddings, as transformers' `ROPE_INIT_FUNCTIONS` computes them.

use std::f64::consts::PI;

use lowbit_checkpoint::config::{RopeConfig, RopeScaling};

/// Frequencies and the factor on cos and sin.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `[rotated / 2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin (YaRN's attention factor; 1 elsewhere).
    pub mscale: f32,
}

impl Rope {
    /// `rotated`: how many elements of a head turn (head_dim · partial factor).
    pub fn new(config: &RopeConfig, rotated: usize) -> Self {
        let dim = rotated as f64;
        let base: Vec<f64> = (0..rotated / 2).map(|i| config.theta.powf(-(2.0 * i as f64) / dim)).collect();
        let mut mscale = 1.0;
        let inv: Vec<f64> = match &config.scaling {
            RopeScaling::Default => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => base
                .iter()
                .map(|f| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high {
                        *f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale: m,
                mscale_all_dim,
                truncate,
            } => {
                let get = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
                mscale = attention_factor.unwrap_or(match (m, mscale_all_dim) {
                    (Some(a), Some(b)) if *a != 0.0 && *b != 0.0 => get(*factor, *a) / get(*factor, *b),
                    _ => get(*factor, 1.0),
                });
                let correction =
                    |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln());
                let (mut low, mut high) = (correction(*beta_fast), correction(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                base.iter()
                    .enumerate()
                    .map(|(i, f)| {
                        let keep = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * (1.0 - keep) + f * keep
                    })
                    .collect()
            }
        };
        Self { inv_freq: inv.into_iter().map(|f| f as f32).collect(), mscale: mscale as f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let plain = Rope::new(&RopeConfig { theta: 500_000.0, scaling: RopeScaling::Default }, 128);
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let scaled = Rope::new(&RopeConfig { theta: 500_000.0, scaling }, 128);
        assert_eq!(scaled.inv_freq[0], plain.inv_freq[0]);
        assert_eq!(scaled.inv_freq[63], plain.inv_freq[63] / 8.0);
    }

    #[test]
    fn yarn_scales_cos_and_sin() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        };
        let r = Rope::new(&RopeConfig { theta: 10_000.0, scaling }, 64);
        assert!((f64::from(r.mscale) - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-6);
        assert_eq!(r.inv_freq[0], 1.0);
    }
}
