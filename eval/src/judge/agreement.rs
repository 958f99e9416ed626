//! How far verdicts agree beyond chance.

/// 1.96, the 97.5 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Fleiss' kappa (1971) of subjects with counts by category; subjects with fewer than two ratings say nothing. Subjects may
/// have unequal numbers: the agreement of each is the share of its pairs of ratings that agree. `None` without such subjects, or
/// where all ratings are one category, so that chance alone would agree.
pub fn fleiss(subjects: &[Vec<usize>]) -> Option<f64> {
    let rated: Vec<&Vec<usize>> = subjects.iter().filter(|s| s.iter().sum::<usize>() >= 2).collect();
    let total: usize = rated.iter().map(|s| s.iter().sum::<usize>()).sum();
    if rated.is_empty() {
        return None;
    }
    let categories = rated.iter().map(|s| s.len()).max().unwrap_or(0);
    let agreement = |s: &Vec<usize>| {
        let n = s.iter().sum::<usize>() as f64;
        let pairs: f64 = s.iter().map(|&k| k as f64 * (k as f64 - 1.0)).sum();
        pairs / (n * (n - 1.0))
    };
    let observed = rated.iter().map(|s| agreement(s)).sum::<f64>() / rated.len() as f64;
    let share = |c: usize| rated.iter().filter_map(|s| s.get(c)).sum::<usize>() as f64 / total as f64;
    let chance: f64 = (0..categories).map(|c| share(c).powi(2)).sum();
    kappa(observed, chance)
}

/// Cohen's kappa (1960) of two ratings of each subject, as a square table of counts.
pub fn cohen(table: &[Vec<usize>]) -> Option<f64> {
    let total = table.iter().flatten().sum::<usize>() as f64;
    if total == 0.0 {
        return None;
    }
    let observed = table.iter().enumerate().filter_map(|(i, r)| r.get(i)).sum::<usize>() as f64 / total;
    let row = |i: usize| table.get(i).map_or(0, |r| r.iter().sum::<usize>()) as f64;
    let column = |i: usize| table.iter().filter_map(|r| r.get(i)).sum::<usize>() as f64;
    let chance = (0..table.len()).map(|i| row(i) * column(i)).sum::<f64>() / (total * total);
    kappa(observed, chance)
}

fn kappa(observed: f64, chance: f64) -> Option<f64> {
    (chance < 1.0 - 1e-12).then(|| (observed - chance) / (1.0 - chance))
}

/// A share with Wilson's 95 % interval: value, low, high. `None` of nothing.
pub fn wilson(count: usize, of: usize) -> Option<(f64, f64, f64)> {
    if of == 0 {
        return None;
    }
    let (n, p) = (of as f64, count as f64 / of as f64);
    let scale = 1.0 + Z * Z / n;
    let centre = (p + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    Some((p, (centre - half).max(0.0), (centre + half).min(1.0)))
}

/// A mean with the normal 95 % interval of its standard error.
pub fn mean(values: &[f64]) -> Option<(f64, f64, f64)> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let half = if values.len() > 1 { Z * (variance / n).sqrt() } else { f64::INFINITY };
    (!values.is_empty()).then_some((mean, (mean - half).max(0.0), (mean + half).min(1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fleiss_of_a_published_table() {
        // Fourteen raters, ten subjects, five categories; the worked example on Wikipedia's page gives 0.210.
        let rows = [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ];
        let subjects: Vec<Vec<usize>> = rows.iter().map(|r| r.to_vec()).collect();
        assert!((fleiss(&subjects).unwrap() - 0.210).abs() < 5e-4);
        assert_eq!(fleiss(&[vec![3, 0], vec![0, 3]]), Some(1.0));
        assert_eq!((fleiss(&[vec![3, 0]]), fleiss(&[vec![1, 0]]), fleiss(&[])), (None, None, None));
    }

    #[test]
    fn cohen_by_hand() {
        // 20 and 15 agree of 50: observed 0.7, chance 0.5 · 0.6 + 0.5 · 0.4 = 0.5.
        assert!((cohen(&[vec![20, 5], vec![10, 15]]).unwrap() - 0.4).abs() < 1e-12);
        assert_eq!((cohen(&[vec![7, 0], vec![0, 0]]), cohen(&[])), (None, None));
    }

    #[test]
    fn intervals() {
        // Wilson for 8 of 10 at 95 %: 0.4902 to 0.9433.
        let (p, low, high) = wilson(8, 10).unwrap();
        assert!(p == 0.8 && (low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4, "{low} {high}");
        let (m, low, high) = mean(&[0.0, 1.0, 0.5, 0.5]).unwrap();
        // Deviation √(1/6), error 0.2041, half width 0.4001.
        assert!(m == 0.5 && (low - 0.0999).abs() < 1e-3 && (high - 0.9001).abs() < 1e-3);
        assert_eq!((wilson(0, 0), mean(&[])), (None, None));
    }
}
