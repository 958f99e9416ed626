use std::collections::HashMap;
use std::sync::Mutex;

use serde_json::json;

use super::*;
use crate::engine::NoStore;
use crate::fake::ByteTokenizer;
use crate::tasks::Message;

type Play = Box<dyn Fn(usize, &Json) -> (u16, String) + Sync + Send>;

/// A server by a closure of the number of the call and its body.
struct Script {
    play: Play,
    asked: Mutex<Vec<(String, Json)>>,
}

impl Script {
    fn new(play: impl Fn(usize, &Json) -> (u16, String) + Sync + Send + 'static) -> Self {
        Self { play: Box::new(play), asked: Mutex::default() }
    }

    fn bodies(&self) -> Vec<(String, Json)> {
        self.asked.lock().unwrap().clone()
    }
}

impl Transport for Script {
    fn post(&self, path: &str, body: &[u8]) -> std::result::Result<Reply, String> {
        let body: Json = serde_json::from_slice(body).unwrap();
        let n = {
            let mut asked = self.asked.lock().unwrap();
            asked.push((path.to_owned(), body.clone()));
            asked.len()
        };
        match (self.play)(n, &body) {
            (0, why) => Err(why),
            (status, text) => Ok(Reply { status, retry_after: Some(Duration::ZERO), body: text.into_bytes() }),
        }
    }

    fn get(&self, path: &str) -> std::result::Result<Reply, String> {
        let list = json!({"data": [{"id": "m", "created": 7, "max_model_len": 66, "root": "r"}, {"id": "n"}]});
        let known = path == "/v1/models";
        Ok(Reply { status: if known { 200 } else { 404 }, retry_after: None, body: list.to_string().into_bytes() })
    }

    fn url(&self) -> String {
        "http://s".into()
    }
}

fn options(api: Api) -> RemoteOptions {
    RemoteOptions {
        api,
        concurrency: 3,
        retry: Retry { retries: 1, patience: Duration::from_secs(5) },
        bos: BosRule::Tokenizer,
        max_length: None,
        seed: 0,
        extra: Map::new(),
    }
}

fn write(doc: usize, text: &str) -> Request {
    let messages = vec![Message::new("user", text)];
    let kind = RequestKind::Generate {
        context: text.into(),
        until: ["a", "b", "c", "d", "!"].map(str::to_owned).to_vec(),
        max_new_tokens: 5,
        temperature: 0.5,
        do_sample: false,
        messages,
        tools: Vec::new(),
    };
    Request { task: "t".into(), doc, idx: 0, kind }
}

fn say(text: &str) -> (u16, String) {
    (200, json!({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).to_string())
}

#[test]
fn models_are_found_by_name_or_place() {
    let s = Script::new(|_, _| say(""));
    let first = Served::find(&s, None).unwrap();
    assert_eq!((first.name.as_str(), first.max_len), ("m", Some(66)));
    assert_eq!(first.listed, json!({"id": "m", "max_model_len": 66, "root": "r"}).as_object().unwrap().clone());
    assert_eq!(Served::find(&s, Some("n")).unwrap().max_len, None);
    assert_eq!(Served::find(&s, Some("alias")).unwrap().listed, Map::new());
    let remote = |served| Remote::new(&s, served, None, options(Api::Chat));
    assert_ne!(remote(first.clone()).identity("x"), remote(Served::find(&s, Some("n")).unwrap()).identity("x"));
    assert_eq!(remote(first).max_length(), 64);
}

#[test]
fn equal_questions_are_asked_once_and_votes_apart() {
    let s = Script::new(|_, body| say(&format!("{}! more", body["messages"][0]["content"].as_str().unwrap())));
    let mut o = options(Api::Chat);
    o.extra = json!({"max_tokens": null, "top_p": 1}).as_object().unwrap().clone();
    let remote = Remote::new(&s, Served::find(&s, None).unwrap(), None, o);
    let requests = [write(0, "X"), write(1, "Y"), write(2, "X")];
    let out = remote.answer(&requests, &mut NoStore, &mut |_, _| ()).unwrap();
    let texts: Vec<&Response> = out.answers.iter().map(|a| &a.response).collect();
    let text = |t: &str| Response::Generated { text: t.into() };
    assert_eq!(texts, [&text("X"), &text("Y"), &text("X")]);
    let bodies = s.bodies();
    assert_eq!(bodies.len(), 2);
    let (path, body) = &bodies[0];
    assert_eq!(
        (path.as_str(), &body["model"], &body["temperature"]),
        ("/v1/chat/completions", &json!("m"), &json!(0.0))
    );
    assert_eq!(
        (&body["stop"], body.get("max_tokens"), &body["top_p"]),
        (&json!(["a", "b", "c", "d"]), None, &json!(1))
    );
    let votes: Vec<Ask<'_>> = (0..3).map(|vote| Ask { request: &requests[0], vote }).collect();
    remote.ask(&votes, &mut NoStore, &mut |_, _| ()).unwrap();
    let mut seeds: Vec<u64> = s.bodies()[2..].iter().map(|b| b.1["seed"].as_u64().unwrap()).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 3);
}

/// Remembers what it is told.
#[derive(Default)]
struct Kept(HashMap<String, Answer>);

impl Store for Kept {
    fn get(&self, key: &str) -> Option<Answer> {
        self.0.get(key).cloned()
    }

    fn put(&mut self, key: &str, answer: &Answer) -> Result<()> {
        self.0.insert(key.into(), answer.clone());
        Ok(())
    }
}

#[test]
fn a_failure_names_its_document_and_keeps_the_rest() {
    let s = Script::new(|_, body| match body["messages"][0]["content"].as_str() {
        Some("bad") => (400, json!({"error": {"message": "too long"}}).to_string()),
        _ => say("ok"),
    });
    let mut o = options(Api::Chat);
    o.concurrency = 1;
    let remote = Remote::new(&s, Served::find(&s, None).unwrap(), None, o);
    let mut kept = Kept::default();
    let requests = [write(0, "X"), write(1, "bad"), write(2, "Y")];
    let e = remote.answer(&requests, &mut kept, &mut |_, _| ()).unwrap_err().to_string();
    assert!(e.contains("document 1 of t") && e.contains("http://s answered status 400: too long"), "{e}");
    assert_eq!((kept.0.len(), s.bodies().len()), (1, 2));
    let out = remote.answer(&[write(0, "X"), write(2, "Y")], &mut kept, &mut |_, _| ()).unwrap();
    assert_eq!((out.restored, s.bodies().len()), (1, 3));
    // Cut connections, garbage, errors: again, and then for good.
    for (status, says) in [(0, "gave no answer: garbage"), (200, "no JSON"), (503, "503: garbage")] {
        let s = Script::new(move |_, _| (status, "garbage".into()));
        let o = RemoteOptions { retry: Retry { retries: 1, patience: Duration::ZERO }, ..options(Api::Chat) };
        let remote = Remote::new(&s, Served::default(), None, o);
        let e = remote.answer(&[write(3, "X")], &mut NoStore, &mut |_, _| ()).unwrap_err().to_string();
        assert!(e.contains(says) && e.contains("document 3") && e.contains("2 times") && s.bodies().len() == 2, "{e}");
    }
}

/// Log-probability −(token mod 7) each; the token itself is the most likely where that is below 3.
fn byte_server() -> Script {
    Script::new(|_, body| {
        let ids: Vec<u32> = serde_json::from_value(body["prompt"].clone()).unwrap();
        let value = |id: &u32| -f64::from(id % 7);
        let values: Vec<Json> =
            ids.iter().enumerate().map(|(i, t)| if i == 0 { Json::Null } else { json!(value(t)) }).collect();
        let names: Vec<String> = ids.iter().map(|t| format!("t{t}")).collect();
        let tops: Vec<Json> = ids.iter().map(|t| json!({format!("t{t}"): value(t), "other": -2.5})).collect();
        let choice = json!({"text": "", "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": tops}});
        (200, json!({"choices": [choice], "usage": {"prompt_tokens": ids.len()}}).to_string())
    })
}

#[test]
fn log_likelihoods_sum_the_tokens_a_model_here_would_be_asked_for() {
    let s = byte_server();
    let codec = ByteTokenizer { adds_bos: true };
    let pair = |context: &str, continuation: &str| Request {
        task: "t".into(),
        doc: 0,
        idx: 0,
        kind: RequestKind::LogLikelihood { context: context.into(), continuation: continuation.into() },
    };
    let remote = Remote::new(&s, Served::find(&s, None).unwrap(), Some(&codec), options(Api::Chat));
    let rolled = Request { kind: RequestKind::Rolling { text: "abc".into() }, ..pair("", "") };
    let out =
        remote.answer(&[pair("xy", "cb"), pair("xy", "a"), rolled.clone()], &mut NoStore, &mut |_, _| ()).unwrap();
    // c is 99 ≡ 1, b is 98 ≡ 0, a is 97 ≡ 6, BOS 256 ≡ 4 (mod 7).
    let ll = |log_prob, greedy| Response::LogLikelihood { log_prob, greedy };
    assert_eq!(out.answers[0].response, ll(-1.0, true));
    assert_eq!(out.answers[1].response, ll(-6.0, false));
    assert_eq!(out.answers[2].response, Response::Rolling { log_prob: -4.0 - 6.0 - 0.0 - 1.0 });
    let body = s.bodies().into_iter().find(|b| b.1["prompt"].as_array().unwrap().len() == 5).unwrap().1;
    assert_eq!((&body["echo"], &body["logprobs"]), (&json!(true), &json!(1)));
    // Windows of two tokens: BOS a | b c, each token once.
    let o = RemoteOptions { max_length: Some(2), ..options(Api::Chat) };
    let cut = Remote::new(&s, Served::default(), Some(&codec), o)
        .answer(std::slice::from_ref(&rolled), &mut NoStore, &mut |_, _| ())
        .unwrap();
    assert_eq!(cut.answers[0].response, out.answers[2].response);
    let blind = Remote::new(&s, Served::default(), None, options(Api::Chat));
    let e = blind.answer(&[rolled], &mut NoStore, &mut |_, _| ()).unwrap_err().to_string();
    assert!(e.contains("--tokenizer"), "{e}");
}

#[test]
fn a_servers_tokenizer_encodes() {
    let s = Script::new(|_, body| match (body.get("prompt"), body.get("tokens")) {
        (Some(text), _) => {
            let special = body["add_special_tokens"].as_bool().unwrap();
            let ids: Vec<u32> =
                special.then_some(256).into_iter().chain(text.as_str().unwrap().bytes().map(u32::from)).collect();
            (200, json!({ "tokens": ids }).to_string())
        }
        (_, Some(_)) => (200, json!({"prompt": "<s>"}).to_string()),
        _ => (400, String::new()),
    });
    let codec = ServerCodec::find(&s, "m", Retry::default()).unwrap().unwrap();
    let encoder = RequestEncoder::new(&codec, BosRule::Tokenizer, 64).unwrap();
    assert_eq!(encoder.text("hi").unwrap(), [256, 104, 105]);
    assert_eq!(encoder.text("<s>hi").unwrap()[0], u32::from(b'<'), "no second BOS");
    let before = s.bodies().len();
    encoder.text("hi").unwrap();
    assert_eq!(s.bodies().len(), before, "asked again");
    let none = Script::new(|_, _| (404, String::new()));
    assert!(ServerCodec::find(&none, "m", Retry::default()).unwrap().is_none());
}
