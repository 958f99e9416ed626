//! The driver's side of solving: the linears of some groups side by side, one a device at a time.
//!
//! A linear is solved whole by one device, from statistics that were summed in one order ([`lowbit_calibration::lanes`]) and a factor that
//! was made once: what comes out is what any device of the kind makes of it, so it does not depend on how many there are. What is
//! written and recorded keeps the order of the linears.

use std::time::Instant;

use lowbit_calibration::InputStats;
use lowbit_calibration::lanes::side_by_side;
use lowbit_kernels::InputFormat;
use lowbit_kernels::backend::Backend;
use lowbit_model::block::{Block, LinearGroup};

use super::{Run, replace};
use crate::error::{QuantizeError, Result};
use crate::experts::starved;
use crate::factor::SolveError;
use crate::inputs::{input_rule, stored_scale};
use crate::loss::{Loss, proxy_loss};
use crate::plan::{Plan, PlannedLinear};
use crate::record::LayerRecord;
use crate::scale_search::SolverOptions;
use crate::solve::{Shared, Solved, round_any, solve_any};

/// A linear to solve.
struct Task<'p> {
    /// Its group among those that are solved together.
    group: usize,
    planned: &'p PlannedLinear,
    opts: SolverOptions,
    /// Whether it is the group's first, whose time holds the factor's.
    first: bool,
}

impl Task<'_> {
    fn failed(&self, source: SolveError) -> QuantizeError {
        QuantizeError::Solve { module: self.planned.module.clone(), source }
    }

    /// Solves it; `w` is its weight.
    fn solve(&self, w: &[f32], set_max: f32, stats: &InputStats, shared: Option<&Shared>) -> Result<(Solved, Loss)> {
        let (out, n, wanted) = (self.planned.out_features, self.planned.in_features, self.planned.wanted());
        if let Some(s) = shared {
            return solve_any(w, out, n, wanted, set_max, s, &self.opts).map_err(|e| self.failed(e));
        }
        let rounded = round_any(w, out, n, wanted, set_max, &self.opts).map_err(|e| self.failed(e))?;
        let kernel = |source| QuantizeError::Kernel { module: self.planned.module.clone(), source };
        let loss = proxy_loss(w, &rounded.dequantize().map_err(kernel)?, &stats.hessian, out, n);
        Ok((rounded, loss))
    }
}

/// The planned linears of a block that read what `groups` are of, in their order.
fn tasks<'p>(plan: &'p Plan, groups: &[(LinearGroup, InputStats)], block: &Block) -> Vec<Task<'p>> {
    let mut tasks = Vec::new();
    for (at, (group, _)) in groups.iter().enumerate() {
        let mut first = true;
        for (linear, _) in block.linears.iter().zip(block.shapes()).filter(|(_, shape)| shape.group == *group) {
            let Some(planned) = plan.linears.iter().find(|l| l.module == linear.module) else { continue };
            let opts = plan.options.solver(planned.scheme, plan.layout.scales);
            tasks.push(Task { group: at, planned, opts, first: std::mem::take(&mut first) });
        }
    }
    tasks
}

/// What a group's linears share, by device, and the seconds that its factor took.
struct OfGroup<'a> {
    by_device: Vec<Option<Shared<'a>>>,
    seconds: f64,
}

/// The factors of groups, each made on a device of its own.
fn factors<'a>(
    backends: &[&'a dyn Backend],
    groups: &'a [(LinearGroup, InputStats)],
    tasks: &[Task],
) -> Result<Vec<OfGroup<'a>>> {
    let jobs = groups.iter().enumerate().zip(backends).map(|((at, (_, stats)), backend)| {
        let first = tasks.iter().find(|t| t.group == at);
        move || -> Result<OfGroup<'a>> {
            let start = Instant::now();
            let made = first.map(|t| Shared::on(*backend, stats, &t.opts).map_err(|e| t.failed(e))).transpose()?;
            let mut by_device: Vec<Option<Shared<'a>>> = backends.iter().map(|_| None).collect();
            if let Some(slot) = by_device.get_mut(at) {
                *slot = made;
            }
            Ok(OfGroup { by_device, seconds: start.elapsed().as_secs_f64() })
        }
    });
    side_by_side(jobs.collect()).into_iter().collect()
}

impl<'a> OfGroup<'a> {
    /// Makes sure that device `d` has what the group's linears share.
    fn bring_to(&mut self, d: usize, backend: &'a dyn Backend) -> std::result::Result<(), SolveError> {
        if self.by_device.get(d).is_none_or(Option::is_some) {
            return Ok(());
        }
        let there = self.by_device.iter().flatten().next().map(|s| s.beside(backend)).transpose()?;
        if let Some(slot) = self.by_device.get_mut(d) {
            *slot = there;
        }
        Ok(())
    }

    fn on(&self, d: usize) -> Option<&Shared<'a>> {
        self.by_device.get(d).and_then(Option::as_ref)
    }
}

impl Run<'_> {
    /// Solves the linears of `groups` of block `index`, hands them over to be written, and puts them in the place of the original ones
    /// on every device.
    pub(super) fn solve_groups(
        &mut self,
        backends: &[&dyn Backend],
        index: usize,
        groups: &[(LinearGroup, InputStats)],
        blocks: &mut [Block],
    ) -> Result<()> {
        // Each group's factor has a device of its own.
        groups.chunks(backends.len().max(1)).try_for_each(|some| self.solve_together(backends, index, some, blocks))
    }

    fn solve_together(
        &mut self,
        backends: &[&dyn Backend],
        index: usize,
        groups: &[(LinearGroup, InputStats)],
        blocks: &mut [Block],
    ) -> Result<()> {
        let plan = self.plan;
        let tasks = blocks.first().map_or_else(Vec::new, |block| tasks(plan, groups, block));
        self.check_stop()?;
        let by_hessian = plan.options.method.calibrated() && !tasks.is_empty();
        let mut shared = if by_hessian { factors(backends, groups, &tasks)? } else { Vec::new() };
        for round in tasks.chunks(backends.len().max(1)) {
            self.check_stop()?;
            let mut weights = Vec::with_capacity(round.len());
            for ((d, task), backend) in round.iter().enumerate().zip(backends) {
                if let Some(group) = shared.get_mut(task.group) {
                    group.bring_to(d, *backend).map_err(|e| task.failed(e))?;
                }
                let w = self.dense(task.planned)?;
                let set_max = self.set_max(task.planned, &w)?;
                weights.push((w, set_max));
            }
            let jobs = round.iter().zip(groups_of(round, groups)).zip(weights).enumerate();
            let jobs = jobs.map(|(d, ((task, stats), (w, set_max)))| {
                let on = shared.get(task.group).and_then(|group| group.on(d));
                move || -> Result<(Solved, Loss, f64)> {
                    let start = Instant::now();
                    let (solved, loss) = task.solve(&w, set_max, stats, on)?;
                    Ok((solved, loss, start.elapsed().as_secs_f64()))
                }
            });
            let solved = side_by_side(jobs.collect());
            for (d, ((task, stats), made)) in round.iter().zip(groups_of(round, groups)).zip(solved).enumerate() {
                let (solved, loss, seconds) = made?;
                let group = shared.get(task.group);
                let factor = if task.first { group.map_or(0.0, |g| g.seconds) } else { 0.0 };
                let on = group.and_then(|g| g.on(d));
                self.keep_solved(backends, index, task, stats, on, solved, loss, seconds + factor, blocks)?;
            }
        }
        Ok(())
    }

    fn keep_solved(
        &mut self,
        backends: &[&dyn Backend],
        index: usize,
        task: &Task<'_>,
        stats: &InputStats,
        shared: Option<&Shared>,
        solved: Solved,
        loss: Loss,
        seconds: f64,
        blocks: &mut [Block],
    ) -> Result<()> {
        let (plan, planned) = (self.plan, task.planned);
        let f = shared.map(|s| &*s.factor);
        let rule = planned.scheme.input.map(|i| input_rule(i, stats.abs_max, plan.layout.scales)).transpose();
        let rule = rule.map_err(|e| task.failed(e))?;
        // Without a Hessian or a stored scale, nothing of a starved expert comes from the data.
        let informed = f.is_some() || planned.scheme.input.is_some_and(InputFormat::is_static);
        let events = starved(stats).filter(|_| informed).into_iter();
        let record = LayerRecord {
            name: planned.module.clone(),
            block: Some(index),
            out_features: planned.out_features,
            in_features: planned.in_features,
            scheme: planned.scheme_name(),
            method: plan.options.method.name().into(),
            proxy_loss: loss.proxy,
            relative_error: loss.relative(),
            seconds,
            tokens: stats.tokens,
            input_abs_max: stats.abs_max,
            input_scale: stored_scale(rule.as_ref()),
            dead_columns: f.map_or(0, |f| f.dead.len()),
            damp_frac: f.map_or(0.0, |f| f.damp_frac),
            events: events.chain(f.into_iter().flat_map(|f| f.events.clone())).collect(),
        };
        let bias = self.folding.floats().bias(&planned.module, planned.out_features)?;
        let kernel = |source| QuantizeError::Kernel { module: planned.module.clone(), source };
        let host = solved.host_weight().map_err(kernel)?;
        self.keep(planned, solved, rule.clone(), record)?;
        replace(backends, blocks, &planned.module, &host, bias.as_deref(), rule.as_ref())
    }
}

/// The statistics of each task's input.
fn groups_of<'g>(
    tasks: &'g [Task<'_>],
    groups: &'g [(LinearGroup, InputStats)],
) -> impl Iterator<Item = &'g InputStats> {
    tasks.iter().filter_map(|t| groups.get(t.group).map(|(_, stats)| stats))
}
