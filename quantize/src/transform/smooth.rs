//! SmoothQuant (arXiv 2211.10438): large channels of an input are divided, and the columns that read them multiplied, so that both are
//! about as hard to quantize.

/// Strength: the paper's default, half of the difficulty to each side (section 4).
pub const STRENGTH: f32 = 0.5;

/// `s_j = max|x_j|^α / max|w_j|^(1−α)` (Eq. 4), over the linears that read the input; 1 where a channel or its columns are all zero.
pub fn smooth_scales(input_max: &[f32], weight_max: &[f32], alpha: f32) -> Vec<f32> {
    let scale = |(x, w): (&f32, &f32)| {
        let s = x.powf(alpha) / w.powf(1.0 - alpha);
        if *x > 0.0 && *w > 0.0 && s.is_normal() { s } else { 1.0 }
    };
    input_max.iter().zip(weight_max).map(scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_half_both_sides_get_the_geometric_mean() {
        let (x, w) = ([100.0f32, 1.0, 0.25, 0.0], [0.01f32, 4.0, 0.25, 1.0]);
        let s = smooth_scales(&x, &w, 0.5);
        for j in 0..3 {
            let mean = (x[j] * w[j]).sqrt();
            assert!((x[j] / s[j] - mean).abs() <= 1e-6 * mean && (w[j] * s[j] - mean).abs() <= 1e-6 * mean);
        }
        assert_eq!(s[3], 1.0);
    }

    #[test]
    fn at_the_ends_one_side_becomes_flat() {
        let (x, w) = ([100.0f32, 2.0], [0.5f32, 4.0]);
        // All of the difficulty to the weights: every channel of the input is 1. None: every column is.
        let s = smooth_scales(&x, &w, 1.0);
        assert!(x.iter().zip(&s).all(|(x, s)| (x / s - 1.0).abs() < 1e-6));
        let s = smooth_scales(&x, &w, 0.0);
        assert!(w.iter().zip(&s).all(|(w, s)| (w * s - 1.0).abs() < 1e-6));
    }
}
