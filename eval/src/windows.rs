//! Overlapping windows that score every token once.

use std::ops::Range;

/// lm-eval's rolling windows with one token of context: the first starts from `prefix`, each later one scores the
/// next `length` tokens given at least the one before, and the last reaches back so that its input is `length` long.
pub fn rolling(prefix: u32, ids: &[u32], length: usize) -> impl Iterator<Item = (Vec<u32>, Range<usize>)> {
    let length = length.max(1);
    (0..ids.len()).step_by(length).map(move |start| {
        let end = (start + length).min(ids.len());
        let window: Vec<u32> = if start == 0 {
            std::iter::once(prefix).chain(ids[..end].iter().copied()).collect()
        } else {
            ids[end - length - 1..end].to_vec()
        };
        let tokens = window.len();
        (window, tokens - (end - start)..tokens)
    })
}

/// Windows of at most `length` tokens, `stride` (at most `length`) apart, each scoring what the one before did not.
///
/// The stream's first token is context only; where windows do not overlap (`stride == length`), so is the first of
/// each.
pub fn sliding(ids: &[u32], length: usize, stride: usize) -> impl Iterator<Item = (Vec<u32>, Range<usize>)> {
    let length = length.max(1);
    let stride = stride.clamp(1, length);
    let steps = ids.len().saturating_sub(length).div_ceil(stride) + 1;
    (0..steps)
        .map(move |step| {
            let start = step * stride;
            let end = (start + length).min(ids.len());
            let seen = if step == 0 { 0 } else { length - stride };
            (start..end, seen.max(1))
        })
        .filter(|(window, first)| *first < window.len())
        .map(|(window, first)| {
            let scored = first..window.len();
            (ids[window].to_vec(), scored)
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rolling_by_hand() {
        let windows: Vec<_> = rolling(9, &[0, 1, 2, 3, 4, 5, 6], 3).collect();
        assert_eq!(windows, [(vec![9, 0, 1, 2], 1..4), (vec![2, 3, 4, 5], 1..4), (vec![3, 4, 5, 6], 3..4),]);
        let short: Vec<_> = rolling(9, &[0, 1], 3).collect();
        assert_eq!(short, [(vec![9, 0, 1], 1..3)]);
        assert_eq!(rolling(9, &[], 3).count(), 0);
    }

    #[test]
    fn no_overlap_gives_up_each_first_token() {
        let scored: Vec<_> = sliding(&[0; 9], 4, 4).map(|w| w.1).collect();
        assert_eq!(scored, [1..4, 1..4]);
        assert_eq!(sliding(&[0], 4, 2).count(), 0);
    }

    fn targets(windows: impl Iterator<Item = (Vec<u32>, Range<usize>)>) -> Vec<u32> {
        windows.flat_map(|(ids, scored)| ids[scored].to_vec()).collect()
    }

    proptest! {
        #[test]
        fn rolling_scores_every_token_once(count in 0u32..200, length in 1usize..40) {
            let ids: Vec<u32> = (0..count).collect();
            prop_assert_eq!(targets(rolling(999, &ids, length)), ids.clone());
            for (index, (window, scored)) in rolling(999, &ids, length).enumerate() {
                prop_assert!(window.len() <= length + 1 && scored.end == window.len());
                prop_assert!(index == 0 || window.len() == length + 1);
            }
        }

        #[test]
        fn sliding_scores_every_token_but_the_first_once(
            count in 1u32..200,
            length in 2usize..40,
            back in 1usize..39,
        ) {
            let stride = length - back.min(length - 1);
            let ids: Vec<u32> = (0..count).collect();
            prop_assert_eq!(targets(sliding(&ids, length, stride)), ids[1..].to_vec());
        }
    }
}
