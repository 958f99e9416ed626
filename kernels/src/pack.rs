//! Packing codes into little-endian `u32` words: one dense bit stream, least significant bit first.
//!
//! compressed-tensors packs along rows (`weight_packed` `[out, ceil(in·b/32)]`), GPTQ along columns
//! (`qweight` `[in·b/32, out]`). Element `i` of a lane occupies bits `[i·b, i·b+b)`; widths that do not divide
//! 32 straddle words. Zero points: compressed-tensors packs them along rows of the transposed matrix, GPTQ along `out`.

use rayon::prelude::*;

use crate::error::{KernelError, Result, check_len};

/// Words needed for `n` codes of `bits`.
pub fn words_for(n: usize, bits: u8) -> usize {
    (n * bits as usize).div_ceil(32)
}

fn put(words: &mut [u32], stride: usize, i: usize, bits: u8, code: u8) {
    let bit = i * bits as usize;
    let (word, shift) = (bit / 32, bit % 32);
    let wide = u64::from(code) << shift;
    words[word * stride] |= wide as u32;
    if shift + bits as usize > 32 {
        words[(word + 1) * stride] |= (wide >> 32) as u32;
    }
}

fn get(words: &[u32], stride: usize, i: usize, bits: u8) -> u8 {
    let bit = i * bits as usize;
    let (word, shift) = (bit / 32, bit % 32);
    let mut wide = u64::from(words[word * stride]);
    if shift + bits as usize > 32 {
        wide |= u64::from(words[(word + 1) * stride]) << 32;
    }
    ((wide >> shift) & ((1u64 << bits) - 1)) as u8
}

/// Packs `[rows, cols]` codes along each row into `[rows, ceil(cols·bits/32)]`.
pub fn pack_rows(codes: &[u8], rows: usize, cols: usize, bits: u8) -> Result<Vec<u32>> {
    check_codes(codes, rows, cols, bits)?;
    let width = words_for(cols, bits);
    let mut out = vec![0u32; rows * width];
    if width > 0 {
        out.par_chunks_mut(width).zip(codes.par_chunks(cols)).for_each(|(words, codes)| {
            codes.iter().enumerate().for_each(|(c, code)| put(words, 1, c, bits, *code));
        });
    }
    Ok(out)
}

/// Inverse of [`pack_rows`].
pub fn unpack_rows(words: &[u32], rows: usize, cols: usize, bits: u8) -> Result<Vec<u8>> {
    let width = words_for(cols, bits);
    check_len("packed words", rows.checked_mul(width).ok_or(KernelError::Overflow("packed words"))?, words.len())?;
    let mut out = Vec::with_capacity(rows * cols);
    for r in 0..rows {
        out.extend((0..cols).map(|c| get(&words[r * width..], 1, c, bits)));
    }
    Ok(out)
}

/// Packs `[rows, cols]` codes along each column into `[ceil(rows·bits/32), cols]`.
pub fn pack_columns(codes: &[u8], rows: usize, cols: usize, bits: u8) -> Result<Vec<u32>> {
    check_codes(codes, rows, cols, bits)?;
    let mut out = vec![0u32; words_for(rows, bits) * cols];
    // 32 codes of a column are `bits` whole words, so no other task writes to them.
    let words = bits as usize * cols;
    if words > 0 {
        out.par_chunks_mut(words).zip(codes.par_chunks(32 * cols)).for_each(|(words, codes)| {
            for (r, codes) in codes.chunks(cols).enumerate() {
                codes.iter().enumerate().for_each(|(c, code)| put(&mut words[c..], cols, r, bits, *code));
            }
        });
    }
    Ok(out)
}

/// Inverse of [`pack_columns`].
pub fn unpack_columns(words: &[u32], rows: usize, cols: usize, bits: u8) -> Result<Vec<u8>> {
    check_len(
        "packed words",
        words_for(rows, bits).checked_mul(cols).ok_or(KernelError::Overflow("packed words"))?,
        words.len(),
    )?;
    let mut out = vec![0u8; rows * cols];
    for r in 0..rows {
        for c in 0..cols {
            out[r * cols + c] = get(&words[c..], cols, r, bits);
        }
    }
    Ok(out)
}

/// Words needed for `n` codes of `bits` when each word holds `floor(32 / bits)` of them and its top bits stay zero.
pub fn padded_words_for(n: usize, bits: u8) -> usize {
    n.div_ceil(32 / bits as usize)
}

/// Unpacks `[rows, padded_words_for(cols)]` words, `floor(32 / bits)` codes in each along rows: how compressed-tensors packed
/// 3, 5, 6 and 7 bits until late 2025.
pub fn unpack_rows_padded(words: &[u32], rows: usize, cols: usize, bits: u8) -> Result<Vec<u8>> {
    let width = padded_words_for(cols, bits);
    check_len("packed words", rows.checked_mul(width).ok_or(KernelError::Overflow("packed words"))?, words.len())?;
    let mut out = Vec::with_capacity(rows * cols);
    for r in 0..rows {
        out.extend((0..cols).map(|c| get_padded(&words[r * width..], 1, c, bits)));
    }
    Ok(out)
}

/// As [`unpack_rows_padded`], along columns: `[padded_words_for(rows), cols]` words.
pub fn unpack_columns_padded(words: &[u32], rows: usize, cols: usize, bits: u8) -> Result<Vec<u8>> {
    let height = padded_words_for(rows, bits);
    check_len("packed words", height.checked_mul(cols).ok_or(KernelError::Overflow("packed words"))?, words.len())?;
    let mut out = vec![0u8; rows * cols];
    for r in 0..rows {
        for c in 0..cols {
            out[r * cols + c] = get_padded(&words[c..], cols, r, bits);
        }
    }
    Ok(out)
}

fn get_padded(words: &[u32], stride: usize, i: usize, bits: u8) -> u8 {
    let per_word = 32 / bits as usize;
    let shift = i % per_word * bits as usize;
    ((words[i / per_word * stride] >> shift) & ((1u32 << bits) - 1)) as u8
}

/// Column of each nibble of an AWQ GEMM word, lowest nibble first.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Packs `[rows, cols]` 4-bit codes along each row as AWQ GEMM does: eight columns a word, even columns in the low half.
pub fn pack_rows_awq(codes: &[u8], rows: usize, cols: usize) -> Result<Vec<u32>> {
    check_codes(codes, rows, cols, 4)?;
    if !cols.is_multiple_of(8) {
        return Err(KernelError::NotDivisible { what: "AWQ columns", value: cols, by: 8 });
    }
    let word = |eight: &[u8; 8]| {
        AWQ_ORDER.iter().enumerate().fold(0u32, |w, (nibble, column)| w | u32::from(eight[*column]) << (4 * nibble))
    };
    Ok(codes.as_chunks::<8>().0.iter().map(word).collect())
}

/// Inverse of [`pack_rows_awq`].
pub fn unpack_rows_awq(words: &[u32], rows: usize, cols: usize) -> Result<Vec<u8>> {
    if !cols.is_multiple_of(8) {
        return Err(KernelError::NotDivisible { what: "AWQ columns", value: cols, by: 8 });
    }
    check_len("packed words", rows.checked_mul(cols / 8).ok_or(KernelError::Overflow("packed words"))?, words.len())?;
    let mut out = vec![0u8; rows * cols];
    for (eight, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        for (nibble, column) in AWQ_ORDER.iter().enumerate() {
            eight[*column] = (word >> (4 * nibble)) as u8 & 15;
        }
    }
    Ok(out)
}

fn check_codes(codes: &[u8], rows: usize, cols: usize, bits: u8) -> Result<()> {
    check_len("codes", rows.checked_mul(cols).ok_or(KernelError::Overflow("codes"))?, codes.len())?;
    let max = ((1u16 << bits) - 1) as u8;
    match codes.iter().position(|c| *c > max) {
        Some(index) => Err(KernelError::BadCode { index, code: codes[index], bits }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn four_bit_rows_put_column_zero_in_the_lowest_nibble() {
        let codes = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(pack_rows(&codes, 1, 8, 4).unwrap(), [0x8765_4321]);
        assert_eq!(pack_columns(&codes, 8, 1, 4).unwrap(), [0x8765_4321]);
    }

    #[test]
    fn three_bit_codes_straddle_words_as_gptq_does() {
        // word 0 = codes 0–9 and the low 2 bits of code 10; word 1 starts with its top bit.
        let mut codes = [0u8; 32];
        codes[10] = 0b101;
        codes[11] = 0b111;
        let w = pack_rows(&codes, 1, 32, 3).unwrap();
        assert_eq!(w, [0b01 << 30, 1 | (0b111 << 1), 0]);
    }

    #[test]
    fn awq_words_hold_even_columns_in_the_low_half() {
        let codes = [0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(pack_rows_awq(&codes, 1, 8).unwrap(), [0x7531_6420]);
        assert_eq!(unpack_rows_awq(&[0x7531_6420, 0x8888_8888], 2, 8).unwrap()[..8], codes);
        assert!(pack_rows_awq(&codes[..4], 1, 4).is_err());
    }

    #[test]
    fn padded_words_waste_their_top_bits() {
        // Ten 3-bit codes a word: code 10 starts the second word.
        let mut words = [0u32; 2];
        words[0] = 0b101 | 0b110 << 27;
        words[1] = 0b011;
        let codes = unpack_rows_padded(&words, 1, 11, 3).unwrap();
        assert_eq!((codes[0], codes[9], codes[10]), (0b101, 0b110, 0b011));
        assert_eq!(unpack_columns_padded(&words, 11, 1, 3).unwrap(), codes);
        assert_eq!((padded_words_for(128, 3), words_for(128, 3)), (13, 12));
    }

    #[test]
    fn a_code_too_large_is_refused_with_its_place() {
        let e = pack_rows(&[0, 16], 1, 2, 4).unwrap_err();
        assert!(matches!(e, KernelError::BadCode { index: 1, code: 16, bits: 4 }));
    }

    proptest! {
        #[test]
        fn packing_round_trips(bits in 1u8..=8, rows in 1usize..70, cols in 1usize..70, seed: u64) {
            let max = ((1u16 << bits) - 1) as u8;
            let codes: Vec<u8> = (0..rows * cols)
                .map(|i| ((seed.wrapping_mul(i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8) & max)
                .collect();
            let packed = pack_rows(&codes, rows, cols, bits).unwrap();
            prop_assert_eq!(unpack_rows(&packed, rows, cols, bits).unwrap(), codes.clone());
            let packed = pack_columns(&codes, rows, cols, bits).unwrap();
            prop_assert_eq!(unpack_columns(&packed, rows, cols, bits).unwrap(), codes);
        }
    }
}
