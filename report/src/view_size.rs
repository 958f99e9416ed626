//! The section on size.

use lowbit_quantize::record::ComponentSize;
use serde_json::{Value, json};

use crate::chart_size;
use crate::format::{self as f, NONE, bytes, percent};
use crate::table::{Cell, Table};
use crate::view::size_source;
use crate::{Records, Variant};

/// Bytes by component of one model.
pub(crate) fn table(r: &Records) -> Option<Table> {
    let (sizes, before, after, _) = size_source(r)?;
    let mut t =
        Table::new("Bytes by component", &["Component", "#Before", "#After", "#Before ÷ after", "#Share after"]);
    let row = |name: &str, b: u64, a: u64| {
        let ratio = if a == 0 { NONE.to_owned() } else { f::factor(b as f64 / a as f64) };
        let share = if after == 0 { NONE.to_owned() } else { percent(a as f64 / after as f64, 3) };
        vec![name.into(), bytes(b).into(), bytes(a).into(), ratio.into(), share.into()]
    };
    for s in sizes {
        t.row(row(&s.component.replace('_', " "), s.before_bytes, s.after_bytes));
    }
    t.total(row("total", before, after));
    Some(t)
}

/// Bytes by component, a column for each variant.
fn matrix(sized: &[(&str, &[ComponentSize], u64, u64)]) -> Table {
    let mut heads = vec!["Component".to_owned(), "#float".to_owned()];
    heads.extend(sized.iter().map(|s| format!("#{}", s.0)));
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let mut t = Table::new("Bytes by component and variant", &heads);
    let mut names: Vec<&str> = Vec::new();
    for s in sized.iter().flat_map(|v| v.1) {
        if !names.contains(&s.component.as_str()) {
            names.push(&s.component);
        }
    }
    for name in names {
        let of = |sizes: &[ComponentSize], after: bool| -> Cell {
            let found = sizes.iter().find(|s| s.component == name);
            found.map_or(NONE.into(), |s| bytes(if after { s.after_bytes } else { s.before_bytes }).into())
        };
        let mut row: Vec<Cell> = vec![name.replace('_', " ").into()];
        row.extend(sized.first().map(|s| of(s.1, false)));
        row.extend(sized.iter().map(|s| of(s.1, true)));
        t.row(row);
    }
    let mut row: Vec<Cell> = vec!["total".into()];
    row.extend(sized.first().map(|s| bytes(s.2).into()));
    row.extend(sized.iter().map(|s| Cell::from(bytes(s.3))));
    t.total(row);
    t
}

fn linears(r: &Records) -> String {
    match (&r.quantize, &r.plan) {
        (_, Some(p)) => format!("{} linears quantized, {} kept as they are.", p.quantized_linears, p.kept_linears),
        (Some(q), None) => format!("{} linears quantized.", q.layers.len()),
        (None, None) => String::new(),
    }
}

/// The section; null without sizes.
pub(crate) fn section(variants: &[Variant]) -> Value {
    let sized: Vec<(&str, &[ComponentSize], u64, u64)> = variants
        .iter()
        .filter_map(|v| {
            size_source(&v.records).map(|(sizes, before, after, _)| (v.name.as_str(), sizes, before, after))
        })
        .collect();
    let bars: Vec<(&str, &[ComponentSize])> = sized.iter().map(|s| (s.0, s.1)).collect();
    let Some(chart) = chart_size::sizes(&chart_size::bars(&bars)) else { return Value::Null };
    let (table, said, planned) = match variants {
        [only] => {
            let planned = size_source(&only.records).is_some_and(|s| s.3);
            (table(&only.records), linears(&only.records), planned)
        }
        _ => (Some(matrix(&sized)), String::new(), false),
    };
    json!({ "planned": planned, "chart": chart, "table": table, "linears": said })
}
