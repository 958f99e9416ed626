//! The layout of integer codes on this backend: tiles of sixteen rows, so that a register holds four columns of all of
//! them and a product needs no sum across lanes.
//!
//! A tile is a row of *slabs*, a slab is 16 rows by 32 columns in `bits` lines of 64 bytes. Four columns are a *quad*: one
//! register, byte `4 r + j` of it column `j` of row `r`. How the eight quads of a slab lie in its lines:
//!
//! | bits | quad q |
//! |---|---|
//! | 8 | line q |
//! | 4 | line q/2, nibble q mod 2 |
//! | 3 | the low two bits as for 2; the third in line 2, bit q |
//! | 2 | line q/4, bits 2 (q mod 4) |
//!
//! Other widths take the next larger of these. Rows and columns that do not fill a tile or a slab have code 0.

use rayon::prelude::*;

use crate::error::{KernelError, Result};

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a slab.
pub const SLAB: usize = 32;
/// Columns of a quad.
pub const QUAD: usize = 4;

/// One cache line of codes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

/// A matrix of codes, laid out.
pub struct Tiles {
    /// Bits a stored code takes: 2, 3, 4 or 8.
    pub bits: usize,
    /// Slabs of a row.
    pub slabs: usize,
    /// `[tiles, slabs, bits]`.
    pub lines: Vec<Line>,
}

impl Tiles {
    /// Lays out `rows` rows of `cols` codes of `bits` (1 to 8), read from a little-endian bit stream of `stride` bytes a row
    /// (whole words). `order[c]` is the column that is stored as the `c`-th.
    pub fn new(
        stream: &[u8],
        (rows, cols): (usize, usize),
        bits: u8,
        stride: usize,
        order: Option<&[u32]>,
    ) -> Result<Self> {
        let stored = match bits {
            0..=2 => 2,
            3 => 3,
            4 => 4,
            _ => 8,
        };
        let slabs = cols.div_ceil(SLAB);
        let per_tile = slabs * stored;
        let count = rows.div_ceil(TILE_ROWS).checked_mul(per_tile).ok_or(KernelError::Overflow("codes"))?;
        let mut lines = vec![Line([0; 64]); count];
        // A whole word of four 8-bit or eight 4-bit codes becomes a whole lane of a line.
        let whole_words = matches!(bits, 4 | 8) && order.is_none() && (cols * usize::from(bits)).is_multiple_of(32);
        lines.par_chunks_mut(per_tile.max(1)).enumerate().for_each(|(tile, lines)| {
            let mut codes = vec![0u8; cols];
            for r in 0..TILE_ROWS.min(rows - tile * TILE_ROWS) {
                let row = &stream[(tile * TILE_ROWS + r) * stride..][..stride];
                if whole_words && bits == 8 {
                    byte_words(lines, r, row);
                } else if whole_words {
                    nibble_words(lines, r, row);
                } else {
                    unpack(row, bits, order, &mut codes);
                    for (c, code) in codes.iter().enumerate() {
                        put(&mut lines[c / SLAB * stored..][..stored], stored, r, c % SLAB, *code);
                    }
                }
            }
        });
        Ok(Self { bits: stored, slabs, lines })
    }

    /// The code stored in `row` as the `col`-th.
    pub fn code(&self, row: usize, col: usize) -> u8 {
        let slab = &self.lines[(row / TILE_ROWS * self.slabs + col / SLAB) * self.bits..][..self.bits];
        let (q, at) = (col % SLAB / QUAD, row % TILE_ROWS * QUAD + col % QUAD);
        match self.bits {
            8 => slab[q].0[at],
            4 => slab[q / 2].0[at] >> (4 * (q % 2)) & 15,
            3 => (slab[q / 4].0[at] >> (2 * (q % 4)) & 3) | (slab[2].0[at] >> q & 1) << 2,
            _ => slab[q / 4].0[at] >> (2 * (q % 4)) & 3,
        }
    }

    /// The lines of a tile.
    pub fn tile(&self, tile: usize) -> &[Line] {
        let n = self.slabs * self.bits;
        &self.lines[tile * n..(tile + 1) * n]
    }
}

/// Quad `q` of a slab as sixteen little-endian words of four codes.
#[inline(always)]
pub fn quad<const BITS: usize>(slab: &[Line], q: usize) -> [u32; TILE_ROWS] {
    let word = |line: &Line, r: usize| {
        let b = &line.0;
        u32::from_le_bytes([b[4 * r], b[4 * r + 1], b[4 * r + 2], b[4 * r + 3]])
    };
    std::array::from_fn(|r| match BITS {
        8 => word(&slab[q], r),
        4 => word(&slab[q / 2], r) >> (4 * (q % 2)) & 0x0f0f_0f0f,
        3 => {
            let low = word(&slab[q / 4], r) >> (2 * (q % 4)) & 0x0303_0303;
            low | (word(&slab[2], r) >> q & 0x0101_0101) << 2
        }
        _ => word(&slab[q / 4], r) >> (2 * (q % 4)) & 0x0303_0303,
    })
}

fn put(slab: &mut [Line], stored: usize, r: usize, col: usize, code: u8) {
    let (q, at) = (col / QUAD, r * QUAD + col % QUAD);
    match stored {
        8 => slab[q].0[at] = code,
        4 => slab[q / 2].0[at] |= code << (4 * (q % 2)),
        3 => {
            slab[q / 4].0[at] |= (code & 3) << (2 * (q % 4));
            slab[2].0[at] |= (code >> 2) << q;
        }
        _ => slab[q / 4].0[at] |= code << (2 * (q % 4)),
    }
}

/// A row of 8-bit codes: word `i` holds columns `4 i ..`, as line `i` of the tile does.
fn byte_words(lines: &mut [Line], r: usize, row: &[u8]) {
    for (line, word) in lines.iter_mut().zip(row.as_chunks::<4>().0) {
        line.0[4 * r..4 * r + 4].copy_from_slice(word);
    }
}

/// A row of 4-bit codes: word `i` holds columns `8 i ..`, as line `i` of the tile does.
fn nibble_words(lines: &mut [Line], r: usize, row: &[u8]) {
    let spread = |x: u32| (x & 0xf) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
    for (line, word) in lines.iter_mut().zip(row.as_chunks::<4>().0) {
        let w = u32::from_le_bytes(*word);
        let lane = spread(w & 0xffff) | spread(w >> 16) << 4;
        line.0[4 * r..4 * r + 4].copy_from_slice(&lane.to_le_bytes());
    }
}

fn unpack(row: &[u8], bits: u8, order: Option<&[u32]>, codes: &mut [u8]) {
    let mask = (1u32 << bits) - 1;
    for (c, code) in codes.iter_mut().enumerate() {
        let bit = order.map_or(c, |o| o[c] as usize) * bits as usize;
        let low = u32::from(row[bit / 8]);
        let high = u32::from(row.get(bit / 8 + 1).copied().unwrap_or(0));
        *code = ((low | high << 8) >> (bit % 8) & mask) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{pack_rows, words_for};

    #[test]
    fn every_code_is_found_again() {
        for bits in 1..=8u8 {
            for (rows, cols) in [(16, 32), (1, 7), (35, 64), (17, 96), (20, 40)] {
                let codes: Vec<u8> = (0..rows * cols).map(|i| ((i * 37 + i / 11) % (1 << bits)) as u8).collect();
                let words = pack_rows(&codes, rows, cols, bits).unwrap();
                let stream: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                let reversed: Vec<u32> = (0..cols as u32).rev().collect();
                for order in [None, Some(&reversed[..])] {
                    let tiles = Tiles::new(&stream, (rows, cols), bits, words_for(cols, bits) * 4, order).unwrap();
                    for (i, code) in codes.iter().enumerate() {
                        let (r, c) = (i / cols, i % cols);
                        let at = if order.is_some() { cols - 1 - c } else { c };
                        assert_eq!(tiles.code(r, at), *code, "{bits} bits, {rows}×{cols}, ({r}, {c})");
                        let slab = &tiles.tile(r / TILE_ROWS)[at / SLAB * tiles.bits..][..tiles.bits];
                        let q = at % SLAB / QUAD;
                        let word = match tiles.bits {
                            2 => quad::<2>(slab, q),
                            3 => quad::<3>(slab, q),
                            4 => quad::<4>(slab, q),
                            _ => quad::<8>(slab, q),
                        }[r % TILE_ROWS];
                        assert_eq!(word.to_le_bytes()[at % QUAD], *code, "quad, {bits} bits");
                    }
                }
            }
        }
    }
}
