//! How far a candidate's distributions are from its reference's.

pub mod blame;
pub mod free_running;
pub mod row;
pub mod summary;
pub mod tokens;
