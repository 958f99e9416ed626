//! Carries a plan out: block by block, streaming into a checkpoint that appears only when it is whole.

mod groups;
mod learned;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowbit_calibration::experts::tokens_needed;
use lowbit_calibration::lanes::load_block;
use lowbit_calibration::{CalibrationError, KvRange, PassOptions, SequentialPass, Windows};
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat, QuantConfig};
use lowbit_checkpoint::store::TensorStore;
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_checkpoint::{Checkpoint, CheckpointError, converted, linear};
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{Backend, HostWeight};
use lowbit_kernels::{KernelError, QuantizedWeight, WeightFormat, ggml};
use lowbit_model::block::{Block, Linear, LinearGroup};
use lowbit_model::{Embedding, decoder};

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
    writer: CheckpointWriter,
    layers: Vec<LayerRecord>,
    experts: Vec<ExpertCoverage>,
    stage_seconds: BTreeMap<String, f64>,
    stop: &'a AtomicBool,
    chain: Chain,
}

/// Quantizes `ckpt` towards `target`. `windows` is needed by methods that calibrate. `backends` are at least one device; several, which
/// must be of one kind, share the windows and the linears, and what is written does not depend on how many there are.
///
/// The checkpoint is complete, and not in place yet: the caller adds its record with [`CheckpointWriter::write_file`] and calls
/// [`CheckpointWriter::finish`], so that a checkpoint is never seen without its record. Blocks solved by an earlier run that was
/// stopped are taken over as `resume` says, and the result is the same.
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
    let (layers, experts, stage_seconds) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut run = Run { ckpt, plan, folding, writer, layers, experts, stage_seconds, stop, chain };
    match run.all(backends, windows, progress) {
        Ok(calibration) => {
            let Run { layers, experts, stage_seconds, writer, folding, .. } = run;
            let transforms = folding.record();
            Ok((Outcome { layers, experts, calibration, transforms, stage_seconds }, writer))
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
        backends: &[&dyn Backend],
        windows: Option<&Windows>,
        progress: &dyn Progress,
    ) -> Result<Option<CalibrationRecord>> {
        let (ckpt, plan, run) = (self.ckpt, self.plan, self);
        run.copy(progress)?;
        let calibration = match windows {
            _ if !plan.options.needs_data() => {
                run.data_free(progress)?;
                None
            }
            Some(w) => {
                run.calibrated(backends, w, progress)?;
                Some(CalibrationRecord::of(w))
            }
            None => return Err(plan.options.no_data()),
        };
        run.tables(progress)?;
        if plan.gguf.is_none() {
            run.files()?;
        }
        run.check_stop()?;
        ckpt.store.unchanged()?;
        Ok(calibration)
    }

    /// What stands beside the weights; a GGUF file holds it all itself.
    fn files(&self) -> Result<()> {
        let (ckpt, plan) = (self.ckpt, self.plan);
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

    fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
    }

    fn time<T>(&mut self, stage: &str, start: Instant, value: T) -> T {
        *self.stage_seconds.entry(stage.into()).or_default() += start.elapsed().as_secs_f64();
        value
    }

    fn copy(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let tables: Vec<&String> = self.plan.rewritten_in(None).collect();
        progress.stage("copy", (self.plan.copies.len() + tables.len()) as u64);
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
            match &self.plan.gguf {
                Some(layout) => self.writer.write(name, &layout.bytes(name, t)?)?,
                None => self.writer.write(name, t.data.as_slice())?,
            }
            self.ckpt.store.release(name);
            progress.advance(1);
        }
        for name in tables {
            self.check_stop()?;
            self.writer.write(name, self.folding.tensor(name)?.data.as_slice())?;
            progress.advance(1);
        }
        self.time("copy", start, ());
        Ok(())
    }

    fn calibrated(&mut self, backends: &[&dyn Backend], windows: &Windows, progress: &dyn Progress) -> Result<()> {
        let layers = self.ckpt.config.num_layers;
        let folds = self.take_solved(progress)?;
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
        let stop = self.stop;
        let tick = |n: u64| {
            progress.advance(n);
            if stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
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
            self.keep_block(index, before)?;
            self.ckpt.store.release(&format!("{name}."));
        }
        if self.folding.works() {
            self.stage_seconds.insert("transforms".into(), folding);
        }
        self.stage_seconds.insert("solve".into(), solving);
        self.stage_seconds.insert("forward and statistics".into(), whole.elapsed().as_secs_f64() - solving - folding);
        Ok(())
    }

    /// Takes over the blocks that an earlier run solved; returns how each was transformed.
    fn take_solved(&mut self, progress: &dyn Progress) -> Result<Vec<BlockFold>> {
        let blocks = self.ckpt.config.num_layers;
        let Taken { folds, layers, experts } = self.chain.take(&mut self.writer, self.plan, blocks, progress)?;
        self.layers.extend(layers);
        self.experts.extend(experts);
        folds.iter().for_each(|f| self.folding.taken(f));
        if !folds.is_empty() {
            progress.say(&format!("{} of {blocks} blocks were solved before", folds.len()));
        }
        Ok(folds)
    }

    /// Writes what transforms changed in a block beside its linears, and keeps the block; its records are those from `before` on.
    fn keep_block(&mut self, block: usize, before: usize) -> Result<()> {
        let plan = self.plan;
        for name in plan.rewritten_in(Some(block)) {
            self.writer.write(name, self.folding.floats().store.get(name)?.data.as_slice())?;
        }
        let fold = self.folding.works().then(|| self.folding.fold());
        let experts = self.experts.last().filter(|e| e.block == block);
        self.chain.keep(&mut self.writer, plan, block, self.layers.get(before..).unwrap_or_default(), fold, experts)
    }

    /// Puts the quantized linears of a solved block in the place of the original ones, as [`Self::solve_groups`] did.
    fn put_back(&self, backends: &[&dyn Backend], index: usize, blocks: &mut [Block]) -> Result<()> {
        let folder = self.writer.unfinished().0;
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

    fn data_free(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let (plan, blocks) = (self.plan, self.ckpt.config.num_layers);
        let solved = self.take_solved(progress)?.len();
        progress.stage("quantize", blocks as u64);
        progress.advance(solved as u64);
        for block in solved..blocks {
            let before = self.layers.len();
            self.folding.begin(block)?;
            for l in linears_of(plan, block) {
                self.check_stop()?;
                self.round(l)?;
            }
            self.keep_block(block, before)?;
            // Of tensors that hold several linears.
            self.ckpt.store.release(&format!("{}.{block}.", plan.blocks));
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
        self.keep(l, &solved, rule.as_ref(), record)
    }

    fn dense(&self, l: &PlannedLinear) -> Result<Vec<f32>> {
        read_dense(self.folding.floats(), &l.source, l.out_features, l.in_features)
    }

    /// The largest magnitude of all weights that share `l`'s global scale, where its format has one: engines hold linears that read the
    /// same input as one matrix.
    fn set_max(&self, l: &PlannedLinear, w: &[f32]) -> Result<f32> {
        let largest = |w: &[f32]| w.iter().fold(0f32, |m, v| m.max(v.abs()));
        let mut most = largest(w);
        if l.scheme.weight == WeightFormat::Nvfp4 && l.group.is_some() {
            let set = |o: &&PlannedLinear| o.block == l.block && o.group == l.group && o.module != l.module;
            for other in self.plan.linears.iter().filter(set) {
                most = most.max(largest(&self.dense(other)?));
            }
        }
        Ok(most)
    }

    /// Writes the stored scales of a block's keys and values.
    fn keep_kv(&mut self, kv: KvScheme, block: usize, range: &KvRange) -> Result<()> {
        let layout = self.plan.layout;
        for (name, seen) in self.plan.kv_scales(block).into_iter().zip([&range.keys, &range.values]) {
            let scales = seen.iter().map(|m| scale_of(*m, kv.code.half_range(), layout.scales));
            let scales = scales.collect::<std::result::Result<Vec<_>, _>>();
            let scales = scales.map_err(|source| QuantizeError::Solve { module: name.clone(), source })?;
            self.writer.write(&name, &layout.scale_bytes(scales.into_iter()))?;
        }
        Ok(())
    }

    fn keep(
        &mut self,
        l: &PlannedLinear,
        solved: &Solved,
        rule: Option<&InputRule>,
        record: LayerRecord,
    ) -> Result<()> {
        if self.plan.options.strict
            && let Some(event) = record.events.first()
        {
            return Err(QuantizeError::Strict { module: l.module.clone(), event: event.clone() });
        }
        for (name, bytes) in tensors(self.plan, l, solved, rule)? {
            self.writer.write(&name, &bytes)?;
        }
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

/// A solved matrix as the output holds it: names and bytes.
fn tensors(
    plan: &Plan,
    l: &PlannedLinear,
    solved: &Solved,
    rule: Option<&InputRule>,
) -> Result<Vec<(String, Vec<u8>)>> {
    let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
    let name = format!("{}.weight", l.module);
    match (&plan.gguf, l.ggml, solved) {
        (Some(layout), _, Solved::Blocks(b)) => Ok(vec![(name.clone(), layout.arrange(&name, b.bytes())?)]),
        (Some(layout), Some(kind), Solved::Codes(QuantizedWeight::Int(m))) => {
            let bytes = ggml::encode_codes(kind, m).map_err(kernel)?;
            Ok(vec![(name.clone(), layout.arrange(&name, bytes)?)])
        }
        (None, None, Solved::Codes(q)) => {
            let (layout, out, n) = (plan.layout, l.out_features, l.in_features);
            let declared = linear::declare(&l.module, l.scheme, layout, out, n).map_err(kernel)?;
            let bytes = linear::encode_weight(q, l.scheme, rule, layout).map_err(kernel)?;
            Ok(declared.into_iter().map(|d| d.name).zip(bytes).collect())
        }
        _ => {
            let format = plan.options.format_name();
            let why = format!("{} in {format}", l.scheme_name());
            Err(kernel(KernelError::Unsupported { backend: "quantize", op: "writing", why }))
        }
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
