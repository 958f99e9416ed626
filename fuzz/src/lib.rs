//! The targets of `tests/hostile` for libFuzzer. The seeds are those of the test: `cargo fuzz run NAME -- -runs=0` after
//! `seeds(NAME)` were written to `corpus/NAME`, which [`run`] does at its first call.
#![allow(dead_code)]

#[path = "../../src/recipe/llm_compressor.rs"]
mod llm_compressor;
#[path = "../../tests/hostile/mutate.rs"]
mod mutate;
#[path = "../../src/recipe/table.rs"]
mod recipe_table;
#[path = "../../report/tests/records/mod.rs"]
mod records;
#[path = "../../tests/hostile/seeds.rs"]
mod seeds;
#[path = "../../tests/hostile/targets.rs"]
mod targets;
#[path = "../../tests/hostile/tiny.rs"]
mod tiny;

use std::cell::RefCell;
use std::path::PathBuf;

/// Options of a recipe, as `src/recipe.rs` has them.
type Given = Vec<(String, Option<Vec<String>>)>;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

thread_local! {
    static READER: RefCell<Option<(tempfile::TempDir, targets::Reader)>> = const { RefCell::new(None) };
}

/// Gives `data` to the target of this name.
pub fn run(name: &str, data: &[u8]) {
    READER.with_borrow_mut(|reader| {
        let (_, read) = reader.get_or_insert_with(|| {
            let target = targets::all().into_iter().find(|t| t.name == name).expect("a target");
            let corpus = root().join("fuzz/corpus").join(name);
            std::fs::create_dir_all(&corpus).expect("a folder for the corpus");
            for (i, seed) in (target.seeds)().iter().enumerate() {
                std::fs::write(corpus.join(format!("seed-{i}")), seed).expect("a seed");
            }
            let dir = tempfile::tempdir().expect("a folder");
            let read = (target.open)(dir.path());
            (dir, read)
        });
        read(data);
    });
}
