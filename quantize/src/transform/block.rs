//! The float weights of one dense block, changed so that the model computes the same.
//!
//! Resident: one block in f32.

use std::ops::Range;

use lowbit_checkpoint::store::StoredTensor;
use lowbit_checkpoint::{Checkpoint, ModelConfig};
use lowbit_kernels::ScaleType;
use lowbit_kernels::backend::FloatType;
use lowbit_model::block::{LinearGroup, LinearShape, linear_shapes};

use crate::driver::read_dense;
use crate::error::Result;
use crate::transform::fold::{divide_rows, fold_norm, mean_heads, scale_columns, spread_heads};
use crate::transform::rotation::Rotation;

/// The norms in front of q/k/v and of gate/up, by their names in a block.
pub(crate) fn norm_names(c: &ModelConfig) -> [&'static str; 2] {
    ["input_layernorm", if c.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" }]
}

/// The linear whose outputs become the columns of o or of down, and which of its rows: v's, or up's.
pub(crate) fn feeder(c: &ModelConfig, shapes: &[LinearShape], group: LinearGroup) -> Option<(usize, Range<usize>)> {
    let (q, kv, m) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size);
    let (name, rows) = match (group, c.fused_projections) {
        (LinearGroup::Output, false) => ("self_attn.v_proj", 0..kv),
        (LinearGroup::Output, true) => ("self_attn.qkv_proj", q + kv..q + 2 * kv),
        (LinearGroup::Down, false) => ("mlp.up_proj", 0..m),
        (LinearGroup::Down, true) => ("mlp.gate_up_proj", m..2 * m),
        _ => return None,
    };
    shapes.iter().position(|s| s.suffix == name).map(|i| (i, rows))
}

/// Rounding to a stored float type.
fn rounding(kind: FloatType) -> ScaleType {
    match kind {
        FloatType::F32 => ScaleType::F32,
        FloatType::F16 => ScaleType::F16,
        FloatType::Bf16 => ScaleType::Bf16,
    }
}

/// The float type of a stored tensor.
pub(crate) fn float_type(ckpt: &Checkpoint, name: &str) -> Result<FloatType> {
    let t = ckpt.store.get(name)?;
    t.float_type().ok_or_else(|| ckpt.store.mismatch(name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)).into())
}

/// A vector, checked to be finite.
pub(crate) fn read_vector(ckpt: &Checkpoint, name: &str, len: usize) -> Result<Vec<f32>> {
    let v = ckpt.store.vector(name, len)?;
    match v.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(ckpt.store.mismatch(name, "finite values".into(), format!("{} at element {i}", v[i])).into()),
        None => Ok(v),
    }
}

/// The rotations of a block.
pub(crate) struct Rotations {
    /// R1: the residual stream's.
    pub(crate) residual: Rotation,
    /// R2: of every head's values.
    pub(crate) values: Rotation,
}

/// A dense block's linears and the norms in front of them, in f32.
pub(crate) struct FloatBlock<'a> {
    ckpt: &'a Checkpoint,
    /// `model.layers.3`.
    name: String,
    shapes: Vec<LinearShape>,
    /// `[out, in]`, in the order of `shapes`.
    weights: Vec<Vec<f32>>,
    biases: Vec<Option<Vec<f32>>>,
    norms: [Vec<f32>; 2],
}

impl<'a> FloatBlock<'a> {
    /// Reads block `index`, `name` being `model.layers.N`.
    pub(crate) fn read(ckpt: &'a Checkpoint, name: &str, index: usize) -> Result<Self> {
        let c = &ckpt.config;
        let shapes = linear_shapes(c, index);
        let (mut weights, mut biases) = (Vec::with_capacity(shapes.len()), Vec::with_capacity(shapes.len()));
        for s in &shapes {
            let module = format!("{name}.{}", s.suffix);
            weights.push(read_dense(ckpt, &module, s.out_features, s.in_features)?);
            let bias = format!("{module}.bias");
            let stored = ckpt.store.find(&bias).map(|_| read_vector(ckpt, &bias, s.out_features));
            biases.push(stored.transpose()?);
        }
        let norm = |norm: &str| read_vector(ckpt, &format!("{name}.{norm}.weight"), c.hidden_size);
        let [first, second] = norm_names(c);
        let norms = [norm(first)?, norm(second)?];
        Ok(Self { ckpt, name: name.to_string(), shapes, weights, biases, norms })
    }

    /// Linears of a group, by their place.
    fn members(&self, group: LinearGroup) -> Vec<usize> {
        (0..self.shapes.len()).filter(|i| self.shapes[*i].group == group).collect()
    }

    /// The weights of a group's linears, with their shapes.
    pub(crate) fn group(&self, group: LinearGroup) -> Vec<(&LinearShape, &[f32])> {
        self.members(group).into_iter().map(|i| (&self.shapes[i], self.weights[i].as_slice())).collect()
    }

    /// The free channels of something of a group's columns: o's columns under grouped-query attention are not free.
    pub(crate) fn free(&self, group: LinearGroup, columns: &[f32]) -> Vec<f32> {
        let c = &self.ckpt.config;
        match group {
            LinearGroup::Output => mean_heads(columns, c.head_dim, c.num_heads / c.num_kv_heads.max(1)),
            _ => columns.to_vec(),
        }
    }

    /// A group's columns of its free channels.
    pub(crate) fn columns(&self, group: LinearGroup, free: &[f32]) -> Vec<f32> {
        let c = &self.ckpt.config;
        match group {
            LinearGroup::Output => spread_heads(free, c.head_dim, c.num_heads / c.num_kv_heads.max(1)),
            _ => free.to_vec(),
        }
    }

    /// Multiplies the columns of a group by the scales s of its free channels and divides what feeds them.
    pub(crate) fn scale(&mut self, group: LinearGroup, s: &[f32]) -> Result<()> {
        let c = &self.ckpt.config;
        let columns = match feeder(c, &self.shapes, group) {
            Some((i, rows)) => {
                let n = self.shapes[i].in_features;
                divide_rows(&mut self.weights[i][rows.start * n..rows.end * n], n, s);
                if let Some(bias) = &mut self.biases[i] {
                    bias[rows].iter_mut().zip(s).for_each(|(b, s)| *b /= s);
                }
                self.columns(group, s)
            }
            None => {
                let at = usize::from(group == LinearGroup::Mlp);
                let stored = rounding(float_type(self.ckpt, &self.norm(at))?);
                let (norm, columns) = fold_norm(&self.norms[at], c.norm_offset, s, stored);
                self.norms[at] = norm;
                columns
            }
        };
        for i in self.members(group) {
            scale_columns(&mut self.weights[i], &columns);
        }
        Ok(())
    }

    /// Folds the norms into what reads them, and rotates: the residual stream by R1, every head's values by R2.
    pub(crate) fn rotate(&mut self, r: &Rotations) {
        let c = &self.ckpt.config;
        for (at, group) in [LinearGroup::Attention, LinearGroup::Mlp].into_iter().enumerate() {
            let factors: Vec<f32> = self.norms[at].iter().map(|w| c.norm_offset + w).collect();
            self.norms[at].fill(1.0 - c.norm_offset);
            for i in self.members(group) {
                scale_columns(&mut self.weights[i], &factors);
                r.residual.rows(&mut self.weights[i]);
            }
        }
        for group in [LinearGroup::Output, LinearGroup::Down] {
            for i in self.members(group) {
                let n = self.shapes[i].in_features;
                if group == LinearGroup::Output {
                    r.values.rows(&mut self.weights[i]);
                }
                r.residual.outputs(&mut self.weights[i], n);
                if let Some(bias) = &mut self.biases[i] {
                    r.residual.rows(bias);
                }
            }
        }
        if let Some((i, rows)) = feeder(c, &self.shapes, LinearGroup::Output) {
            let n = self.shapes[i].in_features;
            r.values.outputs(&mut self.weights[i][rows.start * n..rows.end * n], n);
            if let Some(bias) = &mut self.biases[i] {
                r.values.rows(&mut bias[rows]);
            }
        }
    }

    fn norm(&self, at: usize) -> String {
        format!("{}.{}.weight", self.name, norm_names(&self.ckpt.config)[at])
    }

    /// The block's tensors: weights that `solved` says a solver will take in f32, everything else in the type it is stored in.
    pub(crate) fn tensors(&self, solved: &dyn Fn(&str) -> bool) -> Result<Vec<(String, StoredTensor)>> {
        let mut out = Vec::new();
        let mut put = |name: String, kind: FloatType, shape: Vec<usize>, values: &[f32]| {
            out.push((name, StoredTensor::floats(kind, shape, values)));
        };
        for ((s, w), bias) in self.shapes.iter().zip(&self.weights).zip(&self.biases) {
            let module = format!("{}.{}", self.name, s.suffix);
            let name = format!("{module}.weight");
            let kind = if solved(&module) { FloatType::F32 } else { float_type(self.ckpt, &name)? };
            put(name, kind, vec![s.out_features, s.in_features], w);
            if let Some(bias) = bias {
                let name = format!("{module}.bias");
                let kind = float_type(self.ckpt, &name)?;
                put(name, kind, vec![s.out_features], bias);
            }
        }
        for at in 0..2 {
            let name = self.norm(at);
            let kind = float_type(self.ckpt, &name)?;
            put(name, kind, vec![self.ckpt.config.hidden_size], &self.norms[at]);
        }
        Ok(out)
    }
}
