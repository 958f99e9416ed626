//! Rendering the page and the JSON, and writing the files.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde_json::json;

use crate::{Records, ReportError, load, markdown, view, view_accuracy, view_speed};

/// The page: one file without a single fetch, light and dark, for screens from 360 px on.
///
/// Missing records leave a note in their sections.
pub fn html(r: &Records) -> Result<String, ReportError> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.add_template("report.html", include_str!("report.html.j2"))?;
    let context = json!({
        "header": view::header(r),
        "tiles": view::tiles(r),
        "missing": r.missing(),
        "notices": r.notices(),
        "size": view::size(r),
        "drift": view_accuracy::drift(r),
        "layers": view_accuracy::layers(r),
        "speed": view_speed::throughput(r),
        "provenance": view_speed::provenance(r),
    });
    Ok(env.get_template("report.html")?.render(Serde(&context))?)
}

/// Everything in one value: the headline figures, what is missing and the records as they are.
///
/// Numbers that are not finite become `null`.
pub fn json(r: &Records) -> serde_json::Value {
    json!({
        "schema": 1,
        "headline": view::headline(r),
        "missing": r.missing(),
        "notices": r.notices(),
        "plan": r.plan,
        "quantize": r.quantize,
        "eval": r.eval,
        "bench": r.bench,
    })
}

/// Writes `text` to a sibling of `path` and renames it into place.
fn write_atomic(path: &Path, text: &str) -> Result<(), ReportError> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let attempt = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, path)
    };
    attempt().map_err(|source| {
        // The first error is the one to tell; a leftover that cannot be removed changes nothing.
        let _ = fs::remove_file(&temporary);
        ReportError::Io { path: path.to_owned(), source }
    })
}

/// Reads the records of `dir` and writes `report.html`, `report.md` and `report.json` there.
///
/// Each file appears whole or not at all. Returns their paths.
pub fn write(dir: &Path) -> Result<Vec<PathBuf>, ReportError> {
    let records = load(dir)?;
    let mut data = format!("{:#}", json(&records));
    data.push('\n');
    let files = [("report.html", html(&records)?), ("report.md", markdown(&records)), ("report.json", data)];
    let mut paths = Vec::with_capacity(files.len());
    for (name, text) in files {
        let path = dir.join(name);
        write_atomic(&path, &text)?;
        paths.push(path);
    }
    Ok(paths)
}
