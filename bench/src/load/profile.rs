//! Load shapes.

use crate::load::error::{LoadError, Result};
use crate::load::schedule::Arrivals;
use crate::slo::search::Unit;

/// Streams of `throughput` and of a sweep's second stage, as GuideLLM's.
pub const THROUGHPUT_STREAMS: usize = 512;

/// One stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StageSpec {
    /// A closed loop of so many streams.
    Closed(usize),
    /// A closed loop as wide as the server bears.
    Throughput(usize),
    /// An open loop.
    Open {
        /// Requests a second.
        rate: f64,
        /// Gaps.
        arrivals: Arrivals,
    },
    /// The times of the data's own trace, so many times as fast.
    Replay(f64),
}

impl StageSpec {
    /// Name for records: `synchronous`, `concurrent`, `throughput`, `constant`, `poisson`, `gamma`, `replay`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Closed(1) => "synchronous",
            Self::Closed(_) => "concurrent",
            Self::Throughput(_) => "throughput",
            Self::Open { arrivals: Arrivals::Constant, .. } => "constant",
            Self::Open { arrivals: Arrivals::Poisson, .. } => "poisson",
            Self::Open { arrivals: Arrivals::Gamma(_), .. } => "gamma",
            Self::Replay(_) => "replay",
        }
    }

    /// Requests a second asked for.
    pub fn rate(&self) -> Option<f64> {
        match self {
            Self::Open { rate, .. } => Some(*rate),
            _ => None,
        }
    }

    /// Streams of a closed loop.
    pub fn streams(&self) -> Option<usize> {
        match self {
            Self::Closed(n) | Self::Throughput(n) => Some(*n),
            _ => None,
        }
    }
}

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub enum Profile {
    /// Stages one after another.
    Stages(Vec<StageSpec>),
    /// Synchronous, throughput, then so many rates evenly between the two that were measured.
    Sweep {
        /// All stages.
        stages: usize,
        /// Gaps of the rates.
        arrivals: Arrivals,
        /// Streams of the second stage.
        streams: usize,
    },
}

impl Profile {
    /// Reads `synchronous`, `concurrent:1,2,4`, `throughput[:STREAMS]`, `constant:RATES`, `poisson:RATES`,
    /// `gamma:SHAPE:RATES`, `sweep[:STAGES[:constant|poisson[:STREAMS]]]`, `replay[:SPEED]`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: String| {
            LoadError::option(
                text,
                why,
                "synchronous, concurrent:1,2,4, throughput[:512], constant:5,10, poisson:5, gamma:0.5:5, sweep[:10[:poisson]] or replay[:2]",
            )
        };
        let (name, rest) = text.split_once(':').map_or((text, None), |(n, r)| (n, Some(r)));
        let numbers = |list: Option<&str>| -> Result<Vec<f64>> {
            let list = list.ok_or_else(|| bad("a number is missing".into()))?;
            let parsed = list.split(',').map(|v| {
                v.trim()
                    .parse::<f64>()
                    .ok()
                    .filter(|v| v.is_finite() && *v > 0.0)
                    .ok_or_else(|| bad(format!("{v:?} is not a number above 0")))
            });
            parsed.collect()
        };
        let whole = |list: Option<&str>| -> Result<Vec<usize>> {
            numbers(list)?
                .into_iter()
                .map(|v| if v.fract() == 0.0 { Ok(v as usize) } else { Err(bad(format!("{v} is not a whole number"))) })
                .collect()
        };
        let open = |rates: Vec<f64>, arrivals| {
            Self::Stages(rates.into_iter().map(|rate| StageSpec::Open { rate, arrivals }).collect())
        };
        Ok(match (name, rest) {
            ("synchronous", None) => Self::Stages(vec![StageSpec::Closed(1)]),
            ("concurrent", r) => Self::Stages(whole(r)?.into_iter().map(StageSpec::Closed).collect()),
            ("throughput", None) => Self::Stages(vec![StageSpec::Throughput(THROUGHPUT_STREAMS)]),
            ("throughput", r) => Self::Stages(whole(r)?.into_iter().map(StageSpec::Throughput).collect()),
            ("constant", r) => open(numbers(r)?, Arrivals::Constant),
            ("poisson", r) => open(numbers(r)?, Arrivals::Poisson),
            ("gamma", Some(r)) => {
                let (shape, rates) = r.split_once(':').ok_or_else(|| bad("gamma needs a shape and a rate".into()))?;
                let shape = numbers(Some(shape))?.first().copied().unwrap_or(1.0);
                open(numbers(Some(rates))?, Arrivals::Gamma(shape))
            }
            ("sweep", r) => {
                let mut parts = r.unwrap_or("10").split(':');
                let stages = whole(parts.next())?.first().copied().unwrap_or(10);
                let arrivals = match parts.next() {
                    None | Some("constant") => Arrivals::Constant,
                    Some("poisson") => Arrivals::Poisson,
                    Some(kind) => return Err(bad(format!("{kind:?} is not constant or poisson"))),
                };
                let streams = parts.next().map(|s| whole(Some(s))).transpose()?;
                let streams = streams.and_then(|s| s.first().copied()).unwrap_or(THROUGHPUT_STREAMS);
                if stages < 3 || parts.next().is_some() {
                    return Err(bad("a sweep has at least 3 stages, gaps and streams".into()));
                }
                Self::Sweep { stages, arrivals, streams }
            }
            ("replay", None) => Self::Stages(vec![StageSpec::Replay(1.0)]),
            ("replay", r) => Self::Stages(numbers(r)?.into_iter().map(StageSpec::Replay).collect()),
            _ => return Err(bad("unknown profile".into())),
        })
    }
}

/// The profiles `--find-max` searches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Search {
    /// Rates of an open loop.
    Open(Arrivals),
    /// Streams of a closed loop.
    Closed,
    /// Speeds of a trace.
    Replay,
}

impl Search {
    /// Reads `poisson`, `constant`, `gamma:SHAPE`, `concurrent` or `replay`.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            LoadError::option(
                text,
                why,
                "with --find-max: poisson, constant, gamma:0.5, concurrent or replay, without rates",
            )
        };
        Ok(match text.split_once(':').map_or((text, None), |(n, r)| (n, Some(r))) {
            ("poisson", None) => Self::Open(Arrivals::Poisson),
            ("constant", None) => Self::Open(Arrivals::Constant),
            ("gamma", Some(shape)) => {
                let shape = shape.parse::<f64>().ok().filter(|s| s.is_finite() && *s > 0.0);
                Self::Open(Arrivals::Gamma(shape.ok_or_else(|| bad("the shape is not a number above 0"))?))
            }
            ("concurrent", None) => Self::Closed,
            ("replay", None) => Self::Replay,
            _ => return Err(bad("this profile cannot be searched")),
        })
    }

    /// What its numbers are.
    pub fn unit(self) -> Unit {
        match self {
            Self::Open(_) => Unit::Rate,
            Self::Closed => Unit::Streams,
            Self::Replay => Unit::Speed,
        }
    }

    /// The stage at a number.
    pub fn stage(self, at: f64) -> StageSpec {
        match self {
            Self::Open(arrivals) => StageSpec::Open { rate: at, arrivals },
            Self::Closed => StageSpec::Closed(at as usize),
            Self::Replay => StageSpec::Replay(at),
        }
    }
}

/// Rates of a sweep, evenly spaced and strictly between the measured ends.
pub fn sweep_rates(synchronous: f64, throughput: f64, stages: usize) -> Vec<f64> {
    let inner = stages.saturating_sub(2);
    (1..=inner)
        .map(|k| synchronous + (throughput - synchronous) * k as f64 / (inner + 1) as f64)
        .filter(|r| *r > 0.0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles() {
        let stages = |t: &str| match Profile::parse(t).unwrap() {
            Profile::Stages(s) => s,
            other => panic!("{other:?}"),
        };
        assert_eq!(stages("synchronous"), [StageSpec::Closed(1)]);
        assert_eq!(stages("concurrent:1,8"), [StageSpec::Closed(1), StageSpec::Closed(8)]);
        assert_eq!(stages("gamma:0.5:2,4")[1], StageSpec::Open { rate: 4.0, arrivals: Arrivals::Gamma(0.5) });
        assert_eq!(stages("replay:2.5"), [StageSpec::Replay(2.5)]);
        assert_eq!(
            Profile::parse("sweep:5:poisson").unwrap(),
            Profile::Sweep { stages: 5, arrivals: Arrivals::Poisson, streams: 512 }
        );
        let narrow = Profile::Sweep { stages: 4, arrivals: Arrivals::Constant, streams: 16 };
        assert_eq!(Profile::parse("sweep:4:constant:16").unwrap(), narrow);
        for bad in [
            "",
            "constant",
            "constant:0",
            "concurrent:1.5",
            "gamma:3",
            "sweep:2",
            "sweep:5:odd",
            "sweep:5:poisson:4:4",
            "poisson:x",
            "synchronous:2",
        ] {
            assert!(Profile::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(sweep_rates(1.0, 5.0, 5), [2.0, 3.0, 4.0]);
        assert_eq!(Search::parse("gamma:0.5").unwrap(), Search::Open(Arrivals::Gamma(0.5)));
        assert_eq!(Search::parse("concurrent").unwrap().stage(4.0), StageSpec::Closed(4));
        assert_eq!(Search::parse("replay").unwrap().unit(), Unit::Speed);
        for bad in ["poisson:5", "gamma", "gamma:0", "concurrent:4", "synchronous", "sweep", ""] {
            assert!(Search::parse(bad).is_err(), "{bad}");
        }
    }
}
