//! Carries a plan out: block by block, streaming into a checkpoint that appears only when it is whole.

mod groups;
mod learned;
mod output;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use lowbit_calibration::experts::tokens_needed;
use lowbit_calibration::lanes::load_block;
use lowbit_calibration::{CalibrationError, KvRange, PassOptions, SequentialPass, Windows};
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat, QuantConfig};
use lowbit_checkpoint::store::{StoredTensor, TensorStore};
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_checkpoint::{Checkpoint, CheckpointError, converted, linear};
use lowbit_kernels::WeightFormat;
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{Backend, HostWeight};
use lowbit_model::block::{Block, Linear, LinearGroup};
use lowbit_model::{Embedding, decoder};
use rayon::prelude::*;

use self::output::{Halt, Hand, Made, MadeLinear, Output};
use crate::error::{QuantizeError, Result};
use crate::inputs::{input_rule, scale_of};
use crate::loss::squared_error;
use crate::plan::{Method, Plan, PlannedLinear};
use crate::record::{CalibrationRecord, ExpertCoverage, LayerRecord};
use crate::resume::{Chain, Resume, Taken, linears_of};
use crate::scale_search::{DataFree, SolverOptions};
use crate::solve::{Solved, round_any};
use crate::transform::{BlockFold, Folding, TransformRecord, scaling};

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
    /// What the transforms did, where there are any.
    pub transforms: Option<TransformRecord>,
    /// Seconds by stage.
    pub stage_seconds: BTreeMap<String, f64>,
}

struct Run<'a> {
    ckpt: &'a Checkpoint,
    plan: &'a Plan,
    folding: Folding<'a>,
    /// Folder of the unfinished output.
    unfinished: PathBuf,
    /// To the thread that writes.
    hand: Hand,
    halt: Halt<'a>,
    layers: Vec<LayerRecord>,
    experts: Vec<ExpertCoverage>,
    stage_seconds: BTreeMap<String, f64>,
}

/// Quantizes `ckpt` towards `target`. `windows` is needed by methods that calibrate. `backends` are at least one device; several, which
/// must be of one kind, share the windows and the linears, and what is written does not depend on how many there are.
///
/// The checkpoint is complete, and not in place yet: the caller adds its record with [`CheckpointWriter::write_file`] and calls
/// [`CheckpointWriter::finish`], so that a checkpoint is never seen without its record. Blocks solved by an earlier run that was
/// stopped are taken over as `resume` says, and the result is the same.
///
/// Another thread packs and writes meanwhile. It waits for rayon's workers and the caller's thread for it, so the caller is none of them.
pub fn quantize(
    ckpt: &Checkpoint,
    backends: &[&dyn Backend],
    plan: &Plan,
    windows: Option<&Windows>,
    target: &Path,
    force: bool,
    resume: &Resume,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<(Outcome, CheckpointWriter)> {
    let chain = Chain::start(resume, plan, windows);
    let folding = Folding::new(ckpt, plan)?;
    let (declared, shard_bytes) = (plan.declared.clone(), plan.options.shard_bytes);
    let writer = match (&plan.gguf, chain.key()) {
        (Some(layout), _) => CheckpointWriter::create_gguf(target, layout, force)?,
        (None, Some(key)) => CheckpointWriter::resume(target, declared, shard_bytes, force, key, resume.fresh)?,
        (None, None) => CheckpointWriter::create(target, declared, shard_bytes, force)?,
    };
    let mut output = Output { writer, chain, plan };
    match output.all(ckpt, folding, backends, windows, progress, stop) {
        Ok(outcome) => Ok((outcome, output.writer)),
        Err(e) => {
            // What the same command would only run into again is nothing to go on from.
            if !matches!(e, QuantizeError::Interrupted | QuantizeError::Checkpoint(CheckpointError::Io { .. })) {
                output.writer.forget();
            }
            if let (folder, blocks @ 1..) = output.writer.unfinished() {
                let folder = folder.display();
                progress
                    .say(&format!("note: {blocks} solved blocks are kept in {folder}: the same command goes on there"));
            }
            Err(e)
        }
    }
}

impl Output<'_> {
    fn all(
        &mut self,
        ckpt: &Checkpoint,
        folding: Folding<'_>,
        backends: &[&dyn Backend],
        windows: Option<&Windows>,
        progress: &dyn Progress,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        let plan = self.plan;
        let halt = Halt::new(stop);
        let start = Instant::now();
        self.copy(ckpt, &folding, &halt, progress)?;
        let stage_seconds = BTreeMap::from([("copy".to_string(), start.elapsed().as_secs_f64())]);
        let windows = match windows {
            _ if !plan.options.needs_data() => None,
            Some(w) => Some(w),
            None => return Err(plan.options.no_data()),
        };
        let Taken { folds, layers, experts } = self.take_solved(ckpt.config.num_layers, progress)?;
        let unfinished = self.writer.unfinished().0.to_path_buf();
        let outcome = self.beside(&halt, progress, |hand| {
            let halt = halt.clone();
            let mut run = Run { ckpt, plan, folding, unfinished, hand, halt, layers, experts, stage_seconds };
            folds.iter().for_each(|f| run.folding.taken(f));
            match windows {
                Some(w) => run.calibrated(backends, w, &folds, progress)?,
                None => run.data_free(folds.len(), progress)?,
            }
            run.tables(progress)?;
            let Run { layers, experts, stage_seconds, folding, .. } = run;
            let calibration = windows.map(CalibrationRecord::of);
            Ok(Outcome { layers, experts, calibration, transforms: folding.record(), stage_seconds })
        })?;
        if plan.gguf.is_none() {
            self.files(ckpt)?;
        }
        halt.check()?;
        ckpt.store.unchanged()?;
        Ok(outcome)
    }

    /// What stands beside the weights; a GGUF file holds it all itself.
    fn files(&self, ckpt: &Checkpoint) -> Result<()> {
        let plan = self.plan;
        // A record of the original's own making is not this checkpoint's.
        self.writer.carry_over(
            &ckpt.dir,
            &["config.json", "recipe.yaml", "recipe.toml", "quantize_config.json", "quantize.json", converted::FILE],
        )?;
        let text = format!("{:#}\n", plan.config);
        self.writer.write_file("config.json", text.as_bytes())?;
        if matches!(plan.options.format, PackFormat::GptqV1 | PackFormat::GptqV2)
            && let Some(q) = plan.config.get("quantization_config")
        {
            self.writer.write_file("quantize_config.json", format!("{q:#}\n").as_bytes())?;
        }
        Ok(())
    }

    fn copy(
        &mut self,
        ckpt: &Checkpoint,
        folding: &Folding<'_>,
        halt: &Halt<'_>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let tables: Vec<&String> = self.plan.rewritten_in(None).collect();
        progress.stage("copy", (self.plan.copies.len() + tables.len()) as u64);
        for name in &self.plan.copies {
            halt.check()?;
            let t = ckpt.store.get(name)?;
            if let Some((i, x)) = first_not_finite(t) {
                return Err(ckpt.store.mismatch(name, "finite values".into(), format!("{x} at element {i}")).into());
            }
            match &self.plan.gguf {
                Some(layout) => self.writer.write(name, &layout.bytes(name, t)?)?,
                None => self.writer.write(name, t.data.as_slice())?,
            }
            ckpt.store.release(name);
            progress.advance(1);
        }
        for name in tables {
            halt.check()?;
            self.writer.write(name, folding.tensor(name)?.data.as_slice())?;
            progress.advance(1);
        }
        Ok(())
    }

    /// Takes over the blocks that an earlier run solved.
    fn take_solved(&mut self, blocks: usize, progress: &dyn Progress) -> Result<Taken> {
        let taken = self.chain.take(&mut self.writer, self.plan, blocks, progress)?;
        if !taken.folds.is_empty() {
            progress.say(&format!("{} of {blocks} blocks were solved before", taken.folds.len()));
        }
        Ok(taken)
    }
}

impl Run<'_> {
    fn check_stop(&self) -> Result<()> {
        self.halt.check()
    }

    fn time<T>(&mut self, stage: &str, start: Instant, value: T) -> T {
        *self.stage_seconds.entry(stage.into()).or_default() += start.elapsed().as_secs_f64();
        value
    }

    /// `folds` are those of the blocks that were taken over.
    fn calibrated(
        &mut self,
        backends: &[&dyn Backend],
        windows: &Windows,
        folds: &[BlockFold],
        progress: &dyn Progress,
    ) -> Result<()> {
        let layers = self.ckpt.config.num_layers;
        let solved = folds.len();
        if solved == layers {
            return Ok(());
        }
        let prefix = decoder::prefix(self.ckpt)?;
        self.folding.embedding()?;
        let first = *backends.first().ok_or(CalibrationError::Zero("devices"))?;
        let embedding = Embedding::load(self.folding.floats(), first)?;
        let recipe = self.plan.options.method.recipe();
        let kv = self.plan.options.kv;
        let options = PassOptions {
            float_stream: recipe.float_stream(),
            kv_ranges: kv.map(|kv| kv.per_head),
            token_weights: recipe.token_weights,
            expert_bytes: self.plan.options.expert_bytes,
            chunk_tokens: self.plan.options.chunk_tokens,
        };
        let offload = self.plan.options.offload.as_deref();
        let mut pass = SequentialPass::start(backends, &embedding, &windows.tokens, options, offload)?;
        drop(embedding);
        self.ckpt.store.release(&format!("{prefix}.embed_tokens."));
        // A block whose scales are searched is looked at once more.
        let looks = if scaling(&self.plan.options.transforms).is_some() { 5 } else { 4 };
        progress.stage("quantize", layers as u64 * pass.ticks_per_block() / 4 * looks);
        let whole = Instant::now();
        let (mut solving, mut folding) = (0f64, 0f64);
        let halt = self.halt.clone();
        let tick = |n: u64| {
            progress.advance(n);
            halt.check()
        };
        for index in 0..layers {
            progress.detail(&format!("block {}/{layers}", index + 1));
            let name = format!("{prefix}.layers.{index}");
            match folds.get(index) {
                Some(fold) => self.folding.repeat(index, fold)?,
                None => {
                    let start = Instant::now();
                    self.folding.choose(backends, &mut pass, index, &mut || tick(1))?;
                    folding += start.elapsed().as_secs_f64();
                }
            }
            let floats = self.folding.floats();
            let mut blocks = load_block(floats, backends, &name, index)?;
            let originals = options.float_stream.then(|| load_block(floats, backends, &name, index)).transpose()?;
            if index < solved {
                self.put_back(backends, index, &mut blocks)?;
                pass.replay_block(&blocks, originals.as_deref(), &mut || tick(looks))?;
                self.ckpt.store.release(&format!("{name}."));
                continue;
            }
            let before = self.layers.len();
            let mut routed = Vec::new();
            if recipe.learned {
                pass.run_whole_block(
                    &mut blocks,
                    originals.as_deref(),
                    &mut |data, blocks| {
                        let start = Instant::now();
                        let done = self.learn_block(backends, index, &data, blocks);
                        solving += start.elapsed().as_secs_f64();
                        done
                    },
                    &mut || tick(2),
                )?;
            } else {
                pass.run_block(
                    &mut blocks,
                    originals.as_deref(),
                    &mut |groups, blocks| {
                        let experts = groups.iter().filter(|(g, _)| matches!(g, LinearGroup::Expert(_)));
                        routed.extend(experts.map(|(_, stats)| stats.tokens));
                        let start = Instant::now();
                        let done = self.solve_groups(backends, index, &groups, blocks);
                        solving += start.elapsed().as_secs_f64();
                        done
                    },
                    &mut || tick(1),
                )?;
            }
            if let Some(e) = self.ckpt.config.experts_of(index).filter(|_| self.plan.options.reads_inputs()) {
                let needed = tokens_needed(self.ckpt.config.hidden_size, e.intermediate_size);
                self.experts.push(ExpertCoverage::new(index, routed, needed));
            }
            if let Some(kv) = kv {
                self.keep_kv(kv, index, pass.kv_range())?;
            }
            self.keep_block(index, before, 0)?;
            self.ckpt.store.release(&format!("{name}."));
        }
        if self.folding.works() {
            self.stage_seconds.insert("transforms".into(), folding);
        }
        self.stage_seconds.insert("solve".into(), solving);
        self.stage_seconds.insert("forward and statistics".into(), whole.elapsed().as_secs_f64() - solving - folding);
        Ok(())
    }

    /// Hands over what transforms changed in a block beside its linears, and has the block kept, which is `steps` of progress; its
    /// records are those from `before` on.
    fn keep_block(&mut self, block: usize, before: usize, steps: u64) -> Result<()> {
        let plan = self.plan;
        for name in plan.rewritten_in(Some(block)) {
            let data = self.folding.floats().store.get(name)?.data.as_slice().to_vec();
            self.hand.give(Made::Tensor { name: name.clone(), data })?;
        }
        let fold = self.folding.works().then(|| self.folding.fold().clone());
        let experts = self.experts.last().filter(|e| e.block == block).cloned();
        let records = self.layers.get(before..).unwrap_or_default().to_vec();
        self.hand.give(Made::Block { block, records, fold, experts, steps })
    }

    /// Puts the quantized linears of a solved block in the place of the original ones, as [`Self::solve_groups`] did.
    fn put_back(&self, backends: &[&dyn Backend], index: usize, blocks: &mut [Block]) -> Result<()> {
        let folder = &self.unfinished;
        let store = TensorStore::open(folder)?;
        let config = self.plan.config.get("quantization_config");
        let quantization = config.map(|q| QuantConfig::parse(&folder.join("config.json"), q)).transpose()?;
        for l in linears_of(self.plan, index) {
            let weight = linear::read(&store, quantization.as_ref(), &l.module, l.out_features, l.in_features)?;
            let rule = linear::read_input_rule(&store, quantization.as_ref(), &l.module)?;
            let bias = self.folding.floats().bias(&l.module, l.out_features)?;
            replace(backends, blocks, &l.module, &weight, bias.as_deref(), rule.as_ref())?;
        }
        Ok(())
    }

    /// The first `solved` blocks were taken over.
    fn data_free(&mut self, solved: usize, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let (plan, blocks) = (self.plan, self.ckpt.config.num_layers);
        progress.stage("quantize", blocks as u64);
        progress.advance(solved as u64);
        let of_block = |block: usize| format!("{}.{block}.", plan.blocks);
        self.ckpt.store.read_ahead(&of_block(solved));
        for block in solved..blocks {
            // The disk reads while this block is rounded.
            self.ckpt.store.read_ahead(&of_block(block + 1));
            let before = self.layers.len();
            self.folding.begin(block)?;
            for l in linears_of(plan, block) {
                self.check_stop()?;
                self.round(l)?;
            }
            self.keep_block(block, before, 1)?;
            // Of tensors that hold several linears.
            self.ckpt.store.release(&of_block(block));
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
            self.folding.table(l)?;
            self.round(l)?;
        }
        self.time("embedding and head", start, ());
        Ok(())
    }

    fn round(&mut self, l: &PlannedLinear) -> Result<()> {
        let start = Instant::now();
        // Without data the Hessian is the identity: act-order and damping have no meaning.
        let mut opts =
            SolverOptions { act_order: false, ..self.plan.options.solver(l.scheme, self.plan.layout.scales) };
        let mut method = self.plan.options.method;
        if l.block.is_none() {
            // Tables are rounded whatever the method.
            (opts.data_free, method) = (DataFree::Nearest, Method::Rtn);
        }
        let w = self.dense(l)?;
        let solve = |source| QuantizeError::Solve { module: l.module.clone(), source };
        let (out, n) = (l.out_features, l.in_features);
        let set_max = self.set_max(l, &w)?;
        let solved = round_any(&w, out, n, l.wanted(), set_max, &opts).map_err(solve)?;
        // Only scales of the input's own making: stored ones need the calibrated pass.
        let rule = l.scheme.input.map(|i| input_rule(i, 0.0, self.plan.layout.scales)).transpose().map_err(solve)?;
        let (error, norm) = squared_error(&w, n, |rows, back| solved.widen(rows, back));
        let record = LayerRecord {
            name: l.module.clone(),
            block: l.block,
            out_features: l.out_features,
            in_features: l.in_features,
            scheme: l.scheme_name(),
            method: method.name().into(),
            proxy_loss: error,
            relative_error: if norm > 0.0 { error / norm } else { 0.0 },
            seconds: start.elapsed().as_secs_f64(),
            ..LayerRecord::default()
        };
        self.ckpt.store.release(&format!("{}.", l.source));
        self.keep(l, solved, rule, record)
    }

    fn dense(&self, l: &PlannedLinear) -> Result<Vec<f32>> {
        read_dense(self.folding.floats(), &l.source, l.out_features, l.in_features)
    }

    /// The largest magnitude of all weights that share `l`'s global scale: engines hold linears that read the same input as one matrix.
    /// 0 where its format has no global scale.
    fn set_max(&self, l: &PlannedLinear, w: &[f32]) -> Result<f32> {
        if l.scheme.weight != WeightFormat::Nvfp4 {
            return Ok(0.0);
        }
        let part = |w: &[f32]| w.iter().fold(0f32, |m, v| m.max(v.abs()));
        let largest = |w: &[f32]| w.par_chunks(PART).map(part).reduce(|| 0.0, f32::max);
        let mut most = largest(w);
        if l.group.is_some() {
            let set = |o: &&PlannedLinear| o.block == l.block && o.group == l.group && o.module != l.module;
            for other in self.plan.linears.iter().filter(set) {
                most = most.max(largest(&self.dense(other)?));
            }
        }
        Ok(most)
    }

    /// Hands over the stored scales of a block's keys and values.
    fn keep_kv(&mut self, kv: KvScheme, block: usize, range: &KvRange) -> Result<()> {
        let layout = self.plan.layout;
        for (name, seen) in self.plan.kv_scales(block).into_iter().zip([&range.keys, &range.values]) {
            let scales = seen.iter().map(|m| scale_of(*m, kv.code.half_range(), layout.scales));
            let scales = scales.collect::<std::result::Result<Vec<_>, _>>();
            let scales = scales.map_err(|source| QuantizeError::Solve { module: name.clone(), source })?;
            let data = layout.scale_bytes(scales.into_iter());
            self.hand.give(Made::Tensor { name, data })?;
        }
        Ok(())
    }

    /// Hands a linear over to be written, and keeps its record.
    fn keep(&mut self, l: &PlannedLinear, solved: Solved, rule: Option<InputRule>, record: LayerRecord) -> Result<()> {
        if self.plan.options.strict
            && let Some(event) = record.events.first()
        {
            return Err(QuantizeError::Strict { module: l.module.clone(), event: event.clone() });
        }
        self.hand.give(Made::Linear(Box::new(MadeLinear { planned: l.clone(), solved, rule })))?;
        self.layers.push(record);
        Ok(())
    }
}

/// Puts a quantized linear in the place of the original one, on every device.
fn replace(
    backends: &[&dyn Backend],
    blocks: &mut [Block],
    module: &str,
    weight: &HostWeight,
    bias: Option<&[f32]>,
    rule: Option<&InputRule>,
) -> Result<()> {
    for (backend, block) in backends.iter().zip(blocks) {
        let quantized = Linear::from_host(*backend, module, weight, bias)?.with_input(rule.cloned());
        if let Some(slot) = block.linears.iter_mut().find(|slot| slot.module == module) {
            *slot = quantized;
        }
    }
    Ok(())
}

/// Elements of a part of a tensor that a thread looks at.
const PART: usize = 1 << 16;

/// Part `i` of a tensor whose elements are of `size` bytes.
fn part_of(t: &StoredTensor, i: usize, size: usize) -> Option<StoredTensor> {
    let bytes = t.data.size();
    let start = i.checked_mul(PART * size)?;
    let end = bytes.min(start.checked_add(PART * size)?);
    let data = t.data.part(start..end)?;
    Some(StoredTensor { dtype: t.dtype, shape: vec![data.size() / size], data })
}

/// [`StoredTensor::first_not_finite`] by all threads.
fn first_not_finite(t: &StoredTensor) -> Option<(usize, f32)> {
    let size = t.float_type()?.size();
    // What is made when it is read is made here, by one thread.
    let parts = t.data.as_slice().len().div_ceil(PART * size);
    let in_part = |i: usize| part_of(t, i, size)?.first_not_finite().map(|(at, x)| (i * PART + at, x));
    (0..parts).into_par_iter().find_map_first(in_part)
}

/// [`StoredTensor::to_f32`] by all threads: of a matrix that only lies on disk each reads some.
fn widened(t: &StoredTensor) -> Option<Vec<f32>> {
    let size = t.float_type()?.size();
    // As above.
    let mut values = vec![0f32; t.data.as_slice().len() / size];
    let parts = values.par_chunks_mut(PART).enumerate();
    parts.try_for_each(|(i, to)| {
        to.copy_from_slice(&part_of(t, i, size)?.to_f32()?);
        Some(())
    })?;
    Some(values)
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
        widened(t).ok_or_else(|| ckpt.store.mismatch(&name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)))?;
    let in_part = |(at, part): (usize, &[f32])| Some(at * PART + part.iter().position(|x| !x.is_finite())?);
    if let Some(i) = w.par_chunks(PART).enumerate().find_map_first(in_part) {
        return Err(ckpt.store.mismatch(&name, "finite weights".into(), format!("{} at element {i}", w[i])).into());
    }
    Ok(w)
}
