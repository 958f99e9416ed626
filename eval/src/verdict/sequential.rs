//! Looking more than once without spending the error more than once.
//!
//! Lan & DeMets (Biometrika 70, 1983) let a function of the information fraction say how much of the error may be spent up to a
//! look; ours is their O'Brien–Fleming-like `f(t) = 2 − 2Φ(Φ⁻¹(1 − α/2) / √t)`, which keeps nearly all for the end. Bounds
//! follow by the recursion of Armitage, McPherson & Rowe (1969): the density of the score process of runs that have not stopped is
//! carried from look to look on a grid.

use serde::{Deserialize, Serialize};

use super::normal;

/// Where a run with several looks stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Share of the planned items at each planned look, rising, the last 1.
    pub fractions: Vec<f64>,
    /// This look, from 0.
    pub index: usize,
}

impl Look {
    /// The only look.
    pub fn single() -> Self {
        Self { fractions: vec![1.0], index: 0 }
    }

    /// Level of a one-sided test at this look, when `alpha` is the error of all looks together.
    pub fn level(&self, alpha: f64) -> f64 {
        if self.fractions.len() <= 1 {
            return alpha;
        }
        let bound = bounds(&self.fractions, alpha).get(self.index).copied();
        bound.map_or(0.0, normal::upper)
    }
}

/// Error spent up to the information fraction `t`.
pub fn spent(t: f64, alpha: f64) -> f64 {
    if t >= 1.0 {
        return alpha;
    }
    2.0 * normal::upper(normal::quantile(1.0 - alpha / 2.0) / t.sqrt())
}

/// Points of a grid, on either side of zero. Doubling it changes bounds by less than 1e-4.
const GRID: i32 = 2000;
/// Its width in standard deviations of the score at the end.
const WIDTH: f64 = 8.0;

/// Upper bounds of the z-statistic at each look, for a one-sided test of level `alpha` in all.
pub fn bounds(fractions: &[f64], alpha: f64) -> Vec<f64> {
    let step = WIDTH / f64::from(GRID);
    let at = |i: usize| (i as f64 - f64::from(GRID)) * step;
    let points = 2 * GRID as usize + 1;
    let mut out = Vec::with_capacity(fractions.len());
    // Density of the score B(t) at the look before, of runs still going.
    let mut density: Option<Vec<f64>> = None;
    let (mut before, mut gone) = (0.0, 0.0);
    for &t in fractions {
        if t - before < 1e-9 {
            // Nothing new is seen: nothing is tested.
            out.push(f64::INFINITY);
            continue;
        }
        let spend = (spent(t, alpha) - gone).max(0.0);
        gone += spend;
        let sigma = (t - before).sqrt();
        let now: Vec<f64> = match &density {
            None => (0..points).map(|i| normal::density(at(i) / sigma) / sigma).collect(),
            Some(old) => {
                let reach = ((8.0 * sigma / step).ceil() as usize).min(points);
                let kernel: Vec<f64> =
                    (0..=reach).map(|k| normal::density(k as f64 * step / sigma) / sigma * step).collect();
                (0..points)
                    .map(|i| {
                        let range = i.saturating_sub(reach)..(i + reach + 1).min(points);
                        range.map(|j| old[j] * kernel[i.abs_diff(j)]).sum()
                    })
                    .collect()
            }
        };
        // The bound cuts off the mass to be spent, linear within a cell.
        let (mut tail, mut cut) = (0.0, at(points - 1));
        for i in (0..points).rev() {
            let cell = now[i] * step;
            if tail + cell > spend {
                let part = if cell > 0.0 { (spend - tail) / cell } else { 0.0 };
                cut = at(i) + step * (0.5 - part);
                break;
            }
            tail += cell;
        }
        out.push(if spend > 0.0 { cut / t.sqrt() } else { f64::INFINITY });
        let keep = |i: usize| ((cut - at(i)) / step + 0.5).clamp(0.0, 1.0);
        density = Some(now.iter().enumerate().map(|(i, d)| d * keep(i)).collect());
        before = t;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_bounds() {
        // gsDesign::gsDesign(k = 5, test.type = 1, alpha = 0.025, sfu = sfLDOF)$upper$bound.
        let fifths = [0.2, 0.4, 0.6, 0.8, 1.0];
        for (ours, theirs) in bounds(&fifths, 0.025).iter().zip([4.8769, 3.3569, 2.6803, 2.2898, 2.0310]) {
            assert!((ours - theirs).abs() < 3e-3, "{ours} {theirs}");
        }
        let one = bounds(&[1.0], 0.05);
        assert!((one[0] - 1.6449).abs() < 1e-3, "{one:?}");
    }

    #[test]
    fn spending_ends_with_all_of_it() {
        assert_eq!(spent(1.0, 0.05), 0.05);
        assert!(spent(0.2, 0.05) < 2e-5 && spent(0.5, 0.05) < 0.01);
        let look = Look { fractions: vec![0.5, 1.0], index: 1 };
        let level = look.level(0.05);
        assert!(level > 0.045 && level < 0.05, "{level}");
        assert_eq!(Look::single().level(0.05), 0.05);
    }
}
