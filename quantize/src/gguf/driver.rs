//! Carries out the plan of a GGUF file: block by block, as [`crate::driver`] does for safetensors.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowbit_calibration::{InputStats, PassOptions, SequentialPass, Windows};
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::{Backend, Bytes, FloatType, HostWeight};
use lowbit_kernels::{GroupSize, ScaleType, Scheme, ggml};
use lowbit_model::Embedding;
use lowbit_model::block::{Block, Linear, LinearGroup};

use super::{GgufLinear, GgufPlan, scheme_name};
use crate::blocks::{blocks_gptq, blocks_rtn};
use crate::driver::{Outcome, Progress, read_dense};
use crate::error::{QuantizeError, Result};
use crate::factor::SolveError;
use crate::loss::{Loss, proxy_loss};
use crate::plan::{Method, Plan};
use crate::record::{CalibrationRecord, LayerRecord};
use crate::rtn::quantize_rtn;
use crate::scale_search::SolverOptions;
use crate::solve::{Shared, solve_linear};

struct Run<'a> {
    ckpt: &'a Checkpoint,
    plan: &'a Plan,
    gguf: &'a GgufPlan,
    writer: CheckpointWriter,
    layers: Vec<LayerRecord>,
    stage_seconds: BTreeMap<String, f64>,
    stop: &'a AtomicBool,
}

/// A solved matrix: the tensor's bytes in the checkpoint's row order, and its weight for the blocks to come.
struct Solved {
    bytes: Vec<u8>,
    weight: HostWeight,
    loss: Loss,
}

/// As [`crate::driver::quantize`], into `target/model.gguf`.
pub(crate) fn quantize(
    ckpt: &Checkpoint,
    backend: &dyn Backend,
    (plan, gguf): (&Plan, &GgufPlan),
    windows: Option<&Windows>,
    target: &Path,
    force: bool,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<(Outcome, CheckpointWriter)> {
    let writer = CheckpointWriter::create_gguf(target, &gguf.layout, force)?;
    let mut run = Run { ckpt, plan, gguf, writer, layers: Vec::new(), stage_seconds: BTreeMap::new(), stop };
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
    run.check_stop()?;
    ckpt.store.unchanged()?;
    Ok((Outcome { layers: run.layers, experts: Vec::new(), calibration, stage_seconds: run.stage_seconds }, run.writer))
}

impl Run<'_> {
    fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
    }

    fn copy(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        progress.stage("copy", self.gguf.copies.len() as u64);
        for name in &self.gguf.copies {
            self.check_stop()?;
            let t = self.ckpt.store.get(name)?;
            if let Some(v) = t.to_f32()
                && let Some(i) = v.iter().position(|x| !x.is_finite())
            {
                let found = format!("{} at element {i}", v[i]);
                return Err(self.ckpt.store.mismatch(name, "finite values".into(), found).into());
            }
            self.writer.write(name, &self.gguf.layout.bytes(name, t)?)?;
            progress.advance(1);
        }
        self.stage_seconds.insert("copy".into(), start.elapsed().as_secs_f64());
        Ok(())
    }

    fn calibrated(&mut self, backend: &dyn Backend, windows: &Windows, progress: &dyn Progress) -> Result<()> {
        let embedding = Embedding::load(self.ckpt, backend)?;
        let recipe = self.plan.options.method.recipe();
        let options = PassOptions {
            float_stream: recipe.float_stream(),
            token_weights: recipe.token_weights,
            ..PassOptions::default()
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
            let name = format!("model.layers.{index}");
            let mut block = Block::load(self.ckpt, backend, &name, index)?;
            let original = options.float_stream.then(|| Block::load(self.ckpt, backend, &name, index)).transpose()?;
            let stop = self.stop;
            pass.run_block(
                &mut block,
                original.as_ref(),
                &mut |group, stats, block| {
                    let start = Instant::now();
                    let done = self.solve_group(backend, group, &stats, block);
                    solving += start.elapsed().as_secs_f64();
                    done
                },
                &mut || {
                    progress.advance(1);
                    if stop.load(Ordering::Relaxed) { Err(QuantizeError::Interrupted) } else { Ok(()) }
                },
            )?;
        }
        self.stage_seconds.insert("solve".into(), solving);
        self.stage_seconds.insert("forward and statistics".into(), whole.elapsed().as_secs_f64() - solving);
        Ok(())
    }

    fn solve_group(
        &mut self,
        backend: &dyn Backend,
        group: LinearGroup,
        stats: &InputStats,
        block: &mut Block,
    ) -> Result<()> {
        let gguf = self.gguf;
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
            let Some(planned) = gguf.linears.iter().find(|l| l.module == module) else { continue };
            self.check_stop()?;
            let start = Instant::now();
            let opts = self.solver(planned);
            let solve = |source: SolveError| QuantizeError::Solve { module: module.clone(), source };
            if shared.is_none() {
                shared = Some(Shared::new(stats, &opts).map_err(solve)?);
            }
            let Some(shared) = &shared else { continue };
            let w = self.dense(planned)?;
            let solved = solve_kind(planned, &w, shared, &opts).map_err(solve)?;
            let f = &shared.factor;
            let record = LayerRecord {
                method: self.plan.options.method.name().into(),
                seconds: start.elapsed().as_secs_f64(),
                tokens: stats.tokens,
                input_abs_max: stats.abs_max,
                dead_columns: f.dead.len(),
                damp_frac: f.damp_frac,
                events: f.events.clone(),
                ..layer_record(planned, &solved.loss)
            };
            self.keep(planned, solved.bytes, record)?;
            let bias = self.ckpt.bias(&module, planned.out_features)?;
            let replaced = Linear::from_host(backend, &module, &solved.weight, bias.as_deref())?;
            if let Some(slot) = block.linears.get_mut(i) {
                *slot = replaced;
            }
        }
        Ok(())
    }

    fn rtn(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let gguf = self.gguf;
        progress.stage("quantize", gguf.linears.len() as u64);
        for l in gguf.linears.iter().filter(|l| l.block.is_some()) {
            self.check_stop()?;
            self.round(l)?;
            progress.advance(1);
        }
        self.stage_seconds.insert("solve".into(), start.elapsed().as_secs_f64());
        Ok(())
    }

    fn tables(&mut self, progress: &dyn Progress) -> Result<()> {
        let start = Instant::now();
        let gguf = self.gguf;
        for l in gguf.linears.iter().filter(|l| l.block.is_none()) {
            self.check_stop()?;
            progress.detail(&l.module);
            self.round(l)?;
        }
        self.stage_seconds.insert("embedding and head".into(), start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Rounds one matrix without data.
    fn round(&mut self, l: &GgufLinear) -> Result<()> {
        let start = Instant::now();
        let opts = SolverOptions { act_order: false, ..self.solver(l) };
        let w = self.dense(l)?;
        let solve = |source| QuantizeError::Solve { module: l.module.clone(), source };
        let (bytes, back) = match l.kind.scheme() {
            Some(_) => {
                let q = quantize_rtn(&w, l.out_features, l.in_features, None, &opts).map_err(solve)?;
                let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
                (ggml::encode_codes(l.kind, &q).map_err(kernel)?, q.dequantize().map_err(kernel)?)
            }
            None => {
                let m = blocks_rtn(l.kind, &w, l.in_features).map_err(solve)?;
                (m.bytes(), m.values())
            }
        };
        let (mut error, mut norm) = (0f64, 0f64);
        for (a, b) in w.iter().zip(&back) {
            error += f64::from(a - b).powi(2);
            norm += f64::from(*a).powi(2);
        }
        let record = LayerRecord {
            method: "rtn".into(),
            seconds: start.elapsed().as_secs_f64(),
            ..layer_record(l, &Loss { proxy: error, reference: norm })
        };
        self.keep(l, bytes, record)
    }

    fn solver(&self, l: &GgufLinear) -> SolverOptions {
        // Super-blocks have no scheme; theirs is not read.
        let scheme = l.kind.scheme().unwrap_or(Scheme { bits: 8, symmetric: true, group: GroupSize::Cols(32) });
        self.plan.options.solver(scheme, ScaleType::F16)
    }

    fn dense(&self, l: &GgufLinear) -> Result<Vec<f32>> {
        read_dense(self.ckpt, &l.source, l.out_features, l.in_features)
    }

    fn keep(&mut self, l: &GgufLinear, bytes: Vec<u8>, record: LayerRecord) -> Result<()> {
        if self.plan.options.strict
            && let Some(event) = record.events.first()
        {
            return Err(QuantizeError::Strict { module: l.module.clone(), event: event.clone() });
        }
        let name = format!("{}.weight", l.module);
        self.writer.write(&name, &self.gguf.layout.arrange(&name, bytes)?)?;
        self.layers.push(record);
        Ok(())
    }
}

fn layer_record(l: &GgufLinear, loss: &Loss) -> LayerRecord {
    LayerRecord {
        name: l.module.clone(),
        block: l.block,
        out_features: l.out_features,
        in_features: l.in_features,
        scheme: scheme_name(l.kind),
        proxy_loss: loss.proxy,
        relative_error: loss.relative(),
        ..LayerRecord::default()
    }
}

fn solve_kind(
    l: &GgufLinear,
    w: &[f32],
    shared: &Shared,
    opts: &SolverOptions,
) -> std::result::Result<Solved, SolveError> {
    let (out, n) = (l.out_features, l.in_features);
    if l.kind.scheme().is_some() {
        let (q, loss) = solve_linear(w, out, n, shared, opts)?;
        let weight = HostWeight::Packed(linear::pack_matrix(&q)?);
        return Ok(Solved { bytes: ggml::encode_codes(l.kind, &q)?, weight, loss });
    }
    let m = blocks_gptq(l.kind, w, n, &shared.factor, opts)?;
    let values = m.values();
    let loss = proxy_loss(w, &values, &shared.stats.hessian, out, n);
    if !(loss.proxy.is_finite() && loss.reference.is_finite()) {
        return Err(SolveError::NonFinite { what: "proxy loss", index: 0 });
    }
    let data = Bytes::from_vec(values.iter().flat_map(|v| v.to_le_bytes()).collect());
    let weight = HostWeight::Dense { dtype: FloatType::F32, out_features: out, in_features: n, data };
    Ok(Solved { bytes: m.bytes(), weight, loss })
}
