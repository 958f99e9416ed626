//! A server with known delays, for scripts and for trying a client out; `bench/load-check` measures `lowbit load` and GuideLLM with it.
//!
//! ```text
//! cargo run --release -p lowbit-bench --example stand_in -- [--port 0] [--ttft 20,30,45] [--itl 5] [--tokens 8] [--stall 1005:800]
//! ```
//!
//! Request k gets the k-th of the times (ms) of each list, again from the start when they are used up. `--stall FROM:FOR` holds every
//! request that is read so long after the first, until the stall is over. The address is printed; `GET /log` answers with the server's own stamps.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

mod server;

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use server::{Plan, StandIn, plan};

struct Options {
    port: u16,
    ttft: Vec<Duration>,
    itl: Vec<Duration>,
    tokens: u32,
    stall: Option<(Duration, Duration)>,
}

fn ms(text: &str) -> Result<Duration, String> {
    let ms: f64 = text.trim().parse().map_err(|_| format!("{text:?} is not a number of milliseconds"))?;
    Duration::try_from_secs_f64(ms / 1e3).map_err(|e| format!("{text}: {e}"))
}

fn list(text: &str) -> Result<Vec<Duration>, String> {
    text.split(',').map(ms).collect()
}

fn options(mut words: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut o = Options { port: 0, ttft: vec![plan().ttft], itl: vec![plan().gap], tokens: plan().tokens, stall: None };
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--port" => o.port = value.parse().map_err(|_| format!("{value:?} is not a port"))?,
            "--ttft" => o.ttft = list(&value)?,
            "--itl" => o.itl = list(&value)?,
            "--tokens" => o.tokens = value.parse().map_err(|_| format!("{value:?} is not a number of tokens"))?,
            "--stall" => {
                let (from, long) = value.split_once(':').ok_or_else(|| format!("{value:?} is not FROM:FOR"))?;
                o.stall = Some((ms(from)?, ms(long)?));
            }
            _ => return Err(format!("unknown option {word}")),
        }
    }
    Ok(o)
}

fn serve(o: Options) -> std::io::Result<StandIn> {
    let first = OnceLock::new();
    let Options { port, ttft, itl, tokens, stall } = o;
    let at = |times: &[Duration], k: u64| times[(k % times.len() as u64) as usize];
    let script = move |k: u64| {
        let since = first.get_or_init(Instant::now).elapsed();
        let held = match stall {
            Some((from, long)) if since > from => (from + long).saturating_sub(since),
            _ => Duration::ZERO,
        };
        Plan { ttft: held + at(&ttft, k), gap: at(&itl, k), tokens, ..plan() }
    };
    StandIn::bind(port, Arc::new(script))
}

fn main() -> ExitCode {
    let options = match options(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("error: {why}");
            return ExitCode::from(3);
        }
    };
    match serve(options) {
        Ok(server) => {
            println!("{}", server.url);
            loop {
                std::thread::park();
            }
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(3)
        }
    }
}
