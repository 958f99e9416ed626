//! Carries a plan out: block by block, streaming into a checkpoint that appears only when it is whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowbit_calibration::{InputStats, KvRange, PassOptions, SequentialPass, Windows};
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat};
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::Backend;
use lowbit_kernels::{QuantizedWeight, WeightFormat};
use lowbit_model::block::{Block, Linear, LinearGroup};
use lowbit_model::{Embedding, decoder};

use crate::error::{QuantizeError, Result};
use crate::factor::SolveError;
use crate::inputs::{input_rule, scale_of, stored_scale};
use crate::loss::proxy_loss;
use crate::plan::{Method, Plan, PlannedLinear, fused};
use crate::record::{CalibrationRecord, LayerRecord};
use crate::scale_search::SolverOptions;
use crate::solve::{Shared, round_any, solve_any};

/// Progress of long work; the command line draws it.
pub trait Progress: Sync {
    /// A stage of `total` steps begins.
    fn stage(&self, name: &str, total: u64);
    /// `n` steps are done.
    fn advance(&self, n: u64);
    /// What is being worked on.
    fn detail(&self, text: &str);
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
    /// One per linear, in graph order.
    pub layers: Vec<LayerRecord>,
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
    stage_seconds: BTreeMap<String, f64>,
    stop: &'a AtomicBool,
}

/// Quantizes `ckpt` towards `target`. `windows` is needed by methods that calibrate.
///
/// The checkpoint is complete, and not in place yet: the caller adds its record with [`CheckpointWriter::write_file`] and calls
/// [`CheckpointWriter::finish`], so that a checkpoint is never seen without its record.
pub fn quantize(
    ckpt: &Checkpoint,
    backend: &dyn Backend,
    plan: &Plan,
    windows: Option<&Windows>,
    target: &Path,
    force: bool,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<(Outcome, CheckpointWriter)> {
    let writer = CheckpointWriter::create(target, plan.declared.clone(), plan.options.shard_bytes, force)?;
    let mut run = Run { ckpt, plan, writer, layers: Vec::new(), stage_seconds: BTreeMap::new(), stop };
    run.copy(progress)?;
    let calibration = match (plan.options.method, windows) {
        (Method::Rtn, _) if !plan.options.needs_data() => {
            run.rtn(progress)?;
            None
        }
        (_, Some(w)) => {
            run.calibrated(backend, w, progress)?;
            Some(CalibrationRecord {
                source: w.source.clone(),
                windows_sha256: w.sha256.clone(),
                windows: w.tokens.len(),
                window_tokens: w.tokens.iter().map(Vec::len).max().unwrap_or(0),
                tokens: w.token_count() as u64,
                seed: w.seed,
            })
        }
        (method, None) => {
            return Err(QuantizeError::Plan {
                summary: match method.calibrated() {
                    true => format!("method {} needs calibration data", method.name()),
                    false => "stored scales of inputs, keys or values need calibration data".into(),
                },
                offenders: vec![],
                hint: Some("give --calib FILE, or choose --method rtn and a scheme without stored scales".into()),
            });
        }
    };
    run.tables(progress)?;
    // A record of the original's own making is not this checkpoint's.
    run.writer.carry_over(&ckpt.dir, &["config.json", "recipe.yaml", "quantize_config.json", "quantize.json"])?;
    let text = format!("{:#}\n", plan.config);
    run.writer.write_file("config.json", text.as_bytes())?;
    if plan.options.format != PackFormat::CompressedTensors
        && let Some(q) = plan.config.get("quantization_config")
    {
        run.writer.write_file("quantize_config.json", format!("{q:#}\n").as_bytes())?;
    }
    run.check_stop()?;
    ckpt.store.unchanged()?;
    Ok((Outcome { layers: run.layers, calibration, stage_seconds: run.stage_seconds }, run.writer))
}

impl Run<'_> {
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
            if let Some(v) = t.to_f32()
                && let Some(i) = v.iter().position(|x| !x.is_finite())
            {
                return Err(self
                    .ckpt
                    .store
                    .mismatch(name, "finite values".into(), format!("{} at element {i}", v[i]))
                    .into());
            }
            self.writer.write(name, t.data.as_slice())?;
            progress.advance(1);
        }
        self.time("copy", start, ());
        Ok(())
    }

    fn calibrated(&mut self, backend: &dyn Backend, windows: &Windows, progress: &dyn Progress) -> Result<()> {
        let prefix = decoder::prefix(self.ckpt)?;
        let embedding = Embedding::load(self.ckpt, backend)?;
        let recipe = self.plan.options.method.recipe();
        let kv = self.plan.options.kv;
        let options = PassOptions {
            float_stream: recipe.float_stream(),
            token_weights: recipe.token_weights,
            kv_ranges: kv.map(|kv| kv.per_head),
        };
        let offload = self.plan.options.offload.as_deref();
        let mut pass = SequentialPass::start(backend, &embedding, &windows.tokens, options, offload)?;
        drop(embedding);
        let layers = self.ckpt.config.num_layers;
        progress.stage("quantize", layers as u64 * pass.ticks_per_block());
        let whole = Instant::now();
        let mut solving = 0f64;
        for index in 0..layers {
            progress.detail(&format!("block {}/{layers}", index + 1));
            let name = format!("{prefix}.layers.{index}");
            let mut block = Block::load(self.ckpt, backend, &name, index)?;
            let original = options.float_stream.then(|| Block::load(self.ckpt, backend, &name, index)).transpose()?;
            let stop = self.stop;
            pass.run_block(
                &mut block,
                original.as_ref(),
                &mut |group, stats, block| {
                    let start = Instant::now();
                    let done = self.solve_group(backend, index, group, &stats, block);
                    solving += start.elapsed().as_secs_f64();
                    done
                },
                &mut || {
                    progress.advance(1);
                    if stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
                },
            )?;
            if let Some(kv) = kv {
                self.keep_kv(kv, &format!("{name}.self_attn"), pass.kv_range())?;
            }
        }
        self.stage_seconds.insert("solve".into(), solving);
        self.stage_seconds.insert("forward and statistics".into(), whole.elapsed().as_secs_f64() - solving);
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
            if shared.is_none() && plan.options.method.calibrated() {
                shared = Some(Shared::new(stats, &opts).map_err(solve)?);
            }
            let w = self.dense(planned)?;
            let set_max = self.set_max(planned, &w)?;
            let (out, n) = (planned.out_features, planned.in_features);
            let (q, loss) = match &shared {
                Some(s) => solve_any(&w, out, n, planned.scheme.weight, set_max, s, &opts).map_err(solve)?,
                None => {
                    let q = round_any(&w, out, n, planned.scheme.weight, set_max, &opts).map_err(solve)?;
                    let back =
                        q.dequantize().map_err(|source| QuantizeError::Kernel { module: module.clone(), source })?;
                    (q, proxy_loss(&w, &back, &stats.hessian, out, n))
                }
            };
            let f = shared.as_ref().map(|s| &s.factor);
            let rule = planned.scheme.input.map(|i| input_rule(i, stats.abs_max, plan.layout.scales)).transpose();
            let rule = rule.map_err(solve)?;
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
                input_scale: stored_scale(rule.as_ref()),
                dead_columns: f.map_or(0, |f| f.dead.len()),
                damp_frac: f.map_or(0.0, |f| f.damp_frac),
                events: f.map_or_else(Vec::new, |f| f.events.clone()),
            };
            self.keep(planned, &q, rule.as_ref(), record)?;
            let bias = self.ckpt.bias(&module, planned.out_features)?;
            let host =
                linear::host_weight(&q).map_err(|source| QuantizeError::Kernel { module: module.clone(), source })?;
            let replaced = Linear::from_host(backend, &module, &host, bias.as_deref())?.with_input(rule);
            if let Some(slot) = block.linears.get_mut(i) {
                *slot = replaced;
            }
        }
        Ok(())
    }

    fn rtn(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let linears: Vec<PlannedLinear> = self.plan.linears.iter().filter(|l| l.block.is_some()).cloned().collect();
        progress.stage("quantize", linears.len() as u64);
        for l in &linears {
            self.check_stop()?;
            self.round(l)?;
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
        let w = self.dense(l)?;
        let solve = |source| QuantizeError::Solve { module: l.module.clone(), source };
        let set_max = self.set_max(l, &w)?;
        let q = round_any(&w, l.out_features, l.in_features, l.scheme.weight, set_max, &opts).map_err(solve)?;
        // Only scales of the input's own making: stored ones need the calibrated pass.
        let rule = l.scheme.input.map(|i| input_rule(i, 0.0, self.plan.layout.scales)).transpose().map_err(solve)?;
        let back = q.dequantize().map_err(|source| QuantizeError::Kernel { module: l.module.clone(), source })?;
        let (mut error, mut norm) = (0f64, 0f64);
        for (a, b) in w.iter().zip(&back) {
            error += f64::from(a - b).powi(2);
            norm += f64::from(*a).powi(2);
        }
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
        self.keep(l, &q, rule.as_ref(), record)
    }

    /// The largest magnitude of all weights that share `l`'s global scale, where its format has one.
    fn set_max(&self, l: &PlannedLinear, w: &[f32]) -> Result<f32> {
        let largest = |w: &[f32]| w.iter().fold(0f32, |m, v| m.max(v.abs()));
        let mut most = largest(w);
        if l.scheme.weight == WeightFormat::Nvfp4 {
            let set = |o: &&PlannedLinear| o.block == l.block && o.module != l.module && fused(&o.module, &l.module);
            for other in self.plan.linears.iter().filter(set) {
                most = most.max(largest(&self.dense(other)?));
            }
        }
        Ok(most)
    }

    /// Writes the stored scales of a layer's keys and values.
    fn keep_kv(&mut self, kv: KvScheme, attention: &str, range: &KvRange) -> Result<()> {
        let layout = self.plan.layout;
        for (which, seen) in [("k", &range.keys), ("v", &range.values)] {
            let module = format!("{attention}.{which}_scale");
            let scales = seen.iter().map(|m| scale_of(*m, kv.code.half_range(), layout.scales));
            let scales = scales.collect::<std::result::Result<Vec<_>, _>>();
            let scales = scales.map_err(|source| QuantizeError::Solve { module: module.clone(), source })?;
            self.writer.write(&module, &layout.scale_bytes(scales.into_iter()))?;
        }
        Ok(())
    }

    fn dense(&self, l: &PlannedLinear) -> Result<Vec<f32>> {
        let name = format!("{}.weight", l.source);
        let t = self.ckpt.store.get(&name)?;
        if t.shape != [l.out_features, l.in_features] {
            let expected = format!("shape [{}, {}]", l.out_features, l.in_features);
            return Err(self.ckpt.store.mismatch(&name, expected, format!("{:?}", t.shape)).into());
        }
        let w = t
            .to_f32()
            .ok_or_else(|| self.ckpt.store.mismatch(&name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)))?;
        if let Some(i) = w.iter().position(|x| !x.is_finite()) {
            return Err(self
                .ckpt
                .store
                .mismatch(&name, "finite weights".into(), format!("{} at element {i}", w[i]))
                .into());
        }
        Ok(w)
    }

    fn keep(
        &mut self,
        l: &PlannedLinear,
        q: &QuantizedWeight,
        rule: Option<&InputRule>,
        record: LayerRecord,
    ) -> Result<()> {
        if self.plan.options.strict
            && let Some(event) = record.events.first()
        {
            return Err(QuantizeError::Strict { module: l.module.clone(), event: event.clone() });
        }
        let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
        let layout = self.plan.layout;
        let names = linear::declare(&l.module, l.scheme, layout, l.out_features, l.in_features).map_err(kernel)?;
        for (d, bytes) in names.iter().zip(linear::encode_weight(q, l.scheme, rule, layout).map_err(kernel)?) {
            self.writer.write(&d.name, &bytes)?;
        }
        self.layers.push(record);
        Ok(())
    }
}
