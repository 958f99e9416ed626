//! Kernel sources to a cubin with NVRTC, found and loaded at run time, kept on disk. Where there is none, `module.rs`
//! takes the PTX made before (`ptx.rs`).
//!
//! No GPU and no CUDA header is needed: the sources include nothing from the toolkit. NVRTC is loaded by absolute
//! path, together with its `builtins` library (it has no run path, so the loader must know that one already).

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use sha2::{Digest, Sha256};

use crate::error::{KernelError, Result};

/// The device code, in the order it is compiled: one translation unit, as in `emulator/registry.cpp`.
pub const SOURCES: [(&str, &str); 25] = [
    ("gpu.h", include_str!("src/gpu.h")),
    ("elementwise.cu", include_str!("src/elementwise.cu")),
    ("norm.cu", include_str!("src/norm.cu")),
    ("rope.cu", include_str!("src/rope.cu")),
    ("rope_append.cu", include_str!("src/rope_append.cu")),
    ("score.cu", include_str!("src/score.cu")),
    ("sample.cu", include_str!("src/sample.cu")),
    ("embed.cu", include_str!("src/embed.cu")),
    ("attention.cu", include_str!("src/attention.cu")),
    ("attention_decode.cu", include_str!("src/attention_decode.cu")),
    ("attention_decode_half.cu", include_str!("src/attention_decode_half.cu")),
    ("attention_half.cu", include_str!("src/attention_half.cu")),
    ("linear_gemv.cu", include_str!("src/linear_gemv.cu")),
    ("linear_gemm.cu", include_str!("src/linear_gemm.cu")),
    ("linear_narrow.cu", include_str!("src/linear_narrow.cu")),
    ("linear_wide.cu", include_str!("src/linear_wide.cu")),
    ("linear_w8a8.cu", include_str!("src/linear_w8a8.cu")),
    ("hessian.cu", include_str!("src/hessian.cu")),
    ("hessian_wide.cu", include_str!("src/hessian_wide.cu")),
    ("random.cu", include_str!("src/random.cu")),
    ("reproducible.cu", include_str!("src/reproducible.cu")),
    ("reproducible_attention.cu", include_str!("src/reproducible_attention.cu")),
    ("solve_factor.cu", include_str!("src/solve_factor.cu")),
    ("solve_gptq.cu", include_str!("src/solve_gptq.cu")),
    ("input.cu", include_str!("src/input.cu")),
];

/// Where to look for NVRTC and where to keep what it made. This crate reads no environment: the caller fills it.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// A folder or installation prefix with `libnvrtc.so.*`; when given, no other place is tried.
    pub nvrtc: Option<PathBuf>,
    /// Folder for compiled kernels, made when missing.
    pub cache_dir: PathBuf,
    /// More folders to search before the usual ones: library folders or prefixes (`CUDA_HOME`, `VIRTUAL_ENV`).
    pub search: Vec<PathBuf>,
}

/// The result of a compilation.
pub struct Compiled {
    /// An ELF image for one architecture.
    pub cubin: Vec<u8>,
    /// NVRTC's and ptxas's words: registers and spills of each kernel.
    pub log: String,
    /// Whether it came from the disk.
    pub cached: bool,
}

/// Compiles all kernels for `arch` (`sm_80`, `sm_90a`), or takes them from the cache. Needs no GPU.
pub fn compile(arch: &str, options: &DeviceOptions) -> Result<Compiled> {
    Nvrtc::find(options, c_int::MAX)?.cubin(arch, options)
}

/// PTX of all kernels for a virtual architecture (`compute_80`), never from the cache: what `ptx/` is made of.
pub fn compile_ptx(arch: &str, options: &DeviceOptions) -> Result<String> {
    let nvrtc = Nvrtc::find(options, c_int::MAX)?;
    let (ptx, _) = nvrtc.compile(&source(), &flags(arch), arch, nvrtc.ptx_size, nvrtc.ptx)?;
    String::from_utf8(ptx)
        .map(|text| text.trim_end_matches('\0').to_string())
        .map_err(|_| missing("NVRTC made no PTX".to_string(), "report this"))
}

/// SHA-256 of what is compiled, in hexadecimal.
pub fn source_hash() -> String {
    format!("{:x}", Sha256::digest(source()))
}

fn flags(arch: &str) -> Vec<String> {
    vec![format!("--gpu-architecture={arch}"), "-std=c++17".to_string(), "-default-device".to_string()]
}

/// All sources as one, without the includes that join them on the host; errors name file and line.
fn source() -> String {
    let mut out = String::new();
    for (name, text) in SOURCES {
        out.push_str(&format!("#line 1 \"{name}\"\n"));
        for line in text.lines() {
            let joined = line.trim_start().starts_with("#include \"") || line.trim_start().starts_with("#pragma once");
            out.push_str(if joined { "" } else { line });
            out.push('\n');
        }
    }
    out
}

fn cache_key(source: &str, flags: &[String], version: (c_int, c_int)) -> String {
    let mut hash = Sha256::new();
    hash.update(source);
    for flag in flags {
        hash.update([0]);
        hash.update(flag);
    }
    hash.update(format!("\0{}.{}", version.0, version.1));
    format!("{:x}", hash.finalize())
}

fn read_cache(path: &Path) -> Option<Compiled> {
    let cubin = fs::read(path).ok()?;
    let log = fs::read_to_string(path.with_extension("log")).ok()?;
    is_elf(&cubin).then_some(Compiled { cubin, log, cached: true })
}

/// Log first: the cubin's name appears last, whole.
fn write_cache(path: &Path, cubin: &[u8], log: &str) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    static WRITES: AtomicU32 = AtomicU32::new(0);
    let own = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{own}.tmp", std::process::id()));
    for (bytes, to) in [(log.as_bytes(), path.with_extension("log")), (cubin, path.to_path_buf())] {
        fs::write(&temporary, bytes)?;
        fs::rename(&temporary, to)?;
    }
    Ok(())
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

fn missing(problem: String, hint: &str) -> KernelError {
    KernelError::Device { device: "cuda", problem, hint: Some(hint.to_string()) }
}

type Program = *mut std::ffi::c_void;
type Status = c_int;
type SizeFn = unsafe extern "C" fn(Program, *mut usize) -> Status;
type CopyFn = unsafe extern "C" fn(Program, *mut c_char) -> Status;

/// The functions of `nvrtc.h` used here. The library stays loaded for the life of the process: unloading a compiler
/// that has run is not something its makers promise.
pub(super) struct Nvrtc {
    version: (c_int, c_int),
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    cubin_size: SizeFn,
    cubin: CopyFn,
    ptx_size: SizeFn,
    ptx: CopyFn,
    log_size: SizeFn,
    log: CopyFn,
}

impl Nvrtc {
    /// Major and minor version.
    pub(super) fn version(&self) -> (c_int, c_int) {
        self.version
    }

    /// The first usable library of the searched folders, no newer than the driver's major version: the driver could
    /// not load the result.
    pub(super) fn find(options: &DeviceOptions, driver_major: c_int) -> Result<Self> {
        let folders = match &options.nvrtc {
            Some(folder) => library_folders(folder),
            None => {
                let usual = ["/usr/local/cuda", "/opt/cuda", "/usr/local", "/usr", "/usr/lib/x86_64-linux-gnu"];
                let all = options.search.iter().cloned().chain(usual.map(PathBuf::from));
                all.flat_map(|p| library_folders(&p)).collect()
            }
        };
        let mut newer = None;
        for folder in &folders {
            match Self::open(folder) {
                Some(found) if found.version.0 <= driver_major => return Ok(found),
                Some(found) => newer = newer.or(Some(found.version)),
                None => {}
            }
        }
        if let Some((major, minor)) = newer {
            return Err(missing(
                format!("NVRTC {major}.{minor} is newer than the driver's CUDA {driver_major}"),
                "update the driver, or install an NVRTC of the driver's major version",
            ));
        }
        let place = options.nvrtc.as_ref().map_or("the usual places".to_string(), |p| p.display().to_string());
        Err(missing(
            format!("no NVRTC (libnvrtc.so) was found in {place}"),
            "pip install nvidia-cuda-nvrtc, or set LOWBIT_NVRTC to the folder that has libnvrtc.so",
        ))
    }

    /// All kernels for `arch`, compiled or from the cache.
    pub(super) fn cubin(&self, arch: &str, options: &DeviceOptions) -> Result<Compiled> {
        let mut flags = flags(arch);
        flags.push("--ptxas-options=-v".to_string());
        let source = source();
        let key = cache_key(&source, &flags, self.version);
        let path = options.cache_dir.join(format!("{arch}-{key}.cubin"));
        if let Some(found) = read_cache(&path) {
            return Ok(found);
        }
        let (cubin, log) = self.compile(&source, &flags, arch, self.cubin_size, self.cubin)?;
        if !is_elf(&cubin) {
            return Err(missing("NVRTC made no cubin".to_string(), "report this"));
        }
        // The cache only saves time: a folder that cannot be written costs half a second at the next start.
        let _ = write_cache(&path, &cubin, &log);
        Ok(Compiled { cubin, log, cached: false })
    }

    /// Loads the library of `folder` after its `builtins`; `None` when it is not there or not usable.
    fn open(folder: &Path) -> Option<Self> {
        let mut names: Vec<String> =
            fs::read_dir(folder).ok()?.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|n| n.starts_with("libnvrtc") && n.contains(".so") && !n.contains(".alt."));
        names.sort();
        let load = |name: &String| {
            // SAFETY: a vendor library chosen by name from the folders the caller or the system named; its
            // initialisers are the vendor's own. Never unloaded.
            unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) }.ok().map(ManuallyDrop::new)
        };
        let (builtins, main): (Vec<&String>, Vec<&String>) = names.iter().partition(|n| n.contains("builtins"));
        for name in builtins {
            load(name);
        }
        // The most precise name last: `libnvrtc.so`, `libnvrtc.so.13`, `libnvrtc.so.13.0.88` are one file.
        main.iter().rev().find_map(|n| Self::bind(&*load(n)?))
    }

    fn bind(library: &Library) -> Option<Self> {
        type VersionFn = unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status;
        // SAFETY: the types are those of `nvrtc.h`, unchanged since CUDA 11.1, and the library is never unloaded.
        unsafe {
            let version_of: VersionFn = *library.get(b"nvrtcVersion\0").ok()?;
            let mut version = (0, 0);
            if version_of(&mut version.0, &mut version.1) != 0 {
                return None;
            }
            Some(Self {
                version,
                error_string: *library.get(b"nvrtcGetErrorString\0").ok()?,
                create: *library.get(b"nvrtcCreateProgram\0").ok()?,
                compile: *library.get(b"nvrtcCompileProgram\0").ok()?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").ok()?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0").ok()?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").ok()?,
                ptx_size: *library.get(b"nvrtcGetPTXSize\0").ok()?,
                ptx: *library.get(b"nvrtcGetPTX\0").ok()?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0").ok()?,
                log: *library.get(b"nvrtcGetProgramLog\0").ok()?,
            })
        }
    }

    fn check(&self, doing: &str, status: Status, log: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a static string for every status, known or not.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy();
        let (major, minor) = self.version;
        let problem = format!("NVRTC {major}.{minor}, {doing}: {text}\n{log}");
        Err(KernelError::Device { device: "cuda", problem: problem.trim_end().to_string(), hint: None })
    }

    /// The output that `size_of` and `copy` read, and the log.
    fn compile(
        &self,
        source: &str,
        flags: &[String],
        arch: &str,
        size_of: SizeFn,
        copy: CopyFn,
    ) -> Result<(Vec<u8>, String)> {
        let text =
            |s: &str| CString::new(s).map_err(|_| missing("a NUL in the kernels' source".to_string(), "rebuild"));
        let source = text(source)?;
        let flags = flags.iter().map(|f| text(f)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<*const c_char> = flags.iter().map(|f| f.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: strings end in NUL and outlive the program; no headers are passed.
        let status = unsafe { (self.create)(&mut program, source.as_ptr(), c"kernels.cu".as_ptr(), 0, none, none) };
        self.check("creating the program", status, "")?;
        // SAFETY: the program exists, and `pointers` holds as many valid strings as stated.
        let status = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.fetch(program, self.log_size, self.log);
        let log = log.map(|l| String::from_utf8_lossy(&l).trim_end_matches('\0').to_string());
        let doing = format!("compiling for {arch}");
        let result = self
            .check(&doing, status, log.as_deref().unwrap_or_default())
            .and_then(|()| Ok((self.fetch(program, size_of, copy)?, log?)));
        // SAFETY: created above, destroyed once; everything was copied out.
        unsafe { (self.destroy)(&mut program) };
        result
    }

    /// One of the outputs of a compiled program.
    fn fetch(&self, program: Program, size_of: SizeFn, copy: CopyFn) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program exists.
        self.check("reading a size", unsafe { size_of(program, &mut size) }, "")?;
        let mut out = vec![0u8; size];
        if size > 0 {
            // SAFETY: `out` has the size the program gave for this output.
            self.check("reading the result", unsafe { copy(program, out.as_mut_ptr().cast()) }, "")?;
        }
        Ok(out)
    }
}

/// The folders of a library folder or installation prefix that can hold NVRTC: itself, `lib64`, and the Python
/// packages `nvidia-cuda-nvrtc` (CUDA 13) and `nvidia-cuda-nvrtc-cu12`.
fn library_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> = ["", "lib64", "lib", "targets/x86_64-linux/lib"].map(|s| prefix.join(s)).into();
    let python = fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten().map(|e| e.path());
    let mut python: Vec<PathBuf> =
        python.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"))).collect();
    python.sort();
    for folder in python.iter().rev() {
        for site in ["site-packages", "dist-packages"] {
            out.extend(["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|s| folder.join(site).join(s)));
        }
    }
    out
}
