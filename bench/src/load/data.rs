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
//! answer is `output_tokens`, `output_length` or `max_tokens` where a row has it; `input_tokens` is recorded. A trace for
//! replay has `timestamp`, in milliseconds from the start (Mooncake's form, with `input_length` and `output_length`).

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
}

impl Item {
    fn user(text: String, output_tokens: Option<u32>) -> Self {
        Self {
            messages: vec![Message { role: "user".into(), content: text }],
            output_tokens,
            input_tokens: None,
            later: Vec::new(),
            at_ns: None,
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
    },
}

impl Data {
    /// Reads a file of a form above, or a folder of such files; `name` is for the record.
    pub fn read(path: &Path, name: &str, shuffle: bool, output_tokens: Option<u32>) -> Result<Self> {
        let mut items = Vec::new();
        for (place, object) in read_objects(path)? {
            let row = |why: String| LoadError::Row { path: path.to_path_buf(), place: place.clone(), why };
            items.push(item(&object).map_err(row)?);
        }
        if items.is_empty() {
            return Err(LoadError::Row {
                path: path.to_path_buf(),
                place: "row 1".into(),
                why: "there is none".into(),
            });
        }
        Ok(Self::Rows { name: name.to_string(), items, shuffle, output_tokens })
    }

    /// Texts to be asked in order, each answered with `output_tokens`.
    pub fn from_texts(name: &str, texts: &[&str], output_tokens: u32) -> Self {
        let items = texts.iter().map(|t| Item::user(t.to_string(), Some(output_tokens))).collect();
        Self::Rows { name: name.into(), items, shuffle: false, output_tokens: None }
    }

    /// Name for the record.
    pub fn name(&self) -> &str {
        match self {
            Self::Synthetic { workload, .. } => &workload.name,
            Self::Rows { name, .. } => name,
        }
    }

    /// Times of a trace, ascending; empty where rows have none.
    pub fn times(&self) -> Vec<u64> {
        match self {
            Self::Rows { items, .. } => items.iter().filter_map(|i| i.at_ns).collect(),
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
            Self::Rows { mut items, shuffle, output_tokens, .. } => {
                if shuffle {
                    items.shuffle(&mut rng);
                }
                let mut at = 0;
                Box::new(std::iter::from_fn(move || {
                    let mut item = items.get(at)?.clone();
                    at = (at + 1) % items.len();
                    item.output_tokens = item.output_tokens.or(output_tokens);
                    for later in &mut item.later {
                        later.1 = later.1.or(output_tokens);
                    }
                    Some(item)
                }))
            }
        }
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

fn item(object: &Map<String, Value>) -> std::result::Result<Item, String> {
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
            // A trace without text: words of the length it says.
            None => {
                let n =
                    input.ok_or("no prompt, text, question, input, messages or conversations, and no input_length")?;
                let mut rng =
                    StdRng::seed_from_u64(object.get("timestamp").and_then(Value::as_u64).unwrap_or(u64::from(n)));
                Item::user(text(n, None, &mut rng), output)
            }
        }
    } else {
        let is_user = |role: &str| matches!(role, "user" | "human");
        let system = conversation.iter().take_while(|m| !is_user(&m.0)).filter(|m| m.0 == "system");
        let mut messages: Vec<Message> =
            system.map(|m| Message { role: "system".into(), content: m.1.clone() }).collect();
        let mut users = conversation.iter().filter(|m| is_user(&m.0)).map(|m| m.1.clone());
        messages.push(Message {
            role: "user".into(),
            content: users.next().ok_or("a conversation without a user's turn")?,
        });
        Item {
            messages,
            output_tokens: output,
            input_tokens: None,
            later: users.map(|u| (u, output)).collect(),
            at_ns: None,
        }
    };
    item.input_tokens = input;
    item.at_ns = object.get("timestamp").and_then(Value::as_f64).filter(|t| *t >= 0.0).map(|ms| (ms * 1e6) as u64);
    Ok(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: &str) -> std::result::Result<Item, String> {
        item(serde_json::from_str::<Value>(json).unwrap().as_object().unwrap())
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
            (trace.at_ns, trace.output_tokens, trace.messages[0].content.split(' ').count()),
            (Some(1_500_500_000), Some(3), 7)
        );
        assert!(row(r#"{"answer":"x"}"#).is_err());
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
