//! One decoder block as a sequence of stages.
//!
//! The stages are what calibration needs: each ends where a group of linears that share an input begins
//! (q/k/v → o → gate/up → down), so quantizing one group and going on costs no second pass.

use lowbit_checkpoint::config::ModelConfig;
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{AttentionShape, Backend, Buffer, HostWeight, KvBuffer, Segment, WeightHandle};

use crate::error::{At, ModelError, Result};
use crate::rope::Rope;
use crate::source::Source;

/// A linear on the device.
pub struct Linear {
    /// Full module name.
    pub module: String,
    /// Weight.
    pub weight: WeightHandle,
    /// `[out]`.
    pub bias: Option<Buffer>,
    /// How its input is rounded first, where it is.
    pub input: Option<InputRule>,
}

impl Linear {
    /// Reads and uploads `module`.
    pub fn load(from: &dyn Source, backend: &dyn Backend, module: &str, out: usize, n: usize) -> Result<Self> {
        let weight = from.weight(backend, module, out, n)?;
        let bias = from.bias(module, out)?.map(|b| backend.upload(&b).at(module)).transpose()?;
        Ok(Self { module: module.to_string(), weight, bias, input: from.input_rule(module)? })
    }

    /// Uploads a weight that is already in memory (a freshly quantized one).
    pub fn from_host(backend: &dyn Backend, module: &str, host: &HostWeight, bias: Option<&[f32]>) -> Result<Self> {
        let weight = backend.upload_weight(host).at(module)?;
        let bias = bias.map(|b| backend.upload(b).at(module)).transpose()?;
        Ok(Self { module: module.to_string(), weight, bias, input: None })
    }

    /// The same linear with its input rounded.
    #[must_use]
    pub fn with_input(mut self, rule: Option<InputRule>) -> Self {
        self.input = rule;
        self
    }

    /// `x · Wᵀ + b`, x rounded first where [`Self::input`] says so.
    pub fn apply(&self, backend: &dyn Backend, x: &Buffer) -> Result<Buffer> {
        let rounded = self.rounded(backend, x)?;
        backend.linear(rounded.as_ref().unwrap_or(x), &self.weight, self.bias.as_ref()).at(&self.module)
    }

    fn rounded(&self, backend: &dyn Backend, x: &Buffer) -> Result<Option<Buffer>> {
        let rule = self.input.as_ref();
        rule.map(|r| backend.quantize_input(x, self.weight.in_features, r).at(&self.module)).transpose()
    }
}

/// The four groups of linears that share an input, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearGroup {
    /// q, k, v (or the fused qkv).
    Attention,
    /// o.
    Output,
    /// gate, up (or fused).
    Mlp,
    /// down.
    Down,
}

impl LinearGroup {
    /// All, in order.
    pub const ALL: [LinearGroup; 4] =
        [LinearGroup::Attention, LinearGroup::Output, LinearGroup::Mlp, LinearGroup::Down];
}

/// Name, rows and columns of a linear of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Suffix within the block: `self_attn.q_proj`.
    pub suffix: &'static str,
    /// Group.
    pub group: LinearGroup,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

/// The linears of a block, in graph order.
pub fn linear_shapes(c: &ModelConfig) -> Vec<LinearShape> {
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let (h, m) = (c.hidden_size, c.intermediate_size);
    let s = |suffix, group, out_features, in_features| LinearShape { suffix, group, out_features, in_features };
    let mut v = if c.fused_projections {
        vec![s("self_attn.qkv_proj", LinearGroup::Attention, q + 2 * kv, h)]
    } else {
        vec![
            s("self_attn.q_proj", LinearGroup::Attention, q, h),
            s("self_attn.k_proj", LinearGroup::Attention, kv, h),
            s("self_attn.v_proj", LinearGroup::Attention, kv, h),
        ]
    };
    v.push(s("self_attn.o_proj", LinearGroup::Output, h, q));
    if c.fused_projections {
        v.push(s("mlp.gate_up_proj", LinearGroup::Mlp, 2 * m, h));
    } else {
        v.push(s("mlp.gate_proj", LinearGroup::Mlp, m, h));
        v.push(s("mlp.up_proj", LinearGroup::Mlp, m, h));
    }
    v.push(s("mlp.down_proj", LinearGroup::Down, h, m));
    v
}

/// Called with the full name of a linear and its input `[T, in]`.
pub type Tap<'a> = dyn FnMut(&str, &Buffer) -> Result<()> + 'a;

/// Called with keys, after their rotation, and values, before either is rounded: `[T, kv_heads · head_dim]`.
pub type KvWatch<'a> = dyn FnMut(&Buffer, &Buffer) + 'a;

/// A decoder block.
pub struct Block {
    /// Index.
    pub index: usize,
    /// Linears in the order of [`linear_shapes`].
    pub linears: Vec<Linear>,
    shapes: Vec<LinearShape>,
    input_norm: Buffer,
    pre_mlp_norm: Buffer,
    post_attention_norm: Option<Buffer>,
    post_mlp_norm: Option<Buffer>,
    q_norm: Option<Buffer>,
    k_norm: Option<Buffer>,
    rope: Rope,
    shape: AttentionShape,
    /// How keys (after their rotation) and values are rounded before they are cached.
    kv: Option<[InputRule; 2]>,
    config: ModelConfig,
}

impl Block {
    /// Loads block `index`; `prefix` is `model.layers.N`.
    pub fn load(from: &dyn Source, backend: &dyn Backend, prefix: &str, index: usize) -> Result<Self> {
        let c = from.config();
        let shapes = linear_shapes(c);
        let linears = shapes
            .iter()
            .map(|s| Linear::load(from, backend, &format!("{prefix}.{}", s.suffix), s.out_features, s.in_features))
            .collect::<Result<Vec<_>>>()?;
        let norm = |name: &str, len: usize| -> Result<Buffer> {
            let full = format!("{prefix}.{name}.weight");
            backend.upload(&from.vector(&full, len)?).at(&full)
        };
        let optional = |on: bool, name: &str, len: usize| if on { norm(name, len).map(Some) } else { Ok(None) };
        let h = c.hidden_size;
        let slides = c.layer_slides.get(index).copied().unwrap_or(false);
        let rope = match &c.rope_local {
            Some(local) if slides => local,
            _ => &c.rope,
        };
        // An even number of rotated elements, as transformers truncates head_dim · factor.
        let rotated = ((c.head_dim as f64 * c.partial_rotary_factor) as usize) & !1;
        Ok(Self {
            index,
            linears,
            shapes,
            input_norm: norm("input_layernorm", h)?,
            pre_mlp_norm: norm(if c.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" }, h)?,
            post_attention_norm: optional(c.post_norms, "post_attention_layernorm", h)?,
            post_mlp_norm: optional(c.post_norms, "post_feedforward_layernorm", h)?,
            q_norm: optional(c.qk_norm, "self_attn.q_norm", c.head_dim)?,
            k_norm: optional(c.qk_norm, "self_attn.k_norm", c.head_dim)?,
            rope: Rope::new(rope, rotated),
            shape: AttentionShape {
                heads: c.num_heads,
                kv_heads: c.num_kv_heads,
                head_dim: c.head_dim,
                scale: c.attention_scale,
                window: if slides { c.sliding_window } else { None },
                soft_cap: c.attention_soft_cap,
            },
            kv: from.kv_rules(&format!("{prefix}.self_attn"))?,
            config: c.clone(),
        })
    }

    /// Whether inputs of linears, or keys and values, are rounded: that may go through the host, which recorded steps cannot.
    pub fn rounds_inputs(&self) -> bool {
        self.kv.is_some() || self.linears.iter().any(|l| l.input.is_some())
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.config.num_kv_heads
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.config.head_dim
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    /// Whether the outputs of o and down are added to the residual stream as they are, without a norm between.
    pub fn adds_output_directly(&self) -> bool {
        !self.config.post_norms
    }

    /// Shapes of the linears, in the order of `linears`.
    pub fn shapes(&self) -> &[LinearShape] {
        &self.shapes
    }

    fn linear(&self, suffix: &str) -> Result<&Linear> {
        let i = self.shapes.iter().position(|s| s.suffix == suffix);
        i.and_then(|i| self.linears.get(i))
            .ok_or_else(|| ModelError::Argument(format!("block {} has no `{suffix}`", self.index)))
    }

    /// Linears that read the same input, in one call.
    fn apply_all<const N: usize>(&self, b: &dyn Backend, suffixes: [&str; N], x: &Buffer) -> Result<[Buffer; N]> {
        let linears = suffixes.iter().map(|s| self.linear(s)).collect::<Result<Vec<_>>>()?;
        let weights: Vec<_> = linears.iter().map(|l| (&l.weight, l.bias.as_ref())).collect();
        let place = linears.first().map_or("", |l| l.module.as_str());
        let ys = match linears.first() {
            // Static scales of their own: each rounds its input by itself.
            Some(first) if linears.iter().any(|l| l.input != first.input) => {
                linears.iter().map(|l| l.apply(b, x)).collect::<Result<Vec<_>>>()?
            }
            first => {
                let rounded = first.map(|l| l.rounded(b, x)).transpose()?.flatten();
                b.linears(rounded.as_ref().unwrap_or(x), &weights).at(place)?
            }
        };
        ys.try_into()
            .map_err(|_| ModelError::Argument(format!("{place}: the backend returned another number of results")))
    }

    fn norm(&self, b: &dyn Backend, x: &Buffer, weight: &Buffer, width: usize, place: &str) -> Result<Buffer> {
        b.rms_norm(x, weight, width, self.config.rms_norm_eps, self.config.norm_offset).at(place)
    }

    /// Stage 1: the input of q, k and v.
    pub fn attention_input(&self, b: &dyn Backend, x: &Buffer) -> Result<Buffer> {
        self.norm(b, x, &self.input_norm, self.config.hidden_size, "input_layernorm")
    }

    /// Stage 2: q, k, v, rotation, cache, attention: the input of o.
    pub fn attend(
        &self,
        b: &dyn Backend,
        input: &Buffer,
        segments: &[Segment],
        cache: &mut KvBuffer,
        watch: Option<&mut KvWatch<'_>>,
    ) -> Result<Buffer> {
        let c = &self.config;
        let (qw, kw) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let (mut q, mut k, v) = if c.fused_projections {
            let all = self.linear("self_attn.qkv_proj")?.apply(b, input)?;
            let w = qw + 2 * kw;
            let part = |r: std::ops::Range<usize>| b.slice_columns(&all, w, r).at("qkv_proj");
            (part(0..qw)?, part(qw..qw + kw)?, part(qw + kw..w)?)
        } else {
            let [q, k, v] = self.apply_all(b, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], input)?;
            (q, k, v)
        };
        if let Some(w) = &self.q_norm {
            q = self.norm(b, &q, w, c.head_dim, "q_norm")?;
        }
        if let Some(w) = &self.k_norm {
            k = self.norm(b, &k, w, c.head_dim, "k_norm")?;
        }
        let Rope { inv_freq, mscale } = &self.rope;
        if self.kv.is_none() && watch.is_none() {
            b.rope_append(cache, &mut q, &mut k, &v, c.num_heads, c.head_dim, inv_freq, *mscale, segments)
                .at("rope")?;
        } else {
            b.rope(&mut q, c.num_heads, c.head_dim, inv_freq, *mscale, segments).at("rope")?;
            b.rope(&mut k, c.num_kv_heads, c.head_dim, inv_freq, *mscale, segments).at("rope")?;
            if let Some(watch) = watch {
                watch(&k, &v);
            }
            match &self.kv {
                Some([keys, values]) => {
                    let k = b.quantize_input(&k, kw, keys).at("k_scale")?;
                    let v = b.quantize_input(&v, kw, values).at("v_scale")?;
                    b.kv_append(cache, &k, &v, segments).at("kv_append")?;
                }
                None => b.kv_append(cache, &k, &v, segments).at("kv_append")?,
            }
        }
        b.attention(&q, cache, &self.shape, segments).at("attention")
    }

    /// o, and its norm where there is one: what is added to the residual stream.
    fn attention_output(&self, b: &dyn Backend, attended: &Buffer) -> Result<Buffer> {
        let y = self.linear("self_attn.o_proj")?.apply(b, attended)?;
        match &self.post_attention_norm {
            Some(w) => self.norm(b, &y, w, self.config.hidden_size, "post_attention_layernorm"),
            None => Ok(y),
        }
    }

    /// Stage 3: o and the residual.
    pub fn attention_residual(&self, b: &dyn Backend, x: &mut Buffer, attended: &Buffer) -> Result<()> {
        b.add_assign(x, &self.attention_output(b, attended)?).at("residual")
    }

    /// Stage 4: the input of gate and up.
    pub fn mlp_input(&self, b: &dyn Backend, x: &Buffer) -> Result<Buffer> {
        self.norm(b, x, &self.pre_mlp_norm, self.config.hidden_size, "mlp norm")
    }

    /// Stage 5: gate, up, activation: the input of down.
    pub fn mlp_activation(&self, b: &dyn Backend, input: &Buffer) -> Result<Buffer> {
        let m = self.config.intermediate_size;
        let (gate, up) = if self.config.fused_projections {
            let all = self.linear("mlp.gate_up_proj")?.apply(b, input)?;
            (b.slice_columns(&all, 2 * m, 0..m).at("gate")?, b.slice_columns(&all, 2 * m, m..2 * m).at("up")?)
        } else {
            let [gate, up] = self.apply_all(b, ["mlp.gate_proj", "mlp.up_proj"], input)?;
            (gate, up)
        };
        b.activation_mul(&gate, &up, self.config.activation).at("activation")
    }

    /// down, and its norm where there is one: what is added to the residual stream.
    fn mlp_output(&self, b: &dyn Backend, activated: &Buffer) -> Result<Buffer> {
        let y = self.linear("mlp.down_proj")?.apply(b, activated)?;
        match &self.post_mlp_norm {
            Some(w) => self.norm(b, &y, w, self.config.hidden_size, "post_feedforward_layernorm"),
            None => Ok(y),
        }
    }

    /// Stage 6: down and the residual.
    pub fn mlp_residual(&self, b: &dyn Backend, x: &mut Buffer, activated: &Buffer) -> Result<()> {
        b.add_assign(x, &self.mlp_output(b, activated)?).at("residual")
    }

    /// `x += y` and the norm of the sum that comes next.
    fn add_norm(&self, b: &dyn Backend, x: &mut Buffer, y: &Buffer, weight: &Buffer) -> Result<Buffer> {
        let c = &self.config;
        b.add_rms_norm(x, y, weight, c.hidden_size, c.rms_norm_eps, c.norm_offset).at("residual and norm")
    }

    /// Weight of the norm of stage 1.
    pub(crate) fn input_norm(&self) -> &Buffer {
        &self.input_norm
    }

    /// The stages after the first, with `input` what it gave; each residual goes together with the norm after it, which for
    /// the last is that of `next`: the next block's, or the final one. Returns the norm's result; the bits are those of the
    /// stages one by one. `tap` sees the input of every linear by its full module name.
    pub fn forward(
        &self,
        b: &dyn Backend,
        x: &mut Buffer,
        input: &Buffer,
        next: &Buffer,
        segments: &[Segment],
        cache: &mut KvBuffer,
        tap: &mut Tap<'_>,
    ) -> Result<Buffer> {
        self.show(LinearGroup::Attention, input, tap)?;
        let attended = self.attend(b, input, segments, cache, None)?;
        self.show(LinearGroup::Output, &attended, tap)?;
        let input = self.add_norm(b, x, &self.attention_output(b, &attended)?, &self.pre_mlp_norm)?;
        self.show(LinearGroup::Mlp, &input, tap)?;
        let activated = self.mlp_activation(b, &input)?;
        self.show(LinearGroup::Down, &activated, tap)?;
        self.add_norm(b, x, &self.mlp_output(b, &activated)?, next)
    }

    fn show(&self, group: LinearGroup, input: &Buffer, tap: &mut Tap<'_>) -> Result<()> {
        for (shape, linear) in self.shapes.iter().zip(&self.linears) {
            if shape.group == group {
                tap(&linear.module, input)?;
            }
        }
        Ok(())
    }
}
