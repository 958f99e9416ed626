//! Named workloads: how long prompts and answers are.
//!
//! Lengths are truncated normal, whole numbers, seeded. Means come from GuideLLM's scenario files and llm-d-planner's
//! tables; the standard deviations of chat (25 %) and RAG (12.5 %) from GuideLLM's, the others take chat's.

use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

use crate::load::error::{LoadError, Result};

/// A length in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Length {
    /// Mean before truncation.
    pub mean: f64,
    /// Standard deviation before truncation; 0 is constant.
    pub sd: f64,
    /// Least.
    pub min: u32,
    /// Most.
    pub max: u32,
}

impl Length {
    /// Constant.
    pub fn exactly(n: u32) -> Self {
        Self { mean: f64::from(n), sd: 0.0, min: n, max: n }
    }

    /// Reads `512`, `512±128` or `512:128` (mean and sd, within [1, mean + 4 sd]), or `512:128:1:1024`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || LoadError::option(text, "not a length", "N, MEAN:SD or MEAN:SD:MIN:MAX tokens");
        let parts = text.split([':', '±']).map(|p| p.trim().parse::<u32>()).collect::<std::result::Result<Vec<_>, _>>();
        let length = match parts.map_err(|_| bad())?.as_slice() {
            [n] => Self::exactly(*n),
            [mean, sd] => Self {
                mean: f64::from(*mean),
                sd: f64::from(*sd),
                min: 1,
                max: mean.saturating_add(sd.saturating_mul(4)),
            },
            [mean, sd, min, max] => Self { mean: f64::from(*mean), sd: f64::from(*sd), min: *min, max: *max },
            _ => return Err(bad()),
        };
        if length.min == 0
            || length.min > length.max
            || length.mean < f64::from(length.min)
            || length.mean > f64::from(length.max)
        {
            return Err(bad());
        }
        Ok(length)
    }

    /// Draws one; a draw outside is drawn again, and clamped after a hundred times.
    pub fn draw(&self, rng: &mut StdRng) -> u32 {
        let Ok(normal) = Normal::new(self.mean, self.sd) else { return self.min };
        let (low, high) = (f64::from(self.min), f64::from(self.max));
        let inside = (0..100).map(|_| normal.sample(rng).round()).find(|v| (low..=high).contains(v));
        inside.unwrap_or_else(|| self.mean.round().clamp(low, high)) as u32
    }
}

/// A synthetic workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Name or options, for the record.
    pub name: String,
    /// Prompt tokens of a turn, without the shared prefix.
    pub input: Length,
    /// Answer tokens.
    pub output: Length,
    /// Tokens of a prefix that requests share; 0 is none.
    pub prefix_tokens: u32,
    /// How many different prefixes there are.
    pub prefixes: u32,
    /// Turns of a conversation.
    pub turns: u32,
}

/// Name, input mean, sd, min, max, output mean, sd, min, max.
const NAMED: &[(&str, [u32; 4], [u32; 4])] = &[
    ("chat", [512, 128, 1, 1024], [256, 64, 1, 1024]),
    ("rag", [4096, 512, 2048, 6144], [512, 128, 1, 1024]),
    ("summarization", [1024, 256, 1, 2048], [256, 64, 1, 1024]),
    ("code", [512, 128, 1, 1024], [512, 128, 1, 1024]),
    ("translation", [512, 128, 1, 1024], [256, 64, 1, 1024]),
    ("long-context", [10240, 1280, 5120, 15360], [1536, 384, 1, 3072]),
    // Small enough for a model of a few million parameters on a laptop.
    ("demo", [64, 16, 8, 128], [32, 8, 4, 64]),
];

impl Workload {
    /// Names of the built-in ones.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|n| n.0)
    }

    /// Reads a name, or `input=512:128,output=256,prefix=1024,prefixes=4,turns=3` in any part; a name may come first.
    pub fn parse(text: &str) -> Result<Self> {
        let hint = || {
            format!(
                "one of {}, or input=N,output=N[,prefix=N,prefixes=N,turns=N]",
                Self::names().collect::<Vec<_>>().join(", ")
            )
        };
        let mut w = Self {
            name: text.to_string(),
            input: Length::exactly(512),
            output: Length::exactly(128),
            prefix_tokens: 0,
            prefixes: 1,
            turns: 1,
        };
        for (i, part) in text.split(',').enumerate() {
            let of = |l: [u32; 4]| Length { mean: f64::from(l[0]), sd: f64::from(l[1]), min: l[2], max: l[3] };
            match part.split_once('=') {
                None => {
                    let found = NAMED.iter().find(|n| n.0 == part && i == 0);
                    let (_, input, output) =
                        found.ok_or_else(|| LoadError::option(text, "unknown workload", hint()))?;
                    (w.input, w.output) = (of(*input), of(*output));
                }
                Some((key, value)) => {
                    let number = || value.parse::<u32>().map_err(|_| LoadError::option(part, "not a number", hint()));
                    match key {
                        "input" => w.input = Length::parse(value)?,
                        "output" => w.output = Length::parse(value)?,
                        "prefix" => w.prefix_tokens = number()?,
                        "prefixes" => w.prefixes = number()?.max(1),
                        "turns" => w.turns = number()?.max(1),
                        _ => return Err(LoadError::option(text, format!("unknown key {key}"), hint())),
                    }
                }
            }
        }
        Ok(w)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn names_and_options() {
        let w = Workload::parse("chat,turns=3,prefix=1024").unwrap();
        assert_eq!((w.input.mean, w.output.max, w.turns, w.prefix_tokens), (512.0, 1024, 3, 1024));
        assert_eq!(Workload::parse("input=64:8,output=16").unwrap().output, Length::exactly(16));
        for bad in ["tea", "input=0", "chat,input", "output=x", "turns=many", "input=9:1:20:30"] {
            assert!(Workload::parse(bad).is_err(), "{bad}");
        }
        assert!(Workload::names().all(|n| Workload::parse(n).is_ok()));
    }

    #[test]
    fn draws_follow_the_law_and_stay_inside() {
        let (l, mut rng) = (Length { mean: 512.0, sd: 128.0, min: 1, max: 1024 }, StdRng::seed_from_u64(1));
        let draws: Vec<f64> = (0..20_000).map(|_| f64::from(l.draw(&mut rng))).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let sd = (draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / draws.len() as f64).sqrt();
        // Standard error of the mean is 0.9; the truncation at 4 sd is symmetric.
        assert!((mean - 512.0).abs() < 4.0 && (sd - 128.0).abs() < 3.0, "{mean} {sd}");
        assert!(draws.iter().all(|d| (1.0..=1024.0).contains(d)));
        assert_eq!(Length::exactly(7).draw(&mut rng), 7);
    }
}
