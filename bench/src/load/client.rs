//! The client: one thread, one poller, all connections.
//!
//! A thread of our own instead of a runtime, because the two things that falsify a load test are decided here: a request
//! starts at its scheduled time (timers to the microsecond, bodies made ahead by another thread), and a chunk is stamped
//! in the same call that read it. Open-loop times count from the schedule, so a stalled server or client cannot hide the
//! requests it kept waiting (coordinated omission).

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Events, Interest, Token};

use crate::load::connection::{Active, Connection, Step};
use crate::load::data::Item;
use crate::load::error::{LoadError, Result};
use crate::load::openai::{Dialect, RequestHead};
use crate::load::timer::{Waiter, thread_cpu};
use crate::load::trace::{Outcome, RequestTrace};

/// A request, ready to go.
pub struct Job {
    /// Bytes on the wire.
    pub request: Vec<u8>,
    /// Prompt tokens as the data set knows them.
    pub input_tokens: Option<u32>,
    /// The item, where turns follow this one.
    pub item: Option<Item>,
}

/// Who decides when a request starts.
pub enum Pace {
    /// So many at once; the next starts when one ends. A request that the server refuses for now (429) keeps its stream, waits as
    /// long as `Retry-After` says and is sent again; its times count from its first start.
    Closed {
        /// Streams.
        streams: usize,
    },
    /// At the times of a schedule (nanoseconds from the start), whatever the server does.
    Open {
        /// Ascending times.
        schedule: Box<dyn Iterator<Item = u64> + Send>,
        /// At most so many at once; a request over it waits, and its wait counts.
        cap: Option<usize>,
    },
}

/// When a stage ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// No request is scheduled after this.
    pub duration: Option<Duration>,
    /// Requests at most.
    pub requests: Option<u64>,
    /// Stop at so many failures.
    pub errors: Option<u64>,
    /// Stop when this share of at least 20 finished requests failed.
    pub error_rate: Option<f64>,
    /// A request may take so long.
    pub request_timeout: Duration,
    /// After the end, wait so long for what is in flight; the rest is cancelled.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            duration: None,
            requests: None,
            errors: None,
            error_rate: None,
            request_timeout: Duration::from_secs(600),
            grace: Duration::from_secs(30),
        }
    }
}

/// What the observer of a stage sees and may stop.
pub trait Observer {
    /// A request was sent at `now_ns`.
    fn started(&mut self, now_ns: u64, in_flight: usize) {
        let _ = (now_ns, in_flight);
    }
    /// A request ended. A reason stops the stage.
    fn finished(&mut self, trace: &RequestTrace, in_flight: usize) -> Option<String>;
    /// Called every tenth of a second. A reason stops the stage at once, without grace.
    fn tick(&mut self, now_ns: u64, in_flight: usize) -> Option<String> {
        let _ = (now_ns, in_flight);
        None
    }
}

/// A stage as it happened.
#[derive(Clone, Debug)]
pub struct StageTraces {
    /// Every request, in the order of ending.
    pub traces: Vec<RequestTrace>,
    /// When the last request could have been scheduled.
    pub stop_ns: u64,
    /// When everything was over.
    pub end_ns: u64,
    /// Why it ended.
    pub stopped_by: String,
    /// CPU time of the client's thread without spinning, as a share of the wall time.
    pub cpu_frac: Option<f64>,
    /// Connections opened.
    pub connections: u64,
    /// Requests sent again on a new connection, because the server had closed the idle one.
    pub resent: u64,
    /// Refusals of a closed loop that were waited out.
    pub rejected: u64,
}

/// Where and how requests are sent.
#[derive(Clone)]
pub struct ClientConfig {
    /// Address.
    pub address: SocketAddr,
    /// Constant part of a request.
    pub head: RequestHead,
    /// Body of a follow-up turn.
    pub dialect: Dialect,
}

struct Client<'a> {
    config: &'a ClientConfig,
    waiter: Waiter,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    idle: Vec<usize>,
    buffer: Vec<u8>,
    in_flight: usize,
    follow_ups: VecDeque<Job>,
    /// Refused requests of a closed loop, by the time they go out again and a number that tells equal times apart.
    waiting: Option<BTreeMap<(u64, u64), Active>>,
    traces: Vec<RequestTrace>,
    failed: u64,
    connections: u64,
    resent: u64,
    rejected: u64,
    stop: Option<String>,
}

/// Runs one stage. `jobs` must not run dry before the limits are reached, else the stage ends with it.
pub fn run(
    config: &ClientConfig,
    pace: Pace,
    limits: &Limits,
    jobs: &Receiver<Job>,
    observer: &mut dyn Observer,
) -> Result<StageTraces> {
    let mut client = Client {
        config,
        waiter: Waiter::new()?,
        slots: Vec::new(),
        free: Vec::new(),
        idle: Vec::new(),
        buffer: vec![0; 64 << 10],
        in_flight: 0,
        follow_ups: VecDeque::new(),
        waiting: matches!(pace, Pace::Closed { .. }).then(BTreeMap::new),
        traces: Vec::new(),
        failed: 0,
        connections: 0,
        resent: 0,
        rejected: 0,
        stop: None,
    };
    client.drive(pace, limits, jobs, observer)
}

impl Client<'_> {
    fn drive(
        &mut self,
        pace: Pace,
        limits: &Limits,
        jobs: &Receiver<Job>,
        observer: &mut dyn Observer,
    ) -> Result<StageTraces> {
        const TICK: u64 = 100_000_000;
        let cpu_before = thread_cpu();
        let ns = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let end_by_time = limits.duration.map_or(u64::MAX, ns);
        let (mut schedule, limit) = match pace {
            Pace::Closed { streams } => (None, streams.max(1)),
            Pace::Open { schedule, cap } => (Some(schedule), cap.unwrap_or(usize::MAX)),
        };
        let mut events = Events::with_capacity(1024);
        let (mut started, mut next_tick) = (0u64, TICK);
        let mut due = schedule.as_mut().map_or(Some(0), Iterator::next);
        // When a closed stream became free; a waiting open request keeps its scheduled time instead.
        let mut stop_ns = None;
        while stop_ns.is_none() {
            self.resume()?;
            let now = self.waiter.now();
            while self.stop.is_none() && self.streams() < limit && due.is_some_and(|d| d <= self.waiter.now()) {
                let at = if schedule.is_some() { due.unwrap_or(now) } else { self.waiter.now() };
                if at >= end_by_time || limits.requests.is_some_and(|n| started >= n) {
                    break;
                }
                // A follow-up takes the place of a new conversation in a closed loop; in an open one it comes on top, below.
                let job = match self.follow_ups.pop_front().filter(|_| schedule.is_none()) {
                    Some(job) => job,
                    None => match jobs.recv() {
                        Ok(job) => job,
                        Err(_) => {
                            self.stop = Some("data ended".into());
                            break;
                        }
                    },
                };
                started += 1;
                self.begin(job, at, observer)?;
                if let Some(s) = &mut schedule {
                    due = s.next();
                }
            }
            while schedule.is_some() && self.stop.is_none() && self.in_flight < limit {
                let Some(job) = self.follow_ups.pop_front() else { break };
                if limits.requests.is_some_and(|n| started >= n) {
                    break;
                }
                started += 1;
                let at = self.waiter.now();
                self.begin(job, at, observer)?;
            }
            let now = self.waiter.now();
            if limits.requests.is_some_and(|n| started >= n) {
                self.stop.get_or_insert_with(|| "requests".into());
            } else if now >= end_by_time {
                self.stop.get_or_insert_with(|| "duration".into());
            } else if due.is_none() && self.follow_ups.is_empty() && self.in_flight == 0 {
                self.stop.get_or_insert_with(|| "schedule ended".into());
            }
            if self.stop.is_some() {
                stop_ns = Some(now.min(end_by_time));
                break;
            }
            let full = self.streams() >= limit;
            let next = due.filter(|_| !full).unwrap_or(u64::MAX).min(end_by_time).min(next_tick).min(self.resumes());
            self.turn(&mut events, next, limits, observer)?;
            self.tick(&mut next_tick, TICK, limits, observer);
        }
        let stop_ns = stop_ns.unwrap_or(0);
        // The requests that were asked for are waited for; those that a time limit happened to leave get the grace.
        let counted = self.stop.as_deref().is_some_and(|s| s == "requests" || s == "schedule ended");
        let patience = if counted { limits.request_timeout.max(limits.grace) } else { limits.grace };
        let give_up = self.waiter.now().saturating_add(ns(patience));
        let at_once = self.stop.as_deref().is_some_and(|s| s == "interrupted" || s == "saturated");
        if !counted || at_once {
            self.cancel_waiting(limits, observer);
        }
        while self.streams() > 0 && !at_once && self.waiter.now() < give_up {
            self.resume()?;
            self.turn(&mut events, give_up.min(next_tick).min(self.resumes()), limits, observer)?;
            self.tick(&mut next_tick, TICK, limits, observer);
            if self.stop.as_deref() == Some("interrupted") {
                break;
            }
        }
        let end_ns = self.waiter.now();
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|c| c.active.is_some()) {
                self.finish(slot, Outcome::Cancelled, false, limits, observer);
            }
        }
        self.cancel_waiting(limits, observer);
        let wall = Duration::from_nanos(end_ns);
        let cpu_frac = cpu_before
            .zip(thread_cpu())
            .filter(|_| !wall.is_zero())
            .map(|(a, b)| (b.saturating_sub(a).saturating_sub(self.waiter.spun())).as_secs_f64() / wall.as_secs_f64());
        Ok(StageTraces {
            traces: std::mem::take(&mut self.traces),
            stop_ns,
            end_ns,
            stopped_by: self.stop.clone().unwrap_or_default(),
            cpu_frac,
            connections: self.connections,
            resent: self.resent,
            rejected: self.rejected,
        })
    }

    /// Streams that are taken: in flight, or waiting to be sent again.
    fn streams(&self) -> usize {
        self.in_flight + self.waiting.as_ref().map_or(0, BTreeMap::len)
    }

    /// When the next refused request goes out again.
    fn resumes(&self) -> u64 {
        self.waiting.as_ref().and_then(BTreeMap::first_key_value).map_or(u64::MAX, |((at, _), _)| *at)
    }

    /// Sends the refused requests again whose time has come.
    fn resume(&mut self) -> Result<()> {
        while self.resumes() <= self.waiter.now() {
            let Some((_, mut active)) = self.waiting.as_mut().and_then(BTreeMap::pop_first) else { break };
            active.rewind();
            self.dispatch(active, false)?;
        }
        Ok(())
    }

    /// Ends the refused requests that still wait.
    fn cancel_waiting(&mut self, limits: &Limits, observer: &mut dyn Observer) {
        while let Some((_, active)) = self.waiting.as_mut().and_then(BTreeMap::pop_first) {
            let (trace, ..) = active.into_trace(self.waiter.now(), Outcome::Cancelled);
            self.settle(trace, limits, observer);
        }
    }

    /// Waits once and works off what happened.
    fn turn(&mut self, events: &mut Events, until: u64, limits: &Limits, observer: &mut dyn Observer) -> Result<()> {
        self.waiter.wait(events, until)?;
        for event in events.iter() {
            let slot = event.token().0;
            // What was readable comes first: an answer may be whole though the connection is already closing.
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                self.read(slot, limits, observer)?;
            }
            if event.is_writable() {
                let step = match self.slots.get_mut(slot) {
                    Some(Some(c)) => c.writable(),
                    _ => continue,
                };
                self.apply(slot, step, limits, observer)?;
            }
        }
        Ok(())
    }

    fn read(&mut self, slot: usize, limits: &Limits, observer: &mut dyn Observer) -> Result<()> {
        let waiter = &self.waiter;
        let step = match self.slots.get_mut(slot) {
            Some(Some(c)) => c.readable(&mut self.buffer, || waiter.now()),
            _ => return Ok(()),
        };
        self.apply(slot, step, limits, observer)
    }

    fn apply(&mut self, slot: usize, step: Step, limits: &Limits, observer: &mut dyn Observer) -> Result<()> {
        match step {
            Step::Waiting => Ok(()),
            Step::Finished(outcome, keep) => {
                self.finish(slot, outcome, keep, limits, observer);
                Ok(())
            }
            Step::Stale => {
                let active = self.slots.get_mut(slot).and_then(|s| s.as_mut()).and_then(|c| c.active.take());
                self.drop_connection(slot);
                if let Some(mut active) = active {
                    active.rewind();
                    self.resent += 1;
                    self.in_flight -= 1;
                    self.dispatch(active, true)?;
                }
                Ok(())
            }
        }
    }

    fn begin(&mut self, job: Job, scheduled: u64, observer: &mut dyn Observer) -> Result<()> {
        let sent = self.waiter.now();
        let active = Active::new(job.request, job.input_tokens, job.item, scheduled, sent);
        self.dispatch(active, false)?;
        observer.started(sent, self.in_flight);
        Ok(())
    }

    /// Puts a request on an idle connection, the one used last, or a new one.
    fn dispatch(&mut self, active: Active, fresh: bool) -> Result<()> {
        self.in_flight += 1;
        let slot = match self.idle.pop().filter(|_| !fresh) {
            Some(slot) => slot,
            None => match self.connect() {
                Ok(slot) => slot,
                Err(e) => {
                    self.in_flight -= 1;
                    let (trace, ..) = active.into_trace(self.waiter.now(), Outcome::Connect(e.to_string()));
                    self.keep(trace);
                    return Ok(());
                }
            },
        };
        let step = match self.slots.get_mut(slot) {
            Some(Some(c)) => c.start(active),
            _ => return Err(LoadError::Loop(std::io::Error::other("a connection vanished"))),
        };
        match step {
            Step::Waiting => {}
            Step::Stale => {
                let active = self.slots[slot].as_mut().and_then(|c| c.active.take());
                self.drop_connection(slot);
                self.in_flight -= 1;
                if let Some(mut a) = active {
                    a.rewind();
                    self.resent += 1;
                    return self.dispatch(a, true);
                }
            }
            Step::Finished(outcome, _) => {
                if let Some(a) = self.slots[slot].as_mut().and_then(|c| c.active.take()) {
                    let (trace, ..) = a.into_trace(self.waiter.now(), outcome);
                    self.keep(trace);
                }
                self.in_flight -= 1;
                self.drop_connection(slot);
            }
        }
        Ok(())
    }

    fn connect(&mut self) -> std::io::Result<usize> {
        let mut stream = TcpStream::connect(self.config.address)?;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.waiter.registry().register(&mut stream, Token(slot), Interest::READABLE | Interest::WRITABLE)?;
        self.slots[slot] = Some(Connection::new(stream));
        self.connections += 1;
        Ok(slot)
    }

    fn drop_connection(&mut self, slot: usize) {
        if let Some(mut c) = self.slots.get_mut(slot).and_then(Option::take) {
            let _ = self.waiter.registry().deregister(&mut c.stream);
            self.idle.retain(|&s| s != slot);
            self.free.push(slot);
        }
    }

    fn finish(&mut self, slot: usize, outcome: Outcome, keep: bool, limits: &Limits, observer: &mut dyn Observer) {
        let Some(active) = self.slots.get_mut(slot).and_then(|s| s.as_mut()).and_then(|c| c.active.take()) else {
            self.drop_connection(slot);
            return;
        };
        let refused = match (&outcome, self.slots.get(slot)) {
            (Outcome::Status(..), Some(Some(c))) => c.refused(),
            _ => None,
        };
        if keep {
            self.idle.push(slot);
        } else {
            self.drop_connection(slot);
        }
        self.in_flight -= 1;
        let now = self.waiter.now();
        if let (Some(waiting), Some(wait)) = (&mut self.waiting, refused) {
            let again = now.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
            // A request that would come too late is a failure, as any other that is not answered in its time.
            if u128::from(again.saturating_sub(active.scheduled_ns)) <= limits.request_timeout.as_nanos() {
                waiting.insert((again, self.rejected), active);
                self.rejected += 1;
                return;
            }
        }
        let (trace, item, answer) = active.into_trace(now, outcome);
        if let Some(next) = item.filter(|_| trace.ok()).and_then(|i| i.next_turn(answer)) {
            let body = self.config.dialect.body(&next.messages, next.output_tokens);
            let item = next.has_next().then_some(next);
            self.follow_ups.push_back(Job { request: self.config.head.with_body(&body), input_tokens: None, item });
        }
        self.settle(trace, limits, observer);
    }

    /// Takes a trace, and the consequences.
    fn settle(&mut self, trace: RequestTrace, limits: &Limits, observer: &mut dyn Observer) {
        if let Some(why) = observer.finished(&trace, self.in_flight) {
            self.stop.get_or_insert(why);
        }
        let bad = trace.outcome.failed();
        self.keep(trace);
        if bad && limits.errors.is_some_and(|n| self.failed >= n) {
            self.stop.get_or_insert_with(|| "errors".into());
        }
        let enough = self.traces.len() >= 20;
        if bad && enough && limits.error_rate.is_some_and(|r| self.failed as f64 > r * self.traces.len() as f64) {
            self.stop.get_or_insert_with(|| "error rate".into());
        }
    }

    fn keep(&mut self, trace: RequestTrace) {
        self.failed += u64::from(trace.outcome.failed());
        self.traces.push(trace);
    }

    fn tick(&mut self, next: &mut u64, every: u64, limits: &Limits, observer: &mut dyn Observer) {
        let now = self.waiter.now();
        if now < *next {
            return;
        }
        *next = now + every;
        let oldest = now.saturating_sub(u64::try_from(limits.request_timeout.as_nanos()).unwrap_or(u64::MAX));
        for slot in 0..self.slots.len() {
            let late = |c: &Connection| c.active.as_ref().is_some_and(|a| a.sent_ns < oldest);
            if self.slots[slot].as_ref().is_some_and(late) {
                self.finish(slot, Outcome::Timeout, false, limits, observer);
            }
        }
        if let Some(why) = observer.tick(now, self.in_flight) {
            self.stop = Some(why);
        }
    }
}
