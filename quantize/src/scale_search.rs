//! Scales and zero points of every group, chosen before any solver runs.
//!
//! Groups lie in original column order ("static groups"), so no column index has to be stored.

use lowbit_kernels::error::check_len;
use lowbit_kernels::{ScaleType, Scheme};
use rayon::prelude::*;

use crate::factor::SolveError;
use crate::target::Correction;

/// Compiles a function for AVX-512, AVX2 and the baseline, and picks at run time.
///
/// Every version runs the same IEEE operations in the same order (no contraction), so results do not depend on
/// the one picked.
macro_rules! multiversion {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the four features this function is compiled for were detected on this CPU.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: AVX2, the only feature this function is compiled for, was detected on this CPU.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// How a group's scale is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleSearch {
    /// From the extremes alone: nothing is clipped.
    MinMax,
    /// The candidate with the least squared error weighted by the diagonal of the Hessian.
    Hessian,
    /// As [`Self::Hessian`], weighted by the pivots of GPTQ, [`crate::factor::Factor::pivots`], where it solves; elsewhere as it.
    Pivots,
    /// The candidate with the least error under the group's block of the Hessian, [`crate::block_search`], where a whole Hessian is at
    /// hand; elsewhere as [`Self::Hessian`].
    Blocks,
}

impl ScaleSearch {
    /// Its name in records.
    pub fn name(self) -> &'static str {
        match self {
            ScaleSearch::MinMax => "minmax",
            ScaleSearch::Hessian => "hessian",
            ScaleSearch::Pivots => "pivots",
            ScaleSearch::Blocks => "blocks",
        }
    }

    /// Whether it is a search of GPTQ's on integer codes alone.
    pub fn integers_only(self) -> bool {
        matches!(self, ScaleSearch::Pivots | ScaleSearch::Blocks)
    }
}

/// What quantizes a matrix of integer codes where there is no Hessian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFree {
    /// Rounding to nearest, [`crate::rtn`].
    Nearest,
    /// [`crate::hqq`].
    HalfQuadratic,
}

/// What a solver needs to know besides the matrices.
#[derive(Clone, Debug)]
pub struct SolverOptions {
    /// Number format of the result.
    pub scheme: Scheme,
    /// Dtype the scales are rounded to before any error is computed.
    pub scale_type: ScaleType,
    /// Damping, as a fraction of the Hessian's mean diagonal.
    pub damp_frac: f64,
    /// Quantize columns by falling diagonal of the Hessian instead of left to right.
    pub act_order: bool,
    /// How scales are chosen.
    pub scale_search: ScaleSearch,
    /// Columns between two lazy updates of the remaining matrix.
    pub block: usize,
    /// Whether a search may pick negative scales (symmetric schemes only).
    pub signed_scales: bool,
    /// Smallest zero point of an asymmetric scheme: 1 for GPTQ v1, which cannot store 0.
    pub min_zero: u8,
    /// Shares of the drift that are corrected, where the statistics hold it.
    pub correction: Correction,
    /// Sweeps of coordinate descent after the solve.
    pub sweeps: usize,
    /// What is done without a Hessian.
    pub data_free: DataFree,
}

impl SolverOptions {
    /// The usual settings for a scheme: damping 0.01, act-order, Hessian search with signed scales, blocks of 128.
    pub fn new(scheme: Scheme, scale_type: ScaleType) -> Self {
        Self {
            scheme,
            scale_type,
            damp_frac: 0.01,
            act_order: true,
            scale_search: ScaleSearch::Hessian,
            block: 128,
            signed_scales: true,
            min_zero: 0,
            correction: Correction::default(),
            sweeps: 0,
            data_free: DataFree::Nearest,
        }
    }

    /// Fails on settings no solver can work with.
    pub fn check(&self) -> Result<(), SolveError> {
        if !(1..=8).contains(&self.scheme.bits) {
            return Err(SolveError::BadOption { what: "bits", value: f64::from(self.scheme.bits) });
        }
        if !(self.damp_frac.is_finite() && self.damp_frac >= 0.0) {
            return Err(SolveError::BadOption { what: "damping fraction", value: self.damp_frac });
        }
        if self.block == 0 {
            return Err(SolveError::BadOption { what: "block", value: 0.0 });
        }
        Ok(())
    }
}

/// Scales of a matrix `[out, groups]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// Rounded scales, never zero.
    pub scales: Vec<f32>,
    /// Zero points; `None` for symmetric schemes.
    pub zeros: Option<Vec<u8>>,
    /// Weighted squared error of each group under round-to-nearest with its scale.
    pub losses: Vec<f32>,
}

/// Fails on the first element that is NaN or infinite.
pub(crate) fn check_finite(what: &'static str, values: &[f32]) -> Result<(), SolveError> {
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(SolveError::NonFinite { what, index }),
        None => Ok(()),
    }
}

/// Lanes of the error sum; groups are padded to a multiple of it.
pub(crate) const LANES: usize = 16;

/// What is the same for every row.
pub(crate) struct Search {
    scheme: Scheme,
    scale_type: ScaleType,
    kind: ScaleSearch,
    signed: bool,
    min_zero: u8,
    /// Clip factors tried by a search.
    shrink: Vec<f32>,
    /// Groups of a row.
    groups: usize,
    /// Columns of a group, and the same rounded up to [`LANES`].
    pub(crate) cols: usize,
    pub(crate) padded: usize,
    /// `[groups, padded]` weights of the squared error; zero at padding and dead columns.
    weight: Vec<f32>,
}

/// One group's answer.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    scale: f32,
    zero: u8,
    loss: f32,
}

/// How good a candidate is.
pub(crate) trait Measure {
    /// Error of rounding the group `w` `[padded]` to nearest with this scale and zero point.
    fn loss(&mut self, search: &Search, w: &[f32], scale: f32, zero: u8) -> f32;
}

/// Chooses the scales of `w` `[out, n]`.
///
/// `diag` weights the squared error (all ones when absent). Columns where it is zero are dead: their weights
/// count as 0. A group without a non-zero weight gets scale 1.
pub fn search_scales(
    w: &[f32],
    out: usize,
    n: usize,
    diag: Option<&[f32]>,
    opts: &SolverOptions,
) -> Result<Scales, SolveError> {
    let search = Search::new(w, out, n, diag, opts)?;
    search.rows(w, out, n, || vec![0f32; search.padded], |row, buf, choices| search_row(&search, row, buf, choices))
}

impl Search {
    /// Checks the input of a search.
    pub(crate) fn new(
        w: &[f32],
        out: usize,
        n: usize,
        diag: Option<&[f32]>,
        opts: &SolverOptions,
    ) -> Result<Self, SolveError> {
        opts.check()?;
        check_len("weight", out * n, w.len())?;
        check_finite("weight", w)?;
        let groups = opts.scheme.groups(n)?;
        let cols = opts.scheme.group_cols(n);
        let padded = cols.next_multiple_of(LANES);
        let mut weight = vec![0f32; groups * padded];
        if let Some(diag) = diag {
            check_len("Hessian diagonal", n, diag.len())?;
            check_finite("Hessian diagonal", diag)?;
        }
        for group in 0..groups {
            for col in 0..cols {
                weight[group * padded + col] = diag.map_or(1.0, |d| d[group * cols + col]);
            }
        }
        // 0.50 to 1.07 (0.35 for 3 bits and fewer) in steps of 0.02.
        let first = first_percent(opts.scheme.bits);
        Ok(Self {
            scheme: opts.scheme,
            scale_type: opts.scale_type,
            kind: opts.scale_search,
            signed: opts.signed_scales,
            min_zero: opts.min_zero,
            shrink: (first..=107).step_by(2).map(|p| f32::from(p) / 100.0).collect(),
            groups,
            cols,
            padded,
            weight,
        })
    }

    /// Lets `choose` answer for the groups of every row; `scratch` makes what a thread of it needs.
    pub(crate) fn rows<S: Send>(
        &self,
        w: &[f32],
        out: usize,
        n: usize,
        scratch: impl Fn() -> S + Sync + Send,
        choose: impl Fn(&[f32], &mut S, &mut [Choice]) + Sync + Send,
    ) -> Result<Scales, SolveError> {
        let groups = self.groups;
        let mut choices = vec![Choice { scale: 1.0, zero: 0, loss: 0.0 }; out * groups];
        if n > 0 {
            choices
                .par_chunks_mut(groups)
                .zip(w.par_chunks(n))
                .for_each_init(scratch, |scratch, (choices, row)| choose(row, scratch, choices));
        }
        if let Some(i) = choices.iter().position(|c| !c.scale.is_finite()) {
            return Err(SolveError::ScaleOverflow { row: i / groups, group: i % groups, value: choices[i].scale });
        }
        Ok(Scales {
            scales: choices.iter().map(|c| c.scale).collect(),
            zeros: (!self.scheme.symmetric).then(|| choices.iter().map(|c| c.zero).collect()),
            losses: choices.iter().map(|c| c.loss).collect(),
        })
    }

    /// Weights `[padded]` of a group's squared error.
    #[inline(always)]
    pub(crate) fn weight(&self, group: usize) -> &[f32] {
        &self.weight[group * self.padded..][..self.padded]
    }

    /// The live weights of a group into `buf` `[padded]`.
    #[inline(always)]
    pub(crate) fn live(&self, row: &[f32], group: usize, buf: &mut [f32]) {
        let values = &row[group * self.cols..][..self.cols];
        for ((b, v), h) in buf.iter_mut().zip(values).zip(self.weight(group)) {
            *b = if *h == 0.0 { 0.0 } else { *v };
        }
    }

    /// The best of a group's candidates.
    #[inline(always)]
    pub(crate) fn best(&self, w: &[f32], measure: &mut impl Measure) -> Choice {
        if self.scheme.symmetric { symmetric(self, w, measure) } else { asymmetric(self, w, measure) }
    }

    /// Smallest and largest `code − zero`.
    #[inline(always)]
    pub(crate) fn range(&self, zero: u8) -> (f32, f32) {
        let lo = -f32::from(zero);
        (lo, f32::from(self.scheme.max_code()) + lo)
    }
}

multiversion! {
    /// Chooses the scale of every group of a row.
    fn search_row(search: &Search, row: &[f32], buf: &mut [f32], choices: &mut [Choice]) {
        for (group, choice) in choices.iter_mut().enumerate() {
            search.live(row, group, buf);
            *choice = search.best(buf, &mut Weighted { weight: search.weight(group) });
        }
    }
}

#[inline(always)]
fn symmetric(search: &Search, w: &[f32], measure: &mut impl Measure) -> Choice {
    let (min, max) = extremes(w);
    let absmax = max.max(-min);
    let zero = search.scheme.mid_code();
    let half_range = f32::from(search.scheme.max_code()) / 2.0;
    let mut best = Choice { scale: search.scale_type.round(absmax / half_range), zero, loss: 0.0 };
    if !usable(best.scale) {
        return fallback(best);
    }
    best.loss = measure.loss(search, w, best.scale, zero);
    if search.kind == ScaleSearch::MinMax {
        return best;
    }
    // Code 0 lies one step further out than the largest code: turn it towards the extreme element.
    let signed = if max >= -min { -absmax } else { absmax } / f32::from(zero);
    for &p in &search.shrink {
        best = better(search, w, measure, best, p * absmax / half_range, zero);
        if search.signed {
            best = better(search, w, measure, best, p * signed, zero);
        }
    }
    best
}

#[inline(always)]
fn asymmetric(search: &Search, w: &[f32], measure: &mut impl Measure) -> Choice {
    let (min, max) = extremes(w);
    let top = f32::from(search.scheme.max_code());
    // Divided one by one: the difference of two large finite weights may overflow.
    let step = max / top - min / top;
    let scale = search.scale_type.round(step);
    let mut best = Choice { scale, zero: search.min_zero, loss: 0.0 };
    if !usable(scale) {
        return fallback(best);
    }
    let lowest = f32::from(search.min_zero);
    best.zero = (-min / scale).round_ties_even().clamp(lowest, top) as u8;
    best.loss = measure.loss(search, w, scale, best.zero);
    if search.kind == ScaleSearch::MinMax {
        return best;
    }
    for &p in &search.shrink {
        let scale = search.scale_type.round(p * step);
        let zero = (-min * p / scale).round_ties_even().clamp(lowest, top) as u8;
        best = better(search, w, measure, best, scale, zero);
    }
    best
}

/// The smallest clip factor that the Hessian search tries, in hundredths.
pub(crate) fn first_percent(bits: u8) -> u16 {
    if bits <= 3 { 35 } else { 50 }
}

/// Whether a rounded scale can be divided by.
#[inline(always)]
pub(crate) fn usable(scale: f32) -> bool {
    scale.is_finite() && scale != 0.0 && (1.0 / scale).is_finite()
}

/// For a group whose scale rounds to (nearly) zero: scale 1 and every code at the zero point. Keeps an overflow, which the
/// caller reports.
#[inline(always)]
fn fallback(choice: Choice) -> Choice {
    if choice.scale.is_finite() { Choice { scale: 1.0, ..choice } } else { choice }
}

/// The better of `best` and a new candidate.
#[inline(always)]
fn better(search: &Search, w: &[f32], measure: &mut impl Measure, best: Choice, scale: f32, zero: u8) -> Choice {
    let scale = search.scale_type.round(scale);
    if !usable(scale) {
        return best;
    }
    let loss = measure.loss(search, w, scale, zero);
    if loss < best.loss { Choice { scale, zero, loss } } else { best }
}

/// Smallest and largest element, both including 0.
#[inline(always)]
fn extremes(w: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi) = ([0f32; LANES], [0f32; LANES]);
    for chunk in w.as_chunks::<LANES>().0 {
        for l in 0..LANES {
            lo[l] = if chunk[l] < lo[l] { chunk[l] } else { lo[l] };
            hi[l] = if chunk[l] > hi[l] { chunk[l] } else { hi[l] };
        }
    }
    (lo.iter().fold(0.0, |a: f32, b| a.min(*b)), hi.iter().fold(0.0, |a: f32, b| a.max(*b)))
}

/// `Σ weight · (w − scale · (code − zero))²`.
///
/// Multiplies by the reciprocal where the solvers divide: this can only pick the other neighbour of a near tie, whose
/// error is the same.
struct Weighted<'a> {
    /// `[padded]`.
    weight: &'a [f32],
}

impl Measure for Weighted<'_> {
    #[inline(always)]
    fn loss(&mut self, search: &Search, w: &[f32], scale: f32, zero: u8) -> f32 {
        let inverse = 1.0 / scale;
        let (lo, hi) = search.range(zero);
        let mut sums = [0f32; LANES];
        for (w, weight) in w.as_chunks::<LANES>().0.iter().zip(self.weight.as_chunks::<LANES>().0) {
            for l in 0..LANES {
                let z = (w[l] * inverse).round_ties_even();
                let z = if z < lo { lo } else { z };
                let z = if z > hi { hi } else { z };
                let e = w[l] - scale * z;
                sums[l] += weight[l] * (e * e);
            }
        }
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, qdq};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn options(bits: u8, symmetric: bool) -> SolverOptions {
        let scheme = Scheme { bits, symmetric, group: GroupSize::Cols(40) };
        SolverOptions::new(scheme, ScaleType::Bf16)
    }

    fn data(seed: u64, out: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let w = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
        (w, (0..n).map(|_| rng.random_range(0.01f32..4.0)).collect())
    }

    #[test]
    fn more_candidates_never_raise_the_searched_loss() {
        for bits in [2, 3, 4, 8] {
            let (w, d) = data(u64::from(bits), 24, 120);
            let mut opts = options(bits, true);
            let signed = search_scales(&w, 24, 120, Some(&d), &opts).unwrap();
            opts.signed_scales = false;
            let plain = search_scales(&w, 24, 120, Some(&d), &opts).unwrap();
            opts.scale_search = ScaleSearch::MinMax;
            let minmax = search_scales(&w, 24, 120, Some(&d), &opts).unwrap();
            for i in 0..signed.losses.len() {
                assert!(signed.losses[i] <= plain.losses[i] && plain.losses[i] <= minmax.losses[i]);
            }
            assert!(plain.scales.iter().all(|s| *s > 0.0));
            if bits <= 4 {
                assert!(signed.scales.iter().any(|s| *s < 0.0));
                assert!(signed.losses.iter().sum::<f32>() < plain.losses.iter().sum::<f32>());
            }
        }
    }

    #[test]
    fn the_reported_loss_is_that_of_the_codes() {
        for symmetric in [true, false] {
            let (w, d) = data(5, 6, 80);
            let s = search_scales(&w, 6, 80, Some(&d), &options(4, symmetric)).unwrap();
            for (i, loss) in s.losses.iter().enumerate() {
                let zero = s.zeros.as_ref().map_or(8, |z| z[i]);
                let found: f32 = (0..40)
                    .map(|c| {
                        let v = w[(i / 2) * 80 + (i % 2) * 40 + c];
                        let q = qdq::dequantize(qdq::quantize(v, s.scales[i], zero, 15), s.scales[i], zero);
                        d[(i % 2) * 40 + c] * (v - q).powi(2)
                    })
                    .sum();
                assert!((found - loss).abs() <= 1e-4 * found, "{found} {loss}");
                assert_eq!(s.scales[i], ScaleType::Bf16.round(s.scales[i]));
            }
        }
    }

    #[test]
    fn a_smallest_zero_point_is_kept() {
        // All positive: the range begins at zero, so its zero point is 0 unless that is not to be had.
        let w: Vec<f32> = (0..80).map(|i| 1.0 + (i % 40) as f32).collect();
        let mut opts = options(4, false);
        assert_eq!(search_scales(&w, 1, 80, None, &opts).unwrap().zeros.unwrap(), [0, 0]);
        opts.min_zero = 1;
        assert_eq!(search_scales(&w, 1, 80, None, &opts).unwrap().zeros.unwrap(), [1, 1]);
        assert_eq!(search_scales(&[0.0; 40], 1, 40, None, &opts).unwrap().zeros.unwrap(), [1]);
    }

    #[test]
    fn zero_groups_get_scale_one_and_overflow_is_refused() {
        for symmetric in [true, false] {
            let mut opts = options(4, symmetric);
            let s = search_scales(&[0.0; 40], 1, 40, None, &opts).unwrap();
            assert_eq!(s.scales, [1.0]);
            opts.scale_type = ScaleType::F16;
            let e = search_scales(&[1e9; 80], 1, 80, None, &opts).unwrap_err();
            assert!(matches!(e, SolveError::ScaleOverflow { row: 0, group: 0, .. }), "{e}");
            let tiny = search_scales(&[1e-9; 40], 1, 40, None, &opts).unwrap();
            assert_eq!(tiny.scales, [1.0]);
        }
    }
}
