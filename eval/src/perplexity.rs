//! Perplexity of a plan's windows, alone or paired with a reference.

use lowbit_kernels::backend::TokenScore;

use crate::engine::{Answer, Store, window_key};
use crate::error::{EvalError, Result};
use crate::protocol::{Window, WindowPlan};
use crate::record::PerplexityRecord;
use crate::scorer::Scorer;
use crate::stats::{clustered_mean, perplexity_ratio};
use crate::tasks::Response;
use crate::text::Source;

/// Scores every window with the candidate and, where there is one, the reference.
///
/// Windows that `store` knows are not scored again, and it hears of each new one as it comes: it belongs to these models and their
/// arithmetic. `progress` hears of windows done and their total. The record's `window_nll` holds one mean per cluster: nats a
/// token for each window, or nats a word for each page of `lm-eval-word`.
pub fn evaluate_perplexity(
    candidate: &dyn Scorer,
    reference: Option<&dyn Scorer>,
    plan: &WindowPlan,
    source: &Source,
    store: &mut dyn Store,
    progress: &dyn Fn(usize, usize),
) -> Result<PerplexityRecord> {
    let total = plan.windows.len();
    let clusters = plan.weights.len();
    let mut candidate_nll = vec![0.0; clusters];
    let mut reference_nll = vec![0.0; if reference.is_some() { clusters } else { 0 }];
    progress(0, total);
    for (index, window) in plan.windows.iter().enumerate() {
        let key = window_key("nll", &window.ids, &window.scored);
        let (own, other) = match store.get(&key).and_then(|a| known(&a, reference.is_some())) {
            Some(sums) => sums,
            None => {
                let own = window_nll(candidate, "candidate", window, index)?;
                let other = reference.map(|r| window_nll(r, "reference", window, index)).transpose()?;
                let rolling = |nll: f64| Response::Rolling { log_prob: -nll };
                let answer = Answer { response: rolling(own), reference: other.map(rolling), drift: Vec::new() };
                store.put(&key, &answer)?;
                (own, other)
            }
        };
        candidate_nll[window.cluster] += own;
        if let Some(other) = other {
            reference_nll[window.cluster] += other;
        }
        progress(index + 1, total);
    }
    store.finish()?;
    let means = |sums: &[f64]| sums.iter().zip(&plan.weights).map(|(s, w)| s / w).collect();
    Ok(PerplexityRecord {
        protocol: plan.protocol.to_string(),
        source: source.name.clone(),
        source_sha256: source.sha256.clone(),
        window: plan.window,
        windows: total,
        scored_tokens: plan.scored_tokens(),
        bos: plan.bos.to_owned(),
        perplexity: clustered_mean(&candidate_nll, &plan.weights).exp(),
        reference: reference.map(|_| clustered_mean(&reference_nll, &plan.weights).exp()),
        ratio: reference.map(|_| perplexity_ratio(&candidate_nll, &reference_nll, &plan.weights)),
        window_nll: means(&candidate_nll),
        reference_window_nll: means(&reference_nll),
    })
}

/// Summed NLLs of a window that was scored before: the candidate's and, where it was `paired`, the reference's.
fn known(answer: &Answer, paired: bool) -> Option<(f64, Option<f64>)> {
    let nll = |r: &Response| match r {
        Response::Rolling { log_prob } => Some(-log_prob),
        _ => None,
    };
    let other = answer.reference.as_ref().and_then(nll);
    Some((nll(&answer.response)?, other)).filter(|k| k.1.is_some() == paired)
}

/// Summed NLL of one window's targets, nats.
fn window_nll(model: &dyn Scorer, who: &'static str, window: &Window, index: usize) -> Result<f64> {
    let scores: Vec<TokenScore> = model.score(&window.ids, window.scored.clone())?;
    if scores.len() != window.scored.len() {
        return Err(EvalError::Scores { expected: window.scored.len(), found: scores.len() });
    }
    let mut sum = 0.0;
    for (score, position) in scores.iter().zip(window.scored.clone()) {
        let nll = -f64::from(score.log_prob);
        if !nll.is_finite() {
            return Err(EvalError::NotFinite { model: who, what: "NLL", value: nll, window: index, position });
        }
        sum += nll;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::engine::{Journal, NoStore};
    use crate::fake::{ByteTokenizer, Fake};
    use crate::protocol::{Protocol, Setup};

    fn plan(protocol: &str, source: &Source, limit: Option<usize>) -> WindowPlan {
        let protocol: Protocol = protocol.parse().unwrap();
        let setup = Setup { max_positions: 64, eos: None, limit };
        let tokenizer = ByteTokenizer { adds_bos: true };
        protocol.plan(source, &tokenizer, &setup).unwrap()
    }

    #[test]
    fn uniform_model_has_the_vocabulary_as_perplexity() {
        let text = Source::from_text("t", "abcdefgh".repeat(40));
        for protocol in ["gptq-32", "llama.cpp-64", "stride:16"] {
            let model = Fake::uniform(300);
            let plan = plan(protocol, &text, None);
            let calls = Cell::new(0);
            let count = |_, _| calls.set(calls.get() + 1);
            let r = evaluate_perplexity(&model, None, &plan, &text, &mut NoStore, &count).unwrap();
            assert!((r.perplexity.value - 300.0).abs() < 1e-3, "{protocol}");
            assert!(r.perplexity.low <= r.perplexity.value && r.ratio.is_none());
            assert_eq!(calls.get(), plan.windows.len() + 1);
            assert_eq!(r.window_nll.len(), plan.windows.len());
            assert!(r.reference_window_nll.is_empty());
        }
    }

    #[test]
    fn ratio_of_known_models() {
        // 1/2 against 1/4 for token "a" everywhere: perplexities 2 and 4, ratio 1/2, no spread.
        let text = Source::from_text("t", "a".repeat(64));
        let favour = |p: f32| {
            let rest = (1.0 - p) / 299.0;
            let mut dist = vec![rest; 300];
            dist[usize::from(b'a')] = p;
            Fake::constant(&dist)
        };
        let (candidate, reference) = (favour(0.5), favour(0.25));
        let plan = plan("gptq-16", &text, Some(3));
        let r = evaluate_perplexity(&candidate, Some(&reference), &plan, &text, &mut NoStore, &|_, _| ()).unwrap();
        assert_eq!((r.windows, r.scored_tokens), (3, 45));
        let ratio = r.ratio.unwrap();
        assert!((r.perplexity.value - 2.0).abs() < 1e-5);
        assert!((r.reference.unwrap().value - 4.0).abs() < 1e-5);
        assert!((ratio.value - 0.5).abs() < 1e-6 && (ratio.high - ratio.low).abs() < 1e-6);
    }

    #[test]
    fn word_perplexity_divides_by_words_of_the_original() {
        // 11 bytes and BOS are scored (12 targets of ln 300) over 4 words; the space in " , " goes, the word stays.
        let pages = Source::from_pages("p", vec!["abc , defg h".to_owned()]);
        let plan = plan("lm-eval-word", &pages, None);
        let model = Fake::uniform(300);
        let r = evaluate_perplexity(&model, None, &plan, &pages, &mut NoStore, &|_, _| ()).unwrap();
        assert_eq!((r.scored_tokens, r.bos.as_str()), (12, "every page"));
        let expected = 12.0 * 300f64.ln() / 4.0;
        assert!((r.perplexity.value.ln() - expected).abs() < 1e-5);
        assert!(!r.perplexity.is_bounded());
    }

    #[test]
    fn only_what_is_scored_is_fed() {
        let text = Source::from_text("t", "x".repeat(200));
        let plan = plan("llama.cpp-64", &text, None);
        let model = Fake::uniform(300);
        evaluate_perplexity(&model, None, &plan, &text, &mut NoStore, &|_, _| ()).unwrap();
        assert_eq!(*model.inputs.borrow(), [63; 3]);
    }

    #[test]
    fn windows_that_are_known_are_not_scored_again() {
        let dir = tempfile::tempdir().unwrap();
        let text =
            Source::from_text("t", (0..160u32).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect::<String>());
        let measure = |limit: Option<usize>| {
            let mut journal = Journal::open(&dir.path().join("j"), "both").unwrap();
            let of =
                |step: f32| Fake::new(300, move |ids| (0..300usize).map(|v| step * (v ^ ids.len()) as f32).collect());
            let (own, other, plan) = (of(0.01), of(0.02), plan("gptq-16", &text, limit));
            let r = evaluate_perplexity(&own, Some(&other), &plan, &text, &mut journal, &|_, _| ()).unwrap();
            (own.inputs.borrow().len(), serde_json::to_string(&r).unwrap())
        };
        assert_eq!(measure(Some(4)).0, 4);
        let (scored, record) = measure(None);
        assert_eq!(scored, 6);
        assert_eq!(measure(None), (0, record.clone()));
        std::fs::remove_file(dir.path().join("j")).unwrap();
        assert_eq!(measure(None), (10, record));
    }

    #[test]
    fn nan_is_an_error() {
        let text = Source::from_text("t", "x".repeat(64));
        let plan = plan("gptq-16", &text, None);
        let model = Fake::new(300, |_| vec![f32::NAN; 300]);
        let r = evaluate_perplexity(&model, None, &plan, &text, &mut NoStore, &|_, _| ());
        assert!(matches!(r, Err(EvalError::NotFinite { .. })));
    }
}
