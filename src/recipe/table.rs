//! Our own recipes: TOML with a table of options.

use anyhow::{Result, bail};

use super::Given;

/// The table of a recipe that holds options.
pub(super) const OPTIONS: &str = "quantize";
/// The table that says what it was made with; not read as options.
pub(super) const MADE: &str = "made";

/// Reads a recipe; `switch` says whether an option is a switch, by its long name, and nothing of what is no option.
pub(super) fn read(text: &str, switch: &dyn Fn(&str) -> Option<bool>) -> Result<Given> {
    let document = match toml_edit::Document::parse(text) {
        Ok(d) => d,
        Err(e) => bail!("not valid TOML: {}", e.to_string().trim_end()),
    };
    let mut out = Vec::new();
    for (name, item) in document.as_table() {
        match (name, item.as_table()) {
            (MADE, Some(_)) => {}
            (OPTIONS, Some(table)) => {
                for (key, item) in table {
                    out.extend(option(key, item, switch(key))?);
                }
            }
            _ => bail!("`{name}`: a recipe has the tables [{OPTIONS}] and [{MADE}]"),
        }
    }
    if !document.contains_key(OPTIONS) {
        bail!("a recipe has a table [{OPTIONS}], this file has none");
    }
    Ok(out)
}

fn option(key: &str, item: &toml_edit::Item, switch: Option<bool>) -> Result<Option<(String, Option<Vec<String>>)>> {
    let Some(switch) = switch else {
        bail!("`{key}` is no option of a quantization\nhint: `lowbit quantize --help` lists them");
    };
    let scalar = |v: &toml_edit::Value| -> Option<String> {
        v.as_str()
            .map(str::to_string)
            .or_else(|| v.as_integer().map(|i| i.to_string()))
            .or_else(|| v.as_float().map(|f| f.to_string()))
    };
    let value = item.as_value();
    let (flag, array) = (value.and_then(|v| v.as_bool()), value.and_then(|v| v.as_array()));
    match (switch, flag, array, value.and_then(scalar)) {
        (true, Some(on), ..) => Ok(on.then(|| (key.to_string(), None))),
        (false, _, Some(values), _) => {
            let Some(values) = values.iter().map(scalar).collect::<Option<Vec<_>>>() else {
                bail!("`{key}`: a list holds texts or numbers");
            };
            Ok((!values.is_empty()).then(|| (key.to_string(), Some(values))))
        }
        (false, _, _, Some(one)) => Ok(Some((key.to_string(), Some(vec![one])))),
        (true, ..) => bail!("`{key}` is true or false"),
        _ => bail!("`{key}`: expected a text, a number or a list of them"),
    }
}
