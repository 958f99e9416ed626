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

/// What a byte stands for, before its row's scale.
#[derive(Clone, Copy, PartialEq)]
enum Code {
    /// See [`KvFormat::Int8`].
    Int8,
    /// See [`KvFormat::Fp8`].
    E4m3,
}

impl Code {
    /// The largest number there is a code for.
    fn most(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::E4m3 => 448.0,
        }
    }

    /// The code nearest to a finite number; half goes to even, too large a number to the largest.
    fn of(self, v: f32) -> u8 {
        match self {
            Self::Int8 => (v.round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned(),
            Self::E4m3 => {
                let sign = if v.is_sign_negative() { 0x80 } else { 0 };
                let size = v.abs().min(448.0);
                // Below 2⁻⁶ codes are a fixed step apart, above it an eighth of the power of two below.
                let power = ((size.to_bits() >> 23) as i32 - 127).max(-6);
                let step = f32::from_bits(((power - 3 + 127) as u32) << 23);
                // 8 to 16 steps, fewer below 2⁻⁶; sixteen are the first code of the next power.
                let steps = (size / step).round_ties_even() as u8;
                sign | ((power + 6) as u8 * 8 + steps)
            }
        }
    }
}

#[inline(always)]
fn int8(code: u8) -> f32 {
    f32::from(code.cast_signed())
}

/// Exponent and mantissa put in their places of an f32 are the number without the difference of the two biases, 127 − 7; small numbers
/// (without the leading one) too.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    // 2¹²⁰.
    const BIAS: f32 = f32::from_bits((127 + 120) << 23);
    let code = u32::from(code);
    f32::from_bits(((code & 0x80) << 24) | ((code & 0x7f) << 20)) * BIAS
}

/// Numbers of a page, `[kv_heads][PAGE][head_dim]`: within a page one head's tokens are contiguous.
#[derive(Clone)]
enum Numbers {
    Float(Vec<f32>),
    /// `scales` are `[kv_heads][PAGE]`.
    Eight {
        code: Code,
        codes: Vec<u8>,
        scales: Vec<f32>,
    },
}

impl Numbers {
    fn new(format: KvFormat, rows: usize, d: usize) -> Self {
        let eight = |code| Self::Eight { code, codes: vec![0; rows * d], scales: vec![0.0; rows] };
        match format {
            KvFormat::Float => Self::Float(vec![0.0; rows * d]),
            KvFormat::Int8 => eight(Code::Int8),
            KvFormat::Fp8 => eight(Code::E4m3),
        }
    }

    /// Keeps one token of one head.
    fn write(&mut self, row: usize, x: &[f32]) {
        let to = row * x.len()..(row + 1) * x.len();
        match self {
            Self::Float(held) => held[to].copy_from_slice(x),
            Self::Eight { code, codes, scales } => {
                let most = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                let whole = x.iter().all(|v| v.is_finite());
                // What is not a number stays none.
                let scale = if whole { most / code.most() } else { f32::NAN };
                scales[row] = scale;
                for (c, v) in codes[to].iter_mut().zip(x) {
                    *c = if scale > 0.0 { code.of(v / scale) } else { 0 };
                }
            }
        }
    }

    /// Calls `each` with rows as floats: where they lie, or a few at a time, so that what is widened stays in the cache.
    fn read(&self, simd: Simd, rows: Range<usize>, d: usize, each: &mut dyn FnMut(&[f32])) {
        match self {
            Self::Float(held) => each(&held[rows.start * d..rows.end * d]),
            Self::Eight { code, codes, scales } => {
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
                    let (codes, scales) = (&codes[from * d..to * d], &scales[from..to]);
                    match code {
                        Code::Int8 => simd.run(Widen { codes, scales, d, value: int8, out: &mut *out }),
                        Code::E4m3 => simd.run(Widen { codes, scales, d, value: e4m3, out: &mut *out }),
                    }
                    each(out);
                    from = to;
                }
            }
        }
    }
}

/// `out[r] = scales[r] · value(codes[r])`.
struct Widen<'a, F> {
    codes: &'a [u8],
    scales: &'a [f32],
    d: usize,
    value: F,
    out: &'a mut [f32],
}

impl<F: Fn(u8) -> f32> Kernel for Widen<'_, F> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let rows = self.codes.chunks_exact(self.d).zip(self.out.chunks_exact_mut(self.d));
        for ((codes, out), scale) in rows.zip(self.scales) {
            for (o, c) in out.iter_mut().zip(codes) {
                *o = scale * (self.value)(*c);
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
    /// What the bits of an e4m3 number say, by definition.
    fn spelled(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from((code >> 3) & 15), f32::from(code & 7) / 8.0);
        let size = if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
        if code & 0x80 == 0 { size } else { -size }
    }

    /// Every code is what its bits say and its own nearest; between two codes the nearer is taken, halfway the even one.
    #[test]
    fn e4m3_by_its_definition() {
        assert_eq!((spelled(0x7e), spelled(0x08), spelled(0x01)), (448.0, 2f32.powi(-6), 2f32.powi(-9)));
        for code in (0..=0x7e).chain(0x80..=0xfe) {
            assert_eq!((e4m3(code), Code::E4m3.of(spelled(code))), (spelled(code), code), "{code:#x}");
        }
        for low in 0..0x7e {
            let (a, b) = (spelled(low), spelled(low + 1));
            let half = (a + b) / 2.0;
            let even = low + low % 2;
            let found = [half.next_down(), half, half.next_up(), -half].map(|v| Code::E4m3.of(v));
            assert_eq!(found, [low, even, low + 1, even | 0x80], "{low:#x}");
        }
        assert_eq!([1e9, -449.0, 448.1].map(|v| Code::E4m3.of(v)), [0x7e, 0xfe, 0x7e]);
    }

    /// The error of a number is a sixteenth of it at most, and near zero half a step of 2⁻⁹ scales.
    #[test]
    fn e4m3_rows_stay_near() {
        let (rows, d) = (9, 48);
        let mut n = Numbers::new(KvFormat::Fp8, rows, d);
        let x: Vec<f32> = (0..rows * d).map(|i| ((i * 37 % 101) as f32 - 50.0).powi(3) * 1e-3).collect();
        x.chunks_exact(d).enumerate().for_each(|(r, x)| n.write(r, x));
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            let mut got = Vec::new();
            n.read(Simd::up_to(level), 0..rows, d, &mut |x| got.extend_from_slice(x));
            for (x, got) in x.chunks_exact(d).zip(got.chunks_exact(d)) {
                let scale = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 448.0;
                for (x, got) in x.iter().zip(got) {
                    // The roundings of x / scale and of scale · code: three units in the last place.
                    let bound = (x.abs() / 16.0).max(scale * 2f32.powi(-10)) + 3.0 * f32::EPSILON * x.abs();
                    assert!((x - got).abs() <= bound, "{x} became {got}");
                }
            }
        }
        let mut n = Numbers::new(KvFormat::Fp8, 2, 2);
        n.write(0, &[0.0, -0.0]);
        n.write(1, &[f32::NAN, 1.0]);
        let mut got = Vec::new();
        n.read(Simd::up_to(Level::Portable), 0..2, 2, &mut |x| got.extend_from_slice(x));
        assert!(got[..2] == [0.0, 0.0] && got[2..].iter().all(|v| v.is_nan()), "{got:?}");
    }
}
