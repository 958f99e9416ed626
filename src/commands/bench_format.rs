//! `lowbit bench --format`: the rows in llama-bench's formats, for the scripts that read them.
//!
//! Fields, types and layouts are those of llama.cpp's `tools/llama-bench` (fields that mean nothing here have the value they have
//! when left alone there); `n_seqs`, which it lacks, follows where a test decodes several sequences.

use lowbit_bench::{BenchRecord, BenchRow};
use serde_json::{Map, Value, json};

use crate::args::BenchFormat;

/// A row as llama-bench's fields, in its order.
struct Row {
    fields: Vec<(&'static str, Value)>,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
}

/// Type of a column in SQL.
fn sql_type(v: &Value) -> &'static str {
    match v {
        Value::Number(n) if n.is_f64() => "REAL",
        Value::Number(_) | Value::Bool(_) => "INTEGER",
        _ => "TEXT",
    }
}

/// As in CSV and SQL.
fn plain(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        Value::Bool(b) => u8::from(*b).to_string(),
        Value::Number(n) if n.is_f64() => format!("{:.6}", n.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    }
}

/// The record in a format.
pub fn render(r: &BenchRecord, format: BenchFormat) -> String {
    let several = r.rows.iter().any(|b| b.batch > 1);
    let rows: Vec<Row> = r.rows.iter().map(|b| row(r, b, several)).collect();
    let names: Vec<&str> = rows.first().map_or(Vec::new(), |f| f.fields.iter().map(|f| f.0).collect());
    let object = |row: &Row| {
        let mut map: Map<String, Value> = row.fields.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        map.insert("samples_ns".into(), json!(row.samples_ns));
        map.insert("samples_ts".into(), json!(row.samples_ts));
        Value::Object(map)
    };
    match format {
        BenchFormat::Md => markdown(r, &rows, several),
        BenchFormat::Json => format!("{:#}", Value::Array(rows.iter().map(object).collect())),
        BenchFormat::Jsonl => rows.iter().map(|row| object(row).to_string()).collect::<Vec<_>>().join("\n"),
        BenchFormat::Csv => {
            let quoted = |v: &Value| format!("\"{}\"", plain(v).replace('"', "\"\""));
            let line = |row: &Row| row.fields.iter().map(|f| quoted(&f.1)).collect::<Vec<_>>().join(",");
            std::iter::once(names.join(",")).chain(rows.iter().map(line)).collect::<Vec<_>>().join("\n")
        }
        BenchFormat::Sql => {
            let columns = rows.first().map_or(Vec::new(), |row| {
                row.fields.iter().map(|(k, v)| format!("  {k} {}", sql_type(v))).collect::<Vec<_>>()
            });
            let mut out = format!("CREATE TABLE IF NOT EXISTS llama_bench (\n{}\n);\n", columns.join(",\n"));
            for row in &rows {
                let values: Vec<String> =
                    row.fields.iter().map(|f| format!("'{}'", plain(&f.1).replace('\'', "''"))).collect();
                out.push_str(&format!(
                    "\nINSERT INTO llama_bench ({}) VALUES ({});",
                    names.join(", "),
                    values.join(", ")
                ));
            }
            out
        }
    }
}

/// Mean and standard deviation of a sample.
fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// Prompt, generated tokens and depth in a test's name.
fn counts(test: &str) -> (u64, u64, u64) {
    let (name, depth) = test.split_once(" @ d").unwrap_or((test, "0"));
    let n = |prefix: &str| name.strip_prefix(prefix).and_then(|v| v.parse().ok()).unwrap_or(0);
    (n("pp"), n("tg"), depth.parse().unwrap_or(0))
}

fn row(r: &BenchRecord, b: &BenchRow, several: bool) -> Row {
    let p = &r.provenance;
    let memory = r.memory.iter().find(|m| m.role == b.role && (m.model.is_empty() || m.model == b.model));
    let ns: Vec<f64> = b.samples_ns.iter().map(|v| *v as f64).collect();
    let ((avg_ns, stddev_ns), (avg_ts, stddev_ts)) = (spread(&ns), spread(&b.samples));
    let (prompt, generated, depth) = counts(&b.test);
    let gpu = p.gpu.is_some();
    let kv = memory.map_or("f32", |m| match m.kv_element_bytes {
        1 if p.options.get("kv_cache").is_some_and(|v| v == "fp8") => "f8_e4m3",
        1 => "q8_0",
        2 => "bf16",
        _ => "f32",
    });
    let mut fields = vec![
        ("build_commit", json!(p.commit.as_deref().unwrap_or("unknown"))),
        ("build_number", json!(0)),
        ("cpu_info", json!(p.cpu)),
        ("gpu_info", json!(p.gpu.as_deref().unwrap_or(""))),
        ("backends", json!(if gpu { "CUDA" } else { "CPU" })),
        ("model_filename", json!(b.model)),
        ("model_type", json!(short(&b.model))),
        ("model_size", json!(memory.map_or(0, |m| m.weight_bytes))),
        ("model_n_params", json!(memory.map_or(0, |m| m.parameters))),
        ("n_batch", json!(prompt.max(1))),
        ("n_ubatch", json!(prompt.max(1))),
        ("n_threads", json!(p.threads)),
        ("cpu_mask", json!("0x0")),
        ("cpu_strict", json!(false)),
        ("poll", json!(0)),
        ("type_k", json!(kv)),
        ("type_v", json!(kv)),
        ("n_gpu_layers", json!(if gpu { 99 } else { 0 })),
        ("n_cpu_moe", json!(0)),
        ("split_mode", json!("none")),
        ("main_gpu", json!(0)),
        ("no_kv_offload", json!(false)),
        ("flash_attn", json!(1)),
        ("devices", json!("auto")),
        ("tensor_split", json!("0.00")),
        ("tensor_buft_overrides", json!("none")),
        ("load_mode", json!("mmap")),
        ("lazy_mode", json!("none")),
        ("embeddings", json!(false)),
        ("no_op_offload", json!(0)),
        ("no_host", json!(false)),
        ("repack", json!(true)),
        ("fit_target", json!(0)),
        ("fit_min_ctx", json!(0)),
        ("n_prompt", json!(prompt)),
        ("n_gen", json!(generated)),
        ("n_depth", json!(depth)),
        ("test_time", json!(time(p.unix_time))),
        ("avg_ns", json!(avg_ns.round() as u64)),
        ("stddev_ns", json!(stddev_ns.round() as u64)),
        ("avg_ts", json!(avg_ts)),
        ("stddev_ts", json!(stddev_ts)),
    ];
    if several {
        fields.push(("n_seqs", json!(b.batch)));
    }
    Row { fields, samples_ns: b.samples_ns.clone(), samples_ts: b.samples.clone() }
}

/// The last part of a path; a hub id as it is.
fn short(model: &str) -> &str {
    if std::path::Path::new(model).exists() {
        model.trim_end_matches('/').rsplit('/').next().unwrap_or(model)
    } else {
        model
    }
}

/// `2026-01-31T12:00:00Z`.
fn time(unix: u64) -> String {
    lowbit_report::utc(unix).replacen(' ', "T", 1).replace(" UTC", "Z")
}

fn markdown(r: &BenchRecord, rows: &[Row], several: bool) -> String {
    // Name, width (negative: to the left), as llama-bench prints them.
    let mut columns = vec![("model", -30i32), ("size", 10), ("params", 10), ("backend", -10)];
    columns.push(if r.provenance.gpu.is_some() { ("ngl", 3) } else { ("threads", 7) });
    if several {
        columns.push(("n_seqs", 6));
    }
    columns.extend([("test", 15), ("t/s", 20)]);
    let cell = |text: &str, width: i32| {
        let w = width.unsigned_abs() as usize;
        if width < 0 { format!(" {text:<w$} |") } else { format!(" {text:>w$} |") }
    };
    let line = |cells: Vec<String>| {
        let body: String = cells.iter().zip(&columns).map(|(c, (_, w))| cell(c, *w)).collect();
        format!("|{body}")
    };
    let rule: String = columns
        .iter()
        .map(|(_, w)| format!(" {}{} |", "-".repeat(w.unsigned_abs() as usize - 1), if *w > 0 { ":" } else { "-" }))
        .collect();
    let mut out = vec![line(columns.iter().map(|c| c.0.to_string()).collect()), format!("|{rule}")];
    for (row, b) in rows.iter().zip(&r.rows) {
        let get = |k: &str| row.fields.iter().find(|f| f.0 == k).map_or(&Value::Null, |f| &f.1);
        let number = |k: &str| get(k).as_f64().unwrap_or(0.0);
        let cells = columns.iter().map(|(name, _)| match *name {
            "model" => plain(get("model_type")),
            "size" => match number("model_size") / 1024.0 / 1024.0 {
                m if m < 1024.0 => format!("{m:.2} MiB"),
                m => format!("{:.2} GiB", m / 1024.0),
            },
            "params" => match number("model_n_params") {
                n if n < 1e9 => format!("{:.2} M", n / 1e6),
                n => format!("{:.2} B", n / 1e9),
            },
            "backend" => plain(get("backends")),
            "ngl" => plain(get("n_gpu_layers")),
            "threads" => plain(get("n_threads")),
            "test" => b.test.clone(),
            "t/s" => format!("{:.2} ± {:.2}", number("avg_ts"), number("stddev_ts")),
            other => plain(get(other)),
        });
        out.push(line(cells.collect()));
    }
    let commit = r.provenance.commit.as_deref().unwrap_or("unknown");
    out.push(format!("\nbuild: {commit} (0)"));
    out.join("\n")
}
