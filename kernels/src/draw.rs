//! The next token from a row of logits: the reference of [`crate::backend::Backend::draw`].
//!
//! Draws carry no state: the noise of a token is a hash of a key and the token's id.

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
        Some(ids) => ids.into_iter().for_each(|id| race.enter(id, weight(id), s.min_p)),
        None => (0..logits.len() as u32).for_each(|id| race.enter(id, weight(id), s.min_p)),
    }
    race.best
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
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
