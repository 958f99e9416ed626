//! The tokenizer's metadata for llama.cpp, from `tokenizer.json`: the other direction of [`super::tokenizer`].
//!
//! llama.cpp has its own tokenizers and picks one by name, so a pre-tokenizer it has no name for is refused.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::metadata::Meta;
use super::tokenizer::{self, CONTROL, NORMAL, UNKNOWN, USER_DEFINED};
use crate::chat_template::{read_json, special_token, template_text};
use crate::error::{CheckpointError, Result};

/// Token types that only the other direction does not tell apart.
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// Which of llama.cpp's tokenizers reads a `tokenizer.json`.
enum Kind {
    /// `gpt2` with the name of its pre-tokenizer.
    ByteLevel(&'static str),
    /// `llama`; whether a space is put before the text.
    SentencePiece(bool),
}

/// Metadata of the tokenizer of the checkpoint in `dir`; `vocab` is the number of rows of its embedding.
pub(super) fn metadata(dir: &Path, raw_config: &Value, vocab: usize) -> Result<Vec<(String, Meta)>> {
    let path = dir.join("tokenizer.json");
    let json =
        read_json(&path)?.ok_or_else(|| CheckpointError::invalid(&path, "no such file: GGUF carries the tokenizer"))?;
    let settings = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or_default();
    let kind = kind(&json, &path)?;
    let sentence_piece = matches!(kind, Kind::SentencePiece(_));
    let tokens = Tokens::read(&json, &path, vocab, sentence_piece)?;

    let mut meta: Vec<(String, Meta)> = Vec::new();
    let mut put = |key: &str, value: Meta| meta.push((format!("tokenizer.ggml.{key}"), value));
    match kind {
        Kind::ByteLevel(pre) => {
            put("model", Meta::String("gpt2".into()));
            put("pre", Meta::String(pre.into()));
            put("merges", Meta::Strings(tokens.merges.iter().map(|(l, r)| format!("{l} {r}")).collect()));
        }
        Kind::SentencePiece(prefix) => {
            put("model", Meta::String("llama".into()));
            put("pre", Meta::String("default".into()));
            put("add_space_prefix", Meta::Bool(prefix));
            put("scores", Meta::Floats(tokens.scores()));
        }
    }
    let ids: HashMap<&str, u32> = tokens.names.iter().zip(0u32..).map(|(t, i)| (t.as_str(), i)).collect();
    // The tokenizer's own names first, then what the model's files say.
    let id = |name: &str| {
        let named = special_token(&settings, &format!("{name}_token")).and_then(|t| ids.get(t.as_str()).copied());
        let key = format!("{name}_token_id");
        let listed = || [raw_config, &generation].iter().find_map(|c| first_id(c.get(key.as_str())?));
        named.or_else(listed).filter(|i| (*i as usize) < tokens.names.len())
    };
    let (bos, eos) = (id("bos"), id("eos"));
    for (key, id) in [("bos", bos), ("eos", eos), ("unknown", id("unk")), ("padding", id("pad"))] {
        if let Some(id) = id {
            put(&format!("{key}_token_id"), Meta::U32(id));
        }
    }
    let ends = generation.get("eos_token_id").or_else(|| raw_config.get("eos_token_id"));
    let other_end = ends.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64);
    if let Some(id) = other_end.filter_map(|i| u32::try_from(i).ok()).find(|i| Some(*i) != eos && (*i as usize) < vocab)
    {
        put("eot_token_id", Meta::U32(id));
    }
    let (first, last) = wrapped(&json);
    let said = |key: &str| settings.get(key).and_then(Value::as_bool);
    let is = |token: Option<String>, id: Option<u32>| {
        token.is_some() && token.and_then(|t| ids.get(t.as_str()).copied()) == id
    };
    put("add_bos_token", Meta::Bool(said("add_bos_token").unwrap_or_else(|| is(first, bos)) && bos.is_some()));
    put("add_eos_token", Meta::Bool(said("add_eos_token").unwrap_or_else(|| is(last, eos)) && eos.is_some()));
    put("token_type", Meta::Ints(tokens.kinds.iter().map(|k| *k as i32).collect()));
    put("tokens", Meta::Strings(tokens.names));
    if let Some(text) = template_text(dir)? {
        meta.push(("tokenizer.chat_template".into(), Meta::String(text)));
    }
    Ok(meta)
}

fn first_id(value: &Value) -> Option<u32> {
    value.as_array().map_or(Some(value), |a| a.first()).and_then(Value::as_u64).and_then(|i| u32::try_from(i).ok())
}

/// The special tokens a template puts before and after a text.
fn wrapped(json: &Value) -> (Option<String>, Option<String>) {
    let post = json.get("post_processor");
    let steps = post.and_then(|p| p.get("processors")).and_then(Value::as_array);
    let all = steps.map_or_else(|| post.into_iter().collect(), |s| s.iter().collect::<Vec<_>>());
    let single = all.into_iter().find_map(|p| p.get("single")?.as_array());
    let special = |v: Option<&Value>| v?.get("SpecialToken")?.get("id")?.as_str().map(String::from);
    (single.and_then(|s| special(s.first())), single.and_then(|s| special(s.last())))
}

fn kind(json: &Value, path: &Path) -> Result<Kind> {
    let refuse = |what: String| CheckpointError::Unsupported {
        what: format!("{}: {what} has no name in llama.cpp that lowbit knows", path.display()),
        hint: Some("written are the tokenizers of gpt-2, smollm, llama-3, qwen2, tekken, and SentencePiece BPE".into()),
    };
    let of = |v: &Value| v.get("type").and_then(Value::as_str).unwrap_or("none").to_string();
    let model = json.get("model").unwrap_or(&Value::Null);
    if of(model) != "BPE" {
        return Err(refuse(format!("the tokenizer model `{}`", of(model))));
    }
    let null = Value::Null;
    let (normalizer, pre) = (json.get("normalizer").unwrap_or(&null), json.get("pre_tokenizer").unwrap_or(&null));
    let flag = |v: &Value, key: &str| v.get(key).and_then(Value::as_bool).unwrap_or(false);
    if flag(model, "byte_fallback") {
        return sentence_piece(normalizer, pre).ok_or_else(|| refuse("this SentencePiece normalizer".into()));
    }
    let whole = flag(model, "ignore_merges");
    let steps = pre.get("pretokenizers").and_then(Value::as_array).map_or_else(|| vec![pre], |s| s.iter().collect());
    let bytes = |v: &Value, regex: bool| {
        of(v) == "ByteLevel"
            && !flag(v, "add_prefix_space")
            && v.get("use_regex").and_then(Value::as_bool).unwrap_or(true) == regex
    };
    let regex = |v: &Value| {
        let found = v.get("pattern").and_then(|p| p.get("Regex")).and_then(Value::as_str).map(String::from);
        found.filter(|_| {
            of(v) == "Split" && v.get("behavior").and_then(Value::as_str) == Some("Isolated") && !flag(v, "invert")
        })
    };
    let name = match (normalizer.is_null(), steps.as_slice()) {
        (true, [one]) if bytes(one, true) => (!whole).then_some("gpt-2"),
        (true, [digits, one]) if of(digits) == "Digits" && flag(digits, "individual_digits") && bytes(one, true) => {
            (!whole).then_some("smollm")
        }
        (plain, [split, one]) if bytes(one, false) => match regex(split).as_deref() {
            Some(tokenizer::LLAMA3) if plain && whole => Some("llama-bpe"),
            Some(tokenizer::TEKKEN) if plain && whole => Some("tekken"),
            Some(tokenizer::QWEN2) if !whole && (plain || of(normalizer) == "NFC") => Some("qwen2"),
            _ => None,
        },
        _ => None,
    };
    name.map(Kind::ByteLevel).ok_or_else(|| refuse(format!("the pre-tokenizer {pre}")))
}

/// Spaces become `▁`, and nothing else happens to the text but one of them before it.
fn sentence_piece(normalizer: &Value, pre: &Value) -> Option<Kind> {
    let of = |v: &Value| v.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
    let steps: Vec<&Value> = match normalizer.get("normalizers").and_then(Value::as_array) {
        Some(steps) => steps.iter().collect(),
        None if normalizer.is_null() => Vec::new(),
        None => vec![normalizer],
    };
    let (mut prefix, mut replaced) = (false, false);
    for step in steps {
        let text = |key: &str| step.get(key).and_then(Value::as_str);
        match of(step).as_str() {
            "Prepend" if text("prepend") == Some("▁") => prefix = true,
            "Replace" if text("content") == Some("▁") => {
                replaced = step.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str) == Some(" ");
            }
            _ => return None,
        }
    }
    match of(pre).as_str() {
        "" => {}
        "Metaspace" => {
            let scheme = pre.get("prepend_scheme").and_then(Value::as_str).unwrap_or("always");
            (prefix, replaced) = (scheme != "never", true);
        }
        // After the replacement there is no space left to split at.
        "Split"
            if replaced && pre.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str) == Some(" ") => {}
        _ => return None,
    }
    replaced.then_some(Kind::SentencePiece(prefix))
}

struct Tokens {
    names: Vec<String>,
    kinds: Vec<u64>,
    merges: Vec<(String, String)>,
}

impl Tokens {
    fn read(json: &Value, path: &Path, count: usize, sentence_piece: bool) -> Result<Self> {
        let bad = |problem: String| CheckpointError::invalid(path, problem);
        let model = json.get("model").unwrap_or(&Value::Null);
        // Rows of the embedding that no token has.
        let mut names: Vec<String> = (0..count).map(|i| format!("[PAD{i}]")).collect();
        let mut kinds = vec![UNUSED; count];
        let unknown = model.get("unk_token").and_then(Value::as_str);
        let mut set = |id: &Value, name: &str, kind: u64| {
            let at = id.as_u64().and_then(|i| usize::try_from(i).ok());
            match at.and_then(|at| Some((names.get_mut(at)?, kinds.get_mut(at)?))) {
                Some((n, k)) => {
                    (*n, *k) = (name.to_string(), kind);
                    Ok(())
                }
                None => Err(bad(format!("token `{name}` has the id {id}, and the embedding {count} rows"))),
            }
        };
        let vocab = model.get("vocab").and_then(Value::as_object).ok_or_else(|| bad("no `model.vocab`".into()))?;
        for (name, id) in vocab {
            let byte = name.len() == 6 && name.starts_with("<0x") && name.ends_with('>');
            let kind = match sentence_piece {
                true if Some(name.as_str()) == unknown => UNKNOWN,
                true if byte => BYTE,
                _ => NORMAL,
            };
            set(id, name, kind)?;
        }
        for added in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let (Some(name), Some(id)) = (added.get("content").and_then(Value::as_str), added.get("id")) else {
                continue;
            };
            let special = added.get("special").and_then(Value::as_bool).unwrap_or(false);
            let kind = match special {
                true if sentence_piece && Some(name) == unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            set(id, name, kind)?;
        }
        let merge = |rule: &Value| match rule {
            Value::String(s) => s.split_once(' ').map(|(l, r)| (l.to_string(), r.to_string())),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(l), Value::String(r)] => Some((l.clone(), r.clone())),
                _ => None,
            },
            _ => None,
        };
        let rules = model.get("merges").and_then(Value::as_array).into_iter().flatten();
        let merges =
            rules.map(|r| merge(r).ok_or_else(|| bad(format!("bad merge rule {r}")))).collect::<Result<_>>()?;
        Ok(Self { names, kinds, merges })
    }

    /// SentencePiece scores that put the merges in their order: minus the rank of the first rule that makes a token.
    fn scores(&self) -> Vec<f32> {
        let mut rank: HashMap<String, usize> = HashMap::new();
        for (i, (l, r)) in self.merges.iter().enumerate() {
            rank.entry(format!("{l}{r}")).or_insert(i + 1);
        }
        let last = self.merges.len() + 1;
        let score = |(name, kind): (&String, &u64)| match *kind {
            NORMAL | USER_DEFINED => -(rank.get(name).copied().unwrap_or(last) as f32),
            _ => 0.0,
        };
        self.names.iter().zip(&self.kinds).map(score).collect()
    }
}
