//! Paged keys and values on the host.
//!
//! A slot is a table of pages of [`PAGE`] tokens. Pages are allocated when the first token of theirs is appended,
//! freed with the last slot that holds them, and shared between slots by [`Cache::fork`]; a slot that writes into a
//! shared page gets a copy of its own first. Memory is therefore that of the tokens held, not of slots · capacity.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::checks;
use super::simd::{Kernel, Lanes, Simd};
use crate::backend::{KvBuffer, KvFormat, KvUsage, Segment};
use crate::error::{KernelError, Result};

/// Tokens of a page.
pub const PAGE: usize = 64;

/// Floats that are widened at a time.
const WIDENED: usize = 1024;

/// Numbers of a page, `[kv_heads][PAGE][head_dim]`: within a page one head's tokens are contiguous.
#[derive(Clone)]
enum Numbers {
    Float(Vec<f32>),
    /// See [`KvFormat::Int8`]; `scales` are `[kv_heads][PAGE]`.
    Int8 {
        codes: Vec<i8>,
        scales: Vec<f32>,
    },
}

impl Numbers {
    fn new(format: KvFormat, rows: usize, d: usize) -> Self {
        match format {
            KvFormat::Float => Self::Float(vec![0.0; rows * d]),
            KvFormat::Int8 => Self::Int8 { codes: vec![0; rows * d], scales: vec![0.0; rows] },
        }
    }

    /// Keeps one token of one head.
    fn write(&mut self, row: usize, x: &[f32]) {
        let to = row * x.len()..(row + 1) * x.len();
        match self {
            Self::Float(held) => held[to].copy_from_slice(x),
            Self::Int8 { codes, scales } => {
                let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                let whole = x.iter().all(|v| v.is_finite());
                // What is not a number stays none.
                let scale = if whole { most / 127.0 } else { f32::NAN };
                scales[row] = scale;
                for (c, v) in codes[to].iter_mut().zip(x) {
                    *c = if scale > 0.0 { (v / scale).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 };
                }
            }
        }
    }

    /// Calls `each` with rows as floats: where they lie, or a few at a time, so that what is widened stays in the cache.
    fn read(&self, simd: Simd, rows: Range<usize>, d: usize, each: &mut dyn FnMut(&[f32])) {
        match self {
            Self::Float(held) => each(&held[rows.start * d..rows.end * d]),
            Self::Int8 { codes, scales } => {
                let (mut near, mut far) = ([0f32; WIDENED], Vec::new());
                let tile = (WIDENED / d.max(1)).max(1);
                let room = if d <= WIDENED {
                    &mut near[..]
                } else {
                    far.resize(d, 0.0);
                    &mut far[..]
                };
                let mut from = rows.start;
                while from < rows.end {
                    let to = rows.end.min(from + tile);
                    let out = &mut room[..(to - from) * d];
                    simd.run(Widen { codes: &codes[from * d..to * d], scales: &scales[from..to], d, out: &mut *out });
                    each(out);
                    from = to;
                }
            }
        }
    }
}

/// `out[r] = scales[r] · codes[r]`.
struct Widen<'a> {
    codes: &'a [i8],
    scales: &'a [f32],
    d: usize,
    out: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let rows = self.codes.chunks_exact(self.d).zip(self.out.chunks_exact_mut(self.d));
        for ((codes, out), scale) in rows.zip(self.scales) {
            for (o, c) in out.iter_mut().zip(codes) {
                *o = scale * f32::from(*c);
            }
        }
    }
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Keys,
    Values,
}

struct Page {
    keys: Numbers,
    values: Numbers,
    /// Pages alive in this cache.
    live: Arc<AtomicUsize>,
}

impl Page {
    fn new(format: KvFormat, rows: usize, d: usize, live: &Arc<AtomicUsize>) -> Self {
        live.fetch_add(1, Ordering::Relaxed);
        let (keys, values) = (Numbers::new(format, rows, d), Numbers::new(format, rows, d));
        Self { keys, values, live: live.clone() }
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        self.live.fetch_add(1, Ordering::Relaxed);
        Self { keys: self.keys.clone(), values: self.values.clone(), live: self.live.clone() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keys and values of every slot of one layer.
pub struct Cache {
    slots: Vec<Vec<Arc<Page>>>,
    live: Arc<AtomicUsize>,
    format: KvFormat,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Cache {
    /// An empty cache wrapped for the op vocabulary.
    pub fn buffer(
        format: KvFormat,
        slots: usize,
        capacity: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<KvBuffer> {
        let width = checks::product("cache", kv_heads, head_dim)?;
        checks::product("cache", checks::product("cache", slots, capacity)?, width)?;
        checks::product("page", PAGE, width)?;
        let tables = (0..slots).map(|_| Vec::new()).collect();
        let memory = Self { slots: tables, live: Arc::new(AtomicUsize::new(0)), format, kv_heads, head_dim };
        Ok(KvBuffer { slots, capacity, width, memory: Box::new(memory) })
    }

    /// The cache inside a handle made by [`Self::buffer`].
    pub fn of<'a>(backend: &'static str, kv: &'a KvBuffer) -> Result<&'a Self> {
        kv.memory.downcast_ref().ok_or(KernelError::ForeignHandle { backend, what: "cache" })
    }

    /// As [`Self::of`], writable.
    pub fn of_mut<'a>(backend: &'static str, kv: &'a mut KvBuffer) -> Result<&'a mut Self> {
        kv.memory.downcast_mut().ok_or(KernelError::ForeignHandle { backend, what: "cache" })
    }

    /// Copies rows of k and v `[T, kv_heads · head_dim]` in; segments already checked.
    pub fn append(&mut self, k: &[f32], v: &[f32], segments: &[Segment]) {
        let (d, width) = (self.head_dim, self.kv_heads * self.head_dim);
        for s in segments {
            let table = &mut self.slots[s.slot];
            while s.tokens > 0 && table.len() * PAGE < s.past + s.tokens {
                table.push(Arc::new(Page::new(self.format, PAGE * self.kv_heads, d, &self.live)));
            }
            for i in 0..s.tokens {
                let position = s.past + i;
                let page = Arc::make_mut(&mut table[position / PAGE]);
                for h in 0..self.kv_heads {
                    let from = (s.row + i) * width + h * d;
                    let row = h * PAGE + position % PAGE;
                    page.keys.write(row, &k[from..from + d]);
                    page.values.write(row, &v[from..from + d]);
                }
            }
        }
    }

    /// Segments read only positions that were written.
    pub fn check_held(&self, backend: &'static str, segments: &[Segment]) -> Result<()> {
        for s in segments.iter().filter(|s| s.tokens > 0) {
            let held = self.slots.get(s.slot).map_or(0, |t| t.len() * PAGE);
            checks::below(backend, "attention", "cached token", s.past + s.tokens - 1, held)?;
        }
        Ok(())
    }

    /// Calls `each` with keys or values of `tokens` of one head, `[run, head_dim]` a piece, in order; the tokens are held.
    pub fn runs(
        &self,
        simd: Simd,
        part: Part,
        slot: usize,
        head: usize,
        tokens: Range<usize>,
        each: &mut dyn FnMut(&[f32]),
    ) {
        let table = &self.slots[slot];
        let first = tokens.start / PAGE;
        for p in first..tokens.end.div_ceil(PAGE) {
            let begin = tokens.start.max(p * PAGE) - p * PAGE;
            let end = tokens.end.min((p + 1) * PAGE) - p * PAGE;
            let held = match part {
                Part::Keys => &table[p].keys,
                Part::Values => &table[p].values,
            };
            held.read(simd, head * PAGE + begin..head * PAGE + end, self.head_dim, each);
        }
    }

    /// Slot `to` becomes the first `tokens` tokens of slot `from`: whole pages shared, a partial last page copied.
    pub fn fork(&mut self, from: usize, tokens: usize, to: usize) {
        let keep = tokens.div_ceil(PAGE);
        if from == to {
            self.slots[to].truncate(keep);
            return;
        }
        let mut table: Vec<Arc<Page>> = self.slots[from].iter().take(keep).cloned().collect();
        if !tokens.is_multiple_of(PAGE)
            && let Some(last) = table.last_mut()
        {
            *last = Arc::new(Page::clone(last));
        }
        self.slots[to] = table;
    }

    /// Forgets a slot's tokens.
    pub fn release(&mut self, slot: usize) {
        self.slots[slot] = Vec::new();
    }

    /// Pages alive.
    pub fn usage(&self) -> KvUsage {
        KvUsage { page_tokens: PAGE, pages: self.live.load(Ordering::Relaxed) }
    }

    /// Whether slot `slot` holds `tokens` tokens.
    pub fn holds(&self, slot: usize, tokens: usize) -> bool {
        self.slots.get(slot).is_some_and(|t| tokens <= t.len() * PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Level;

    /// Codes are within half a step of the numbers, a step is the largest magnitude over 127, and rows know nothing of each other.
    #[test]
    fn eight_bits_by_hand() {
        let d = 4;
        let mut n = Numbers::new(KvFormat::Int8, 3, d);
        n.write(0, &[127.0, -63.5, 0.4, 64.6]);
        n.write(1, &[0.0; 4]);
        n.write(2, &[1e-3, f32::INFINITY, 0.0, 0.0]);
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            let simd = Simd::up_to(level);
            let read = |n: &Numbers, rows: Range<usize>, d: usize| {
                let mut all = Vec::new();
                n.read(simd, rows, d, &mut |x| all.extend_from_slice(x));
                all
            };
            // Half to even: 63.5 is 64, 0.4 is 0, 64.6 is 65.
            assert_eq!(read(&n, 0..2, d), [127.0, -64.0, 0.0, 65.0, 0.0, 0.0, 0.0, 0.0]);
            assert!(read(&n, 2..3, d).iter().all(|v| v.is_nan()), "not silently zero");
            // Rows wider than what is widened at a time, and a last piece that is not whole.
            for (rows, d) in [(3, WIDENED + 5), (70, 48)] {
                let mut wide = Numbers::new(KvFormat::Int8, rows, d);
                let x: Vec<f32> = (0..rows * d).map(|i| if i % d == 0 { 127.0 } else { (i % 100) as f32 }).collect();
                x.chunks_exact(d).enumerate().for_each(|(r, x)| wide.write(r, x));
                assert_eq!(read(&wide, 1..rows, d), x[d..]);
            }
        }
    }
}
