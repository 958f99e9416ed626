//! Libraries that panic over some files no tool of theirs would write (tokenizers, parquet). Here that is an error like another.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread becomes an error: a program's panic hook has nothing to tell then.
pub fn panics_are_errors() -> bool {
    GUARDED.get()
}

/// Calls into `library`; a panic inside comes back as text.
pub fn guarded<T>(library: &str, call: impl FnOnce() -> T) -> Result<T, String> {
    let before = GUARDED.replace(true);
    let answer = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    answer.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        format!("the {library} library fails on it ({})", text.unwrap_or("no message"))
    })
}
