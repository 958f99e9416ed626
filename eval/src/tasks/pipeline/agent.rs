//! Agents: a conversation whose assistant turns call tools.
//!
//! A row holds `messages` in the OpenAI form. Every assistant turn with `tool_calls` is one request: the conversation up to
//! it, as it was recorded, and the calls the model writes next are compared with the recorded ones. So turns are judged
//! one by one and a slip in one does not spoil the next.
//!
//! Calls are compared as trees: names, and arguments as JSON values, the order of keys aside and numbers by value. A model
//! may write them as JSON (`{"name": ..., "arguments": {...}}`, one or a list, also under `tool_calls` or between
//! `<tool_call>` tags), or as calls `name(key=value, ...)` with Python literals.

use std::collections::VecDeque;

use serde_json::{Map, Value as Json, json};

use super::string_keys;
use crate::tasks::json_schema::{equal, read};
use crate::tasks::prompt::Turn;
use crate::tasks::python::{json_to_str, literal_eval};
use crate::tasks::twins::Unfit;

/// Metrics of this kind of task.
pub const METRICS: &[&str] = &["tool_calls", "tool_names", "tool_arguments"];

/// `agent` of a task file.
#[derive(Debug)]
pub struct Agent {
    /// Column of the conversation.
    pub messages: String,
    /// Column of the tools, a list of OpenAI tool definitions.
    pub tools: Option<String>,
    /// Whether several calls of a turn may come in any order.
    pub any_order: bool,
}

/// One call.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Function.
    pub name: String,
    /// Arguments, an object.
    pub arguments: Json,
}

/// One assistant turn to be judged.
#[derive(Clone, Debug)]
pub struct AgentTurn {
    /// The conversation before it in words: tools as instructions, calls as JSON, results as a user's messages.
    pub history: Vec<Turn>,
    /// The same as recorded: calls as such, results of the role `tool` with the call they answer. Tools are apart.
    pub native: Vec<Turn>,
    /// What was recorded.
    pub calls: Vec<Call>,
}

impl Agent {
    /// Reads the keys.
    pub fn parse(value: &Json) -> Result<Self, String> {
        let get = string_keys(value, &["messages", "tools", "order"])?;
        let any_order = match get("order")?.as_deref() {
            None | Some("any") => true,
            Some("same") => false,
            Some(other) => return Err(format!("`order`: expected any or same, found `{other}`")),
        };
        Ok(Self { messages: get("messages")?.unwrap_or_else(|| "messages".into()), tools: get("tools")?, any_order })
    }

    /// The tools of a row, in OpenAI's form.
    pub fn tools_of(&self, row: &Map<String, Json>) -> Result<Vec<Json>, Unfit> {
        let Some(column) = &self.tools else { return Ok(Vec::new()) };
        let tools = row.get(column).and_then(Json::as_array);
        let tools =
            tools.ok_or_else(|| Unfit { column: column.clone(), problem: "expected a list of tools".into() })?;
        let function = |t: &Json| json!({"type": "function", "function": t.get("function").unwrap_or(t)});
        Ok(tools.iter().map(function).collect())
    }

    /// The turns of a row that call tools.
    pub fn turns(&self, row: &Map<String, Json>) -> Result<Vec<AgentTurn>, Unfit> {
        let unfit = |problem: String| Unfit { column: self.messages.clone(), problem };
        let messages = row.get(&self.messages).and_then(Json::as_array);
        let messages = messages.ok_or_else(|| unfit("expected a list of messages".into()))?;
        let (mut history, mut native) = (Vec::new(), Vec::new());
        if self.tools.is_some() {
            history.push(Turn::new("system", instructions(&self.tools_of(row)?)));
        }
        // Calls that nothing has answered yet, and how many got their id here.
        let (mut open, mut named) = (VecDeque::new(), 0);
        let mut turns = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            let role = message.get("role").and_then(Json::as_str);
            let role = role.ok_or_else(|| unfit(format!("message {} has no `role`", i + 1)))?;
            let text = message.get("content").filter(|c| !c.is_null()).map_or_else(String::new, json_to_str);
            let recorded = message.get("tool_calls").and_then(Json::as_array).filter(|c| !c.is_empty());
            let Some(recorded) = recorded.filter(|_| role == "assistant") else {
                native.push(recorded_turn(message, role, &text, &mut open));
                push(&mut history, role, text);
                continue;
            };
            let calls: Option<Vec<Call>> = recorded.iter().map(call_of).collect();
            let calls =
                calls.ok_or_else(|| unfit(format!("message {}: a tool call needs `name` and `arguments`", i + 1)))?;
            turns.push(AgentTurn { history: history.clone(), native: native.clone(), calls: calls.clone() });
            let mut turn = Turn::new(role, text);
            open.clear();
            for (call, value) in calls.iter().zip(recorded) {
                let id = value.get("id").and_then(Json::as_str).map(str::to_owned).unwrap_or_else(|| {
                    named += 1;
                    // Nine letters and digits: the form that Mistral's templates demand.
                    format!("call{named:05}")
                });
                let function = json!({"name": call.name, "arguments": call.arguments});
                turn.tool_calls.push(json!({"id": id, "type": "function", "function": function}));
                open.push_back(id);
            }
            native.push(turn);
            let written: Vec<String> =
                calls.iter().map(|c| json!({"name": c.name, "arguments": c.arguments}).to_string()).collect();
            push(&mut history, role, written.join("\n"));
        }
        match turns.is_empty() {
            true => Err(unfit("no assistant message has `tool_calls`: nothing to judge".into())),
            false => Ok(turns),
        }
    }

    /// Shares of the turns whose calls are right: as a whole, by name, and the share of recorded calls whose arguments are
    /// right among calls of the same name.
    pub fn score(&self, turns: &[AgentTurn], answers: &[String]) -> [f64; 3] {
        let mut sums = [0.0; 3];
        for (turn, answer) in turns.iter().zip(answers) {
            let found = calls_in(answer);
            let (wanted, same) =
                (&turn.calls, |a: &Call, b: &Call| a.name == b.name && equal(&a.arguments, &b.arguments));
            sums[0] += f64::from(u8::from(self.match_up(wanted, &found, &same)));
            sums[1] += f64::from(u8::from(self.match_up(wanted, &found, &|a, b| a.name == b.name)));
            let mut left: Vec<&Call> = found.iter().collect();
            let mut right = 0;
            for call in wanted {
                if let Some(at) = left.iter().position(|f| same(call, f)) {
                    left.remove(at);
                    right += 1;
                }
            }
            sums[2] += f64::from(right) / wanted.len().max(1) as f64;
        }
        sums.map(|s| s / turns.len().max(1) as f64)
    }

    /// Whether the two lists agree, one to one.
    fn match_up(&self, wanted: &[Call], found: &[Call], same: &dyn Fn(&Call, &Call) -> bool) -> bool {
        if wanted.len() != found.len() {
            return false;
        }
        if !self.any_order {
            return wanted.iter().zip(found).all(|(a, b)| same(a, b));
        }
        // Equality is transitive, so taking the first that fits is enough.
        let mut left: Vec<&Call> = found.iter().collect();
        wanted.iter().all(|w| match left.iter().position(|f| same(w, f)) {
            Some(at) => {
                left.remove(at);
                true
            }
            None => false,
        })
    }
}

/// A message that calls no tool, as recorded; a result without the id of its call answers the first that is open.
fn recorded_turn(message: &Json, role: &str, text: &str, open: &mut VecDeque<String>) -> Turn {
    let role = match role {
        "developer" => "system",
        "function" => "tool",
        role => role,
    };
    let mut turn = Turn::new(role, text);
    if role == "tool" {
        let own = message.get("tool_call_id").and_then(Json::as_str).map(str::to_owned);
        if let Some(id) = &own {
            open.retain(|o| o != id);
        }
        turn.tool_call_id = own.or_else(|| open.pop_front());
    }
    turn
}

/// Adds a turn; what a tool returned is shown as a user's message, the role every chat template has.
fn push(history: &mut Vec<Turn>, role: &str, text: String) {
    match role {
        "tool" | "function" => history.push(Turn::new("user", format!("Tool result: {text}"))),
        "system" | "developer" => match history.first_mut() {
            Some(first) if first.role == "system" => first.content = format!("{text}\n\n{}", first.content),
            _ => history.push(Turn::new("system", text)),
        },
        role => history.push(Turn::new(role, text)),
    }
}

fn instructions(tools: &[Json]) -> String {
    let lines: Vec<String> = tools.iter().map(|t| t.get("function").unwrap_or(t).to_string()).collect();
    format!(
        "You can call these tools:\n{}\n\nTo call one, answer with a line of JSON alone: {{\"name\": ..., \"arguments\": {{...}}}}",
        lines.join("\n")
    )
}

/// A call as JSON: `{name, arguments}` or `{function: {name, arguments}}`; arguments may be JSON in a string.
fn call_of(value: &Json) -> Option<Call> {
    let inner = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
    let name = inner.get("name")?.as_str()?.to_owned();
    let arguments = inner.get("arguments").or_else(|| inner.get("parameters")).cloned().unwrap_or_else(|| json!({}));
    let arguments = match arguments {
        Json::String(text) if text.trim().is_empty() => json!({}),
        Json::String(text) => serde_json::from_str(&text).ok()?,
        other => other,
    };
    arguments.is_object().then_some(Call { name, arguments })
}

/// The calls in a model's text; none where it wrote none that can be read.
pub fn calls_in(text: &str) -> Vec<Call> {
    if text.contains("<tool_call>") {
        let blocks = text.split("<tool_call>").skip(1);
        return blocks.flat_map(|b| calls_in(b.split("</tool_call>").next().unwrap_or_default())).collect();
    }
    if let Some(value) = read(text) {
        let list = value.get("tool_calls").cloned().unwrap_or(value);
        let list = list.as_array().cloned().unwrap_or_else(|| vec![list.clone()]);
        let calls: Option<Vec<Call>> = list.iter().map(call_of).collect();
        return calls.unwrap_or_default();
    }
    let lines: Vec<Json> = text.lines().filter_map(|l| serde_json::from_str(l.trim()).ok()).collect();
    let calls: Vec<Call> = lines.iter().filter_map(call_of).collect();
    if !calls.is_empty() {
        return calls;
    }
    let inner = text.trim();
    let inner = inner.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(inner);
    python_calls(inner).unwrap_or_default()
}

/// `f(a=1), g(b="x")`, separated by commas or lines.
fn python_calls(text: &str) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    for piece in split_top(text, &[',', '\n'])? {
        let piece = piece.trim();
        if piece.is_empty() {
            continue;
        }
        let (name, rest) = piece.split_once('(')?;
        let name = name.trim();
        let plain = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(plain) {
            return None;
        }
        let mut arguments = Map::new();
        for argument in split_top(rest.strip_suffix(')')?, &[','])? {
            if argument.trim().is_empty() {
                continue;
            }
            let (key, value) = argument.split_once('=')?;
            arguments.insert(key.trim().to_owned(), literal_eval(value.trim()).ok()?);
        }
        calls.push(Call { name: name.to_owned(), arguments: arguments.into() });
    }
    Some(calls)
}

/// Cuts at marks outside brackets and strings; nothing where those do not close.
fn split_top<'a>(text: &'a str, marks: &[char]) -> Option<Vec<&'a str>> {
    let (mut depth, mut quote, mut escaped, mut start) = (0i32, None, false, 0);
    let mut out = Vec::new();
    for (i, c) in text.char_indices() {
        match quote {
            Some(q) => {
                if !escaped && c == q {
                    quote = None;
                }
                escaped = c == '\\' && !escaped;
            }
            None if c == '"' || c == '\'' => quote = Some(c),
            None if "([{".contains(c) => depth += 1,
            None if ")]}".contains(c) => depth -= 1,
            None if depth == 0 && marks.contains(&c) => {
                out.push(text.get(start..i)?);
                start = i + c.len_utf8();
            }
            None => {}
        }
    }
    out.push(text.get(start..)?);
    (depth == 0 && quote.is_none()).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: Json) -> Call {
        Call { name: name.into(), arguments }
    }

    #[test]
    fn calls_are_read_in_each_form() {
        let wanted = [call("f", json!({"a": 1, "b": ["x, y", {"c": true}]}))];
        for text in [
            r#"{"name": "f", "arguments": {"b": ["x, y", {"c": true}], "a": 1}}"#,
            r#"[{"function": {"name": "f", "arguments": "{\"a\": 1.0, \"b\": [\"x, y\", {\"c\": true}]}"}}]"#,
            "Sure.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1, \"b\": [\"x, y\", {\"c\": true}]}}\n</tool_call>",
            "```json\n{\"tool_calls\": [{\"name\": \"f\", \"parameters\": {\"a\": 1, \"b\": [\"x, y\", {\"c\": true}]}}]}\n```",
            "[f(a=1, b=['x, y', {'c': True}])]",
            "I call\n{\"name\": \"f\", \"arguments\": {\"a\": 1, \"b\": [\"x, y\", {\"c\": true}]}}\nnow",
        ] {
            let found = calls_in(text);
            assert_eq!(found.len(), 1, "{text}");
            assert!(found[0].name == "f" && equal(&found[0].arguments, &wanted[0].arguments), "{text}: {found:?}");
        }
        assert_eq!(calls_in("f(a=1)\ng()"), [call("f", json!({"a": 1})), call("g", json!({}))]);
        for none in ["I would call f.", "f(a=", "", "{\"name\": 1}", "f(1)"] {
            assert!(calls_in(none).is_empty(), "{none}");
        }
    }

    fn conversation() -> Map<String, Json> {
        json!({"messages": [
            {"role": "user", "content": "Weather in Rome and Oslo?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}},
                {"function": {"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}}]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "tool_calls": [{"name": "done", "arguments": {}}]}],
          "tools": [{"function": {"name": "weather"}}]})
        .as_object()
        .unwrap()
        .clone()
    }

    #[test]
    fn turns_are_judged_one_by_one() {
        let agent = Agent::parse(&json!({"tools": "tools"})).unwrap();
        let turns = agent.turns(&conversation()).unwrap();
        assert_eq!(turns.len(), 2);
        assert_eq!(turns[0].history.iter().map(|t| t.role.as_str()).collect::<Vec<_>>(), ["system", "user"]);
        assert_eq!(turns[1].history.len(), 4);
        assert!(turns[1].history[3].content.contains("Tool result: sunny"));
        // As recorded, with ids for the calls that had none.
        let native = &turns[1].native;
        assert_eq!(native.iter().map(|t| t.role.as_str()).collect::<Vec<_>>(), ["user", "assistant", "tool"]);
        assert_eq!((native[1].tool_calls.len(), native[1].content.as_str()), (2, ""));
        assert_eq!(native[1].tool_calls[0]["function"], json!({"name": "weather", "arguments": {"city": "Rome"}}));
        assert_eq!(native[1].tool_calls[0]["id"], native[2].tool_call_id.clone().unwrap());
        assert_eq!(
            agent.tools_of(&conversation()).unwrap(),
            [json!({"type": "function", "function": {"name": "weather"}})]
        );
        let oslo_rome = "weather(city='Oslo')\nweather(city='Rome')".to_owned();
        assert_eq!(agent.score(&turns, &[oslo_rome.clone(), "done()".into()]), [1.0, 1.0, 1.0]);
        assert_eq!(
            agent.score(&turns, &["weather(city='Rome'), weather(city='Bonn')".into(), "x".into()]),
            [0.0, 0.5, 0.25]
        );
        let strict = Agent::parse(&json!({"order": "same"})).unwrap();
        assert_eq!(strict.score(&turns, &[oslo_rome, "done()".into()]), [0.5, 1.0, 1.0]);
    }

    #[test]
    fn rows_that_do_not_fit_are_told() {
        let agent = Agent::parse(&json!({})).unwrap();
        let mut row = conversation();
        row.insert("messages".into(), json!([{"role": "user", "content": "x"}]));
        assert!(agent.turns(&row).unwrap_err().problem.contains("nothing to judge"));
        row.insert("messages".into(), json!([{"content": "x"}]));
        assert!(agent.turns(&row).unwrap_err().problem.contains("message 1 has no `role`"));
        assert_eq!(
            Agent::parse(&json!({"tools": "tools"})).unwrap().turns(&Map::new()).unwrap_err().column,
            "messages"
        );
    }
}
