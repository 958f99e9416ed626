//! The standard normal distribution.

use statrs::distribution::{ContinuousCDF, Normal};

/// P(Z > z).
pub fn upper(z: f64) -> f64 {
    Normal::standard().sf(z)
}

/// The `p`-quantile; infinite at 0 and 1.
pub fn quantile(p: f64) -> f64 {
    Normal::standard().inverse_cdf(p)
}

/// Density.
pub fn density(z: f64) -> f64 {
    (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt()
}
