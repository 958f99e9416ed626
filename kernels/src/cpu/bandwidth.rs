//! How fast this machine reads memory: the ceiling a matrix–vector product is compared with.

use std::hint::black_box;
use std::time::Instant;

use super::simd::{Kernel, Lanes, Level, Simd};

const BYTES: usize = 256 << 20;
const ROUNDS: usize = 5;

/// Sum in four chains, so that the loads and not the additions are the limit.
struct ReadAll<'a>(&'a [f32]);

impl Kernel for ReadAll<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        // SAFETY: chunks hold 4 · N elements; the caller vouches for the instruction set.
        unsafe {
            let mut acc = [L::splat(0.0); 4];
            for c in self.0.chunks_exact(4 * L::N) {
                for (i, a) in acc.iter_mut().enumerate() {
                    *a = L::add(*a, L::load(c.as_ptr().add(i * L::N)));
                }
            }
            L::sum(L::add(L::add(acc[0], acc[1]), L::add(acc[2], acc[3])))
        }
    }
}

/// Bytes a second that `threads` threads read together from 256 MiB, best of five.
pub fn read_bandwidth(threads: usize) -> f64 {
    let simd = Simd::up_to(Level::Vnni);
    // Written, not only allocated: untouched pages would all map to one zero page.
    let data: Vec<f32> = (0..BYTES / 4).map(|i| (i & 7) as f32).collect();
    let part = data.len().div_ceil(threads.max(1));
    let mut best = 0f64;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        std::thread::scope(|s| {
            for chunk in data.chunks(part) {
                s.spawn(move || black_box(simd.run(ReadAll(black_box(chunk)))));
            }
        });
        best = best.max(BYTES as f64 / start.elapsed().as_secs_f64());
    }
    best
}
