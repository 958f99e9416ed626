//! `--bits`, `--size`, `--fit`: a budget instead of one scheme.

use clap::Args;

/// A budget. Only one of `--bits`, `--size` and `--fit` is given.
#[derive(Args, Debug, Clone, Default)]
pub struct BudgetArgs {
    /// Average bits per weight of the blocks' linears, scales included (4.25 is what w4a16 in groups of 64 takes): each linear gets the
    /// scheme that serves the model best within it. Needs calibration data; --scheme and --group-size then name nothing.
    #[arg(long, value_name = "BITS", help_heading = "Budget", value_parser = parse_bits, conflicts_with_all = ["size", "fit"])]
    pub bits: Option<f64>,
    /// As --bits, for a size of the weight files: 5GiB, 900MB.
    #[arg(long, value_name = "BYTES", help_heading = "Budget", value_parser = parse_bytes, conflicts_with = "fit")]
    pub size: Option<u64>,
    /// As --bits, for a device's memory that has to hold the weights, and keys and values of --context tokens in 16 bits; a tenth is left
    /// for activations and the engine.
    #[arg(long, value_name = "BYTES", help_heading = "Budget", value_parser = parse_bytes, requires = "context")]
    pub fit: Option<u64>,
    /// Tokens of all sequences together: 8k is 8192.
    #[arg(long, value_name = "TOKENS", help_heading = "Budget", value_parser = parse_tokens, requires = "fit")]
    pub context: Option<u64>,
    /// What a budget may choose from: w4-g64, w8-channel, ... Default: 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128 or a scale
    /// a row. vLLM's kernels take 4 and 8 bits.
    #[arg(long, value_name = "SCHEMES", help_heading = "Budget", value_delimiter = ',')]
    pub candidates: Vec<String>,
}

fn parse_bits(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(b) if (1.0..=16.0).contains(&b) => Ok(b),
        _ => Err("expected bits per weight, 1 to 16".into()),
    }
}

/// Bytes with a unit: of 1000 (`MB`) or of 1024 (`MiB`).
fn parse_bytes(text: &str) -> Result<u64, String> {
    let wanted = || "expected bytes with a unit: 5GiB, 900MB".to_string();
    let at = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wanted)?;
    let (number, unit) = text.split_at(at);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "b" => 1u64,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(wanted()),
    };
    match number.trim().parse::<f64>() {
        Ok(n) if n > 0.0 && n.is_finite() => Ok((n * factor as f64) as u64),
        _ => Err(wanted()),
    }
}

fn parse_tokens(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.to_ascii_lowercase().strip_suffix('k') {
        Some(n) => (n.to_string(), 1024),
        None => (text.to_string(), 1),
    };
    let tokens = number.parse::<u64>().ok().filter(|n| *n > 0).and_then(|n| n.checked_mul(factor));
    tokens.ok_or_else(|| "expected tokens: 8192, or 8k".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(parse_bytes("5GiB"), Ok(5 << 30));
        assert_eq!(parse_bytes("1.5 gb"), Ok(1_500_000_000));
        assert_eq!(parse_tokens("8k"), Ok(8192));
        assert_eq!(parse_tokens("100"), Ok(100));
        assert_eq!(parse_bits("4.25"), Ok(4.25));
        for bad in ["5", "GiB", "-1GB", "0MB", "5GX"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert!(parse_tokens("0k").is_err() && parse_tokens("k").is_err());
        assert!(parse_bits("0").is_err() && parse_bits("NaN").is_err());
    }
}
