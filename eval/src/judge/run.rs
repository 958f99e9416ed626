//! From items to questions, and from verdicts to values.

use std::collections::BTreeMap;

use lowbit_checkpoint::hash::sha256_hex;

use super::agreement::{cohen, fleiss, mean, wilson};
use super::prompt;
use super::record::{JudgeRecord, Pairwise, Vote};
use super::spec::{JudgeSpec, Mode};
use super::verdict::{self, Preference};
use crate::endpoint::{Ask, Remote};
use crate::engine::Store;
use crate::error::Result;
use crate::record::Interval;
use crate::tasks::{Case, Item, Message, Plan, Request, RequestKind, Response, Suite, TaskError};

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Judging {
    /// By `task/metric`.
    pub records: BTreeMap<String, JudgeRecord>,
    /// Every vote, in order of document, answer or order, and number.
    pub votes: Vec<Vote>,
}

/// One question to the judge.
struct Asked {
    /// Index of its case.
    case: usize,
    /// Whose answer is graded, or read first.
    of: Side,
    request: Request,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Candidate,
    Reference,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Candidate => "candidate",
            Side::Reference => "reference",
        }
    }
}

/// Lets `remote` judge what tasks say is to be judged, and puts the values into the items of both models. Items that end without a
/// verdict get no value. `name` is the judge's, for the record.
pub fn judge(
    remote: &Remote<'_>,
    name: &str,
    suite: &Suite,
    plan: &Plan,
    candidate: &mut [Item],
    mut reference: Option<&mut [Item]>,
    store: &mut dyn Store,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Judging> {
    let cases = suite.cases(plan)?;
    let mut asked: Vec<Asked> = Vec::new();
    let mut identical = vec![false; cases.len()];
    for (index, case) in cases.iter().enumerate() {
        let text = |items: &[Item]| -> Result<String> {
            let item = items.get(case.item).ok_or_else(|| misfit(case, "an answer", "none"))?;
            Ok(suite.answer_text(plan, case.item, item)?)
        };
        let own = text(candidate)?;
        let other = reference.as_deref().map(text).transpose()?;
        let mut put =
            |of: Side, messages: Vec<Message>| asked.push(Asked { case: index, of, request: question(case, messages) });
        match (case.spec.mode, other) {
            (Mode::Score(low, high), other) => {
                put(Side::Candidate, prompt::grade(case, &own, low, high));
                if let Some(other) = other {
                    put(Side::Reference, prompt::grade(case, &other, low, high));
                }
            }
            (Mode::Pairwise, Some(other)) => {
                identical[index] = own == other;
                if own != other {
                    put(Side::Candidate, prompt::compare(case, &own, &other));
                    put(Side::Reference, prompt::compare(case, &other, &own));
                }
            }
            (Mode::Pairwise, None) => return Err(misfit(case, "a reference to compare with", "none").into()),
        }
    }
    let asks: Vec<Ask<'_>> = asked
        .iter()
        .flat_map(|a| (0..cases[a.case].spec.votes).map(|vote| Ask { request: &a.request, vote }))
        .collect();
    let answers = remote.ask(&asks, store, progress)?.answers;
    let mut texts = answers.into_iter().map(|a| match a.response {
        Response::Generated { text } => text,
        _ => String::new(),
    });
    // By case: each question with its votes.
    let mut by_case: Vec<Vec<(Side, Vec<String>)>> = vec![Vec::new(); cases.len()];
    for a in &asked {
        let votes: Vec<String> = texts.by_ref().take(cases[a.case].spec.votes as usize).collect();
        by_case[a.case].push((a.of, votes));
    }
    let mut out = Judging::default();
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    for (index, (case, questions)) in cases.iter().zip(&by_case).enumerate() {
        let key = format!("{}/{}", case.task, case.spec.name());
        let tally = tallies.entry(key).or_insert_with(|| Tally::new(name, case));
        let values = tally.add(case, questions, identical[index], &mut out.votes);
        let set = |items: &mut [Item], value: Option<f64>| {
            if let (Some(item), Some(value)) = (items.get_mut(case.item), value) {
                item.metrics.insert(case.spec.name().into(), value);
            }
        };
        set(candidate, values.0);
        if let Some(items) = reference.as_deref_mut() {
            set(items, values.1);
        }
    }
    out.records = tallies.into_iter().map(|(key, t)| (key, t.finish())).collect();
    Ok(out)
}

fn misfit(case: &Case<'_>, expected: &str, found: &str) -> TaskError {
    TaskError::Responses { task: case.task.into(), doc: case.doc, expected: expected.into(), found: found.into() }
}

fn question(case: &Case<'_>, messages: Vec<Message>) -> Request {
    let JudgeSpec { temperature, max_tokens, .. } = *case.spec;
    let context = messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n\n");
    let kind = RequestKind::Generate {
        context,
        until: Vec::new(),
        max_new_tokens: max_tokens,
        temperature,
        do_sample: temperature > 0.0,
        messages,
        tools: Vec::new(),
    };
    Request { task: format!("{} ({})", case.task, case.spec.name()), doc: case.doc, idx: 0, kind }
}

/// The verdicts on a task so far.
struct Tally {
    record: JudgeRecord,
    /// Votes of each question by category.
    subjects: Vec<Vec<usize>>,
    pairs: Pairwise,
    rates: Vec<f64>,
    first: (usize, usize),
    /// Verdict when the candidate is read first, by verdict when the reference is.
    orders: Vec<Vec<usize>>,
}

impl Tally {
    fn new(name: &str, case: &Case<'_>) -> Self {
        let spec = case.spec;
        let scale = match spec.mode {
            Mode::Score(low, high) => Some((low, high)),
            Mode::Pairwise => None,
        };
        let record = JudgeRecord {
            judge: name.into(),
            task: case.task.into(),
            metric: spec.name().into(),
            rubric_sha256: sha256_hex(spec.rubric.as_bytes()),
            scale,
            votes: spec.votes,
            temperature: spec.temperature,
            ..JudgeRecord::default()
        };
        let orders = vec![vec![0; 3]; 3];
        Self { record, subjects: Vec::new(), pairs: Pairwise::default(), rates: Vec::new(), first: (0, 0), orders }
    }

    /// Values of a document for candidate and reference.
    fn add(
        &mut self,
        case: &Case<'_>,
        questions: &[(Side, Vec<String>)],
        identical: bool,
        votes: &mut Vec<Vote>,
    ) -> (Option<f64>, Option<f64>) {
        let r = &mut self.record;
        r.items += 1;
        let mut note = |of: Side, vote: usize, verdict: Option<String>, text: &str| {
            r.answers += 1;
            r.unreadable += usize::from(verdict.is_none());
            votes.push(Vote {
                task: case.task.into(),
                doc: case.doc,
                metric: case.spec.name().into(),
                of: of.name().into(),
                vote: vote as u32,
                verdict,
                text: text.into(),
            });
        };
        match case.spec.mode {
            Mode::Score(low, high) => {
                let mut values = [None, None];
                for (of, texts) in questions {
                    let grades: Vec<Option<i64>> = texts.iter().map(|t| verdict::grade(t, low, high)).collect();
                    for (i, (grade, text)) in grades.iter().zip(texts).enumerate() {
                        note(*of, i, grade.map(|g| g.to_string()), text);
                    }
                    let read: Vec<i64> = grades.into_iter().flatten().collect();
                    let mut counts = vec![0; (high - low + 1) as usize];
                    read.iter().for_each(|g| counts[(g - low) as usize] += 1);
                    self.subjects.push(counts);
                    let sum: i64 = read.iter().map(|g| g - low).sum();
                    values[*of as usize] =
                        (!read.is_empty()).then(|| sum as f64 / read.len() as f64 / (high - low) as f64);
                }
                r.unjudged += usize::from(questions.iter().any(|(of, _)| values[*of as usize].is_none()));
                (values[0], values[1])
            }
            Mode::Pairwise => {
                if identical {
                    self.pairs.identical += 1;
                    self.pairs.ties += 1;
                    self.rates.push(0.5);
                    return (Some(0.5), Some(0.5));
                }
                let mut orders = [None, None];
                for (of, texts) in questions {
                    // 0 the candidate, 1 the reference, 2 neither.
                    let winner = |p: Preference| match (p, *of) {
                        (Preference::Tie, _) => 2,
                        (Preference::First, Side::Candidate) | (Preference::Second, Side::Reference) => 0,
                        _ => 1,
                    };
                    let mut counts = vec![0usize; 3];
                    for (i, text) in texts.iter().enumerate() {
                        let read = verdict::preference(text);
                        note(*of, i, read.map(|p| ["candidate", "reference", "tie"][winner(p)].into()), text);
                        if let Some(p) = read {
                            counts[winner(p)] += 1;
                            self.first.0 += usize::from(p == Preference::First);
                            self.first.1 += usize::from(p != Preference::Tie);
                        }
                    }
                    let n: usize = counts.iter().sum();
                    orders[*of as usize] = (n > 0).then(|| (counts[0] as f64 + 0.5 * counts[2] as f64) / n as f64);
                    self.subjects.push(counts);
                }
                let [Some(a), Some(b)] = orders else {
                    // One order alone would carry the judge's preference for a place.
                    r.unjudged += 1;
                    return (None, None);
                };
                let say = |x: f64| {
                    if x > 0.5 {
                        0
                    } else if x < 0.5 {
                        1
                    } else {
                        2
                    }
                };
                self.orders[say(a)][say(b)] += 1;
                let rate = (a + b) / 2.0;
                match say(rate) {
                    0 => self.pairs.wins += 1,
                    1 => self.pairs.losses += 1,
                    _ => self.pairs.ties += 1,
                }
                self.rates.push(rate);
                (Some(rate), Some(1.0 - rate))
            }
        }
    }

    fn finish(mut self) -> JudgeRecord {
        let several: Vec<&Vec<usize>> = self.subjects.iter().filter(|s| s.iter().sum::<usize>() >= 2).collect();
        if !several.is_empty() {
            let one = several.iter().filter(|s| s.iter().filter(|&&n| n > 0).count() == 1).count();
            self.record.unanimous = Some(one as f64 / several.len() as f64);
            self.record.vote_kappa = fleiss(&self.subjects);
        }
        if self.record.scale.is_none() {
            let interval = |x: (f64, f64, f64)| Interval { value: x.0, low: x.1, high: x.2 };
            let both: usize = self.orders.iter().flatten().sum();
            let agree: usize = (0..3).map(|i| self.orders[i][i]).sum();
            self.record.pairwise = Some(Pairwise {
                win_rate: mean(&self.rates).map(interval),
                first_position: wilson(self.first.0, self.first.1).map(interval),
                order_consistent: (both > 0).then(|| agree as f64 / both as f64),
                order_kappa: cohen(&self.orders),
                ..self.pairs
            });
        }
        self.record
    }
}
