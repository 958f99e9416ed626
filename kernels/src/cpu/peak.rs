//! How fast this machine multiplies out of registers: the ceilings of the products ([`super::product`], [`super::fixed`]).

use std::hint::black_box;
use std::time::Instant;

use super::fixed;
use super::simd::{Kernel, Lanes, Level, Simd};

/// Steps of a round, some milliseconds.
const STEPS: usize = 1 << 20;
const ROUNDS: usize = 5;
/// Independent chains: more than an instruction's latency times the instructions a cycle.
const CHAINS: usize = 12;

/// Products a second, all threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Fused multiply-adds of f32.
    pub f32: f64,
    /// Products of sixteen-bit integers, summed in pairs.
    pub fixed: f64,
}

/// Chains of fused multiply-adds; returns the products made.
struct Chains(usize);

impl Kernel for Chains {
    type Output = usize;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> usize {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let (a, b) = (L::splat(black_box(0.999)), L::splat(black_box(0.001)));
            let mut acc = [L::splat(black_box(1.0)); CHAINS];
            for _ in 0..self.0 {
                for acc in &mut acc {
                    *acc = L::fmadd(*acc, a, b);
                }
            }
            black_box(acc.map(|v| L::sum(v)));
        }
        self.0 * CHAINS * L::N
    }
}

/// Products a second of `threads` threads, each with its own registers; best of five rounds.
pub fn peak_products(threads: usize) -> Peak {
    let simd = Simd::up_to(Level::Vnni);
    Peak {
        f32: best(threads, &|| simd.run(Chains(STEPS))),
        fixed: best(threads, &|| fixed::register_products(simd, STEPS)),
    }
}

fn best(threads: usize, run: &(dyn Fn() -> usize + Sync)) -> f64 {
    let mut best = 0f64;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let made: usize = std::thread::scope(|s| {
            let threads: Vec<_> = (0..threads.max(1)).map(|_| s.spawn(run)).collect();
            threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
        });
        best = best.max(made as f64 / start.elapsed().as_secs_f64());
    }
    best
}
