//! OpenAI-compatible server over the decoder.
//!
//! [`engine`] runs the model on a thread of its own: continuous batching, chunked prefill, prefix caching, structured
//! output, speculative decoding. [`http`] speaks the protocol.

pub mod engine;
pub mod error;
pub mod guide;
pub mod http;
pub mod metrics;
pub mod text;

pub use engine::{Engine, EngineOptions};
pub use error::{Result, ServeError};
pub use http::{InMemory, Server, ServerOptions};
