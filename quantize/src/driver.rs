//! Carries a plan out: block by block, streaming into a checkpoint that appears only when it is whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowbit_calibration::experts::tokens_needed;
use lowbit_calibration::{InputStats, PassOptions, SequentialPass, Windows};
use lowbit_checkpoint::quant_config::{PackFormat, QuantConfig};
use lowbit_checkpoint::store::TensorStore;
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_checkpoint::{Checkpoint, CheckpointError, linear};
use lowbit_kernels::backend::{Backend, HostWeight};
use lowbit_kernels::{QuantizedMatrix, qdq};
use lowbit_model::block::{Block, Linear, LinearGroup};
use lowbit_model::{Embedding, decoder};
use rayon::prelude::*;

use crate::error::{QuantizeError, Result};
use crate::experts::starved;
use crate::factor::SolveError;
use crate::plan::{Method, Plan, PlannedLinear};
use crate::record::{CalibrationRecord, ExpertCoverage, LayerRecord};
use crate::resume::{Chain, Resume, linears_of};
use crate::rtn::quantize_rtn;
use crate::scale_search::SolverOptions;
use crate::solve::{Shared, solve_linear};

/// Progress of long work; the command line draws it.
pub trait Progress: Sync {
    /// A stage of `total` steps begins.
    fn stage(&self, name: &str, total: u64);
    /// `n` steps are done.
    fn advance(&self, n: u64);
    /// What is being worked on.
    fn detail(&self, text: &str);
    /// Something a user should read, whether or not progress is drawn.
    fn say(&self, _text: &str) {}
}

/// No progress.
pub struct Silent;

impl Progress for Silent {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn detail(&self, _: &str) {}
}

/// What a run produced, for the record.
pub struct Outcome {
    /// One per linear, in the order they were made.
    pub layers: Vec<LayerRecord>,
    /// One per block with experts, where they were calibrated.
    pub experts: Vec<ExpertCoverage>,
    /// Which data was used.
    pub calibration: Option<CalibrationRecord>,
    /// Seconds by stage.
    pub stage_seconds: BTreeMap<String, f64>,
}

struct Run<'a> {
    ckpt: &'a Checkpoint,
    plan: &'a Plan,
    writer: CheckpointWriter,
    layers: Vec<LayerRecord>,
    experts: Vec<ExpertCoverage>,
    stage_seconds: BTreeMap<String, f64>,
    stop: &'a AtomicBool,
    chain: Chain,
}

/// Quantizes `ckpt` towards `target`. `windows` is needed by methods that calibrate.
///
/// The checkpoint is complete, and not in place yet: the caller adds its record with [`CheckpointWriter::write_file`] and calls
/// [`CheckpointWriter::finish`], so that a checkpoint is never seen without its record. Blocks solved by an earlier run that was
/// stopped are taken over as `resume` says, and the result is the same.
pub fn quantize(
    ckpt: &Checkpoint,
    backend: &dyn Backend,
    plan: &Plan,
    windows: Option<&Windows>,
    target: &Path,
    force: bool,
    resume: &Resume,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<(Outcome, CheckpointWriter)> {
    if let Some(gguf) = &plan.gguf {
        return crate::gguf::quantize(ckpt, backend, (plan, gguf), windows, target, force, progress, stop);
    }
    let chain = Chain::start(resume, ckpt, plan, windows);
    let (declared, shard_bytes) = (plan.declared.clone(), plan.options.shard_bytes);
    let writer = match chain.key() {
        Some(key) => CheckpointWriter::resume(target, declared, shard_bytes, force, key, resume.fresh)?,
        None => CheckpointWriter::create(target, declared, shard_bytes, force)?,
    };
    let (layers, experts, stage_seconds) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut run = Run { ckpt, plan, writer, layers, experts, stage_seconds, stop, chain };
    match run.all(backend, windows, progress) {
        Ok(calibration) => {
            let Run { layers, experts, stage_seconds, writer, .. } = run;
            Ok((Outcome { layers, experts, calibration, stage_seconds }, writer))
        }
        Err(e) => {
            // What the same command would only run into again is nothing to go on from.
            if !matches!(e, QuantizeError::Interrupted | QuantizeError::Checkpoint(CheckpointError::Io { .. })) {
                run.writer.forget();
            }
            if let (folder, blocks @ 1..) = run.writer.unfinished() {
                let folder = folder.display();
                progress
                    .say(&format!("note: {blocks} solved blocks are kept in {folder}: the same command goes on there"));
            }
            Err(e)
        }
    }
}

impl Run<'_> {
    fn all(
        &mut self,
        backend: &dyn Backend,
        windows: Option<&Windows>,
        progress: &dyn Progress,
    ) -> Result<Option<CalibrationRecord>> {
        let (ckpt, plan, run) = (self.ckpt, self.plan, self);
        run.copy(progress)?;
        let calibration = match (plan.options.method, windows) {
            (Method::Rtn, _) => {
                run.rtn(progress)?;
                None
            }
            (_, Some(w)) => {
                run.calibrated(backend, w, progress)?;
                Some(CalibrationRecord::of(w))
            }
            (method, None) => return Err(QuantizeError::no_data(method.name())),
        };
        run.tables(progress)?;
        // A record of the original's own making is not this checkpoint's.
        run.writer.carry_over(
            &ckpt.dir,
            &["config.json", "recipe.yaml", "recipe.toml", "quantize_config.json", "quantize.json"],
        )?;
        let text = format!("{:#}\n", plan.config);
        run.writer.write_file("config.json", text.as_bytes())?;
        if matches!(plan.options.format, PackFormat::GptqV1 | PackFormat::GptqV2)
            && let Some(q) = plan.config.get("quantization_config")
        {
            run.writer.write_file("quantize_config.json", format!("{q:#}\n").as_bytes())?;
        }
        run.check_stop()?;
        ckpt.store.unchanged()?;
        Ok(calibration)
    }

    fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
    }

    fn time<T>(&mut self, stage: &str, start: Instant, value: T) -> T {
        *self.stage_seconds.entry(stage.into()).or_default() += start.elapsed().as_secs_f64();
        value
    }

    fn copy(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        progress.stage("copy", self.plan.copies.len() as u64);
        for name in &self.plan.copies {
            self.check_stop()?;
            let t = self.ckpt.store.get(name)?;
            if let Some((i, x)) = t.first_not_finite() {
                return Err(self
                    .ckpt
                    .store
                    .mismatch(name, "finite values".into(), format!("{x} at element {i}"))
                    .into());
            }
            self.writer.write(name, t.data.as_slice())?;
            self.ckpt.store.release(name);
            progress.advance(1);
        }
        self.time("copy", start, ());
        Ok(())
    }

    fn calibrated(&mut self, backend: &dyn Backend, windows: &Windows, progress: &dyn Progress) -> Result<()> {
        let layers = self.ckpt.config.num_layers;
        let solved = self.take_solved(progress)?;
        if solved == layers {
            return Ok(());
        }
        let prefix = decoder::prefix(self.ckpt)?;
        let embedding = Embedding::load(self.ckpt, backend)?;
        let recipe = self.plan.options.method.recipe();
        let options = PassOptions {
            float_stream: recipe.float_stream(),
            token_weights: recipe.token_weights,
            expert_bytes: self.plan.options.expert_bytes,
        };
        let offload = self.plan.options.offload.as_deref();
        let mut pass = SequentialPass::start(backend, &embedding, &windows.tokens, options, offload)?;
        drop(embedding);
        self.ckpt.store.release(&format!("{prefix}.embed_tokens."));
        progress.stage("quantize", layers as u64 * pass.ticks_per_block());
        let whole = Instant::now();
        let mut solving = 0f64;
        let stop = self.stop;
        let tick = |n: u64| {
            progress.advance(n);
            if stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
        };
        for index in 0..layers {
            progress.detail(&format!("block {}/{layers}", index + 1));
            let name = format!("{prefix}.layers.{index}");
            let mut block = Block::load(self.ckpt, backend, &name, index)?;
            let original = options.float_stream.then(|| Block::load(self.ckpt, backend, &name, index)).transpose()?;
            if index < solved {
                self.put_back(backend, &mut block)?;
                pass.replay_block(&block, original.as_ref(), &mut || tick(4))?;
                self.ckpt.store.release(&format!("{name}."));
                continue;
            }
            let before = self.layers.len();
            let mut routed = Vec::new();
            pass.run_block(
                &mut block,
                original.as_ref(),
                &mut |group, stats, block| {
                    if matches!(group, LinearGroup::Expert(_)) {
                        routed.push(stats.tokens);
                    }
                    let start = Instant::now();
                    let done = self.solve_group(backend, index, group, &stats, block);
                    solving += start.elapsed().as_secs_f64();
                    done
                },
                &mut || tick(1),
            )?;
            if let Some(e) = self.ckpt.config.experts_of(index) {
                let needed = tokens_needed(self.ckpt.config.hidden_size, e.intermediate_size);
                self.experts.push(ExpertCoverage::new(index, routed, needed));
            }
            self.chain.keep(&mut self.writer, self.plan, index, self.layers.get(before..).unwrap_or_default())?;
            self.ckpt.store.release(&format!("{name}."));
        }
        self.stage_seconds.insert("solve".into(), solving);
        self.stage_seconds.insert("forward and statistics".into(), whole.elapsed().as_secs_f64() - solving);
        Ok(())
    }

    /// Takes over the blocks that an earlier run solved.
    fn take_solved(&mut self, progress: &dyn Progress) -> Result<usize> {
        let blocks = self.ckpt.config.num_layers;
        let (solved, records) = self.chain.take(&mut self.writer, self.plan, blocks, progress)?;
        self.layers.extend(records);
        if solved > 0 {
            progress.say(&format!("{solved} of {blocks} blocks were solved before"));
        }
        Ok(solved)
    }

    /// Puts the quantized linears of a solved block in the place of the original ones, as [`Self::solve_group`] did.
    fn put_back(&self, backend: &dyn Backend, block: &mut Block) -> Result<()> {
        let folder = self.writer.unfinished().0;
        let store = TensorStore::open(folder)?;
        let config = self.plan.config.get("quantization_config");
        let quantization = config.map(|q| QuantConfig::parse(&folder.join("config.json"), q)).transpose()?;
        for l in linears_of(self.plan, block.index) {
            let weight = linear::read(&store, quantization.as_ref(), &l.module, l.out_features, l.in_features)?;
            let bias = self.ckpt.bias(&l.module, l.out_features)?;
            let quantized = Linear::from_host(backend, &l.module, &weight, bias.as_deref())?;
            if let Some(slot) = block.linears.iter_mut().find(|slot| slot.module == l.module) {
                *slot = quantized;
            }
        }
        Ok(())
    }

    fn solve_group(
        &mut self,
        backend: &dyn Backend,
        index: usize,
        group: LinearGroup,
        stats: &InputStats,
        block: &mut Block,
    ) -> Result<()> {
        let plan = self.plan;
        let mut shared: Option<Shared> = None;
        for i in 0..block.linears.len() {
            let (Some(shape), Some(module)) =
                (block.shapes().get(i).cloned(), block.linears.get(i).map(|l| l.module.clone()))
            else {
                continue;
            };
            if shape.group != group {
                continue;
            }
            let Some(planned) = plan.linears.iter().find(|l| l.module == module) else { continue };
            self.check_stop()?;
            let start = Instant::now();
            let opts = plan.options.solver(planned.scheme, plan.layout.scales);
            let solve = |source: SolveError| QuantizeError::Solve { module: module.clone(), source };
            if shared.is_none() {
                shared = Some(Shared::new(stats, &opts).map_err(solve)?);
            }
            let Some(shared) = &shared else { continue };
            let f = &shared.factor;
            let w = read_dense(self.ckpt, &planned.source, planned.out_features, planned.in_features)?;
            let (q, loss) =
                solve_linear(&w, planned.out_features, planned.in_features, shared, &opts).map_err(solve)?;
            let record = LayerRecord {
                name: module.clone(),
                block: Some(index),
                out_features: planned.out_features,
                in_features: planned.in_features,
                scheme: planned.scheme.full_name(),
                method: plan.options.method.name().into(),
                proxy_loss: loss.proxy,
                relative_error: loss.relative(),
                seconds: start.elapsed().as_secs_f64(),
                tokens: stats.tokens,
                input_abs_max: stats.abs_max,
                dead_columns: f.dead.len(),
                damp_frac: f.damp_frac,
                events: starved(stats).into_iter().chain(f.events.clone()).collect(),
            };
            self.keep(planned, &q, record)?;
            let bias = self.ckpt.bias(&module, planned.out_features)?;
            let packed =
                linear::pack_matrix(&q).map_err(|source| QuantizeError::Kernel { module: module.clone(), source })?;
            let replaced = Linear::from_host(backend, &module, &HostWeight::Packed(packed), bias.as_deref())?;
            if let Some(slot) = block.linears.get_mut(i) {
                *slot = replaced;
            }
        }
        Ok(())
    }

    fn rtn(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let (plan, blocks) = (self.plan, self.ckpt.config.num_layers);
        let solved = self.take_solved(progress)?;
        progress.stage("quantize", blocks as u64);
        progress.advance(solved as u64);
        for block in solved..blocks {
            let before = self.layers.len();
            for l in linears_of(plan, block) {
                self.check_stop()?;
                self.round(l)?;
            }
            self.chain.keep(&mut self.writer, plan, block, self.layers.get(before..).unwrap_or_default())?;
            progress.advance(1);
        }
        self.time("solve", start, ());
        Ok(())
    }

    fn tables(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let tables: Vec<PlannedLinear> = self.plan.linears.iter().filter(|l| l.block.is_none()).cloned().collect();
        for l in &tables {
            self.check_stop()?;
            progress.detail(&l.module);
            self.round(l)?;
        }
        self.time("embedding and head", start, ());
        Ok(())
    }

    fn round(&mut self, l: &PlannedLinear) -> Result<()> {
        let start = Instant::now();
        // Without data the Hessian is the identity: act-order and damping have no meaning.
        let opts = SolverOptions { act_order: false, ..self.plan.options.solver(l.scheme, self.plan.layout.scales) };
        let w = read_dense(self.ckpt, &l.source, l.out_features, l.in_features)?;
        let solve = |source| QuantizeError::Solve { module: l.module.clone(), source };
        let q = quantize_rtn(&w, l.out_features, l.in_features, None, &opts).map_err(solve)?;
        let (error, norm) = squared_error(&w, &q);
        let record = LayerRecord {
            name: l.module.clone(),
            block: l.block,
            out_features: l.out_features,
            in_features: l.in_features,
            scheme: l.scheme.full_name(),
            method: "rtn".into(),
            proxy_loss: error,
            relative_error: if norm > 0.0 { error / norm } else { 0.0 },
            seconds: start.elapsed().as_secs_f64(),
            ..LayerRecord::default()
        };
        self.ckpt.store.release(&format!("{}.", l.source));
        self.keep(l, &q, record)
    }

    fn keep(&mut self, l: &PlannedLinear, q: &QuantizedMatrix, record: LayerRecord) -> Result<()> {
        if self.plan.options.strict
            && let Some(event) = record.events.first()
        {
            return Err(QuantizeError::Strict { module: l.module.clone(), event: event.clone() });
        }
        let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
        let layout = self.plan.layout;
        let names = linear::declare(&l.module, l.scheme, layout, l.out_features, l.in_features).map_err(kernel)?;
        for (d, bytes) in names.iter().zip(linear::encode(q, layout).map_err(kernel)?) {
            self.writer.write(&d.name, &bytes)?;
        }
        self.layers.push(record);
        Ok(())
    }
}

/// The original weight of a module, `[out, in]`, checked to be finite.
pub(crate) fn read_dense(ckpt: &Checkpoint, module: &str, out: usize, n: usize) -> Result<Vec<f32>> {
    let name = format!("{module}.weight");
    let t = ckpt.store.get(&name)?;
    if t.shape != [out, n] {
        let expected = format!("shape [{out}, {n}]");
        return Err(ckpt.store.mismatch(&name, expected, format!("{:?}", t.shape)).into());
    }
    let w =
        t.to_f32().ok_or_else(|| ckpt.store.mismatch(&name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)))?;
    if let Some(i) = w.iter().position(|x| !x.is_finite()) {
        return Err(ckpt.store.mismatch(&name, "finite weights".into(), format!("{} at element {i}", w[i])).into());
    }
    Ok(w)
}

/// `Σ (w − q)²` and `Σ w²`, without a dequantized copy; rows are summed in f64 on their own, so threads change nothing.
pub(crate) fn squared_error(w: &[f32], q: &QuantizedMatrix) -> (f64, f64) {
    let n = q.in_features.max(1);
    let groups = q.scales.len() / q.out_features.max(1);
    let cols = q.scheme.group_cols(q.in_features).max(1);
    let row = |(r, (w, codes)): (usize, (&[f32], &[u8]))| {
        let (mut error, mut norm) = (0f64, 0f64);
        for (c, (w, code)) in w.iter().zip(codes).enumerate() {
            let at = r * groups + c / cols;
            let zero = q.zeros.as_ref().map_or(q.scheme.mid_code(), |z| z.get(at).copied().unwrap_or_default());
            let back = qdq::dequantize(*code, q.scales.get(at).copied().unwrap_or_default(), zero);
            error += f64::from(w - back).powi(2);
            norm += f64::from(*w).powi(2);
        }
        (error, norm)
    };
    let rows: Vec<(f64, f64)> = w.par_chunks(n).zip(q.codes.par_chunks(n)).enumerate().map(row).collect();
    rows.into_iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1))
}
