//! Block formats of GGUF files, as ggml defines them: a row is cut into blocks of 32 or 256 weights that carry their scales.
//!
//! | type | weights | bytes | value |
//! |---|---|---|---|
//! | `Q4_0`, `Q5_0` | 32 | 18, 22 | `d · (q − 8)`, `d · (q − 16)` |
//! | `Q8_0` | 32 | 34 | `d · q` |
//! | `Q4_K` | 8 × 32 | 144 | `(d · sc) · q − dmin · m`, 4-bit q, 6-bit sc and m |
//! | `Q6_K` | 16 × 16 | 210 | `(d · sc) · (q − 32)`, 6-bit q, 8-bit signed sc |
//!
//! `d` and `dmin` are f16 and may be negative. The first three are symmetric integer schemes with groups of 32, so that codes
//! and scales of a [`QuantizedMatrix`] go in and come out as they are. The other two are fitted by [`k_quants`].

pub mod k_quants;

use half::{bf16, f16};

use crate::error::{KernelError, Result, check_len};
use crate::quantized::QuantizedMatrix;
use crate::scheme::{GroupSize, Scheme};
use k_quants::SuperBlock;

/// How a tensor is stored in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// f32.
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
    /// 4 bits, groups of 32.
    Q4_0,
    /// 5 bits, groups of 32.
    Q5_0,
    /// 8 bits, groups of 32.
    Q8_0,
    /// 4 bits with minima, super-blocks of 256.
    Q4K,
    /// 6 bits, super-blocks of 256.
    Q6K,
}

impl GgmlType {
    /// ggml's number for it.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q5_0 => 6,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    /// ggml's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q5_0 => "Q5_0",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Weights and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q5_0 => (32, 22),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
        }
    }

    /// Whether rows of `cols` are whole blocks.
    pub fn fits(self, cols: usize) -> bool {
        cols.is_multiple_of(self.block().0)
    }

    /// Bytes of `[rows, cols]`; `cols` must fit.
    pub fn bytes(self, rows: usize, cols: usize) -> Result<usize> {
        let (weights, bytes) = self.block();
        if !self.fits(cols) {
            return Err(KernelError::NotDivisible { what: "row width", value: cols, by: weights });
        }
        rows.checked_mul(cols / weights).and_then(|n| n.checked_mul(bytes)).ok_or(KernelError::Overflow("GGUF tensor"))
    }

    /// The type that takes its place for rows it does not fit, as llama.cpp chooses: `Q4_K` → `Q5_0`, `Q6_K` → `Q8_0`, and f16
    /// where blocks of 32 do not fit either.
    pub fn for_width(self, cols: usize) -> Self {
        let small = match self {
            Self::Q4K => Self::Q5_0,
            Self::Q6K => Self::Q8_0,
            other => other,
        };
        [self, small].into_iter().find(|t| t.fits(cols)).unwrap_or(Self::F16)
    }

    /// The integer scheme whose codes and f16 scales it stores as they are.
    pub fn scheme(self) -> Option<Scheme> {
        let bits = match self {
            Self::Q4_0 => 4,
            Self::Q5_0 => 5,
            Self::Q8_0 => 8,
            _ => return None,
        };
        Some(Scheme { bits, symmetric: true, group: GroupSize::Cols(32) })
    }

    /// Bits a weight takes.
    pub fn bits_per_weight(self) -> f64 {
        let (weights, bytes) = self.block();
        8.0 * bytes as f64 / weights as f64
    }
}

/// Blocks of a matrix whose scheme is that of `Q4_0`, `Q5_0` or `Q8_0`: the very codes, the very scales.
pub fn encode_codes(kind: GgmlType, q: &QuantizedMatrix) -> Result<Vec<u8>> {
    q.validate()?;
    if kind.scheme() != Some(q.scheme) || q.group_index.is_some() {
        return Err(KernelError::Unsupported {
            backend: "GGUF",
            op: kind.name(),
            why: format!("codes of {} do not fit", q.scheme.full_name()),
        });
    }
    let groups = q.scheme.groups(q.in_features)?;
    let mut out = Vec::with_capacity(kind.bytes(q.out_features, q.in_features)?);
    for (i, (codes, scale)) in q.codes.as_chunks::<32>().0.iter().zip(&q.scales).enumerate() {
        let d = f16::from_f32(*scale);
        if d.to_f32() != *scale {
            return Err(KernelError::BadScale { row: i / groups, group: i % groups, value: *scale });
        }
        out.extend(d.to_le_bytes());
        match kind {
            GgmlType::Q8_0 => out.extend(codes.map(|c| c.wrapping_sub(128))),
            _ => {
                if kind == GgmlType::Q5_0 {
                    let high = codes.iter().enumerate().fold(0u32, |h, (i, c)| h | u32::from(c >> 4) << i);
                    out.extend(high.to_le_bytes());
                }
                out.extend((0..16).map(|i| (codes[i] & 15) | (codes[i + 16] & 15) << 4));
            }
        }
    }
    Ok(out)
}

/// Codes and scales of `Q4_0`, `Q5_0` or `Q8_0` blocks `[rows, cols]`.
pub fn decode_codes(kind: GgmlType, data: &[u8], rows: usize, cols: usize) -> Result<QuantizedMatrix> {
    let scheme = kind.scheme().ok_or_else(|| KernelError::Unsupported {
        backend: "GGUF",
        op: kind.name(),
        why: "it has no integer codes of one scale each".into(),
    })?;
    check_len("GGUF blocks", kind.bytes(rows, cols)?, data.len())?;
    let mut codes = Vec::with_capacity(rows * cols);
    let mut scales = Vec::with_capacity(rows * cols / 32);
    for block in data.chunks_exact(kind.block().1) {
        scales.push(half_at(block, 0));
        match kind {
            GgmlType::Q8_0 => codes.extend(block[2..].iter().map(|c| c.wrapping_add(128))),
            _ => {
                let (low, high) = match kind {
                    GgmlType::Q5_0 => (&block[6..], u32::from_le_bytes([block[2], block[3], block[4], block[5]])),
                    _ => (&block[2..], 0),
                };
                let bit = |i: usize| ((high >> i & 1) as u8) << 4;
                codes.extend((0..16).map(|i| (low[i] & 15) | bit(i)));
                codes.extend((0..16).map(|i| (low[i] >> 4) | bit(i + 16)));
            }
        }
    }
    let q = QuantizedMatrix {
        scheme,
        out_features: rows,
        in_features: cols,
        codes,
        scales,
        zeros: None,
        group_index: None,
    };
    q.validate()?;
    Ok(q)
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Values of `[rows, cols]`, every operation in f32 as ggml does it.
pub fn decode(kind: GgmlType, data: &[u8], rows: usize, cols: usize) -> Result<Vec<f32>> {
    check_len("GGUF blocks", kind.bytes(rows, cols)?, data.len())?;
    Ok(match kind {
        GgmlType::F32 => data.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
        GgmlType::F16 => data.as_chunks::<2>().0.iter().map(|c| f16::from_le_bytes(*c).to_f32()).collect(),
        GgmlType::Bf16 => data.as_chunks::<2>().0.iter().map(|c| bf16::from_le_bytes(*c).to_f32()).collect(),
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => decode_codes(kind, data, rows, cols)?.dequantize()?,
        GgmlType::Q4K | GgmlType::Q6K => {
            let mut out = Vec::with_capacity(rows * cols);
            for block in data.chunks_exact(kind.block().1) {
                let (grid, codes) = SuperBlock::unpack(kind, block)?;
                out.extend(grid.values(&codes));
            }
            out
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_worked_blocks() {
        let mut codes: Vec<u8> = (0..32).map(|i| i % 16).collect();
        codes[17] = 9;
        let scheme = GgmlType::Q4_0.scheme().unwrap();
        let mut q = QuantizedMatrix {
            scheme,
            out_features: 1,
            in_features: 32,
            codes,
            scales: vec![-0.5],
            zeros: None,
            group_index: None,
        };
        let bytes = encode_codes(GgmlType::Q4_0, &q).unwrap();
        // f16 −0.5, then element 0 with 16, 1 with 17, ...
        assert_eq!(bytes[..4], [0x00, 0xb8, 0x00, 0x91]);
        assert_eq!(decode_codes(GgmlType::Q4_0, &bytes, 1, 32).unwrap(), q);
        assert_eq!(decode(GgmlType::Q4_0, &bytes, 1, 32).unwrap()[..2], [4.0, 3.5]);

        q.scheme = GgmlType::Q5_0.scheme().unwrap();
        q.codes[31] = 31;
        let bytes = encode_codes(GgmlType::Q5_0, &q).unwrap();
        assert_eq!((&bytes[2..6], bytes[21]), (&[0, 0, 0, 0x80][..], 0xff));
        assert_eq!(decode_codes(GgmlType::Q5_0, &bytes, 1, 32).unwrap(), q);

        q.scheme = GgmlType::Q8_0.scheme().unwrap();
        q.codes[0] = 255;
        let bytes = encode_codes(GgmlType::Q8_0, &q).unwrap();
        assert_eq!(bytes[2..4], [127, 129]);
        assert_eq!(decode_codes(GgmlType::Q8_0, &bytes, 1, 32).unwrap(), q);

        assert!(encode_codes(GgmlType::Q4_0, &q).is_err());
        q.scales[0] = 0.1;
        assert!(matches!(encode_codes(GgmlType::Q8_0, &q), Err(KernelError::BadScale { .. })), "not an f16");
        assert!(decode(GgmlType::Q8_0, &bytes[1..], 1, 32).is_err());
    }

    #[test]
    fn widths_fall_back_as_llama_cpp_does() {
        use GgmlType::*;
        let of = |t: GgmlType, n| t.for_width(n);
        assert_eq!((of(Q4K, 512), of(Q4K, 576), of(Q6K, 576), of(Q6K, 40)), (Q4K, Q5_0, Q8_0, F16));
        assert_eq!((Q4K.bits_per_weight(), Q6K.bits_per_weight(), Q4_0.bits_per_weight()), (4.5, 6.5625, 4.5));
        assert!(Q4K.bytes(2, 300).is_err());
    }
}
