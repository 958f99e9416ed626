//! How many servers, which variant, what a million tokens costs: from measured load records ([`plan`]), or before any run from a
//! configuration and a GPU's data sheet ([`estimate`]).

pub mod estimate;
pub mod gpus;
pub mod plan;
pub mod shape;
