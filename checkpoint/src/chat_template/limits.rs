//! How large a value may be that a template writes out.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Bytes and items of one value.
const MOST: usize = 16 << 20;
/// Lists in lists.
const DEEPEST: usize = 64;
/// Spaces that `tojson` may begin lines with.
const MOST_INDENTATION: usize = 64 << 20;

/// Fails where `value` is larger on paper than any text for a model. Lists repeated by `*` are made as they are read, and lists
/// may hold one another many times over, so a few bytes can stand for more than any memory.
pub fn writable(value: &Value) -> Result<(), Error> {
    spend(value, &mut MOST.clone(), 0)
}

/// Fails where `value` as JSON, indented by `indent`, would have more than 64 MiB of spaces. What is no number the filter itself
/// refuses. Give it what is [`writable`].
pub fn indentable(value: &Value, indent: Option<&Value>) -> Result<(), Error> {
    let Some(columns) = indent.and_then(|i| usize::try_from(i.clone()).ok()) else { return Ok(()) };
    let json = minijinja::filters::tojson(value, None, Kwargs::from_iter([] as [(String, Value); 0]))?.to_string();
    // Each of them begins a line at most, as deep as values go.
    let lines = json.bytes().filter(|b| b",[]{}".contains(b)).count().max(1);
    if lines.saturating_mul(columns).saturating_mul(DEEPEST) > MOST_INDENTATION {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: an indent of {columns} is too much")));
    }
    Ok(())
}

/// Stack for a template that may build lists in lists without end (a `namespace` is the only thing that outlives a turn of a
/// loop): such a value is taken apart level by level, as deep as the fuel let it grow.
const STACK: usize = 512 << 20;

/// Runs `render`, on a stack of its own where `source` may need that. Only what is touched of it takes memory.
pub fn with_stack<T: Send>(source: &str, render: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    if !source.contains("namespace") {
        return render();
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, render);
        let thread =
            thread.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("no thread to render in: {e}")))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn spend(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    let wrong = |text: &str| Error::new(ErrorKind::InvalidOperation, text.to_string());
    let size = 1 + value.as_str().map_or(0, str::len);
    *left = left.checked_sub(size).ok_or_else(|| wrong("a value too large to be written out"))?;
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    if depth == DEEPEST {
        return Err(wrong("a value nested too deep to be written out"));
    }
    for item in value.try_iter()? {
        if value.kind() == ValueKind::Map {
            spend(&value.get_item(&item)?, left, depth + 1)?;
        }
        spend(&item, left, depth + 1)?;
    }
    Ok(())
}
