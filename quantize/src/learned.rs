//! Learned rounding, as AutoRound does it (SignRound, arXiv 2309.05516, section 3 and algorithm 1): the offsets that weights are rounded with
//! and the clip factors of their groups, by signed gradient descent on the error of a whole block's output.
//!
//! All linears of a block are learned at once. The block runs on what the quantized blocks before it give, and its output is to be that of
//! the original block on the original stream (the published code's `enable_quanted_input`), so it repairs what came before as far as it
//! can. Each step takes a batch of windows, rounds all weights, runs the block forwards and backwards ([`graph`]), and moves every
//! parameter by the rate against the sign of its gradient ([`rounding`]); the rate falls in a straight line from 1 / steps to nothing, so an offset
//! can just reach ½. Beyond the paper: the start is at the searched scales of rounding to nearest, a clip factor may also exceed 1, and
//! what is learned is kept only where it lowers the error on windows of the calibration data.

mod attention;
pub mod graph;
pub(crate) mod load;
pub mod rounding;

use lowbit_calibration::WholeBlock;

use self::graph::{Graph, LINEARS, Weights};
use self::rounding::Rounding;

/// Steps of the published default.
pub const STEPS: usize = 200;
/// Windows of a step.
const BATCH: usize = 8;
/// Windows that decide whether what was learned is kept, spread over the data.
const JUDGED: usize = 32;

/// A linear of the block.
pub enum Learnable {
    /// It is quantized.
    Rounded(Box<Rounding>),
    /// It stays as it is.
    Kept(Vec<f32>),
}

/// How the block's output came out: mean squared errors against the original's, over some windows of the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learned {
    /// Rounded to nearest.
    pub nearest: f64,
    /// With what was learned.
    pub learned: f64,
}

impl Learned {
    /// Whether what was learned is better; if not, the linears are rounded to nearest again.
    pub fn is_better(self) -> bool {
        self.learned < self.nearest
    }
}

/// Learns the rounding of `linears`, in the order of [`graph`], in `steps` steps; `check` is called before each.
pub fn learn<E>(
    graph: &Graph,
    linears: &mut [Learnable; LINEARS],
    data: &WholeBlock,
    steps: usize,
    check: &mut dyn FnMut() -> Result<(), E>,
) -> Result<Learned, E> {
    let nearest = error(graph, linears, data, check)?;
    let windows = data.windows.len();
    for step in 0..steps {
        check()?;
        let picked: Vec<usize> = (0..BATCH.min(windows)).map(|i| (step * BATCH + i) % windows).collect();
        let (x, target, lengths) = batch(data, &picked);
        let rounded = rounded(linears);
        let weights = weights(linears, &rounded);
        let trace = graph.forward(&weights, &x, &lengths);
        // Of half the squared error; a factor changes no sign.
        let dy: Vec<f32> = trace.y.iter().zip(&target).map(|(y, t)| y - t).collect();
        let gradients = graph.backward(&weights, &trace, &dy, &lengths);
        let rate = (1.0 - step as f32 / steps as f32) / steps as f32;
        for (linear, gradient) in linears.iter_mut().zip(&gradients) {
            if let Learnable::Rounded(r) = linear {
                r.step(gradient, rate);
            }
        }
    }
    let learned = Learned { nearest, learned: error(graph, linears, data, check)? };
    if !learned.is_better() {
        for linear in linears {
            if let Learnable::Rounded(r) = linear {
                r.reset();
            }
        }
    }
    Ok(learned)
}

/// The rounded weights of the linears that are quantized.
fn rounded(linears: &[Learnable; LINEARS]) -> [Option<Vec<f32>>; LINEARS] {
    std::array::from_fn(|i| match &linears[i] {
        Learnable::Rounded(r) => Some(r.values()),
        Learnable::Kept(_) => None,
    })
}

fn weights<'a>(linears: &'a [Learnable; LINEARS], rounded: &'a [Option<Vec<f32>>; LINEARS]) -> Weights<'a> {
    std::array::from_fn(|i| match (&rounded[i], &linears[i]) {
        (Some(q), _) => q.as_slice(),
        (None, Learnable::Kept(w)) => w.as_slice(),
        (None, Learnable::Rounded(r)) => r.weight(),
    })
}

/// Inputs, targets and lengths of some windows.
fn batch(data: &WholeBlock, picked: &[usize]) -> (Vec<f32>, Vec<f32>, Vec<usize>) {
    let (mut x, mut target, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    for rows in picked.iter().filter_map(|i| data.windows.get(*i)) {
        let span = rows.start * data.width..rows.end * data.width;
        x.extend_from_slice(data.inputs.get(span.clone()).unwrap_or_default());
        target.extend_from_slice(data.targets.get(span).unwrap_or_default());
        lengths.push(rows.len());
    }
    (x, target, lengths)
}

/// Mean squared error of the block's output as the linears stand.
fn error<E>(
    graph: &Graph,
    linears: &[Learnable; LINEARS],
    data: &WholeBlock,
    check: &mut dyn FnMut() -> Result<(), E>,
) -> Result<f64, E> {
    let rounded = rounded(linears);
    let weights = weights(linears, &rounded);
    let judged = data.windows.len().min(JUDGED);
    let picked: Vec<usize> = (0..judged).map(|i| i * data.windows.len() / judged).collect();
    let (mut sum, mut count) = (0f64, 0usize);
    for some in picked.chunks(BATCH) {
        check()?;
        let (x, target, lengths) = batch(data, some);
        let y = graph.forward(&weights, &x, &lengths).y;
        sum += y.iter().zip(&target).map(|(y, t)| (f64::from(*y) - f64::from(*t)).powi(2)).sum::<f64>();
        count += y.len();
    }
    Ok(sum / count.max(1) as f64)
}
