//! The functions that lm-eval's task files call in Python, as Rust twins.
//!
//! A task file names one with `!function hellaswag.process_docs`. lm-eval's own spelling (`utils.process_docs` in a
//! folder `hellaswag`) names the same twin.

use serde_json::{Map, Value as Json};

use super::python::{capitalize, strip};
use crate::text::detokenize_wikitext;

/// A twin of a Python function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twin {
    /// Adds `query`, `choices` and `gold` to a HellaSwag row.
    HellaswagDocs,
    /// Index of the right option.
    WinograndeText,
    /// What follows the blank.
    WinograndeTarget,
    /// The sentence up to the blank with each option in it.
    WinograndeChoice,
    /// The premise without its full stop, with `because` or `therefore`.
    CopaText,
    /// The right alternative, first letter in lower case.
    CopaTarget,
    /// Both alternatives.
    CopaChoice,
    /// A WikiText page, detokenized.
    WikitextTarget,
    /// Words and bytes of the page before detokenization.
    WikitextResults,
    /// Probability mass of the true answers.
    TruthfulqaMc2,
}

/// Name, folder and function of lm-eval, twin.
const TWINS: &[(&str, &str, &str, Twin)] = &[
    ("hellaswag.process_docs", "hellaswag", "utils.process_docs", Twin::HellaswagDocs),
    ("winogrande.doc_to_text", "winogrande", "preprocess_winogrande.doc_to_text", Twin::WinograndeText),
    ("winogrande.doc_to_target", "winogrande", "preprocess_winogrande.doc_to_target", Twin::WinograndeTarget),
    ("winogrande.doc_to_choice", "winogrande", "preprocess_winogrande.doc_to_choice", Twin::WinograndeChoice),
    ("copa.doc_to_text", "copa", "utils.doc_to_text", Twin::CopaText),
    ("copa.doc_to_target", "copa", "utils.doc_to_target", Twin::CopaTarget),
    ("copa.doc_to_choice", "copa", "utils.doc_to_choice", Twin::CopaChoice),
    ("wikitext.detokenizer", "wikitext", "preprocess_wikitext.wikitext_detokenizer", Twin::WikitextTarget),
    ("wikitext.process_results", "wikitext", "preprocess_wikitext.process_results", Twin::WikitextResults),
    ("truthfulqa.process_results_mc2", "truthfulqa", "utils.process_results_mc2", Twin::TruthfulqaMc2),
];

impl Twin {
    /// The twin of `function`, named in a file of the folder `folder`.
    pub fn find(function: &str, folder: &str) -> Result<Self, String> {
        TWINS
            .iter()
            .find(|(name, dir, theirs, _)| *name == function || (*dir == folder && *theirs == function))
            .map(|t| t.3)
            .ok_or_else(|| {
                let names: Vec<&str> = TWINS.iter().map(|t| t.0).collect();
                format!("Python is not run and `{function}` has no twin here (there are {})", names.join(", "))
            })
    }
}

/// What a twin needs and did not find.
#[derive(Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Column.
    pub column: String,
    /// Expected and found.
    pub problem: String,
}

type Fit<T> = Result<T, Unfit>;

fn unfit<T>(column: &str, problem: impl Into<String>) -> Fit<T> {
    Err(Unfit { column: column.into(), problem: problem.into() })
}

fn text<'a>(row: &'a Map<String, Json>, column: &str) -> Fit<&'a str> {
    match row.get(column) {
        Some(Json::String(text)) => Ok(text),
        Some(other) => unfit(column, format!("expected a string, found {other}")),
        None => unfit(column, "the row has no such column"),
    }
}

/// HellaSwag's clean-up: WikiHow's bracketed marks go, and one pass of double blanks.
fn hellaswag_text(raw: &str) -> String {
    let text = strip(raw).replace(" [title]", ". ");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        out.push_str(rest.get(..open).unwrap_or_default());
        let tail = rest.get(open..).unwrap_or_default();
        // A mark does not span lines.
        match tail.find([']', '\n']) {
            Some(end) if tail.as_bytes().get(end) == Some(&b']') => rest = tail.get(end + 1..).unwrap_or_default(),
            _ => {
                out.push('[');
                rest = tail.get(1..).unwrap_or_default();
            }
        }
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

/// A row with the columns that `twin` adds.
pub fn process_doc(twin: Twin, row: &Map<String, Json>) -> Fit<Map<String, Json>> {
    let mut out = row.clone();
    if twin == Twin::HellaswagDocs {
        let context =
            format!("{}: {} {}", text(row, "activity_label")?, text(row, "ctx_a")?, capitalize(text(row, "ctx_b")?));
        let Some(Json::Array(endings)) = row.get("endings") else {
            return unfit("endings", "expected a list of strings");
        };
        let mut choices = Vec::with_capacity(endings.len());
        for ending in endings {
            match ending {
                Json::String(ending) => choices.push(Json::from(hellaswag_text(ending))),
                other => return unfit("endings", format!("expected a string, found {other}")),
            }
        }
        let label = match row.get("label") {
            Some(Json::String(label)) => label.trim().parse::<i64>().ok(),
            Some(other) => other.as_i64(),
            None => return unfit("label", "the row has no such column"),
        };
        let Some(gold) = label else { return unfit("label", "expected a number") };
        out.insert("query".into(), hellaswag_text(&context).into());
        out.insert("choices".into(), choices.into());
        out.insert("gold".into(), gold.into());
    }
    Ok(out)
}

fn lower_first(choice: &str) -> String {
    let mut chars = choice.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().collect::<String>() + chars.as_str())
}

fn blank(row: &Map<String, Json>) -> Fit<(&str, &str)> {
    match text(row, "sentence")?.split_once('_') {
        Some(parts) => Ok(parts),
        None => unfit("sentence", "expected a blank `_`"),
    }
}

/// The value of `doc_to_text`, `doc_to_target` or `doc_to_choice`.
pub fn value(twin: Twin, row: &Map<String, Json>) -> Fit<Json> {
    Ok(match twin {
        Twin::WinograndeText => match text(row, "answer")? {
            "1" => Json::from(0),
            "2" => Json::from(1),
            other => return unfit("answer", format!("expected 1 or 2, found `{other}`")),
        },
        Twin::WinograndeTarget => Json::from(strip(blank(row)?.1)),
        Twin::WinograndeChoice => {
            let before = blank(row)?.0;
            let choice = |column| Ok(Json::from(format!("{before}{}", text(row, column)?)));
            Json::Array(vec![choice("option1")?, choice("option2")?])
        }
        Twin::CopaText => {
            let connector = match text(row, "question")? {
                "cause" => "because",
                "effect" => "therefore",
                other => return unfit("question", format!("expected cause or effect, found `{other}`")),
            };
            let mut premise = strip(text(row, "premise")?).chars();
            premise.next_back();
            Json::from(format!("{} {connector}", premise.as_str()))
        }
        Twin::CopaTarget => {
            let right = match (row.get("label"), row.get("label").and_then(Json::as_i64)) {
                (_, Some(0)) => "choice1",
                (_, Some(1)) => "choice2",
                (Some(other), _) => return unfit("label", format!("expected 0 or 1, found {other}")),
                (None, _) => return unfit("label", "the row has no such column"),
            };
            Json::from(format!(" {}", lower_first(text(row, right)?)))
        }
        Twin::CopaChoice => {
            let choice = |column| Ok(Json::from(format!(" {}", lower_first(text(row, column)?))));
            Json::Array(vec![choice("choice1")?, choice("choice2")?])
        }
        Twin::WikitextTarget => Json::from(detokenize_wikitext(text(row, "page")?)),
        Twin::HellaswagDocs | Twin::WikitextResults | Twin::TruthfulqaMc2 => {
            return unfit("", "this function gives no text");
        }
    })
}

/// What a twin of `process_results` needs of a row.
pub fn check_results(twin: Twin, row: &Map<String, Json>) -> Fit<()> {
    match twin {
        Twin::WikitextResults => text(row, "page").map(|_| ()),
        _ => Ok(()),
    }
}

/// Which of as many `answers` are true.
pub fn mc2_labels(row: &Map<String, Json>, answers: usize) -> Fit<Vec<bool>> {
    let labels = row.get("mc2_targets").and_then(|t| t.get("labels")).and_then(Json::as_array);
    let Some(labels) = labels else { return unfit("mc2_targets", "expected `labels`, a list of 0 and 1") };
    if labels.len() != answers {
        return unfit("mc2_targets", format!("{} labels for {answers} answers", labels.len()));
    }
    let label = |l: &Json| match l.as_i64() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => unfit("mc2_targets", format!("expected `labels` of 0 and 1, found {l}")),
    };
    labels.iter().map(label).collect()
}

/// Share of the probability mass, over all answers, that lies on those labelled 1: `Σ exp(ll) true / Σ exp(ll)`.
pub fn mc2(row: &Map<String, Json>, log_probs: &[f64]) -> Fit<f64> {
    let labels = mc2_labels(row, log_probs.len())?;
    let total: f64 = log_probs.iter().map(|ll| ll.exp()).sum();
    Ok(labels.iter().zip(log_probs).filter(|(l, _)| **l).map(|(_, ll)| ll.exp() / total).sum())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(value: Json) -> Map<String, Json> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn hellaswag_cleans_marks() {
        assert_eq!(hellaswag_text(" [header] How [title] Do it  now [x\ny] [step] "), " How. Do it now [x\ny] ");
        let doc = process_doc(
            Twin::HellaswagDocs,
            &row(
                json!({"activity_label": "A", "ctx_a": "B c.", "ctx_b": "tHEN D", "endings": [" [substeps] e"], "label": "0"}),
            ),
        );
        let doc = doc.unwrap();
        assert_eq!((&doc["query"], &doc["gold"]), (&json!("A: B c. Then d"), &json!(0)));
        assert_eq!(doc["choices"], json!([" e"]));
    }

    #[test]
    fn blanks_and_connectors() {
        let w = row(json!({"sentence": "A saw _ . Good", "option1": "x", "option2": "y", "answer": "2"}));
        assert_eq!(value(Twin::WinograndeText, &w).unwrap(), json!(1));
        assert_eq!(value(Twin::WinograndeTarget, &w).unwrap(), json!(". Good"));
        assert_eq!(value(Twin::WinograndeChoice, &w).unwrap(), json!(["A saw x", "A saw y"]));
        let c = row(
            json!({"premise": "It rained. ", "question": "effect", "choice1": "He ran.", "choice2": "B", "label": 0}),
        );
        assert_eq!(value(Twin::CopaText, &c).unwrap(), json!("It rained therefore"));
        assert_eq!(value(Twin::CopaTarget, &c).unwrap(), json!(" he ran."));
        let e = value(Twin::CopaText, &row(json!({"question": "why"}))).unwrap_err();
        assert_eq!(e.column, "question");
        for label in [json!(2), json!(-1), json!("0"), Json::Null] {
            let mut bad = c.clone();
            bad.insert("label".into(), label);
            assert_eq!(value(Twin::CopaTarget, &bad).unwrap_err().column, "label");
        }
    }

    #[test]
    fn mc2_is_a_share() {
        let r = row(json!({"mc2_targets": {"labels": [1, 0, 1]}}));
        let p = mc2(&r, &[0.5f64.ln(), 0.25f64.ln(), 0.25f64.ln()]).unwrap();
        assert!((p - 0.75).abs() < 1e-12);
        assert!(mc2(&r, &[0.0]).is_err());
        assert!(
            mc2_labels(&row(json!({"mc2_targets": {"labels": [1, 2]}})), 2).unwrap_err().problem.contains("found 2")
        );
    }

    #[test]
    fn names_of_both_kinds() {
        assert_eq!(Twin::find("utils.process_docs", "hellaswag").unwrap(), Twin::HellaswagDocs);
        assert_eq!(Twin::find("hellaswag.process_docs", "mine").unwrap(), Twin::HellaswagDocs);
        assert!(Twin::find("utils.process_docs", "mine").unwrap_err().contains("Python is not run"));
    }
}
