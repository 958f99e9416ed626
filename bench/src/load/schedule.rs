//! When requests start: gaps of open-loop arrivals.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Exp1, Gamma};

use crate::load::error::{LoadError, Result};

/// Gaps of an open loop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// Starts at `k / rate`.
    Constant,
    /// Independent exponential gaps: a crowd that does not know of each other.
    Poisson,
    /// Gamma gaps of this shape, as vLLM's `--burstiness`: below 1 burstier than Poisson, above 1 more regular.
    Gamma(f64),
}

/// An endless schedule in nanoseconds from the start of the stage.
#[derive(Debug)]
pub struct Schedule {
    rate: f64,
    arrivals: Arrivals,
    gamma: Option<Gamma<f64>>,
    rng: StdRng,
    next_s: f64,
    count: u64,
}

impl Schedule {
    /// `rate` is requests a second, finite and positive. The mean gap is `1 / rate` for every kind; the first request of
    /// a constant schedule is at 0, of a random one after a random gap.
    pub fn new(rate: f64, arrivals: Arrivals, seed: u64) -> Result<Self> {
        if !(rate.is_finite() && rate > 0.0 && rate <= 1e6) {
            return Err(LoadError::option(format!("rate {rate}"), "not a rate", "requests a second, above 0"));
        }
        let gamma = match arrivals {
            Arrivals::Gamma(shape) => {
                Some(Gamma::new(shape, 1.0 / (rate * shape)).ok().filter(|_| shape.is_finite()).ok_or_else(|| {
                    LoadError::option(format!("gamma shape {shape}"), "not a shape", "a number above 0; 1 is Poisson")
                })?)
            }
            _ => None,
        };
        Ok(Self { rate, arrivals, gamma, rng: StdRng::seed_from_u64(seed), next_s: 0.0, count: 0 })
    }
}

impl Iterator for Schedule {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        match self.arrivals {
            // A product, not a sum: no drift after a million requests.
            Arrivals::Constant => self.next_s = self.count as f64 / self.rate,
            Arrivals::Poisson => {
                let gap: f64 = Exp1.sample(&mut self.rng);
                self.next_s += gap / self.rate;
            }
            Arrivals::Gamma(_) => self.next_s += self.gamma.map_or(0.0, |g| g.sample(&mut self.rng)),
        }
        self.count += 1;
        Some((self.next_s * 1e9) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and squared coefficient of variation of the gaps; of gamma gaps it is `1 / shape`.
    #[test]
    fn gaps_have_the_moments_of_their_law() {
        for (arrivals, want) in [
            (Arrivals::Constant, 0.0),
            (Arrivals::Poisson, 1.0),
            (Arrivals::Gamma(0.5), 2.0),
            (Arrivals::Gamma(4.0), 0.25),
        ] {
            let times: Vec<u64> = Schedule::new(50.0, arrivals, 3).unwrap().take(40_001).collect();
            let gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]) as f64 * 1e-9).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let var = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((mean * 50.0 - 1.0).abs() < 0.03, "{arrivals:?}: mean {mean}");
            assert!(
                (var / (mean * mean) - want).abs() < 0.08 * want.max(0.01) + 1e-6,
                "{arrivals:?}: cv² {}",
                var / (mean * mean)
            );
        }
    }

    #[test]
    fn seeds_repeat_and_bad_rates_are_refused() {
        let first = |seed| Schedule::new(3.0, Arrivals::Poisson, seed).unwrap().take(5).collect::<Vec<_>>();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        assert!(Schedule::new(0.0, Arrivals::Constant, 0).is_err());
        assert!(Schedule::new(f64::NAN, Arrivals::Constant, 0).is_err());
        assert!(Schedule::new(1.0, Arrivals::Gamma(-1.0), 0).is_err());
    }
}
