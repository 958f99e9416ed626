//! A subset of JSON Schema (2020-12) for answers that must be JSON of a given form.
//!
//! Understood: `type`, `enum`, `const`, `properties`, `required`, `additionalProperties`, `minProperties`,
//! `maxProperties`, `items`, `prefixItems`, `minItems`, `maxItems`, `uniqueItems`, `minLength`, `maxLength`, `pattern`,
//! `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`, `multipleOf`, `allOf`, `anyOf`, `oneOf`, `not`, and the
//! annotations that constrain nothing. Any other keyword (`$ref` among them) is an error, never ignored.

use serde_json::{Map, Value as Json};

use super::pattern::Pattern;

const ANNOTATIONS: &[&str] = &["$schema", "$id", "$comment", "title", "description", "default", "examples", "format"];
const NUMBERS: &[&str] = &["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const COUNTS: &[&str] = &["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"];
const TYPES: &[&str] = &["object", "array", "string", "number", "integer", "boolean", "null"];

/// The JSON value of a text, which may stand in a Markdown code fence.
pub fn read(text: &str) -> Option<Json> {
    let text = text.trim();
    let inner = text.strip_prefix("```").and_then(|t| t.strip_suffix("```"));
    // The first line of a fence may name the language.
    let inner = inner.map(|t| t.strip_prefix("json").unwrap_or(t));
    serde_json::from_str(inner.unwrap_or(text)).ok()
}

/// Equality of values: order of keys aside, numbers by value.
pub fn equal(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Number(x), Json::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        (Json::Array(x), Json::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| equal(x, y)),
        (Json::Object(x), Json::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, v)| y.get(k).is_some_and(|w| equal(v, w)))
        }
        _ => a == b,
    }
}

/// Whether a schema uses only what is understood.
pub fn check(schema: &Json) -> Result<(), String> {
    let map = match schema {
        Json::Bool(_) => return Ok(()),
        Json::Object(map) => map,
        other => return Err(format!("a schema is an object, true or false, found {other}")),
    };
    for (key, value) in map {
        let bad = |expected: &str| Err(format!("schema: `{key}`: expected {expected}, found {value}"));
        match key.as_str() {
            "type" => {
                let names: Vec<&Json> = value.as_array().map_or_else(|| vec![value], |a| a.iter().collect());
                if !names.iter().all(|n| n.as_str().is_some_and(|n| TYPES.contains(&n))) {
                    return bad("names of JSON types");
                }
            }
            "enum" if value.is_array() => {}
            "const" => {}
            "required" if value.as_array().is_some_and(|a| a.iter().all(Json::is_string)) => {}
            "uniqueItems" if value.is_boolean() => {}
            "pattern" => match value.as_str().map(Pattern::new) {
                Some(Ok(_)) => {}
                Some(Err(e)) => return Err(format!("schema: {e}")),
                None => return bad("a pattern"),
            },
            "properties" => match value.as_object() {
                Some(map) => map.values().try_for_each(check)?,
                None => return bad("schemas by name"),
            },
            "items" | "not" | "additionalProperties" => check(value)?,
            "allOf" | "anyOf" | "oneOf" | "prefixItems" => match value.as_array() {
                Some(list) => list.iter().try_for_each(check)?,
                None => return bad("a list of schemas"),
            },
            k if NUMBERS.contains(&k) => {
                if !value.as_f64().is_some_and(|x| k != "multipleOf" || x > 0.0) {
                    return bad("a number");
                }
            }
            k if COUNTS.contains(&k) => {
                if value.as_u64().is_none() {
                    return bad("a whole number");
                }
            }
            k if ANNOTATIONS.contains(&k) => {}
            "enum" | "required" | "uniqueItems" => return bad("another value"),
            _ => return Err(format!("schema: keyword `{key}` is not supported")),
        }
    }
    Ok(())
}

/// Whether a value meets a schema that [`check`] accepted.
pub fn valid(schema: &Json, value: &Json) -> bool {
    match schema {
        Json::Bool(all) => *all,
        Json::Object(map) => map.iter().all(|(key, rule)| meets(map, key, rule, value)),
        _ => false,
    }
}

fn is_type(name: &str, value: &Json) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|x| x.fract() == 0.0),
        "boolean" => value.is_boolean(),
        _ => value.is_null(),
    }
}

fn meets(schema: &Map<String, Json>, key: &str, rule: &Json, value: &Json) -> bool {
    let list = |f: &dyn Fn(&Json) -> bool| rule.as_array().map_or(0, |l| l.iter().filter(|s| f(s)).count());
    let matching = || list(&|s| valid(s, value));
    let size = rule.as_u64().unwrap_or(0) as usize;
    let number = |f: &dyn Fn(f64, f64) -> bool| match (value.as_f64(), rule.as_f64()) {
        (Some(x), Some(limit)) => f(x, limit),
        _ => true,
    };
    let length = value.as_str().map(|s| s.chars().count());
    let items = value.as_array();
    let fields = value.as_object();
    match key {
        "type" => match rule {
            Json::String(name) => is_type(name, value),
            _ => list(&|n| n.as_str().is_some_and(|n| is_type(n, value))) > 0,
        },
        "enum" => list(&|v| equal(v, value)) > 0,
        "const" => equal(rule, value),
        "required" => fields.is_none_or(|f| list(&|k| k.as_str().is_some_and(|k| !f.contains_key(k))) == 0),
        "properties" => fields.is_none_or(|f| {
            rule.as_object().is_none_or(|r| r.iter().all(|(k, s)| f.get(k).is_none_or(|v| valid(s, v))))
        }),
        "additionalProperties" => fields.is_none_or(|f| {
            let named = |k: &String| schema.get("properties").and_then(|p| p.get(k)).is_some();
            f.iter().all(|(k, v)| named(k) || valid(rule, v))
        }),
        "minProperties" => fields.is_none_or(|f| f.len() >= size),
        "maxProperties" => fields.is_none_or(|f| f.len() <= size),
        "items" => {
            let before = schema.get("prefixItems").and_then(Json::as_array).map_or(0, Vec::len);
            items.is_none_or(|l| l.iter().skip(before).all(|v| valid(rule, v)))
        }
        "prefixItems" => {
            items.is_none_or(|l| rule.as_array().is_none_or(|r| r.iter().zip(l).all(|(s, v)| valid(s, v))))
        }
        "minItems" => items.is_none_or(|l| l.len() >= size),
        "maxItems" => items.is_none_or(|l| l.len() <= size),
        "uniqueItems" => items.is_none_or(|l| {
            rule == &Json::Bool(false) || l.iter().enumerate().all(|(i, a)| l.iter().take(i).all(|b| !equal(a, b)))
        }),
        "minLength" => length.is_none_or(|n| n >= size),
        "maxLength" => length.is_none_or(|n| n <= size),
        "pattern" => match (value.as_str(), rule.as_str().map(Pattern::new)) {
            (Some(text), Some(Ok(p))) => p.found_in(text),
            _ => true,
        },
        "minimum" => number(&|x, limit| x >= limit),
        "maximum" => number(&|x, limit| x <= limit),
        "exclusiveMinimum" => number(&|x, limit| x > limit),
        "exclusiveMaximum" => number(&|x, limit| x < limit),
        "multipleOf" => number(&|x, step| (x / step - (x / step).round()).abs() < 1e-9),
        "allOf" => matching() == rule.as_array().map_or(0, Vec::len),
        "anyOf" => matching() > 0,
        "oneOf" => matching() == 1,
        "not" => !valid(rule, value),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_keyword_can_fail() {
        for (schema, good, bad) in [
            (json!({"type": "integer"}), json!(2.0), json!(2.5)),
            (json!({"type": ["string", "null"]}), json!(null), json!(1)),
            (json!({"enum": [1, "a"]}), json!("a"), json!("b")),
            (json!({"const": {"a": 1}}), json!({"a": 1.0}), json!({"a": 2})),
            (json!({"required": ["a"]}), json!({"a": null}), json!({"b": 1})),
            (
                json!({"properties": {"a": {"type": "string"}}, "additionalProperties": false}),
                json!({"a": "x"}),
                json!({"b": "x"}),
            ),
            (json!({"properties": {"a": {"type": "string"}}}), json!({"b": 1}), json!({"a": 1})),
            (json!({"minProperties": 1, "maxProperties": 1}), json!({"a": 1}), json!({})),
            (json!({"items": {"minimum": 0}}), json!([0, 1]), json!([-1])),
            (
                json!({"prefixItems": [{"type": "string"}], "items": {"type": "number"}}),
                json!(["a", 1]),
                json!(["a", "b"]),
            ),
            (json!({"minItems": 1, "maxItems": 2, "uniqueItems": true}), json!([1, 2]), json!([1, 1.0])),
            (json!({"minLength": 2, "maxLength": 2}), json!("éé"), json!("é")),
            (json!({"pattern": "^a+$"}), json!("aa"), json!("ab")),
            (json!({"exclusiveMinimum": 0, "exclusiveMaximum": 1}), json!(0.5), json!(0)),
            (json!({"maximum": 3, "multipleOf": 0.1}), json!(0.3), json!(0.35)),
            (json!({"allOf": [{"type": "number"}, {"minimum": 1}]}), json!(1), json!(0)),
            (json!({"anyOf": [{"type": "number"}, {"type": "null"}]}), json!(null), json!("x")),
            (json!({"oneOf": [{"type": "number"}, {"minimum": 5}]}), json!(1), json!(6)),
            (json!({"not": {"type": "string"}}), json!(1), json!("x")),
        ] {
            check(&schema).unwrap();
            assert!(valid(&schema, &good), "{schema} refuses {good}");
            assert!(!valid(&schema, &bad), "{schema} takes {bad}");
        }
        assert!(valid(&json!(true), &json!(1)) && !valid(&json!(false), &json!(1)));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [json!({"$ref": "#"}), json!({"properties": {"a": {"if": {}}}}), json!({"minimum": "x"}), json!([])]
        {
            assert!(check(&bad).is_err(), "{bad}");
        }
    }
}
