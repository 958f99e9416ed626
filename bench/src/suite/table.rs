//! The rows: layer shapes of Llama-3.1-8B and Qwen3-32B, norms, decode attention, and the Hessians of GPTQ.

use super::cost::{Format, Kernel, tokens};

/// Tokens of a product: decode of so many sequences at once.
pub const BATCHES: [usize; 6] = [1, 4, 8, 16, 64, 256];
/// Tokens of a prompt or of many sequences, of the formats that are compared there.
pub const PROMPTS: [usize; 3] = [128, 512, 4096];
/// Tokens of a product of codes with codes, which are timed on [`CODES_LAYERS`] of the first model only: their uploads take long.
const CODES: [usize; 4] = [1, 16, 256, 4096];
/// Layers of these.
const CODES_LAYERS: &str = "gate, up";
/// Tokens a Hessian is given at a time: one calibration window.
const WINDOW: usize = 2048;

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Model the shape is of.
    pub model: &'static str,
    /// Which of its layers: `q, o`.
    pub layers: &'static str,
    /// What is timed.
    pub kernel: Kernel,
}

impl Row {
    /// The row in words: `llama-3.1-8b q, o: linear w4a16-g128 4096x4096, 16 tokens`.
    pub fn name(&self) -> String {
        let k = &self.kernel;
        let format = k.format().map_or(String::new(), |f| format!("{} ", f.name()));
        let tokens = if k.is_solver() { String::new() } else { format!(", {}", tokens(k.tokens())) };
        format!("{} {}: {} {format}{}{tokens}", self.model, self.layers, k.op(), k.shape())
    }
}

struct Model {
    name: &'static str,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Layers of one shape together; `(layers, out, in)`.
    linears: &'static [(&'static str, usize, usize)],
}

const MODELS: [Model; 2] = [
    Model {
        name: "llama-3.1-8b",
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        linears: &[
            ("q, o", 4096, 4096),
            ("k, v", 1024, 4096),
            ("gate, up", 14336, 4096),
            ("down", 4096, 14336),
            ("head", 128_256, 4096),
        ],
    },
    Model {
        name: "qwen3-32b",
        hidden: 5120,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        linears: &[
            ("q", 8192, 5120),
            ("k, v", 1024, 5120),
            ("o", 5120, 8192),
            ("gate, up", 25600, 5120),
            ("down", 5120, 25600),
            ("head", 151_936, 5120),
        ],
    },
];

/// Every row, in the order of the run: all rows of a weight stand together, since it is made and uploaded for them.
/// `element`: bytes of a cached number.
pub fn rows(element: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    for m in &MODELS {
        for &(layers, out, cols) in m.linears {
            let codes = m.name == MODELS[0].name && layers == CODES_LAYERS;
            for format in Format::ALL.into_iter().filter(|f| codes || f.input().is_none()) {
                let mut counts = if format.input().is_none() { BATCHES.to_vec() } else { CODES.to_vec() };
                // A prompt's logits are not computed for every token.
                let head = if layers == "head" { 2 } else { PROMPTS.len() };
                if matches!(format, Format::Bf16 | Format::W4a16) {
                    counts.extend(&PROMPTS[..head]);
                }
                rows.extend(counts.into_iter().map(|tokens| {
                    let kernel = Kernel::Linear { format, out, cols, tokens };
                    Row { model: m.name, layers, kernel }
                }));
            }
        }
        rows.extend([1, 16, 256, 4096].map(|tokens| {
            let kernel = Kernel::RmsNorm { tokens, width: m.hidden };
            Row { model: m.name, layers: "norm", kernel }
        }));
        for context in [1024, 4096] {
            rows.extend([1, 16, 64].map(|batch| {
                let (heads, kv_heads, head_dim) = (m.heads, m.kv_heads, m.head_dim);
                let kernel = Kernel::AttentionDecode { batch, context, heads, kv_heads, head_dim, element };
                Row { model: m.name, layers: "attention", kernel }
            }));
        }
        let (heads, kv_heads, head_dim) = (m.heads, m.kv_heads, m.head_dim);
        let kernel = Kernel::AttentionPrefill { tokens: 4096, heads, kv_heads, head_dim, element };
        rows.push(Row { model: m.name, layers: "attention", kernel });
    }
    for (layers, out, n) in [("gate, up", 14336, 4096), ("down", 4096, 14336)] {
        let row = |kernel| Row { model: MODELS[0].name, layers, kernel };
        rows.extend([row(Kernel::Factor { n }), row(Kernel::Gptq { out, n })]);
    }
    rows.extend([("q, k, v, o, gate, up", 4096), ("down", 14336)].map(|(layers, n)| {
        let kernel = Kernel::Hessian { tokens: WINDOW, n };
        Row { model: MODELS[0].name, layers, kernel }
    }));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_there_once() {
        let rows = rows(4);
        let linears = (5 + 6) * (3 * BATCHES.len() + 2 * PROMPTS.len()) - 2 * 2 + 2 * CODES.len();
        assert_eq!(rows.len(), linears + 2 * (4 + 6 + 1) + 4 + 2);
        for (i, r) in rows.iter().enumerate() {
            assert!(!rows[..i].contains(r), "{} twice", r.name());
        }
        // Groups of 128 divide every width: the packed rows are what their names say.
        let widths = MODELS.iter().flat_map(|m| m.linears).map(|l| l.2);
        assert!({ widths }.all(|cols| cols.is_multiple_of(super::super::cost::GROUP)));
    }

    #[test]
    fn weights_add_up_to_the_models() {
        // Layers of a shape times blocks; embeddings (as large as the head) and norms come on top.
        let weights = |m: &Model, blocks: usize| -> usize {
            let of = |l: &(&str, usize, usize)| {
                let times = if l.0 == "head" { 1 } else { blocks * l.0.split(", ").count() };
                times * l.1 * l.2
            };
            m.linears.iter().map(of).sum()
        };
        // 8,030,261,248 parameters: less the embedding, less 65 norms of 4096.
        assert_eq!(weights(&MODELS[0], 32), 8_030_261_248 - 128_256 * 4096 - 65 * 4096);
        // 32,762,123,264 parameters: less the embedding, 129 norms of 5120 and 64 · 2 head norms of 128.
        assert_eq!(weights(&MODELS[1], 64), 32_762_123_264 - 151_936 * 5120 - 129 * 5120 - 64 * 2 * 128);
    }

    #[test]
    fn names_say_what_runs() {
        let rows = rows(4);
        assert_eq!(rows[0].name(), "llama-3.1-8b q, o: linear bf16 4096x4096, 1 token");
        assert!(rows.iter().any(|r| r.name() == "llama-3.1-8b down: gptq 4096x14336"));
        let last = rows.last().map(Row::name);
        assert_eq!(last.as_deref(), Some("llama-3.1-8b down: hessian_update 14336x14336, 2048 tokens"));
    }
}
