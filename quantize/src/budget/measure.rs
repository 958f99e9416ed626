//! The measurement: curves and weights of all units in one pass over the float model.
//!
//! The calibration windows go through the original blocks (nothing is replaced, so nothing propagates) and leave each group's
//! Hessian. Beside them run a few short *probe* windows: at each block every unit of it is quantized alone, and the stream that
//! results goes through all later blocks next to the others. So each block is loaded once, however many units there are. At the
//! end the head compares each stream with the undisturbed one.
//!
//! Resident: one block, one group's Hessians, and `units · probe tokens · hidden · 4` bytes of streams.

use std::sync::atomic::{AtomicBool, Ordering};

use lowbit_calibration::sequential::advance;
use lowbit_calibration::{InputStats, PassOptions, SequentialPass, Windows};
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::{Backend, Buffer, HostWeight, Segment};
use lowbit_kernels::{GroupSize, QuantizedMatrix, Scheme};
use lowbit_model::block::{Block, Linear, LinearGroup};
use lowbit_model::decoder::Head;
use lowbit_model::{Embedding, decoder};
use rayon::prelude::*;

use super::{Curve, Point, dense_bytes, packed_bytes};
use crate::driver::{Progress, read_dense};
use crate::error::{QuantizeError, Result};
use crate::factor::SolveError;
use crate::loss::{proxy_loss, squared_error};
use crate::plan::{Plan, PlannedLinear};
use crate::rtn::quantize_rtn;
use crate::scale_search::{ScaleSearch, SolverOptions};
use crate::solve::{Shared, round_linear, solve_linear};
use crate::target::Correction;

/// Calibration tokens for the Hessians: curves are ratios, which need fewer than the solve.
const HESSIAN_TOKENS: usize = 16384;
/// Probe windows, and tokens of each: many short ones vary more than few long ones.
const PROBE_WINDOWS: usize = 8;
const PROBE_TOKENS: usize = 96;
/// Rows a curve is solved on, spread over the matrix: rows do not depend on one another.
const CURVE_ROWS: usize = 256;
/// Rows of logits on the host at a time.
const SCORE_ROWS: usize = 128;

/// A unit quantized alone, on its way through the later blocks.
struct Stream {
    curve: usize,
    x: Option<Buffer>,
}

/// Measures the curves of everything `outline` quantizes. Returns them and the tokens used: for Hessians, for the KL.
pub fn measure(
    ckpt: &Checkpoint,
    backend: &dyn Backend,
    outline: &Plan,
    candidates: &[Scheme],
    windows: &Windows,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<(Vec<Curve>, [u64; 2])> {
    let per_window = windows.tokens.first().map_or(1, |w| w.len().max(1));
    let used = windows.tokens.get(..HESSIAN_TOKENS.div_ceil(per_window)).unwrap_or(&windows.tokens);
    let mut probes: Vec<Vec<u32>> =
        windows.tokens.iter().take(PROBE_WINDOWS).map(|w| w.get(..PROBE_TOKENS).unwrap_or(w).to_vec()).collect();
    probes.retain(|w| !w.is_empty());
    let mut m = Measurement { ckpt, backend, outline, candidates, curves: Vec::new(), streams: Vec::new() };
    let prefix = decoder::prefix(ckpt)?;
    let embedding = Embedding::load(ckpt, backend)?;
    let offload = outline.options.offload.as_deref();
    let options = PassOptions { chunk_tokens: outline.options.chunk_tokens, ..PassOptions::default() };
    let mut pass = SequentialPass::start(&[backend], &embedding, used, options, offload)?;
    let ids = probes.concat();
    let (mut segments, mut row) = (Vec::with_capacity(probes.len()), 0);
    for (slot, w) in probes.iter().enumerate() {
        segments.push(Segment { slot, row, tokens: w.len(), past: 0 });
        row += w.len();
    }
    let mut x = embedding.apply(backend, &ids)?;
    drop(embedding);
    m.embedding(&ids)?;
    ckpt.store.release(&format!("{prefix}.embed_tokens."));
    let layers = ckpt.config.num_layers;
    let ticks = pass.ticks_per_block() + 1;
    progress.stage("bits", layers as u64 * ticks);
    let check = |n: u64| {
        progress.advance(n);
        if stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
    };
    for index in 0..layers {
        progress.detail(&format!("block {}/{layers}", index + 1));
        let name = format!("{prefix}.layers.{index}");
        let mut block = Block::load(ckpt, backend, &name, index)?;
        let mut alone: Vec<(usize, Vec<(usize, HostWeight)>)> = Vec::new();
        pass.run_block(
            std::slice::from_mut(&mut block),
            None,
            &mut |groups, blocks| {
                let Some(block) = blocks.first() else { return Ok(()) };
                groups.iter().try_for_each(|(group, stats)| m.unit(index, *group, stats, block, &mut alone))
            },
            &mut || check(1),
        )?;
        let step = |block: &Block, x: Buffer| advance(backend, block, x, &segments, PROBE_TOKENS);
        for stream in &mut m.streams {
            if let Some(x) = stream.x.take() {
                stream.x = Some(step(&block, x)?);
                check(0)?;
            }
        }
        for (curve, linears) in alone {
            let mut original = Vec::with_capacity(linears.len());
            for (i, host) in linears {
                let Some(slot) = block.linears.get_mut(i) else { continue };
                let bias = ckpt.bias(&slot.module, host.dims().0)?;
                let quantized = Linear::from_host(backend, &slot.module, &host, bias.as_deref())?;
                original.push((i, std::mem::replace(slot, quantized)));
            }
            let moved = step(&block, m.copy(&x)?)?;
            m.streams.push(Stream { curve, x: Some(moved) });
            for (i, linear) in original {
                if let Some(slot) = block.linears.get_mut(i) {
                    *slot = linear;
                }
            }
            check(0)?;
        }
        x = step(&block, x)?;
        check(1)?;
        ckpt.store.release(&format!("{name}."));
    }
    progress.detail("head");
    m.head(&x, &check)?;
    m.finish();
    let tokens = used.iter().map(Vec::len).sum::<usize>();
    Ok((m.curves, [tokens as u64, ids.len() as u64]))
}

struct Measurement<'a> {
    ckpt: &'a Checkpoint,
    backend: &'a dyn Backend,
    outline: &'a Plan,
    candidates: &'a [Scheme],
    curves: Vec<Curve>,
    streams: Vec<Stream>,
}

impl Measurement<'_> {
    /// Settings of a solve without the refinements a method may add: curves are ratios.
    fn solver(&self, scheme: Scheme) -> SolverOptions {
        let plan = self.outline;
        let opts = plan.options.solver(scheme.into(), plan.layout.scales);
        // One by blocks would be summed for every candidate.
        let scale_search =
            if opts.scale_search == ScaleSearch::Blocks { ScaleSearch::Hessian } else { opts.scale_search };
        SolverOptions { sweeps: 0, correction: Correction::default(), scale_search, ..opts }
    }

    fn copy(&self, x: &Buffer) -> Result<Buffer> {
        let width = self.ckpt.config.hidden_size;
        let rows: Vec<usize> = (0..x.len / width.max(1)).collect();
        let copied = self.backend.gather_rows(x, width, &rows);
        copied.map_err(|source| QuantizeError::Kernel { module: "probe stream".into(), source })
    }

    /// The curve of one group of a block, and its linears under the probe's scheme.
    fn unit(
        &mut self,
        index: usize,
        group: LinearGroup,
        stats: &InputStats,
        block: &Block,
        alone: &mut Vec<(usize, Vec<(usize, HostWeight)>)>,
    ) -> Result<()> {
        let members: Vec<(usize, &PlannedLinear)> = block
            .linears
            .iter()
            .zip(block.shapes())
            .enumerate()
            .filter(|(_, (_, shape))| shape.group == group)
            .filter_map(|(i, (l, _))| Some((i, self.outline.linears.iter().find(|p| p.module == l.module)?)))
            .collect();
        let Some((_, first)) = members.first() else { return Ok(()) };
        let n = first.in_features;
        let schemes: Vec<Scheme> = self.candidates.iter().copied().filter(|s| s.groups(n).is_ok()).collect();
        let Some(probe) = probe_of(&schemes) else {
            return Err(QuantizeError::Plan {
                summary: format!("no candidate's group size divides the {n} columns of `{}`", first.module),
                offenders: self.candidates.iter().map(Scheme::full_name).collect(),
                hint: Some("add a candidate such as w4-g32 or w4-channel".into()),
            });
        };
        let rounding = !self.outline.options.method.calibrated();
        let fail = |source: SolveError| QuantizeError::Solve { module: first.module.clone(), source };
        let shared = if rounding { None } else { Some(Shared::new(stats, &self.solver(probe)).map_err(fail)?) };
        let mut points: Vec<Point> =
            schemes.iter().map(|s| Point { scheme: s.full_name(), ..Point::default() }).collect();
        let mut curve = Curve { block: Some(index), probe: probe.full_name(), ..Curve::default() };
        let mut linears = Vec::new();
        for (i, l) in &members {
            let w = read_dense(self.ckpt, &l.source, l.out_features, l.in_features)?;
            let solve = |w: &[f32], rows: usize, scheme: Scheme| -> Result<(QuantizedMatrix, f64)> {
                let opts = self.solver(scheme);
                let solved = match &shared {
                    Some(s) => solve_linear(w, rows, n, s, &opts).map(|(q, loss)| (q, loss.relative())),
                    None => round_linear(w, rows, n, &opts).and_then(|q| {
                        let loss = proxy_loss(w, &q.dequantize()?, &stats.hessian, rows, n);
                        Ok((q, loss.relative()))
                    }),
                };
                solved.map_err(|source| QuantizeError::Solve { module: l.module.clone(), source })
            };
            let (rows, sample) = sampled(&w, l.out_features, n);
            for (point, scheme) in points.iter_mut().zip(&schemes) {
                point.loss += solve(&sample, rows, *scheme)?.1 / members.len() as f64;
                point.bytes += packed_bytes(self.outline, &l.module, *scheme, l.out_features, n)?;
            }
            let (q, _) = solve(&w, l.out_features, probe)?;
            let packed =
                linear::pack_matrix(&q).map_err(|source| QuantizeError::Kernel { module: l.module.clone(), source })?;
            linears.push((*i, HostWeight::Packed(packed)));
            curve.modules.push(l.module.clone());
            curve.weights += (l.out_features * n) as u64;
        }
        curve.points = points;
        alone.push((self.curves.len(), linears));
        self.curves.push(curve);
        Ok(())
    }

    /// The planned embedding and head.
    fn tables(&self) -> (Option<&PlannedLinear>, Option<&PlannedLinear>) {
        let find = |head: bool| {
            self.outline.linears.iter().find(|l| l.block.is_none() && l.module.ends_with("lm_head") == head)
        };
        (find(false), find(true))
    }

    /// Starts the stream of a quantized embedding.
    fn embedding(&mut self, ids: &[u32]) -> Result<()> {
        let Some(l) = self.tables().0 else { return Ok(()) };
        let (schemes, l) = (table_schemes(l), l.clone());
        let w = read_dense(self.ckpt, &l.source, l.out_features, l.in_features)?;
        let mut curve = self.table_curve(&l)?;
        for scheme in &schemes {
            let (q, loss) = self.round(&l, &w, *scheme)?;
            let bytes = packed_bytes(self.outline, &l.module, *scheme, l.out_features, l.in_features)?;
            curve.points.push(Point { scheme: scheme.full_name(), bytes, loss, kl: 0.0 });
            if Some(*scheme) == probe_of(&schemes) {
                curve.probe = scheme.full_name();
                let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
                let packed = HostWeight::Packed(linear::pack_matrix(&q).map_err(kernel)?);
                let table = self.backend.upload_weight(&packed).map_err(kernel)?;
                let x = self.backend.embed(&table, ids, self.ckpt.config.embed_scale).map_err(kernel)?;
                self.streams.push(Stream { curve: self.curves.len(), x: Some(x) });
            }
        }
        self.curves.push(curve);
        Ok(())
    }

    fn table_curve(&self, l: &PlannedLinear) -> Result<Curve> {
        let keep = Point { scheme: "keep".into(), bytes: dense_bytes(self.ckpt, &l.source)?, ..Point::default() };
        Ok(Curve {
            modules: vec![l.module.clone()],
            weights: (l.out_features * l.in_features) as u64,
            points: vec![keep],
            ..Curve::default()
        })
    }

    /// A table rounded without data, and its relative squared error.
    fn round(&self, l: &PlannedLinear, w: &[f32], scheme: Scheme) -> Result<(QuantizedMatrix, f64)> {
        let opts = SolverOptions { act_order: false, ..self.solver(scheme) };
        let solve = |source| QuantizeError::Solve { module: l.module.clone(), source };
        let q = quantize_rtn(w, l.out_features, l.in_features, None, &opts).map_err(solve)?;
        let (error, norm) = squared_error(w, l.in_features, |rows, out| q.widen(rows, out));
        Ok((q, if norm > 0.0 { error / norm } else { 0.0 }))
    }

    /// Compares all streams with the undisturbed `x`, and the candidates of the head.
    fn head(&mut self, x: &Buffer, check: &dyn Fn(u64) -> Result<()>) -> Result<()> {
        let mut head = Head::load(self.ckpt, self.backend)?;
        let hidden = head.norm(self.backend, x)?;
        let rows = hidden.len / self.ckpt.config.hidden_size.max(1);
        let streams = std::mem::take(&mut self.streams);
        let mut normed = Vec::with_capacity(streams.len());
        for s in &streams {
            let Some(x) = &s.x else { continue };
            normed.push((s.curve, head.norm(self.backend, x)?));
        }
        let mut sums = vec![0f64; normed.len()];
        for start in (0..rows).step_by(SCORE_ROWS) {
            let range: Vec<usize> = (start..rows.min(start + SCORE_ROWS)).collect();
            let reference = self.logits(&head, &hidden, &range)?;
            for (sum, (_, hidden)) in sums.iter_mut().zip(&normed) {
                *sum += divergence(&reference, &self.logits(&head, hidden, &range)?, range.len());
                check(0)?;
            }
        }
        for (sum, (curve, _)) in sums.iter().zip(&normed) {
            if let Some(c) = self.curves.get_mut(*curve) {
                c.probe_kl = sum / rows.max(1) as f64;
            }
        }
        let Some(l) = self.tables().1.cloned() else { return Ok(()) };
        let w = read_dense(self.ckpt, &l.source, l.out_features, l.in_features)?;
        let mut curve = self.table_curve(&l)?;
        let schemes = table_schemes(&l);
        for scheme in &schemes {
            let (q, loss) = self.round(&l, &w, *scheme)?;
            let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
            let packed = HostWeight::Packed(linear::pack_matrix(&q).map_err(kernel)?);
            let bias = self.ckpt.bias(&l.source, l.out_features)?;
            let mut other = Linear::from_host(self.backend, &l.module, &packed, bias.as_deref())?;
            let mut kl = 0.0;
            for start in (0..rows).step_by(SCORE_ROWS) {
                let range: Vec<usize> = (start..rows.min(start + SCORE_ROWS)).collect();
                let reference = self.logits(&head, &hidden, &range)?;
                head.swap(&mut other);
                let found = self.logits(&head, &hidden, &range);
                head.swap(&mut other);
                kl += divergence(&reference, &found?, range.len());
                check(0)?;
            }
            let bytes = packed_bytes(self.outline, &l.module, *scheme, l.out_features, l.in_features)?;
            let kl = kl / rows.max(1) as f64;
            curve.points.push(Point { scheme: scheme.full_name(), bytes, loss, kl });
            if Some(*scheme) == probe_of(&schemes) {
                (curve.probe, curve.probe_kl) = (scheme.full_name(), kl);
            }
        }
        self.curves.push(curve);
        Ok(())
    }

    fn logits(&self, head: &Head, hidden: &Buffer, rows: &[usize]) -> Result<Vec<f32>> {
        let kernel = |source| QuantizeError::Kernel { module: "lm_head".into(), source };
        let some = self.backend.gather_rows(hidden, self.ckpt.config.hidden_size, rows).map_err(kernel)?;
        self.backend.download(&head.logits(self.backend, &some)?).map_err(kernel)
    }

    /// Expected KL of every point; a tied embedding and head become one unit.
    fn finish(&mut self) {
        for c in &mut self.curves {
            let probe = c.points.iter().find(|p| p.scheme == c.probe).map_or(0.0, |p| p.loss);
            let measured = c.modules.iter().any(|m| m.ends_with("lm_head"));
            // Below the noise of f32 a difference of streams means nothing; losses still order the candidates.
            let kl = c.probe_kl.max(1e-12);
            for p in c.points.iter_mut().filter(|p| !measured && p.scheme != "keep") {
                p.kl = if probe > 0.0 { kl * p.loss / probe } else { 0.0 };
            }
        }
        if self.ckpt.config.tie_word_embeddings {
            self.tie();
        }
    }

    /// One matrix in the original, two in the output once one of them is packed; a packed embedding has no dense head to lend to.
    fn tie(&mut self) {
        let find = |head: bool, curves: &[Curve]| {
            curves.iter().position(|c| c.block.is_none() && c.modules.iter().any(|m| m.ends_with("lm_head")) == head)
        };
        let Some(e) = find(false, &self.curves) else { return };
        let embedding = self.curves.remove(e);
        let Some(h) = find(true, &self.curves) else { return };
        let head = self.curves.remove(h);
        let mut points = Vec::new();
        for a in &embedding.points {
            for b in &head.points {
                match (a.scheme.as_str(), b.scheme.as_str()) {
                    ("keep", "keep") => points.push(Point { scheme: "keep".into(), ..a.clone() }),
                    (_, "keep") => {}
                    _ => points.push(Point {
                        scheme: format!("{} + {}", a.scheme, b.scheme),
                        bytes: a.bytes + b.bytes,
                        loss: a.loss.max(b.loss),
                        kl: a.kl + b.kl,
                    }),
                }
            }
        }
        let modules = [embedding.modules, head.modules].concat();
        let probe = format!("{} + {}", embedding.probe, head.probe);
        let probe_kl = embedding.probe_kl + head.probe_kl;
        self.curves.push(Curve { modules, points, probe, probe_kl, ..head });
    }
}

/// The candidate a unit's KL is measured with: the nearest to 4 bits, in the middle of what a budget chooses from.
fn probe_of(schemes: &[Scheme]) -> Option<Scheme> {
    let distance = |s: &Scheme| {
        let group = match s.group {
            GroupSize::Cols(n) => n.abs_diff(64),
            GroupSize::PerChannel => usize::MAX,
        };
        (s.bits.abs_diff(4), group)
    };
    schemes.iter().copied().min_by_key(distance)
}

/// Candidates of an embedding or head: rounded without data, so not below 4 bits.
fn table_schemes(l: &PlannedLinear) -> Vec<Scheme> {
    let group = [64, 32].into_iter().find(|g| l.in_features.is_multiple_of(*g));
    let group = group.map_or(GroupSize::PerChannel, GroupSize::Cols);
    [4, 5, 6, 8].map(|bits| Scheme { bits, symmetric: true, group }).to_vec()
}

/// At most [`CURVE_ROWS`] rows of `w` `[out, n]`, evenly spread.
fn sampled(w: &[f32], out: usize, n: usize) -> (usize, Vec<f32>) {
    let rows = out.min(CURVE_ROWS);
    let sample = (0..rows).flat_map(|i| w.iter().skip(i * out / rows.max(1) * n).take(n).copied()).collect();
    (rows, sample)
}

/// Sum over rows of KL(softmax(reference) ‖ softmax(found)), logits `[rows, vocab]`; f64 sums.
fn divergence(reference: &[f32], found: &[f32], rows: usize) -> f64 {
    let vocab = reference.len() / rows.max(1);
    let row = |(a, b): (&[f32], &[f32])| {
        let top = |v: &[f32]| v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (ta, tb) = (top(a), top(b));
        let (mut za, mut zb, mut cross) = (0f64, 0f64, 0f64);
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a - ta), f64::from(b - tb));
            let e = a.exp();
            za += e;
            zb += b.exp();
            cross += e * (a - b);
        }
        cross / za + zb.ln() - za.ln()
    };
    let all: Vec<f64> = reference.par_chunks(vocab.max(1)).zip(found.par_chunks(vocab.max(1))).map(row).collect();
    all.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        // p = (1/2, 1/2), q = (3/4, 1/4): KL = ½ ln(½ / ¾) + ½ ln(½ / ¼).
        let expected = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * 2f64.ln();
        let reference = [1f32, 1.0, 5.0, 5.0];
        let found = [3f32.ln(), 0.0, 7.0, 7.0];
        assert!((divergence(&reference, &found, 2) - expected).abs() <= 1e-7);
        assert_eq!(divergence(&reference, &reference, 2), 0.0);
    }

    #[test]
    fn rows_are_spread() {
        let w: Vec<f32> = (0..1024 * 2).map(|i| i as f32).collect();
        let (rows, sample) = sampled(&w, 1024, 2);
        assert_eq!((rows, sample.len()), (256, 512));
        assert_eq!(&sample[..4], [0.0, 1.0, 8.0, 9.0]);
        assert_eq!(sampled(&w, 2, 2), (2, vec![0.0, 1.0, 2.0, 3.0]));
    }

    #[test]
    fn the_probe_is_a_middle_candidate() {
        let s = |bits, group| Scheme { bits, symmetric: true, group };
        let all = super::super::default_candidates();
        assert_eq!(probe_of(&all), Some(s(4, GroupSize::Cols(64))));
        assert_eq!(probe_of(&[s(8, GroupSize::PerChannel), s(2, GroupSize::Cols(32))]).unwrap().bits, 2);
        assert_eq!(probe_of(&[]), None);
    }
}
