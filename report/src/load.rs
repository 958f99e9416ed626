//! Reading the records of a directory and joining them by hash.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lowbit_bench::record::BenchRecord;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_eval::record::EvalRecord;
use lowbit_quantize::record::{PlanRecord, QuantizeRecord};
use serde::de::DeserializeOwned;

/// Why no report came of it.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A record is not what it should be.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line of the fault, from 1.
        line: usize,
        /// Column of the fault, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// Nothing to report on.
    #[error("{}: no records here (looked for plan.json, quantize.json, eval.json and bench.json)", dir.display())]
    NoRecords {
        /// Where they were looked for.
        dir: PathBuf,
    },
    /// Accuracy and speed were measured on different checkpoints.
    #[error(
        "eval.json and bench.json are about different checkpoints: \
         eval.json has {eval_model} ({eval_sha256}), bench.json has {bench_model} ({bench_sha256})"
    )]
    ModelMismatch {
        /// Model name in `eval.json`.
        eval_model: String,
        /// Its hash.
        eval_sha256: String,
        /// Model name in `bench.json`.
        bench_model: String,
        /// Its hash.
        bench_sha256: String,
    },
    /// The page could not be rendered.
    #[error("report template: {0}")]
    Template(#[from] minijinja::Error),
}

/// The records of one model, as far as they exist.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// `plan.json`.
    pub plan: Option<PlanRecord>,
    /// `quantize.json`.
    pub quantize: Option<QuantizeRecord>,
    /// `eval.json`.
    pub eval: Option<EvalRecord>,
    /// `bench.json`.
    pub bench: Option<BenchRecord>,
}

impl Records {
    /// Files that are not there.
    pub fn missing(&self) -> Vec<&'static str> {
        [
            ("plan.json", self.plan.is_none()),
            ("quantize.json", self.quantize.is_none()),
            ("eval.json", self.eval.is_none()),
            ("bench.json", self.bench.is_none()),
        ]
        .into_iter()
        .filter_map(|(name, missing)| missing.then_some(name))
        .collect()
    }

    /// Fails where `eval` and `bench` measured different checkpoints.
    pub fn check(&self) -> Result<(), ReportError> {
        if let (Some(eval), Some(bench)) = (&self.eval, &self.bench)
            && eval.provenance.model_sha256 != bench.provenance.model_sha256
        {
            return Err(ReportError::ModelMismatch {
                eval_model: eval.provenance.model.clone(),
                eval_sha256: eval.provenance.model_sha256.clone(),
                bench_model: bench.provenance.model.clone(),
                bench_sha256: bench.provenance.model_sha256.clone(),
            });
        }
        Ok(())
    }

    /// Differences a reader must know about that do not spoil the report.
    pub fn notices(&self) -> Vec<String> {
        let mut out = Vec::new();
        let provenance = self.provenance();
        let find = |file: &str| provenance.iter().find(|(name, _)| *name == file).map(|(_, p)| *p);
        let quantized = find("quantize.json");
        if let (Some(plan), Some(quantize)) = (find("plan.json"), quantized)
            && plan.model_sha256 != quantize.model_sha256
        {
            out.push("plan.json was made for another model than the one quantize.json is about.".to_owned());
        }
        if let (Some(plan), Some(eval)) = (find("plan.json"), find("eval.json"))
            && quantized.is_none()
            && eval.reference_sha256.as_ref().is_some_and(|hash| *hash != plan.model_sha256)
        {
            out.push("eval.json compares with another reference than the model in plan.json.".to_owned());
        }
        for file in ["eval.json", "bench.json"] {
            if let (Some(quantize), Some(other)) = (quantized, find(file))
                && let Some(reference) = &other.reference_sha256
                && *reference != quantize.model_sha256
            {
                out.push(format!("{file} compares with another reference than the model that was quantized."));
            }
        }
        out
    }

    /// Every record's provenance with the name of its file.
    pub fn provenance(&self) -> Vec<(&'static str, &Provenance)> {
        let mut out = Vec::new();
        out.extend(self.plan.as_ref().map(|r| ("plan.json", &r.provenance)));
        out.extend(self.quantize.as_ref().map(|r| ("quantize.json", &r.provenance)));
        out.extend(self.eval.as_ref().map(|r| ("eval.json", &r.provenance)));
        out.extend(self.bench.as_ref().map(|r| ("bench.json", &r.provenance)));
        out
    }
}

/// A record; `None` where there is no such file.
pub(crate) fn read<T: DeserializeOwned>(path: PathBuf) -> Result<Option<T>, ReportError> {
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(source) if source.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ReportError::Io { path, source }),
    };
    serde_json::from_slice(&text).map(Some).map_err(|e| {
        let (line, column, full) = (e.line(), e.column(), e.to_string());
        let place = format!(" at line {line} column {column}");
        let message = full.strip_suffix(&place).unwrap_or(&full).to_owned();
        ReportError::Json { path, line, column, message }
    })
}

/// Reads `plan.json`, `quantize.json`, `eval.json` and `bench.json` from `dir`.
///
/// A missing file is `None`; none at all is an error, and so are a broken file and an `eval.json`
/// and `bench.json` about different checkpoints.
pub fn load(dir: &Path) -> Result<Records, ReportError> {
    let records = Records {
        plan: read(dir.join("plan.json"))?,
        quantize: read(dir.join("quantize.json"))?,
        eval: read(dir.join("eval.json"))?,
        bench: read(dir.join("bench.json"))?,
    };
    if records.missing().len() == 4 {
        return Err(ReportError::NoRecords { dir: dir.to_owned() });
    }
    records.check()?;
    Ok(records)
}
