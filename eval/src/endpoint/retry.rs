//! When a request is sent again, and when it has failed for good.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Reply;
use super::answer::{Unfit, shown};

/// First wait; it doubles with each try.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait of our own.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Shortest wait where a server asks for none.
const SHORTEST_WAIT: Duration = Duration::from_millis(20);
/// How often a wait looks whether the run has stopped.
const SLICE: Duration = Duration::from_millis(50);

/// The rule: what may pass (no whole response, 408, 425, 429, 5xx but 501, an unreadable answer) is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Further tries after the first.
    pub retries: u32,
    /// So long from the first try, tries put off by a server's `Retry-After` do not count.
    pub patience: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { retries: 5, patience: Duration::from_secs(600) }
    }
}

fn passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429) || (status >= 500 && status != 501)
}

impl Retry {
    /// Sends until an answer is read; `None` once the run has stopped, an error once it has failed for good. `salt` spreads waits
    /// of requests that failed together.
    pub(super) fn run<T>(
        &self,
        salt: u64,
        stop: &AtomicBool,
        mut send: impl FnMut() -> Result<Reply, String>,
        read: impl Fn(&Reply) -> Result<T, Unfit>,
    ) -> Result<Option<T>, String> {
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            let (problem, asked) = match send() {
                Err(why) => (format!("gave no answer: {why}"), None),
                Ok(reply) if (200..300).contains(&reply.status) => match read(&reply) {
                    Ok(found) => return Ok(Some(found)),
                    Err(unfit) if !unfit.again => return Err(unfit.problem),
                    Err(unfit) => (unfit.problem, None),
                },
                Ok(reply) if passing(reply.status) => (format!("answered {}", shown(&reply)), reply.retry_after),
                Ok(reply) => return Err(format!("answered {}", shown(&reply))),
            };
            let put_off = asked.is_some() && begun.elapsed() < self.patience;
            tries += u32::from(!put_off);
            if tries > self.retries {
                let times = if tries == 1 { "once".to_owned() } else { format!("{tries} times") };
                return Err(format!("was asked {times}, and last {problem}\nhint: the same command goes on from here"));
            }
            let wait = match asked {
                Some(wait) => wait.clamp(SHORTEST_WAIT, self.patience.max(SHORTEST_WAIT)),
                None => backoff(tries, salt),
            };
            if !sleep(wait, stop) {
                return Ok(None);
            }
        }
    }
}

/// Half of `FIRST_WAIT · 2^(tries − 1)` and up to as much again, by the salt.
fn backoff(tries: u32, salt: u64) -> Duration {
    let whole = FIRST_WAIT.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(LONGEST_WAIT);
    let share =
        f64::from((salt.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(tries) >> 40) as u32) / f64::from(1 << 24);
    whole.mul_f64(0.5 + 0.5 * share)
}

/// Whether the wait went to its end.
fn sleep(wait: Duration, stop: &AtomicBool) -> bool {
    let end = Instant::now() + wait;
    loop {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(SLICE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, wait: Option<u64>) -> Result<Reply, String> {
        Ok(Reply {
            status,
            retry_after: wait.map(Duration::from_millis),
            body: b"{\"error\": {\"message\": \"busy\"}}".to_vec(),
        })
    }

    fn run(retries: u32, script: Vec<Result<Reply, String>>) -> (Result<Option<u16>, String>, usize) {
        let mut script = script.into_iter();
        let mut sent = 0;
        let rule = Retry { retries, patience: Duration::from_secs(60) };
        let found = rule.run(
            1,
            &AtomicBool::new(false),
            || {
                sent += 1;
                script.next().unwrap()
            },
            |r| if r.body.is_empty() { Err(Unfit { problem: "is empty".into(), again: true }) } else { Ok(r.status) },
        );
        (found, sent)
    }

    #[test]
    fn what_may_pass_is_asked_again() {
        // Put off by the server eight times, which does not count.
        let mut script: Vec<_> = (0..8).map(|_| reply(429, Some(0))).collect();
        script.push(reply(200, None));
        assert_eq!(run(0, script), (Ok(Some(200)), 9));
        assert_eq!(run(1, vec![Err("cut".into()), reply(200, None)]), (Ok(Some(200)), 2));
        let (found, sent) = run(1, vec![reply(500, None), reply(503, None)]);
        assert!(
            sent == 2 && found.as_ref().unwrap_err().contains("2 times") && found.unwrap_err().contains("503: busy")
        );
        let empty = Ok(Reply { status: 200, retry_after: None, body: vec![] });
        assert!(run(0, vec![empty]).0.unwrap_err().contains("is empty"));
    }

    #[test]
    fn what_lasts_is_not() {
        for status in [400, 401, 404, 501] {
            let (found, sent) = run(5, vec![reply(status, None)]);
            assert!(sent == 1 && found.unwrap_err().contains(&status.to_string()));
        }
        let stopped = AtomicBool::new(true);
        let found = Retry::default().run(0, &stopped, || reply(500, None), |_| Ok(()));
        assert_eq!(found, Ok(None));
    }

    #[test]
    fn waits_grow_and_end() {
        for salt in [0, 7, u64::MAX] {
            assert!(backoff(1, salt) >= FIRST_WAIT / 2 && backoff(1, salt) <= FIRST_WAIT);
            assert!(backoff(40, salt) <= LONGEST_WAIT && backoff(40, salt) >= LONGEST_WAIT / 2);
        }
    }
}
