//! What counts for one document: the comparison of an answer with its target.

use std::borrow::Cow;

use serde_json::{Map, Value as Json};

use super::config::{Aggregation, OutputType};
use super::filters::patterns;
use super::json_schema;
use super::pattern::Pattern;
use super::pipeline::Pipeline;
use super::python;
use super::rouge::rouge_l;
use crate::judge::JudgeSpec;

/// A metric of one item.
#[derive(Debug)]
pub enum Metric {
    /// The most likely choice is right; for a log-likelihood task, the target is what greedy decoding gives.
    Acc,
    /// The choice with the largest log-likelihood per code point is right.
    AccNorm,
    /// The same per UTF-8 byte.
    AccBytes,
    /// The choice that gains most over its likelihood after an empty context is right.
    AccMutualInfo,
    /// Probability mass of the true answers.
    Mc2,
    /// The greedy text would be the right choice; or a generated text equals a target.
    ExactMatch(Normalize),
    /// The document's log-likelihood, for `perplexity`.
    Perplexity,
    /// Log-likelihood and words.
    WordPerplexity,
    /// Log-likelihood and bytes.
    BytePerplexity,
    /// Log-likelihood and bytes, in bits.
    BitsPerByte,
    /// A target occurs in the text.
    Contains(Normalize),
    /// A pattern (`pattern`, or the target) is found in the text.
    Regex(Option<Pattern>),
    /// The text is a number within a tolerance of the target.
    Numeric {
        /// Absolute.
        tolerance: f64,
        /// As a share of the target.
        relative: f64,
    },
    /// The text is JSON that meets a schema.
    JsonSchema(Schema),
    /// The text is JSON equal to the target, order of keys aside.
    JsonEqual,
    /// ROUGE-L, F measure, the best of the targets.
    RougeL,
    /// A metric of a retrieval or agent task, by name.
    Pipeline(&'static str),
    /// What a language model says of the text.
    Judge(JudgeSpec),
}

/// Where a schema comes from.
#[derive(Debug)]
pub enum Schema {
    /// In the task file.
    Inline(Json),
    /// A column of the row.
    Column(String),
}

/// How texts are made alike before they are compared.
#[derive(Debug, Default)]
pub struct Normalize {
    ignore_case: bool,
    ignore_punctuation: bool,
    ignore_numbers: bool,
    regexes_to_ignore: Vec<Pattern>,
}

impl Normalize {
    fn parse(entry: &Json) -> Result<Self, String> {
        let flag = |key: &str| match entry.get(key) {
            None => Ok(false),
            Some(v) => v.as_bool().ok_or_else(|| format!("`{key}` is true or false, found {v}")),
        };
        Ok(Self {
            ignore_case: flag("ignore_case")?,
            ignore_punctuation: flag("ignore_punctuation")?,
            ignore_numbers: flag("ignore_numbers")?,
            regexes_to_ignore: patterns(entry, "regexes_to_ignore")?,
        })
    }

    /// Patterns first, then case, ASCII punctuation, digits.
    fn apply(&self, text: &str) -> String {
        let mut text = self.regexes_to_ignore.iter().fold(text.to_owned(), |t, p| p.remove_from(&t));
        if self.ignore_case {
            text = text.to_lowercase();
        }
        text.retain(|c| {
            let drop =
                (self.ignore_punctuation && c.is_ascii_punctuation()) || (self.ignore_numbers && c.is_ascii_digit());
            !drop
        });
        text
    }
}

const KNOWN: &str = "acc, acc_norm, acc_bytes, acc_mutual_info, mc2, exact_match, perplexity, word_perplexity, \
                     byte_perplexity, bits_per_byte, contains, regex, numeric, json_schema, json_equal, rouge_l, judge, \
                     judge_pairwise";

impl Metric {
    /// Whether there is a metric of that name.
    pub fn known(name: &str, pipeline: Option<&Pipeline>) -> bool {
        KNOWN.split(", ").any(|known| known == name) || pipeline.is_some_and(|p| p.metric(name).is_some())
    }

    /// Reads one entry of `metric_list`.
    pub fn parse(name: &str, entry: &Json, output: OutputType, pipeline: Option<&Pipeline>) -> Result<Self, String> {
        use OutputType::{Generate, LogLikelihood, MultipleChoice, Rolling};
        if let Some(own) = pipeline.and_then(|p| p.metric(name)) {
            return Ok(Self::Pipeline(own));
        }
        if ["judge", "judge_pairwise"].contains(&name) {
            if output != Generate || matches!(pipeline, Some(Pipeline::Agent(_))) {
                return Err("a judge reads the text of a `generate_until` task".into());
            }
            return Ok(Self::Judge(JudgeSpec::parse(name, entry)?));
        }
        let number = |key: &str| match entry.get(key) {
            None => Ok(0.0),
            Some(v) => v.as_f64().filter(|x| *x >= 0.0).ok_or_else(|| format!("`{key}` is a number from 0, found {v}")),
        };
        let (metric, outputs, options): (Self, &[OutputType], &[&str]) = match name {
            "acc" => (Self::Acc, &[MultipleChoice, LogLikelihood], &[]),
            "acc_norm" => (Self::AccNorm, &[MultipleChoice], &[]),
            "acc_bytes" => (Self::AccBytes, &[MultipleChoice], &[]),
            "acc_mutual_info" => (Self::AccMutualInfo, &[MultipleChoice], &[]),
            "mc2" => (Self::Mc2, &[MultipleChoice], &[]),
            "perplexity" => (Self::Perplexity, &[LogLikelihood], &[]),
            "word_perplexity" => (Self::WordPerplexity, &[Rolling], &[]),
            "byte_perplexity" => (Self::BytePerplexity, &[Rolling], &[]),
            "bits_per_byte" => (Self::BitsPerByte, &[Rolling], &[]),
            "exact_match" => (Self::ExactMatch(Normalize::parse(entry)?), &[Generate, MultipleChoice], NORMALIZE),
            "contains" => (Self::Contains(Normalize::parse(entry)?), &[Generate], NORMALIZE),
            "regex" => {
                let pattern = match entry.get("pattern") {
                    None => None,
                    Some(p) => Some(Pattern::new(p.as_str().ok_or_else(|| format!("`pattern` is text, found {p}"))?)?),
                };
                (Self::Regex(pattern), &[Generate], &["pattern"])
            }
            "numeric" => (
                Self::Numeric { tolerance: number("tolerance")?, relative: number("relative_tolerance")? },
                &[Generate],
                &["tolerance", "relative_tolerance"],
            ),
            "json_schema" => {
                let schema = match (entry.get("schema"), entry.get("schema_column").and_then(Json::as_str)) {
                    (Some(schema), None) => {
                        json_schema::check(schema)?;
                        Schema::Inline(schema.clone())
                    }
                    (None, Some(column)) => Schema::Column(column.to_owned()),
                    _ => return Err("give either `schema` or `schema_column`".into()),
                };
                (Self::JsonSchema(schema), &[Generate], &["schema", "schema_column"])
            }
            "json_equal" => (Self::JsonEqual, &[Generate], &[]),
            "rouge_l" => (Self::RougeL, &[Generate], &[]),
            _ => {
                let own = pipeline.map_or(String::new(), |p| format!(", {}", p.known_metrics()));
                return Err(format!("unknown metric; there are {KNOWN}{own}"));
            }
        };
        if !outputs.contains(&output) {
            return Err("this metric does not go with the task's output_type".into());
        }
        let common = ["metric", "aggregation", "higher_is_better", "hf_evaluate"];
        match entry
            .as_object()
            .into_iter()
            .flat_map(|m| m.keys())
            .find(|k| !common.contains(&k.as_str()) && !options.contains(&k.as_str()))
        {
            Some(key) => Err(format!("unknown option `{key}`")),
            None => Ok(metric),
        }
    }

    /// Aggregation and direction where the file does not say.
    pub fn defaults(&self) -> (Aggregation, bool) {
        match self {
            Self::Perplexity => (Aggregation::Perplexity, false),
            Self::WordPerplexity | Self::BytePerplexity => (Aggregation::WeightedPerplexity, false),
            Self::BitsPerByte => (Aggregation::BitsPerByte, false),
            _ => (Aggregation::Mean, true),
        }
    }

    /// Whether this metric can compare a text with the targets of `row`: what is wrong, and the column where it is not the target's.
    pub fn check_row(&self, targets: &[String], row: &Map<String, Json>) -> Result<(), (Option<&str>, String)> {
        match self {
            Self::JsonSchema(schema) => {
                let column = match schema {
                    Schema::Inline(_) => None,
                    Schema::Column(column) => Some(column.as_str()),
                };
                schema.of(row).map(|_| ()).map_err(|p| (column, p))
            }
            _ => targets.iter().try_for_each(|t| self.check_target(t)).map_err(|p| (None, p)),
        }
    }

    fn check_target(&self, target: &str) -> Result<(), String> {
        match self {
            Self::Numeric { .. } if number(target).is_none() => Err(format!("the target `{target}` is not a number")),
            Self::JsonEqual if json_schema::read(target).is_none() => Err(format!("the target `{target}` is not JSON")),
            Self::Regex(None) => Pattern::new(target).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// The value of a metric of generated text; `None` for a metric of another kind.
    ///
    /// With several targets the best counts.
    pub fn of_text(&self, text: &str, targets: &[String], row: &Map<String, Json>) -> Result<Option<f64>, String> {
        let yes = |b: bool| Ok(Some(f64::from(u8::from(b))));
        match self {
            Self::ExactMatch(n) => {
                let text = n.apply(text);
                yes(targets.iter().any(|t| n.apply(t) == text))
            }
            Self::Contains(n) => {
                let text = n.apply(text);
                yes(targets.iter().any(|t| text.contains(&n.apply(t))))
            }
            Self::Regex(Some(pattern)) => yes(pattern.found_in(text)),
            Self::Regex(None) => {
                let patterns: Result<Vec<Pattern>, String> = targets.iter().map(|t| Pattern::new(t)).collect();
                yes(patterns?.iter().any(|p| p.found_in(text)))
            }
            Self::Numeric { tolerance, relative } => {
                let mut right = false;
                for target in targets {
                    let want = number(target).ok_or_else(|| format!("the target `{target}` is not a number"))?;
                    right |= number(text).is_some_and(|x| (x - want).abs() <= tolerance.max(relative * want.abs()));
                }
                yes(right)
            }
            Self::JsonSchema(schema) => {
                let schema = schema.of(row)?;
                yes(json_schema::read(text).is_some_and(|v| json_schema::valid(&schema, &v)))
            }
            Self::JsonEqual => {
                let Some(found) = json_schema::read(text) else { return yes(false) };
                let mut right = false;
                for target in targets {
                    let want = json_schema::read(target).ok_or_else(|| format!("the target `{target}` is not JSON"))?;
                    right |= json_schema::equal(&want, &found);
                }
                yes(right)
            }
            Self::RougeL => Ok(Some(targets.iter().map(|t| rouge_l(t, text)).fold(0.0, f64::max))),
            _ => Ok(None),
        }
    }
}

impl Schema {
    /// The schema of a row, one that is understood.
    fn of<'a>(&'a self, row: &'a Map<String, Json>) -> Result<Cow<'a, Json>, String> {
        let schema = match self {
            // Checked when the task file was read.
            Self::Inline(schema) => return Ok(Cow::Borrowed(schema)),
            Self::Column(column) => match row.get(column) {
                Some(Json::String(text)) => {
                    Cow::Owned(serde_json::from_str(text).map_err(|e| format!("the schema is not JSON: {e}"))?)
                }
                Some(other) => Cow::Borrowed(other),
                None => return Err("the row has no such column, which should hold the schema".into()),
            },
        };
        json_schema::check(&schema)?;
        Ok(schema)
    }
}

const NORMALIZE: &[&str] = &["ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"];

/// A number as people write it: `$1,234.50`, `12 %` (the sign is dropped), `1e-3`.
fn number(text: &str) -> Option<f64> {
    let text: String = python::strip(text).chars().filter(|c| !",$€£".contains(*c)).collect();
    let text = python::strip(&text).trim_end_matches('%').trim_end_matches(crate::text::is_python_space);
    text.strip_suffix('.').unwrap_or(text).parse::<f64>().ok().filter(|x| x.is_finite())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(name: &str, options: Json, text: &str, targets: &[&str]) -> f64 {
        let metric = Metric::parse(name, &options, OutputType::Generate, None).unwrap();
        let targets: Vec<String> = targets.iter().map(|t| (*t).to_owned()).collect();
        metric.of_text(text, &targets, &Map::new()).unwrap().unwrap()
    }

    #[test]
    fn gsm8k_comparison() {
        let options = json!({"ignore_case": true, "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]});
        assert_eq!(value("exact_match", options.clone(), "1234.", &["a\nb\n#### 1,234"]), 1.0);
        assert_eq!(value("exact_match", options, "1235", &["#### 1,234"]), 0.0);
        assert_eq!(value("exact_match", json!({"ignore_punctuation": true}), "a-b", &["x", "ab"]), 1.0);
    }

    #[test]
    fn users_metrics() {
        assert_eq!(value("contains", json!({"ignore_case": true}), "It is PARIS.", &["Paris"]), 1.0);
        assert_eq!(value("regex", json!({"pattern": "^\\d{3}$"}), "123\n", &[""]), 1.0);
        assert_eq!(value("regex", json!({}), "abc", &["x", "b+"]), 1.0);
        assert_eq!(value("numeric", json!({"tolerance": 0.01}), " $1,234.505 ", &["1234.5"]), 1.0);
        assert_eq!(value("numeric", json!({"relative_tolerance": 0.1}), "89", &["100"]), 0.0);
        assert_eq!(value("numeric", json!({}), "about 3", &["3"]), 0.0);
        assert_eq!(
            value(
                "json_schema",
                json!({"schema": {"type": "object", "required": ["a"]}}),
                "```json\n{\"a\": 1}\n```",
                &[""]
            ),
            1.0
        );
        assert_eq!(value("json_equal", json!({}), "{\"b\": [1], \"a\": 2.0}", &["{\"a\": 2, \"b\": [1]}"]), 1.0);
        assert!((value("rouge_l", json!({}), "the cat sat", &["the cat", "a dog"]) - 0.8).abs() < 1e-12);
    }

    #[test]
    fn names_are_known() {
        assert!(["acc", "judge", "judge_pairwise", "rouge_l", "perplexity"].iter().all(|n| Metric::known(n, None)));
        assert!(!Metric::known("bleu", None) && !Metric::known("tool_calls", None) && !Metric::known("", None));
    }

    #[test]
    fn mistakes_are_told() {
        for (name, options, output, says) in [
            ("accuracy", json!({}), OutputType::MultipleChoice, "unknown metric"),
            ("acc", json!({}), OutputType::Generate, "output_type"),
            ("numeric", json!({"tol": 1}), OutputType::Generate, "`tol`"),
            ("json_schema", json!({}), OutputType::Generate, "schema_column"),
            ("json_schema", json!({"schema": {"type": "thing"}}), OutputType::Generate, "thing"),
        ] {
            let e = Metric::parse(name, &options, output, None).unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
