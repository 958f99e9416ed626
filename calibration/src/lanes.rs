//! The calibration windows shared out over devices.
//!
//! Of D devices, device d carries chunks d, d + D, d + 2 D, … of the windows through the blocks, and holds every block it needs for that. What
//! chunks add up to is summed by the first device alone, chunk by chunk in their order: addition of floats is not associative, so a
//! sum a device, put together at the end, would have other bits for another number of devices. So a result depends neither on how
//! many devices there are nor on which of them is fast. The price: inputs of linears travel to the first device over the host.
//!
//! The first device is driven by the calling thread, each other by a thread of its own, which works ahead by a few chunks.

use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use lowbit_kernels::KernelError;
use lowbit_kernels::backend::{Backend, Buffer, Segment};
use lowbit_model::block::Block;
use lowbit_model::{ModelError, Source};

use crate::carried::Carried;
use crate::error::{CalibrationError, Result};
use crate::sequential::{KvRange, SequentialPass};
use crate::stats::FloatSide;
use crate::units::Piece;

/// Chunks whose results may wait on the host, a device.
const AHEAD: usize = 1;

/// A device and what it carries.
pub(crate) struct Lane<'a> {
    pub(crate) backend: &'a dyn Backend,
    /// The residual stream, by the number of the chunk on this device.
    pub(crate) x: Carried<'a>,
    /// The float stream's; unused without it.
    pub(crate) float: Carried<'a>,
    /// What one stage of a block leaves to the next.
    pub(crate) held: Carried<'a>,
    /// The float stream's.
    pub(crate) float_held: Carried<'a>,
    /// Rows of each chunk's windows.
    pub(crate) segments: Vec<Vec<Segment>>,
    /// Magnitudes of keys and values in the block that is worked on.
    pub(crate) range: KvRange,
    /// The numbers of its chunks among all.
    numbers: Vec<usize>,
}

impl<'a> Lane<'a> {
    /// Device `first` of `count`, for its part of `chunks`.
    pub(crate) fn new(
        backend: &'a dyn Backend,
        first: usize,
        count: usize,
        chunks: usize,
        offload: Option<&Path>,
    ) -> Self {
        let numbers: Vec<usize> = (first..chunks).step_by(count.max(1)).collect();
        let carry = |name| Carried::new(backend, numbers.clone(), name, offload);
        Self {
            backend,
            x: carry("residual"),
            float: carry("float-residual"),
            held: Carried::nothing(backend),
            float_held: Carried::nothing(backend),
            segments: Vec::with_capacity(numbers.len()),
            range: KvRange::default(),
            numbers,
        }
    }

    /// Room for what a stage leaves; what the last one left goes.
    pub(crate) fn hold(&mut self, [name, float_name]: [&'static str; 2], offload: Option<&Path>) {
        self.let_go();
        self.held = Carried::new(self.backend, self.numbers.clone(), name, offload);
        self.float_held = Carried::new(self.backend, self.numbers.clone(), float_name, offload);
    }

    /// Drops what the last stage left.
    pub(crate) fn let_go(&mut self) {
        self.held = Carried::nothing(self.backend);
        self.float_held = Carried::nothing(self.backend);
    }
}

/// A chunk at work on its device.
pub(crate) struct Chunk<'s, 'a> {
    pub(crate) lane: &'s mut Lane<'a>,
    /// Its number on the device.
    pub(crate) i: usize,
    /// Its number among all.
    pub(crate) number: usize,
    pub(crate) block: &'s Block,
    pub(crate) original: Option<&'s Block>,
}

/// What a chunk adds to a sum.
pub(crate) struct Seen<'b> {
    /// Which sum.
    pub(crate) sum: usize,
    /// Rows of a linear's input.
    pub(crate) input: &'b Buffer,
    pub(crate) float: Option<FloatSide<'b>>,
    pub(crate) weights: Option<&'b [f32]>,
    /// Which rows of the chunk these are, ascending; all of them without.
    pub(crate) rows: Option<&'b [u32]>,
    /// The units that the chunk's rows are of, as [`SequentialPass::each`] puts them in.
    pub(crate) pieces: &'b [Piece],
}

impl<'b> Seen<'b> {
    /// Of the first sum, every row counted once.
    pub(crate) fn new(input: &'b Buffer, float: Option<FloatSide<'b>>) -> Self {
        Self { sum: 0, input, float, weights: None, rows: None, pieces: &[] }
    }

    /// With weights of the rows.
    pub(crate) fn weighted(self, weights: Option<&'b [f32]>) -> Self {
        Self { weights, ..self }
    }
}

/// Takes in what a chunk adds.
pub(crate) type Take<'t> = dyn FnMut(Seen<'_>) -> Result<()> + 't;

/// Of a stage that sums nothing.
pub(crate) fn nothing(_: Seen<'_>) -> Result<()> {
    Ok(())
}

/// [`Seen`] on the host: on its way from one device to another, or waiting for the rest of its unit.
pub(crate) struct Sent {
    sum: usize,
    input: Vec<f32>,
    float: Option<Vec<f32>>,
    residuals: Option<[Vec<f32>; 2]>,
    weights: Option<Vec<f32>>,
    rows: Option<Vec<u32>>,
}

impl Sent {
    pub(crate) fn leave(b: &dyn Backend, seen: &Seen<'_>) -> Result<Self> {
        let residuals = seen.float.as_ref().and_then(|f| f.residuals);
        Ok(Self {
            sum: seen.sum,
            input: b.download(seen.input)?,
            float: seen.float.as_ref().map(|f| b.download(f.input)).transpose()?,
            residuals: match residuals {
                Some((rf, rq)) => Some([b.download(rf)?, b.download(rq)?]),
                None => None,
            },
            weights: seen.weights.map(<[f32]>::to_vec),
            rows: seen.rows.map(<[u32]>::to_vec),
        })
    }

    /// Appends more rows of the same sum.
    pub(crate) fn extend(&mut self, more: Sent) {
        let append = |to: &mut Option<Vec<f32>>, from: Option<Vec<f32>>| {
            if let (Some(to), Some(from)) = (to, from) {
                to.extend(from);
            }
        };
        self.input.extend(more.input);
        append(&mut self.float, more.float);
        append(&mut self.weights, more.weights);
        if let (Some([rf, rq]), Some([more_rf, more_rq])) = (&mut self.residuals, more.residuals) {
            rf.extend(more_rf);
            rq.extend(more_rq);
        }
        if let (Some(rows), Some(more)) = (&mut self.rows, more.rows) {
            rows.extend(more);
        }
    }

    pub(crate) fn arrive(self, b: &dyn Backend, take: &mut Take<'_>) -> Result<()> {
        let input = b.upload(&self.input)?;
        let float = self.float.map(|f| b.upload(&f)).transpose()?;
        let residuals = match &self.residuals {
            Some([rf, rq]) => Some([b.upload(rf)?, b.upload(rq)?]),
            None => None,
        };
        let residuals = residuals.as_ref().map(|[rf, rq]| (rf, rq));
        let float = float.as_ref().map(|input| FloatSide { input, residuals });
        let (weights, rows) = (self.weights.as_deref(), self.rows.as_deref());
        take(Seen { sum: self.sum, rows, ..Seen::new(&input, float).weighted(weights) })
    }
}

/// What a chunk came to on another device.
type Arrived<T> = Result<(T, Vec<Sent>)>;

/// What is done with each chunk.
pub(crate) type Work<'w, 'a, T> = dyn Fn(Chunk<'_, 'a>, &mut Take<'_>) -> Result<T> + Sync + 'w;

impl<'a> SequentialPass<'a> {
    /// Does `work` with every chunk on its device, between that device's `blocks` and `originals`. `take` gets what the chunks add, on the first
    /// device and in their order, and so are the results; `tick` is called once a chunk.
    pub(crate) fn each<T: Send, E: From<CalibrationError>>(
        &mut self,
        blocks: &[Block],
        originals: Option<&[Block]>,
        take: &mut Take<'_>,
        work: &Work<'_, 'a, T>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Vec<T>, E> {
        let (chunks, count, units) = (self.chunks(), self.lanes.len(), &self.pieces);
        let held = [Some(blocks), originals];
        if let Some(few) = held.into_iter().flatten().find(|b| b.len() != count) {
            return Err(CalibrationError::Replicas { found: few.len(), expected: count }.into());
        }
        let at = |d: usize| Some((blocks.get(d)?, originals.and_then(|o| o.get(d))));
        let (Some((home, others)), Some((block, original))) = (self.lanes.split_first_mut(), at(0)) else {
            return Ok(Vec::new());
        };
        let backend = home.backend;
        std::thread::scope(|scope| -> std::result::Result<Vec<T>, E> {
            let mut arriving = Vec::with_capacity(others.len());
            for (lane, (block, original)) in others.iter_mut().zip((1..count).filter_map(at)) {
                let (send, receive) = sync_channel(AHEAD);
                arriving.push(receive);
                scope.spawn(move || work_through(lane, block, original, work, &send));
            }
            let mut results = Vec::with_capacity(chunks);
            for number in 0..chunks {
                let (d, i) = (number % count, number / count);
                let pieces = units.get(number).map_or(&[][..], Vec::as_slice);
                let mut take = |seen: Seen<'_>| take(Seen { pieces, ..seen });
                let result = match d.checked_sub(1).and_then(|d| arriving.get(d)) {
                    None => work(Chunk { lane: &mut *home, i, number, block, original }, &mut take)?,
                    Some(receive) => {
                        let (result, sent) = receive.recv().unwrap_or_else(|_| Err(ended(backend)))?;
                        sent.into_iter().try_for_each(|s| s.arrive(backend, &mut take))?;
                        result
                    }
                };
                results.push(result);
                tick()?;
            }
            Ok(results)
        })
    }
}

/// All chunks of a device but the first one. Nobody waits for them any more when the receiver is gone.
fn work_through<'a, T>(
    lane: &mut Lane<'a>,
    block: &Block,
    original: Option<&Block>,
    work: &Work<'_, 'a, T>,
    send: &SyncSender<Arrived<T>>,
) {
    let b = lane.backend;
    for (i, number) in lane.numbers.clone().into_iter().enumerate() {
        let mut sent = Vec::new();
        let mut take = |seen: Seen<'_>| -> Result<()> {
            sent.push(Sent::leave(b, &seen)?);
            Ok(())
        };
        let result = work(Chunk { lane: &mut *lane, i, number, block, original }, &mut take);
        let failed = result.is_err();
        if send.send(result.map(|r| (r, sent))).is_err() || failed {
            return;
        }
    }
}

/// A thread that ended without a result has panicked, which the scope passes on.
fn ended(b: &dyn Backend) -> CalibrationError {
    let problem = "the thread of another device ended early".to_string();
    KernelError::Device { device: b.name(), problem, hint: None }.into()
}

/// Block `index` on each device; `prefix` is `model.layers.N`.
pub fn load_block(
    from: &dyn Source,
    backends: &[&dyn Backend],
    prefix: &str,
    index: usize,
) -> std::result::Result<Vec<Block>, ModelError> {
    side_by_side(backends.iter().map(|b| move || Block::load(from, *b, prefix, index)).collect()).into_iter().collect()
}

/// Runs the jobs at the same time, the first on the calling thread; their results in order.
pub fn side_by_side<T: Send, F: FnOnce() -> T + Send>(jobs: Vec<F>) -> Vec<T> {
    std::thread::scope(|scope| {
        let mut jobs = jobs.into_iter();
        let first = jobs.next();
        let others: Vec<_> = jobs.map(|job| scope.spawn(job)).collect();
        let first = first.map(|job| job());
        let joined = others.into_iter().map(|other| match other.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        first.into_iter().chain(joined).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_jobs_side_by_side_are_in_their_order() {
        let jobs: Vec<_> = (0..5u64)
            .map(|i| {
                move || {
                    std::thread::sleep(std::time::Duration::from_millis(5 - i));
                    i * i
                }
            })
            .collect();
        assert_eq!(side_by_side(jobs), [0, 1, 4, 9, 16]);
        assert!(side_by_side(Vec::<fn() -> u8>::new()).is_empty());
    }
}
