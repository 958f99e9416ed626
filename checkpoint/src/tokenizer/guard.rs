//! The tokenizers library panics over some files that its own tools would not write. Here that is an error like another.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread becomes an error: a program's panic hook has nothing to tell then.
pub fn panics_are_errors() -> bool {
    GUARDED.get()
}

/// What the library answers; its errors and panics as text.
pub(super) fn guarded<T>(call: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, String> {
    let before = GUARDED.replace(true);
    let answer = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    match answer {
        Ok(answer) => answer.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
            Err(format!("the tokenizers library fails on it ({})", text.unwrap_or("no message")))
        }
    }
}
