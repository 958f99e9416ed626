//! The next token from a row of logits.
//!
//! Draws carry no state: the noise of a token is a hash of the seed, the step and the token's id, so a text depends
//! neither on what else is generated at the same time nor on how many steps a call makes. Two models that draw with
//! the same seed and step tend to draw the same token, which speculative decoding lives on.

use lowbit_kernels::draw::{Draw, draw, mix};
pub use lowbit_kernels::draw::{argmax, top};

/// How the next token is chosen: temperature, then top-k, then top-p, then min-p, as transformers orders them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set with this much probability.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one.
    pub min_p: f32,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl Sampling {
    /// The draw of `step`, the number of tokens drawn before it.
    pub fn draw(&self, step: u64) -> Draw {
        let Self { temperature, top_k, top_p, min_p, seed } = *self;
        Draw { temperature, top_k, top_p, min_p, key: mix(seed ^ mix(step)) }
    }
}

/// `log Σ exp(logit)`, summed in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|l| f64::from((l - max).exp())).sum::<f64>().ln()
}

/// Draws the token of `step` (the number of tokens drawn before it). A logit of −∞ is never drawn.
pub fn sample(logits: &[f32], s: &Sampling, step: u64) -> u32 {
    draw(logits, &s.draw(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(logits: &[f32], s: &Sampling) -> Vec<f64> {
        let n = 40_000;
        let mut count = vec![0f64; logits.len()];
        (0..n).for_each(|step| count[sample(logits, s, step) as usize] += 1.0 / n as f64);
        count
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let p = [0.5f64, 0.3, 0.15, 0.05];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        let s = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        for (got, want) in shares(&logits, &s).iter().zip(p) {
            // Five standard deviations of a share of 40,000 draws.
            assert!((got - want).abs() <= 5.0 * (want * (1.0 - want) / 40_000.0).sqrt(), "{got} {want}");
        }
        assert_eq!(sample(&logits, &Sampling::default(), 0), 0);
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits: Vec<f32> = [0.5f64, 0.3, 0.15, 0.05].iter().map(|p| p.ln() as f32).collect();
        let base = Sampling { temperature: 1.0, seed: 1, ..Sampling::default() };
        let kept = |s: &Sampling| shares(&logits, s).iter().filter(|c| **c > 0.0).count();
        assert_eq!(kept(&Sampling { top_k: 2, ..base.clone() }), 2);
        assert_eq!(kept(&Sampling { top_p: 0.6, ..base.clone() }), 2);
        assert_eq!(kept(&Sampling { top_k: 2, top_p: 0.6, ..base.clone() }), 1);
        assert_eq!(kept(&Sampling { min_p: 0.2, ..base.clone() }), 3);
        assert_eq!(kept(&base), 4);
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0], 3), [1, 2, 3]);
        assert!((log_sum_exp(&logits)).abs() <= 1e-6);
    }
}
