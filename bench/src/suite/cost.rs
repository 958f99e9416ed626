//! What an operation has to move and compute, from its shape alone.

use lowbit_kernels::activation::{InputCode, InputRule, InputScale};
use lowbit_kernels::{GroupSize, Scheme};
use serde::{Deserialize, Serialize};

/// Bytes of an activation or a Hessian element: f32 on every backend.
const ACTIVATION: u64 = 4;
/// Columns that share a scale in the packed rows.
pub const GROUP: usize = 128;

/// `1 token`, `4 tokens`.
pub fn tokens(n: usize) -> String {
    format!("{n} token{}", if n == 1 { "" } else { "s" })
}

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Dense bfloat16.
    Bf16,
    /// 8-bit codes, groups of [`GROUP`], symmetric.
    W8a16,
    /// 4-bit codes, groups of [`GROUP`], symmetric.
    W4a16,
    /// 8-bit codes, a scale a row, symmetric; inputs rounded to int8, a scale a token.
    W8a8,
    /// E4M3, a scale a row; inputs rounded to E4M3, a scale a token.
    Fp8,
}

impl Format {
    /// Every format, the reference first.
    pub const ALL: [Format; 5] = [Format::Bf16, Format::W8a16, Format::W4a16, Format::W8a8, Format::Fp8];

    /// `w4a16-g128`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::W8a16 => "w8a16-g128",
            Format::W4a16 => "w4a16-g128",
            Format::W8a8 => "w8a8-channel",
            Format::Fp8 => "fp8-dynamic",
        }
    }

    /// The scheme of a format of packed integers.
    pub fn scheme(self) -> Option<Scheme> {
        let (bits, group) = match self {
            Format::Bf16 | Format::Fp8 => return None,
            Format::W8a16 => (8, GroupSize::Cols(GROUP)),
            Format::W4a16 => (4, GroupSize::Cols(GROUP)),
            Format::W8a8 => (8, GroupSize::PerChannel),
        };
        Some(Scheme { bits, symmetric: true, group })
    }

    /// How inputs are rounded first.
    pub fn input(self) -> Option<InputRule> {
        let code = match self {
            Format::W8a8 => InputCode::Int8,
            Format::Fp8 => InputCode::Fp8,
            Format::Bf16 | Format::W8a16 | Format::W4a16 => return None,
        };
        Some(InputRule { code, scale: InputScale::Token })
    }

    /// Bytes of a weight `[out, in]` as stored: codes and 16-bit scales, or bfloat16.
    pub fn weight_bytes(self, out: usize, cols: usize) -> u64 {
        let cells = out as u64 * cols as u64;
        match (self, self.scheme()) {
            (Format::Fp8, _) => cells + 2 * out as u64,
            (_, None) => 2 * cells,
            (_, Some(s)) => cells * u64::from(s.bits) / 8 + 2 * out as u64 * (cols / s.group_cols(cols).max(1)) as u64,
        }
    }
}

/// An operation and its shape.
#[expect(missing_docs, reason = "the comments name the fields by their shapes")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `x · Wᵀ`, x `[tokens, cols]`, W `[out, cols]`.
    Linear { format: Format, out: usize, cols: usize, tokens: usize },
    /// Norm of every row of `[tokens, width]`.
    RmsNorm { tokens: usize, width: usize },
    /// One query token of each of `batch` sequences over `context` cached ones, `element` bytes a cached number.
    AttentionDecode { batch: usize, context: usize, heads: usize, kv_heads: usize, head_dim: usize, element: usize },
    /// A prompt of `tokens` over itself, causal; `element` bytes of a cached number.
    AttentionPrefill { tokens: usize, heads: usize, kv_heads: usize, head_dim: usize, element: usize },
    /// `h += xᵀ x`, upper triangle, x `[tokens, n]`.
    Hessian { tokens: usize, n: usize },
    /// The factor of a Hessian of `n` columns that GPTQ works with.
    Factor { n: usize },
    /// GPTQ of a matrix `[out, n]` onto four bits, groups of [`GROUP`]: scales, codes, and the way of both from and to the host.
    Gptq { out: usize, n: usize },
    /// `x += y` on `n` elements.
    Add { n: usize },
    /// A copy of `n` elements.
    Copy { n: usize },
}

impl Kernel {
    /// Name in the op vocabulary; attention says which of its two kernels is meant.
    pub fn op(&self) -> &'static str {
        match self {
            Kernel::Linear { .. } => "linear",
            Kernel::RmsNorm { .. } => "rms_norm",
            Kernel::AttentionDecode { .. } => "attention (decode)",
            Kernel::AttentionPrefill { .. } => "attention (prefill)",
            Kernel::Hessian { .. } => "hessian_update",
            Kernel::Factor { .. } => "factor",
            Kernel::Gptq { .. } => "gptq",
            Kernel::Add { .. } => "add_assign",
            Kernel::Copy { .. } => "slice_columns",
        }
    }

    /// The sizes that do not change with the batch.
    pub fn shape(&self) -> String {
        match self {
            Kernel::Linear { out, cols, .. } => format!("{out}x{cols}"),
            Kernel::RmsNorm { width, .. } => format!("{width}"),
            Kernel::AttentionDecode { context, heads, kv_heads, head_dim, .. } => {
                format!("{context} keys, {heads}/{kv_heads} heads of {head_dim}")
            }
            Kernel::AttentionPrefill { heads, kv_heads, head_dim, .. } => {
                format!("{heads}/{kv_heads} heads of {head_dim}")
            }
            Kernel::Hessian { n, .. } | Kernel::Factor { n } => format!("{n}x{n}"),
            Kernel::Gptq { out, n } => format!("{out}x{n}"),
            Kernel::Add { n } | Kernel::Copy { n } => format!("{n}"),
        }
    }

    /// Tokens of the call; 1 where it has none.
    pub fn tokens(&self) -> usize {
        match *self {
            Kernel::Linear { tokens, .. } | Kernel::RmsNorm { tokens, .. } | Kernel::Hessian { tokens, .. } => tokens,
            Kernel::AttentionDecode { batch, .. } => batch,
            Kernel::AttentionPrefill { tokens, .. } => tokens,
            Kernel::Factor { .. } | Kernel::Gptq { .. } | Kernel::Add { .. } | Kernel::Copy { .. } => 1,
        }
    }

    /// Whether it is work of a solver, which not every device has.
    pub fn is_solver(&self) -> bool {
        matches!(self, Kernel::Factor { .. } | Kernel::Gptq { .. })
    }

    /// Weight format of a linear.
    pub fn format(&self) -> Option<Format> {
        match self {
            Kernel::Linear { format, .. } => Some(*format),
            _ => None,
        }
    }

    /// Bytes the call must move: every operand read once, every result written once, the weight as stored, the rest as
    /// f32. What a kernel moves beyond that counts against it.
    pub fn bytes(&self) -> u64 {
        match *self {
            Kernel::Linear { format, out, cols, tokens } => {
                format.weight_bytes(out, cols) + ACTIVATION * tokens as u64 * (cols + out) as u64
            }
            Kernel::RmsNorm { tokens, width } => ACTIVATION * width as u64 * (2 * tokens as u64 + 1),
            Kernel::AttentionDecode { batch, context, heads, kv_heads, head_dim, element } => {
                let (cached, rows) = (element * context * kv_heads, ACTIVATION as usize * heads);
                2 * batch as u64 * head_dim as u64 * (cached + rows) as u64
            }
            Kernel::AttentionPrefill { tokens, heads, kv_heads, head_dim, element } => {
                2 * tokens as u64 * head_dim as u64 * (element * kv_heads + ACTIVATION as usize * heads) as u64
            }
            Kernel::Hessian { tokens, n } => ACTIVATION * n as u64 * (tokens + n + 1) as u64,
            // Two triangles.
            Kernel::Factor { n } => ACTIVATION * n as u64 * (n as u64 + 1),
            // The matrix, the factor, a byte a code, and scales.
            Kernel::Gptq { out, n } => {
                let (out, n) = (out as u64, n as u64);
                (ACTIVATION + 1) * out * n + ACTIVATION * (n * (n + 1) / 2 + out * n.div_ceil(GROUP as u64))
            }
            Kernel::Add { n } => 3 * ACTIVATION * n as u64,
            Kernel::Copy { n } => 2 * ACTIVATION * n as u64,
        }
    }

    /// Multiplications and additions of the products, as the maths has them (not the terms a kernel splits them into);
    /// of a norm, four an element. Softmax and unpacking are not counted.
    pub fn flops(&self) -> u64 {
        match *self {
            Kernel::Linear { out, cols, tokens, .. } => 2 * tokens as u64 * out as u64 * cols as u64,
            Kernel::RmsNorm { tokens, width } => 4 * tokens as u64 * width as u64,
            Kernel::AttentionDecode { batch, context, heads, head_dim, .. } => {
                4 * batch as u64 * context as u64 * heads as u64 * head_dim as u64
            }
            Kernel::AttentionPrefill { tokens, heads, head_dim, .. } => {
                2 * tokens as u64 * (tokens as u64 + 1) * heads as u64 * head_dim as u64
            }
            Kernel::Hessian { tokens, n } => tokens as u64 * n as u64 * (n as u64 + 1),
            // A third of n³ for the factorization, another for the triangular inverse.
            Kernel::Factor { n } => 2 * (n as u64).pow(3) / 3,
            // Every column's error moves into all later ones. The search for scales is not counted.
            Kernel::Gptq { out, n } => out as u64 * n as u64 * (n as u64).saturating_sub(1),
            Kernel::Add { n } => n as u64,
            Kernel::Copy { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::backend::HostWeight;

    use super::*;
    use crate::suite::data;

    #[test]
    fn a_linear_reads_its_weight_once_and_its_rows_as_f32() {
        // 2 rows of 256 columns: 1024 bytes of bf16; 512 or 256 of codes and 2 · 2 scales of 2 bytes.
        assert_eq!(Format::Bf16.weight_bytes(2, 256), 1024);
        assert_eq!(Format::W8a16.weight_bytes(2, 256), 512 + 8);
        assert_eq!(Format::W4a16.weight_bytes(2, 256), 256 + 8);
        // A byte a weight and a scale of 2 bytes a row.
        assert_eq!((Format::W8a8.weight_bytes(2, 256), Format::Fp8.weight_bytes(2, 256)), (516, 516));
        let k = Kernel::Linear { format: Format::W4a16, out: 2, cols: 256, tokens: 3 };
        // x: 3 · 256 · 4 = 3072; y: 3 · 2 · 4 = 24; 2 · 3 · 2 · 256 = 3072 flops.
        assert_eq!((k.bytes(), k.flops()), (264 + 3072 + 24, 3072));
        // 4.125 bits a weight: 3.88 times fewer bytes than bf16.
        let ratio = Format::Bf16.weight_bytes(4096, 4096) as f64 / Format::W4a16.weight_bytes(4096, 4096) as f64;
        assert!((ratio - 16.0 / 4.125).abs() < 1e-12);
    }

    #[test]
    fn stored_bytes_are_those_of_the_weights_that_are_timed() {
        for format in Format::ALL {
            let w = data::weight(format, 3, 256);
            assert_eq!(w.stored_bytes() as u64, format.weight_bytes(3, 256), "{}", format.name());
            assert!(matches!(w, HostWeight::Dense { .. }) == (format == Format::Bf16));
        }
    }

    #[test]
    fn hand_worked_costs_of_the_rest() {
        // x and y 2 · 3 elements each, the gain 3: 15 elements.
        let k = Kernel::RmsNorm { tokens: 2, width: 3 };
        assert_eq!((k.bytes(), k.flops()), (60, 24));
        // Each of 2 sequences: keys and values 5 · 1 · 4 each, query and result 2 · 4 each: 56 elements; q·k and p·v of
        // 2 heads over 5 keys of 4: 2 · 2 · 5 · 4 · 2 = 160 flops.
        let k = |element| Kernel::AttentionDecode { batch: 2, context: 5, heads: 2, kv_heads: 1, head_dim: 4, element };
        assert_eq!((k(4).bytes(), k(4).flops()), (2 * 56 * 4, 2 * 160));
        assert_eq!(k(2).bytes(), 2 * (40 * 2 + 16 * 4));
        // 3 tokens see 1, 2, 3 keys: 6 pairs, 4 · 4 flops each for 2 heads; 3 · 4 keys and values, 3 · 8 queries, results.
        let k = Kernel::AttentionPrefill { tokens: 3, heads: 2, kv_heads: 1, head_dim: 4, element: 2 };
        assert_eq!((k.bytes(), k.flops()), (2 * 12 * 2 + 2 * 24 * 4, 6 * 16 * 2));
        // n = 3: 6 elements of the triangle read and written, x 2 · 3: 18 elements; 6 products and sums a token.
        let k = Kernel::Hessian { tokens: 2, n: 3 };
        assert_eq!((k.bytes(), k.flops()), (72, 24));
        // Two triangles of 6; 2 · 27 / 3.
        assert_eq!((Kernel::Factor { n: 3 }.bytes(), Kernel::Factor { n: 3 }.flops()), (48, 18));
        // 6 weights of 4 bytes and 6 codes, a triangle of 6, 2 scales; 2 rows of 3 pairs of columns.
        let k = Kernel::Gptq { out: 2, n: 3 };
        assert_eq!((k.bytes(), k.flops()), (30 + 24 + 8, 12));
        assert_eq!((Kernel::Add { n: 10 }.bytes(), Kernel::Add { n: 10 }.flops()), (120, 10));
        assert_eq!((Kernel::Copy { n: 10 }.bytes(), Kernel::Copy { n: 10 }.flops()), (80, 0));
    }
}
