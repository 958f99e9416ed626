//! The whole decoder: embedding, blocks, final norm, head.

use std::sync::Arc;

use lowbit_checkpoint::{Checkpoint, ModelConfig};
use lowbit_kernels::backend::{Backend, Buffer, KvBuffer, KvUsage, Segment, WeightHandle};
use lowbit_kernels::random::normals;
use rayon::prelude::*;

use crate::block::{Block, Linear, Tap};
use crate::error::{At, ModelError, Result};
use crate::experts::Experts;
use crate::source::Source;
use crate::step::{ModelId, Recordings};

/// Where a checkpoint keeps its decoder: `model.` or, inside multimodal folders, `language_model.model.`.
pub fn prefix(ckpt: &Checkpoint) -> Result<&'static str> {
    ["model", "language_model.model"].into_iter().find(|p| ckpt.has_weight(&format!("{p}.embed_tokens"))).ok_or_else(
        || {
            lowbit_checkpoint::CheckpointError::MissingTensor {
                dir: ckpt.dir.clone(),
                tensor: "model.embed_tokens.weight".into(),
            }
            .into()
        },
    )
}

/// Name of the head that is not tied, beside a decoder at `prefix`.
pub fn head(prefix: &str) -> &'static str {
    if prefix == "model" { "lm_head" } else { "language_model.lm_head" }
}

/// The token embedding.
pub struct Embedding {
    table: WeightHandle,
    scale: f32,
}

impl Embedding {
    /// Loads it.
    pub fn load(from: &dyn Source, backend: &dyn Backend) -> Result<Self> {
        let c = from.config();
        let module = format!("{}.embed_tokens", from.prefix()?);
        let table = from.weight(backend, &module, c.vocab_size, c.hidden_size)?;
        Ok(Self { table, scale: c.embed_scale })
    }

    /// `[T, hidden]`.
    pub fn apply(&self, backend: &dyn Backend, ids: &[u32]) -> Result<Buffer> {
        backend.embed(&self.table, ids, self.scale).at("embed_tokens")
    }
}

/// Final norm and head.
pub struct Head {
    norm: Buffer,
    head: Linear,
    config: ModelConfig,
}

impl Head {
    /// Loads it; a tied head reads the embedding's matrix.
    pub fn load(from: &dyn Source, backend: &dyn Backend) -> Result<Self> {
        let c = from.config();
        let p = from.prefix()?;
        // Some untied configs come without a head of their own: transformers then ties silently; we ask the config.
        let module = if c.tie_word_embeddings { format!("{p}.embed_tokens") } else { head(p).to_string() };
        let name = format!("{p}.norm.weight");
        Ok(Self {
            norm: backend.upload(&from.vector(&name, c.hidden_size)?).at(&name)?,
            head: Linear::load(from, backend, &module, c.vocab_size, c.hidden_size)?,
            config: c.clone(),
        })
    }

    /// Exchanges the head's linear with another of the same shape.
    pub fn swap(&mut self, other: &mut Linear) {
        std::mem::swap(&mut self.head, other);
    }

    /// Final norm of `[T, hidden]`.
    pub fn norm(&self, b: &dyn Backend, x: &Buffer) -> Result<Buffer> {
        let c = &self.config;
        b.rms_norm(x, &self.norm, c.hidden_size, c.rms_norm_eps, c.norm_offset).at("model.norm")
    }

    /// Logits `[T, vocab]` of normed rows.
    pub fn logits(&self, b: &dyn Backend, hidden: &Buffer) -> Result<Buffer> {
        let mut y = self.head.apply(b, hidden)?;
        if let Some(cap) = self.config.final_soft_cap {
            b.soft_cap(&mut y, cap).at("final soft cap")?;
        }
        Ok(y)
    }
}

/// Keys and values of every layer.
pub struct KvCache {
    layers: Vec<KvBuffer>,
    /// Sequences it can hold.
    pub slots: usize,
    /// Tokens a slot can hold.
    pub capacity: usize,
    /// Of decode steps over it.
    pub(crate) recordings: Option<Recordings>,
}

impl KvCache {
    /// Slot `to` becomes the first `tokens` tokens of slot `from` (see [`Backend::kv_fork`]).
    pub fn fork(&mut self, backend: &dyn Backend, from: usize, tokens: usize, to: usize) -> Result<()> {
        self.layers.iter_mut().try_for_each(|l| backend.kv_fork(l, from, tokens, to)).at("kv_fork")
    }

    /// Forgets a slot's tokens.
    pub fn release(&mut self, backend: &dyn Backend, slot: usize) -> Result<()> {
        self.layers.iter_mut().try_for_each(|l| backend.kv_release(l, slot)).at("kv_release")
    }

    /// Puts `tokens` random keys and values into `slots` as if that many tokens had been computed: for measurements at
    /// a depth. Attention's time does not depend on the values, so all slots and layers hold the same.
    pub fn fill_random(&mut self, backend: &dyn Backend, slots: &[usize], tokens: usize, seed: u32) -> Result<()> {
        if tokens > self.capacity {
            return Err(ModelError::CacheFull { tokens, capacity: self.capacity });
        }
        let Some(width) = self.layers.first().map(|l| l.width) else { return Ok(()) };
        let values = |seed| backend.upload(&normals(tokens * width, 1.0, seed)).at("random cache");
        let (k, v) = (values(seed)?, values(seed ^ 1)?);
        for layer in &mut self.layers {
            for &slot in slots {
                let segment = Segment { slot, row: 0, tokens, past: 0 };
                backend.kv_append(layer, &k, &v, std::slice::from_ref(&segment)).at("kv_append")?;
            }
        }
        Ok(())
    }

    /// What one layer holds; all layers hold the same.
    pub fn usage(&self, backend: &dyn Backend) -> KvUsage {
        let none = KvUsage { page_tokens: self.capacity, pages: 0 };
        self.layers.first().map_or(none, |l| backend.kv_usage(l))
    }
}

/// Part of a model that [`Model::swap`] exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// One linear of a block, in the order of [`crate::block::linear_shapes`].
    Linear {
        /// Block.
        block: usize,
        /// Linear.
        linear: usize,
    },
    /// All linears of a block; norms stay.
    Block(usize),
}

fn elements(l: &Linear) -> usize {
    l.weight.out_features * l.weight.in_features
}

/// A loaded model.
pub struct Model {
    id: ModelId,
    config: ModelConfig,
    backend: Arc<dyn Backend>,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
}

impl Model {
    /// Loads every weight (memory-mapped where the backend allows).
    pub fn load(from: &dyn Source, backend: Arc<dyn Backend>) -> Result<Self> {
        let (p, config) = (from.prefix()?, from.config());
        let b = backend.as_ref();
        let embedding = Embedding::load(from, b)?;
        let load = |i: usize| Block::load(from, b, &format!("{p}.layers.{i}"), i);
        let blocks = if b.uploads_in_parallel() {
            // Of several errors the first block's is told, whatever thread was first.
            let all: Vec<Result<Block>> = (0..config.num_layers).into_par_iter().map(load).collect();
            all.into_iter().collect::<Result<Vec<_>>>()?
        } else {
            (0..config.num_layers).map(load).collect::<Result<Vec<_>>>()?
        };
        let head = Head::load(from, b)?;
        Ok(Self { id: ModelId::new(), config: config.clone(), backend, embedding, blocks, head })
    }

    /// Its blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Exchanges a part with another model of the same config and backend. Recorded decode steps of either are recorded anew.
    pub fn swap(&mut self, other: &mut Model, part: Part) -> Result<()> {
        let (Part::Linear { block, .. } | Part::Block(block)) = part;
        let (Some(a), Some(b)) = (self.blocks.get_mut(block), other.blocks.get_mut(block)) else {
            return Err(ModelError::Argument(format!("no block {block} to exchange")));
        };
        match part {
            Part::Block(_) => std::mem::swap(&mut a.linears, &mut b.linears),
            Part::Linear { linear, .. } => match (a.linears.get_mut(linear), b.linears.get_mut(linear)) {
                (Some(x), Some(y)) => std::mem::swap(x, y),
                _ => return Err(ModelError::Argument(format!("no linear {linear} in block {block} to exchange"))),
            },
        }
        (self.id, other.id) = (ModelId::new(), ModelId::new());
        Ok(())
    }

    /// Its config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its backend.
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// An empty cache.
    pub fn new_cache(&self, slots: usize, capacity: usize) -> Result<KvCache> {
        let c = &self.config;
        let layers = (0..c.num_layers)
            .map(|_| self.backend.kv_cache(slots, capacity, c.num_kv_heads, c.head_dim).at("kv_cache"))
            .collect::<Result<Vec<_>>>()?;
        Ok(KvCache { layers, slots, capacity, recordings: None })
    }

    /// Runs `ids` (all segments' tokens, concatenated) through the blocks and the final norm: `[T, hidden]`.
    pub fn forward(&self, ids: &[u32], segments: &[Segment], cache: &mut KvCache) -> Result<Buffer> {
        self.forward_tapped(ids, segments, cache, &mut |_, _| Ok(()))
    }

    /// [`Self::forward`] with a tap on the input of every linear of the blocks.
    pub fn forward_tapped(
        &self,
        ids: &[u32],
        segments: &[Segment],
        cache: &mut KvCache,
        tap: &mut Tap<'_>,
    ) -> Result<Buffer> {
        self.run(self.backend.as_ref(), ids, segments, cache, tap)
    }

    /// Runs a whole prompt, all of `ids`: [`Self::forward`], or [`Self::forward_decode`] where that is sooner done because reading
    /// the weights is most of the work. Which of them depends on nothing but the prompt's length.
    pub fn forward_prompt(&self, ids: &[u32], segments: &[Segment], cache: &mut KvCache) -> Result<Buffer> {
        if ids.len() <= self.backend.short_prompt() {
            self.forward_decode(ids, segments, cache)
        } else {
            self.forward(ids, segments, cache)
        }
    }

    /// [`Self::forward`] in the arithmetic of decode steps: for the next token of running sequences, usually one token a segment.
    /// A sequence's result depends neither on the batch nor on how many of its tokens come in one call.
    pub fn forward_decode(&self, ids: &[u32], segments: &[Segment], cache: &mut KvCache) -> Result<Buffer> {
        self.run(self.decode_backend(), ids, segments, cache, &mut |_, _| Ok(()))
    }

    pub(crate) fn id(&self) -> ModelId {
        self.id
    }

    /// Hidden states and logits of a decode step on a backend for recorded steps.
    pub(crate) fn step_logits(
        &self,
        b: &dyn Backend,
        ids: &[u32],
        segments: &[Segment],
        cache: &mut KvCache,
    ) -> Result<Buffer> {
        let hidden = self.run(b, ids, segments, cache, &mut |_, _| Ok(()))?;
        self.head.logits(b, &hidden)
    }

    fn decode_backend(&self) -> &dyn Backend {
        self.backend.decode_phase().unwrap_or(self.backend.as_ref())
    }

    fn run(
        &self,
        b: &dyn Backend,
        ids: &[u32],
        segments: &[Segment],
        cache: &mut KvCache,
        tap: &mut Tap<'_>,
    ) -> Result<Buffer> {
        self.check(ids, segments, cache)?;
        let mut x = self.embedding.apply(b, ids)?;
        let Some(first) = self.blocks.first() else { return self.head.norm(b, &x) };
        let mut input = first.attention_input(b, &x)?;
        for (i, (block, kv)) in self.blocks.iter().zip(&mut cache.layers).enumerate() {
            let next = self.blocks.get(i + 1).map_or(&self.head.norm, Block::input_norm);
            input = block.forward(b, &mut x, &input, next, segments, kv, tap)?;
        }
        Ok(input)
    }

    /// The segments are of `ids` and fit the cache.
    pub(crate) fn check(&self, ids: &[u32], segments: &[Segment], cache: &KvCache) -> Result<()> {
        let total: usize = segments.iter().map(|s| s.tokens).sum();
        if total != ids.len() {
            return Err(ModelError::Argument(format!("segments hold {total} tokens, ids {}", ids.len())));
        }
        for s in segments {
            let tokens = s.past + s.tokens;
            if tokens > cache.capacity || s.slot >= cache.slots {
                return Err(ModelError::CacheFull { tokens, capacity: cache.capacity });
            }
        }
        Ok(())
    }

    /// Logits `[T, vocab]` of hidden rows, in prefill's arithmetic: for scoring.
    pub fn logits(&self, hidden: &Buffer) -> Result<Buffer> {
        self.head.logits(self.backend.as_ref(), hidden)
    }

    /// Logits `[T, vocab]` of the rows whose next token is to be chosen, in the decode phase's arithmetic.
    pub fn next_logits(&self, hidden: &Buffer) -> Result<Buffer> {
        self.head.logits(self.decode_backend(), hidden)
    }

    /// Some rows of the hidden states.
    pub fn gather_hidden(&self, hidden: &Buffer, rows: &[usize]) -> Result<Buffer> {
        self.backend.gather_rows(hidden, self.config.hidden_size, rows).at("gather_rows")
    }

    /// Logits of every position of one sequence on the host, `[T, vocab]`.
    pub fn logits_of(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let mut cache = self.new_cache(1, ids.len())?;
        let hidden = self.forward(ids, &[Segment { slot: 0, row: 0, tokens: ids.len(), past: 0 }], &mut cache)?;
        let logits = self.logits(&hidden)?;
        self.backend.download(&logits).at("logits")
    }

    /// Bytes of all weights as stored; a tied matrix counts once.
    pub fn weight_bytes(&self) -> u64 {
        let embedding = if self.config.tie_word_embeddings { 0 } else { self.embedding.table.stored_bytes };
        let routers: usize = self.blocks.iter().filter_map(|b| b.experts()).map(Experts::stored_bytes).sum();
        let linears: usize = self.blocks.iter().flat_map(|b| &b.linears).map(|l| l.weight.stored_bytes).sum();
        (linears + routers + self.head.head.weight.stored_bytes + embedding) as u64
    }

    /// Elements of all matrices; a head that is the embedding counts once.
    pub fn parameters(&self) -> u64 {
        let blocks: usize = self.blocks.iter().flat_map(|b| &b.linears).map(elements).sum();
        let c = &self.config;
        (blocks + elements(&self.head.head)) as u64
            + if c.tie_word_embeddings { 0 } else { (c.vocab_size * c.hidden_size) as u64 }
    }

    /// Elements of the blocks' linears that a token goes through, and of the head.
    pub fn active_elements(&self) -> (u64, u64) {
        (self.blocks.iter().map(|b| b.read_by(1, elements)).sum(), elements(&self.head.head) as u64)
    }

    /// Bytes of weights one decode step of `batch` sequences reads: every linear, of experts those that are chosen (on average), and the head
    /// (of the embedding one row, not counted).
    pub fn decode_weight_bytes(&self, batch: usize) -> u64 {
        let router = |b: &Block| b.experts().map_or(0, Experts::stored_bytes) as u64;
        let block = |b: &Block| b.read_by(batch, |l| l.weight.stored_bytes) + router(b);
        self.blocks.iter().map(block).sum::<u64>() + self.head.head.weight.stored_bytes as u64
    }

    /// Whether a step makes copies to and from the host, so that it cannot be recorded: routing, heads put together, rounded inputs.
    pub(crate) fn steps_through_host(&self) -> bool {
        self.config.latent.is_some() || self.blocks.iter().any(|b| b.experts().is_some() || b.rounds_inputs())
    }
}
