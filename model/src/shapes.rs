//! Names, sizes and groups of a block's linears, from the config alone: planning and verifying need no weights.

use lowbit_checkpoint::ModelConfig;

/// Linears that share an input, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinearGroup {
    /// q, k, v (or the fused qkv); with latent attention what leads to the latent vectors.
    Attention,
    /// Queries out of their latent vector.
    Query,
    /// Keys and values out of theirs.
    KeyValue,
    /// o.
    Output,
    /// gate, up (or fused) of the dense MLP or of the shared expert: every token.
    Mlp,
    /// down of the dense MLP or of the shared expert.
    Down,
    /// gate, up of one expert: the tokens routed to it.
    Expert(usize),
    /// down of one expert.
    ExpertDown(usize),
}

/// Name, rows and columns of a linear of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Suffix within the block: `self_attn.q_proj`.
    pub suffix: String,
    /// Group.
    pub group: LinearGroup,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

impl LinearShape {
    /// The suffix with `*` for the number of an expert.
    pub fn kind(&self) -> String {
        match self.group {
            LinearGroup::Expert(e) | LinearGroup::ExpertDown(e) => {
                self.suffix.replace(&format!(".experts.{e}."), ".experts.*.")
            }
            _ => self.suffix.clone(),
        }
    }
}

/// Module, rows and columns of every linear of the blocks of the decoder `prefix`, block by block in graph order, and last of the
/// embedding. Not of the head: it has a matrix of its own or not.
pub fn matrices(c: &ModelConfig, prefix: &str) -> Vec<(String, usize, usize)> {
    let of_block = |i: usize| {
        let row = move |s: LinearShape| (format!("{prefix}.layers.{i}.{}", s.suffix), s.out_features, s.in_features);
        linear_shapes(c, i).into_iter().map(row)
    };
    let embedding = (format!("{prefix}.embed_tokens"), c.vocab_size, c.hidden_size);
    (0..c.num_layers).flat_map(of_block).chain([embedding]).collect()
}

/// The linears of a block, in graph order: attention, the dense MLP or the shared expert, the experts.
pub fn linear_shapes(c: &ModelConfig, layer: usize) -> Vec<LinearShape> {
    let h = c.hidden_size;
    let mut v = Vec::new();
    let mut s = |suffix: String, group, out_features, in_features| {
        v.push(LinearShape { suffix, group, out_features, in_features });
    };
    let attention = |name: &str| format!("self_attn.{name}");
    if let Some(l) = &c.latent {
        let q = c.num_heads * l.key();
        match l.q_rank {
            Some(rank) => s(attention("q_a_proj"), LinearGroup::Attention, rank, h),
            None => s(attention("q_proj"), LinearGroup::Attention, q, h),
        }
        s(attention("kv_a_proj_with_mqa"), LinearGroup::Attention, l.kv_rank + l.rope, h);
        if let Some(rank) = l.q_rank {
            s(attention("q_b_proj"), LinearGroup::Query, q, rank);
        }
        s(attention("kv_b_proj"), LinearGroup::KeyValue, c.num_heads * (l.nope + l.value), l.kv_rank);
        s(attention("o_proj"), LinearGroup::Output, h, c.num_heads * l.value);
    } else {
        let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        if c.fused_projections {
            s(attention("qkv_proj"), LinearGroup::Attention, q + 2 * kv, h);
        } else {
            s(attention("q_proj"), LinearGroup::Attention, q, h);
            s(attention("k_proj"), LinearGroup::Attention, kv, h);
            s(attention("v_proj"), LinearGroup::Attention, kv, h);
        }
        s(attention("o_proj"), LinearGroup::Output, h, q);
    }
    let Some(e) = c.experts_of(layer) else {
        let m = c.intermediate_size;
        if c.fused_projections {
            s("mlp.gate_up_proj".into(), LinearGroup::Mlp, 2 * m, h);
        } else {
            s("mlp.gate_proj".into(), LinearGroup::Mlp, m, h);
            s("mlp.up_proj".into(), LinearGroup::Mlp, m, h);
        }
        s("mlp.down_proj".into(), LinearGroup::Down, h, m);
        return v;
    };
    let names = e.names;
    if let Some(m) = e.shared_size {
        let of = |name: &str| format!("{}.{}.{name}", names.mlp, names.shared);
        s(of(names.gate), LinearGroup::Mlp, m, h);
        s(of(names.up), LinearGroup::Mlp, m, h);
        s(of(names.down), LinearGroup::Down, h, m);
    }
    let m = e.intermediate_size;
    for i in 0..e.count {
        let of = |name: &str| format!("{}.experts.{i}.{name}", names.mlp);
        s(of(names.gate), LinearGroup::Expert(i), m, h);
        s(of(names.up), LinearGroup::Expert(i), m, h);
        s(of(names.down), LinearGroup::ExpertDown(i), h, m);
    }
    v
}

/// Modules of a block that choose or weigh experts, with their rows: small, decisive, and never quantized.
pub fn router_modules(c: &ModelConfig, layer: usize) -> Vec<(String, usize)> {
    let Some(e) = c.experts_of(layer) else { return Vec::new() };
    let mut v = vec![(format!("{}.{}", e.names.mlp, e.names.router), e.count)];
    if e.shared_gate {
        v.push((format!("{}.shared_expert_gate", e.names.mlp), 1));
    }
    v
}
