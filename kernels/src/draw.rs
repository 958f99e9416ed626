//! The next token from a row of logits: the reference of [`crate::backend::Backend::draw`].
//!
//! Draws carry no state: the noise of a token is a hash of a key and the token's id.

use rayon::prelude::*;

/// How a token is drawn: temperature, then top-k, then top-p, then min-p, as transformers orders them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set with this much probability.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one.
    pub min_p: f32,
    /// Of the noise: another for each token of a text.
    pub key: u64,
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

/// Draws a token. A logit of −∞ is never drawn.
pub fn draw(logits: &[f32], s: &Draw) -> u32 {
    if s.temperature <= 0.0 {
        return argmax(logits);
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return argmax(logits);
    }
    let weight = |id: u32| ((logits[id as usize] - max) / s.temperature).exp();
    let kept: Option<Vec<u32>> = (s.top_k > 0 || s.top_p < 1.0).then(|| nucleus(logits, s, weight));
    let mut race = Race { best: argmax(logits), time: f32::INFINITY, key: s.key };
    match kept {
        Some(ids) => ids.into_iter().for_each(|id| race.enter(id, weight, s.min_p)),
        None => (0..logits.len() as u32).for_each(|id| race.enter(id, weight, s.min_p)),
    }
    race.best
}

/// [`draw`] for each row of logits `[draws.len(), vocab]`, side by side.
pub(crate) fn draw_rows(logits: &[f32], vocab: usize, draws: &[Draw]) -> Vec<u32> {
    logits.par_chunks_exact(vocab).zip(draws).map(|(row, d)| draw(row, d)).collect()
}

/// The tokens that top-k and top-p keep.
fn nucleus(logits: &[f32], s: &Draw, weight: impl Fn(u32) -> f32) -> Vec<u32> {
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
    fn enter(&mut self, id: u32, weight: impl Fn(u32) -> f32, min: f32) {
        let u = uniform(mix(self.key ^ u64::from(id)));
        // −ln u is not below 1 − u and no weight is above 1: most tokens cannot come first any more, and need neither exponential nor
        // logarithm.
        if 1.0 - u > self.time * 1.000_01 {
            return;
        }
        let weight = weight(id);
        if weight <= 0.0 || weight < min {
            return;
        }
        let time = -u.ln() / weight;
        if time < self.time {
            (self.best, self.time) = (id, time);
        }
    }
}

/// A number between 0 and 1, neither of them. Of 23 bits, so that adding a half is exact: with 24 the largest became 1, and its token
/// won whatever its weight.
fn uniform(hash: u64) -> f32 {
    ((hash >> 41) as f32 + 0.5) / 8_388_608.0
}

/// SplitMix64's finalizer.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_never_none_nor_all() {
        assert!(uniform(0) > 0.0 && uniform(u64::MAX) < 1.0);
    }

    #[test]
    fn what_is_left_out_of_the_race_could_not_have_come_first() {
        for key in 0..200 {
            let logits: Vec<f32> = (0..500).map(|i| (mix(key * 977 + i) >> 40) as f32 / (1 << 21) as f32).collect();
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let arrival = |i: usize| -uniform(mix(key ^ i as u64)).ln() / (logits[i] - max).exp();
            let first = (0..logits.len()).min_by(|a, b| arrival(*a).total_cmp(&arrival(*b))).unwrap();
            let s = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, key };
            assert_eq!(draw(&logits, &s) as usize, first, "{key}");
        }
    }
}
