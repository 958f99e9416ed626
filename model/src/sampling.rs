//! The next token from a row of logits.
//!
//! Draws carry no state: the noise of a token is a hash of the seed, the step and the token's id, so a text depends
//! neither on what else is generated at the same time nor on how many steps a call makes. Two models that draw with
//! the same seed and step tend to draw the same token, which speculative decoding lives on.

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

/// First index of the largest logit; 0 when there is none.
pub fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (i, l) in logits.iter().enumerate() {
        if *l > max {
            (best, max) = (i, *l);
        }
    }
    best as u32
}

/// `log Σ exp(logit)`, summed in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|l| f64::from((l - max).exp())).sum::<f64>().ln()
}

/// The `n` most likely tokens, most likely first, ties by id.
pub fn top(logits: &[f32], n: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n < order.len() {
        if n == 0 {
            return Vec::new();
        }
        order.select_nth_unstable_by(n - 1, by);
        order.truncate(n);
    }
    order.sort_unstable_by(by);
    order
}

/// Draws the token of `step` (the number of tokens drawn before it). A logit of −∞ is never drawn.
pub fn sample(logits: &[f32], s: &Sampling, step: u64) -> u32 {
    if s.temperature <= 0.0 {
        return argmax(logits);
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return argmax(logits);
    }
    let weight = |id: u32| ((logits[id as usize] - max) / s.temperature).exp();
    let kept: Option<Vec<u32>> = (s.top_k > 0 || s.top_p < 1.0).then(|| nucleus(logits, s, weight));
    let mut race = Race { best: argmax(logits), time: f32::INFINITY, key: mix(s.seed ^ mix(step)) };
    match kept {
        Some(ids) => ids.into_iter().for_each(|id| race.enter(id, weight(id), s.min_p)),
        None => (0..logits.len() as u32).for_each(|id| race.enter(id, weight(id), s.min_p)),
    }
    race.best
}

/// The tokens that top-k and top-p keep.
fn nucleus(logits: &[f32], s: &Sampling, weight: impl Fn(u32) -> f32) -> Vec<u32> {
    let k = if s.top_k == 0 { logits.len() } else { s.top_k.min(logits.len()) };
    if s.top_p >= 1.0 {
        return top(logits, k);
    }
    let total: f64 = if k == logits.len() {
        (0..k as u32).map(|id| f64::from(weight(id))).sum()
    } else {
        top(logits, k).iter().map(|id| f64::from(weight(*id))).sum()
    };
    // Few tokens hold most of the mass: sort all only where these do not reach it.
    for n in [256.min(k), k] {
        let mut ids = top(logits, n);
        let mut mass = 0.0;
        for i in 0..ids.len() {
            mass += f64::from(weight(ids[i])) / total;
            if mass >= f64::from(s.top_p) {
                ids.truncate(i + 1);
                return ids;
            }
        }
    }
    top(logits, k)
}

/// An exponential race: token i arrives at `E / weight`, E exponential, and is first with probability in proportion to
/// its weight.
struct Race {
    best: u32,
    time: f32,
    key: u64,
}

impl Race {
    fn enter(&mut self, id: u32, weight: f32, min: f32) {
        if weight <= 0.0 || weight < min {
            return;
        }
        // 24 bits, never 0 or 1.
        let u = ((mix(self.key ^ u64::from(id)) >> 40) as f32 + 0.5) / 16_777_216.0;
        let time = -u.ln() / weight;
        if time < self.time {
            (self.best, self.time) = (id, time);
        }
    }
}

/// SplitMix64's finalizer.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
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
