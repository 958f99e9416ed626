//! Sizes of a dense decoder, enough to count its bytes and operations.

use serde::Serialize;

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelShape {
    /// Name.
    pub name: String,
    /// Blocks.
    pub layers: u64,
    /// Width.
    pub hidden: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Width of the gated MLP.
    pub intermediate: u64,
    /// Tokens.
    pub vocab: u64,
    /// The head is the embedding's matrix.
    pub tied: bool,
}

/// Name, layers, hidden, heads, kv heads, head dim, intermediate, vocabulary, tied: from each model's `config.json`.
const KNOWN: &[(&str, [u64; 7], bool)] = &[
    ("llama3.1-8b", [32, 4096, 32, 8, 128, 14336, 128256], false),
    ("llama3.1-70b", [80, 8192, 64, 8, 128, 28672, 128256], false),
    ("llama3.2-1b", [16, 2048, 32, 8, 64, 8192, 128256], true),
    ("qwen2.5-7b", [28, 3584, 28, 4, 128, 18944, 152064], false),
    ("qwen2.5-72b", [80, 8192, 64, 8, 128, 29568, 152064], false),
    ("mistral-7b", [32, 4096, 32, 8, 128, 14336, 32768], false),
    ("smollm2-135m", [30, 576, 9, 3, 64, 1536, 49152], true),
];

impl ModelShape {
    /// Names of the known ones.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|k| k.0)
    }

    /// A known one; `8b` and `70b` are Llama 3.1's.
    pub fn known(name: &str) -> Option<Self> {
        let name = match name.to_ascii_lowercase().as_str() {
            "8b" => "llama3.1-8b".to_string(),
            "70b" => "llama3.1-70b".to_string(),
            other => other.to_string(),
        };
        let (name, [layers, hidden, heads, kv_heads, head_dim, intermediate, vocab], tied) =
            *KNOWN.iter().find(|k| k.0 == name)?;
        Some(Self { name: name.into(), layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, tied })
    }

    /// Weights of the blocks' linears: q, k, v, o, gate, up, down.
    pub fn linear_params(&self) -> u64 {
        let attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads);
        self.layers * (attention + 3 * self.hidden * self.intermediate)
    }

    /// The embedding, and the head where it is a matrix of its own.
    pub fn table_params(&self) -> u64 {
        self.vocab * self.hidden * if self.tied { 1 } else { 2 }
    }

    /// All, norms included.
    pub fn params(&self) -> u64 {
        self.linear_params() + self.table_params() + self.hidden * (2 * self.layers + 1)
    }

    /// Keys and values of a token in all layers, of `bytes` an element.
    pub fn kv_bytes_per_token(&self, bytes: f64) -> f64 {
        2.0 * (self.layers * self.kv_heads * self.head_dim) as f64 * bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published counts: 8.03, 70.55, 1.24 and 7.62 billion, 134.5 million. (Biases of Qwen2, 0.1 million, are left out.)
    #[test]
    fn parameters_are_the_published_ones() {
        for (name, want) in [
            ("8b", 8.030e9),
            ("70b", 70.554e9),
            ("llama3.2-1b", 1.2358e9),
            ("qwen2.5-7b", 7.6156e9),
            ("smollm2-135m", 134.5e6),
        ] {
            let got = ModelShape::known(name).unwrap().params() as f64;
            assert!((got / want - 1.0).abs() < 5e-4, "{name}: {got}");
        }
        assert_eq!(ModelShape::known("8b").unwrap().kv_bytes_per_token(2.0), 131_072.0);
        assert!(ModelShape::known("9b").is_none());
    }
}
