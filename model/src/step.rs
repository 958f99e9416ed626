//! Decode steps that are recorded once and repeated ([`Steps`]): the graph itself stays written once, in `decoder`.
//!
//! Recordings name the memory of a cache and of a model's weights. They live in the cache, which is borrowed while one
//! runs, and belong to the model they were made with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lowbit_kernels::backend::{Buffer, Segment, Steps};

use crate::decoder::{KvCache, Model};
use crate::error::{At, Result};

/// Which model recordings are of: an address may be used again, a number is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModelId(u64);

impl ModelId {
    /// One that no other model of this process has.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Recordings of steps over one cache.
pub(crate) struct Recordings {
    model: ModelId,
    steps: Box<dyn Steps>,
}

/// One token each, every row of the call once: what a recording can be of.
fn is_step(ids: &[u32], segments: &[Segment]) -> bool {
    let mut rows: Vec<usize> = segments.iter().map(|s| s.row).collect();
    rows.sort_unstable();
    !ids.is_empty() && segments.iter().all(|s| s.tokens == 1) && rows.into_iter().eq(0..ids.len())
}

impl Model {
    /// [`Self::forward_decode`] and [`Self::next_logits`] of one token each of `segments`: logits `[ids.len(), vocab]`, good
    /// until the next step over this cache. Where the backend can, the step is recorded and repeated: the same operations
    /// on the same sizes, so the same bits.
    pub fn decode_step(&self, ids: &[u32], segments: &[Segment], cache: &mut KvCache) -> Result<Arc<Buffer>> {
        self.check(ids, segments, cache)?;
        let kept = if is_step(ids, segments) && !self.steps_through_host() { self.recordings(cache)? } else { None };
        let Some(mut kept) = kept else {
            let hidden = self.forward_decode(ids, segments, cache)?;
            return Ok(Arc::new(self.next_logits(&hidden)?));
        };
        if let Some(logits) = kept.steps.begin(ids, segments).at("decode step")? {
            cache.recordings = Some(kept);
            return Ok(logits);
        }
        let made = self.step_logits(kept.steps.backend(), ids, segments, cache);
        let logits = match made {
            Ok(logits) => kept.steps.finish(logits).at("decode step")?,
            Err(e) => {
                kept.steps.abandon();
                return Err(e);
            }
        };
        cache.recordings = Some(kept);
        Ok(logits)
    }

    /// Those of this model over `cache`, taken out of it; `None` where the backend has none.
    fn recordings(&self, cache: &mut KvCache) -> Result<Option<Recordings>> {
        match cache.recordings.take().filter(|r| r.model == self.id()) {
            Some(kept) => Ok(Some(kept)),
            None => Ok(self.backend().steps().at("decode step")?.map(|steps| Recordings { model: self.id(), steps })),
        }
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::backend::Backend;
    use lowbit_kernels::cpu::CpuBackend;
    use lowbit_kernels::cuda::{Device, GpuBackend};

    use super::*;
    use crate::synthetic::{Synthetic, parse_format};

    fn model(backend: Arc<dyn Backend>) -> Model {
        let format = |name| parse_format(name).unwrap();
        Model::load(&Synthetic::new("tiny", format("w4a16-g32"), format("w8a16-channel"), 1).unwrap(), backend).unwrap()
    }

    fn emulated(recorded: bool) -> Arc<dyn Backend> {
        Arc::new(GpuBackend::new(Arc::new(Device::emulated(2).unwrap())).with_recorded_steps(recorded))
    }

    /// Logits of `steps`: rows of (slot, position, token), not always in the order of slots.
    fn run(model: &Model, cache: &mut KvCache, steps: &[Vec<(usize, usize, u32)>]) -> Vec<Vec<u32>> {
        let one = |rows: &Vec<(usize, usize, u32)>| {
            let ids: Vec<u32> = rows.iter().map(|r| r.2).collect();
            let place = |(row, r): (usize, &(usize, usize, u32))| Segment { slot: r.0, row, tokens: 1, past: r.1 };
            let mut segments: Vec<Segment> = rows.iter().enumerate().map(place).collect();
            segments.reverse();
            let logits = model.decode_step(&ids, &segments, cache).unwrap();
            model.backend().download(&logits).unwrap().iter().map(|v| v.to_bits()).collect()
        };
        steps.iter().map(one).collect()
    }

    /// Steps of one and two rows that cross a horizon, in changing slots.
    fn steps() -> Vec<Vec<(usize, usize, u32)>> {
        let mut steps = Vec::new();
        for i in 0..6 {
            steps.push(vec![(2, 253 + i, 3 + i as u32)]);
            steps.push(vec![(i % 2, 20 + i, 7), (2 - i % 2 * 2, 300 + i, 500 - i as u32)]);
        }
        steps
    }

    #[test]
    fn repeated_steps_give_the_bits_of_steps_run_op_by_op() {
        let logits = |recorded: bool| {
            let model = model(emulated(recorded));
            let mut cache = model.new_cache(3, 400).unwrap();
            cache.fill_random(model.backend(), &[0, 1, 2], 310, 4).unwrap();
            assert_eq!(model.backend().steps().unwrap().is_some(), recorded);
            run(&model, &mut cache, &steps())
        };
        let (eager, repeated) = (logits(false), logits(true));
        assert_eq!(eager, repeated);
        assert!(eager.iter().flatten().all(|v| f32::from_bits(*v).is_finite()));
        // Every step its own tokens: a recording that had kept the first step's would repeat its logits.
        assert!(eager.windows(3).all(|w| w[0] != w[2]));
    }

    #[test]
    fn a_recording_refuses_what_it_would_read_or_write_outside() {
        let model = model(emulated(true));
        let mut cache = model.new_cache(2, 40).unwrap();
        let step = |slot, past, id: u32, cache: &mut KvCache| {
            model.decode_step(&[id], &[Segment { slot, row: 0, tokens: 1, past }], cache).map(|_| ())
        };
        for past in 0..4 {
            step(1, past, 5, &mut cache).unwrap();
        }
        for (slot, past, id) in [(2, 4, 5), (1, 40, 5), (1, 4, 512)] {
            assert!(step(slot, past, id, &mut cache).is_err(), "{slot} {past} {id}");
        }
        step(1, 4, 511, &mut cache).unwrap();
    }

    #[test]
    fn another_models_recordings_are_not_used() {
        let backend = emulated(true);
        let (a, b) = (model(backend.clone()), model(backend));
        let mut cache = a.new_cache(3, 400).unwrap();
        let rows: Vec<_> = (0..4).map(|i| vec![(0, i, 9)]).collect();
        let first = run(&a, &mut cache, &rows);
        let kept = cache.recordings.as_ref().map(|r| r.model);
        assert_eq!(kept, Some(a.id()));
        assert_eq!(run(&b, &mut cache, &rows), first);
        assert_eq!(cache.recordings.as_ref().map(|r| r.model), Some(b.id()));
    }

    #[test]
    fn other_backends_run_the_same_call_op_by_op() {
        let model = model(Arc::new(CpuBackend::new()));
        let mut cache = model.new_cache(3, 400).unwrap();
        let rows: Vec<_> = (0..3).map(|i| vec![(0, i, 9)]).collect();
        let stepped = run(&model, &mut cache, &rows);
        let mut cache = model.new_cache(3, 400).unwrap();
        for (past, row) in stepped.iter().enumerate() {
            let hidden = model.forward_decode(&[9], &[Segment { slot: 0, row: 0, tokens: 1, past }], &mut cache);
            let logits = model.backend().download(&model.next_logits(&hidden.unwrap()).unwrap()).unwrap();
            assert_eq!(*row, logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
    }
}
