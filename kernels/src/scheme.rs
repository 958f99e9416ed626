//! The one description of a number format: bits, symmetry, and how many input columns share a scale.

use serde::{Deserialize, Serialize};

use crate::error::{KernelError, Result};

/// How many consecutive input columns share one scale (and zero point).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupSize {
    /// This many columns.
    Cols(usize),
    /// One scale for a whole row.
    PerChannel,
}

/// An integer weight-only scheme: `w ≈ scale · (code − zero)`.
///
/// Codes are stored unsigned, `0 ..= 2^bits − 1`; a symmetric scheme has `zero = 2^(bits−1)` everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scheme {
    /// Bits of a code, 1 to 8.
    pub bits: u8,
    /// Whether the zero point is fixed at the middle of the range.
    pub symmetric: bool,
    /// Columns per scale.
    pub group: GroupSize,
}

impl Scheme {
    /// Parses `w4a16` (also `w2a16`, `w3a16`, `w8a16`) into a symmetric scheme with the given group.
    pub fn parse(name: &str, group: GroupSize, symmetric: bool) -> Result<Self> {
        let bits = match name.to_ascii_lowercase().as_str() {
            "w2a16" => 2,
            "w3a16" => 3,
            "w4a16" => 4,
            "w8a16" => 8,
            _ => return Err(KernelError::UnknownScheme(name.to_string())),
        };
        Ok(Self { bits, symmetric, group })
    }

    /// `w4a16`, without group and symmetry.
    pub fn name(&self) -> String {
        format!("w{}a16", self.bits)
    }

    /// Name with group and symmetry: `w4a16-g64`, `w8a16-channel-asym`.
    pub fn full_name(&self) -> String {
        let group = match self.group {
            GroupSize::Cols(n) => format!("g{n}"),
            GroupSize::PerChannel => "channel".to_string(),
        };
        format!("{}-{group}{}", self.name(), if self.symmetric { "" } else { "-asym" })
    }

    /// Largest stored code, `2^bits − 1`.
    pub fn max_code(&self) -> u8 {
        ((1u16 << self.bits) - 1) as u8
    }

    /// The symmetric zero point, `2^(bits−1)`.
    pub fn mid_code(&self) -> u8 {
        1u8 << (self.bits - 1)
    }

    /// Columns per group for a row of `in_features`.
    pub fn group_cols(&self, in_features: usize) -> usize {
        match self.group {
            GroupSize::Cols(n) => n,
            GroupSize::PerChannel => in_features,
        }
    }

    /// Groups in a row; fails when the group size does not divide the width.
    pub fn groups(&self, in_features: usize) -> Result<usize> {
        let cols = self.group_cols(in_features);
        if cols == 0 || !in_features.is_multiple_of(cols) {
            return Err(KernelError::NotDivisible { what: "input width", value: in_features, by: cols });
        }
        Ok(in_features / cols)
    }

    /// Bits per weight including scales (16 bits) and zero points, for rows of `in_features`.
    pub fn bits_per_weight(&self, in_features: usize) -> f64 {
        let zero_bits = if self.symmetric { 0.0 } else { f64::from(self.bits) };
        f64::from(self.bits) + (16.0 + zero_bits) / self.group_cols(in_features) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w4_g128_counts_its_scales() {
        let s = Scheme::parse("W4A16", GroupSize::Cols(128), true).unwrap();
        assert_eq!(s.bits_per_weight(4096), 4.125);
        assert_eq!(s.full_name(), "w4a16-g128");
        assert_eq!((s.max_code(), s.mid_code()), (15, 8));
        assert!(s.groups(576).is_err());
    }
}
