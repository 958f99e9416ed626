//! MODEL on the command line → a checkpoint folder.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use lowbit_checkpoint::converted::{self, ConvertRecord};
use lowbit_checkpoint::gguf::{self, GgufModel};
use lowbit_checkpoint::hash::model_sha256;
use lowbit_checkpoint::hub::{self, HubOptions};
use lowbit_checkpoint::quant_config::{Layout, PackFormat, WrittenGroup, by_scheme, write_compressed_tensors};
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::writer::{CheckpointWriter, DEFAULT_SHARD_BYTES, Declared};
use lowbit_checkpoint::{Checkpoint, CheckpointError, Dtype, linear};
use lowbit_kernels::backend::Backend;
use lowbit_kernels::{LinearScheme, ScaleType};
use lowbit_model::Model;

use crate::context::{Context, Purpose};

/// The files of the demo model, embedded.
const DEMO: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../assets/demo/config.json")),
    ("generation_config.json", include_bytes!("../assets/demo/generation_config.json")),
    ("tokenizer.json", include_bytes!("../assets/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../assets/demo/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../assets/demo/chat_template.jinja")),
    ("model.safetensors", include_bytes!("../assets/demo/model.safetensors")),
];

/// Text of our own for the demo's evaluation.
pub const DEMO_TEXT: &str = include_str!("../assets/demo-text/evaluation.txt");

/// A model that was found.
#[derive(Clone, Debug)]
pub struct Located {
    /// As given.
    pub name: String,
    /// Folder.
    pub dir: PathBuf,
    /// Shared by its clones.
    identity: Arc<Mutex<Identity>>,
}

/// How far the hash of a model's files is.
#[derive(Debug, Default)]
enum Identity {
    /// Nobody asked for it.
    #[default]
    Unknown,
    /// A thread reads the files.
    Wanted(JoinHandle<Result<String, CheckpointError>>),
    /// Done.
    Known(String),
}

impl Located {
    /// Under a name, what lies in a folder.
    pub fn new(name: impl Into<String>, dir: PathBuf) -> Self {
        Self { name: name.into(), dir, identity: Arc::default() }
    }

    /// [`model_sha256`] of its folder. Every byte is read once for all clones, be it here or after [`Self::hash_ahead`].
    pub fn sha256(&self) -> Result<String> {
        let mut identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let sha = match std::mem::take(&mut *identity) {
            Identity::Known(sha) => sha,
            Identity::Wanted(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
            Identity::Unknown => model_sha256(&self.dir)?,
        };
        *identity = Identity::Known(sha.clone());
        Ok(sha)
    }

    /// Starts reading for [`Self::sha256`] beside other work. Not for commands that measure time.
    pub fn hash_ahead(&self) {
        let mut identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*identity, Identity::Unknown) {
            let dir = self.dir.clone();
            // Where the system gives no thread it is read when it is asked for.
            let thread = std::thread::Builder::new().spawn(move || model_sha256(&dir)).ok();
            *identity = thread.map_or(Identity::Unknown, Identity::Wanted);
        }
    }

    /// Opens it.
    pub fn open(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(&self.dir)?)
    }

    /// Opens it as what is to be quantized: see [`Checkpoint::with_floats`].
    pub fn open_floats(&self) -> Result<Checkpoint> {
        Ok(self.open()?.with_floats()?)
    }

    /// Opens it and loads it onto the backend of a purpose.
    pub fn load(&self, ctx: &Context, purpose: Purpose) -> Result<(Checkpoint, Model)> {
        self.load_on(ctx.backend_for(purpose)?)
    }

    /// Opens it and loads it onto a backend.
    pub fn load_on(&self, backend: Arc<dyn Backend>) -> Result<(Checkpoint, Model)> {
        let ckpt = self.open()?;
        let model = Model::load(&ckpt, backend)?;
        Ok((ckpt, model))
    }

    /// [`Self::load_on`] and its tokenizer, which are read side by side: each takes a good part of the time to a first token.
    pub fn load_with_tokenizer(&self, backend: Arc<dyn Backend>) -> Result<(Checkpoint, Model, Tokenizer)> {
        std::thread::scope(|scope| {
            let beside = std::thread::Builder::new().spawn_scoped(scope, || Tokenizer::load(&self.dir));
            let (ckpt, model) = self.load_on(backend)?;
            if let Ok(thread) = &beside {
                ckpt.store.map_ahead(&|| !thread.is_finished());
            }
            let tokenizer = match beside {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // The system gives no thread.
                Err(_) => Tokenizer::load(&self.dir),
            };
            Ok((ckpt, model, tokenizer?))
        })
    }
}

/// Finds MODEL: a folder, a .gguf file (imported into the cache, its integer codes as they are), `demo`, or a hub id.
pub fn locate(ctx: &Context, model: &str) -> Result<Located> {
    locate_as(ctx, model, true)
}

/// As [`locate`], for what is to be quantized: a .gguf file is decoded to bf16.
pub fn locate_floats(ctx: &Context, model: &str) -> Result<Located> {
    locate_as(ctx, model, false)
}

fn locate_as(ctx: &Context, model: &str, codes: bool) -> Result<Located> {
    let path = Path::new(model);
    let dir = if let Some(file) = gguf_file(path) {
        import_cached(ctx, &file, codes)?
    } else if path.is_dir() {
        path.to_path_buf()
    } else if model == "demo" {
        demo()?
    } else if looks_like_hub_id(model) {
        hub::resolve(model, &hub_options(), &ctx.progress)?
    } else {
        return Err(CheckpointError::invalid_hint(
            path,
            "no such folder",
            "MODEL is a folder, a .gguf file, `demo`, or a hub id `org/name[@revision]`",
        )
        .into());
    };
    Ok(Located::new(model, dir))
}

/// The GGUF file that a path is, or that the folder it names holds in place of a checkpoint.
pub fn gguf_file(path: &Path) -> Option<PathBuf> {
    let inside = path.join(gguf::write::FILE);
    match path.is_dir() {
        true => (inside.is_file() && !path.join("config.json").exists()).then_some(inside),
        false => path.extension().is_some_and(|e| e == "gguf").then(|| path.to_path_buf()),
    }
}

/// Hub options from the environment.
pub fn hub_options() -> HubOptions {
    HubOptions::from_env_map(|k| std::env::var(k).ok())
}

fn looks_like_hub_id(model: &str) -> bool {
    let name = model.split('@').next().unwrap_or_default();
    let parts: Vec<&str> = name.split('/').collect();
    parts.len() == 2 && parts.iter().all(|p| !p.is_empty() && !p.starts_with('.')) && !Path::new(model).exists()
}

/// Where converted models, the demo and compiled kernels are kept.
pub fn cache_dir() -> PathBuf {
    let var = |k: &str| std::env::var_os(k).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("LOWBIT_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("lowbit")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/lowbit")))
        .unwrap_or_else(|| std::env::temp_dir().join("lowbit"))
}

/// Unpacks the embedded demo model once.
fn demo() -> Result<PathBuf> {
    let sums: Vec<u8> =
        DEMO.iter().flat_map(|(n, b)| format!("{n}{}", lowbit_checkpoint::hash::sha256_hex(b)).into_bytes()).collect();
    let id = lowbit_checkpoint::hash::sha256_hex(&sums);
    let dir = cache_dir().join(format!("demo-{}", id.get(..12).unwrap_or_default()));
    if dir.exists() {
        return Ok(dir);
    }
    let partial = dir.with_extension(format!("{}.tmp", std::process::id()));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&partial)?;
        for (name, bytes) in DEMO {
            std::fs::write(partial.join(name), bytes)?;
        }
        std::fs::rename(&partial, &dir)
    };
    let result = write();
    if result.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
        // Another process may have won the race.
        if dir.exists() {
            return Ok(dir);
        }
    }
    result.with_context(|| {
        format!("cannot unpack the demo model into {}\nhint: set LOWBIT_CACHE to a writable folder", dir.display())
    })?;
    Ok(dir)
}

/// Imports a file into the cache once.
fn import_cached(ctx: &Context, file: &Path, codes: bool) -> Result<PathBuf> {
    let sha = lowbit_checkpoint::hash::sha256_file(file)?;
    let kind = if codes { "gguf-codes" } else { "gguf" };
    let dir = cache_dir().join(format!("{kind}-{}", sha.get(..16).unwrap_or_default()));
    // Earlier versions left no record of what the file's types are.
    if ConvertRecord::read(&dir)?.is_none() {
        ctx.say(format!("importing {} into {}", file.display(), dir.display()));
        import_gguf(ctx, file, &dir, codes, true)?;
    }
    Ok(dir)
}

/// Writes a Hugging Face folder from a GGUF file. With `codes`, linears of integer types stay packed (compressed-tensors, with the
/// file's f16 scales); everything else becomes bf16.
pub fn import_gguf(ctx: &Context, file: &Path, output: &Path, codes: bool, force: bool) -> Result<()> {
    use lowbit_quantize::Progress;
    let mut gguf = GgufModel::open(file)?;
    let layout = Layout { format: PackFormat::CompressedTensors, scales: ScaleType::F16 };
    let names = gguf.tensor_names();
    let mut declared = Vec::new();
    let mut packed: Vec<(LinearScheme, String)> = Vec::new();
    let mut dense = Vec::new();
    for (name, shape) in &names {
        let module = name.strip_suffix(".weight").unwrap_or(name).to_string();
        match (gguf.packed_scheme(name).filter(|_| codes), shape.as_slice()) {
            (Some(scheme), [rows, cols]) => {
                declared.extend(linear::declare(&module, scheme, layout, *rows, *cols)?);
                packed.push((LinearScheme::from(scheme), module));
            }
            _ => {
                if shape.len() == 2 && !name.contains("embed_tokens") {
                    dense.push(module);
                }
                declared.push(Declared { name: name.clone(), dtype: Dtype::BF16, shape: shape.clone() });
            }
        }
    }
    let _writing = ctx.writing();
    let mut writer = CheckpointWriter::create(output, declared, DEFAULT_SHARD_BYTES, force)?;
    ctx.progress.stage("convert", names.len() as u64);
    for (name, _) in &names {
        ctx.check_stop()?;
        match gguf.packed(name)?.filter(|_| codes) {
            Some(q) => {
                let module = name.strip_suffix(".weight").unwrap_or(name);
                let parts = linear::declare(module, q.scheme, layout, q.out_features, q.in_features)?;
                for (d, bytes) in parts.iter().zip(linear::encode(&q, layout)?) {
                    writer.write(&d.name, &bytes)?;
                }
            }
            None => writer.write(name, &gguf.read_bf16(name)?)?,
        }
        ctx.progress.advance(1);
    }
    let mut config = gguf.config_json()?;
    if let (false, Some(map)) = (packed.is_empty(), config.as_object_mut()) {
        // The scales are f16, and engines load everything in one dtype.
        map.insert("dtype".into(), "float16".into());
        if gguf.tied() {
            dense.push("lm_head".into());
        }
        let groups = WrittenGroup::taken_over(by_scheme(packed));
        map.insert("quantization_config".into(), write_compressed_tensors(&groups, &dense, None));
    }
    writer.write_file("config.json", format!("{config:#}\n").as_bytes())?;
    for (name, bytes) in gguf.tokenizer_files()? {
        writer.write_file(&name, &bytes)?;
    }
    writer.write_file(converted::FILE, &ConvertRecord::new(file, gguf.bits()).to_bytes())?;
    writer.finish()?;
    Ok(())
}
