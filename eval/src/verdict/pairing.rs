//! Items of two models side by side; nothing is compared that was not asked alike.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::evidence::Evidence;
use crate::error::{EvalError, Result};
use crate::judge::spec::{PAIRWISE, SCORE};
use crate::tasks::Item;

/// Metrics a task is judged by, the first that its items have; any other comes after them by name.
const PRIMARY: [&str; 14] = [
    "acc",
    "exact_match",
    "exact_match,strict-match",
    "exact_match,",
    "tool_calls",
    "json_equal",
    "json_schema",
    "numeric",
    "regex",
    "contains",
    "mc2",
    SCORE,
    PAIRWISE,
    "rouge_l",
];
/// Metrics that an item may lack: a judge said nothing that could be read.
const JUDGED: [&str; 2] = [SCORE, PAIRWISE];
/// Values of items that are no scores.
const NO_SCORE: [&str; 3] = ["log_prob", "words", "bytes"];

/// How items are paired.
#[derive(Clone, Debug, Default)]
pub struct PairingOptions {
    /// Name asked for → labels of its tasks; a task in none is its own.
    pub families: BTreeMap<String, Vec<String>>,
    /// Metric of a task or family, instead of the first of its kind.
    pub metrics: BTreeMap<String, String>,
    /// Metrics of which less is better, by the task's label.
    pub lower_is_better: Vec<(String, String)>,
}

/// One document by both models.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The reference's score.
    pub reference: f64,
    /// The candidate's.
    pub candidate: f64,
    /// Number of its cluster within the series.
    pub cluster: usize,
}

/// The pairs of one task or family.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Task or family.
    pub name: String,
    /// Metric.
    pub metric: String,
    /// In order of task and document.
    pub scores: Vec<Score>,
    /// Pairs without a judge's verdict on either side, which are not among them.
    pub unjudged: usize,
    /// 1, or −1 for a metric of which less is better.
    sign: f64,
}

/// Log-likelihoods of rolled texts by page.
#[derive(Clone, Debug, PartialEq)]
pub struct Texts {
    /// Task.
    pub name: String,
    /// Log-probability of each cluster: candidate, reference.
    pub log_probs: Vec<(f64, f64)>,
    /// Words of each cluster.
    pub words: Vec<f64>,
}

/// An item whose score changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flip {
    /// Task.
    pub task: String,
    /// Document.
    pub doc: usize,
    /// The reference's score.
    pub reference: f64,
    /// The candidate's.
    pub candidate: f64,
    /// What was right, where there were choices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gold: Vec<usize>,
    /// The reference's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_choice: Option<usize>,
    /// The candidate's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate_choice: Option<usize>,
    /// How much log-likelihood the candidate moved from the right choice to its own (nats); how far its likelihood of the target
    /// fell, where there is one request only.
    pub moved: f64,
}

/// Everything paired.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Paired {
    /// Tasks with scores.
    pub series: Vec<Series>,
    /// Rolled texts.
    pub texts: Vec<Texts>,
    /// Items whose score changed: losses first, the furthest moved first.
    pub flips: Vec<Flip>,
}

impl Series {
    /// Pairs of a metric of which more is better.
    pub fn new(name: &str, metric: &str, scores: Vec<Score>) -> Self {
        Self { name: name.to_owned(), metric: metric.to_owned(), scores, unjudged: 0, sign: 1.0 }
    }

    /// Differences, reference less candidate where more is better.
    pub fn evidence(&self) -> Evidence {
        let binary = self.scores.iter().all(|s| [s.reference, s.candidate].iter().all(|v| *v == 0.0 || *v == 1.0));
        let differences: Vec<f64> = self.scores.iter().map(|s| self.sign * (s.reference - s.candidate)).collect();
        let clusters: Vec<usize> = self.scores.iter().map(|s| s.cluster).collect();
        Evidence::of(&differences, &clusters, binary)
    }

    /// Mean of the reference and of the candidate.
    pub fn means(&self) -> (f64, f64) {
        means(self.scores.iter())
    }
}

fn means<'a>(scores: impl Iterator<Item = &'a Score>) -> (f64, f64) {
    let (n, r, c) = scores.fold((0.0, 0.0, 0.0), |(n, r, c), s| (n + 1.0, r + s.reference, c + s.candidate));
    (r / f64::max(n, 1.0), c / f64::max(n, 1.0))
}

impl Paired {
    /// Mean of all items, of the reference and of the candidate.
    pub fn means(&self) -> (f64, f64) {
        means(self.series.iter().flat_map(|s| &s.scores))
    }
}

fn unpaired(problem: String) -> EvalError {
    EvalError::Unpaired { problem }
}

/// Pairs items by task and document; prompts, documents and targets must be the same, and none may be missing on either side.
pub fn pair(candidate: &[Item], reference: &[Item], options: &PairingOptions) -> Result<Paired> {
    let index = |items: &'_ [Item], whose: &str| -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        match items.iter().find(|i| !seen.insert((i.task.clone(), i.doc))) {
            Some(i) => Err(unpaired(format!("document {} of {} is twice in the {whose}'s items", i.doc, i.task))),
            None => Ok(()),
        }
    };
    index(candidate, "candidate")?;
    index(reference, "reference")?;
    let theirs: HashMap<(&str, usize), &Item> = reference.iter().map(|i| ((i.task.as_str(), i.doc), i)).collect();
    let mut pairs: Vec<(&Item, &Item)> = Vec::with_capacity(candidate.len());
    let (mut missing, mut differ) = (Vec::new(), Vec::new());
    for own in candidate {
        match theirs.get(&(own.task.as_str(), own.doc)) {
            None => missing.push(own),
            Some(other) => {
                let fields = [
                    ("document", &own.doc_hash, &other.doc_hash),
                    ("prompt", &own.prompt_hash, &other.prompt_hash),
                    ("target", &own.target_hash, &other.target_hash),
                ];
                match fields.iter().find(|f| f.1 != f.2) {
                    Some(f) => differ.push((own, f.0)),
                    None => pairs.push((own, other)),
                }
            }
        }
    }
    if let Some((first, what)) = differ.first() {
        return Err(unpaired(format!(
            "{} of {} items were not asked alike: first the {what} of document {} of {}",
            differ.len(),
            candidate.len(),
            first.doc,
            first.task
        )));
    }
    if let Some(first) = missing.first() {
        return Err(unpaired(format!(
            "{} of the candidate's {} items are not among the reference's: first document {} of {}",
            missing.len(),
            candidate.len(),
            first.doc,
            first.task
        )));
    }
    if reference.len() > candidate.len() {
        return Err(unpaired(format!(
            "the reference has {} items and the candidate {}",
            reference.len(),
            candidate.len()
        )));
    }
    pairs.sort_by(|a, b| (&a.0.task, a.0.doc).cmp(&(&b.0.task, b.0.doc)));
    let mut groups: BTreeMap<&str, Vec<(&Item, &Item)>> = BTreeMap::new();
    for pair in pairs {
        let family = options.families.iter().find(|f| f.1.contains(&pair.0.task)).map(|f| f.0.as_str());
        groups.entry(family.unwrap_or(&pair.0.task)).or_default().push(pair);
    }
    let mut out = Paired::default();
    for (name, pairs) in groups {
        match metric(name, &pairs, options)? {
            Some(metric) => series(name, metric, &pairs, options, &mut out)?,
            None => texts(name, &pairs, &mut out)?,
        }
    }
    // Losses first, and of those the furthest moved; ties by place.
    out.flips.sort_by(|a, b| {
        let lost = |f: &Flip| f.candidate < f.reference;
        lost(b).cmp(&lost(a)).then(b.moved.total_cmp(&a.moved)).then((&a.task, a.doc).cmp(&(&b.task, b.doc)))
    });
    Ok(out)
}

/// The metric a family is judged by; none for rolled texts.
fn metric<'a>(name: &str, pairs: &[(&'a Item, &'a Item)], options: &PairingOptions) -> Result<Option<String>> {
    let Some((first, _)) = pairs.first() else { return Ok(None) };
    let mut have: Vec<&String> = first.metrics.keys().filter(|k| !NO_SCORE.contains(&k.as_str())).collect();
    // A verdict may be missing from the first document.
    for judged in JUDGED {
        let both = |p: &(&'a Item, &'a Item)| p.0.metrics.get_key_value(judged).or(p.1.metrics.get_key_value(judged));
        let found = pairs.iter().find_map(both).map(|m| m.0);
        have.extend(found.filter(|f| !have.contains(f)));
    }
    let asked = options.metrics.get(name).or_else(|| options.metrics.get(&first.task));
    if let Some(asked) = asked {
        return match first.metrics.contains_key(asked) || have.contains(&asked) {
            true => Ok(Some(asked.clone())),
            false => Err(unpaired(format!("{name} has no metric {asked}; there are {have:?}"))),
        };
    }
    let of_kind = |p: &str| have.iter().find(|k| if p.ends_with(',') { k.starts_with(p) } else { k.as_str() == p });
    Ok(PRIMARY.iter().find_map(|p| of_kind(p)).or(have.first()).map(|k| (*k).clone()))
}

fn series(
    name: &str,
    metric: String,
    pairs: &[(&Item, &Item)],
    options: &PairingOptions,
    out: &mut Paired,
) -> Result<()> {
    let mut numbers: HashMap<String, usize> = HashMap::new();
    let mut scores = Vec::with_capacity(pairs.len());
    let lower = pairs.first().is_some_and(|p| options.lower_is_better.iter().any(|l| l.0 == p.0.task && l.1 == metric));
    let mut unjudged = 0;
    for (own, other) in pairs {
        if JUDGED.contains(&metric.as_str()) && [own, other].iter().any(|i| !i.metrics.contains_key(&metric)) {
            unjudged += 1;
            continue;
        }
        let value = |item: &Item, whose: &str| {
            item.metrics.get(&metric).copied().filter(|v| v.is_finite()).ok_or_else(|| {
                unpaired(format!("document {} of {} has no {metric} in the {whose}'s items", item.doc, item.task))
            })
        };
        let (candidate, reference) = (value(own, "candidate")?, value(other, "reference")?);
        let key = match &own.cluster {
            Some(c) => format!("{}\u{0}{c}", own.task),
            None => format!("{}\u{0}\u{0}{}", own.task, own.doc),
        };
        let next = numbers.len();
        let cluster = *numbers.entry(key).or_insert(next);
        scores.push(Score { reference, candidate, cluster });
        if reference != candidate {
            out.flips.push(flip(own, other, reference, candidate));
        }
    }
    out.series.push(Series { name: name.into(), metric, scores, unjudged, sign: if lower { -1.0 } else { 1.0 } });
    Ok(())
}

/// Log-likelihood that moved away from what is right.
fn flip(own: &Item, other: &Item, reference: f64, candidate: f64) -> Flip {
    let margin = |i: &Item| -> Option<f64> {
        let gold = i.gold.iter().filter_map(|g| i.log_probs.get(*g)).copied().reduce(f64::max)?;
        let rest = i.log_probs.iter().enumerate().filter(|(k, _)| !i.gold.contains(k)).map(|p| *p.1).reduce(f64::max);
        Some(gold - rest.unwrap_or(0.0))
    };
    let moved = match (margin(other), margin(own)) {
        (Some(a), Some(b)) => a - b,
        _ => other.log_probs.first().zip(own.log_probs.first()).map_or(0.0, |(a, b)| a - b),
    };
    Flip {
        task: own.task.clone(),
        doc: own.doc,
        reference,
        candidate,
        gold: own.gold.clone(),
        reference_choice: other.choice,
        candidate_choice: own.choice,
        moved,
    }
}

fn texts(name: &str, pairs: &[(&Item, &Item)], out: &mut Paired) -> Result<()> {
    let mut own = Texts { name: name.into(), log_probs: Vec::new(), words: Vec::new() };
    for (candidate, reference) in pairs {
        let value = |item: &Item, key: &str| {
            item.metrics.get(key).copied().filter(|v| v.is_finite()).ok_or_else(|| {
                unpaired(format!("document {} of {} has neither a score nor `{key}`", item.doc, item.task))
            })
        };
        own.log_probs.push((value(candidate, "log_prob")?, value(reference, "log_prob")?));
        own.words.push(value(candidate, "words")?);
    }
    out.texts.push(own);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(task: &str, doc: usize, acc: f64) -> Item {
        Item {
            task: task.into(),
            doc,
            doc_hash: format!("d{doc}"),
            prompt_hash: format!("p{doc}"),
            target_hash: "t".into(),
            cluster: None,
            metrics: [("acc".to_owned(), acc), ("acc_norm".to_owned(), 1.0 - acc)].into(),
            log_probs: vec![-1.0, -2.0 - acc],
            choice: Some(if acc == 1.0 { 0 } else { 1 }),
            gold: vec![0],
            responses: vec![],
        }
    }

    #[test]
    fn pairs_by_document_whatever_the_order() {
        let reference: Vec<Item> = (0..4).map(|d| item("a", d, 1.0)).collect();
        let mut candidate: Vec<Item> = (0..4).map(|d| item("a", d, f64::from(u8::from(d != 2)))).collect();
        candidate.reverse();
        let paired = pair(&candidate, &reference, &PairingOptions::default()).unwrap();
        assert_eq!((paired.series[0].metric.as_str(), paired.series[0].means()), ("acc", (1.0, 0.75)));
        assert_eq!(paired.series[0].evidence(), Evidence::table(4, 1, 0));
        assert_eq!((paired.flips[0].doc, paired.flips[0].moved), (2, 1.0));
        let norm = PairingOptions { metrics: [("a".into(), "acc_norm".into())].into(), ..Default::default() };
        assert_eq!(pair(&candidate, &reference, &norm).unwrap().series[0].evidence(), Evidence::table(4, 0, 1));
    }

    #[test]
    fn families_are_one_series() {
        let both = |acc| vec![item("m_a", 0, acc), item("m_b", 0, acc), item("x", 0, acc)];
        let families = [("m".to_owned(), vec!["m_a".to_owned(), "m_b".to_owned()])].into();
        let paired = pair(&both(1.0), &both(1.0), &PairingOptions { families, ..Default::default() }).unwrap();
        let names: Vec<(&str, usize)> = paired.series.iter().map(|s| (s.name.as_str(), s.scores.len())).collect();
        assert_eq!(names, [("m", 2), ("x", 1)]);
    }

    #[test]
    fn pairs_without_a_verdict_are_counted_and_left_out() {
        let judged = |doc, value: Option<f64>| {
            let mut i = item("a", doc, 1.0);
            i.metrics = value.map(|v| (SCORE.to_owned(), v)).into_iter().collect();
            i
        };
        let reference: Vec<Item> = (0..4).map(|d| judged(d, Some(0.75))).collect();
        let candidate = [judged(0, None), judged(1, Some(0.5)), judged(2, Some(0.75)), judged(3, Some(1.0))];
        let series = pair(&candidate, &reference, &PairingOptions::default()).unwrap().series.remove(0);
        assert_eq!((series.metric.as_str(), series.scores.len(), series.unjudged), (SCORE, 3, 1));
        let e = series.evidence();
        assert_eq!((e.n, e.losses, e.gains, e.loss(), e.test()), (3, 1, 1, 0.0, "sign-flip permutation"));
    }

    #[test]
    fn what_was_not_asked_alike_is_refused() {
        let reference: Vec<Item> = (0..3).map(|d| item("a", d, 1.0)).collect();
        let refused = |candidate: &[Item]| match pair(candidate, &reference, &PairingOptions::default()) {
            Err(e) => e.to_string(),
            Ok(_) => panic!("accepted"),
        };
        let mut other = reference.clone();
        other[1].prompt_hash = "else".into();
        assert!(refused(&other).contains("the prompt of document 1 of a"), "{}", refused(&other));
        assert!(refused(&reference[..2]).contains("3 items and the candidate 2"));
        let more: Vec<Item> = (0..4).map(|d| item("a", d, 1.0)).collect();
        assert!(refused(&more).contains("document 3 of a"));
        let twice = [reference.clone(), vec![item("a", 0, 1.0)]].concat();
        assert!(refused(&twice).contains("twice"));
        let mut nan = reference.clone();
        nan[0].metrics.insert("acc".into(), f64::NAN);
        assert!(refused(&nan).contains("no acc"));
    }
}
