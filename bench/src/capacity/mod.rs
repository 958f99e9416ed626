//! How many servers, which variant, what a million tokens costs: from measured load records ([`plan`]), or before any run from a
//! configuration and a GPU's data sheet ([`estimate`]); with either, what fits beside the weights ([`room`]).

pub mod estimate;
pub mod gpus;
pub mod plan;
pub mod room;
pub mod shape;
