//! Sleeping until a deadline or the next event of a socket, to the microsecond where the system can.
//!
//! `epoll_wait` counts milliseconds. On Linux a timer descriptor in the same poll set wakes at the nanosecond instead; the
//! last stretch before a deadline is spun through, because a wake-up takes that long. Elsewhere the poller's own
//! timeout is used.

use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};

use crate::load::error::{LoadError, Result};

/// Token of the timer itself.
pub const TIMER: Token = Token(usize::MAX);
/// A wake-up from a timer takes about this long; so long before the deadline we stop sleeping.
const SPIN: Duration = Duration::from_micros(60);

/// The poller and its timer.
pub struct Waiter {
    poll: Poll,
    start: Instant,
    spun: Duration,
    #[cfg(target_os = "linux")]
    timer: std::os::fd::OwnedFd,
}

impl Waiter {
    /// A poller whose clock starts now.
    pub fn new() -> Result<Self> {
        let poll = Poll::new().map_err(LoadError::Loop)?;
        #[cfg(target_os = "linux")]
        let timer = {
            use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
            use std::os::fd::AsRawFd;
            let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
                .map_err(|e| LoadError::Loop(e.into()))?;
            poll.registry()
                .register(&mut mio::unix::SourceFd(&fd.as_raw_fd()), TIMER, mio::Interest::READABLE)
                .map_err(LoadError::Loop)?;
            fd
        };
        Ok(Self {
            poll,
            start: Instant::now(),
            spun: Duration::ZERO,
            #[cfg(target_os = "linux")]
            timer,
        })
    }

    /// Nanoseconds since the clock started.
    pub fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Time spent spinning, which is no work.
    pub fn spun(&self) -> Duration {
        self.spun
    }

    /// Where sockets are registered.
    pub fn registry(&self) -> &mio::Registry {
        self.poll.registry()
    }

    /// Waits for events, at longest until `deadline_ns`.
    pub fn wait(&mut self, events: &mut Events, deadline_ns: u64) -> Result<()> {
        let left = Duration::from_nanos(deadline_ns.saturating_sub(self.now()));
        if left <= SPIN {
            let began = Instant::now();
            let result = self.poll_for(events, Duration::ZERO);
            if events.is_empty() && !left.is_zero() {
                std::hint::spin_loop();
                self.spun += began.elapsed();
            }
            return result;
        }
        let sleep = left - SPIN;
        #[cfg(target_os = "linux")]
        {
            use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let at = Timespec {
                tv_sec: i64::try_from(sleep.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(sleep.subsec_nanos()).max(1) as _,
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: zero, it_value: at })
                .map_err(|e| LoadError::Loop(e.into()))?;
            // The timeout is a net below the timer, nothing more.
            self.poll_for(events, sleep + Duration::from_millis(50))
        }
        #[cfg(not(target_os = "linux"))]
        self.poll_for(events, sleep)
    }

    fn poll_for(&mut self, events: &mut Events, timeout: Duration) -> Result<()> {
        match self.poll.poll(events, Some(timeout)) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            other => other.map_err(LoadError::Loop),
        }
    }
}

/// CPU time of this thread; `None` where the system does not say.
pub fn thread_cpu() -> Option<Duration> {
    #[cfg(target_os = "linux")]
    {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Some(Duration::new(u64::try_from(t.tv_sec).ok()?, u32::try_from(t.tv_nsec).ok()?))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Lets this process open as many sockets as it may; returns the limit.
pub fn raise_file_limit() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
        let raised = setrlimit(Resource::Nofile, wanted).is_ok();
        if raised { limit.maximum } else { limit.current }
    }
    #[cfg(not(target_os = "linux"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_wakes_late_by_a_lost_timer_nor_returns_early_forever() {
        let mut w = Waiter::new().unwrap();
        let mut events = Events::with_capacity(8);
        for ms in [0, 1, 3] {
            let deadline = w.now() + ms * 1_000_000;
            let mut rounds = 0u64;
            while w.now() < deadline {
                w.wait(&mut events, deadline).unwrap();
                rounds += 1;
            }
            assert!(rounds < 5_000, "{ms} ms took {rounds} rounds: it spins instead of sleeping");
        }
        assert!(thread_cpu().is_some() == cfg!(target_os = "linux"));
    }
}
