//! `tokenizer.json` and `tokenizer_config.json` from GGUF metadata.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::token_id;
use super::{Metadata, invalid};
use crate::error::{CheckpointError, Result};

/// GGUF token types.
pub(super) const NORMAL: u64 = 1;
pub(super) const UNKNOWN: u64 = 2;
pub(super) const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;

/// Longest token (bytes) whose splits are tried when merges are made from scores.
const MAX_PIECE: usize = 1 << 10;

pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.json`, `tokenizer_config.json` and the chat template where there is one.
pub(super) fn files(meta: &Metadata, context: usize) -> Result<Vec<(String, Vec<u8>)>> {
    let vocab = Vocab::read(meta)?;
    let tokenizer = match meta.str("tokenizer.ggml.model")? {
        "gpt2" => byte_level(meta, &vocab)?,
        "llama" => sentence_piece(meta, &vocab)?,
        other => {
            return Err(CheckpointError::Unsupported {
                what: format!("GGUF tokenizer model '{other}'"),
                hint: Some("supported: gpt2 (byte-level BPE) and llama (SentencePiece BPE)".to_string()),
            });
        }
    };
    let template = meta.opt_str("tokenizer.chat_template")?;
    let config = tokenizer_config(meta, &vocab, context, template)?;
    let mut files = vec![
        ("tokenizer.json".to_string(), pretty(&tokenizer, &meta.file)?),
        ("tokenizer_config.json".to_string(), pretty(&config, &meta.file)?),
    ];
    if let Some(text) = template {
        files.push(("chat_template.jinja".to_string(), text.as_bytes().to_vec()));
    }
    Ok(files)
}

/// Indented JSON with a final newline.
pub(super) fn pretty(value: &Value, file: &Path) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| invalid(file, e.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The tokens in id order, with their types and special roles.
struct Vocab<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<u64>,
    ids: HashMap<&'a str, usize>,
    bos: Option<&'a str>,
    eos: Option<&'a str>,
    unk: Option<&'a str>,
    pad: Option<&'a str>,
    add_bos: bool,
    add_eos: bool,
}

impl<'a> Vocab<'a> {
    fn read(meta: &'a Metadata) -> Result<Self> {
        let tokens = meta.strings("tokenizer.ggml.tokens")?;
        if tokens.is_empty() {
            return Err(invalid(&meta.file, "the tokenizer has no tokens"));
        }
        let named = |name: &str| -> Result<Option<&'a str>> {
            let id = token_id(meta, name)?.and_then(|id| usize::try_from(id).ok());
            Ok(id.and_then(|id| tokens.get(id).copied()))
        };
        let (bos, eos, unk, pad) = (named("bos")?, named("eos")?, named("unknown")?, named("padding")?);
        let kinds = match meta.opt_uints("tokenizer.ggml.token_type")? {
            Some(kinds) if kinds.len() == tokens.len() => kinds,
            Some(kinds) => {
                let problem = format!("{} token types for {} tokens", kinds.len(), tokens.len());
                return Err(invalid(&meta.file, problem));
            }
            None => {
                let special = [bos, eos, unk, pad];
                tokens.iter().map(|t| if special.contains(&Some(*t)) { CONTROL } else { NORMAL }).collect()
            }
        };
        let ids = tokens.iter().enumerate().map(|(id, t)| (*t, id)).collect();
        let sentence_piece = meta.opt_str("tokenizer.ggml.model")? == Some("llama");
        let llama3 = sentence_piece || is_llama3(meta.opt_str("tokenizer.ggml.pre")?.unwrap_or_default());
        let add_bos = meta.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(llama3) && bos.is_some();
        let add_eos = meta.opt_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false) && eos.is_some();
        Ok(Self { tokens, kinds, ids, bos, eos, unk, pad, add_bos, add_eos })
    }

    /// Control and user-defined tokens, which are found before the text is split. One
    /// that holds a `▁` is looked for after normalization.
    fn added(&self, sentence_piece: bool) -> Vec<Value> {
        let found = self.tokens.iter().zip(&self.kinds).enumerate();
        found
            .filter(|(_, (token, kind))| {
                !token.is_empty() && (matches!(**kind, CONTROL | USER_DEFINED) || (sentence_piece && **kind == UNKNOWN))
            })
            .map(|(id, (token, kind))| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": sentence_piece && *kind == USER_DEFINED && token.contains('▁'),
                    "special": *kind != USER_DEFINED,
                })
            })
            .collect()
    }

    fn model(&self, merges: &[(&str, &str)]) -> Map<String, Value> {
        let vocab: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, t)| (t.to_string(), json!(id))).collect();
        let mut model = Map::new();
        let mut put = |name: &str, value: Value| model.insert(name.to_string(), value);
        put("type", json!("BPE"));
        put("dropout", Value::Null);
        put("unk_token", Value::Null);
        put("continuing_subword_prefix", Value::Null);
        put("end_of_word_suffix", Value::Null);
        put("fuse_unk", json!(false));
        put("byte_fallback", json!(false));
        put("ignore_merges", json!(false));
        put("vocab", Value::Object(vocab));
        put("merges", json!(merges));
        model
    }

    /// The template that adds BOS and EOS, where they are to be added.
    fn template(&self) -> Option<Value> {
        let bos = self.bos.filter(|_| self.add_bos);
        let eos = self.eos.filter(|_| self.add_eos);
        if bos.is_none() && eos.is_none() {
            return None;
        }
        let sequence = |name: &str, kind: u32| -> Vec<Value> {
            let special = |t: &str| json!({"SpecialToken": {"id": t, "type_id": kind}});
            let text = json!({"Sequence": {"id": name, "type_id": kind}});
            bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect()
        };
        let mut specials = Map::new();
        for token in [bos, eos].into_iter().flatten() {
            let id = self.ids.get(token).copied().unwrap_or_default();
            specials.insert(token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        let single = sequence("A", 0);
        let pair: Vec<Value> = single.iter().cloned().chain(sequence("B", 1)).collect();
        Some(json!({
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": specials,
        }))
    }

    /// Merge rules as the file lists them, each `left right`.
    fn listed_merges(&self, meta: &'a Metadata) -> Result<Option<Vec<(&'a str, &'a str)>>> {
        let Some(rules) = meta.opt_strings("tokenizer.ggml.merges")? else { return Ok(None) };
        let split = |rule: &'a str| {
            // The separator is a space that is not the first character.
            let at = rule.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
            let (left, right) = (rule.get(..at)?, rule.get(at + 1..)?);
            let whole = format!("{left}{right}");
            let known = [left, right, whole.as_str()].iter().all(|t| self.ids.contains_key(t));
            known.then_some((left, right))
        };
        let one = |rule: &'a str| split(rule).ok_or_else(|| invalid(&meta.file, format!("bad merge rule {rule:?}")));
        rules.into_iter().map(one).collect::<Result<Vec<_>>>().map(Some)
    }

    /// Merge rules from SentencePiece scores: every way to put a token together from two
    /// others, best token first.
    fn scored_merges(&self, meta: &Metadata) -> Result<Vec<(&'a str, &'a str)>> {
        let scores = meta.opt_floats("tokenizer.ggml.scores")?.unwrap_or_default();
        if scores.len() != self.tokens.len() {
            let problem = format!("{} token scores for {} tokens", scores.len(), self.tokens.len());
            return Err(invalid(&meta.file, problem));
        }
        let score = |piece: &str| {
            let id = *self.ids.get(piece)?;
            let usable = matches!(*self.kinds.get(id)?, NORMAL | USER_DEFINED);
            scores.get(id).copied().filter(|_| usable)
        };
        let mut merges: Vec<(f32, &str, &str)> = Vec::new();
        for token in &self.tokens {
            if token.len() > MAX_PIECE {
                return Err(invalid(&meta.file, format!("a token of {} bytes", token.len())));
            }
            let Some(whole) = score(token) else { continue };
            let splits = token.char_indices().skip(1).filter_map(|(at, _)| token.split_at_checked(at));
            let mut local: Vec<_> = splits.filter_map(|(l, r)| Some(((score(l)?, score(r)?), whole, l, r))).collect();
            local.sort_by(|a, b| b.0.0.total_cmp(&a.0.0).then(b.0.1.total_cmp(&a.0.1)));
            merges.extend(local.into_iter().map(|(_, whole, l, r)| (whole, l, r)));
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0));
        Ok(merges.into_iter().map(|(_, l, r)| (l, r)).collect())
    }
}

fn is_llama3(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3")
}

fn byte_level_step(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split_step(regex: &str) -> Value {
    let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, byte_level_step(false)]})
}

fn byte_level(meta: &Metadata, vocab: &Vocab<'_>) -> Result<Value> {
    let pre = meta.opt_str("tokenizer.ggml.pre")?.unwrap_or("default");
    let mut normalizer = Value::Null;
    let mut whole_tokens = false;
    let pre_tokenizer = match pre {
        "default" | "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" => byte_level_step(true),
        "smollm" | "starcoder" | "refact" | "command-r" => json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level_step(true)],
        }),
        _ if is_llama3(pre) => {
            whole_tokens = true;
            split_step(LLAMA3)
        }
        "tekken" => {
            whole_tokens = true;
            split_step(TEKKEN)
        }
        "qwen2" | "deepseek-r1-qwen" => {
            normalizer = json!({"type": "NFC"});
            split_step(QWEN2)
        }
        other => {
            return Err(CheckpointError::Unsupported {
                what: format!("GGUF pre-tokenizer '{other}'"),
                hint: Some("supported: gpt-2, smollm, llama-bpe, qwen2, tekken".to_string()),
            });
        }
    };
    let merges = vocab.listed_merges(meta)?;
    let merges = merges.ok_or_else(|| invalid(&meta.file, "metadata 'tokenizer.ggml.merges' is missing"))?;
    let mut model = vocab.model(&merges);
    model.insert("ignore_merges".to_string(), json!(whole_tokens));
    let post = match vocab.template() {
        Some(template) => json!({"type": "Sequence", "processors": [byte_level_step(true), template]}),
        None => byte_level_step(true),
    };
    Ok(document(vocab.added(false), normalizer, pre_tokenizer, post, byte_level_step(true), model))
}

fn sentence_piece(meta: &Metadata, vocab: &Vocab<'_>) -> Result<Value> {
    let prefix = meta.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let merges = match vocab.listed_merges(meta)? {
        Some(listed) => listed,
        None => vocab.scored_merges(meta)?,
    };
    let mut model = vocab.model(&merges);
    model.insert("unk_token".to_string(), json!(vocab.unk));
    model.insert("fuse_unk".to_string(), json!(true));
    model.insert("byte_fallback".to_string(), json!(true));
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    let post = vocab.template().unwrap_or_default();
    let added = vocab.added(true);
    Ok(document(added, normalizer, Value::Null, post, decoder, model))
}

fn document(
    added: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Map<String, Value>,
) -> Value {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    })
}

fn tokenizer_config(meta: &Metadata, vocab: &Vocab<'_>, context: usize, template: Option<&str>) -> Result<Value> {
    let mut config = Map::new();
    let mut put = |name: &str, value: Value| config.insert(name.to_string(), value);
    put("add_bos_token", json!(vocab.add_bos));
    put("add_eos_token", json!(vocab.add_eos));
    put("add_prefix_space", json!(meta.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(false)));
    let tokens = [("bos", vocab.bos), ("eos", vocab.eos), ("pad", vocab.pad), ("unk", vocab.unk)];
    for (name, token) in tokens {
        if let Some(token) = token {
            put(&format!("{name}_token"), json!(token));
        }
    }
    put("clean_up_tokenization_spaces", json!(false));
    put("model_max_length", json!(context));
    put("tokenizer_class", json!("PreTrainedTokenizerFast"));
    if let Some(text) = template {
        put("chat_template", json!(text));
    }
    Ok(Value::Object(config))
}
