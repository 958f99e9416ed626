//! Text to token ids and back, as the checkpoint's own `tokenizer.json` says.

use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl};

use crate::chat_template::{read_json, special_token};
use crate::error::{CheckpointError, Result};
use crate::guard;

/// Texts longer than this are encoded in pieces and in parallel where that cannot change the ids.
const PIECE: usize = 32 * 1024;

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    bos: Option<(String, u32)>,
    pad: Option<u32>,
    eos: Vec<u32>,
    add_bos: Option<bool>,
    splittable: bool,
    byte_level: bool,
    sha256: String,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("file", &self.file)
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

fn ids_of(config: &Value, key: &str) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(key) {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A tokenizer whose model is known to be a BPE.
type Bpe = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// The library's tokenizer of a file. The library's own way keeps a model of unknown kind in one form after another until it knows
/// what it is, which takes five copies of the vocabulary and its merges. Nearly every file holds a BPE, and asked for that it reads
/// each entry once.
fn build(bytes: &[u8]) -> std::result::Result<tokenizers::Tokenizer, tokenizers::Error> {
    match serde_json::from_slice::<Bpe>(bytes) {
        Ok(bpe) => Ok(bpe.into()),
        // Another kind of model; of a file that is none, the library says more.
        Err(_) => tokenizers::Tokenizer::from_bytes(bytes),
    }
}

/// The parts of a tokenizer beside its model, as `tokenizer.json` spells them; `null` for those that are not there.
struct Parts {
    normalizer: Value,
    added_tokens: Value,
    pre_tokenizer: Value,
    decoder: Value,
}

impl Parts {
    fn of(t: &tokenizers::Tokenizer) -> serde_json::Result<Self> {
        Ok(Self {
            normalizer: serde_json::to_value(t.get_normalizer())?,
            added_tokens: serde_json::to_value(t.get_added_vocabulary())?,
            pre_tokenizer: serde_json::to_value(t.get_pre_tokenizer())?,
            decoder: serde_json::to_value(t.get_decoder())?,
        })
    }
}

/// Whether a text may be cut after a single newline between a non-space and an ASCII letter without
/// changing the ids. True for the byte-level pre-tokenizers of GPT-2 and of the cl100k family, which
/// always end a piece there; anything not known to do so says no.
fn splittable(parts: &Parts) -> bool {
    let kind = |value: &Value, name: &str| value.get("type").and_then(Value::as_str) == Some(name);
    let normalizer_ok = parts.normalizer.is_null() || kind(&parts.normalizer, "NFC");
    let added_ok = parts.added_tokens.as_array().is_none_or(|tokens| {
        tokens.iter().all(|token| {
            let flag = |key| token.get(key).and_then(Value::as_bool).unwrap_or(false);
            let content = token.get("content").and_then(Value::as_str).unwrap_or("\n");
            !flag("lstrip") && !flag("rstrip") && !content.contains('\n')
        })
    });
    let prefix = |value: &Value| value.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(true);
    let pre = &parts.pre_tokenizer;
    let pre_ok = if kind(pre, "ByteLevel") {
        !prefix(pre) && pre.get("use_regex").and_then(Value::as_bool).unwrap_or(true)
    } else if let Some([split, bytes]) = pre.get("pretokenizers").and_then(Value::as_array).map(Vec::as_slice) {
        let regex = split.get("pattern").and_then(|pattern| pattern.get("Regex")).and_then(Value::as_str);
        kind(pre, "Sequence")
            && kind(split, "Split")
            && kind(bytes, "ByteLevel")
            && !prefix(bytes)
            && split.get("behavior").and_then(Value::as_str) == Some("Isolated")
            && regex.is_some_and(|regex| regex.contains(r"[^\r\n\p{L}\p{N}]?\p{L}+") && regex.contains(r"\s*[\r\n]+"))
    } else {
        false
    };
    normalizer_ok && added_ok && pre_ok
}

/// The byte that a character of a byte-level vocabulary stands for (GPT-2's table), or the character's own bytes.
fn byte_of_char(c: char) -> Vec<u8> {
    let code = u32::from(c);
    match code {
        33..=126 | 161..=172 | 174..=255 => vec![code as u8],
        // The other 68 bytes, in order, from 256 on.
        256..=323 => {
            let rest = (0..=255u8).filter(|b| !matches!(b, 33..=126 | 161..=172 | 174..=255));
            rest.skip((code - 256) as usize).take(1).collect()
        }
        _ => c.to_string().into_bytes(),
    }
}

/// Cuts a text at safe newlines into pieces of at least [`PIECE`] bytes.
fn pieces(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let (mut start, mut at) = (0, PIECE);
    while let Some([before, newline, after]) = at.checked_sub(2).and_then(|i| bytes.get(i..i + 3)) {
        // `before` may be the tail of a non-ASCII space: only ASCII counts as a safe neighbour.
        if *newline == b'\n' && before.is_ascii_graphic() && after.is_ascii_alphabetic() {
            out.extend(text.get(start..at));
            start = at;
            at += PIECE;
        } else {
            at += 1;
        }
    }
    out.extend(text.get(start..));
    out
}

impl Tokenizer {
    /// Loads `tokenizer.json` and, where present, `tokenizer_config.json`, `generation_config.json` and
    /// `config.json` of a checkpoint folder.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let invalid = |problem: String| CheckpointError::Invalid {
            file: file.clone(),
            problem,
            hint: Some("fetch the file again, or save it with `tokenizers` 0.13 or later".into()),
        };
        let bytes = match crate::files::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(CheckpointError::Invalid {
                    file,
                    problem: "there is no tokenizer.json".into(),
                    hint: Some(
                        "convert the tokenizer with \
                         AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"
                            .into(),
                    ),
                });
            }
            Err(source) => return Err(CheckpointError::Io { file, source }),
        };
        let mut inner =
            guarded(|| build(&bytes)).map_err(|error| match serde_json::from_slice::<IgnoredAny>(&bytes) {
                Err(error) => invalid(format!("not valid JSON: {error}")),
                Ok(_) => invalid(format!("not a tokenizer: {error}")),
            })?;
        // Files saved after training often carry a truncation length: nothing may be cut here.
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        inner.with_padding(None);

        let settings = read_json(&dir.join("tokenizer_config.json"))?;
        let generation = read_json(&dir.join("generation_config.json"))?;
        let config = read_json(&dir.join("config.json"))?;
        let named = |key: &str| {
            let text = special_token(settings.as_ref()?, key)?;
            let id = inner.token_to_id(&text)?;
            Some((text, id))
        };
        let first_id = |key: &str| {
            let id = *ids_of(config.as_ref()?, key).first()?;
            Some((inner.id_to_token(id)?, id))
        };
        // An explicit null in tokenizer_config.json means that there is none.
        let (bos, pad) = match &settings {
            Some(_) => (named("bos_token"), named("pad_token")),
            None => (first_id("bos_token_id"), first_id("pad_token_id")),
        };
        let mut eos: Vec<u32> = Vec::new();
        let listed = [&generation, &config].into_iter().flatten().flat_map(|value| ids_of(value, "eos_token_id"));
        for id in listed.chain(named("eos_token").map(|(_, id)| id)) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let add_bos = settings.as_ref().and_then(|value| value.get("add_bos_token")?.as_bool());
        let parts = Parts::of(&inner).map_err(|error| invalid(error.to_string()))?;
        Ok(Self {
            splittable: splittable(&parts),
            byte_level: parts.decoder.to_string().contains("\"ByteLevel\""),
            sha256: crate::hash::sha256_hex(&bytes),
            pad: pad.map(|(_, id)| id),
            inner,
            file,
            bos,
            eos,
            add_bos,
        })
    }

    fn fail(&self, problem: String) -> CheckpointError {
        CheckpointError::Invalid { file: self.file.clone(), problem, hint: None }
    }

    /// Token ids of a text; with `add_special` the begin-of-text and other tokens that the tokenizer adds
    /// to every text come along. Special tokens spelled out in the text are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let parts = if self.splittable && text.len() > 2 * PIECE { pieces(text) } else { vec![text] };
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
        if add_special {
            (prefix, suffix) = self.affixes()?;
        }
        let fail = |error: String| self.fail(format!("cannot encode: {error}"));
        ids.append(&mut prefix);
        if let [only] = parts.as_slice() {
            ids.extend_from_slice(guarded(|| self.inner.encode_fast(*only, false)).map_err(fail)?.get_ids());
        } else {
            for encoding in guarded(|| self.inner.encode_batch_fast(parts, false)).map_err(fail)? {
                ids.extend_from_slice(encoding.get_ids());
            }
        }
        ids.append(&mut suffix);
        Ok(ids)
    }

    /// What the tokenizer puts before and after every text.
    fn affixes(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let fail = |error: String| self.fail(format!("cannot encode: {error}"));
        let plain = guarded(|| self.inner.encode_fast("a", false)).map_err(fail)?;
        let whole = guarded(|| self.inner.encode_fast("a", true)).map_err(fail)?;
        let (plain, whole) = (plain.get_ids(), whole.get_ids());
        let at = if plain.is_empty() {
            // Unknown characters are dropped by this vocabulary: everything left is a prefix.
            whole.len()
        } else {
            whole
                .windows(plain.len())
                .position(|window| window == plain)
                .ok_or_else(|| self.fail("the post-processor changes the text's own ids".into()))?
        };
        let mut prefix = whole.get(..at).unwrap_or_default().to_vec();
        let suffix = whole.get(at + plain.len()..).unwrap_or_default().to_vec();
        if let Some((_, bos)) = &self.bos {
            match self.add_bos {
                Some(true) if !prefix.contains(bos) => prefix.insert(0, *bos),
                Some(false) => prefix.retain(|id| id != bos),
                _ => {}
            }
        }
        Ok((prefix, suffix))
    }

    /// The text of token ids; with `skip_special` special tokens leave no trace.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|error| self.fail(format!("cannot decode: {error}")))
    }

    /// Id of the begin-of-text token, where there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|(_, id)| *id)
    }

    /// Id of the padding token, where there is one.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    /// Ids that end a generation: those of `generation_config.json`, `config.json` and
    /// `tokenizer_config.json`, in that order and each once.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Id of a token by its exact spelling in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes a token stands for, which need not be whole characters; `None` for an id without a token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return Some(token.into_bytes());
        }
        if self.byte_level {
            return Some(token.chars().flat_map(byte_of_char).collect());
        }
        let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) => Some(vec![byte]),
            None => Some(token.replace('\u{2581}', " ").into_bytes()),
        }
    }

    /// Whether a token is a special one, which no text spells.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// Number of tokens, added ones included. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// SHA-256 of `tokenizer.json`.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// What the library answers; its errors and panics as text.
fn guarded<T>(call: impl FnOnce() -> std::result::Result<T, tokenizers::Error>) -> std::result::Result<T, String> {
    guard::guarded("tokenizers", call)?.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"version":"1.0","truncation":{"direction":"Right","max_length":4,
      "strategy":"LongestFirst","stride":0},"padding":null,"added_tokens":[
      {"id":256,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},
      {"id":257,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
      "normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
      "post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
      "model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"byte_fallback":false,"vocab":VOCAB,
      "merges":["t h","th e","Ċ Ċ","Ġ a"]}}"#;

    fn json() -> String {
        let mut shifted = 256u32;
        let mut vocab: serde_json::Map<String, Value> = (0..=255u8)
            .map(|byte| {
                let plain = matches!(byte, 33..=126 | 161..=172 | 174..=255);
                let code = if plain { byte.into() } else { shifted };
                shifted += u32::from(!plain);
                (char::from_u32(code).unwrap().to_string(), byte.into())
            })
            .collect();
        for (id, token) in (256..).zip(["<s>", "</s>", "th", "the", "ĊĊ", "Ġa"]) {
            vocab.insert(token.into(), id.into());
        }
        JSON.replace("VOCAB", &serde_json::to_string(&vocab).unwrap())
    }

    fn load(settings: &str) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), settings).unwrap();
        let generation = r#"{"eos_token_id":[257,5]}"#;
        std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    #[test]
    fn specials_round_trip_and_pieces_do_not_change_the_ids() {
        let settings = r#"{"bos_token":{"content":"<s>"},"eos_token":"</s>","add_bos_token":true}"#;
        let tokenizer = load(settings);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(256), &[257, 5][..]));
        assert_eq!(tokenizer.encode("the", true).unwrap(), [256, 259]);
        assert_eq!(tokenizer.decode(&[256, 259, 257], true).unwrap(), "the");
        assert_eq!(tokenizer.vocab_size(), 262);
        assert_eq!(tokenizer.token_bytes(261).unwrap(), b" a");
        assert!((0..=255u8).all(|b| tokenizer.token_bytes(b.into()).unwrap() == [b]));
        assert!(tokenizer.is_special(256) && !tokenizer.is_special(259) && tokenizer.token_bytes(999).is_none());
        assert!(tokenizer.splittable && !load("{}").encode("x", true).unwrap().contains(&256));
        let text = "the a é\nThe  1.\n\nthe\n x!\nab</s>\n \nthe\u{a0}\nz the\n".repeat(9000);
        assert!(pieces(&text).len() > 10 && pieces(&text).concat() == text);
        let whole = tokenizer.inner.encode_fast(text.as_str(), false).unwrap();
        let ids = tokenizer.encode(&text, false).unwrap();
        assert!(ids == whole.get_ids(), "pieces changed the ids");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }

    #[test]
    fn a_bpe_is_read_in_one_pass_and_as_the_library_reads_it() {
        let legacy = json();
        let pairs = legacy.replace(r#""t h","th e","Ċ Ċ","Ġ a""#, r#"["t","h"],["th","e"],["Ċ","Ċ"],["Ġ","a"]"#);
        assert_ne!(legacy, pairs);
        for json in [&legacy, &pairs] {
            assert!(serde_json::from_str::<Bpe>(json).is_ok());
            let ours = build(json.as_bytes()).unwrap().to_string(false).unwrap();
            assert_eq!(ours, tokenizers::Tokenizer::from_bytes(json).unwrap().to_string(false).unwrap());
        }
        // Another kind takes the library's way.
        let model = legacy.find("\"model\":").unwrap();
        let words =
            format!(r#"{}"model":{{"type":"WordLevel","vocab":{{"a":0,"?":1}},"unk_token":"?"}}}}"#, &legacy[..model]);
        assert!(serde_json::from_str::<Bpe>(&words).is_err());
        assert_eq!(build(words.as_bytes()).unwrap().token_to_id("a"), Some(0));
    }

    #[test]
    fn llamas_pre_tokenizer_ends_pieces_at_newlines_and_sentencepieces_does_not() {
        let plain = r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
        let split = |pre: &str| {
            let json = json().replacen(&format!(r#""pre_tokenizer":{plain}"#), &format!(r#""pre_tokenizer":{pre}"#), 1);
            splittable(&Parts::of(&build(json.as_bytes()).unwrap()).unwrap())
        };
        let bytes = plain.replace(r#""use_regex":true"#, r#""use_regex":false"#);
        let llama = |regex: &str| {
            let pattern = serde_json::json!({"Regex": regex});
            format!(
                r#"{{"type":"Sequence","pretokenizers":[{{"type":"Split","pattern":{pattern},"behavior":"Isolated","invert":false}},{bytes}]}}"#
            )
        };
        assert!(split(plain));
        assert!(split(&llama(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+")));
        assert!(!split(&llama(r"\p{L}+|\s+")));
        assert!(!split(&bytes));
        assert!(!split(r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":false}"#));
        assert!(!split("null"));
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let told = |json: Option<&str>| {
            json.iter().for_each(|json| std::fs::write(dir.path().join("tokenizer.json"), json).unwrap());
            Tokenizer::load(dir.path()).unwrap_err().to_string()
        };
        assert!(told(None).contains("tokenizer.json"));
        assert!(told(Some(r#"{"model":3}"#)).contains("not a tokenizer"));
        assert!(told(Some(r#"{"model":"#)).contains("not valid JSON"));
    }
}
