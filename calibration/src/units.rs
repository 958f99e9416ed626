//! Which rows are added to a sum together, whatever rows went through a block together.
//!
//! Addition of floats is not associative, and a backend may round the rows of one call side by side (`Backend::hessian_update`): a sum that
//! was updated once a batch would have other bits for another batch size. So sums are updated in *units*: a fixed number of consecutive
//! windows, from the first window on, in their order. Of a batch of several units each unit is added by itself; of a unit that comes in several
//! batches the rows wait on the host until all of them are there. All else of a pass treats each row by itself, or each window by itself
//! (attention), so nothing depends on the batch size. A batch that is one unit, the default, is added as it is.

use std::ops::Range;

use lowbit_kernels::backend::{Backend, Buffer};

use crate::error::Result;
use crate::lanes::{Seen, Sent};
use crate::stats::{Accumulator, FloatSide};

/// Tokens of a unit, at most but for a longer window: enough rows for the matrix products, few enough for the cache.
pub(crate) const UNIT_TOKENS: usize = 2048;

/// What a batch holds of a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The unit's number.
    pub(crate) unit: usize,
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
    /// Whether that is the whole unit.
    pub(crate) whole: bool,
}

/// The pieces of each batch of windows of these lengths, with `batch` windows in a batch and `unit` in a unit (at least 1 each).
pub(crate) fn pieces(lengths: &[usize], batch: usize, unit: usize) -> Vec<Vec<Piece>> {
    let (batch, unit) = (batch.max(1), unit.max(1));
    let mut batches = Vec::with_capacity(lengths.len().div_ceil(batch));
    for (at, group) in lengths.chunks(batch).enumerate() {
        let (start, end) = (at * batch, at * batch + group.len());
        let mut found: Vec<Piece> = Vec::new();
        let mut row = 0;
        for (window, tokens) in (start..end).zip(group) {
            let rows = row..row + tokens;
            row = rows.end;
            match found.last_mut().filter(|p| p.unit == window / unit) {
                Some(piece) => piece.rows.end = rows.end,
                None => {
                    let first = window / unit * unit;
                    let whole = first >= start && (first + unit).min(lengths.len()) <= end;
                    found.push(Piece { unit: window / unit, rows, whole });
                }
            }
        }
        batches.push(found);
    }
    batches
}

/// The rows of a unit that is not whole yet, on the host.
pub(crate) struct Pending {
    unit: usize,
    rows: Sent,
}

impl Accumulator<'_> {
    /// Takes in what a batch adds, unit by unit.
    pub(crate) fn add(&mut self, seen: &Seen<'_>) -> Result<()> {
        if let [only] = seen.pieces
            && only.whole
        {
            self.flush()?;
            return self.update(seen.input, seen.float.as_ref(), seen.weights);
        }
        let b = self.backend;
        let total = seen.input.len / self.n.max(1);
        for piece in seen.pieces {
            let rows = match seen.rows {
                None => piece.rows.clone(),
                // Ascending rows of the batch.
                Some(of) => {
                    let below = |limit: usize| of.partition_point(|r| (*r as usize) < limit);
                    below(piece.rows.start)..below(piece.rows.end)
                }
            };
            if rows.is_empty() {
                continue;
            }
            if self.pending.as_ref().is_some_and(|p| p.unit != piece.unit) {
                self.flush()?;
            }
            let input = &part(b, seen.input, total, &rows)?;
            let float = seen.float.as_ref();
            let float_input = float.map(|f| part(b, f.input, total, &rows)).transpose()?;
            let residuals = match float.and_then(|f| f.residuals) {
                Some((rf, rq)) => Some((part(b, rf, total, &rows)?, part(b, rq, total, &rows)?)),
                None => None,
            };
            let residuals = residuals.as_ref().map(|(rf, rq)| (rf, rq));
            let float = float_input.as_ref().map(|input| FloatSide { input, residuals });
            let weights = seen.weights.and_then(|w| w.get(rows));
            if piece.whole {
                self.update(input, float.as_ref(), weights)?;
                continue;
            }
            let more = Sent::leave(b, &Seen::new(input, float).weighted(weights))?;
            match &mut self.pending {
                Some(p) => p.rows.extend(more),
                None => self.pending = Some(Pending { unit: piece.unit, rows: more }),
            }
        }
        Ok(())
    }

    /// Adds the unit that was waited for.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let Some(Pending { rows, .. }) = self.pending.take() else { return Ok(()) };
        let b = self.backend;
        rows.arrive(b, &mut |s| self.update(s.input, s.float.as_ref(), s.weights))
    }
}

/// Rows of a buffer of `total` rows.
fn part(b: &dyn Backend, x: &Buffer, total: usize, rows: &Range<usize>) -> Result<Buffer> {
    Ok(b.gather_rows(x, x.len / total.max(1), &rows.clone().collect::<Vec<_>>())?)
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::cpu::CpuBackend;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn piece(unit: usize, rows: Range<usize>, whole: bool) -> Piece {
        Piece { unit, rows, whole }
    }

    #[test]
    fn units_do_not_depend_on_batches() {
        // Five windows in units of two.
        let lengths = [3, 4, 1, 2, 5];
        assert_eq!(
            pieces(&lengths, 2, 2),
            [vec![piece(0, 0..7, true)], vec![piece(1, 0..3, true)], vec![piece(2, 0..5, true)]]
        );
        assert_eq!(
            pieces(&lengths, 3, 2),
            [vec![piece(0, 0..7, true), piece(1, 7..8, false)], vec![piece(1, 0..2, false), piece(2, 2..7, true)]]
        );
        let one = [(0, 3), (0, 4), (1, 1), (1, 2), (2, 5)].map(|(unit, n)| vec![piece(unit, 0..n, unit == 2)]);
        assert_eq!(pieces(&lengths, 1, 2), one);
        let all = [piece(0, 0..7, true), piece(1, 7..10, true), piece(2, 10..15, true)];
        assert_eq!(pieces(&lengths, 99, 2), [all.to_vec()]);
    }

    /// Both streams, residuals, weights; rows in part routed elsewhere.
    #[test]
    fn sums_have_the_same_bits_for_every_batch_size() {
        let (b, n, width, tokens) = (CpuBackend::new(), 24, 5, 40);
        let lengths = [tokens; 9];
        let mut rng = StdRng::seed_from_u64(3);
        let mut random = |len: usize| (0..len).map(|_| rng.random_range(-2f32..2.0)).collect::<Vec<_>>();
        let rows = lengths.len() * tokens;
        let (xq, xf) = (random(rows * n), random(rows * n));
        let (rq, rf, weights) = (random(rows * width), random(rows * width), random(rows));
        let up = |x: &[f32], columns: usize, rows: &[usize]| {
            b.upload(&rows.iter().flat_map(|r| x[r * columns..(r + 1) * columns].to_vec()).collect::<Vec<_>>()).unwrap()
        };
        let summed = |batch: usize, routed: bool| {
            let mut sum = Accumulator::with_float(&b, n, Some(width)).unwrap();
            for (at, pieces) in pieces(&lengths, batch, 3).iter().enumerate() {
                let first = at * batch * tokens;
                let count = pieces.last().map_or(0, |p| p.rows.end);
                // Two of five rows, and none of the fourth window.
                let here = |r: &u32| {
                    let row = first + *r as usize;
                    !routed || (row % 5 < 2 && row / tokens != 3)
                };
                let kept: Vec<u32> = (0..count as u32).filter(here).collect();
                if kept.is_empty() {
                    continue;
                }
                let all: Vec<usize> = kept.iter().map(|r| first + *r as usize).collect();
                let (xq, xf) = (up(&xq, n, &all), up(&xf, n, &all));
                let (rq, rf) = (up(&rq, width, &all), up(&rf, width, &all));
                let w: Vec<f32> = all.iter().map(|r| weights[*r]).collect();
                let float = FloatSide { input: &xf, residuals: Some((&rf, &rq)) };
                let seen = Seen::new(&xq, Some(float)).weighted(Some(&w));
                sum.add(&Seen { pieces, rows: routed.then_some(kept.as_slice()), ..seen }).unwrap();
            }
            let s = sum.finish().unwrap();
            let drift = s.drift.unwrap();
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            (s.tokens, s.abs_max, bits(&s.hessian), bits(&drift.input), bits(&drift.residual.unwrap()))
        };
        for routed in [false, true] {
            let usual = summed(3, routed);
            assert_eq!(usual.0, if routed { 8 * 16 } else { 9 * 40 });
            for batch in [1, 2, 4, 6, 7, 9, 16] {
                assert!(summed(batch, routed) == usual, "{batch} windows, routed: {routed}");
            }
        }
    }
}
