//! Fitting super-blocks of 256 weights: scales (and minima) of sub-blocks, themselves stored in 6 or 8 bits.
//!
//! A sub-block's best scale and minimum are searched in floats first, by weighted least squares over a row of candidate grids;
//! then they are rounded to multiples of the super-block's `d` and `dmin`, and the neighbours of the rounded pair are tried
//! with the values as they will be read.

use half::f16;

use super::{GgmlType, half_at};
use crate::error::{KernelError, Result, check_len};

/// Weights of a super-block.
pub const SUPER: usize = 256;

/// The grid of one super-block: everything but its codes. A value is `scale(j) · code − offset(j)` in sub-block `j`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuperBlock {
    kind: GgmlType,
    d: f16,
    /// Zero in `Q6_K`.
    dmin: f16,
    /// 6 bits unsigned in the first 8 (`Q4_K`), or 8 bits signed (`Q6_K`).
    scales: [i16; 16],
    /// 6 bits (`Q4_K`).
    mins: [u8; 8],
}

/// Weights of a sub-block and the largest code.
fn shape(kind: GgmlType) -> (usize, u8) {
    if kind == GgmlType::Q4K { (32, 15) } else { (16, 63) }
}

/// Code for a zero weight in `Q6_K`.
const MIDDLE: f32 = 32.0;

impl SuperBlock {
    /// Weights of a sub-block.
    pub fn sub(&self) -> usize {
        shape(self.kind).0
    }

    /// Largest code.
    pub fn max_code(&self) -> u8 {
        shape(self.kind).1
    }

    /// Scale of sub-block `j`; exact in f32.
    pub fn scale(&self, j: usize) -> f32 {
        self.d.to_f32() * f32::from(self.scales[j])
    }

    /// What is subtracted in sub-block `j`; exact in f32.
    pub fn offset(&self, j: usize) -> f32 {
        match self.kind {
            GgmlType::Q4K => self.dmin.to_f32() * f32::from(self.mins[j]),
            _ => MIDDLE * self.scale(j),
        }
    }

    /// Nearest codes.
    pub fn codes(&self, x: &[f32; SUPER]) -> [u8; SUPER] {
        let mut codes = [0u8; SUPER];
        let (sub, top) = (self.sub(), f32::from(self.max_code()));
        for (j, (codes, x)) in codes.chunks_exact_mut(sub).zip(x.chunks_exact(sub)).enumerate() {
            let (scale, offset) = (self.scale(j), self.offset(j));
            for (c, x) in codes.iter_mut().zip(x) {
                *c = code(*x, scale, offset, top) as u8;
            }
        }
        codes
    }

    /// What the codes stand for.
    pub fn values(&self, codes: &[u8; SUPER]) -> [f32; SUPER] {
        std::array::from_fn(|i| {
            let (scale, code) = (self.scale(i / self.sub()), f32::from(codes[i]));
            match self.kind {
                GgmlType::Q4K => scale * code - self.offset(i / self.sub()),
                // The same number, and the sign of a zero is ggml's.
                _ => scale * (code - MIDDLE),
            }
        })
    }

    /// The bytes of the block.
    pub fn pack(&self, codes: &[u8; SUPER]) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.kind.block().1);
        if self.kind == GgmlType::Q4K {
            out.extend(self.d.to_le_bytes());
            out.extend(self.dmin.to_le_bytes());
            let s = |j: usize| self.scales[j] as u8;
            let m = &self.mins;
            out.extend((0..4).map(|j| s(j) | s(j + 4) >> 4 << 6));
            out.extend((0..4).map(|j| m[j] | m[j + 4] >> 4 << 6));
            out.extend((4..8).map(|j| (s(j) & 15) | (m[j] & 15) << 4));
            for chunk in codes.as_chunks::<64>().0 {
                out.extend((0..32).map(|i| chunk[i] | chunk[i + 32] << 4));
            }
        } else {
            let halves = codes.as_chunks::<128>().0;
            for c in halves {
                out.extend((0..64).map(|i| (c[i] & 15) | (c[i + 64] & 15) << 4));
            }
            for c in halves {
                let high = |i: usize| c[i] >> 4;
                out.extend((0..32).map(|i| high(i) | high(i + 32) << 2 | high(i + 64) << 4 | high(i + 96) << 6));
            }
            out.extend(self.scales.iter().map(|s| *s as i8 as u8));
            out.extend(self.d.to_le_bytes());
        }
        out
    }

    /// Grid and codes of a block.
    pub fn unpack(kind: GgmlType, block: &[u8]) -> Result<(Self, [u8; SUPER])> {
        check_len("GGUF block", kind.block().1, block.len())?;
        let mut codes = [0u8; SUPER];
        let (mut scales, mut mins) = ([0i16; 16], [0u8; 8]);
        let (d, dmin);
        if kind == GgmlType::Q4K {
            (d, dmin) = (half_at(block, 0), half_at(block, 2));
            let (a, rest) = (&block[4..8], &block[8..]);
            for j in 0..4 {
                (scales[j], mins[j]) = (i16::from(a[j] & 63), rest[j] & 63);
                scales[j + 4] = i16::from((rest[j + 4] & 15) | a[j] >> 6 << 4);
                mins[j + 4] = rest[j + 4] >> 4 | rest[j] >> 6 << 4;
            }
            for (chunk, bytes) in codes.as_chunks_mut::<64>().0.iter_mut().zip(block[16..].as_chunks::<32>().0) {
                for (i, b) in bytes.iter().enumerate() {
                    (chunk[i], chunk[i + 32]) = (b & 15, b >> 4);
                }
            }
        } else {
            (d, dmin) = (half_at(block, 208), 0.0);
            for (s, b) in scales.iter_mut().zip(&block[192..208]) {
                *s = i16::from(*b as i8);
            }
            for (h, c) in codes.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let (low, high) = (&block[64 * h..], &block[128 + 32 * h..]);
                for i in 0..128 {
                    let nibble = if i < 64 { low[i] & 15 } else { low[i - 64] >> 4 };
                    c[i] = nibble | (high[i % 32] >> (i / 32 * 2) & 3) << 4;
                }
            }
        }
        if !(d.is_finite() && dmin.is_finite()) {
            return Err(KernelError::BadScale { row: 0, group: 0, value: if d.is_finite() { dmin } else { d } });
        }
        Ok((Self { kind, d: f16::from_f32(d), dmin: f16::from_f32(dmin), scales, mins }, codes))
    }

    /// The grid for `x` with the least `Σ weight · error²` that the search finds. Weights are not negative; where all of a
    /// sub-block are zero they count as ones. Fails where a scale is beyond f16.
    pub fn fit(kind: GgmlType, x: &[f32; SUPER], weight: &[f32; SUPER]) -> Result<Self> {
        let (sub, top) = shape(kind);
        let mut fitted = [(0f32, 0f32); 16];
        let mut weight = *weight;
        for (fit, (x, w)) in fitted.iter_mut().zip(x.chunks_exact(sub).zip(weight.chunks_exact_mut(sub))) {
            if w.iter().all(|w| *w == 0.0) {
                w.fill(1.0);
            }
            *fit = if kind == GgmlType::Q4K { affine(x, w, f32::from(top)) } else { (symmetric(x, w), 0.0) };
        }
        let mut grid = Self { kind, d: f16::ZERO, dmin: f16::ZERO, scales: [0; 16], mins: [0; 8] };
        let signed_extreme = fitted.iter().map(|f| f.0).fold(0f32, |a, s| if s.abs() > a.abs() { s } else { a });
        let (lo, hi, at_extreme) = if kind == GgmlType::Q4K { (0f32, 63f32, 63f32) } else { (-128.0, 127.0, -128.0) };
        let d = signed_extreme / at_extreme;
        let dmin = fitted.iter().map(|f| f.1).fold(0f32, f32::max) / 63.0;
        (grid.d, grid.dmin) = (f16::from_f32(d), f16::from_f32(dmin));
        if !(grid.d.is_finite() && grid.dmin.is_finite()) {
            return Err(KernelError::BadScale { row: 0, group: 0, value: d.max(dmin) });
        }
        let steps = |value: f32, unit: f16, lo: f32, hi: f32| {
            let unit = unit.to_f32();
            if unit == 0.0 { 0.0 } else { (value / unit).round_ties_even().clamp(lo, hi) }
        };
        for (j, (x, w)) in x.chunks_exact(sub).zip(weight.chunks_exact(sub)).enumerate() {
            let s0 = steps(fitted[j].0, grid.d, lo, hi);
            let m0 = if kind == GgmlType::Q4K { steps(fitted[j].1, grid.dmin, 0.0, 63.0) } else { 0.0 };
            let mut best = (f32::INFINITY, s0, m0);
            let reach = if kind == GgmlType::Q4K { 2i8 } else { 0 };
            // The rounded pair itself first: it wins ties.
            for dm in [0i8, 1, -1, 2, -2].into_iter().filter(|m| m.abs() <= reach) {
                for ds in [0i8, 1, -1, 2, -2] {
                    let (s, m) = (s0 + f32::from(ds), m0 + f32::from(dm));
                    if !(lo..=hi).contains(&s) || !(0.0..=63.0).contains(&m) {
                        continue;
                    }
                    let scale = grid.d.to_f32() * s;
                    let offset = if kind == GgmlType::Q4K { grid.dmin.to_f32() * m } else { MIDDLE * scale };
                    let error = error(x, w, scale, offset, f32::from(top));
                    if error < best.0 {
                        best = (error, s, m);
                    }
                }
            }
            grid.scales[j] = best.1 as i16;
            if let Some(m) = grid.mins.get_mut(j) {
                *m = best.2 as u8;
            }
        }
        Ok(grid)
    }
}

#[inline]
fn code(x: f32, scale: f32, offset: f32, top: f32) -> f32 {
    let c = ((x + offset) / scale).round_ties_even();
    if c.is_nan() { 0.0 } else { c.clamp(0.0, top) }
}

/// `Σ weight · (x − value)²` under nearest codes.
fn error(x: &[f32], weight: &[f32], scale: f32, offset: f32, top: f32) -> f32 {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut sums = [0f32; 16];
    for (x, w) in x.as_chunks::<16>().0.iter().zip(weight.as_chunks::<16>().0) {
        for l in 0..16 {
            let c = ((x[l] + offset) * inverse).round_ties_even().clamp(0.0, top);
            let e = x[l] - (scale * c - offset);
            sums[l] += w[l] * (e * e);
        }
    }
    sums.iter().sum()
}

/// Steps of the candidate grids, as a share of the range's steps that are clipped or left free.
fn candidates() -> impl Iterator<Item = f32> {
    (-10i8..=10).map(|k| f32::from(k) / 10.0)
}

/// Scale and minus minimum (both ≥ 0) of a sub-block.
fn affine(x: &[f32], weight: &[f32], top: f32) -> (f32, f32) {
    let min = x.iter().copied().fold(0f32, f32::min);
    let max = x.iter().copied().fold(min, f32::max);
    if max <= min {
        return (0.0, -min);
    }
    let range = max - min;
    let mut best = (range / top, -min);
    let mut least = error(x, weight, best.0, best.1, top);
    for k in candidates() {
        let inverse = (top + k) / range;
        let (mut sw, mut sq, mut sqq, mut sx, mut sqx) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for (x, w) in x.iter().zip(weight) {
            let q = f64::from(((x - min) * inverse).round_ties_even().clamp(0.0, top));
            let (x, w) = (f64::from(*x), f64::from(*w));
            sw += w;
            sq += w * q;
            sqq += w * q * q;
            sx += w * x;
            sqx += w * q * x;
        }
        let det = sw * sqq - sq * sq;
        let (mut scale, mut low) = ((sw * sqx - sx * sq) / det, (sqq * sx - sq * sqx) / det);
        if low > 0.0 {
            (scale, low) = (sqx / sqq, 0.0);
        }
        let (scale, offset) = (scale as f32, -low as f32);
        if !(scale.is_finite() && offset.is_finite() && scale > 0.0) {
            continue;
        }
        let e = error(x, weight, scale, offset, top);
        if e < least {
            (best, least) = ((scale, offset), e);
        }
    }
    best
}

/// Scale of a `Q6_K` sub-block; negative where the weight of largest magnitude is positive, which then takes code 0.
fn symmetric(x: &[f32], weight: &[f32]) -> f32 {
    let extreme = x.iter().copied().fold(0f32, |a, v| if v.abs() > a.abs() { v } else { a });
    if extreme == 0.0 {
        return 0.0;
    }
    let mut best = (0f64, -extreme / MIDDLE);
    for k in candidates() {
        let inverse = -(MIDDLE + k) / extreme;
        let (mut sxq, mut sqq) = (0f64, 0f64);
        for (x, w) in x.iter().zip(weight) {
            let q = f64::from((x * inverse).round_ties_even().clamp(-32.0, 31.0));
            sxq += f64::from(*w) * f64::from(*x) * q;
            sqq += f64::from(*w) * q * q;
        }
        // The squared error falls by sxq² / sqq.
        let gain = sxq * sxq / sqq;
        let scale = (sxq / sqq) as f32;
        if gain > best.0 && scale.is_finite() {
            best = (gain, scale);
        }
    }
    best.1
}

/// Blocks of a row, each weight rounded to nearest. `weight` are the importances of the row's columns.
pub fn encode_row(kind: GgmlType, row: &[f32], weight: &[f32]) -> Result<Vec<u8>> {
    check_len("importances", row.len(), weight.len())?;
    let mut out = Vec::with_capacity(kind.bytes(1, row.len())?);
    for (x, w) in row.as_chunks::<SUPER>().0.iter().zip(weight.as_chunks::<SUPER>().0) {
        let grid = SuperBlock::fit(kind, x, w)?;
        out.extend(grid.pack(&grid.codes(x)));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::decode;

    const KINDS: [GgmlType; 2] = [GgmlType::Q4K, GgmlType::Q6K];

    /// Numbers from −1 to 1.
    fn noise(mut seed: u64) -> impl FnMut() -> f32 {
        move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
    }

    fn weights(seed: u64) -> [f32; SUPER] {
        let mut next = noise(seed);
        std::array::from_fn(|_| next().powi(3))
    }

    #[test]
    fn packing_round_trips() {
        for kind in KINDS {
            let mut next = noise(1);
            let x = weights(2);
            let grid = SuperBlock::fit(kind, &x, &[1.0; SUPER]).unwrap();
            let codes: [u8; SUPER] = std::array::from_fn(|_| (next().abs() * f32::from(grid.max_code())).round() as u8);
            let bytes = grid.pack(&codes);
            assert_eq!(bytes.len(), kind.block().1);
            assert_eq!(SuperBlock::unpack(kind, &bytes).unwrap(), (grid, codes));
        }
    }

    #[test]
    fn values_on_the_grid_come_back() {
        for kind in KINDS {
            let grid = SuperBlock::fit(kind, &weights(3), &[1.0; SUPER]).unwrap();
            let codes = grid.codes(&weights(3));
            assert_eq!(grid.codes(&grid.values(&codes)), codes, "{kind:?}");
        }
    }

    #[test]
    fn the_error_is_that_of_the_width_and_importances_move_it() {
        for (kind, limit) in [(GgmlType::Q4K, 0.09), (GgmlType::Q6K, 0.025)] {
            let (mut error, mut norm, mut at_heavy, mut at_heavy_plain) = (0f64, 0f64, 0f64, 0f64);
            for seed in 0..20 {
                let x = weights(seed);
                let heavy: [f32; SUPER] = std::array::from_fn(|i| if i % 4 == 0 { 100.0 } else { 1.0 });
                let plain = encode_row(kind, &x, &[1.0; SUPER]).unwrap();
                let weighted = encode_row(kind, &x, &heavy).unwrap();
                let (plain, weighted) =
                    (decode(kind, &plain, 1, SUPER).unwrap(), decode(kind, &weighted, 1, SUPER).unwrap());
                for i in 0..SUPER {
                    error += f64::from(x[i] - plain[i]).powi(2);
                    norm += f64::from(x[i]).powi(2);
                    if i % 4 == 0 {
                        at_heavy += f64::from(x[i] - weighted[i]).powi(2);
                        at_heavy_plain += f64::from(x[i] - plain[i]).powi(2);
                    }
                }
            }
            let relative = (error / norm).sqrt();
            assert!(relative < limit, "{kind:?}: {relative}");
            assert!(at_heavy < 0.9 * at_heavy_plain, "{kind:?}: {at_heavy} {at_heavy_plain}");
        }
    }

    #[test]
    fn odd_blocks() {
        for kind in KINDS {
            for x in [[0f32; SUPER], [-3.0; SUPER], [2.5; SUPER]] {
                let bytes = encode_row(kind, &x, &[0.0; SUPER]).unwrap();
                let back = decode(kind, &bytes, 1, SUPER).unwrap();
                assert!(
                    back.iter().zip(&x).all(|(a, b)| (a - b).abs() <= 0.02 * b.abs()),
                    "{kind:?} {} {}",
                    x[0],
                    back[0]
                );
            }
            assert!(encode_row(kind, &[1e9; SUPER], &[1.0; SUPER]).is_err(), "beyond f16");
            assert!(encode_row(kind, &[0.0; 100], &[0.0; 100]).is_err());
            assert!(SuperBlock::unpack(kind, &[0; 7]).is_err());
            let mut nan = vec![0u8; kind.block().1];
            let at = if kind == GgmlType::Q4K { 0 } else { 208 };
            nan[at + 1] = 0x7e;
            assert!(SuperBlock::unpack(kind, &nan).is_err());
        }
    }
}
