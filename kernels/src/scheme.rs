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

/// What shares one scale of an E4M3 weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fp8Scale {
    /// The whole matrix.
    Tensor,
    /// A row.
    Channel,
    /// A block of rows and columns.
    Block(usize, usize),
}

/// What a linear's weight is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// Integer codes.
    Int(Scheme),
    /// E4M3.
    Fp8(Fp8Scale),
    /// E2M1 with an E4M3 scale for sixteen columns and one f32 scale for the matrix.
    Nvfp4,
    /// E2M1 with an E8M0 scale for thirty-two columns.
    Mxfp4,
}

/// What a linear's input is rounded to before the product; see [`crate::activation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputFormat {
    /// int8, a scale for each token.
    Int8Token,
    /// int8, one stored scale.
    Int8Static,
    /// E4M3, a scale for each token.
    Fp8Token,
    /// E4M3, one stored scale.
    Fp8Static,
    /// E4M3, a scale for each token and this many columns.
    Fp8Group(usize),
    /// E2M1, E4M3 scales of sixteen columns against one stored f32 scale.
    Nvfp4,
}

impl InputFormat {
    /// Whether calibration data decides a stored scale.
    pub fn is_static(self) -> bool {
        matches!(self, InputFormat::Int8Static | InputFormat::Fp8Static | InputFormat::Nvfp4)
    }

    fn name(self) -> String {
        match self {
            InputFormat::Int8Token => "int8-token".into(),
            InputFormat::Int8Static => "int8-static".into(),
            InputFormat::Fp8Token => "fp8-token".into(),
            InputFormat::Fp8Static => "fp8-static".into(),
            InputFormat::Fp8Group(n) => format!("fp8-g{n}"),
            InputFormat::Nvfp4 => "nvfp4".into(),
        }
    }
}

/// A linear's number formats: its weight's, and its input's where that is quantized too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinearScheme {
    /// The weight.
    pub weight: WeightFormat,
    /// The input; `None` leaves it as it is.
    pub input: Option<InputFormat>,
}

impl From<Scheme> for LinearScheme {
    fn from(scheme: Scheme) -> Self {
        Self { weight: WeightFormat::Int(scheme), input: None }
    }
}

/// Rows and columns of a block with one FP8 scale, as DeepSeek-V3 introduced them.
pub const FP8_BLOCK: usize = 128;

impl LinearScheme {
    /// Names [`Self::parse`] takes.
    pub const NAMES: [&'static str; 13] = [
        "w2a16",
        "w3a16",
        "w4a16",
        "w8a16",
        "w8a8",
        "w8a8-static",
        "fp8a16",
        "fp8-dynamic",
        "fp8-static",
        "fp8-block",
        "nvfp4a16",
        "nvfp4",
        "mxfp4a16",
    ];

    /// Parses a name. Group and symmetry are those of `wNa16`; the other formats fix theirs.
    pub fn parse(name: &str, group: GroupSize, symmetric: bool) -> Result<Self> {
        let lower = name.to_ascii_lowercase();
        let w8 = WeightFormat::Int(Scheme { bits: 8, symmetric: true, group: GroupSize::PerChannel });
        let (weight, input) = match lower.as_str() {
            "w8a8" => (w8, Some(InputFormat::Int8Token)),
            "w8a8-static" => (w8, Some(InputFormat::Int8Static)),
            "fp8a16" => (WeightFormat::Fp8(Fp8Scale::Channel), None),
            "fp8-dynamic" => (WeightFormat::Fp8(Fp8Scale::Channel), Some(InputFormat::Fp8Token)),
            "fp8-static" => (WeightFormat::Fp8(Fp8Scale::Tensor), Some(InputFormat::Fp8Static)),
            "fp8-block" => {
                (WeightFormat::Fp8(Fp8Scale::Block(FP8_BLOCK, FP8_BLOCK)), Some(InputFormat::Fp8Group(FP8_BLOCK)))
            }
            "nvfp4a16" => (WeightFormat::Nvfp4, None),
            "nvfp4" => (WeightFormat::Nvfp4, Some(InputFormat::Nvfp4)),
            "mxfp4a16" => (WeightFormat::Mxfp4, None),
            _ => (WeightFormat::Int(Scheme::parse(name, group, symmetric)?), None),
        };
        Ok(Self { weight, input })
    }

    /// Whether a scheme of this name has groups of any size, and zero points where they are asked for.
    pub fn has_groups(name: &str) -> bool {
        Scheme::parse(name, GroupSize::PerChannel, true).is_ok()
    }

    /// The integer scheme of the weight, where it is one.
    pub fn int(&self) -> Option<Scheme> {
        match self.weight {
            WeightFormat::Int(s) => Some(s),
            _ => None,
        }
    }

    /// Bits of a weight's code.
    pub fn code_bits(&self) -> u32 {
        match self.weight {
            WeightFormat::Int(s) => u32::from(s.bits),
            WeightFormat::Fp8(_) => 8,
            WeightFormat::Nvfp4 | WeightFormat::Mxfp4 => 4,
        }
    }

    /// One name for one meaning: `w4a16-g128`, `w8a8-channel`, `fp8-dynamic`, `nvfp4a16`; what has no name of its own is put together,
    /// as in `fp8-tensor+fp8-token`.
    pub fn full_name(&self) -> String {
        let named = |weight, input: Option<InputFormat>| Self { weight, input };
        for name in &Self::NAMES[6..] {
            if Self::parse(name, GroupSize::PerChannel, true).is_ok_and(|s| s == named(self.weight, self.input)) {
                return (*name).to_string();
            }
        }
        let weight = match self.weight {
            WeightFormat::Int(s) => match self.input {
                None => return s.full_name(),
                Some(InputFormat::Int8Token) => return s.full_name().replacen("a16", "a8", 1),
                Some(InputFormat::Int8Static) => return s.full_name().replacen("a16", "a8-static", 1),
                Some(_) => s.full_name(),
            },
            WeightFormat::Fp8(Fp8Scale::Tensor) => "fp8-tensor".into(),
            WeightFormat::Fp8(Fp8Scale::Channel) => "fp8-channel".into(),
            WeightFormat::Fp8(Fp8Scale::Block(r, c)) => format!("fp8-block{r}x{c}"),
            WeightFormat::Nvfp4 => "nvfp4".into(),
            WeightFormat::Mxfp4 => "mxfp4".into(),
        };
        self.input.map_or_else(|| weight.clone(), |i| format!("{weight}+{}", i.name()))
    }

    /// Columns that share a scale in rows of `in_features`.
    pub fn group_cols(&self, in_features: usize) -> usize {
        match self.weight {
            WeightFormat::Int(s) => s.group_cols(in_features),
            WeightFormat::Fp8(Fp8Scale::Block(_, cols)) => cols,
            WeightFormat::Fp8(_) => in_features,
            WeightFormat::Nvfp4 => crate::floats::NVFP4_GROUP,
            WeightFormat::Mxfp4 => crate::floats::MXFP4_GROUP,
        }
    }

    /// Fails where rows of `in_features` do not fall into whole groups. FP8 blocks may reach over the edge; the groups of an
    /// activation may not.
    pub fn check_width(&self, in_features: usize) -> Result<()> {
        let divides = |by: usize| match by > 0 && in_features.is_multiple_of(by) {
            true => Ok(()),
            false => Err(KernelError::NotDivisible { what: "input width", value: in_features, by }),
        };
        if !matches!(self.weight, WeightFormat::Fp8(_)) {
            divides(self.group_cols(in_features))?;
        }
        match self.input {
            Some(InputFormat::Fp8Group(n)) => divides(n),
            Some(InputFormat::Nvfp4) => divides(crate::floats::NVFP4_GROUP),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_comes_back_and_says_one_thing() {
        let mut seen = Vec::new();
        for name in LinearScheme::NAMES {
            let s = LinearScheme::parse(&name.to_uppercase(), GroupSize::Cols(128), true).unwrap();
            assert!(!seen.contains(&s), "{name}");
            seen.push(s);
            let full = s.full_name();
            assert!(full.starts_with(name) || name.starts_with("w8a8"), "{name} {full}");
        }
        let full = |name| LinearScheme::parse(name, GroupSize::Cols(128), true).unwrap().full_name();
        assert_eq!((full("w8a8").as_str(), full("w8a8-static").as_str()), ("w8a8-channel", "w8a8-static-channel"));
        assert_eq!((full("w4a16").as_str(), full("nvfp4").as_str()), ("w4a16-g128", "nvfp4"));
        let other = LinearScheme { weight: WeightFormat::Fp8(Fp8Scale::Tensor), input: Some(InputFormat::Fp8Token) };
        assert_eq!(other.full_name(), "fp8-tensor+fp8-token");
        assert!(LinearScheme::parse("fp9", GroupSize::PerChannel, true).is_err());
    }

    #[test]
    fn widths_must_hold_whole_groups() {
        let check = |name, width| LinearScheme::parse(name, GroupSize::Cols(128), true).unwrap().check_width(width);
        assert!(check("nvfp4a16", 48).is_ok() && check("nvfp4", 40).is_err() && check("mxfp4a16", 48).is_err());
        assert!(check("fp8-static", 7).is_ok() && check("fp8-block", 256).is_ok() && check("fp8-block", 576).is_err());
        assert!(check("w4a16", 576).is_err());
    }

    #[test]
    fn w4_g128_counts_its_scales() {
        let s = Scheme::parse("W4A16", GroupSize::Cols(128), true).unwrap();
        assert_eq!(s.bits_per_weight(4096), 4.125);
        assert_eq!(s.full_name(), "w4a16-g128");
        assert_eq!((s.max_code(), s.mid_code()), (15, 8));
        assert!(s.groups(576).is_err());
    }
}
