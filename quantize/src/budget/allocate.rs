//! One choice for every unit under a sum of bytes: a Lagrange multiplier, then what still fits.

/// A candidate of a unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Cost.
    pub bytes: u64,
    /// What is minimized; not NaN.
    pub loss: f64,
}

/// Picks one choice of each unit so that their bytes stay within `budget` and the sum of losses is small: `None` where even the
/// smallest choices do not fit, or a unit has none.
///
/// For a multiplier λ each unit takes its least `loss + λ · bytes`; a larger λ never costs more bytes. Bisection finds the smallest
/// sum within the budget on the convex hull; the bytes left over go, step by step, to the upgrade with the best loss per byte.
/// The result is off the optimum by at most the loss of one unit's step along its hull.
pub fn allocate(units: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let pick = |lambda: f64| -> Option<Vec<usize>> {
        units
            .iter()
            .map(|choices| {
                let value = |c: &Choice| c.loss + lambda * c.bytes as f64;
                (0..choices.len()).min_by(|a, b| {
                    let (a, b) = (&choices[*a], &choices[*b]);
                    value(a).total_cmp(&value(b)).then(a.bytes.cmp(&b.bytes))
                })
            })
            .collect()
    };
    let bytes = |at: &[usize]| -> u64 { units.iter().zip(at).map(|(u, i)| u[*i].bytes).sum() };
    let smallest: Option<Vec<usize>> =
        units.iter().map(|u| (0..u.len()).min_by(|a, b| least(&u[*a], &u[*b]))).collect();
    let smallest = smallest?;
    if bytes(&smallest) > budget {
        return None;
    }
    let (mut low, mut high) = (1e-30f64, 1e9f64);
    let free = pick(0.0)?;
    let mut best = if bytes(&free) <= budget { free } else { smallest };
    for _ in 0..200 {
        let middle = (low * high).sqrt();
        let found = pick(middle)?;
        if bytes(&found) <= budget {
            high = middle;
            if loss(units, &found) < loss(units, &best) {
                best = found;
            }
        } else {
            low = middle;
        }
    }
    let mut left = budget - bytes(&best);
    while let Some((unit, choice)) = upgrade(units, &best, left) {
        left = left + units[unit][best[unit]].bytes - units[unit][choice].bytes;
        best[unit] = choice;
    }
    Some(best)
}

fn least(a: &Choice, b: &Choice) -> std::cmp::Ordering {
    a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss))
}

fn loss(units: &[Vec<Choice>], at: &[usize]) -> f64 {
    units.iter().zip(at).map(|(u, i)| u[*i].loss).sum()
}

/// The change that fits into `left` more bytes with the largest gain per byte; one that costs no byte is taken at once.
fn upgrade(units: &[Vec<Choice>], at: &[usize], left: u64) -> Option<(usize, usize)> {
    let mut best: Option<(f64, usize, usize)> = None;
    for (u, (choices, now)) in units.iter().zip(at).enumerate() {
        let now = &choices[*now];
        for (i, c) in choices.iter().enumerate().filter(|(_, c)| c.loss < now.loss && c.bytes <= now.bytes + left) {
            let gain = (now.loss - c.loss) / c.bytes.saturating_sub(now.bytes).max(1) as f64;
            if best.is_none_or(|(g, ..)| gain > g) {
                best = Some((gain, u, i));
            }
        }
    }
    best.map(|(_, u, i)| (u, i))
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// The optimum by dynamic programming over every sum of bytes.
    fn exact(units: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let mut best = vec![None; budget as usize + 1];
        best[0] = Some(0.0f64);
        for choices in units {
            let mut next = vec![None; best.len()];
            for (b, so_far) in best.iter().enumerate() {
                let Some(so_far) = so_far else { continue };
                for c in choices {
                    if let Some(slot) = next.get_mut(b + c.bytes as usize) {
                        let l = so_far + c.loss;
                        if slot.is_none_or(|s| l < s) {
                            *slot = Some(l);
                        }
                    }
                }
            }
            best = next;
        }
        best.into_iter().flatten().min_by(f64::total_cmp)
    }

    #[test]
    fn within_one_step_of_the_optimum_and_never_over_the_budget() {
        let mut rng = StdRng::seed_from_u64(5);
        let (mut found_sum, mut exact_sum) = (0.0, 0.0);
        for _ in 0..200 {
            // Loss falls by four for each bit, as quantization's does, with some disorder.
            let units: Vec<Vec<Choice>> = (0..rng.random_range(1..9))
                .map(|_| {
                    let (size, weight) = (rng.random_range(1..9u64), rng.random_range(0.1..10.0f64));
                    let noise = |rng: &mut StdRng| rng.random_range(0.8..1.25f64);
                    (2..=8)
                        .map(|b| Choice { bytes: size * b, loss: weight * noise(&mut rng) * 0.25f64.powi(b as i32) })
                        .collect()
                })
                .collect();
            let smallest: u64 = units.iter().map(|u| u[0].bytes).sum();
            let budget = rng.random_range(smallest.saturating_sub(3)..4 * smallest);
            let found = allocate(&units, budget);
            assert_eq!(found.is_some(), smallest <= budget);
            let Some(found) = found else { continue };
            assert!(units.iter().zip(&found).map(|(u, i)| u[*i].bytes).sum::<u64>() <= budget);
            let (found, best) = (loss(&units, &found), exact(&units, budget).unwrap());
            let step = units.iter().map(|u| u[0].loss).fold(0.0, f64::max);
            assert!(found >= best * (1.0 - 1e-12) && found <= best + step, "{found} {best} {step}");
            found_sum += found;
            exact_sum += best;
        }
        assert!(found_sum <= 1.1 * exact_sum, "{found_sum} {exact_sum}");
    }

    #[test]
    fn a_sensitive_unit_gets_the_bits_of_an_insensitive_one() {
        let unit = |w: f64| [2u64, 3, 4, 6].map(|b| Choice { bytes: b, loss: w * 0.25f64.powi(b as i32) }).to_vec();
        // Uniform would be 3 + 3.
        let found = allocate(&[unit(100.0), unit(0.01)], 6).unwrap();
        assert_eq!(found, [2, 0]);
        assert_eq!(allocate(&[unit(1.0)], 1), None);
        assert_eq!(allocate(&[], 0), Some(vec![]));
        assert_eq!(allocate(&[vec![]], 9), None);
        assert_eq!(allocate(&[unit(1.0)], 1000), Some(vec![3]));
    }
}
