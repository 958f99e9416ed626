//! CSV (RFC 4180): a header line, quoted fields with doubled quotes and line breaks inside.

use serde_json::Value as Json;

use super::Numbered;

/// Rows by their number in the file (the header is row 1); a field that is a whole number or a finite decimal becomes one.
pub(super) fn parse(text: &str) -> Result<Numbered, (usize, String)> {
    let mut records = Vec::new();
    let mut chars = text.chars().peekable();
    while chars.peek().is_some() {
        let record = record(&mut chars).map_err(|p| (records.len() + 1, p))?;
        records.push(record);
    }
    let mut records = records.into_iter().enumerate().filter(|(_, r)| !(r.len() == 1 && r[0].0.is_empty()));
    let Some((_, header)) = records.next() else { return Err((1, "no header line".into())) };
    let mut out = Vec::new();
    for (i, record) in records {
        if record.len() != header.len() {
            let fields = if record.len() == 1 { "field" } else { "fields" };
            return Err((i + 1, format!("{} {fields} for {} columns", record.len(), header.len())));
        }
        let pairs = header.iter().zip(record).map(|((name, _), (field, quoted))| (name.clone(), value(field, quoted)));
        out.push((i + 1, pairs.collect()));
    }
    Ok(out)
}

fn value(field: String, quoted: bool) -> Json {
    let number = |f: &str| f.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    // 007 and a quoted 7 stay text.
    let padded = field.trim_start_matches('-').len() > 1 && field.trim_start_matches('-').starts_with('0');
    if quoted || field.is_empty() || !number(&field) || (padded && !field.contains('.')) {
        return Json::String(field);
    }
    if let Ok(whole) = field.parse::<i64>() {
        return whole.into();
    }
    match field.parse::<f64>().ok().filter(|x| x.is_finite()) {
        Some(x) => x.into(),
        None => Json::String(field),
    }
}

fn record(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<Vec<(String, bool)>, String> {
    let mut fields = Vec::new();
    loop {
        let mut field = String::new();
        let quoted = chars.next_if_eq(&'"').is_some();
        if quoted {
            loop {
                match chars.next() {
                    None => return Err("a quoted field does not end".into()),
                    Some('"') if chars.next_if_eq(&'"').is_some() => field.push('"'),
                    Some('"') => break,
                    Some(c) => field.push(c),
                }
            }
        }
        let mut end = true;
        while let Some(c) = chars.next() {
            match c {
                ',' => {
                    end = false;
                    break;
                }
                '\n' => break,
                '\r' if chars.peek() == Some(&'\n') => {}
                c if quoted => return Err(format!("`{c}` after a quoted field")),
                c => field.push(c),
            }
        }
        fields.push((field, quoted));
        if end {
            return Ok(fields);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields() {
        let rows = parse("a,b,c\r\n1,\"x\ny, \"\"z\"\"\",007\r\n-2.5,\"7\",\n").unwrap();
        let values: Vec<Json> = rows.into_iter().map(|r| r.1.into()).collect();
        assert_eq!(values, [json!({"a": 1, "b": "x\ny, \"z\"", "c": "007"}), json!({"a": -2.5, "b": "7", "c": ""})]);
        assert_eq!(parse("a,b\n1,2,3\n").unwrap_err().0, 2);
        assert!(parse("a\n\"x").unwrap_err().1.contains("does not end"));
        assert!(parse("a\n\"x\"y\n").unwrap_err().1.contains("after a quoted field"));
    }
}
