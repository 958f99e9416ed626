//! Serving load: an open- or closed-loop client for OpenAI-compatible servers, and what its traces mean.
//! `docs/load.md` has the definitions and the differences from other tools.

pub mod client;
pub mod compare;
pub(crate) mod connection;
pub mod data;
pub mod error;
pub mod exchange;
pub mod http;
pub mod import;
pub mod metrics;
pub mod openai;
pub mod percentile;
pub mod profile;
pub mod record;
pub mod run;
pub mod saturation;
pub mod schedule;
pub mod sim;
pub mod sse;
pub mod table;
pub mod timer;
pub mod trace;
pub mod workload;

pub use error::{LoadError, Result};
