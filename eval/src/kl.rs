//! Drift: KL(reference ‖ candidate) over the full vocabulary, both models in one pass.
//!
//! Each window runs through both models, and their logits meet a chunk of rows at a time, so nothing is stored on disk
//! and nothing is rounded or clipped. Sums of a row are f64. What a store knows of a window is not computed again.

use std::ops::Range;

use rayon::prelude::*;

use crate::drift::row::{RowDrift, compare};
use crate::drift::summary::statistics;
use crate::engine::{Answer, Store, window_key};
use crate::error::{EvalError, Result};
use crate::record::KlRecord;
use crate::scorer::{LogitRows, Scorer, check_window, chunks, rows_per_chunk};
use crate::stats::{clustered_mean, clustered_share, correlation, mean, percentile, percentiles, root_mean_square};
use crate::tasks::Response;
use crate::text::Source;

/// How much to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KlOptions {
    /// Tokens per window.
    pub window: usize,
    /// First windows only.
    pub limit: Option<usize>,
}

impl Default for KlOptions {
    fn default() -> Self {
        Self { window: 1024, limit: None }
    }
}

/// Compares the models on the first windows of `ids`: disjoint, the tail dropped, every position of a window but the
/// last scored. Windows that `store` knows are not run again, and it hears of each new one as it comes: it belongs to these two models and
/// their arithmetic. `progress` hears of windows done and their total.
pub fn evaluate_kl(
    candidate: &dyn Scorer,
    reference: &dyn Scorer,
    ids: &[u32],
    source: &Source,
    options: &KlOptions,
    store: &mut dyn Store,
    progress: &dyn Fn(usize, usize),
) -> Result<KlRecord> {
    let window = options.window;
    if window < 2 || options.limit == Some(0) {
        let (what, found) = match window {
            0 | 1 => ("the KL window", window),
            _ => ("the limit of KL windows", 0),
        };
        return Err(EvalError::BadSetting {
            what,
            found,
            expected: "a window has at least 2 tokens and there is at least one".into(),
        });
    }
    if candidate.vocab_size() != reference.vocab_size() {
        return Err(EvalError::VocabularyMismatch {
            candidate: candidate.vocab_size(),
            reference: reference.vocab_size(),
        });
    }
    let total = (ids.len() / window).min(options.limit.unwrap_or(usize::MAX));
    if total == 0 {
        return Err(EvalError::TooShort {
            what: "KL".into(),
            needed: window,
            found: ids.len(),
            hint: "give a longer text or a shorter window",
        });
    }
    progress(0, total);
    let mut drifts = Vec::with_capacity(total * (window - 1));
    for (index, tokens) in ids.chunks_exact(window).take(total).enumerate() {
        let key = window_key("kl", tokens, &(1..window));
        match store.get(&key).filter(|a| a.drift.len() == window - 1) {
            Some(known) => drifts.extend(known.drift.iter().map(|(_, row)| *row)),
            None => {
                let before = drifts.len();
                window_drift(candidate, reference, tokens, &mut drifts)?;
                check_finite(&drifts[before..], index)?;
                store.put(&key, &to_keep(&drifts[before..]))?;
            }
        }
        progress(index + 1, total);
    }
    store.finish()?;
    Ok(summarize(&drifts, source, window, total))
}

/// The rows of a window as a store keeps them, with the log-probability of its text.
fn to_keep(rows: &[RowDrift]) -> Answer {
    let rolling = |nll: fn(&RowDrift) -> f64| Response::Rolling { log_prob: -rows.iter().map(nll).sum::<f64>() };
    Answer {
        response: rolling(|row| row.candidate_nll),
        reference: Some(rolling(|row| row.reference_nll)),
        drift: (0u64..).zip(rows.iter().copied()).collect(),
    }
}

fn window_drift(candidate: &dyn Scorer, reference: &dyn Scorer, ids: &[u32], drifts: &mut Vec<RowDrift>) -> Result<()> {
    let vocab = candidate.vocab_size();
    let positions = candidate.max_positions().min(reference.max_positions());
    check_window(vocab, positions, ids, &(1..ids.len()))?;
    let inputs = ids.len() - 1;
    let reference = reference.run(&ids[..inputs])?;
    let candidate = candidate.run(&ids[..inputs])?;
    for rows in chunks(&(0..inputs), rows_per_chunk(vocab)) {
        let a = checked_logits(&*reference, rows.clone(), vocab)?;
        let b = checked_logits(&*candidate, rows.clone(), vocab)?;
        let targets = &ids[rows.start + 1..rows.end + 1];
        drifts.par_extend(
            a.par_chunks_exact(vocab)
                .zip(b.par_chunks_exact(vocab))
                .zip(targets.par_iter())
                .map(|((a, b), &target)| compare(a, b, target as usize)),
        );
    }
    Ok(())
}

/// Logits of some rows, as many as asked for.
pub(crate) fn checked_logits(window: &dyn LogitRows, rows: Range<usize>, vocab: usize) -> Result<Vec<f32>> {
    let expected = rows.len() * vocab;
    let logits = window.logits(rows)?;
    if logits.len() == expected {
        return Ok(logits);
    }
    Err(EvalError::Scores { expected, found: logits.len() })
}

fn check_finite(drifts: &[RowDrift], window: usize) -> Result<()> {
    for (position, d) in drifts.iter().enumerate() {
        let bad = [
            ("reference", "NLL", d.reference_nll),
            ("candidate", "NLL", d.candidate_nll),
            ("candidate", "KL from the reference", d.kl),
        ]
        .into_iter()
        .find(|(_, _, value)| !value.is_finite());
        if let Some((model, what, value)) = bad {
            return Err(EvalError::NotFinite { model, what, value, window, position });
        }
    }
    Ok(())
}

fn summarize(drifts: &[RowDrift], source: &Source, window: usize, windows: usize) -> KlRecord {
    let column = |f: fn(&RowDrift) -> f64| drifts.iter().map(f).collect::<Vec<f64>>();
    let sorted = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values
    };
    let window_sums =
        |f: fn(&RowDrift) -> f64| -> Vec<f64> { drifts.chunks(window - 1).map(|w| w.iter().map(f).sum()).collect() };
    let weights = vec![(window - 1) as f64; windows];
    let kl_sums = window_sums(|d| d.kl);
    let kl = sorted(column(|d| d.kl));
    let delta_p = sorted(column(|d| (-d.candidate_nll).exp() - (-d.reference_nll).exp()));
    let (reference_nll, candidate_nll) = (column(|d| d.reference_nll), column(|d| d.candidate_nll));
    let mean_interval = clustered_mean(&kl_sums, &weights);
    KlRecord {
        source: source.name.clone(),
        source_sha256: source.sha256.clone(),
        window,
        windows,
        tokens: drifts.len() as u64,
        mean: mean_interval.value,
        mean_interval: mean_interval.clamp(0.0, f64::MAX),
        median: percentile(&kl, 50.0),
        percentiles: percentiles(&kl),
        p99: percentile(&kl, 99.0),
        max: percentile(&kl, 100.0),
        min: percentile(&kl, 0.0),
        top1_agreement: clustered_share(&window_sums(|d| f64::from(u8::from(d.same_order >= 1))), &weights),
        delta_p_mean: mean(&delta_p),
        delta_p_rms: root_mean_square(&delta_p),
        delta_p_percentiles: percentiles(&delta_p),
        nll_correlation: correlation(&candidate_nll, &reference_nll),
        perplexity: mean(&candidate_nll).exp().min(f64::MAX),
        reference_perplexity: mean(&reference_nll).exp().min(f64::MAX),
        statistics: statistics(drifts),
        window_means: kl_sums.iter().map(|s| s / (window - 1) as f64).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Found, Journal, NoStore};
    use crate::fake::Fake;

    fn run(candidate: &Fake, reference: &Fake, ids: &[u32], window: usize) -> Result<KlRecord> {
        let source = Source::from_text("t", String::new());
        let options = KlOptions { window, limit: None };
        evaluate_kl(candidate, reference, ids, &source, &options, &mut NoStore, &|_, _| ())
    }

    #[test]
    fn windows_that_are_known_are_not_run_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let source = Source::from_text("t", String::new());
        let models = || {
            let of = |shift: f32| Fake::new(3, move |ids| vec![shift * ids[ids.len() - 1] as f32, 0.1, shift]);
            (of(0.5), of(0.75))
        };
        let ids: Vec<u32> = (0..40).map(|i| i * i % 3).collect();
        let measure = |limit: usize, known: usize| {
            let ((a, b), mut journal) = (models(), Journal::open(&path, "both").unwrap());
            assert_eq!(journal.found, if known == 0 { Found::New } else { Found::Continued(known) });
            let options = KlOptions { window: 8, limit: Some(limit) };
            let record = evaluate_kl(&a, &b, &ids, &source, &options, &mut journal, &|_, _| ()).unwrap();
            let runs = a.inputs.borrow().len();
            assert_eq!(runs, b.inputs.borrow().len());
            (runs, serde_json::to_string(&record).unwrap())
        };
        // `i² mod 3` repeats after three windows of eight: the fourth and fifth are known when they come.
        let (runs, _) = measure(2, 0);
        assert_eq!(runs, 2);
        let (runs, in_two) = measure(5, 2);
        assert_eq!(runs, 1);
        let (runs, known) = measure(5, 3);
        assert_eq!(runs, 0);
        let (a, b) = models();
        let whole = run(&a, &b, &ids, 8).unwrap();
        assert_eq!(a.inputs.borrow().len(), 5);
        let whole = serde_json::to_string(&whole).unwrap();
        assert_eq!((&in_two, &known), (&whole, &whole));
    }

    #[test]
    fn kl_of_known_distributions() {
        // P = (1/2, 1/4, 1/4), Q = (1/4, 1/4, 1/2): KL = ½ ln 2 + 0 − ¼ ln 2 = ¼ ln 2.
        let reference = Fake::constant(&[0.5, 0.25, 0.25]);
        let candidate = Fake::constant(&[0.25, 0.25, 0.5]);
        let r = run(&candidate, &reference, &[0, 0, 0, 2, 0, 0, 2, 2, 1], 4).unwrap();
        let expected = 0.25 * 2f64.ln();
        assert_eq!((r.windows, r.tokens, r.window_means.len()), (2, 6, 2));
        for kl in [r.mean, r.median, r.p99, r.max, r.min, r.window_means[1]] {
            assert!((kl - expected).abs() < 1e-7, "{kl}");
        }
        assert_eq!(r.top1_agreement.value, 0.0);
        // Targets 0 0 2 and 0 2 2: the candidate gives −¼ three times and +¼ three times.
        assert!(r.delta_p_mean.abs() < 1e-7 && (r.delta_p_rms - 0.25).abs() < 1e-7);
        assert!((r.perplexity - 8f64.sqrt()).abs() < 1e-6);
        assert!((r.reference_perplexity - 8f64.sqrt()).abs() < 1e-6);
        assert!((r.nll_correlation + 1.0).abs() < 1e-9);
        assert_eq!(r.percentiles.len(), 11);
        assert!(serde_json::to_string(&r).is_ok_and(|json| !json.contains("null")));
    }

    #[test]
    fn a_model_has_no_drift_from_itself() {
        let model = |shift: f32| {
            Fake::new(3, move |ids| {
                let last = ids[ids.len() - 1] as f32;
                vec![last + shift, shift + 0.3, shift - last]
            })
        };
        let ids: Vec<u32> = (0..64).map(|i| i * i % 3).collect();
        let r = run(&model(0.0), &model(0.0), &ids, 16).unwrap();
        assert_eq!((r.mean, r.max, r.delta_p_rms), (0.0, 0.0, 0.0));
        assert_eq!(r.top1_agreement.value, 1.0);
        assert!(r.top1_agreement.low < 1.0 && (r.nll_correlation - 1.0).abs() < 1e-12);
        // Logits matter up to a constant.
        let r = run(&model(8.0), &model(0.0), &ids, 16).unwrap();
        assert!(r.mean < 1e-12 && r.max < 1e-12);
    }

    #[test]
    fn the_last_token_of_a_window_is_not_fed() {
        let (a, b) = (Fake::uniform(2), Fake::uniform(2));
        run(&a, &b, &[0; 700], 300).unwrap();
        assert_eq!(*a.inputs.borrow(), [299, 299]);
        assert_eq!(*b.inputs.borrow(), [299, 299]);
    }

    #[test]
    fn mistakes_are_named() {
        let two = Fake::uniform(2);
        let r = run(&two, &Fake::uniform(3), &[0; 8], 4);
        assert!(matches!(r, Err(EvalError::VocabularyMismatch { .. })));
        let r = run(&two, &two, &[0; 3], 4);
        assert!(matches!(r, Err(EvalError::TooShort { .. })));
        let r = run(&two, &Fake::new(2, |_| vec![0.0, f32::NAN]), &[0; 8], 4);
        assert!(matches!(r, Err(EvalError::NotFinite { model: "reference", .. })));
        let never = Fake::constant(&[1.0, 0.0]);
        let r = run(&never, &two, &[0; 8], 4);
        assert!(matches!(r, Err(EvalError::NotFinite { value: f64::INFINITY, .. })));
        assert!(run(&two, &never, &[0; 8], 4).is_ok_and(|r| (r.mean - 2f64.ln()).abs() < 1e-7));
    }
}
