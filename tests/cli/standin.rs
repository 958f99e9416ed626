//! A server that answers by a script: deterministic, and able to fail in every way a server fails.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What the server does with a request.
pub enum Play {
    /// 200 and this.
    Json(Value),
    /// Status, further header lines, body.
    Status(u16, &'static str, String),
    /// 200 and no JSON.
    Garbage,
    /// Half an answer, and the connection is closed.
    Cut,
}

/// A running server.
pub struct StandIn {
    pub url: String,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
}

impl StandIn {
    /// `play` is given the path, the body and how often this very request came before.
    pub fn start(play: impl Fn(&str, &Value, usize) -> Play + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let (log, play) = (asked.clone(), Arc::new(play));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, play) = (log.clone(), play.clone());
                std::thread::spawn(move || connection(stream.unwrap(), &log, &*play));
            }
        });
        Self { url, asked }
    }

    /// Bodies of the requests to a path.
    pub fn bodies(&self, path: &str) -> Vec<Value> {
        self.asked.lock().unwrap().iter().filter(|a| a.0 == path).map(|a| a.1.clone()).collect()
    }
}

/// A chat answer.
pub fn chat(text: impl Into<String>) -> Play {
    let message = json!({"role": "assistant", "content": text.into()});
    Play::Json(json!({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}))
}

/// The last message of a chat request.
pub fn last(body: &Value) -> &str {
    body["messages"].as_array().and_then(|m| m.last()).and_then(|m| m["content"].as_str()).unwrap_or_default()
}

type Log = Mutex<Vec<(String, Value)>>;

fn connection(stream: TcpStream, log: &Log, play: &(dyn Fn(&str, &Value, usize) -> Play + Send + Sync)) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    loop {
        let (mut line, mut length, mut path) = (String::new(), 0, String::new());
        loop {
            line.clear();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line == "\r\n" {
                break;
            }
            if path.is_empty() {
                path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            }
            if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let before = {
            let mut log = log.lock().unwrap();
            let before = log.iter().filter(|a| a.0 == path && a.1 == body).count();
            log.push((path.clone(), body.clone()));
            before
        };
        let (status, headers, text) = match (path.as_str(), play(&path, &body, before)) {
            ("/v1/models", Play::Json(Value::Null)) => {
                (200, "", json!({"object": "list", "data": [{"id": "stand-in", "object": "model"}]}).to_string())
            }
            (_, Play::Json(v)) => (200, "", v.to_string()),
            (_, Play::Status(status, headers, text)) => (status, headers, text),
            (_, Play::Garbage) => (200, "", "<html>busy</html>".to_owned()),
            (_, Play::Cut) => {
                let _ = writer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"choices\": ");
                return;
            }
        };
        let n = text.len();
        if write!(writer, "HTTP/1.1 {status} X\r\n{headers}Content-Length: {n}\r\n\r\n{text}").is_err() {
            return;
        }
    }
}
