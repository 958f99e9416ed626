//! What a task file says of its judge: an entry of `metric_list`.

use serde_json::Value as Json;

/// Metric of grades.
pub const SCORE: &str = "judge";
/// Metric of comparisons.
pub const PAIRWISE: &str = "judge_pairwise";

const OPTIONS: [&str; 7] = ["rubric", "question", "scale", "votes", "temperature", "max_tokens", "show_target"];
/// Keys that every metric has.
const COMMON: [&str; 4] = ["metric", "aggregation", "higher_is_better", "hf_evaluate"];

/// What is asked of the judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A whole number from the first to the second.
    Score(i64, i64),
    /// Which of the candidate's and the reference's answer is better.
    Pairwise,
}

/// A judge's task.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgeSpec {
    /// What is asked.
    pub mode: Mode,
    /// By what to judge: a Jinja template over the row.
    pub rubric: String,
    /// What was asked of the model, likewise; `doc_to_text` without.
    pub question: Option<String>,
    /// How often each question is put.
    pub votes: u32,
    /// Of the judge; 0 for one vote, else 0.7.
    pub temperature: f64,
    /// Tokens of a verdict at most.
    pub max_tokens: usize,
    /// Whether the judge sees the target, where there is one.
    pub show_target: bool,
}

impl JudgeSpec {
    /// Reads an entry named `judge` or `judge_pairwise`.
    pub fn parse(name: &str, entry: &Json) -> Result<Self, String> {
        let keys = entry.as_object().into_iter().flat_map(|m| m.keys());
        if let Some(key) = keys.into_iter().find(|k| !COMMON.contains(&k.as_str()) && !OPTIONS.contains(&k.as_str())) {
            return Err(format!("unknown option `{key}`; there are {}", OPTIONS.join(", ")));
        }
        let text = |key: &str| match entry.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(text)) if !text.trim().is_empty() => Ok(Some(text.clone())),
            Some(other) => Err(format!("`{key}` is text, found {other}")),
        };
        let whole = |key: &str, default: u64, most: u64| match entry.get(key) {
            None => Ok(default),
            Some(v) => {
                let found = v.as_u64().filter(|n| (1..=most).contains(n));
                found.ok_or_else(|| format!("`{key}` is a whole number from 1 to {most}, found {v}"))
            }
        };
        let mode = match (name, entry.get("scale")) {
            (PAIRWISE, None) => Mode::Pairwise,
            (PAIRWISE, Some(_)) => return Err("a comparison has no `scale`".into()),
            (_, None) => Mode::Score(1, 5),
            (_, Some(scale)) => {
                let ends: Option<Vec<i64>> = scale.as_array().and_then(|a| a.iter().map(Json::as_i64).collect());
                match ends.as_deref() {
                    Some(&[low, high]) if low < high && (-1000..=1000).contains(&low) && high <= 1000 => {
                        Mode::Score(low, high)
                    }
                    _ => return Err(format!("`scale` is its two ends, as in [1, 5], found {scale}")),
                }
            }
        };
        let votes = u32::try_from(whole("votes", 1, 64)?).unwrap_or(1);
        let temperature = match entry.get("temperature") {
            None if votes == 1 => 0.0,
            // Votes at temperature 0 would be one vote.
            None => 0.7,
            Some(v) => v
                .as_f64()
                .filter(|t| (0.0..=2.0).contains(t))
                .ok_or_else(|| format!("`temperature` is a number from 0 to 2, found {v}"))?,
        };
        let show_target = match entry.get("show_target") {
            None => true,
            Some(v) => v.as_bool().ok_or_else(|| format!("`show_target` is true or false, found {v}"))?,
        };
        Ok(Self {
            mode,
            rubric: text("rubric")?.ok_or("a judge needs a `rubric`")?,
            question: text("question")?,
            votes,
            temperature,
            max_tokens: whole("max_tokens", 1024, 1 << 20)? as usize,
            show_target,
        })
    }

    /// Name in records.
    pub fn name(&self) -> &'static str {
        match self.mode {
            Mode::Score(..) => SCORE,
            Mode::Pairwise => PAIRWISE,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn entries() {
        let s =
            JudgeSpec::parse(SCORE, &json!({"metric": "judge", "rubric": "r", "scale": [0, 10], "votes": 3})).unwrap();
        assert_eq!((s.mode, s.votes, s.temperature, s.show_target), (Mode::Score(0, 10), 3, 0.7, true));
        let p = JudgeSpec::parse(PAIRWISE, &json!({"rubric": "r", "show_target": false})).unwrap();
        assert_eq!((p.mode, p.temperature, p.name()), (Mode::Pairwise, 0.0, PAIRWISE));
        for (name, bad, says) in [
            (SCORE, json!({}), "needs a `rubric`"),
            (SCORE, json!({"rubric": "r", "scale": [5, 1]}), "[1, 5]"),
            (PAIRWISE, json!({"rubric": "r", "scale": [1, 5]}), "no `scale`"),
            (SCORE, json!({"rubric": "r", "vote": 3}), "`vote`"),
            (SCORE, json!({"rubric": "r", "votes": 0}), "`votes`"),
            (SCORE, json!({"rubric": "r", "temperature": -1}), "`temperature`"),
        ] {
            let e = JudgeSpec::parse(name, &bad).unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
