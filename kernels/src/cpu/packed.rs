//! Integer weights: re-laid out once, at upload, in tiles of sixteen rows ([`super::tiles`]).
//!
//! Decode multiplies codes with rounded activations ([`super::integer`]); prefill makes panels of tiles: of their codes, multiplied in
//! fixed point ([`super::fixed`]), or dequantized and multiplied in f32 ([`super::product`]).

use std::ops::Range;

use super::fixed::{self, PanelBuffer};
use super::integer::{self, Matrix, Scales};
use super::product::{self, WIDTH};
use super::rounded::{Rounded, block_of};
use super::simd::{Kernel, Lanes, Simd};
use super::tiles::{QUAD, SLAB, TILE_ROWS, Tiles, quad};
use crate::backend::PackedWeight;
use crate::error::{KernelError, Result, check_len};
use crate::pack::words_for;

/// Codes and their scales on this backend.
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    groups: usize,
    mid: u8,
    tiles: Tiles,
    /// `[tiles, groups, 16]`.
    scales: Scales,
    /// As the scales.
    zeros: Option<Vec<u8>>,
    columns: Columns,
}

/// Which group a stored column belongs to, and which column of the weight it is.
enum Columns {
    /// As in the weight, groups of equal size one after the other.
    Plain { group_cols: usize },
    /// Sorted by group: `order[c]` is the weight's column.
    Sorted { group_cols: usize, order: Vec<u32> },
    /// As in the weight, each of its own group (`g_idx` with groups of unequal size).
    Each(Vec<u32>),
}

impl PackedMatrix {
    /// Checks every length and lays the codes out.
    pub fn new(w: &PackedWeight) -> Result<Self> {
        let (rows, cols, bits) = (w.out_features, w.in_features, w.scheme.bits);
        check_weight(w)?;
        let groups = w.scheme.groups(cols)?;
        let columns = Columns::new(w.scheme.group_cols(cols), groups, w.group_index.as_deref());
        let order = match &columns {
            Columns::Sorted { order, .. } => Some(&order[..]),
            _ => None,
        };
        let tiles = Tiles::new(w.words.as_slice(), (rows, cols), bits, words_for(cols, bits) * 4, order)?;
        Ok(Self {
            rows,
            cols,
            groups,
            mid: w.scheme.mid_code(),
            tiles,
            scales: Scales::new(by_tile(&w.scales, rows, groups)),
            zeros: w.zeros.as_ref().map(|z| by_tile(z, rows, groups)),
            columns,
        })
    }

    fn zero(&self, cell: usize) -> u8 {
        self.zeros.as_ref().map_or(self.mid, |z| z[cell])
    }

    /// Rows as f32 `[rows, cols]`: `scale · (code − zero)`; `rows` within the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
            for c in 0..self.cols {
                let cell = self.cell(row, self.columns.group(c));
                let value = (f32::from(self.tiles.code(row, c)) - f32::from(self.zero(cell))) * self.scales.at(cell);
                out[self.columns.of(c)] = value;
            }
        }
    }

    fn cell(&self, row: usize, group: usize) -> usize {
        (row / TILE_ROWS * self.groups + group) * TILE_ROWS + row % TILE_ROWS
    }

    /// Whether a block of fixed point lies within a group.
    pub fn has_fixed(&self) -> bool {
        matches!(self.columns, Columns::Plain { group_cols } if group_cols.is_multiple_of(fixed::BLOCK))
    }

    /// `y = x Wᵀ` for many tokens in fixed point, which holds codes exactly: x `[t, cols]`, y `[t, rows]`; only where
    /// [`Self::has_fixed`].
    pub fn fixed(&self, simd: Simd, x: &fixed::Rows, y: &mut [f32]) -> Result<()> {
        fixed::linear(simd, y, x, self.rows, |rows, panel| {
            let tile = rows.start / TILE_ROWS;
            match self.tiles.bits {
                8 => simd.run(FixedTiles::<8> { m: self, tile, panel }),
                4 => simd.run(FixedTiles::<4> { m: self, tile, panel }),
                3 => simd.run(FixedTiles::<3> { m: self, tile, panel }),
                _ => simd.run(FixedTiles::<2> { m: self, tile, panel }),
            }
        })
    }

    /// `y = x Wᵀ` for many tokens in f32: x `[t, cols]`, y `[t, rows]`.
    pub fn panels(&self, simd: Simd, x: &[f32], t: usize, y: &mut [f32]) -> Result<()> {
        check_len("x", t * self.cols, x.len())?;
        product::linear(simd, y, x, (t, self.rows, self.cols), |rows, panel| {
            let tile = rows.start / TILE_ROWS;
            match self.tiles.bits {
                8 => simd.run(WidenTile::<8> { m: self, tile, panel }),
                4 => simd.run(WidenTile::<4> { m: self, tile, panel }),
                3 => simd.run(WidenTile::<3> { m: self, tile, panel }),
                _ => simd.run(WidenTile::<2> { m: self, tile, panel }),
            }
        })
    }

    /// Whether few tokens have a loop of their own; else they go through panels too.
    pub fn has_rows(&self) -> bool {
        self.columns.group_cols().is_some_and(|n| n.is_multiple_of(SLAB))
    }

    /// Activations `[t, cols]` in the form [`Self::rows`] reads; only where [`Self::has_rows`].
    pub fn prepare(&self, simd: Simd, x: &[f32]) -> Rounded {
        let block = block_of(self.columns.group_cols().unwrap_or(SLAB));
        let pairs = integer::wants_pairs(simd, &self.tiles, x.len() / self.cols.max(1));
        match &self.columns {
            Columns::Sorted { order, .. } => {
                let rows = x.chunks_exact(self.cols);
                let sorted: Vec<f32> = rows.flat_map(|x| order.iter().map(|c| x[*c as usize])).collect();
                Rounded::new(simd, &sorted, self.cols, block, pairs)
            }
            _ => Rounded::new(simd, x, self.cols, block, pairs),
        }
    }

    /// Whether two matrices read the same [`Self::prepare`].
    pub fn shares(&self, other: &Self, simd: Simd) -> bool {
        let kind = |m: &Self| {
            let block = m.columns.group_cols().map(block_of);
            let plain = matches!(m.columns, Columns::Plain { .. });
            plain.then_some((m.cols, block, integer::wants_pairs(simd, &m.tiles, 1)))
        };
        kind(self).is_some() && kind(self) == kind(other)
    }

    /// `out[t][r] = W[first + r] · x[t]` for some rows and few tokens; `first` a multiple of sixteen, out `[t, rows]`.
    pub fn rows(&self, simd: Simd, x: &Rounded, first: usize, out: &mut [f32]) {
        let m = Matrix {
            tiles: &self.tiles,
            scales: &self.scales,
            zeros: self.zeros.as_deref(),
            mid: self.mid,
            groups: self.groups,
            group_cols: self.columns.group_cols().unwrap_or(0),
        };
        integer::product(simd, m, x, first / TILE_ROWS, out);
    }
}

impl Columns {
    fn new(group_cols: usize, groups: usize, index: Option<&[u32]>) -> Self {
        let Some(index) = index else { return Columns::Plain { group_cols } };
        let mut order: Vec<u32> = (0..index.len() as u32).collect();
        order.sort_by_key(|c| index[*c as usize]);
        let equal = (0..groups).all(|g| index.iter().filter(|i| **i as usize == g).count() == group_cols);
        if equal { Columns::Sorted { group_cols, order } } else { Columns::Each(index.to_vec()) }
    }

    fn group_cols(&self) -> Option<usize> {
        match self {
            Columns::Plain { group_cols } | Columns::Sorted { group_cols, .. } => Some(*group_cols),
            Columns::Each(_) => None,
        }
    }

    /// The group of the `c`-th stored column.
    fn group(&self, c: usize) -> usize {
        match self {
            Columns::Plain { group_cols } | Columns::Sorted { group_cols, .. } => c / group_cols,
            Columns::Each(index) => index[c] as usize,
        }
    }

    /// The weight's column that is stored as the `c`-th.
    fn of(&self, c: usize) -> usize {
        match self {
            Columns::Sorted { order, .. } => order[c] as usize,
            _ => c,
        }
    }
}

/// `[rows, groups]` as `[tiles, groups, 16]`; rows that are missing have the default.
fn by_tile<T: Copy + Default>(values: &[T], rows: usize, groups: usize) -> Vec<T> {
    let mut out = vec![T::default(); rows.div_ceil(TILE_ROWS) * groups * TILE_ROWS];
    for (row, values) in values.chunks_exact(groups.max(1)).enumerate() {
        for (g, v) in values.iter().enumerate() {
            out[(row / TILE_ROWS * groups + g) * TILE_ROWS + row % TILE_ROWS] = *v;
        }
    }
    out
}

fn check_weight(w: &PackedWeight) -> Result<()> {
    let (rows, cols, bits) = (w.out_features, w.in_features, w.scheme.bits);
    if !(1..=8).contains(&bits) {
        let why = format!("{bits}-bit codes");
        return Err(KernelError::Unsupported { backend: "cpu", op: "upload_weight", why });
    }
    let groups = w.scheme.groups(cols)?;
    let bytes = words_for(cols, bits).checked_mul(4).and_then(|n| n.checked_mul(rows));
    check_len("packed bytes", bytes.ok_or(KernelError::Overflow("packed bytes"))?, w.words.as_slice().len())?;
    check_len("scales", rows * groups, w.scales.len())?;
    if let Some(z) = &w.zeros {
        check_len("zero points", rows * groups, z.len())?;
    }
    if let Some(index) = &w.group_index {
        check_len("g_idx", cols, index.len())?;
        if let Some(bad) = index.iter().find(|g| **g as usize >= groups) {
            return Err(KernelError::Length { what: "g_idx group", expected: groups, found: *bad as usize });
        }
    }
    Ok(())
}

/// A tile as a panel `[cols, 16]` of f32.
struct WidenTile<'a, const BITS: usize> {
    m: &'a PackedMatrix,
    tile: usize,
    panel: &'a mut [f32],
}

impl<const BITS: usize> Kernel for WidenTile<'_, BITS> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { m, tile, panel } = self;
        let panel = panel.as_chunks_mut::<WIDTH>().0;
        let mut last = usize::MAX;
        let (mut scales, mut zeros) = ([0f32; TILE_ROWS], [0f32; TILE_ROWS]);
        for (s, slab) in m.tiles.tile(tile).chunks_exact(BITS).enumerate() {
            for q in 0..SLAB / QUAD {
                let first = s * SLAB + q * QUAD;
                let words = quad::<BITS>(slab, q);
                for c in first..(first + QUAD).min(m.cols) {
                    let group = m.columns.group(c);
                    if group != last {
                        let cell = m.cell(tile * TILE_ROWS, group);
                        for r in 0..TILE_ROWS {
                            (scales[r], zeros[r]) = (m.scales.at(cell + r), f32::from(m.zero(cell + r)));
                        }
                        last = group;
                    }
                    let shift = 8 * (c - first);
                    let out = &mut panel[m.columns.of(c)];
                    for r in 0..TILE_ROWS {
                        out[r] = ((words[r] >> shift & 255) as i32 as f32 - zeros[r]) * scales[r];
                    }
                }
            }
        }
    }
}

/// Two tiles as a panel of codes less their zeros.
struct FixedTiles<'a, const BITS: usize> {
    m: &'a PackedMatrix,
    tile: usize,
    panel: &'a mut PanelBuffer,
}

impl<const BITS: usize> Kernel for FixedTiles<'_, BITS> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { m, tile, panel } = self;
        let group_cols = m.columns.group_cols().unwrap_or(fixed::BLOCK);
        if (tile + 2) * TILE_ROWS > m.rows.next_multiple_of(TILE_ROWS) {
            panel.pairs.fill(0);
            panel.scales.fill(0.0);
        }
        for (half, tile) in (tile..(tile + 2).min(m.rows.div_ceil(TILE_ROWS))).enumerate() {
            let columns = half * TILE_ROWS..(half + 1) * TILE_ROWS;
            let slabs =
                m.tiles.tile(tile).chunks_exact(BITS).zip(panel.pairs.chunks_exact_mut(SLAB / 2 * fixed::WIDTH));
            for (s, ((slab, pairs), scales)) in slabs.zip(panel.scales.chunks_exact_mut(fixed::WIDTH)).enumerate() {
                let cell = m.cell(tile * TILE_ROWS, s * SLAB / group_cols);
                let mut zeros = [0i32; TILE_ROWS];
                for (r, scale) in scales[columns.clone()].iter_mut().enumerate() {
                    (*scale, zeros[r]) = (m.scales.at(cell + r), i32::from(m.zero(cell + r)));
                }
                for (q, pairs) in pairs.chunks_exact_mut(QUAD / 2 * fixed::WIDTH).enumerate() {
                    let words = quad::<BITS>(slab, q);
                    for (p, pairs) in pairs.chunks_exact_mut(fixed::WIDTH).enumerate() {
                        for (r, pair) in pairs[columns.clone()].iter_mut().enumerate() {
                            let code = |j: usize| (words[r] >> (8 * (2 * p + j)) & 255) as i32 - zeros[r];
                            *pair = fixed::pair(code(0), code(1));
                        }
                    }
                }
            }
        }
    }
}
