//! Items to one number a metric, with the standard errors lm-evaluation-harness prints.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::config::{Aggregation, OutputType};
use super::error::{Result, TaskError};
use super::item::Item;
use super::random::Random;
use super::task::Task;

/// Resamples of a bootstrap, in chunks of [`CHUNK`] seeded by their number.
const RESAMPLES: usize = 100_000;
const CHUNK: usize = 1000;

/// A metric over all items.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Value.
    pub value: f64,
    /// Standard error; none for weighted perplexities, and for a single item.
    pub stderr: Option<f64>,
    /// Direction.
    pub higher_is_better: bool,
}

/// All metrics of a task or group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Items.
    pub n: usize,
    /// By metric.
    pub metrics: BTreeMap<String, Score>,
}

impl Task {
    /// Aggregates the items of this task.
    ///
    /// Mean: standard error is the sample deviation over √n. Perplexity and median: deviation of 100,000 bootstrap
    /// resamples. Weighted perplexities have none.
    pub fn scores(&self, items: &[&Item]) -> Result<Scores> {
        let column = |name: &str| -> Result<Vec<f64>> {
            items
                .iter()
                .map(|i| {
                    i.metrics.get(name).copied().ok_or_else(|| TaskError::Responses {
                        task: self.label.clone(),
                        doc: i.doc,
                        expected: format!("metric `{name}`"),
                        found: "an item without it".into(),
                    })
                })
                .collect()
        };
        let mut metrics = BTreeMap::new();
        if items.is_empty() {
            return Ok(Scores::default());
        }
        for spec in &self.config.metrics {
            if matches!(spec.metric, super::metrics::Metric::Judge(_)) {
                // Only items with a verdict have a value; how many lack one is in the judge's record.
                let judged: Vec<f64> = items.iter().filter_map(|i| i.metrics.get(&spec.name).copied()).collect();
                if !judged.is_empty() {
                    let (value, stderr) = match spec.aggregation {
                        Aggregation::Median => (median(&judged), bootstrap(&judged, &median)),
                        _ => of_mean(&judged),
                    };
                    metrics.insert(spec.name.clone(), Score { value, stderr, higher_is_better: spec.higher_is_better });
                }
                continue;
            }
            let keys: Vec<String> = match (self.config.output_type, &spec.metric) {
                (OutputType::Generate, m) if !matches!(m, super::metrics::Metric::Pipeline(_)) => {
                    self.config.filters.iter().map(|f| super::task::keyed(&spec.name, &f.name)).collect()
                }
                _ => vec![spec.name.clone()],
            };
            for key in keys {
                let (value, stderr) = match spec.aggregation {
                    Aggregation::Mean => of_mean(&column(&key)?),
                    Aggregation::Median => {
                        let values = column(&key)?;
                        (median(&values), bootstrap(&values, &median))
                    }
                    Aggregation::Perplexity => {
                        let lls = column("log_prob")?;
                        let perplexity = |lls: &[f64]| (-mean(lls)).exp();
                        (perplexity(&lls), bootstrap(&lls, &perplexity))
                    }
                    Aggregation::WeightedPerplexity => {
                        let weight = if matches!(spec.metric, super::metrics::Metric::WordPerplexity) {
                            "words"
                        } else {
                            "bytes"
                        };
                        ((-sum(&column("log_prob")?) / sum(&column(weight)?)).exp(), None)
                    }
                    Aggregation::BitsPerByte => {
                        (-sum(&column("log_prob")?) / sum(&column("bytes")?) / std::f64::consts::LN_2, None)
                    }
                };
                let score = Score { value, stderr, higher_is_better: spec.higher_is_better };
                // lm-eval calls mc2's share `acc`: both names are there.
                if matches!(spec.metric, super::metrics::Metric::Mc2) {
                    metrics.insert("acc".to_owned(), score);
                }
                if matches!(spec.metric, super::metrics::Metric::AccNorm) {
                    let (value, stderr) = of_mean(&column("acc_bytes")?);
                    metrics.insert("acc_bytes".to_owned(), Score { value, stderr, higher_is_better: true });
                }
                metrics.insert(key, score);
            }
        }
        Ok(Scores { n: items.len(), metrics })
    }
}

fn sum(values: &[f64]) -> f64 {
    values.iter().sum()
}

fn mean(values: &[f64]) -> f64 {
    sum(values) / values.len() as f64
}

/// The upper of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Square root of the sum of squared deviations over n − 1.
fn deviation(values: &[f64]) -> f64 {
    let centre = mean(values);
    (values.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

fn of_mean(values: &[f64]) -> (f64, Option<f64>) {
    let stderr = (values.len() > 1).then(|| deviation(values) / (values.len() as f64).sqrt());
    (mean(values), stderr)
}

/// Deviation of a statistic over resamples drawn as `random.Random(chunk).choices` draws them.
fn bootstrap(values: &[f64], statistic: &(dyn Fn(&[f64]) -> f64 + Sync)) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let chunks: Vec<Vec<f64>> = (0..RESAMPLES / CHUNK)
        .into_par_iter()
        .map(|chunk| {
            let mut random = Random::new(chunk as u64);
            let mut drawn = vec![0.0; values.len()];
            (0..CHUNK)
                .map(|_| {
                    for slot in &mut drawn {
                        *slot = values[random.choice(values.len())];
                    }
                    statistic(&drawn)
                })
                .collect()
        })
        .collect();
    Some(deviation(&chunks.concat()))
}

/// A metric that a group averages over its tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupMetric {
    /// Metric.
    pub metric: String,
    /// Filters; all that there are without.
    pub filters: Option<Vec<String>>,
    /// Weigh by the number of items.
    pub weight_by_size: bool,
}

/// A group's scores from those of its tasks.
///
/// The mean is weighted by items; its error pools the tasks' variances,
/// `√(Σ (nᵢ−1) nᵢ sᵢ² / (Σ nᵢ − k) / Σ nᵢ)`. Unweighted, it is `√Σ sᵢ² / k`.
pub fn group_scores(metrics: &[GroupMetric], tasks: &[&Scores]) -> Scores {
    let mut out = Scores { n: tasks.iter().map(|t| t.n).sum(), metrics: BTreeMap::new() };
    for wanted in metrics {
        let mut keys: Vec<&String> = tasks.iter().flat_map(|t| t.metrics.keys()).collect();
        keys.sort();
        keys.dedup();
        keys.retain(|k| {
            let (metric, filter) = k.split_once(',').unwrap_or((k, "none"));
            metric == wanted.metric && wanted.filters.as_ref().is_none_or(|f| f.iter().any(|f| f == filter))
        });
        for key in keys {
            let parts: Vec<(f64, Score)> =
                tasks.iter().filter_map(|t| t.metrics.get(key).map(|s| (t.n as f64, *s))).collect();
            let weight = |n: f64| if wanted.weight_by_size { n } else { 1.0 };
            let total: f64 = parts.iter().map(|(n, _)| weight(*n)).sum();
            let value = parts.iter().map(|(n, s)| weight(*n) * s.value).sum::<f64>() / total;
            let errors: Option<Vec<(f64, f64)>> = parts.iter().map(|(n, s)| s.stderr.map(|e| (*n, e))).collect();
            let k = parts.len() as f64;
            let stderr = errors.map(|errors| {
                if wanted.weight_by_size {
                    let pooled = errors.iter().map(|(n, e)| (n - 1.0) * e * e * n).sum::<f64>() / (total - k);
                    (pooled / total).sqrt()
                } else {
                    errors.iter().map(|(_, e)| e * e).sum::<f64>().sqrt() / k
                }
            });
            let higher = parts.first().is_none_or(|(_, s)| s.higher_is_better);
            out.metrics.insert(key.clone(), Score { value, stderr, higher_is_better: higher });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_its_error() {
        let (value, stderr) = of_mean(&[1.0, 0.0, 1.0, 1.0]);
        assert_eq!((value, stderr), (0.75, Some(0.25)));
        assert_eq!(of_mean(&[1.0]), (1.0, None));
        assert_eq!(median(&[3.0, 1.0, 2.0, 4.0]), 3.0);
    }

    #[test]
    fn bootstrap_as_in_python() {
        // lm_eval.api.metrics.bootstrap_stderr(perplexity, xs, 100000) of 0.4.13.
        let xs = [-1.0, -2.5, -0.25, -4.0, -3.0];
        let got = bootstrap(&xs, &|lls: &[f64]| (-mean(lls)).exp()).unwrap();
        assert!((got - 6.52061364940423).abs() < 1e-9, "{got}");
    }

    #[test]
    fn groups_weigh_by_size() {
        let task = |n, value, stderr| Scores {
            n,
            metrics: [("acc".to_owned(), Score { value, stderr: Some(stderr), higher_is_better: true })].into(),
        };
        let (a, b) = (task(100, 0.5, 0.05), task(300, 0.7, 0.02));
        let metric = |weight| GroupMetric { metric: "acc".into(), filters: None, weight_by_size: weight };
        let g = group_scores(&[metric(true)], &[&a, &b]).metrics["acc"];
        // lm_eval.api.metrics.pooled_sample_stderr([0.05, 0.02], [100, 300]).
        assert!((g.value - 0.65).abs() < 1e-12 && (g.stderr.unwrap() - 0.019515166116195724).abs() < 1e-12, "{g:?}");
        let g = group_scores(&[metric(false)], &[&a, &b]).metrics["acc"];
        assert!((g.value - 0.6).abs() < 1e-12 && (g.stderr.unwrap() - (0.0029f64).sqrt() / 2.0).abs() < 1e-12);
        assert!(group_scores(&[GroupMetric { metric: "acc_norm".into(), ..metric(true) }], &[&a]).metrics.is_empty());
    }
}
