//! Paged keys and values on the host.
//!
//! A slot is a table of pages of [`PAGE`] tokens. Pages are allocated when the first token of theirs is appended,
//! freed with the last slot that holds them, and shared between slots by [`Cache::fork`]; a slot that writes into a
//! shared page gets a copy of its own first. Memory is therefore that of the tokens held, not of slots · capacity.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::checks;
use crate::backend::{KvBuffer, KvUsage, Segment};
use crate::error::{KernelError, Result};

/// Tokens of a page.
pub const PAGE: usize = 64;

/// `[kv_heads][PAGE][head_dim]` each: within a page one head's tokens are contiguous.
struct Page {
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Pages alive in this cache.
    live: Arc<AtomicUsize>,
}

impl Page {
    fn new(len: usize, live: &Arc<AtomicUsize>) -> Self {
        live.fetch_add(1, Ordering::Relaxed);
        Self { keys: vec![0.0; len], values: vec![0.0; len], live: live.clone() }
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        self.live.fetch_add(1, Ordering::Relaxed);
        Self { keys: self.keys.clone(), values: self.values.clone(), live: self.live.clone() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keys and values of every slot of one layer.
pub struct Cache {
    slots: Vec<Vec<Arc<Page>>>,
    live: Arc<AtomicUsize>,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Cache {
    /// An empty cache wrapped for the op vocabulary.
    pub fn buffer(slots: usize, capacity: usize, kv_heads: usize, head_dim: usize) -> Result<KvBuffer> {
        let width = checks::product("cache", kv_heads, head_dim)?;
        checks::product("cache", checks::product("cache", slots, capacity)?, width)?;
        checks::product("page", PAGE, width)?;
        let tables = (0..slots).map(|_| Vec::new()).collect();
        let memory = Self { slots: tables, live: Arc::new(AtomicUsize::new(0)), kv_heads, head_dim };
        Ok(KvBuffer { slots, capacity, width, memory: Box::new(memory) })
    }

    /// The cache inside a handle made by [`Self::buffer`].
    pub fn of<'a>(backend: &'static str, kv: &'a KvBuffer) -> Result<&'a Self> {
        kv.memory.downcast_ref().ok_or(KernelError::ForeignHandle { backend, what: "cache" })
    }

    /// As [`Self::of`], writable.
    pub fn of_mut<'a>(backend: &'static str, kv: &'a mut KvBuffer) -> Result<&'a mut Self> {
        kv.memory.downcast_mut().ok_or(KernelError::ForeignHandle { backend, what: "cache" })
    }

    /// Copies rows of k and v `[T, kv_heads · head_dim]` in; segments already checked.
    pub fn append(&mut self, k: &[f32], v: &[f32], segments: &[Segment]) {
        let (d, width) = (self.head_dim, self.kv_heads * self.head_dim);
        for s in segments {
            let table = &mut self.slots[s.slot];
            while s.tokens > 0 && table.len() * PAGE < s.past + s.tokens {
                table.push(Arc::new(Page::new(PAGE * width, &self.live)));
            }
            for i in 0..s.tokens {
                let position = s.past + i;
                let page = Arc::make_mut(&mut table[position / PAGE]);
                for h in 0..self.kv_heads {
                    let from = (s.row + i) * width + h * d;
                    let to = (h * PAGE + position % PAGE) * d;
                    page.keys[to..to + d].copy_from_slice(&k[from..from + d]);
                    page.values[to..to + d].copy_from_slice(&v[from..from + d]);
                }
            }
        }
    }

    /// Segments read only positions that were written.
    pub fn check_held(&self, backend: &'static str, segments: &[Segment]) -> Result<()> {
        for s in segments.iter().filter(|s| s.tokens > 0) {
            let held = self.slots.get(s.slot).map_or(0, |t| t.len() * PAGE);
            checks::below(backend, "attention", "cached token", s.past + s.tokens - 1, held)?;
        }
        Ok(())
    }

    /// Keys and values of `tokens` of one head, `[run, head_dim]` a piece, in order; the tokens are held.
    pub fn runs(&self, slot: usize, head: usize, tokens: Range<usize>) -> impl Iterator<Item = (&[f32], &[f32])> {
        let (table, d) = (&self.slots[slot], self.head_dim);
        let first = tokens.start / PAGE;
        (first..tokens.end.div_ceil(PAGE)).map(move |p| {
            let begin = tokens.start.max(p * PAGE) - p * PAGE;
            let end = tokens.end.min((p + 1) * PAGE) - p * PAGE;
            let range = (head * PAGE + begin) * d..(head * PAGE + end) * d;
            (&table[p].keys[range.clone()], &table[p].values[range])
        })
    }

    /// Slot `to` becomes the first `tokens` tokens of slot `from`: whole pages shared, a partial last page copied.
    pub fn fork(&mut self, from: usize, tokens: usize, to: usize) {
        let keep = tokens.div_ceil(PAGE);
        if from == to {
            self.slots[to].truncate(keep);
            return;
        }
        let mut table: Vec<Arc<Page>> = self.slots[from].iter().take(keep).cloned().collect();
        if !tokens.is_multiple_of(PAGE)
            && let Some(last) = table.last_mut()
        {
            *last = Arc::new(Page::clone(last));
        }
        self.slots[to] = table;
    }

    /// Forgets a slot's tokens.
    pub fn release(&mut self, slot: usize) {
        self.slots[slot] = Vec::new();
    }

    /// Pages alive.
    pub fn usage(&self) -> KvUsage {
        KvUsage { page_tokens: PAGE, pages: self.live.load(Ordering::Relaxed) }
    }

    /// Whether slot `slot` holds `tokens` tokens.
    pub fn holds(&self, slot: usize, tokens: usize) -> bool {
        self.slots.get(slot).is_some_and(|t| tokens <= t.len() * PAGE)
    }
}
