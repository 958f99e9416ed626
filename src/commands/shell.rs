//! `lowbit completions` and `lowbit man`: for the shell, from the same description as the help.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::CommandFactory;
use lowbit_checkpoint::writer::write_atomic;

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::commands::eval::refuse_existing;
use crate::context::{Context, write_out};

/// Prints the completion script of a shell.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut out = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lowbit", &mut out);
    write_out(&out)
}

/// Prints the man page, or writes it and that of each command into a folder.
pub fn man(ctx: &Context, args: &ManArgs) -> Result<()> {
    let mut root = Cli::command();
    // Names of the commands' pages, and options that all of them take.
    root.build();
    let Some(dir) = &args.output else {
        return write_out(&page(root)?);
    };
    let mut pages = vec![("lowbit.1".to_owned(), page(root.clone())?)];
    for command in root.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        pages.push((format!("lowbit-{}.1", command.get_name()), page(command.clone())?));
    }
    let paths: Vec<PathBuf> = pages.iter().map(|(name, _)| dir.join(name)).collect();
    for path in &paths {
        refuse_existing(Some(path), args.force)?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (path, (_, text)) in paths.iter().zip(&pages) {
        write_atomic(path, text)?;
    }
    ctx.print(&serde_json::json!({"written": paths}), || format!("{} pages in {}", paths.len(), dir.display()))
}

fn page(command: clap::Command) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    clap_mangen::Man::new(command).render(&mut out)?;
    Ok(out)
}
