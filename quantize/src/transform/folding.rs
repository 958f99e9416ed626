//! Transforms at work: the float model that a run reads, block by block.

use lowbit_calibration::lanes::load_block;
use lowbit_calibration::{Channels, SequentialPass};
use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::store::StoredTensor;
use lowbit_kernels::backend::{Backend, Bytes, FloatType};
use lowbit_model::block::{LinearGroup, LinearShape, linear_shapes};
use lowbit_model::decoder;
use serde::{Deserialize, Serialize};

use super::awq::{Found, search};
use super::block::{FloatBlock, Rotations, float_type, read_vector};
use super::fold::{column_max, scale_columns};
use super::plan::{scaled_groups, table_names};
use super::rotation::Rotation;
use super::smooth::smooth_scales;
use super::{FoldRecord, Transform, TransformRecord, ordered, scaling};
use crate::error::{QuantizeError, Result};
use crate::factor::SolveError;
use crate::plan::{Plan, PlannedLinear};
use crate::scale_search::{SolverOptions, check_finite};
use crate::solve::round_any;

/// Seed of R1; R2 of block i has that of i + 1.
const RESIDUAL_SEED: u32 = 0;
/// Rows of a table that are changed at a time.
const TABLE_ROWS: usize = 1024;

/// A group by its name in records.
const GROUPS: [(LinearGroup, &str); 4] = [
    (LinearGroup::Attention, "q/k/v"),
    (LinearGroup::Output, "o"),
    (LinearGroup::Mlp, "gate/up"),
    (LinearGroup::Down, "down"),
];

/// What was chosen for a block: enough to make it again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct BlockFold {
    /// One a scaled input.
    pub(crate) records: Vec<FoldRecord>,
    /// Its scales, as the bits of their f32.
    scales: Vec<Vec<u32>>,
}

/// The float model under the plan's transforms; the original where there are none.
pub(crate) struct Folding<'a> {
    ckpt: &'a Checkpoint,
    plan: &'a Plan,
    prefix: &'static str,
    /// R1.
    residual: Option<Rotation>,
    /// With the tensors of the block, or of the table, that is worked on.
    current: Option<Checkpoint>,
    /// Of that block.
    fold: BlockFold,
    records: Vec<FoldRecord>,
}

impl<'a> Folding<'a> {
    /// Begins with the original.
    pub(crate) fn new(ckpt: &'a Checkpoint, plan: &'a Plan) -> Result<Self> {
        let rotates = plan.options.transforms.contains(&Transform::Rotate);
        let residual = rotates.then(|| Rotation::new(ckpt.config.hidden_size, RESIDUAL_SEED));
        let (fold, records) = (BlockFold::default(), Vec::new());
        Ok(Self { ckpt, plan, prefix: decoder::prefix(ckpt)?, residual, current: None, fold, records })
    }

    /// Whether there is a transform.
    pub(crate) fn works(&self) -> bool {
        !self.plan.options.transforms.is_empty()
    }

    /// Where the tensors of the block, or of the table, that is worked on are read from.
    pub(crate) fn floats(&self) -> &Checkpoint {
        self.current.as_ref().unwrap_or(self.ckpt)
    }

    /// What was chosen for the block that is worked on.
    pub(crate) fn fold(&self) -> &BlockFold {
        &self.fold
    }

    /// Takes over the records of a block that an earlier run solved.
    pub(crate) fn taken(&mut self, fold: &BlockFold) {
        self.records.extend(fold.records.iter().cloned());
    }

    /// The record of the run; `None` without transforms.
    pub(crate) fn record(&self) -> Option<TransformRecord> {
        let applied = ordered(&self.plan.options.transforms);
        self.works().then(|| TransformRecord {
            applied: applied.into_iter().map(Transform::name).collect(),
            rewritten: self.plan.rewritten.keys().cloned().collect(),
            folds: self.records.clone(),
        })
    }

    fn name(&self, index: usize) -> String {
        format!("{}.layers.{index}", self.prefix)
    }

    fn planned(&self, index: usize, shape: &LinearShape) -> Option<PlannedLinear> {
        let module = format!("{}.{}", self.name(index), shape.suffix);
        self.plan.linears.iter().find(|l| l.module == module).cloned()
    }

    /// A block in f32, rotated where the model is.
    fn read(&self, index: usize) -> Result<FloatBlock<'a>> {
        let mut block = FloatBlock::read(self.ckpt, &self.name(index), index)?;
        if let Some(residual) = &self.residual {
            let values = Rotation::new(self.ckpt.config.head_dim, RESIDUAL_SEED.wrapping_add(index as u32 + 1));
            block.rotate(&Rotations { residual: residual.clone(), values });
        }
        Ok(block)
    }

    fn put(&mut self, block: &FloatBlock<'_>) -> Result<()> {
        let plan = self.plan;
        let solved = |module: &str| plan.linears.iter().any(|l| l.module == module);
        self.current = Some(self.ckpt.overlay(block.tensors(&solved)?));
        Ok(())
    }

    /// Goes on to a block without a look at data.
    pub(crate) fn begin(&mut self, index: usize) -> Result<()> {
        (self.current, self.fold) = (None, BlockFold::default());
        if self.residual.is_none() {
            // What of its tensors is made when it is read goes with the block.
            self.current = self.ckpt.afresh(&format!("{}.", self.name(index)));
            return Ok(());
        }
        let block = self.read(index)?;
        self.put(&block)
    }

    /// Goes on to a block as an earlier run left it.
    pub(crate) fn repeat(&mut self, index: usize, fold: &BlockFold) -> Result<()> {
        if fold.records.is_empty() {
            return self.begin(index);
        }
        let mut block = self.read(index)?;
        for (record, bits) in fold.records.iter().zip(&fold.scales) {
            let group = GROUPS.iter().find(|g| g.1 == record.inputs);
            let scales: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
            if let Some((group, _)) = group {
                block.scale(*group, &scales)?;
            }
        }
        self.put(&block)?;
        self.fold = fold.clone();
        Ok(())
    }

    /// Goes on to a block and chooses its scales from the inputs that `pass` has for it.
    pub(crate) fn choose(
        &mut self,
        backends: &[&dyn Backend],
        pass: &mut SequentialPass<'_>,
        index: usize,
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let Some(kind) = scaling(&self.plan.options.transforms) else { return self.begin(index) };
        (self.current, self.fold) = (None, BlockFold::default());
        let mut float = self.read(index)?;
        if self.residual.is_some() {
            self.put(&float)?;
        }
        let c = &self.ckpt.config;
        let planned = |s: &LinearShape| self.planned(index, s);
        let groups = scaled_groups(c, &self.plan.options.transforms, &linear_shapes(c, index), &planned);
        let blocks = load_block(self.floats(), backends, &self.name(index), index)?;
        let mut found: Vec<(LinearGroup, Vec<f32>, FoldRecord)> = Vec::new();
        pass.survey(
            &blocks,
            kind == Transform::Awq,
            &mut |group, channels| -> Result<()> {
                if groups.contains(&group) {
                    let (scales, record) = self.scales(kind, &float, index, group, &channels)?;
                    found.push((group, scales, record));
                }
                Ok(())
            },
            tick,
        )?;
        drop(blocks);
        let mut fold = BlockFold::default();
        for (group, scales, record) in found {
            float.scale(group, &scales)?;
            fold.scales.push(scales.iter().map(|s| s.to_bits()).collect());
            fold.records.push(record);
        }
        self.put(&float)?;
        self.records.extend(fold.records.iter().cloned());
        self.fold = fold;
        Ok(())
    }

    /// The scales of a group's free channels, and their record.
    fn scales(
        &self,
        kind: Transform,
        float: &FloatBlock<'_>,
        index: usize,
        group: LinearGroup,
        channels: &Channels,
    ) -> Result<(Vec<f32>, FoldRecord)> {
        let members = float.group(group);
        let module = members.first().map_or(String::new(), |(s, _)| format!("{}.{}", self.name(index), s.suffix));
        let fail = |source: SolveError| QuantizeError::Solve { module: module.clone(), source };
        // A largest magnitude would hide what is not a number, a mean does not.
        check_finite("activation", &channels.mean_abs).map_err(fail)?;
        let n = channels.mean_abs.len();
        let weights: Vec<&[f32]> = members.iter().map(|(_, w)| *w).collect();
        let (alpha, scales, losses) = match kind {
            Transform::SmoothQuant { alpha } => {
                let scales = smooth_scales(&channels.max_abs, &column_max(weights, n), alpha);
                (alpha, scales, None)
            }
            _ => {
                let found = self.awq(float, index, group, &weights, channels).map_err(fail)?;
                (found.alpha, found.scales, Some((found.plain, found.loss)))
            }
        };
        let (min_scale, max_scale) =
            scales.iter().fold((f32::INFINITY, 0f32), |(least, most), s| (least.min(*s), most.max(*s)));
        let inputs = GROUPS.iter().find(|g| g.0 == group).map_or("", |g| g.1).to_string();
        let (loss_before, loss_after) = losses.unzip();
        let record = FoldRecord { block: index, inputs, alpha, min_scale, max_scale, loss_before, loss_after };
        Ok((scales, record))
    }

    /// Searches with the rounding that the group's scheme has.
    fn awq(
        &self,
        float: &FloatBlock<'_>,
        index: usize,
        group: LinearGroup,
        weights: &[&[f32]],
        channels: &Channels,
    ) -> std::result::Result<Found, SolveError> {
        let n = channels.mean_abs.len();
        let planned: Vec<PlannedLinear> =
            float.group(group).iter().filter_map(|(s, _)| self.planned(index, s)).collect();
        let round = |scaled: &[Vec<f32>]| -> std::result::Result<Vec<Vec<f32>>, SolveError> {
            let set_max = scaled.iter().flatten().fold(0f32, |m, w| m.max(w.abs()));
            let one = |(w, l): (&Vec<f32>, &PlannedLinear)| -> std::result::Result<Vec<f32>, SolveError> {
                let opts = self.plan.options.solver(l.scheme, self.plan.layout.scales);
                let opts = SolverOptions { act_order: false, ..opts };
                Ok(round_any(w, l.out_features, n, l.wanted(), set_max, &opts)?.dequantize()?)
            };
            scaled.iter().zip(&planned).map(one).collect()
        };
        let hessian = channels.hessian.as_deref().unwrap_or_default();
        let free = float.free(group, &channels.mean_abs);
        search(weights, n, &free, &|s| float.columns(group, s), hessian, &round)
    }

    /// Goes on to the embedding, as the output has it.
    pub(crate) fn embedding(&mut self) -> Result<()> {
        self.current = None;
        if self.residual.is_some() {
            let [embedding, ..] = table_names(self.prefix);
            let tensor = self.tensor(&embedding)?;
            self.current = Some(self.ckpt.overlay([(embedding, tensor)]));
        }
        Ok(())
    }

    /// Goes on to a planned table.
    pub(crate) fn table(&mut self, l: &PlannedLinear) -> Result<()> {
        self.current = None;
        if self.residual.is_some() {
            let source = format!("{}.weight", l.source);
            let head = table_names(self.prefix)[1] == format!("{}.weight", l.module);
            let tensor = self.rotated(&source, head, Some(FloatType::F32))?;
            self.current = Some(self.ckpt.overlay([(source, tensor)]));
        }
        Ok(())
    }

    /// A tensor of `Plan::rewritten` that belongs to no block: the rotated embedding or head, or the last norm.
    pub(crate) fn tensor(&self, name: &str) -> Result<StoredTensor> {
        let [embedding, head, norm] = table_names(self.prefix);
        if name == norm {
            let c = &self.ckpt.config;
            let ones = vec![1.0 - c.norm_offset; c.hidden_size];
            return Ok(StoredTensor::floats(float_type(self.ckpt, name)?, vec![c.hidden_size], &ones));
        }
        let tied = self.ckpt.config.tie_word_embeddings;
        let source = if name == head && tied { embedding.as_str() } else { name };
        self.rotated(source, name == head, None)
    }

    /// A table times R1, the head's columns with the last norm folded in first; in the type it is stored in, unless `kind` says another.
    fn rotated(&self, source: &str, head: bool, kind: Option<FloatType>) -> Result<StoredTensor> {
        let c = &self.ckpt.config;
        let t = self.ckpt.store.get(source)?;
        let kind = kind.map_or_else(|| float_type(self.ckpt, source), Ok)?;
        if t.shape != [c.vocab_size, c.hidden_size] {
            let expected = format!("shape [{}, {}]", c.vocab_size, c.hidden_size);
            return Err(self.ckpt.store.mismatch(source, expected, format!("{:?}", t.shape)).into());
        }
        let [.., norm] = table_names(self.prefix);
        let norm = head.then(|| read_vector(self.ckpt, &norm, c.hidden_size)).transpose()?;
        let factors = norm.map(|n| n.iter().map(|w| c.norm_offset + w).collect::<Vec<f32>>());
        let stored = t.data.as_slice().len() / c.vocab_size.max(1);
        let mut bytes = Vec::with_capacity(c.vocab_size * c.hidden_size * kind.size());
        for start in (0..c.vocab_size).step_by(TABLE_ROWS) {
            let rows = TABLE_ROWS.min(c.vocab_size - start);
            let missing = || self.ckpt.store.mismatch(source, "floats".into(), format!("{:?}", t.dtype));
            let data = t.data.part(start * stored..(start + rows) * stored).ok_or_else(missing)?;
            let part = StoredTensor { dtype: t.dtype, shape: vec![rows, c.hidden_size], data };
            if let Some((i, x)) = part.first_not_finite() {
                let found = format!("{x} at element {}", start * c.hidden_size + i);
                return Err(self.ckpt.store.mismatch(source, "finite values".into(), found).into());
            }
            let mut values = part.to_f32().ok_or_else(missing)?;
            if let Some(factors) = &factors {
                scale_columns(&mut values, factors);
            }
            if let Some(residual) = &self.residual {
                residual.rows(&mut values);
            }
            bytes.extend_from_slice(StoredTensor::floats(kind, part.shape, &values).data.as_slice());
        }
        let dtype = StoredTensor::floats(kind, vec![0], &[]).dtype;
        Ok(StoredTensor { dtype, shape: t.shape.clone(), data: Bytes::from_vec(bytes) })
    }
}
