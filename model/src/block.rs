//! One decoder block as a sequence of stages.
//!
//! The stages are what calibration needs: each ends where a group of linears that share an input begins
//! (q/k/v → o → gate/up → down), so quantizing one group and going on costs no second pass. A sparse block has experts in
//! place of the dense MLP, or beside a shared expert that takes the dense MLP's place; latent attention has two stages more.

use lowbit_checkpoint::config::{GateClamp, ModelConfig};
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{
    AttentionShape, Backend, Buffer, HostWeight, KvBuffer, Segment, WeightHandle, WeightedRows,
};

use crate::error::{At, ModelError, Result};
use crate::experts::{Experts, Routing};
use crate::latent::Latent;
use crate::rope::Rope;
pub use crate::shapes::{LinearGroup, LinearShape, linear_shapes, matrices, router_modules};
use crate::source::Source;

/// Rows of experts' outputs that are held before they are added up: few enough for memory, many enough for one step of the device.
const HELD_ROWS: usize = 16 << 10;

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
        let Some(rule) = &self.input else {
            return backend.linear(x, &self.weight, self.bias.as_ref()).at(&self.module);
        };
        let made = backend.rounded_linears(x, rule, &[(&self.weight, self.bias.as_ref())]).at(&self.module)?;
        let [y] = results(made, &self.module)?;
        Ok(y)
    }
}

/// As many results as there are linears.
fn results<const N: usize>(ys: Vec<Buffer>, place: &str) -> Result<[Buffer; N]> {
    ys.try_into().map_err(|_| ModelError::Argument(format!("{place}: the backend returned another number of results")))
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
    /// First linear of the dense MLP or the shared expert.
    mlp_at: Option<usize>,
    /// First linear of expert 0; gate, up, down of each follow.
    experts_at: usize,
    experts: Option<Experts>,
    latent: Option<Latent>,
    input_norm: Buffer,
    pre_mlp_norm: Buffer,
    post_attention_norm: Option<Buffer>,
    post_mlp_norm: Option<Buffer>,
    q_norm: Option<Buffer>,
    k_norm: Option<Buffer>,
    rope: Rope,
    shape: AttentionShape,
    /// `[heads]`, where heads have them.
    sinks: Option<Vec<f32>>,
    /// How keys (after their rotation) and values are rounded before they are cached.
    kv: Option<[InputRule; 2]>,
    config: ModelConfig,
}

impl Block {
    /// Loads block `index`; `prefix` is `model.layers.N`.
    pub fn load(from: &dyn Source, backend: &dyn Backend, prefix: &str, index: usize) -> Result<Self> {
        let c = from.config();
        if c.sinks && !backend.has_sinks() {
            let what = format!("{prefix}: attention sinks (`{}`) are computed on the CPU only", c.family);
            return Err(ModelError::Argument(format!("{what}, not on {}\nhint: --device cpu", backend.name())));
        }
        let shapes = linear_shapes(c, index);
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
        let rotated = match &c.latent {
            Some(l) => l.rope,
            None => ((c.head_dim as f64 * c.partial_rotary_factor) as usize) & !1,
        };
        let first = |group| shapes.iter().position(|s| s.group == group);
        Ok(Self {
            index,
            linears,
            mlp_at: first(LinearGroup::Mlp),
            experts_at: first(LinearGroup::Expert(0)).unwrap_or(shapes.len()),
            experts: c.experts_of(index).map(|e| Experts::load(from, backend, prefix, e)).transpose()?,
            latent: c.latent.as_ref().map(|l| Latent::load(from, backend, prefix, l)).transpose()?,
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
            sinks: c.sinks.then(|| from.vector(&format!("{prefix}.self_attn.sinks"), c.num_heads)).transpose()?,
            kv: from.kv_rules(&format!("{prefix}.self_attn"))?,
            config: c.clone(),
        })
    }

    /// Whether inputs of linears, or keys and values, are rounded: that may go through the host.
    pub(crate) fn rounds_inputs(&self) -> bool {
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

    /// How queries and keys turn.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Heads, scale and window of its attention.
    pub fn attention_shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    /// Whether the outputs of o and of a dense MLP's down are added to the residual stream as they are, without a norm between.
    pub fn adds_output_directly(&self) -> bool {
        !self.config.post_norms
    }

    /// The experts, in a sparse block.
    pub fn experts(&self) -> Option<&Experts> {
        self.experts.as_ref()
    }

    /// Whether there is a dense MLP or a shared expert.
    pub fn has_mlp(&self) -> bool {
        self.mlp_at.is_some()
    }

    /// Sum of `of` over the linears that a step of `tokens` reads: every one outside the experts, and of the experts those that
    /// some token chooses, on average if each chose at random: `1 − (1 − per_token / count)^tokens` of them.
    pub(crate) fn read_by(&self, tokens: usize, of: impl Fn(&Linear) -> usize) -> u64 {
        let sum = |l: &[Linear]| l.iter().map(&of).sum::<usize>() as u64;
        let (always, experts) = self.linears.split_at(self.experts_at.min(self.linears.len()));
        let Some(c) = self.experts.as_ref().map(Experts::config) else { return sum(always) };
        let left_out = 1.0 - c.per_token as f64 / c.count.max(1) as f64;
        sum(always) + (sum(experts) as f64 * (1.0 - left_out.powf(tokens as f64))).round() as u64
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

    fn linear_at(&self, i: usize) -> Result<&Linear> {
        self.linears.get(i).ok_or_else(|| ModelError::Argument(format!("block {} has no linear {i}", self.index)))
    }

    /// Linears that read the same input, in one call.
    fn apply_all<const N: usize>(&self, b: &dyn Backend, linears: [&Linear; N], x: &Buffer) -> Result<[Buffer; N]> {
        let weights: Vec<_> = linears.iter().map(|l| (&l.weight, l.bias.as_ref())).collect();
        let place = linears.first().map_or("", |l| l.module.as_str());
        let ys = match linears.first() {
            // Static scales of their own: each rounds its input by itself.
            Some(first) if linears.iter().any(|l| l.input != first.input) => {
                linears.iter().map(|l| l.apply(b, x)).collect::<Result<Vec<_>>>()?
            }
            first => match first.and_then(|l| l.input.as_ref()) {
                Some(rule) => b.rounded_linears(x, rule, &weights).at(place)?,
                None => b.linears(x, &weights).at(place)?,
            },
        };
        results(ys, place)
    }

    fn norm(&self, b: &dyn Backend, x: &Buffer, weight: &Buffer, width: usize, place: &str) -> Result<Buffer> {
        b.rms_norm(x, weight, width, self.config.rms_norm_eps, self.config.norm_offset).at(place)
    }

    /// Stage 1: the input of q, k and v.
    pub fn attention_input(&self, b: &dyn Backend, x: &Buffer) -> Result<Buffer> {
        self.norm(b, x, &self.input_norm, self.config.hidden_size, "input_layernorm")
    }

    /// Latent attention: the inputs of what expands queries (`None` where they have no latent vector) and keys with values.
    pub fn latents(&self, b: &dyn Backend, input: &Buffer) -> Result<Option<(Option<Buffer>, Buffer)>> {
        let Some(latent) = &self.latent else { return Ok(None) };
        let [q, compressed] = self.compress(b, input)?;
        Ok(Some((latent.query_latent(b, &q)?, latent.key_value_latent(b, &compressed)?)))
    }

    fn compress(&self, b: &dyn Backend, input: &Buffer) -> Result<[Buffer; 2]> {
        self.apply_all(b, [self.linear_at(0)?, self.linear_at(1)?], input)
    }

    /// q, k and v by latent attention.
    fn latent_heads(&self, b: &dyn Backend, latent: &Latent, input: &Buffer, tap: &mut Tap<'_>) -> Result<[Buffer; 3]> {
        let [mut q, compressed] = self.compress(b, input)?;
        if let Some(vector) = latent.query_latent(b, &q)? {
            self.show(LinearGroup::Query, &vector, tap)?;
            q = self.linear("self_attn.q_b_proj")?.apply(b, &vector)?;
        }
        let vector = latent.key_value_latent(b, &compressed)?;
        self.show(LinearGroup::KeyValue, &vector, tap)?;
        let expanded = self.linear("self_attn.kv_b_proj")?.apply(b, &vector)?;
        latent.heads(b, self.config.num_heads, &q, &compressed, &expanded)
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
        self.attend_tapped(b, input, segments, cache, watch, &mut |_, _| Ok(()))
    }

    fn attend_tapped(
        &self,
        b: &dyn Backend,
        input: &Buffer,
        segments: &[Segment],
        cache: &mut KvBuffer,
        watch: Option<&mut KvWatch<'_>>,
        tap: &mut Tap<'_>,
    ) -> Result<Buffer> {
        let c = &self.config;
        let (qw, kw) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let (mut q, mut k, v) = if let Some(latent) = &self.latent {
            self.latent_heads(b, latent, input, tap)?.into()
        } else if c.fused_projections {
            let all = self.linear("self_attn.qkv_proj")?.apply(b, input)?;
            let w = qw + 2 * kw;
            let part = |r: std::ops::Range<usize>| b.slice_columns(&all, w, r).at("qkv_proj");
            (part(0..qw)?, part(qw..qw + kw)?, part(qw + kw..w)?)
        } else {
            self.apply_all(b, [self.linear_at(0)?, self.linear_at(1)?, self.linear_at(2)?], input)?.into()
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
        let attended = match &self.sinks {
            Some(sinks) => b.attention_with_sinks(&q, cache, &self.shape, sinks, segments),
            None => b.attention(&q, cache, &self.shape, segments),
        };
        let attended = attended.at("attention")?;
        match &self.latent {
            Some(latent) => latent.output(b, &attended),
            None => Ok(attended),
        }
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

    /// Stage 5: gate, up, activation of the dense MLP or the shared expert: the input of its down.
    pub fn mlp_activation(&self, b: &dyn Backend, input: &Buffer) -> Result<Buffer> {
        let at = self.mlp_at.unwrap_or(self.linears.len());
        if self.config.fused_projections {
            let m = self.config.intermediate_size;
            let all = self.linear_at(at)?.apply(b, input)?;
            let (gate, up) =
                (b.slice_columns(&all, 2 * m, 0..m).at("gate")?, b.slice_columns(&all, 2 * m, m..2 * m).at("up")?);
            return b.activation_mul(&gate, &up, self.config.activation).at("activation");
        }
        self.gated(b, at, input)
    }

    /// `act(gate · x) ∘ (up · x)`, gate being linear `at` and up the next; or gpt-oss's clamped form of it.
    fn gated(&self, b: &dyn Backend, at: usize, input: &Buffer) -> Result<Buffer> {
        let [gate, up] = self.apply_all(b, [self.linear_at(at)?, self.linear_at(at + 1)?], input)?;
        match self.experts.as_ref().and_then(|e| e.config().clamp) {
            Some(GateClamp { alpha, limit }) => b.clamped_swiglu(&gate, &up, alpha, limit),
            None => b.activation_mul(&gate, &up, self.config.activation),
        }
        .at("activation")
    }

    /// gate, up, activation of expert `e` on some rows of stage 4's result: the input of its down.
    pub fn expert_activation(&self, b: &dyn Backend, e: usize, rows: &Buffer) -> Result<Buffer> {
        self.gated(b, self.experts_at + 3 * e, rows)
    }

    /// What experts give for stage 4's result, the shared one included: what is added to the residual stream. Each token's
    /// experts are added by rising number, so that its sum depends on no other token.
    pub fn experts_output(&self, b: &dyn Backend, input: &Buffer, routing: &Routing) -> Result<Buffer> {
        self.experts_tapped(b, input, routing, &mut |_, _| Ok(()))
    }

    fn experts_tapped(&self, b: &dyn Backend, input: &Buffer, routing: &Routing, tap: &mut Tap<'_>) -> Result<Buffer> {
        let h = self.config.hidden_size;
        let mut y = b.zeros(input.len).at("experts")?;
        let (mut held, mut held_rows) = (Vec::new(), 0);
        let mut add = |held: &mut Vec<(usize, Buffer)>| -> Result<()> {
            let parts: Vec<WeightedRows<'_>> = held
                .iter()
                .filter_map(|(e, x)| {
                    routing.experts.get(*e).map(|r| WeightedRows { x, rows: &r.rows, factors: &r.weights })
                })
                .collect();
            b.add_weighted_rows(&mut y, h, &parts).at("experts")?;
            held.clear();
            Ok(())
        };
        for (e, routed) in routing.experts.iter().enumerate().filter(|(_, r)| !r.rows.is_empty()) {
            let x = b.gather_rows(input, h, &routed.indices()).at("experts")?;
            let [gate, up, down] = [0, 1, 2].map(|i| self.linear_at(self.experts_at + 3 * e + i));
            let (gate, up, down) = (gate?, up?, down?);
            tap(&gate.module, &x)?;
            tap(&up.module, &x)?;
            let activated = self.expert_activation(b, e, &x)?;
            tap(&down.module, &activated)?;
            held.push((e, down.apply(b, &activated)?));
            held_rows += routed.rows.len();
            if held_rows >= HELD_ROWS {
                add(&mut held)?;
                held_rows = 0;
            }
        }
        add(&mut held)?;
        if let Some(at) = self.mlp_at {
            self.show(LinearGroup::Mlp, input, tap)?;
            let activated = self.mlp_activation(b, input)?;
            self.show(LinearGroup::Down, &activated, tap)?;
            let mut shared = self.linear_at(at + 2)?.apply(b, &activated)?;
            let factors = self.experts.as_ref().map(|e| e.shared_factors(b, input)).transpose()?.flatten();
            if let Some(factors) = factors {
                b.scale_rows(&mut shared, h, &factors).at("shared expert")?;
            }
            b.add_assign(&mut y, &shared).at("shared expert")?;
        }
        Ok(y)
    }

    /// down of a dense MLP, and its norm where there is one: what is added to the residual stream.
    fn mlp_output(&self, b: &dyn Backend, activated: &Buffer) -> Result<Buffer> {
        let y = self.linear("mlp.down_proj")?.apply(b, activated)?;
        match &self.post_mlp_norm {
            Some(w) => self.norm(b, &y, w, self.config.hidden_size, "post_feedforward_layernorm"),
            None => Ok(y),
        }
    }

    /// Stage 6 of a dense block: down and the residual.
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
        let attended = self.attend_tapped(b, input, segments, cache, None, tap)?;
        self.show(LinearGroup::Output, &attended, tap)?;
        let input = self.add_norm(b, x, &self.attention_output(b, &attended)?, &self.pre_mlp_norm)?;
        if let Some(experts) = &self.experts {
            let routing = experts.route(b, &input)?;
            let y = self.experts_tapped(b, &input, &routing, tap)?;
            return self.add_norm(b, x, &y, next);
        }
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
