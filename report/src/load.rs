//! Reading the records of run directories and joining them by hash.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lowbit_bench::capacity::plan::CapacityRecord;
use lowbit_bench::load::record::LoadRecord;
use lowbit_bench::record::BenchRecord;
use lowbit_bench::speculation::SpeculationRecord;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_eval::record::EvalRecord;
use lowbit_eval::verdict::record::GateRecord;
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
    #[error("{}: no records here (looked for {})\nhint: give the folder that `lowbit run -o` wrote", dir.display(), FILES.join(", "))]
    NoRecords {
        /// Where they were looked for.
        dir: PathBuf,
    },
    /// Two records of one directory are about different checkpoints.
    #[error(
        "{first} and {second} are about different checkpoints: \
         {first} has {first_model} ({first_sha256}), {second} has {second_model} ({second_sha256})"
    )]
    ModelMismatch {
        /// A file.
        first: &'static str,
        /// Model name in it.
        first_model: String,
        /// Its hash.
        first_sha256: String,
        /// The other file.
        second: &'static str,
        /// Model name in that one.
        second_model: String,
        /// Its hash.
        second_sha256: String,
    },
    /// The page could not be rendered.
    #[error("report template: {0}")]
    Template(#[from] minijinja::Error),
}

/// What a directory may hold, beside further `load-NAME.json`.
const FILES: [&str; 8] = [
    "plan.json",
    "quantize.json",
    "eval.json",
    "gate.json",
    "bench.json",
    "load.json",
    "speculation.json",
    "capacity.json",
];

/// The records of one model, as far as they exist.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// `plan.json`.
    pub plan: Option<PlanRecord>,
    /// `quantize.json`.
    pub quantize: Option<QuantizeRecord>,
    /// `eval.json`.
    pub eval: Option<EvalRecord>,
    /// `gate.json`.
    pub gate: Option<GateRecord>,
    /// `bench.json`.
    pub bench: Option<BenchRecord>,
    /// `load.json` under an empty name, `load-NAME.json` under NAME; without their requests.
    pub loads: Vec<(String, LoadRecord)>,
    /// `speculation.json`: the model here drafts for the original.
    pub speculation: Option<SpeculationRecord>,
    /// `capacity.json`.
    pub capacity: Option<CapacityRecord>,
}

/// The records of one candidate among several.
#[derive(Clone, Debug, Default)]
pub struct Variant {
    /// What tells it from the others; empty for a single one.
    pub name: String,
    /// Its records.
    pub records: Records,
}

impl From<Records> for Variant {
    fn from(records: Records) -> Self {
        Self { name: String::new(), records }
    }
}

impl Records {
    /// Files of the main job that are not there.
    pub fn missing(&self) -> Vec<&'static str> {
        [
            ("plan.json", self.plan.is_none()),
            ("quantize.json", self.quantize.is_none()),
            ("eval.json", self.eval.is_none()),
            ("gate.json", self.gate.is_none()),
            ("bench.json", self.bench.is_none()),
        ]
        .into_iter()
        .filter_map(|(name, missing)| missing.then_some(name))
        .collect()
    }

    /// Fails where two of `eval`, `gate` and `bench` are about different checkpoints.
    pub fn check(&self) -> Result<(), ReportError> {
        let about: Vec<(&'static str, &Provenance)> = self
            .provenance()
            .into_iter()
            .filter(|(file, p)| ["eval.json", "gate.json", "bench.json"].contains(file) && !p.model_sha256.is_empty())
            .collect();
        let Some((first, rest)) = about.split_first() else { return Ok(()) };
        match rest.iter().find(|other| other.1.model_sha256 != first.1.model_sha256) {
            None => Ok(()),
            Some(second) => Err(ReportError::ModelMismatch {
                first: first.0,
                first_model: first.1.model.clone(),
                first_sha256: first.1.model_sha256.clone(),
                second: second.0,
                second_model: second.1.model.clone(),
                second_sha256: second.1.model_sha256.clone(),
            }),
        }
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
        if let Some(draft) = find("speculation.json").and_then(|p| p.reference_sha256.as_ref())
            && let Some(own) = ["eval.json", "bench.json"].iter().find_map(|file| find(file))
            && *draft != own.model_sha256
        {
            out.push("speculation.json is about another draft than the model that was measured.".to_owned());
        }
        if let (Some(eval), Some(gate)) = (find("eval.json"), find("gate.json"))
            && gate.unix_time < eval.unix_time
        {
            out.push("gate.json is older than eval.json: the verdict is on an earlier evaluation.".to_owned());
        }
        out
    }

    /// Every record's provenance with the name of its file.
    pub fn provenance(&self) -> Vec<(&'static str, &Provenance)> {
        let mut out = Vec::new();
        out.extend(self.plan.as_ref().map(|r| ("plan.json", &r.provenance)));
        out.extend(self.quantize.as_ref().map(|r| ("quantize.json", &r.provenance)));
        out.extend(self.eval.as_ref().map(|r| ("eval.json", &r.provenance)));
        out.extend(self.gate.as_ref().map(|r| ("gate.json", &r.provenance)));
        out.extend(self.bench.as_ref().map(|r| ("bench.json", &r.provenance)));
        out.extend(self.loads.iter().map(|(_, r)| ("load.json", &r.provenance)));
        out.extend(self.speculation.as_ref().map(|r| ("speculation.json", &r.provenance)));
        out.extend(self.capacity.as_ref().map(|r| ("capacity.json", &r.provenance)));
        out
    }
}

/// A record; `None` where there is no such file.
pub(crate) fn read<T: DeserializeOwned>(path: PathBuf) -> Result<Option<T>, ReportError> {
    let text = match lowbit_checkpoint::files::read(&path) {
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

/// Reads what [`Records`] names from `dir`.
///
/// A missing file is `None`; none at all is an error, and so are a broken file and records of one directory
/// about different checkpoints.
pub fn load(dir: &Path) -> Result<Records, ReportError> {
    let mut records = Records {
        plan: read(dir.join("plan.json"))?,
        quantize: read(dir.join("quantize.json"))?,
        eval: read(dir.join("eval.json"))?,
        gate: read(dir.join("gate.json"))?,
        bench: read(dir.join("bench.json"))?,
        loads: Vec::new(),
        speculation: read(dir.join("speculation.json"))?,
        capacity: read(dir.join("capacity.json"))?,
    };
    for (name, file) in load_files(dir)? {
        let Some(mut record) = read::<LoadRecord>(dir.join(file))? else { continue };
        // Every stamp of every request: summaries are beside them.
        for stage in &mut record.stages {
            stage.requests = Vec::new();
            stage.metrics.concurrency = Vec::new();
        }
        records.loads.push((name, record));
    }
    if records.provenance().is_empty() {
        return Err(ReportError::NoRecords { dir: dir.to_owned() });
    }
    records.check()?;
    Ok(records)
}

/// `load.json` and `load-NAME.json`, by name.
fn load_files(dir: &Path) -> Result<Vec<(String, String)>, ReportError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(ReportError::Io { path: dir.to_owned(), source }),
    };
    let mut out = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| ReportError::Io { path: dir.to_owned(), source })?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let name = file.strip_prefix("load").and_then(|rest| rest.strip_suffix(".json"));
        match name {
            Some("") => out.push((String::new(), file)),
            Some(name) if name.starts_with('-') => out.push((name[1..].to_owned(), file)),
            _ => {}
        }
    }
    out.sort();
    Ok(out)
}

/// Reads several directories, each a variant named by the shortest end of its path that no other has.
pub fn load_all(dirs: &[PathBuf]) -> Result<Vec<Variant>, ReportError> {
    let paths: Vec<Vec<String>> = dirs
        .iter()
        .map(|d| {
            let whole = d.canonicalize().unwrap_or_else(|_| d.clone());
            whole.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect()
        })
        .collect();
    let end = |p: &[String], n: usize| p[p.len().saturating_sub(n)..].join("/");
    let name = |i: usize| {
        if dirs.len() == 1 {
            return String::new();
        }
        let unique = |n: &usize| (0..paths.len()).filter(|j| end(&paths[*j], *n) == end(&paths[i], *n)).count() == 1;
        end(&paths[i], (1..=paths[i].len()).find(unique).unwrap_or(paths[i].len()))
    };
    dirs.iter().enumerate().map(|(i, d)| Ok(Variant { name: name(i), records: load(d)? })).collect()
}
