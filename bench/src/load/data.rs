//! What is asked: synthetic text, or the rows of a file.
//!
//! | file | row |
//! |---|---|
//! | `.jsonl` | an object a line |
//! | `.json` | an array of the same objects |
//! | `.csv` | a header line, then a row a line; quotes as in RFC 4180 |
//! | `.parquet` | string columns and, where there are any, integer columns |
//! | `.txt` | one prompt a line |
//!
//! An object gives `conversations` (ShareGPT: `from`, `value`) or `messages` (`role`, `content`): every user turn is asked in
//! order, and the answers are the server's own. Else `prompt`, `text`, `question` or `input` is the prompt. The length of the
//! answer is `output_tokens`, `output_length` or `max_tokens` where a row has it, else that of the reference answer in a conversation,
//! where the caller has a tokenizer; `input_tokens` is recorded. A trace for replay has `timestamp`, in milliseconds from the start
//! (Mooncake's form, with `input_length`, `output_length` and `hash_ids`): its prompts are made, a block of 512 tokens for each of
//! the `hash_ids`, so that prompts share in text what they shared in the trace.

use std::collections::HashMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value};

use crate::load::error::{LoadError, Result};
use crate::load::openai::Message;
use crate::load::table::read_objects;
use crate::load::workload::Workload;

/// One thing to ask, with the turns that follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// So far; the last is the user's.
    pub messages: Vec<Message>,
    /// Tokens to answer with; `None` leaves it to the server.
    pub output_tokens: Option<u32>,
    /// Prompt tokens, where they are known before the server counts.
    pub input_tokens: Option<u32>,
    /// Turns of the user still to come.
    pub later: Vec<(String, Option<u32>)>,
    /// When a trace wants it, nanoseconds from the start.
    pub at_ns: Option<u64>,
    /// The prompt is still to be made.
    pub made: Option<Made>,
}

/// A prompt whose text a trace keeps to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Length.
    pub tokens: u32,
    /// Names of its blocks of 512 tokens, where there are any: the same name is the same text.
    pub blocks: Vec<u64>,
    /// Its row, for text of its own.
    pub row: u64,
}

impl Item {
    fn user(text: String, output_tokens: Option<u32>) -> Self {
        Self {
            messages: vec![Message { role: "user".into(), content: text }],
            output_tokens,
            input_tokens: None,
            later: Vec::new(),
            at_ns: None,
            made: None,
        }
    }

    /// Whether a turn follows.
    pub fn has_next(&self) -> bool {
        !self.later.is_empty()
    }

    /// The next turn, after the server's answer.
    pub fn next_turn(mut self, answer: String) -> Option<Self> {
        if self.later.is_empty() {
            return None;
        }
        let (text, output) = self.later.remove(0);
        self.messages.push(Message { role: "assistant".into(), content: answer });
        self.messages.push(Message { role: "user".into(), content: text });
        self.output_tokens = output;
        self.input_tokens = None;
        Some(self)
    }
}

/// Counts tokens of a text, where the caller has a tokenizer.
pub type CountTokens = std::sync::Arc<dyn Fn(&str) -> usize + Send + Sync>;

/// An endless source of items.
#[derive(Clone)]
pub enum Data {
    /// Made up.
    Synthetic {
        /// Lengths.
        workload: Workload,
        /// Exact lengths need the model's tokenizer; without it a word counts as a token.
        count: Option<CountTokens>,
    },
    /// Rows of a file, again from the start when they are used up.
    Rows {
        /// Name for the record.
        name: String,
        /// Rows.
        items: Vec<Item>,
        /// Shuffle with the seed.
        shuffle: bool,
        /// Answer tokens where a row has none.
        output_tokens: Option<u32>,
        /// For the prompts of a trace.
        count: Option<CountTokens>,
    },
}

impl Data {
    /// Reads a file of a form above, or a folder of such files; `name` is for the record. `count` is for the lengths of reference
    /// answers and of a trace's prompts.
    pub fn read(
        path: &Path,
        name: &str,
        shuffle: bool,
        output_tokens: Option<u32>,
        count: Option<CountTokens>,
    ) -> Result<Self> {
        let mut items = Vec::new();
        for (place, object) in read_objects(path)? {
            let bad = |why: String| LoadError::Row { path: path.to_path_buf(), place: place.clone(), why };
            let mut row = item(&object, count.as_ref()).map_err(bad)?;
            if let Some(made) = &mut row.made {
                made.row = items.len() as u64;
            }
            items.push(row);
        }
        if items.is_empty() {
            return Err(LoadError::Row {
                path: path.to_path_buf(),
                place: "row 1".into(),
                why: "there is none".into(),
            });
        }
        Ok(Self::Rows { name: name.to_string(), items, shuffle, output_tokens, count })
    }

    /// Texts to be asked in order, each answered with `output_tokens`.
    pub fn from_texts(name: &str, texts: &[&str], output_tokens: u32) -> Self {
        let items = texts.iter().map(|t| Item::user(t.to_string(), Some(output_tokens))).collect();
        Self::Rows { name: name.into(), items, shuffle: false, output_tokens: None, count: None }
    }

    /// Name for the record.
    pub fn name(&self) -> &str {
        match self {
            Self::Synthetic { workload, .. } => &workload.name,
            Self::Rows { name, .. } => name,
        }
    }

    /// Rows of a file; 0 where there is none.
    pub fn rows(&self) -> usize {
        match self {
            Self::Rows { items, .. } => items.len(),
            Self::Synthetic { .. } => 0,
        }
    }

    /// Times of a trace, one a row; empty where a row has none.
    pub fn times(&self) -> Vec<u64> {
        match self {
            Self::Rows { items, .. } => items.iter().map(|i| i.at_ns).collect::<Option<_>>().unwrap_or_default(),
            Self::Synthetic { .. } => Vec::new(),
        }
    }

    /// Items from a seed, endless.
    pub fn items(&self, seed: u64) -> Box<dyn Iterator<Item = Item> + Send> {
        let mut rng = StdRng::seed_from_u64(seed);
        match self.clone() {
            Self::Synthetic { workload, count } => {
                let prefixes: Vec<String> =
                    (0..workload.prefixes).map(|_| text(workload.prefix_tokens, count.as_ref(), &mut rng)).collect();
                Box::new(std::iter::from_fn(move || Some(synthetic(&workload, &prefixes, count.as_ref(), &mut rng))))
            }
            Self::Rows { mut items, shuffle, output_tokens, count, .. } => {
                if shuffle {
                    items.shuffle(&mut rng);
                }
                let mut texts = Texts { salt: rng.random(), count, blocks: HashMap::new() };
                let mut at = 0;
                Box::new(std::iter::from_fn(move || {
                    let mut item = items.get(at)?.clone();
                    at = (at + 1) % items.len();
                    item.output_tokens = item.output_tokens.or(output_tokens);
                    for later in &mut item.later {
                        later.1 = later.1.or(output_tokens);
                    }
                    if let (Some(made), Some(prompt)) = (item.made.take(), item.messages.last_mut()) {
                        prompt.content = texts.prompt(&made);
                    }
                    Some(item)
                }))
            }
        }
    }
}

/// Tokens of a block of a trace, as Mooncake cuts them.
const BLOCK: u32 = 512;
/// Blocks kept at a time, some 2 KiB each.
const KEPT: usize = 20_000;

/// The texts of a trace's prompts.
struct Texts {
    /// Another stage has other texts: a prefix cache must not know them from the last.
    salt: u64,
    count: Option<CountTokens>,
    /// By name and length; the last block of a prompt is shorter.
    blocks: HashMap<(u64, u32), String>,
}

impl Texts {
    fn prompt(&mut self, made: &Made) -> String {
        let mut left = made.tokens;
        let mut parts = Vec::new();
        for &name in &made.blocks {
            let tokens = left.min(BLOCK);
            if tokens == 0 {
                break;
            }
            parts.push(self.block(name, tokens));
            left -= tokens;
        }
        if left > 0 {
            parts.push(text(left, self.count.as_ref(), &mut self.rng(!made.row)));
        }
        parts.join(" ")
    }

    fn block(&mut self, name: u64, tokens: u32) -> String {
        if let Some(known) = self.blocks.get(&(name, tokens)) {
            return known.clone();
        }
        if self.blocks.len() >= KEPT {
            self.blocks.clear();
        }
        let new = text(tokens, self.count.as_ref(), &mut self.rng(name));
        self.blocks.insert((name, tokens), new.clone());
        new
    }

    fn rng(&self, name: u64) -> StdRng {
        StdRng::seed_from_u64(self.salt ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

fn synthetic(w: &Workload, prefixes: &[String], count: Option<&CountTokens>, rng: &mut StdRng) -> Item {
    let turn = |rng: &mut StdRng| (text(w.input.draw(rng), count, rng), Some(w.output.draw(rng)));
    let (first, output) = turn(rng);
    let mut item = Item::user(first, output);
    if w.prefix_tokens > 0 && !prefixes.is_empty() {
        let prefix = prefixes[rng.random_range(0..prefixes.len())].clone();
        item.messages.insert(0, Message { role: "system".into(), content: prefix });
    }
    item.later = (1..w.turns).map(|_| turn(rng)).collect();
    item
}

/// Words of common English; each is one token of most byte-pair vocabularies.
const WORDS: &str = "the of and to in is that for it as was with be by on not he his but at are this have from which one had \
    they you were all her she there would their we him been has when who will more no if out so said what up its about than into \
    them can only other new some time could these two may then do first any my now such like our over man me even most made after \
    also did many before must through back years where much your way well down should because each just those people how too little \
    state good very make world still own see men work long get here between both life being under never day same another know while \
    last might us great old year off come since against go came right used take three small water house school number part fact";

/// Words that make about `tokens` tokens, exactly so where they can be counted. Texts differ from their first word on, so
/// that no prefix cache helps where none is meant to.
fn text(tokens: u32, count: Option<&CountTokens>, rng: &mut StdRng) -> String {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut out: Vec<String> = (0..tokens).map(|_| words[rng.random_range(0..words.len())].to_string()).collect();
    if let Some(first) = out.first_mut() {
        *first = format!("{:x}", rng.random::<u32>());
    }
    let Some(count) = count else { return out.join(" ") };
    // The first word is several tokens, and a small vocabulary splits others.
    for _ in 0..20 {
        let have = count(&out.join(" "));
        match have.cmp(&(tokens as usize)) {
            std::cmp::Ordering::Equal => break,
            std::cmp::Ordering::Greater => {
                let per_word = have as f64 / out.len().max(1) as f64;
                let cut = ((have - tokens as usize) as f64 / per_word).ceil() as usize;
                out.truncate(out.len().saturating_sub(cut.max(1)).max(1));
            }
            std::cmp::Ordering::Less => {
                out.extend((have..tokens as usize).take(1 + (tokens as usize - have) / 2).map(|_| "the".to_string()))
            }
        }
        if out.len() == 1 {
            break;
        }
    }
    out.join(" ")
}

fn item(object: &Map<String, Value>, count: Option<&CountTokens>) -> std::result::Result<Item, String> {
    let number = |names: &[&str]| {
        let found = names.iter().find_map(|n| object.get(*n));
        found
            .and_then(|v| v.as_u64().or_else(|| v.as_str().and_then(|s| s.trim().parse().ok())))
            .and_then(|n| u32::try_from(n).ok())
    };
    let output = number(&["output_tokens", "output_tokens_count", "output_length", "max_tokens"]);
    let input = number(&["input_tokens", "prompt_tokens", "input_length", "prompt_tokens_count"]);
    let turns = |list: &Vec<Value>, role: &str, content: &str| -> Vec<(String, String)> {
        let text = |m: &Value, k: &str| m.get(k).and_then(Value::as_str).map(str::to_string);
        list.iter().filter_map(|m| Some((text(m, role)?, text(m, content)?))).collect()
    };
    let conversation = match (object.get("conversations"), object.get("messages")) {
        (Some(Value::Array(list)), _) => turns(list, "from", "value"),
        (_, Some(Value::Array(list))) => turns(list, "role", "content"),
        _ => Vec::new(),
    };
    let mut item = if conversation.is_empty() {
        let names = ["prompt", "text", "question", "input"];
        match names.iter().find_map(|n| object.get(*n).and_then(Value::as_str)) {
            Some(text) => Item::user(text.to_string(), output),
            // A trace without text: words of the length it says, made when they are asked.
            None => {
                let tokens =
                    input.ok_or("no prompt, text, question, input, messages or conversations, and no input_length")?;
                let blocks = match object.get("hash_ids") {
                    Some(Value::Array(ids)) => ids.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>(),
                    None | Some(Value::Null) => Some(Vec::new()),
                    Some(_) => None,
                };
                let blocks = blocks.ok_or("hash_ids is not a list of whole numbers")?;
                Item { made: Some(Made { tokens, blocks, row: 0 }), ..Item::user(String::new(), output) }
            }
        }
    } else {
        let is_user = |role: &str| matches!(role, "user" | "human");
        let system = conversation.iter().take_while(|m| !is_user(&m.0)).filter(|m| m.0 == "system");
        let mut messages: Vec<Message> =
            system.map(|m| Message { role: "system".into(), content: m.1.clone() }).collect();
        let mut asked: Vec<(String, Option<u32>)> = Vec::new();
        for (role, text) in &conversation {
            if is_user(role) {
                asked.push((text.clone(), output));
            } else if role != "system"
                && let (Some((_, tokens @ None)), Some(count)) = (asked.last_mut(), count)
            {
                // As long as the answer that is here.
                *tokens = Some(u32::try_from(count(text)).unwrap_or(u32::MAX).max(1));
            }
        }
        let mut asked = asked.into_iter();
        let (content, output_tokens) = asked.next().ok_or("a conversation without a user's turn")?;
        messages.push(Message { role: "user".into(), content });
        Item { messages, output_tokens, input_tokens: None, later: asked.collect(), at_ns: None, made: None }
    };
    item.input_tokens = input;
    item.at_ns = object.get("timestamp").and_then(Value::as_f64).filter(|t| *t >= 0.0).map(|ms| (ms * 1e6) as u64);
    Ok(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: &str) -> std::result::Result<Item, String> {
        item(serde_json::from_str::<Value>(json).unwrap().as_object().unwrap(), None)
    }

    /// A tokenizer of words.
    fn words() -> CountTokens {
        std::sync::Arc::new(|t: &str| t.split_whitespace().count())
    }

    #[test]
    fn rows_of_every_form() {
        let share = r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"},{"from":"human","value":"c"}]}"#;
        let first = row(share).unwrap();
        assert_eq!((first.messages.len(), first.later.len()), (1, 1));
        let next = first.next_turn("B".into()).unwrap();
        let texts: Vec<&str> = next.messages.iter().map(|m| m.content.as_str()).collect();
        assert_eq!(texts, ["a", "B", "c"]);
        assert!(!next.has_next());
        let chat =
            row(r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"}],"max_tokens":"9"}"#)
                .unwrap();
        assert_eq!((chat.messages[0].role.as_str(), chat.output_tokens), ("system", Some(9)));
        let trace = row(r#"{"timestamp":1500.5,"input_length":7,"output_length":3}"#).unwrap();
        assert_eq!(
            (trace.at_ns, trace.output_tokens, trace.made),
            (Some(1_500_500_000), Some(3), Some(Made { tokens: 7, blocks: vec![], row: 0 }))
        );
        assert!(row(r#"{"answer":"x"}"#).is_err());
        assert!(row(r#"{"input_length":7,"hash_ids":["a"]}"#).is_err());
    }

    #[test]
    fn answers_of_a_conversation_are_as_long_as_its_own_where_they_can_be_counted() {
        let json = r#"{"conversations":[{"from":"system","value":"s t"},{"from":"human","value":"a"},{"from":"gpt","value":"b c d"},
            {"from":"human","value":"e"},{"from":"gpt","value":""},{"from":"human","value":"f"}]}"#;
        let of = |json: &str| {
            let value: Value = serde_json::from_str(json).unwrap();
            item(value.as_object().unwrap(), Some(&words())).unwrap()
        };
        let counted = of(json);
        assert_eq!(
            (counted.output_tokens, &counted.later[..]),
            (Some(3), &[("e".into(), Some(1)), ("f".into(), None)][..])
        );
        assert_eq!(row(json).unwrap().output_tokens, None);
        let named = of(&json.replacen('{', r#"{"output_tokens":9,"#, 1));
        assert_eq!((named.output_tokens, named.later[0].1), (Some(9), Some(9)), "what the row says comes first");
    }

    /// Mooncake's form: prompts share the text of the blocks they share, and are as long as the trace says.
    #[test]
    fn a_trace_keeps_its_prefixes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.jsonl");
        let rows =
            [(1100, "[5, 6, 7]"), (1024, "[5, 6]"), (600, "[5, 9]"), (1100, "[5, 6, 8]"), (90, "null"), (90, "null")];
        let lines = rows.iter().enumerate().map(|(i, (n, ids))| {
            format!(r#"{{"timestamp": {i}, "input_length": {n}, "output_length": 2, "hash_ids": {ids}}}"#)
        });
        std::fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
        let data = Data::read(&path, "trace", false, None, Some(words())).unwrap();
        let prompts = |seed| data.items(seed).take(6).map(|i| i.messages[0].content.clone()).collect::<Vec<String>>();
        let first = prompts(1);
        let shared = |a: &str, b: &str| a.split(' ').zip(b.split(' ')).take_while(|(x, y)| x == y).count();
        assert_eq!(first.iter().map(|p| p.split(' ').count()).collect::<Vec<_>>(), [1100, 1024, 600, 1100, 90, 90]);
        assert_eq!([1, 2, 3, 4].map(|i| shared(&first[0], &first[i])), [1024, 512, 1024, 0]);
        assert_eq!(shared(&first[4], &first[5]), 0);
        // The same again from a seed, and nothing of it from another.
        assert_eq!(first, prompts(1));
        assert_eq!(shared(&first[0], &prompts(2)[0]), 0);
        assert_eq!((data.rows(), data.times().len()), (6, 6));
    }

    #[test]
    fn synthetic_texts_have_their_length_share_their_prefix_and_differ_at_once() {
        let w = Workload::parse("input=40:8,output=5,prefix=20,prefixes=1,turns=2").unwrap();
        // A tokenizer that makes two tokens of every word longer than four letters.
        let count: CountTokens =
            std::sync::Arc::new(|t: &str| t.split(' ').map(|w| if w.len() > 4 { 2 } else { 1 }).sum());
        let data = Data::Synthetic { workload: w.clone(), count: Some(count.clone()) };
        let items: Vec<Item> = data.items(5).take(50).collect();
        assert_eq!(items, data.items(5).take(50).collect::<Vec<_>>());
        let mut rng = StdRng::seed_from_u64(9);
        for n in [1, 2, 17, 200] {
            let t = text(n, Some(&count), &mut rng);
            assert!((count(&t) as i64 - i64::from(n)).abs() <= 1, "{n}: {}", count(&t));
        }
        assert!(items.iter().all(|i| i.messages[0] == items[0].messages[0] && i.later.len() == 1));
        assert_ne!(items[0].messages[1].content.split(' ').next(), items[1].messages[1].content.split(' ').next());
    }
}
