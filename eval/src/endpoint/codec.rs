//! The server's own tokenizer, by `/tokenize` and `/detokenize` as vLLM and `lowbit serve` have them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use serde_json::{Value as Json, json};

use super::answer::Unfit;
use super::{Reply, Retry, Transport};
use crate::encode::Encode;
use crate::engine::codec::Codec;
use crate::error::{EvalError, Result};

/// Texts remembered: a document's context is asked once for all its choices.
const REMEMBERED: usize = 1024;

/// A tokenizer behind a server.
pub struct ServerCodec<'a> {
    transport: &'a dyn Transport,
    model: String,
    retry: Retry,
    bos: Option<u32>,
    known: Mutex<HashMap<(String, bool), Vec<u32>>>,
}

impl<'a> ServerCodec<'a> {
    /// `None` where the server has no `/tokenize` of this form.
    pub fn find(transport: &'a dyn Transport, model: &str, retry: Retry) -> Result<Option<Self>> {
        let mut codec = Self { transport, model: model.to_owned(), retry, bos: None, known: Mutex::default() };
        match codec.ask("a", false) {
            Ok(ids) if !ids.is_empty() => {}
            Ok(_) | Err(_) => return Ok(None),
        }
        // What is put before a text by itself: one token, or none.
        codec.bos = match codec.ask("", true) {
            Ok(ids) => ids.first().copied().filter(|_| ids.len() == 1),
            // Some servers take no empty text.
            Err(_) => None,
        };
        Ok(Some(codec))
    }

    fn post<T>(&self, path: &str, body: Json, read: impl Fn(&Json) -> Option<T>) -> Result<T> {
        let body = body.to_string().into_bytes();
        let send = || self.transport.post(path, &body);
        let read = |reply: &Reply| {
            let value = serde_json::from_slice::<Json>(&reply.body).ok();
            value
                .as_ref()
                .and_then(&read)
                .ok_or_else(|| Unfit { problem: format!("answered {path} by what cannot be read"), again: false })
        };
        let failed = |problem: String| EvalError::Endpoint { url: self.transport.url(), problem };
        let never = AtomicBool::new(false);
        self.retry.run(0, &never, send, read).map_err(failed)?.ok_or_else(|| failed("stopped".into()))
    }

    fn ask(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let body = json!({"model": self.model, "prompt": text, "add_special_tokens": special});
        self.post("/tokenize", body, |v| serde_json::from_value(v.get("tokens")?.clone()).ok())
    }
}

impl Encode for ServerCodec<'_> {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let key = (text.to_owned(), special);
        if let Some(ids) = self.known.lock().ok().and_then(|k| k.get(&key).cloned()) {
            return Ok(ids);
        }
        let ids = self.ask(text, special)?;
        if let Ok(mut known) = self.known.lock() {
            if known.len() >= REMEMBERED {
                known.clear();
            }
            known.insert(key, ids.clone());
        }
        Ok(ids)
    }

    fn bos_id(&self) -> Option<u32> {
        self.bos
    }
}

impl Codec for ServerCodec<'_> {
    /// A server does not say.
    fn eos_ids(&self) -> &[u32] {
        &[]
    }

    fn decode(&self, ids: &[u32], _: bool) -> Result<String> {
        let body = json!({"model": self.model, "tokens": ids});
        self.post("/detokenize", body, |v| Some(v.get("prompt")?.as_str()?.to_owned()))
    }
}
