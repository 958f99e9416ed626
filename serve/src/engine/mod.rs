//! The engine: requests in, tokens out, one thread that owns the model's cache.
//!
//! A step gives prompts that wait a share of [`EngineOptions::prefill_tokens`], then every running sequence one token
//! in one pass over the weights. A request is admitted when the pages it may need at most are free, so that nothing
//! admitted is ever thrown out again. Prompts that a finished or running request has already computed are taken over
//! page by page. Only prompts are shared, never generated tokens: these are computed by decode arithmetic, and a text
//! must not depend on what others did before.

mod run;
mod scheduler;
mod sequence;
mod slots;
mod speculate;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_model::{Model, Sampling};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::error::{Result, ServeError};
use crate::guide::{Form, Guides};
use crate::metrics::Metrics;
use scheduler::Scheduler;

/// Sizes of the engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Sequences that run at the same time.
    pub max_concurrent: usize,
    /// Tokens the cache holds, shared prompts counted once; rounded up to pages.
    pub kv_tokens: usize,
    /// Longest prompt plus answer; the model's own limit where that is less.
    pub max_len: usize,
    /// Prompt tokens of one step.
    pub prefill_tokens: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompts kept for requests to come (0: none).
    pub kept_prompts: usize,
    /// Tokens a draft model proposes at a time.
    pub draft_tokens: usize,
    /// With a draft model: sequences up to which it is asked; beyond, weights are shared well enough without.
    pub draft_max_running: usize,
    /// How keys and values are kept, for `/metrics`.
    pub kv_format: &'static str,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_concurrent: 64,
            kv_tokens: 32_768,
            max_len: usize::MAX,
            prefill_tokens: 256,
            max_queue: 256,
            kept_prompts: 64,
            draft_tokens: 4,
            draft_max_running: 4,
            kv_format: "float",
        }
    }
}

/// What a request asks for.
#[derive(Clone, Debug, Default)]
pub struct Params {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Taken off the logit of a token that was generated before.
    pub presence_penalty: f32,
    /// Taken off for each time it was.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end it, besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Goes on after the model's end tokens.
    pub ignore_eos: bool,
    /// Leaves special tokens out of the text.
    pub skip_special: bool,
    /// Alternatives with each token's log-probability; `None`: no log-probabilities.
    pub logprobs: Option<usize>,
    /// Log-probabilities of the prompt's tokens too.
    pub prompt_logprobs: bool,
    /// What the text must be.
    pub form: Option<Form>,
    /// Answers without asking the draft model, where there is one: the text is the same.
    pub without_draft: bool,
}

/// A token and its log-probability under the model (before temperature and filters).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLog {
    /// Token.
    pub id: u32,
    /// Natural logarithm; `None` for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The most likely tokens there.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token, a stop string, or a complete form.
    Stop,
    /// `max_tokens`.
    Length,
}

/// Tokens a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Generated.
    pub completion: usize,
    /// Of the prompt, taken over from another request.
    pub cached: usize,
    /// Proposed by the draft model.
    pub drafted: usize,
    /// Of these, what the model itself would have said.
    pub accepted: usize,
}

/// What a request hears.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt's log-probabilities, where asked for; comes first.
    Prompt(Vec<TokenLog>),
    /// Text (possibly empty, while a character or a stop string is incomplete) and the tokens since the last event.
    Piece {
        /// What is said.
        text: String,
        /// Its tokens, where log-probabilities are asked for.
        tokens: Vec<TokenLog>,
        /// Tokens read and made so far.
        usage: Usage,
    },
    /// The end.
    Done {
        /// Why.
        finish: Finish,
        /// Tokens read and made.
        usage: Usage,
    },
    /// The end, by a fault.
    Failed(String),
}

impl Event {
    /// Tokens read and made up to here, as far as the event tells.
    pub fn usage(&self) -> Usage {
        match self {
            Self::Prompt(logs) => Usage { prompt: logs.len(), ..Usage::default() },
            Self::Piece { usage, .. } | Self::Done { usage, .. } => *usage,
            Self::Failed(_) => Usage::default(),
        }
    }
}

/// One answer to be made. Dropping the receiver cancels it.
pub struct Job {
    /// Which of a request's answers; sent along with each event.
    pub index: usize,
    /// Tokens.
    pub prompt: Vec<u32>,
    /// What is asked for.
    pub params: Params,
    /// Where events go.
    pub events: UnboundedSender<(usize, Event)>,
    /// When it came.
    pub arrived: Instant,
}

/// A model and its tokenizer, with a draft model where there is one.
pub struct Models {
    /// Answers are its.
    pub model: Model,
    /// Proposes tokens; has the same vocabulary.
    pub draft: Option<Model>,
    /// Tokenizer of both.
    pub tokenizer: Arc<Tokenizer>,
}

/// The engine's front: any thread may submit.
pub struct Engine {
    jobs: mpsc::Sender<Job>,
    waiting: Arc<AtomicUsize>,
    closing: Arc<AtomicBool>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    guides: Guides,
    vocab: usize,
    max_len: usize,
    room: usize,
    max_queue: usize,
}

impl Engine {
    /// Makes the cache and starts the thread. The thread ends when the engine is dropped and nothing runs.
    pub fn start(models: Models, mut options: EngineOptions) -> Result<(Self, JoinHandle<()>)> {
        let config = models.model.config().clone();
        options.max_len = options.max_len.min(config.max_position_embeddings);
        if options.max_concurrent == 0 || options.prefill_tokens == 0 || options.max_len < 2 {
            return Err(ServeError::Options("sizes of the engine must not be zero".into()));
        }
        if let Some(d) = &models.draft
            && d.config().vocab_size != config.vocab_size
        {
            let (draft, own) = (d.config().vocab_size, config.vocab_size);
            return Err(ServeError::Options(format!(
                "the draft model has a vocabulary of {draft}, the model one of {own}\nhint: a draft must share the model's tokenizer"
            )));
        }
        let guides = Guides::new(&models.tokenizer, config.vocab_size)?;
        let (jobs, inbox) = mpsc::channel();
        let (waiting, closing) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let metrics = Arc::new(Metrics::default());
        let (max_len, max_queue, tokenizer) = (options.max_len, options.max_queue, models.tokenizer.clone());
        let scheduler = Scheduler::new(models, options, inbox, waiting.clone(), metrics.clone())?;
        let room = scheduler.room();
        let spawned = std::thread::Builder::new().name("engine".into()).spawn(move || scheduler.run());
        let thread = spawned.map_err(|source| ServeError::Io { what: "cannot start the engine".into(), source })?;
        let vocab = config.vocab_size;
        Ok((Self { jobs, waiting, closing, metrics, tokenizer, guides, vocab, max_len, room, max_queue }, thread))
    }

    /// Longest prompt plus answer.
    pub fn max_len(&self) -> usize {
        self.max_len.min(self.room)
    }

    /// Accepts jobs that come together (the answers of one request), or none of them.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<()> {
        if self.closing.load(Ordering::SeqCst) {
            return Err(ServeError::Closing);
        }
        for job in &jobs {
            self.check(job)?;
        }
        let waiting = self.waiting.fetch_add(jobs.len(), Ordering::SeqCst);
        if waiting + jobs.len() > self.max_queue.max(jobs.len()) {
            self.waiting.fetch_sub(jobs.len(), Ordering::SeqCst);
            self.metrics.refused.fetch_add(1, Ordering::Relaxed);
            return Err(ServeError::Busy { waiting });
        }
        jobs.into_iter().try_for_each(|job| self.jobs.send(job).map_err(|_| ServeError::Closing))
    }

    /// One answer, heard event by event; returns at its end. Not from within an async runtime.
    pub fn answer(&self, prompt: Vec<u32>, params: Params, heard: &mut dyn FnMut(Event)) -> Result<Usage> {
        let (events, mut receiver) = unbounded_channel();
        self.submit(vec![Job { index: 0, prompt, params, events, arrived: Instant::now() }])?;
        loop {
            match receiver.blocking_recv() {
                Some((_, Event::Done { usage, .. })) => return Ok(usage),
                Some((_, Event::Failed(why))) => return Err(ServeError::Request(why)),
                Some((_, event)) => heard(event),
                None => return Err(ServeError::Closing),
            }
        }
    }

    fn check(&self, job: &Job) -> Result<()> {
        let bad = |text: String| Err(ServeError::Request(text));
        let (prompt, most) = (job.prompt.len(), job.params.max_tokens);
        if prompt == 0 {
            return bad("the prompt has no tokens".into());
        }
        if prompt.saturating_add(most) > self.max_len() {
            let max = self.max_len();
            return bad(format!(
                "the prompt has {prompt} tokens and up to {most} are asked for: together more than the {max} that fit"
            ));
        }
        if let Some(id) = job.prompt.iter().find(|id| **id as usize >= self.vocab) {
            return bad(format!("token {id} is outside the vocabulary of {}", self.vocab));
        }
        if let Some(form) = &job.params.form {
            self.guides.guide(form)?;
        }
        Ok(())
    }

    /// Refuses what comes from now on; what was accepted goes on.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Whether [`Self::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// When a refused request may try again: what the requests that wait will take, at the rate of late.
    pub fn retry_after(&self) -> Duration {
        let waiting = self.waiting.load(Ordering::SeqCst) as f64;
        let each = self.metrics.mean_latency().unwrap_or(1.0);
        Duration::from_secs_f64((waiting * each / 8.0).clamp(1.0, 60.0))
    }
}
