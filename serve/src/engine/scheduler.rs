//! The engine's thread: who runs, who waits, what is computed next.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;

use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_kernels::backend::Buffer;

use super::run::Runner;
use super::sequence::{Sequence, log_of};
use super::slots::{Slots, common};
use super::{EngineOptions, Event, Job, Models, TokenLog};
use crate::error::Result;
use crate::guide::Guides;
use crate::metrics::{CacheConfig, Metrics};

/// Shorter beginnings are computed anew: copying them costs as much.
const SHARE_FROM: usize = 16;

/// Rows of logits that travel to the host together.
const LOGIT_ROWS: usize = 32;

/// The next tokens of a running sequence's prompt.
struct Chunk {
    at: usize,
    tokens: usize,
}

/// See the module.
pub struct Scheduler {
    pub(super) runner: Runner,
    pub(super) draft: Option<Runner>,
    pub(super) options: EngineOptions,
    pub(super) running: Vec<Sequence>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) eos: Vec<u32>,
    tokenizer: Arc<Tokenizer>,
    guides: Guides,
    inbox: Receiver<Job>,
    queue: VecDeque<Job>,
    /// Jobs that are in the inbox or the queue.
    waiting: Arc<AtomicUsize>,
    slots: Slots,
    /// Pages there may be.
    pages: usize,
}

impl Scheduler {
    /// Makes the caches.
    pub fn new(
        models: Models,
        options: EngineOptions,
        inbox: Receiver<Job>,
        waiting: Arc<AtomicUsize>,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let Models { model, draft, tokenizer } = models;
        let guides = Guides::new(&tokenizer, model.config().vocab_size)?;
        let capacity = options.max_len;
        // A probe tells whether slots cost memory before they are used.
        let paged = Runner::probe(&model)?;
        let slots = match paged {
            Some(_) => options.max_concurrent + options.kept_prompts,
            None => options.kv_tokens.div_ceil(capacity).clamp(1, options.max_concurrent + options.kept_prompts),
        };
        let runner = Runner::new(model, slots, capacity)?;
        let draft = draft.map(|d| Runner::new(d, slots, capacity)).transpose()?;
        let pages = options.kv_tokens.div_ceil(paged.unwrap_or(capacity)).max(1);
        metrics.pages[1].store(pages, Ordering::Relaxed);
        let (page_tokens, keeps_prompts) = (paged.unwrap_or(capacity), options.kept_prompts > 0);
        let _ = metrics.cache.set(CacheConfig { page_tokens, format: options.kv_format, keeps_prompts });
        Ok(Self {
            runner,
            draft,
            options,
            running: Vec::new(),
            metrics,
            eos: tokenizer.eos_ids().to_vec(),
            tokenizer,
            guides,
            inbox,
            queue: VecDeque::new(),
            waiting,
            slots: Slots::new(slots),
            pages,
        })
    }

    /// Tokens one sequence can have at most.
    pub fn room(&self) -> usize {
        self.runner.page.map_or(self.options.max_len, |page| self.pages * page)
    }

    /// Runs until every sender is gone and nothing is left to do.
    pub fn run(mut self) {
        loop {
            let idle = self.running.is_empty() && self.queue.is_empty();
            if idle {
                self.report();
                match self.inbox.recv() {
                    Ok(job) => self.queue.push_back(job),
                    Err(_) => return,
                }
            }
            while let Ok(job) = self.inbox.try_recv() {
                self.queue.push_back(job);
            }
            self.drop_cancelled();
            self.prefill();
            self.decode();
            self.retire();
            self.report();
        }
    }

    fn report(&self) {
        let m = &self.metrics;
        m.running.store(self.running.len(), Ordering::Relaxed);
        m.waiting.store(self.waiting.load(Ordering::SeqCst), Ordering::Relaxed);
        let held = if self.runner.page.is_some() { self.runner.pages() } else { self.running.len() };
        m.pages[0].store(held, Ordering::Relaxed);
    }

    fn drop_cancelled(&mut self) {
        let before = self.queue.len();
        self.queue.retain(|job| !job.events.is_closed());
        let gone = before - self.queue.len();
        self.waiting.fetch_sub(gone, Ordering::SeqCst);
        let mut cancelled = gone;
        for s in &mut self.running {
            if s.job.events.is_closed() && !s.over {
                s.over = true;
                cancelled += 1;
            }
        }
        self.metrics.cancelled.fetch_add(cancelled as u64, Ordering::Relaxed);
        self.retire();
    }

    /// Gives back the slots of sequences that are over; their prompts stay for others.
    fn retire(&mut self) {
        for i in (0..self.running.len()).rev() {
            if !self.running[i].over {
                continue;
            }
            let s = self.running.swap_remove(i);
            let done = s.computed.min(s.job.prompt.len());
            let draft_done = s.drafted.min(done);
            let keeps = self.options.kept_prompts > 0 && done >= SHARE_FROM && draft_ok(&self.draft, draft_done, done);
            let freed = if keeps && self.cut(s.slot, done).is_ok() {
                self.slots.keep(s.slot, s.job.prompt[..done].to_vec())
            } else {
                self.slots.free(s.slot);
                vec![s.slot]
            };
            freed.into_iter().for_each(|slot| self.release(slot));
            while self.slots.kept() > self.options.kept_prompts {
                let Some(slot) = self.slots.evict(None) else { break };
                self.release(slot);
            }
        }
    }

    /// Keeps only the first `tokens` of a slot.
    fn cut(&mut self, slot: usize, tokens: usize) -> Result<()> {
        self.runner.fork(slot, tokens, slot)?;
        self.draft.as_mut().map_or(Ok(()), |d| d.fork(slot, tokens, slot))
    }

    fn release(&mut self, slot: usize) {
        // Slots are in range by construction.
        let _ = self.runner.release(slot);
        if let Some(d) = &mut self.draft {
            let _ = d.release(slot);
        }
    }

    /// Pages running sequences may still ask for.
    fn promised(&self, page: usize) -> usize {
        let each = |s: &Sequence| {
            let most = s.job.prompt.len() + s.job.params.max_tokens;
            most.div_ceil(page).saturating_sub(s.computed.div_ceil(page))
        };
        self.running.iter().map(each).sum()
    }

    /// The slot that holds most of a prompt's beginning, and how much.
    fn held(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let mut best = self.slots.longest(prompt);
        for s in self.running.iter().filter(|s| !s.over) {
            let done =
                if self.draft.is_some() { s.computed.min(s.drafted) } else { s.computed }.min(s.job.prompt.len());
            let n = common(&s.job.prompt[..done], prompt);
            if best.is_none_or(|(_, b)| n > b) {
                best = Some((s.slot, n));
            }
        }
        best
    }

    /// Gives the next job a slot, with what others have computed of its prompt; `None` while there is no room.
    fn admit(&mut self) -> Option<()> {
        if self.running.len() >= self.options.max_concurrent {
            return None;
        }
        let job = self.queue.front()?;
        // At least the last token is computed: its logits choose the first answer token.
        let most = if job.params.prompt_logprobs { 0 } else { job.prompt.len() - 1 };
        let mut best = self.held(&job.prompt).map(|(slot, n)| (slot, n.min(most))).filter(|(_, n)| *n >= SHARE_FROM);
        let (length, wants_lookup) = (job.prompt.len(), most > 0);
        let longest = length + job.params.max_tokens;
        if let Some(page) = self.runner.page {
            loop {
                let need = longest.div_ceil(page) - best.map_or(0, |(_, n)| n / page);
                if self.runner.pages() + self.promised(page) + need <= self.pages {
                    break;
                }
                match self.slots.evict(best.map(|b| b.0)) {
                    Some(slot) => self.release(slot),
                    // The prompt to take over may itself be in the way.
                    None if best.is_some() => best = None,
                    None => return None,
                }
            }
        }
        let slot = loop {
            if let Some(slot) = self.slots.take() {
                break slot;
            }
            let old = self.slots.evict(best.map(|b| b.0))?;
            self.release(old);
        };
        let mut cached = 0;
        if let Some((from, n)) = best {
            let forked = self.runner.fork(from, n, slot).is_ok()
                && self.draft.as_mut().is_none_or(|d| d.fork(from, n, slot).is_ok());
            if forked {
                self.slots.touch(from);
                cached = n;
            } else {
                self.release(slot);
            }
        }
        let job = self.queue.pop_front()?;
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.metrics.queue.observe(job.arrived.elapsed());
        self.metrics.prompt.fetch_add(length as u64, Ordering::Relaxed);
        if wants_lookup {
            self.metrics.prefix[0].fetch_add(length as u64, Ordering::Relaxed);
            self.metrics.prefix[1].fetch_add(cached as u64, Ordering::Relaxed);
        }
        let (index, events) = (job.index, job.events.clone());
        match Sequence::new(job, slot, cached, &self.tokenizer, &self.guides) {
            Ok(s) => self.running.push(s),
            Err(e) => {
                let _ = events.send((index, Event::Failed(e.to_string())));
                self.slots.free(slot);
                self.release(slot);
            }
        }
        Some(())
    }

    /// Computes prompts, up to the step's budget: those that wait go through the model together, but for one that begins as
    /// another of them does, which is admitted only after it, to find what that one will have computed.
    fn prefill(&mut self) {
        let mut budget = self.options.prefill_tokens;
        while budget > 0 {
            let mut chunks: Vec<Chunk> = Vec::new();
            let mut at = 0;
            while budget > 0 {
                let Some(s) = self.running.get(at) else {
                    if self.follows(&chunks) || self.admit().is_none() {
                        break;
                    }
                    continue;
                };
                if !s.over && s.computed < s.job.prompt.len() {
                    let tokens = budget.min(s.job.prompt.len() - s.computed);
                    budget -= tokens;
                    chunks.push(Chunk { at, tokens });
                }
                at += 1;
            }
            if chunks.is_empty() {
                return;
            }
            if let Err(e) = self.compute(&chunks) {
                for c in chunks {
                    if !self.running[c.at].over {
                        self.running[c.at].fail(&e.to_string());
                    }
                }
            }
        }
    }

    /// Whether the next job finds more of its prompt once these are computed than there is now.
    fn follows(&self, chunks: &[Chunk]) -> bool {
        let Some(job) = self.queue.front() else { return false };
        let found = self.held(&job.prompt).map_or(0, |(_, n)| n);
        chunks.iter().any(|c| common(&self.running[c.at].job.prompt, &job.prompt) >= found + SHARE_FROM)
    }

    /// Computes parts of prompts, and the first token of those they complete. A sequence that fails by itself takes no other with it.
    fn compute(&mut self, chunks: &[Chunk]) -> Result<()> {
        let parts: Vec<_> = chunks.iter().map(|c| self.running[c.at].part(c.tokens)).collect();
        let hidden = self.runner.prefill(&parts)?;
        if let Some(d) = &mut self.draft {
            d.prefill(&parts)?;
        }
        let (mut row, mut ends) = (0, Vec::new());
        for c in chunks {
            if let Err(e) = self.computed(c, &hidden, row) {
                self.running[c.at].fail(&e.to_string());
            }
            let s = &self.running[c.at];
            if !s.over && s.computed == s.job.prompt.len() {
                ends.push((c.at, row + c.tokens - 1));
            }
            row += c.tokens;
        }
        let vocab = self.runner.model.config().vocab_size;
        for ends in ends.chunks(LOGIT_ROWS) {
            let rows: Vec<usize> = ends.iter().map(|e| e.1).collect();
            let mut logits = self.runner.next_logits(&hidden, &rows)?;
            for ((at, _), logits) in ends.iter().zip(logits.chunks_exact_mut(vocab)) {
                let s = &mut self.running[*at];
                let chosen = s.choose(logits);
                if let Err(e) = chosen.and_then(|(id, log)| s.accept(id, log, &self.eos, &self.metrics)) {
                    s.fail(&e.to_string());
                }
            }
        }
        Ok(())
    }

    /// Notes what was computed of one sequence, from `row` of `hidden` on: its prompt's log-probabilities where they are asked for.
    fn computed(&mut self, chunk: &Chunk, hidden: &Buffer, row: usize) -> Result<()> {
        let s = &mut self.running[chunk.at];
        let (from, to) = (s.computed, s.computed + chunk.tokens);
        s.computed = to;
        if self.draft.is_some() {
            s.drafted = to;
        }
        let alternatives = s.job.params.logprobs.unwrap_or(0);
        if s.job.params.prompt_logprobs {
            if from == 0 {
                s.prompt_logs.push(TokenLog { id: s.tokens[0], logprob: None, top: Vec::new() });
            }
            let rows: Vec<usize> = (row..row + to.min(s.job.prompt.len() - 1) - from).collect();
            let vocab = self.runner.model.config().vocab_size;
            for rows in rows.chunks(LOGIT_ROWS) {
                let logits = self.runner.prefill_logits(hidden, rows)?;
                for (at, logits) in rows.iter().zip(logits.chunks_exact(vocab)) {
                    s.prompt_logs.push(log_of(logits, s.tokens[from + at - row + 1], alternatives));
                }
            }
        }
        if to < s.job.prompt.len() {
            return Ok(());
        }
        if s.job.params.prompt_logprobs {
            let logs = std::mem::take(&mut s.prompt_logs);
            s.send(Event::Prompt(logs));
        }
        if s.job.params.max_tokens == 0 { s.end_empty(&self.metrics) } else { Ok(()) }
    }

    /// One token (more with a draft model) for every sequence whose prompt is computed.
    fn decode(&mut self) {
        let ready: Vec<usize> = (0..self.running.len()).filter(|i| self.running[*i].decodes()).collect();
        if ready.is_empty() {
            return;
        }
        let speculates = self.draft.is_some()
            && ready.len() <= self.options.draft_max_running
            && ready.iter().any(|i| !self.running[*i].job.params.without_draft);
        let done = if speculates { self.speculate(&ready) } else { self.step(&ready) };
        if let Err(e) = done {
            for i in ready {
                if !self.running[i].over {
                    self.running[i].fail(&e.to_string());
                }
            }
        }
    }

    fn step(&mut self, ready: &[usize]) -> Result<()> {
        let row = |i: &usize| {
            let s = &self.running[*i];
            (s.slot, s.computed, s.tokens[s.computed])
        };
        let rows: Vec<_> = ready.iter().map(row).collect();
        let logits = self.runner.decode(&rows)?;
        if ready.iter().all(|i| self.running[*i].is_plain()) {
            let best = self.runner.argmax(&logits)?;
            for (i, id) in ready.iter().zip(best) {
                self.take(*i, id, TokenLog { id, logprob: None, top: Vec::new() });
            }
            return Ok(());
        }
        if ready.iter().all(|i| self.running[*i].is_drawn()) {
            let draws: Vec<_> = ready.iter().map(|i| self.running[*i].draw()).collect();
            for (i, id) in ready.iter().zip(self.runner.draw(&logits, &draws)?) {
                self.take(*i, id, TokenLog { id, logprob: None, top: Vec::new() });
            }
            return Ok(());
        }
        let mut host = self.runner.download(&logits)?;
        let vocab = self.runner.model.config().vocab_size;
        for (i, logits) in ready.iter().zip(host.chunks_exact_mut(vocab)) {
            match self.running[*i].choose(logits) {
                Ok((id, log)) => self.take(*i, id, log),
                Err(e) => self.running[*i].fail(&e.to_string()),
            }
        }
        Ok(())
    }

    /// A computed step's token for sequence `i`.
    pub(super) fn take(&mut self, i: usize, id: u32, log: TokenLog) {
        let s = &mut self.running[i];
        s.computed += 1;
        if let Err(e) = s.accept(id, log, &self.eos, &self.metrics) {
            s.fail(&e.to_string());
        }
    }
}

/// A prompt can be kept when the draft model has all of it too.
fn draft_ok(draft: &Option<Runner>, drafted: usize, done: usize) -> bool {
    draft.is_none() || drafted == done
}
