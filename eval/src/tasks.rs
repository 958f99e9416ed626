//! Task evaluation: what is asked of a model, and what came of it.
//!
//! A task renders its documents into [`Request`]s, an engine answers each with a [`Response`], and the task turns the
//! responses of one document into one [`Item`]. Nothing here runs a model.
//!
//! [`Registry`] knows the task files, [`Suite`] holds the tasks of a run with their data, [`Task::documents`] renders,
//! [`Task::item`] scores a document, [`Task::scores`] and [`Suite::groups`] aggregate. `docs/tasks.md` has the file format.

pub mod aggregate;
pub mod config;
pub mod data;
pub mod error;
pub mod fewshot;
pub mod filters;
pub mod item;
pub mod json_schema;
mod judged;
pub mod metrics;
pub mod pattern;
pub mod pipeline;
pub mod prompt;
pub mod python;
pub mod random;
pub mod registry;
pub mod request;
pub mod rouge;
pub mod run;
mod shipped;
pub mod task;
mod template;
pub mod twins;
mod yaml;

pub use aggregate::{Score, Scores};
pub use data::DataOptions;
pub use error::TaskError;
pub use item::Item;
pub use judged::Case;
pub use prompt::ChatOptions;
pub use registry::{Registry, Suite};
pub use request::{Message, Request, RequestKind, Response};
pub use run::{Evaluated, Plan, Span, TaskRecord};
pub use task::{DocumentHead, Rendered, Task};
