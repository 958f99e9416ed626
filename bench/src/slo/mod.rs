//! Service level objectives: what they are, whether a load run met them, and how far a server can go.

pub mod search;
pub mod verdict;

use serde::{Deserialize, Serialize};

use crate::load::error::{LoadError, Result};
use crate::load::trace::RequestTrace;

/// What a clause limits. All but the last are milliseconds a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// First output after the scheduled start.
    Ttft,
    /// Mean gap between tokens of a request (last − first output over tokens − 1), GuideLLM's ITL.
    Itl,
    /// (End − first output) over tokens − 1, vLLM's and MLPerf's TPOT.
    Tpot,
    /// Whole answer after the scheduled start.
    E2e,
    /// Longest gap between chunks of a request: a stall.
    Stall,
    /// Whole answers a second: at least, not at most.
    Rps,
}

const MEASURES: &[(&str, Measure)] = &[
    ("ttft", Measure::Ttft),
    ("itl", Measure::Itl),
    ("tpot", Measure::Tpot),
    ("e2e", Measure::E2e),
    ("stall", Measure::Stall),
    ("rps", Measure::Rps),
];

impl Measure {
    /// Name in the text of a clause.
    pub fn name(self) -> &'static str {
        MEASURES.iter().find(|m| m.1 == self).map_or("", |m| m.0)
    }

    /// Value of a whole answer, ms; `None` where the answer has none (one token has no gap).
    pub fn of(self, t: &RequestTrace) -> Option<f64> {
        let ms = |to: u64, from: u64| to.saturating_sub(from) as f64 * 1e-6;
        let gaps =
            || f64::from(t.output_tokens.checked_sub(1).filter(|n| *n > 0 && t.chunks_ns.len() > 1).unwrap_or(0));
        match self {
            Self::Ttft => Some(ms(t.first_ns()?, t.scheduled_ns)),
            Self::E2e => Some(ms(t.end_ns, t.scheduled_ns)),
            Self::Itl => (gaps() > 0.0).then(|| ms(t.last_ns().unwrap_or(0), t.first_ns().unwrap_or(0)) / gaps()),
            Self::Tpot => (gaps() > 0.0).then(|| ms(t.end_ns, t.first_ns().unwrap_or(0)) / gaps()),
            Self::Stall => t.chunks_ns.windows(2).map(|w| ms(w[1], w[0])).reduce(f64::max),
            Self::Rps => None,
        }
    }
}

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Clause {
    /// What.
    pub measure: Measure,
    /// Share of requests that must keep to it; meaningless for a rate.
    pub q: f64,
    /// Milliseconds, or requests a second.
    pub limit: f64,
}

impl std::fmt::Display for Clause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.measure {
            Measure::Rps => write!(f, "rps>={}", self.limit),
            m => write!(f, "{}_p{}<={}", m.name(), (self.q * 1e6).round() / 1e4, self.limit),
        }
    }
}

/// All clauses must hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slo {
    /// Preset or text.
    pub name: String,
    /// Limits.
    pub clauses: Vec<Clause>,
}

/// Published objectives. GuideLLM's documentation (P99); llm-d-planner's research ranges (P95); MLPerf inference server
/// and interactive limits (P99; TPOT excludes the first token); scalebench.
const PRESETS: &[(&str, &str)] = &[
    ("guidellm/chatbot", "ttft_p99<=200,itl_p99<=50"),
    ("guidellm/rag", "ttft_p99<=300,itl_p99<=100,e2e_p99<=3000"),
    ("guidellm/agentic", "e2e_p99<=5000"),
    ("guidellm/content", "ttft_p99<=600,itl_p99<=200"),
    ("guidellm/code-generation", "ttft_p99<=500,itl_p99<=150"),
    ("guidellm/code-completion", "e2e_p99<=2000"),
    ("guidellm/summarization", "rps>=100"),
    ("guidellm/offline", "rps>=150"),
    ("planner/code-completion", "ttft_p95<=100,itl_p95<=20,e2e_p95<=5000"),
    ("planner/chat", "ttft_p95<=150,itl_p95<=25,e2e_p95<=7000"),
    ("planner/code-generation", "ttft_p95<=300,itl_p95<=30,e2e_p95<=25000"),
    ("planner/translation", "ttft_p95<=400,itl_p95<=35,e2e_p95<=35000"),
    ("planner/content", "ttft_p95<=500,itl_p95<=35,e2e_p95<=40000"),
    ("planner/rag", "ttft_p95<=600,itl_p95<=30,e2e_p95<=20000"),
    ("planner/long-document", "ttft_p95<=1000,itl_p95<=40,e2e_p95<=60000"),
    ("planner/research", "ttft_p95<=2000,itl_p95<=45,e2e_p95<=90000"),
    ("mlperf/llama2-70b", "ttft_p99<=2000,tpot_p99<=200"),
    ("mlperf/llama2-70b-interactive", "ttft_p99<=450,tpot_p99<=40"),
    ("mlperf/llama3.1-8b", "ttft_p99<=2000,tpot_p99<=100"),
    ("mlperf/llama3.1-8b-interactive", "ttft_p99<=500,tpot_p99<=30"),
    ("mlperf/llama3.1-405b", "ttft_p99<=6000,tpot_p99<=175"),
    ("mlperf/llama3.1-405b-interactive", "ttft_p99<=4500,tpot_p99<=80"),
    ("mlperf/deepseek-r1", "ttft_p99<=2000,tpot_p99<=80"),
    ("mlperf/deepseek-r1-interactive", "ttft_p99<=1500,tpot_p99<=15"),
    ("mlperf/gpt-oss-120b", "ttft_p99<=3000,tpot_p99<=80"),
    ("mlperf/gpt-oss-120b-interactive", "ttft_p99<=2000,tpot_p99<=15"),
    ("mlperf/mixtral-8x7b", "ttft_p99<=2000,tpot_p99<=200"),
    ("scalebench", "ttft_p99<=2000,itl_p99<=200"),
];

impl Slo {
    /// Names of the presets with their clauses.
    pub fn presets() -> impl Iterator<Item = (&'static str, &'static str)> {
        PRESETS.iter().copied()
    }

    /// Reads a preset's name or clauses such as `ttft_p99<=200,itl_p95<=50`; p99 where no percentile is given.
    pub fn parse(text: &str) -> Result<Self> {
        let preset = PRESETS.iter().find(|p| p.0 == text).map(|p| p.1);
        let hint = || {
            let names: Vec<&str> = PRESETS.iter().map(|p| p.0).collect();
            format!(
                "clauses such as ttft_p99<=200,itl_p99<=50,e2e_p95<=3000,rps>=10 (ms, requests/s), or one of {}",
                names.join(", ")
            )
        };
        let clauses = preset
            .unwrap_or(text)
            .split(',')
            .map(|c| clause(c.trim()).map_err(|why| LoadError::option(c, why, hint())));
        Ok(Self { name: text.to_string(), clauses: clauses.collect::<Result<Vec<_>>>()? })
    }
}

fn clause(text: &str) -> std::result::Result<Clause, String> {
    let (left, limit, at_least) = match (text.split_once("<="), text.split_once(">=")) {
        (Some((l, r)), _) => (l, r, false),
        (_, Some((l, r))) => (l, r, true),
        _ => return Err("not a clause or preset".into()),
    };
    let (name, q) = match left.trim().split_once("_p") {
        Some((name, p)) => (name, p.parse::<f64>().map_err(|_| format!("{p:?} is not a percentile"))? / 100.0),
        None => (left.trim(), 0.99),
    };
    let measure = MEASURES.iter().find(|m| m.0 == name).ok_or_else(|| format!("{name:?} is not a measure"))?.1;
    let limit = limit.trim().trim_end_matches("ms").trim();
    let limit = limit
        .parse::<f64>()
        .ok()
        .filter(|v| v.is_finite() && *v > 0.0)
        .ok_or_else(|| format!("{limit:?} is not a limit"))?;
    if !(q > 0.0 && q < 1.0) {
        return Err("a percentile lies between 0 and 100".into());
    }
    if at_least != (measure == Measure::Rps) {
        return Err("latencies are limited by <=, rates by >=".into());
    }
    Ok(Clause { measure, q, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_and_clauses() {
        for (name, text) in Slo::presets() {
            let slo = Slo::parse(name).unwrap();
            let shown: Vec<String> = slo.clauses.iter().map(Clause::to_string).collect();
            assert_eq!(shown.join(","), text, "{name}");
        }
        assert_eq!(
            Slo::parse("ttft<=200ms").unwrap().clauses[0],
            Clause { measure: Measure::Ttft, q: 0.99, limit: 200.0 }
        );
        assert_eq!(Slo::parse("e2e_p99.9<=1").unwrap().clauses[0].to_string(), "e2e_p99.9<=1");
        for bad in ["", "chat", "ttft_p99<200", "ttft>=3", "rps<=3", "ttft_p100<=1", "ttft_p99<=-1", "x_p99<=1"] {
            assert!(Slo::parse(bad).is_err(), "{bad}");
        }
    }
}
