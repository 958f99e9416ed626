//! A model and its cache, and the two ways to run it.

use std::sync::Arc;

use lowbit_kernels::backend::{Buffer, Segment};
use lowbit_kernels::draw::Draw;
use lowbit_model::{KvCache, Model};

use crate::error::{Result, ServeError};

/// A model with its cache.
pub struct Runner {
    pub model: Model,
    cache: KvCache,
    /// Tokens of a page, where pages are allocated as needed.
    pub page: Option<usize>,
}

impl Runner {
    /// An empty cache of `slots` sequences.
    pub fn new(model: Model, slots: usize, capacity: usize) -> Result<Self> {
        let cache = model.new_cache(slots, capacity)?;
        let usage = cache.usage(model.backend());
        Ok(Self { page: (usage.pages == 0).then_some(usage.page_tokens), model, cache })
    }

    /// Tokens of a page where the model's backend allocates pages as needed; makes and drops an empty cache.
    pub fn probe(model: &Model) -> Result<Option<usize>> {
        let usage = model.new_cache(1, 2)?.usage(model.backend());
        Ok((usage.pages == 0).then_some(usage.page_tokens))
    }

    /// Pages held, by one layer.
    pub fn pages(&self) -> usize {
        self.cache.usage(self.model.backend()).pages
    }

    /// Computes parts of prompts, (slot, tokens before, tokens) each, in prefill arithmetic: hidden states `[tokens, hidden]`, one
    /// part after the other.
    pub fn prefill(&mut self, parts: &[(usize, usize, &[u32])]) -> Result<Buffer> {
        let ids: Vec<u32> = parts.iter().flat_map(|p| p.2).copied().collect();
        let mut row = 0;
        let place = |(slot, past, ids): &(usize, usize, &[u32])| {
            let segment = Segment { slot: *slot, row, tokens: ids.len(), past: *past };
            row += ids.len();
            segment
        };
        let segments: Vec<Segment> = parts.iter().map(place).collect();
        Ok(self.model.forward(&ids, &segments, &mut self.cache)?)
    }

    /// Logits `[rows, vocab]` of some rows of hidden states of [`Self::prefill`].
    pub fn prefill_logits(&self, hidden: &Buffer, rows: &[usize]) -> Result<Vec<f32>> {
        let rows = self.model.gather_hidden(hidden, rows)?;
        let logits = self.model.logits(&rows)?;
        self.download(&logits)
    }

    /// Logits `[rows, vocab]` of the rows whose next token is to be chosen.
    pub fn next_logits(&self, hidden: &Buffer, rows: &[usize]) -> Result<Vec<f32>> {
        let last = self.model.gather_hidden(hidden, rows)?;
        let logits = self.model.next_logits(&last)?;
        self.download(&logits)
    }

    /// One token each at (slot, position), in decode arithmetic: logits `[rows, vocab]`. Rows of one slot must be in
    /// the order of their positions. The logits are good until the next call.
    pub fn decode(&mut self, rows: &[(usize, usize, u32)]) -> Result<Arc<Buffer>> {
        let ids: Vec<u32> = rows.iter().map(|r| r.2).collect();
        let place = |(row, r): (usize, &(usize, usize, u32))| Segment { slot: r.0, row, tokens: 1, past: r.1 };
        let segments: Vec<Segment> = rows.iter().enumerate().map(place).collect();
        Ok(self.model.decode_step(&ids, &segments, &mut self.cache)?)
    }

    /// Logits on the host.
    pub fn download(&self, logits: &Buffer) -> Result<Vec<f32>> {
        let copied = self.model.backend().download(logits);
        copied.map_err(|e| ServeError::Model(lowbit_model::ModelError::Kernel { place: "logits".into(), source: e }))
    }

    /// The most likely token of each row.
    pub fn argmax(&self, logits: &Buffer) -> Result<Vec<u32>> {
        let best = self.model.backend().argmax(logits, self.model.config().vocab_size);
        best.map_err(|e| ServeError::Model(lowbit_model::ModelError::Kernel { place: "argmax".into(), source: e }))
    }

    /// A token of each row, as `draws` say.
    pub fn draw(&self, logits: &Buffer, draws: &[Draw]) -> Result<Vec<u32>> {
        let drawn = self.model.backend().draw(logits, self.model.config().vocab_size, draws);
        drawn.map_err(|e| ServeError::Model(lowbit_model::ModelError::Kernel { place: "draw".into(), source: e }))
    }

    /// Slot `to` becomes the first `tokens` of slot `from`; the same slot is cut.
    pub fn fork(&mut self, from: usize, tokens: usize, to: usize) -> Result<()> {
        Ok(self.cache.fork(self.model.backend(), from, tokens, to)?)
    }

    /// Forgets a slot.
    pub fn release(&mut self, slot: usize) -> Result<()> {
        Ok(self.cache.release(self.model.backend(), slot)?)
    }
}
