//! One answer in the making.

use std::sync::Arc;
use std::time::Instant;

use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_kernels::draw::Draw;
use lowbit_model::sampling::{argmax, log_sum_exp, sample, top};

use super::{Event, Finish, Job, TokenLog, Usage};
use crate::error::Result;
use crate::guide::{Guide, Guides};
use crate::metrics::{Ended, Metrics};
use crate::text::TextStream;

/// A job with a slot.
pub struct Sequence {
    pub job: Job,
    pub slot: usize,
    /// Prompt, then answer.
    pub tokens: Vec<u32>,
    /// Tokens in the cache.
    pub computed: usize,
    /// Tokens in the draft model's cache.
    pub drafted: usize,
    pub usage: Usage,
    /// Log-probabilities of the prompt so far.
    pub prompt_logs: Vec<TokenLog>,
    /// Set once it has ended.
    pub over: bool,
    text: TextStream,
    guide: Option<Guide>,
    admitted: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
}

/// Log-probability of `id` and the `n` most likely tokens.
pub fn log_of(logits: &[f32], id: u32, n: usize) -> TokenLog {
    let z = log_sum_exp(logits);
    let log = |id: u32| (f64::from(logits[id as usize]) - z) as f32;
    TokenLog { id, logprob: Some(log(id)), top: top(logits, n).into_iter().map(|t| (t, log(t))).collect() }
}

impl Sequence {
    /// Starts a job whose first `cached` tokens are in the slot already.
    pub fn new(job: Job, slot: usize, cached: usize, tokenizer: &Arc<Tokenizer>, guides: &Guides) -> Result<Self> {
        let p = &job.params;
        let text = TextStream::new(tokenizer.clone(), &job.prompt, p.stop.clone(), p.skip_special);
        let guide = p.form.as_ref().map(|f| guides.guide(f)).transpose()?;
        let usage = Usage { prompt: job.prompt.len(), cached, ..Usage::default() };
        let tokens = job.prompt.clone();
        let prompt_logs = Vec::new();
        Ok(Self {
            job,
            slot,
            tokens,
            computed: cached,
            drafted: cached,
            usage,
            prompt_logs,
            over: false,
            text,
            guide,
            admitted: Instant::now(),
            first: None,
            last: None,
        })
    }

    /// Its slot, how much of it is computed, and the next `tokens` of its prompt.
    pub fn part(&self, tokens: usize) -> (usize, usize, &[u32]) {
        (self.slot, self.computed, &self.tokens[self.computed..self.computed + tokens])
    }

    /// Whether its prompt is computed and a token can follow.
    pub fn decodes(&self) -> bool {
        !self.over && self.computed >= self.job.prompt.len()
    }

    /// Whether the most likely token is all it needs to know.
    pub fn is_plain(&self) -> bool {
        self.job.params.sampling.temperature <= 0.0 && self.is_drawn()
    }

    /// Whether its next token follows from its logits as they are, and is all it needs to know.
    pub fn is_drawn(&self) -> bool {
        self.job.params.logprobs.is_none() && !self.reshapes()
    }

    /// How its next token is drawn.
    pub fn draw(&self) -> Draw {
        self.job.params.sampling.draw(self.usage.completion as u64)
    }

    /// Whether its logits are changed before a token is chosen.
    pub fn reshapes(&self) -> bool {
        let p = &self.job.params;
        self.guide.is_some() || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 || !p.logit_bias.is_empty()
    }

    /// Tokens that may still come.
    pub fn left(&self) -> usize {
        self.job.params.max_tokens.saturating_sub(self.usage.completion)
    }

    /// Chooses the next token from its logits, which may be changed.
    pub fn choose(&mut self, logits: &mut [f32]) -> Result<(u32, TokenLog)> {
        let wanted = self.job.params.logprobs;
        let raw = (wanted.is_some() && self.reshapes()).then(|| logits.to_vec());
        let p = &self.job.params;
        for (id, bias) in &p.logit_bias {
            logits[*id as usize] += bias;
        }
        if p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            let mut made = self.tokens[self.job.prompt.len()..].to_vec();
            made.sort_unstable();
            for same in made.chunk_by(|a, b| a == b) {
                logits[same[0] as usize] -= p.presence_penalty + p.frequency_penalty * same.len() as f32;
            }
        }
        if let Some(guide) = &mut self.guide {
            guide.apply(logits)?;
        }
        let id = if p.sampling.temperature <= 0.0 {
            argmax(logits)
        } else {
            sample(logits, &p.sampling, self.usage.completion as u64)
        };
        let log = match wanted {
            Some(n) => log_of(raw.as_deref().unwrap_or(logits), id, n),
            None => TokenLog { id, logprob: None, top: Vec::new() },
        };
        Ok((id, log))
    }

    /// Takes the chosen token: text, stops, events.
    pub fn accept(&mut self, id: u32, log: TokenLog, eos: &[u32], metrics: &Metrics) -> Result<()> {
        let now = Instant::now();
        match self.last {
            None => metrics.first_token.observe(now.duration_since(self.job.arrived)),
            Some(last) => metrics.inter_token.observe(now.duration_since(last)),
        }
        self.first = self.first.or(Some(now));
        self.last = Some(now);
        self.tokens.push(id);
        self.usage.completion += 1;
        metrics.generated.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if let Some(guide) = &mut self.guide {
            guide.accept(id)?;
        }
        let p = &self.job.params;
        let ends = (!p.ignore_eos && eos.contains(&id)) || p.stop_tokens.contains(&id);
        let tokens = if p.logprobs.is_some() { vec![log] } else { Vec::new() };
        if ends {
            let text = self.text.finish()?;
            return self.end(Finish::Stop, text, tokens, metrics);
        }
        let piece = self.text.push(id)?;
        if piece.stopped {
            return self.end(Finish::Stop, piece.text, tokens, metrics);
        }
        if self.guide.as_ref().is_some_and(Guide::is_complete) || self.left() == 0 {
            let finish = if self.left() == 0 { Finish::Length } else { Finish::Stop };
            let text = piece.text + &self.text.finish()?;
            return self.end(finish, text, tokens, metrics);
        }
        if !piece.text.is_empty() || !tokens.is_empty() {
            self.send(Event::Piece { text: piece.text, tokens, usage: self.usage });
        }
        Ok(())
    }

    /// Ends a job that asked for no tokens.
    pub fn end_empty(&mut self, metrics: &Metrics) -> Result<()> {
        self.end(Finish::Length, String::new(), Vec::new(), metrics)
    }

    fn end(&mut self, finish: Finish, text: String, tokens: Vec<TokenLog>, metrics: &Metrics) -> Result<()> {
        self.over = true;
        let (usage, max_tokens, arrived) = (self.usage, self.job.params.max_tokens, self.job.arrived);
        let first_and_last = self.first.zip(self.last);
        // Before it is told: whoever has the answer finds it counted.
        metrics.finished(&Ended {
            finish,
            usage,
            max_tokens,
            arrived,
            admitted: self.admitted,
            tokens: first_and_last,
        });
        self.send(Event::Piece { text, tokens, usage });
        self.send(Event::Done { finish, usage });
        Ok(())
    }

    /// Ends it by a fault.
    pub fn fail(&mut self, why: &str) {
        self.over = true;
        self.send(Event::Failed(why.to_string()));
    }

    /// Sends an event; a receiver that is gone shows at the next step.
    pub fn send(&self, event: Event) {
        let _ = self.job.events.send((self.job.index, event));
    }
}
