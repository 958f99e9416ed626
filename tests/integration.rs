//! The program from outside, and the crates against reference values.
#![allow(clippy::print_stderr)]

mod cli;
