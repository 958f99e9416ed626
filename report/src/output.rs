//! Rendering the page and the JSON, and writing the files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::writer::write_atomic;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde_json::json;

use crate::{
    ReportError, Variant, load_all, markdown, view, view_accuracy, view_compare, view_layers, view_provenance,
    view_serving, view_size, view_speculation, view_speed, view_verdict,
};

/// The templates of the page, compiled once.
fn templates() -> Result<&'static Environment<'static>, ReportError> {
    static TEMPLATES: OnceLock<Environment<'static>> = OnceLock::new();
    if let Some(env) = TEMPLATES.get() {
        return Ok(env);
    }
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.add_template("report.css", include_str!("report.css"))?;
    env.add_template("macros.html", include_str!("macros.html.j2"))?;
    env.add_template("report.html", include_str!("report.html.j2"))?;
    Ok(TEMPLATES.get_or_init(|| env))
}

/// The page: one file without a single fetch, light and dark, for screens from 360 px on and for paper.
///
/// One variant, or several side by side. What there is no record of has no section.
pub fn html(variants: &[Variant]) -> Result<String, ReportError> {
    let several = variants.len() > 1;
    let single = variants.first().filter(|_| !several);
    let context = json!({
        "header": view::header(variants),
        "several": several,
        "banners": variants.iter().map(view_verdict::banner).collect::<Vec<_>>(),
        "numbers": single.map(|v| view::numbers(&v.records)).unwrap_or_default(),
        "missing": single.map(|v| v.records.missing()).unwrap_or_default(),
        "notices": notices(variants),
        "compare": several.then(|| view_compare::table(variants)),
        "triangle": view_compare::chart(variants),
        "triangle_note": view_compare::chart_note(),
        "tasks": view_verdict::tasks(variants),
        "size": view_size::section(variants),
        "drift": view_accuracy::drift(variants),
        "tokens": view_accuracy::tokens(variants),
        "layers": view_layers::layers(variants),
        "blame": view_layers::blame(variants),
        "speed": view_speed::throughput(variants),
        "serving": view_serving::serving(variants),
        "speculation": view_speculation::section(variants),
        "capacity": view_serving::capacity(variants),
        "provenance": view_provenance::provenance(variants),
    });
    Ok(templates()?.get_template("report.html")?.render(Serde(&context))?)
}

/// What a reader must know, each under its variant's name.
pub(crate) fn notices(variants: &[Variant]) -> Vec<String> {
    let mut out = Vec::new();
    for v in variants {
        let name = if v.name.is_empty() { String::new() } else { format!("{}: ", v.name) };
        out.extend(v.records.notices().into_iter().map(|n| format!("{name}{n}")));
    }
    let mut references = Vec::new();
    for v in variants {
        let measured = v.records.eval.as_ref().and_then(|e| e.provenance.reference_sha256.as_deref());
        if let Some(hash) = measured.filter(|h| !references.contains(h)) {
            references.push(hash);
        }
    }
    if references.len() > 1 {
        out.push("The variants were compared with different references: their drift does not compare.".to_owned());
    }
    out
}

/// Everything in one value: the headline figures, what is missing and the records as they are; of several variants a list
/// of these, each with its name.
///
/// Numbers that are not finite become `null`.
pub fn json(variants: &[Variant]) -> serde_json::Value {
    match variants {
        [only] => document(only),
        several => json!({
            "schema": 1,
            "variants": several.iter().map(document).collect::<Vec<_>>(),
            "notices": notices(several),
        }),
    }
}

fn document(v: &Variant) -> serde_json::Value {
    let r = &v.records;
    let loads: serde_json::Map<String, serde_json::Value> = r
        .loads
        .iter()
        .map(|(name, l)| (if name.is_empty() { "load".to_owned() } else { name.clone() }, json!(l)))
        .collect();
    let mut out = json!({
        "schema": 1,
        "headline": view::headline(r),
        "missing": r.missing(),
        "notices": r.notices(),
        "plan": r.plan,
        "quantize": r.quantize,
        "eval": r.eval,
        "gate": r.gate,
        "bench": r.bench,
        "loads": loads,
        "speculation": r.speculation,
        "capacity": r.capacity,
    });
    if !v.name.is_empty() {
        out["name"] = v.name.as_str().into();
    }
    out
}

/// Reads the records of `dirs` and writes `report.html`, `report.md` and `report.json` into `output`.
///
/// Each file appears whole or not at all. Returns their paths.
pub fn write(dirs: &[PathBuf], output: &Path) -> Result<Vec<PathBuf>, ReportError> {
    let variants = load_all(dirs)?;
    let mut data = format!("{:#}", json(&variants));
    data.push('\n');
    let files = [("report.html", html(&variants)?), ("report.md", markdown(&variants)), ("report.json", data)];
    fs::create_dir_all(output).map_err(|source| ReportError::Io { path: output.to_owned(), source })?;
    let mut paths = Vec::with_capacity(files.len());
    for (name, text) in files {
        let path = output.join(name);
        write_atomic(&path, text.as_bytes()).map_err(|e| match e {
            CheckpointError::Io { file, source } => ReportError::Io { path: file, source },
            other => ReportError::Io { path: path.clone(), source: std::io::Error::other(other) },
        })?;
        paths.push(path);
    }
    Ok(paths)
}
