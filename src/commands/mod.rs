//! One file per command.

mod bench;
mod bench_draft;
mod bench_format;
mod budget;
mod capacity;
mod compare;
mod convert;
mod drift;
mod endpoint;
mod eval;
mod gate;
mod generate;
mod inspect;
mod judge;
mod load;
mod load_as;
mod load_text;
mod looks;
mod merge;
mod quantize;
mod report;
mod rounding;
mod run;
mod run_accuracy;
mod run_serving;
mod scores;
mod serve;
mod shell;
mod suite;
mod table;
mod tasks;
mod verify;

use anyhow::Result;

use crate::args::Command;
use crate::context::Context;

/// Of commands whose files come one by one.
const IN_PLACE: &str = "what is there is whole: give the same command again, with --force where it asks for it";

/// What a command that is stopped leaves, and how to go on.
pub fn after_interrupt(command: &Command) -> &'static str {
    match command {
        Command::Run(_) => {
            "the same command goes on where it stopped: finished stages are kept, and of a quantization the solved blocks"
        }
        Command::Quantize(_) => "the same command goes on where it stopped: solved blocks are kept beside the output",
        Command::Convert(_) => "nothing was put in place: give the same command again",
        Command::Eval(a) if a.command.is_some() => IN_PLACE,
        Command::Eval(a) if a.output.is_some() => {
            "the same command goes on: answers and windows so far are in a journal beside the record"
        }
        Command::Eval(_) => {
            "nothing was kept; with -o FILE, answers and windows would be, and the same command would go on"
        }
        Command::Load(a) if a.import.is_some() => IN_PLACE,
        Command::Load(a) if a.output.is_some() => "the record holds what was measured until then",
        Command::Gate(_) | Command::Report(_) | Command::Man(_) => IN_PLACE,
        _ => "nothing was kept: give the same command again",
    }
}

/// Runs the command.
pub fn dispatch(ctx: &Context, command: Command) -> Result<()> {
    if !matches!(command, Command::Run(_) | Command::Plan(_) | Command::Quantize(_)) {
        ctx.check_one_device()?;
    }
    match command {
        Command::Run(a) => run::run(ctx, &a),
        Command::Inspect(a) => inspect::inspect(ctx, &a),
        Command::Plan(a) => quantize::plan(ctx, &a),
        Command::Quantize(a) => quantize::quantize(ctx, &a),
        Command::Verify(a) => verify::verify(ctx, &a),
        Command::Convert(a) => convert::convert(ctx, &a),
        Command::Eval(a) => eval::eval(ctx, &a),
        Command::Gate(a) => gate::gate(ctx, &a),
        Command::Bench(a) => bench::bench(ctx, &a),
        Command::Load(a) => load::load(ctx, &a),
        Command::Compare(a) => compare::compare(ctx, &a),
        Command::Capacity(a) => capacity::capacity(ctx, &a),
        Command::Generate(a) => generate::generate(ctx, &a),
        Command::Serve(a) => serve::serve(ctx, &a),
        Command::Report(a) => report::report(ctx, &a),
        Command::Completions(a) => shell::completions(&a),
        Command::Man(a) => shell::man(ctx, &a),
        Command::Suite(a) => suite::suite(ctx, &a),
    }
}
