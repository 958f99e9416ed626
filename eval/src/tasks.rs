//! Task evaluation: what is asked of a model, and what came of it.
//!
//! A task renders its documents into [`Request`]s, an engine answers each with a [`Response`], and the task turns the
//! responses of one document into one [`Item`]. Nothing here runs a model.

pub mod item;
pub mod request;

pub use item::Item;
pub use request::{Request, RequestKind, Response};
