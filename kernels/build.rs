//! Compiles the GPU kernels for the host (feature `emulated`): once plain, once with every memory access reported.

fn main() {
    for path in ["build.rs", "src/emulator", "src/cuda/src"] {
        println!("cargo:rerun-if-changed={path}");
    }
    #[cfg(feature = "emulated")]
    if !only_checks() {
        emulator();
    }
}

/// Whether clippy asks, which links nothing: it would compile for minutes what nobody calls.
#[cfg(feature = "emulated")]
fn only_checks() -> bool {
    println!("cargo:rerun-if-env-changed=RUSTC_WORKSPACE_WRAPPER");
    let wrapper = std::env::var_os("RUSTC_WORKSPACE_WRAPPER").map(std::path::PathBuf::from);
    wrapper.is_some_and(|w| w.file_stem().is_some_and(|name| name == "clippy-driver"))
}

#[cfg(feature = "emulated")]
fn emulator() {
    let base = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3).debug(false).pic(true).flag_if_supported("-Wno-unknown-pragmas");
        // The kernels say themselves what is fused (fmaf) and what is rounded twice.
        build.flag("-ffp-contract=off");
        // Kernels look at memory as uint4 and as floats; device compilers do not mind.
        build.flag_if_supported("-fno-strict-aliasing");
        // A large local array must meet the page below the fiber's stack, not the neighbour's stack beyond it.
        build.flag_if_supported("-fstack-clash-protection");
        if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
            build.flag("-mavx2").flag("-mfma").flag("-mf16c");
        }
        build
    };
    let instrument = base().is_flag_supported("-fsanitize=thread").unwrap_or(false);
    let mut plain = base();
    plain.files(
        ["registry", "runtime", "launch", "warp", "matrix", "memory", "check"].map(|f| format!("src/emulator/{f}.cpp")),
    );
    if instrument {
        plain.define("EMU_CHECKS", None);
        let mut checked = base();
        // Only the compiler's side of it: the functions it calls are in check.cpp.
        checked.flag("-fsanitize=thread").define("EMU_CHECKED", None);
        checked.file("src/emulator/registry.cpp");
        // A folder of its own: object files are named after their sources.
        if let Some(out) = std::env::var_os("OUT_DIR") {
            checked.out_dir(std::path::Path::new(&out).join("checked"));
        }
        checked.compile("emulator_checked");
    }
    plain.compile("emulator");
}
