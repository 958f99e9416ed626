//! The command line: arguments → validated plan → library call → output.
//!
//! Exit codes: 0 ok · 1 the verdict is a regression · 2 inconclusive · 3 bad input or usage · 4 internal failure · 130 interrupted.
#![allow(clippy::print_stdout, clippy::print_stderr)]
// Comments on options are help texts: `[` begins what may be left away.
#![allow(rustdoc::broken_intra_doc_links)]

mod args;
mod commands;
mod context;
mod demo_tasks;
mod examples;
mod exit;
mod models;
mod progress;
mod provenance;
mod recipe;

use std::process::ExitCode;

fn main() -> ExitCode {
    lowbit_kernels::cpu::keep_freed_memory();
    let cli = match recipe::parse(std::env::args_os().collect()) {
        Ok((cli, matches)) => {
            recipe::remember(matches);
            cli
        }
        Err(recipe::ParseError::Recipe(e)) => return exit::report(&e),
        Err(recipe::ParseError::Usage(e)) => {
            let code = if e.use_stderr() { exit::BAD_INPUT } else { 0 };
            // A closed pipe on stdout or stderr is nobody's failure.
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    exit::watch_panics();
    exit::on_interrupt(commands::after_interrupt(&cli.command));
    lowbit_checkpoint::mapped::tell_of_truncation(exit::BAD_INPUT.into());
    let done = std::panic::catch_unwind(|| {
        context::Context::new(&cli.global).and_then(|ctx| commands::dispatch(&ctx, cli.command))
    });
    match done {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(e)) => exit::report(&e),
        // The hook has told.
        Err(_) => ExitCode::from(exit::INTERNAL),
    }
}
