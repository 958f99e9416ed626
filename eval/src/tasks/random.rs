//! CPython's `random.Random`: the Mersenne Twister MT19937 (Matsumoto & Nishimura 1998), its seeding by array, `sample`
//! and `choices`, so that few-shot examples and bootstraps are the ones Python draws.

const N: usize = 624;
const M: usize = 397;

/// A generator seeded as `random.Random(seed)`.
#[derive(Clone)]
pub struct Random {
    state: [u32; N],
    at: usize,
}

impl Random {
    /// `random.Random(seed)` for a non-negative seed.
    pub fn new(seed: u64) -> Self {
        let low = seed as u32;
        let high = (seed >> 32) as u32;
        if high == 0 { Self::from_key(&[low]) } else { Self::from_key(&[low, high]) }
    }

    /// The reference implementation's `init_by_array`.
    fn from_key(key: &[u32]) -> Self {
        let mut s = [0u32; N];
        s[0] = 19_650_218;
        for i in 1..N {
            s[i] = 1_812_433_253u32.wrapping_mul(s[i - 1] ^ (s[i - 1] >> 30)).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i >= N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i >= N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        s[0] = 0x8000_0000;
        Self { state: s, at: N }
    }

    fn refill(&mut self) {
        let s = &mut self.state;
        for k in 0..N {
            let y = (s[k] & 0x8000_0000) | (s[(k + 1) % N] & 0x7fff_ffff);
            s[k] = s[(k + M) % N] ^ (y >> 1) ^ if y & 1 == 1 { 0x9908_b0df } else { 0 };
        }
        self.at = 0;
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.at >= N {
            self.refill();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `random()`: 53 bits in [0, 1).
    pub fn next_f64(&mut self) -> f64 {
        let a = f64::from(self.next_u32() >> 5);
        let b = f64::from(self.next_u32() >> 6);
        (a * 67_108_864.0 + b) / 9_007_199_254_740_992.0
    }

    /// `_randbelow(n)`: as many bits as `n` has, drawn again until below; 0 for `n` 0. `n` is below 2³².
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        if bits == 0 || bits > 32 {
            return 0;
        }
        loop {
            let r = (self.next_u32() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// Positions that `sample(population, k)` takes from a population of `n`; `None` where `k` exceeds `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Option<Vec<usize>> {
        if k > n {
            return None;
        }
        // The size of a small set against that of a list, as CPython weighs it.
        let mut set_size = 21usize;
        if k > 5 {
            set_size += 4usize.pow(((k * 3) as f64).log(4.0).ceil() as u32);
        }
        let mut out = Vec::with_capacity(k);
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below(n - i);
                out.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut seen = std::collections::HashSet::with_capacity(k);
            for _ in 0..k {
                let mut j = self.below(n);
                while !seen.insert(j) {
                    j = self.below(n);
                }
                out.push(j);
            }
        }
        Some(out)
    }

    /// One position of `choices(population, k)`, drawn with replacement from `n`.
    pub fn choice(&mut self, n: usize) -> usize {
        (self.next_f64() * n as f64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_outputs_of_the_reference_implementation() {
        // mt19937ar.out: init_by_array({0x123, 0x234, 0x345, 0x456}).
        let mut r = Random::from_key(&[0x123, 0x234, 0x345, 0x456]);
        let first: Vec<u32> = (0..5).map(|_| r.next_u32()).collect();
        assert_eq!(first, [1067595299, 955945823, 477289528, 4107218783, 4228976476]);
        let last = (5..1000).map(|_| r.next_u32()).last().unwrap();
        assert_eq!(last, 3460025646);
    }

    #[test]
    fn python_values() {
        // random.Random(1234): random(), then sample(range(1000), 5), sample(range(30), 8).
        let mut r = Random::new(1234);
        assert_eq!(r.next_f64(), 0.9664535356921388);
        assert_eq!(r.next_f64(), 0.4407325991753527);
        assert_eq!(r.sample(1000, 5).unwrap(), [7, 92, 932, 965, 961]);
        assert_eq!(r.sample(30, 8).unwrap(), [25, 18, 1, 21, 22, 2, 3, 11]);
        assert_eq!(r.sample(21, 3).unwrap(), [7, 0, 19]);
        assert_eq!(r.sample(2, 1).unwrap(), [0]);
        assert_eq!(r.sample(7473, 6).unwrap(), [2835, 5311, 5105, 3966, 5044, 3797]);
        assert_eq!(
            r.sample(100000, 25).unwrap(),
            [
                19471, 11965, 23998, 93508, 14996, 1916, 65940, 63799, 32745, 8462, 87458, 70921, 61066, 8987, 78835,
                88490, 11656, 67507, 75891, 6024, 35335, 72932, 8267, 84493, 39639
            ]
        );
        assert_eq!([r.choice(5153), r.choice(5153)], [2478, 1830]);
        assert_eq!(Random::new((1 << 40) + 7).next_f64(), 0.6137037779936511);
        assert!(r.sample(3, 4).is_none());
        assert_eq!(r.sample(3, 0).unwrap(), [0usize; 0]);
    }
}
