//! What is taken from a generated text before it is compared: lm-eval's declarative filters.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::pattern::Pattern;
use super::python;

/// One step of a filter.
#[derive(Debug)]
pub enum FilterStep {
    /// The chosen match of a pattern, its first group that is not empty, stripped.
    Regex(RegexStep),
    /// As [`FilterStep::Regex`]; failing that, the first choice found in the text, or a letter after a colon.
    MultiChoiceRegex {
        /// The pattern tried first.
        regex: RegexStep,
        /// Compare choices in lower case.
        ignore_case: bool,
        /// Compare choices without punctuation.
        ignore_punctuation: bool,
        /// Remove these from text and choices first.
        regexes_to_ignore: Vec<Pattern>,
    },
    /// The tags of the pairs `('word', 'TAG')`, as Python prints a list of them.
    RegexPos {
        /// A pair.
        pair: Pattern,
        /// For a text without pairs.
        fallback: String,
    },
    /// Strip white space at both ends.
    RemoveWhitespace,
    /// Lower case.
    Lowercase,
    /// Upper case.
    Uppercase,
    /// By a table.
    Map {
        /// From, to.
        table: BTreeMap<String, String>,
        /// For what the table lacks.
        default: String,
    },
    /// Keep the first of the repeats.
    TakeFirst,
    /// Keep the first `k` repeats.
    TakeFirstK(usize),
    /// The most frequent of the repeats, the earliest among equals.
    MajorityVote,
}

/// A pattern with what to take of it.
#[derive(Debug)]
pub struct RegexStep {
    pattern: Pattern,
    group_select: i64,
    fallback: String,
}

impl RegexStep {
    /// The match, or nothing.
    fn find(&self, text: &str) -> Option<String> {
        let found = self.pattern.find_all(text);
        let at = if self.group_select < 0 { found.len() as i64 + self.group_select } else { self.group_select };
        let groups = usize::try_from(at).ok().and_then(|at| found.get(at))?;
        // Without groups, or with one, an empty match counts.
        let taken = match groups.as_slice() {
            [only] => Some(only),
            several => several.iter().find(|g| !g.is_empty()),
        };
        taken.map(|t| python::strip(t).to_owned())
    }
}

const KNOWN: &str = "regex, multi_choice_regex, regex_pos, remove_whitespace, lowercase, uppercase, map, take_first, take_first_k and majority_vote";

impl FilterStep {
    /// Reads `{function: name, ...}`.
    pub fn parse(value: &Json) -> Result<Self, String> {
        let name = value.get("function").and_then(Json::as_str).ok_or("a step needs its `function`")?;
        let allowed: &[&str] = match name {
            // The first two change nothing in lm-eval's `regex_pos` either.
            "regex" | "regex_pos" => &["regex_pattern", "group_select", "fallback"],
            "multi_choice_regex" => {
                &["regex_pattern", "group_select", "fallback", "ignore_case", "ignore_punctuation", "regexes_to_ignore"]
            }
            "map" => &["mapping_dict", "default_value"],
            "take_first_k" => &["k"],
            _ => &[],
        };
        let step = match name {
            "regex" => Self::Regex(regex_step(value)?),
            "multi_choice_regex" => Self::MultiChoiceRegex {
                regex: regex_step(value)?,
                ignore_case: flag(value, "ignore_case")?,
                ignore_punctuation: flag(value, "ignore_punctuation")?,
                regexes_to_ignore: patterns(value, "regexes_to_ignore")?,
            },
            "regex_pos" => {
                let fallback = value.get("fallback").filter(|f| !f.is_null()).map(python::json_to_str);
                Self::RegexPos {
                    pair: Pattern::new(r"\('([^']*)', '([^']*)'\)")?,
                    fallback: fallback.unwrap_or_else(|| "['invalid']".into()),
                }
            }
            "remove_whitespace" => Self::RemoveWhitespace,
            "lowercase" => Self::Lowercase,
            "uppercase" => Self::Uppercase,
            "map" => {
                let table =
                    value.get("mapping_dict").and_then(Json::as_object).ok_or("`map` needs a `mapping_dict`")?;
                let table = table.iter().map(|(k, v)| (k.clone(), python::json_to_str(v))).collect();
                Self::Map { table, default: python::json_to_str(value.get("default_value").unwrap_or(&Json::Null)) }
            }
            "take_first" => Self::TakeFirst,
            "take_first_k" => {
                let k = value.get("k").and_then(Json::as_u64).filter(|k| *k > 0).ok_or("`take_first_k` needs `k`")?;
                Self::TakeFirstK(k as usize)
            }
            "majority_vote" => Self::MajorityVote,
            other => return Err(format!("unknown filter function `{other}`; there are {KNOWN}")),
        };
        let keys = value.as_object().into_iter().flat_map(|m| m.keys());
        match keys.into_iter().find(|k| *k != "function" && !allowed.contains(&k.as_str())) {
            Some(key) => Err(format!("`{name}` does not know `{key}`")),
            None => Ok(step),
        }
    }

    /// Applies the step to the repeats of one document; `choices` are the document's, where it has some.
    pub fn apply(&self, texts: Vec<String>, choices: Option<&[String]>) -> Result<Vec<String>, String> {
        let each = |f: &dyn Fn(&str) -> String| Ok(texts.iter().map(|t| f(t)).collect());
        match self {
            Self::Regex(step) => each(&|t| step.find(t).unwrap_or_else(|| step.fallback.clone())),
            Self::MultiChoiceRegex { regex, ignore_case, ignore_punctuation, regexes_to_ignore } => {
                let Some(choices) = choices else {
                    return Err("`multi_choice_regex` needs rows with a list `choices`".into());
                };
                let plain = |t: &str| plain(t, *ignore_case, *ignore_punctuation, regexes_to_ignore);
                each(&|t| {
                    regex
                        .find(t)
                        .filter(|m| !m.is_empty())
                        .or_else(|| by_choice(&plain(t), choices, &plain))
                        .or_else(|| by_letter(t, choices.len()))
                        .unwrap_or_else(|| regex.fallback.clone())
                })
            }
            Self::RegexPos { pair, fallback } => each(&|t| {
                let tags: Vec<String> = pair.find_all(t).into_iter().filter_map(|p| p.into_iter().nth(1)).collect();
                if tags.is_empty() { fallback.clone() } else { python::json_to_str(&tags.into()) }
            }),
            Self::RemoveWhitespace => each(&|t| python::strip(t).to_owned()),
            Self::Lowercase => each(&str::to_lowercase),
            Self::Uppercase => each(&str::to_uppercase),
            Self::Map { table, default } => each(&|t| table.get(t).unwrap_or(default).clone()),
            Self::TakeFirst => Ok(texts.into_iter().take(1).collect()),
            Self::TakeFirstK(k) if texts.len() < *k => {
                Err(format!("`take_first_k` wants {k} generations and the task makes {}; raise `repeats`", texts.len()))
            }
            Self::TakeFirstK(k) => Ok(texts.into_iter().take(*k).collect()),
            Self::MajorityVote => {
                let count = |t: &String| texts.iter().filter(|u| *u == t).count();
                let most = texts.iter().map(count).max().unwrap_or(0);
                Ok(texts.iter().find(|t| count(t) == most).cloned().into_iter().collect())
            }
        }
    }
}

fn flag(value: &Json, key: &str) -> Result<bool, String> {
    match value.get(key) {
        None | Some(Json::Null) => Ok(false),
        Some(v) => v.as_bool().ok_or_else(|| format!("`{key}`: expected true or false, found {v}")),
    }
}

/// A list of patterns, or none.
pub(super) fn patterns(value: &Json, key: &str) -> Result<Vec<Pattern>, String> {
    match value.get(key) {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::Array(list)) => list
            .iter()
            .map(|p| p.as_str().ok_or_else(|| format!("`{key}`: expected patterns, found {p}")).and_then(Pattern::new))
            .collect(),
        Some(other) => Err(format!("`{key}`: expected a list of patterns, found {other}")),
    }
}

fn regex_step(value: &Json) -> Result<RegexStep, String> {
    let pattern = match value.get("regex_pattern") {
        None => r"#### (\-?[0-9\.\,]+)",
        Some(v) => v.as_str().ok_or_else(|| format!("`regex_pattern`: expected a pattern, found {v}"))?,
    };
    let group_select = match value.get("group_select") {
        None => 0,
        Some(v) => v.as_i64().ok_or_else(|| format!("`group_select`: expected a whole number, found {v}"))?,
    };
    let fallback = value.get("fallback").map_or_else(|| "[invalid]".into(), python::json_to_str);
    Ok(RegexStep { pattern: Pattern::new(pattern)?, group_select, fallback })
}

/// Unicode punctuation, general category P, as far as texts have it: ASCII's and the blocks of general, CJK and full-width
/// punctuation.
fn is_punctuation(c: char) -> bool {
    match c {
        '$' | '+' | '<' | '=' | '>' | '^' | '`' | '|' | '~' => false,
        c if c.is_ascii() => c.is_ascii_punctuation(),
        '¡' | '§' | '«' | '¶' | '·' | '»' | '¿' => true,
        '\u{2010}'..='\u{2027}' | '\u{2030}'..='\u{2043}' | '\u{2045}'..='\u{2051}' | '\u{2053}'..='\u{205e}' => true,
        '\u{3001}'..='\u{3003}' | '\u{3008}'..='\u{3011}' | '\u{3014}'..='\u{301f}' | '\u{3030}' | '\u{30fb}' => true,
        '\u{ff01}'..='\u{ff0f}' => !"＄＋".contains(c),
        '\u{ff1a}'..='\u{ff20}' => !"＜＝＞".contains(c),
        '\u{ff3b}'..='\u{ff3f}' | '\u{ff5b}' | '\u{ff5d}' | '\u{ff5f}'..='\u{ff65}' => c != '\u{ff3e}',
        _ => false,
    }
}

fn plain(text: &str, ignore_case: bool, ignore_punctuation: bool, ignore: &[Pattern]) -> String {
    let mut text = ignore.iter().fold(text.to_owned(), |t, p| p.remove_from(&t));
    if ignore_case {
        text = text.to_lowercase();
    }
    if ignore_punctuation {
        text.retain(|c| !is_punctuation(c));
    }
    text
}

fn letter(i: usize) -> Option<char> {
    char::from_u32('A' as u32 + u32::try_from(i).ok()?)
}

/// `(A)` for the choice that occurs first in the text; the longest among those that start at the same place.
fn by_choice(text: &str, choices: &[String], plain: &dyn Fn(&str) -> String) -> Option<String> {
    let wanted: Vec<String> = choices.iter().map(|c| plain(python::strip(c))).collect();
    let (_, _, found) = wanted
        .iter()
        .filter(|w| !w.is_empty())
        .filter_map(|w| text.find(w.as_str()).map(|at| (at, std::cmp::Reverse(w.chars().count()), w)))
        .min_by_key(|(at, length, _)| (*at, *length))?;
    // Equal choices share the letter of the last.
    letter(wanted.iter().rposition(|w| w == found)?).map(|l| format!("({l})"))
}

/// `(A)` for the first `: A` of the text.
fn by_letter(text: &str, choices: usize) -> Option<String> {
    text.split(':').skip(1).find_map(|rest| {
        let c = rest.trim_start_matches(crate::text::is_python_space).chars().next()?;
        (0..choices).any(|i| letter(i) == Some(c)).then(|| format!("({c})"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(step: Json, texts: &[&str], choices: Option<&[&str]>) -> Vec<String> {
        let choices: Option<Vec<String>> = choices.map(|c| c.iter().map(|c| (*c).to_owned()).collect());
        let texts = texts.iter().map(|t| (*t).to_owned()).collect();
        FilterStep::parse(&step).unwrap().apply(texts, choices.as_deref()).unwrap()
    }

    #[test]
    fn gsm8k_filters() {
        let strict = json!({"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"});
        assert_eq!(run(strict, &["so\n#### 1,234.", "none"], None), ["1,234.", "[invalid]"]);
        let flexible = json!({"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"});
        assert_eq!(run(flexible, &["5 apples and 7", "cost $10.50.", ""], None), ["7", "$10.50.", "[invalid]"]);
    }

    #[test]
    fn selection_and_case() {
        assert_eq!(run(json!({"function": "majority_vote"}), &["b", "a", "a", "b"], None), ["b"]);
        assert_eq!(run(json!({"function": "take_first"}), &["b", "a"], None), ["b"]);
        assert_eq!(run(json!({"function": "take_first_k", "k": 2}), &["b", "a", "c"], None), ["b", "a"]);
        assert_eq!(run(json!({"function": "uppercase"}), &["ß"], None), ["SS"]);
        assert_eq!(run(json!({"function": "remove_whitespace"}), &[" a\u{a0}"], None), ["a"]);
        let map = json!({"function": "map", "mapping_dict": {"A": 1}, "default_value": -1});
        assert_eq!(run(map, &["A", "B"], None), ["1", "-1"]);
    }

    #[test]
    fn choices_are_found_by_text_and_letter() {
        let step = json!({"function": "multi_choice_regex", "regex_pattern": "\\(([A-C])\\) is it", "ignore_case": true, "ignore_punctuation": true});
        let choices: &[&str] = &["Guilty", "Guilty of Romance", "No."];
        assert_eq!(
            run(step, &["(B) is it", "guilty of romance!", "answer: C", "?"], Some(choices)),
            ["B", "(B)", "(C)", "[invalid]"]
        );
    }

    #[test]
    fn tags_of_words() {
        let step = json!({"function": "regex_pos"});
        assert_eq!(
            run(step, &["[('Ile', 'NOUN'), ('ni', 'VERB')] so", "none"], None),
            ["['NOUN', 'VERB']", "['invalid']"]
        );
    }

    #[test]
    fn unknown_functions_and_keys_are_named() {
        let e = FilterStep::parse(&json!({"function": "rexeg"})).unwrap_err();
        assert!(e.contains("rexeg") && e.contains("multi_choice_regex"), "{e}");
        assert!(FilterStep::parse(&json!({"function": "regex", "pattern": "x"})).unwrap_err().contains("`pattern`"));
        assert!(FilterStep::parse(&json!({"function": "regex", "regex_pattern": "("})).is_err());
        let k = FilterStep::parse(&json!({"function": "take_first_k", "k": 2})).unwrap();
        assert!(k.apply(vec!["a".into()], None).unwrap_err().contains("repeats"));
    }
}
