//! Scales that move from a linear's input into its columns, and what must be divided by them so that the model stays the same.
//!
//! `W x = (W diag(s)) (diag(s)⁻¹ x)` (SmoothQuant, arXiv 2211.10438, section 4, Eq. 3; AWQ, arXiv 2306.00978, section 3.2, Eq. 4). The second
//! factor needs no operation of its own where x comes from something that is linear in each channel: a norm's weight (in front of
//! q/k/v and of gate/up), v's rows (attention mixes tokens, never channels), up's rows (the gate multiplies channel by channel).

use lowbit_kernels::ScaleType;
use rayon::prelude::*;

/// `w[r][c] *= s[c]`; rows of `s.len()`.
pub fn scale_columns(w: &mut [f32], s: &[f32]) {
    w.par_chunks_mut(s.len().max(1)).for_each(|row| row.iter_mut().zip(s).for_each(|(w, s)| *w *= s));
}

/// `w[r][c] /= s[r]`; rows of `n`.
pub fn divide_rows(w: &mut [f32], n: usize, s: &[f32]) {
    w.par_chunks_mut(n.max(1)).zip(s).for_each(|(row, s)| row.iter_mut().for_each(|w| *w /= s));
}

/// Divides a norm's channels by s, as far as its stored type can: the new stored weight, and by what the columns that read the norm
/// are to be multiplied.
///
/// The norm multiplies by `offset + weight` (Gemma's offset is 1). The new weight is rounded to `stored`, and the columns take the
/// quotient of the old and the rounded factor, not s itself: rounding then changes the scale and not the model. A channel
/// whose new factor would be zero or not finite keeps its weight.
pub fn fold_norm(weight: &[f32], offset: f32, s: &[f32], stored: ScaleType) -> (Vec<f32>, Vec<f32>) {
    let fold = |(w, s): (&f32, &f32)| {
        let old = offset + w;
        let new = stored.round(old / s - offset);
        let columns = old / (offset + new);
        if columns.is_normal() && new.is_finite() { (new, columns) } else { (*w, 1.0) }
    };
    weight.iter().zip(s).map(fold).unzip()
}

/// Scales of the columns of o `[kv_heads · repeat · head_dim]` from those of v's rows `[kv_heads · head_dim]`: the `repeat` query heads
/// of a group read the same values (grouped-query attention), so they share their scales.
pub fn spread_heads(s: &[f32], head_dim: usize, repeat: usize) -> Vec<f32> {
    s.chunks(head_dim.max(1)).flat_map(|head| std::iter::repeat_n(head, repeat).flatten().copied()).collect()
}

/// Means over the query heads of each group, of something of o's columns: what [`spread_heads`] spreads.
pub fn mean_heads(x: &[f32], head_dim: usize, repeat: usize) -> Vec<f32> {
    let (d, repeat) = (head_dim.max(1), repeat.max(1));
    let mean = |group: &[f32]| -> Vec<f32> {
        (0..d).map(|i| group.iter().skip(i).step_by(d).sum::<f32>() / repeat as f32).collect()
    };
    x.chunks(d * repeat).flat_map(mean).collect()
}

/// Largest magnitude of each column, over matrices of `n` columns.
pub fn column_max<'a>(matrices: impl IntoIterator<Item = &'a [f32]>, n: usize) -> Vec<f32> {
    let mut most = vec![0f32; n];
    for row in matrices.into_iter().flat_map(|w| w.chunks_exact(n.max(1))) {
        most.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
    }
    most
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn a_folded_norm_times_the_columns_is_what_it_was() {
        let mut rng = StdRng::seed_from_u64(1);
        for (offset, stored) in
            [(0.0, ScaleType::Bf16), (1.0, ScaleType::Bf16), (0.0, ScaleType::F16), (1.0, ScaleType::F32)]
        {
            let weight: Vec<f32> = (0..500).map(|_| stored.round(rng.random_range(-2f32..2.0))).collect();
            let s: Vec<f32> = (0..500).map(|_| rng.random_range(-4f32..4.0).exp()).collect();
            let (new, columns) = fold_norm(&weight, offset, &s, stored);
            for i in 0..500 {
                assert_eq!(new[i], stored.round(new[i]));
                let (before, after) = (offset + weight[i], (offset + new[i]) * columns[i]);
                // One quotient and one product in f32.
                assert!((before - after).abs() <= 2.0 * f32::EPSILON * before.abs(), "{before} {after}");
            }
            // bf16 has 8 bits: the scale taken is within a part in 200 of the one asked for where nothing is subtracted.
            if offset == 0.0 && stored == ScaleType::Bf16 {
                assert!(columns.iter().zip(&s).all(|(c, s)| (c / s - 1.0).abs() < 5e-3));
            }
        }
        // A dead channel, and one whose factor would vanish.
        let (new, columns) = fold_norm(&[0.0, 1e-30], 0.0, &[3.0, 1e30], ScaleType::F16);
        assert_eq!((new, columns), (vec![0.0, 1e-30], vec![1.0, 1.0]));
    }

    #[test]
    fn query_heads_of_a_group_share_their_scales() {
        // Two groups of two heads, two wide.
        assert_eq!(spread_heads(&[1.0, 2.0, 3.0, 4.0], 2, 2), [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
        assert_eq!(mean_heads(&[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 2.0, 8.0], 2, 2), [2.0, 3.0, 1.0, 4.0]);
    }

    #[test]
    fn rows_and_columns() {
        let mut w = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        scale_columns(&mut w, &[1.0, 10.0, 100.0]);
        assert_eq!(w, [1.0, 20.0, 300.0, 4.0, 50.0, 600.0]);
        divide_rows(&mut w, 3, &[1.0, 2.0]);
        assert_eq!(w, [1.0, 20.0, 300.0, 2.0, 25.0, 300.0]);
        assert_eq!(column_max([&w[..3], &[-4.0, 0.0, 1.0]], 3), [4.0, 20.0, 300.0]);
    }
}
