//! Decode's product of integer weights: codes in tiles ([`super::tiles`]) times rounded activations ([`super::rounded`]).
//!
//! For every row, in f32, over the blocks in ascending order: `y ← fma(Σ code·x − zero·Σ x, s_w · s_x, y)`; the sums are exact
//! integers. So the result is the same on every instruction set, for any number of threads and any batch, and the only
//! approximation is the rounding of x.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vnni;

use super::rounded::{Rounded, Values};
use super::simd::{Level, Simd};
use super::tiles::{QUAD, SLAB, TILE_ROWS, Tiles, quad};
use half::{bf16, f16};

/// Tokens of a call, at most.
pub const TOKENS: usize = 8;
/// Lines fetched ahead of their use: the hardware's own prefetch stops at page ends and starts anew at each.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 32;
/// Quads of a slab.
const QUADS: usize = SLAB / QUAD;

/// A scale a row and group, `[tiles, groups, 16]`, in 16 bits where that loses nothing (an eighth less to read at 4 bits and groups
/// of 64).
pub enum Scales {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

impl Scales {
    /// The narrowest form that holds every value.
    pub fn new(values: Vec<f32>) -> Self {
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits();
        if values.iter().all(|v| same(bf16::from_f32(*v).to_f32(), *v)) {
            Scales::Bf16(values.iter().map(|v| bf16::from_f32(*v).to_bits()).collect())
        } else if values.iter().all(|v| same(f16::from_f32(*v).to_f32(), *v)) {
            Scales::F16(values.iter().map(|v| f16::from_f32(*v).to_bits()).collect())
        } else {
            Scales::F32(values)
        }
    }

    /// One of them.
    pub fn at(&self, i: usize) -> f32 {
        match self {
            Scales::F32(v) => v[i],
            Scales::F16(v) => f16::from_bits(v[i]).to_f32(),
            Scales::Bf16(v) => bf16::from_bits(v[i]).to_f32(),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Scales::F32(v) => v.len(),
            Scales::F16(v) | Scales::Bf16(v) => v.len(),
        }
    }

    fn sixteen(&self, at: usize) -> [f32; TILE_ROWS] {
        std::array::from_fn(|r| self.at(at + r))
    }
}

/// A matrix for the product.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub tiles: &'a Tiles,
    pub scales: &'a Scales,
    /// `[tiles, groups, 16]`; `mid` where there are none.
    pub zeros: Option<&'a [u8]>,
    pub mid: u8,
    /// Groups of a row.
    pub groups: usize,
    /// Columns of a group: a multiple of the activations' block.
    pub group_cols: usize,
}

/// Tokens of a call that fill the registers.
pub fn tokens(simd: Simd) -> usize {
    if simd.level() == Level::Vnni { 6 } else { TOKENS }
}

/// Whether the product of `t` tokens reads activations as [`Values::Pairs`], not bytes. Bytes of codes times bytes take fewer
/// instructions than pairs as long as no unpacked pair serves a second token; codes of eight bits would overflow their sums of words.
pub fn wants_pairs(simd: Simd, tiles: &Tiles, t: usize) -> bool {
    matches!(simd.level(), Level::Avx2 | Level::Avx512) && (t > 1 || tiles.bits == 8)
}

/// `out[t][r] = W[first · 16 + r] · x[t]` for `out.len() / t` rows from tile `first` on.
///
/// Panics when shapes and slices disagree: they come from [`super::packed`], not from a file.
pub fn product(simd: Simd, m: Matrix<'_>, x: &Rounded, first: usize, out: &mut [f32]) {
    let t = x.t;
    let rows = out.len() / t.max(1);
    let (count, blocks) = (rows.div_ceil(TILE_ROWS), x.k / x.block.max(1));
    assert!(out.len() == rows * t, "tokens");
    assert!(x.k == m.groups * m.group_cols && m.group_cols.is_multiple_of(x.block), "groups");
    assert!(x.block.is_multiple_of(SLAB) && x.k == m.tiles.slabs * SLAB, "slabs");
    assert!(x.values.len() == t * x.k && x.scales.len() == t * blocks && x.sums.len() == t * blocks, "activations");
    assert!((first + count) * m.tiles.slabs * m.tiles.bits <= m.tiles.lines.len(), "tiles");
    let cells = (first + count) * m.groups * TILE_ROWS;
    assert!(cells <= m.scales.len() && m.zeros.is_none_or(|z| cells <= z.len()), "scales");
    let mut token = 0;
    while token < t {
        let count = match t - token {
            8.. if simd.level() != Level::Vnni => 8,
            6.. if simd.level() == Level::Vnni => 6,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let job = Job { m, x, first, rows, token };
        let out = &mut out[token * rows..][..count * rows];
        match m.tiles.bits {
            8 => job.dispatch::<8>(simd, count, out),
            4 => job.dispatch::<4>(simd, count, out),
            3 => job.dispatch::<3>(simd, count, out),
            _ => job.dispatch::<2>(simd, count, out),
        }
        token += count;
    }
}

/// A product whose shapes were checked: tokens from `token` on, rows from tile `first` on.
#[derive(Clone, Copy)]
struct Job<'a> {
    m: Matrix<'a>,
    x: &'a Rounded,
    first: usize,
    rows: usize,
    token: usize,
}

impl Job<'_> {
    fn dispatch<const BITS: usize>(self, simd: Simd, count: usize, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Simd` holds only levels that this machine has; `product` checked the shapes, and `out` holds `count` tokens.
        unsafe {
            match (simd.level(), &self.x.values) {
                (Level::Vnni, Values::Bytes { high, low }) => {
                    let x = (&high[..], &low[..]);
                    return match count {
                        1 => vnni::rows_vnni::<BITS, 1, 1, 2>(self, x, out),
                        2 => vnni::rows_vnni::<BITS, 2, 2, 1>(self, x, out),
                        4 => vnni::rows_vnni::<BITS, 4, 2, 1>(self, x, out),
                        _ => vnni::rows_vnni::<BITS, 6, 2, 1>(self, x, out),
                    };
                }
                (Level::Avx2 | Level::Avx512, Values::Pairs(x)) => {
                    let x = avx2::Pairs { x, stride: self.x.t, token: self.token };
                    return match count {
                        1 => avx2::rows_avx2::<_, BITS, 1, 2>(self, x, out),
                        2 => avx2::rows_avx2::<_, BITS, 2, 2>(self, x, out),
                        4 => avx2::rows_avx2::<_, BITS, 4, 2>(self, x, out),
                        _ => avx2::rows_avx2::<_, BITS, 8, 1>(self, x, out),
                    };
                }
                (Level::Avx2 | Level::Avx512, Values::Bytes { high, low }) if count == 1 && BITS < 8 => {
                    let from = self.token * self.x.k;
                    let x = avx2::Bytes { high: &high[from..], low: &low[from..] };
                    return avx2::rows_avx2::<_, BITS, 1, 2>(self, x, out);
                }
                // No such form is made (`wants_pairs`), but the twin reads both.
                _ => {}
            }
        }
        let _ = simd;
        self.portable::<BITS>(count, out);
    }

    /// The scalar twin, and the definition.
    fn portable<const BITS: usize>(self, count: usize, out: &mut [f32]) {
        let Self { m, x, first, rows, token } = self;
        let (slabs_of_block, blocks) = (x.block / SLAB, x.k / x.block);
        for (token, out) in (token..token + count).zip(out.chunks_mut(rows.max(1))) {
            for (i, out) in out.chunks_mut(TILE_ROWS).enumerate() {
                let tile = first + i;
                let mut acc = [0f32; TILE_ROWS];
                for b in 0..blocks {
                    let mut sum = [0i32; TILE_ROWS];
                    for s in b * slabs_of_block..(b + 1) * slabs_of_block {
                        let slab = &m.tiles.tile(tile)[s * BITS..][..BITS];
                        for q in 0..QUADS {
                            let v = x.values.quad((x.t, x.k), token, s * QUADS + q);
                            for (sum, word) in sum.iter_mut().zip(quad::<BITS>(slab, q)) {
                                let c = word.to_le_bytes();
                                *sum += (0..QUAD).map(|j| i32::from(c[j]) * v[j]).sum::<i32>();
                            }
                        }
                    }
                    let at = (tile * m.groups + b * x.block / m.group_cols) * TILE_ROWS;
                    let scales = m.scales.sixteen(at);
                    let (total, scale) = (x.sums[b * x.t + token], x.scales[b * x.t + token]);
                    for r in 0..TILE_ROWS {
                        let zero = i32::from(m.zeros.map_or(m.mid, |z| z[at + r]));
                        acc[r] = ((sum[r] - zero * total) as f32).mul_add(scales[r] * scale, acc[r]);
                    }
                }
                out.copy_from_slice(&acc[..out.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: &mut u64) -> f32 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// More tokens than any product takes at a time.
    const MANY: usize = 40;

    /// Every width, grouping, number of tokens and instruction set, against sums in f64 and bit for bit against the twin.
    #[test]
    fn every_instruction_set_gives_the_twins_bits() {
        let mut seed = 3;
        let shapes = [(33, 192, 64), (16, 96, 32), (50, 256, 128), (21, 160, 160)];
        for (bits, (rows, k, group)) in [2u8, 3, 4, 8].into_iter().flat_map(|b| shapes.map(|s| (b, s))) {
            let codes: Vec<u8> =
                (0..rows * k).map(|_| ((noise(&mut seed) + 1.0) * f32::from(1u16 << (bits - 1))) as u8).collect();
            let words = crate::pack::pack_rows(&codes, rows, k, bits).unwrap();
            let stream: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let tiles = Tiles::new(&stream, (rows, k), bits, crate::pack::words_for(k, bits) * 4, None).unwrap();
            let cells = rows.div_ceil(TILE_ROWS) * (k / group) * TILE_ROWS;
            let values: Vec<f32> = (0..cells).map(|_| bf16::from_f32(noise(&mut seed)).to_f32()).collect();
            let zeros: Vec<u8> = (0..cells).map(|i| (i % (1 << bits)) as u8).collect();
            for (scales, asymmetric) in [(Scales::new(values.clone()), false), (Scales::F32(values.clone()), true)] {
                let m = Matrix {
                    tiles: &tiles,
                    scales: &scales,
                    zeros: asymmetric.then_some(&zeros[..]),
                    mid: 1 << (bits - 1),
                    groups: k / group,
                    group_cols: group,
                };
                let x: Vec<f32> = (0..MANY * k).map(|_| noise(&mut seed)).collect();
                let twin = equal_for_any_number_of_tokens(m, rows, &x);
                for (i, y) in twin[..3 * rows].iter().enumerate() {
                    let (token, r) = (i / rows, i % rows);
                    let (mut want, mut size) = (0f64, 0f64);
                    for c in 0..k {
                        let at = (r / TILE_ROWS * m.groups + c / group) * TILE_ROWS + r % TILE_ROWS;
                        let zero = f64::from(if asymmetric { zeros[at] } else { m.mid });
                        let w = f64::from(values[at]) * (f64::from(codes[r * k + c]) - zero);
                        want += w * f64::from(x[token * k + c]);
                        size += w.abs();
                    }
                    assert!((f64::from(*y) - want).abs() <= size * 4e-5, "{y} {want} {size}");
                }
            }
        }
    }

    /// The twin's products with [`MANY`] tokens, which those of fewer tokens, and of later rows alone, are parts of on every
    /// instruction set.
    fn equal_for_any_number_of_tokens(m: Matrix<'_>, rows: usize, x: &[f32]) -> Vec<f32> {
        let k = x.len() / MANY;
        let run = |simd: Simd, x: &[f32], first: usize| {
            let pairs = wants_pairs(simd, m.tiles, x.len() / k);
            let rounded = Rounded::new(simd, x, k, super::super::rounded::block_of(m.group_cols), pairs);
            let mut out = vec![0f32; (rows - first * TILE_ROWS) * (x.len() / k)];
            product(simd, m, &rounded, first, &mut out);
            out
        };
        let twin = run(Simd::up_to(Level::Portable), x, 0);
        let mut levels = [Level::Avx2, Level::Avx512, Level::Vnni].map(Simd::up_to).to_vec();
        levels.dedup();
        for simd in levels {
            for t in 1..=MANY {
                let out = run(simd, &x[..t * k], 0);
                let case = format!("{:?} {} bits, {rows}×{k}, {t} tokens", simd.level(), m.tiles.bits);
                assert_eq!(out, twin[..t * rows], "{case}");
                if rows > TILE_ROWS && t % 7 == 1 {
                    let tails = out.chunks_exact(rows).flat_map(|row| &row[TILE_ROWS..]);
                    assert!(run(simd, &x[..t * k], 1).iter().eq(tails), "{case}, from the second tile on");
                }
            }
        }
        twin
    }
}
