//! The driver's side of learned rounding: a block's graph and weights from the checkpoint, its codes into the output.

use std::time::Instant;

use lowbit_calibration::WholeBlock;
use lowbit_kernels::QuantizedWeight;
use lowbit_kernels::backend::Backend;
use lowbit_model::block::Block;

use super::{Run, read_dense, replace};
use crate::error::{QuantizeError, Result};
use crate::factor::SolveError;
use crate::learned::graph::{Graph, LINEARS};
use crate::learned::load::unlike;
use crate::learned::rounding::Rounding;
use crate::learned::{Learnable, learn};
use crate::loss::squared_error;
use crate::record::LayerRecord;
use crate::solve::Solved;

impl Run<'_> {
    /// Learns the rounding of block `index` on `data`, hands its linears over to be written, and puts them in the place of the original
    /// ones, on every device. Learning is the host's.
    pub(super) fn learn_block(
        &mut self,
        backends: &[&dyn Backend],
        index: usize,
        data: &WholeBlock,
        blocks: &mut [Block],
    ) -> Result<()> {
        let (start, plan, ckpt) = (Instant::now(), self.plan, self.ckpt);
        let Some(block) = blocks.first() else { return Ok(()) };
        let graph = Graph::load(ckpt, &format!("{}.{index}", plan.blocks), block)?;
        let planned = |module: &str| plan.linears.iter().find(|p| p.module == module);
        let mut linears = Vec::with_capacity(LINEARS);
        for (linear, (out, n)) in block.linears.iter().zip(graph.dims) {
            linears.push(match planned(&linear.module) {
                Some(p) => {
                    let opts = plan.options.solver(p.scheme, plan.layout.scales);
                    let rounding = Rounding::new(self.dense(p)?, out, n, &opts);
                    let solve = |source| QuantizeError::Solve { module: p.module.clone(), source };
                    Learnable::Rounded(Box::new(rounding.map_err(solve)?))
                }
                None => Learnable::Kept(read_dense(ckpt, &linear.module, out, n)?),
            });
        }
        let mut linears: [Learnable; LINEARS] = linears.try_into().map_err(|_| unlike(index))?;
        let found = learn(&graph, &mut linears, data, plan.options.learn_steps, &mut || self.check_stop())?;
        if !found.nearest.is_finite() {
            let module = format!("{}.{index}", plan.blocks);
            return Err(QuantizeError::Solve {
                module,
                source: SolveError::NonFinite { what: "block output", index: 0 },
            });
        }
        let event = (!found.is_better()).then(|| {
            format!(
                "what was learned is no nearer than rounding to nearest, which stands: mean squared error {:.3e} against {:.3e}",
                found.learned, found.nearest
            )
        });
        let seconds = start.elapsed().as_secs_f64() / LINEARS as f64;
        let modules: Vec<String> = block.linears.iter().map(|l| l.module.clone()).collect();
        for (linear, module) in linears.iter().zip(&modules) {
            let (Learnable::Rounded(r), Some(p)) = (linear, planned(module)) else { continue };
            let solved = Solved::Codes(QuantizedWeight::Int(r.matrix()));
            let (error, norm) = squared_error(r.weight(), p.in_features, |rows, back| solved.widen(rows, back));
            let record = LayerRecord {
                name: p.module.clone(),
                block: Some(index),
                out_features: p.out_features,
                in_features: p.in_features,
                scheme: p.scheme_name(),
                method: plan.options.method.name().into(),
                proxy_loss: error,
                relative_error: if norm > 0.0 { error / norm } else { 0.0 },
                seconds,
                tokens: data.windows.iter().map(|w| w.len() as u64).sum(),
                events: event.iter().cloned().collect(),
                ..LayerRecord::default()
            };
            let kernel = |source| QuantizeError::Kernel { module: p.module.clone(), source };
            let host = solved.host_weight().map_err(kernel)?;
            self.keep(p, solved, None, record)?;
            let bias = ckpt.bias(&p.module, p.out_features)?;
            replace(backends, blocks, &p.module, &host, bias.as_deref(), None)?;
        }
        Ok(())
    }
}
