//! From turns of a conversation to the text a model is given, plain or through a chat template.

use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::chat_template::{ChatTemplate, Message as TemplateMessage};
use serde_json::{Map, Value as Json, json};

use super::python::{ends_with_space, starts_with_space};
use super::request::Message;

/// A turn, with what follows it in plain text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text.
    pub content: String,
    /// Added behind it in plain text only.
    pub delimiter: String,
    /// Calls of tools, as in [`Message`].
    pub tool_calls: Vec<Json>,
    /// The call that a tool's result answers.
    pub tool_call_id: Option<String>,
}

impl Turn {
    /// A turn that nothing follows.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let (role, content) = (role.into(), content.into());
        Self { role, content, delimiter: String::new(), tool_calls: Vec::new(), tool_call_id: None }
    }
}

/// How conversations become text.
#[derive(Clone, Copy, Default)]
pub struct ChatOptions<'a> {
    /// The model's chat template; plain text without.
    pub template: Option<&'a ChatTemplate>,
    /// Few-shot examples as turns of their own instead of one user message.
    pub multiturn: bool,
    /// Put before the task's description.
    pub system: Option<&'a str>,
    /// Texts to be written are asked as conversations, though there is no template here: a server applies its own.
    pub messages: bool,
}

impl ChatOptions<'_> {
    /// The messages a template is given: as many as turns, or one for all between the system's and an answer begun.
    pub fn messages(&self, turns: Vec<Turn>) -> Vec<Message> {
        let turns = if self.multiturn { turns } else { one_turn(turns) };
        let message = |t: Turn| Message {
            role: t.role,
            content: t.content,
            tool_calls: t.tool_calls,
            tool_call_id: t.tool_call_id,
        };
        turns.into_iter().map(message).collect()
    }
}

/// `prefix` and `suffix` with `delimiter` between where neither brings white space there; one alone if the other is empty.
pub fn join_with(prefix: &str, suffix: &str, delimiter: &str) -> String {
    if prefix.is_empty() || suffix.is_empty() {
        return format!("{prefix}{suffix}");
    }
    let blank = ends_with_space(prefix) || starts_with_space(suffix);
    format!("{prefix}{}{suffix}", if blank { "" } else { delimiter })
}

/// Question and, for an example, its answer.
pub struct Question<'a> {
    /// Question.
    pub text: &'a str,
    /// Answer; an empty one is none.
    pub answer: Option<&'a str>,
    /// Start of the answer.
    pub gen_prefix: Option<&'a str>,
    /// Between question and answer.
    pub target_delimiter: &'a str,
    /// After the answer.
    pub fewshot_delimiter: &'a str,
}

impl Question<'_> {
    /// Its turns.
    pub fn turns(&self) -> Vec<Turn> {
        let prefix = self.gen_prefix.filter(|p| !p.is_empty());
        let delimited = match (self.answer, prefix) {
            (Some(_), None) => true,
            (_, Some(p)) => !self.text.is_empty() && !ends_with_space(self.text) && !starts_with_space(p),
            (None, None) => false,
        };
        let mut question = Turn::new("user", self.text);
        if delimited {
            question.delimiter = self.target_delimiter.into();
        }
        let mut turns = vec![question];
        if let Some(answer) = self.answer {
            let mut turn = Turn::new("assistant", join_with(prefix.unwrap_or_default(), answer, " "));
            turn.delimiter = self.fewshot_delimiter.into();
            turns.push(turn);
        } else if let Some(prefix) = prefix {
            turns.push(Turn::new("assistant", prefix));
        }
        turns
    }
}

/// The text of a conversation. `continues` says that the last turn is the start of the model's answer.
pub fn render(turns: Vec<Turn>, chat: &ChatOptions<'_>, continues: bool) -> Result<String, CheckpointError> {
    let Some(template) = chat.template else {
        return Ok(turns.into_iter().map(|t| t.content + &t.delimiter).collect());
    };
    let messages: Vec<TemplateMessage> =
        chat.messages(turns).into_iter().map(|m| TemplateMessage::new(m.role, m.content)).collect();
    let rendered = match template.render(&messages, !continues) {
        Ok(text) => text,
        Err(error) => {
            // A template that refuses the system role gets the conversation without it.
            let rest: Vec<TemplateMessage> = messages.iter().filter(|m| m.role != "system").cloned().collect();
            if rest.len() == messages.len() {
                return Err(error);
            }
            template.render(&rest, !continues)?
        }
    };
    Ok(match messages.last() {
        Some(last) if continues => cut_after(rendered, &last.content),
        _ => rendered,
    })
}

/// The text of a conversation with tools, through a template that knows them.
pub fn render_tools(template: &ChatTemplate, messages: &[Message], tools: &[Json]) -> Result<String, CheckpointError> {
    let tools = (!tools.is_empty()).then(|| Json::from(tools));
    template.render_request(&json!(messages), tools.as_ref(), &Map::new(), true)
}

/// All turns between the system's and an answer already begun, as one user message.
fn one_turn(mut turns: Vec<Turn>) -> Vec<Turn> {
    let mut out = Vec::new();
    if turns.first().is_some_and(|t| t.role == "system") {
        out.push(turns.remove(0));
    }
    let begun = turns.pop_if(|t| t.role == "assistant");
    if let Some(last) = turns.last_mut() {
        last.delimiter.clear();
    }
    out.push(Turn::new("user", turns.into_iter().map(|t| t.content + &t.delimiter).collect::<String>()));
    out.extend(begun);
    out
}

/// The text up to the end of the last message, so that the model goes on with it.
fn cut_after(text: String, last: &str) -> String {
    let bare = super::python::strip(last);
    let Some(at) = text.rfind(bare) else { return text };
    let kept = last.trim_start_matches(crate::text::is_python_space);
    let end = if text[at..].starts_with(kept) && kept == last { at + kept.len() } else { at + bare.len() };
    text.get(..end).unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(gen_prefix: Option<&str>) -> Vec<Turn> {
        let mut all = vec![Turn::new("system", "S. ")];
        let example =
            Question { text: "Q1", answer: Some("A1"), gen_prefix, target_delimiter: " ", fewshot_delimiter: "\n\n" };
        all.extend(example.turns());
        all.extend(Question { text: "Q2", answer: None, ..example }.turns());
        all
    }

    fn chatml() -> ChatTemplate {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        ChatTemplate::compile("chat".into(), source, Vec::new()).unwrap()
    }

    #[test]
    fn plain_text() {
        let plain = ChatOptions::default();
        assert_eq!(render(turns(None), &plain, false).unwrap(), "S. Q1 A1\n\nQ2");
        assert_eq!(render(turns(Some("It is")), &plain, true).unwrap(), "S. Q1 It is A1\n\nQ2 It is");
    }

    #[test]
    fn chat_as_one_turn_or_many() {
        let template = chatml();
        let mut chat = ChatOptions { template: Some(&template), multiturn: true, system: None, messages: false };
        assert_eq!(
            render(turns(None), &chat, false).unwrap(),
            "<system>S. </>\n<user>Q1</>\n<assistant>A1</>\n<user>Q2</>\n<assistant>"
        );
        chat.multiturn = false;
        assert_eq!(render(turns(None), &chat, false).unwrap(), "<system>S. </>\n<user>Q1 A1\n\nQ2</>\n<assistant>");
        assert_eq!(
            render(turns(Some("It is")), &chat, true).unwrap(),
            "<system>S. </>\n<user>Q1 It is A1\n\nQ2</>\n<assistant>It is"
        );
    }

    #[test]
    fn calls_go_through_a_template_as_such() {
        let source = "{{ tools[0].function.name }}{% for m in messages %}|{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a + 1 }}{% endfor %}{{ m.tool_call_id or '' }}{% endfor %}";
        let template = ChatTemplate::compile("chat".into(), source, Vec::new()).unwrap();
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}});
        let called = Message { tool_calls: vec![call], ..Message::new("assistant", "") };
        let result = Message { tool_call_id: Some("c".into()), ..Message::new("tool", "done") };
        let tools = [json!({"type": "function", "function": {"name": "f"}})];
        let text = render_tools(&template, &[called.clone(), result.clone()], &tools).unwrap();
        assert_eq!(text, "f|assistant 2|tool donec");
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
        assert_eq!(called.for_api(), json!({"role": "assistant", "content": null, "tool_calls": [call]}));
        assert_eq!(result.for_api(), json!({"role": "tool", "content": "done", "tool_call_id": "c"}));
        assert_eq!(json!(Message::new("user", "x")), json!({"role": "user", "content": "x"}));
    }

    #[test]
    fn a_template_without_system_role_goes_without() {
        let source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}[{{ m.content }}]{% endfor %}";
        let template = ChatTemplate::compile("chat".into(), source, Vec::new()).unwrap();
        let chat = ChatOptions { template: Some(&template), multiturn: true, system: None, messages: false };
        assert_eq!(render(turns(None), &chat, false).unwrap(), "[Q1][A1][Q2]");
    }

    #[test]
    fn delimiters_only_where_there_is_no_blank() {
        assert_eq!(join_with("a", "b", " "), "a b");
        assert_eq!(join_with("a\n", "b", " "), "a\nb");
        assert_eq!(join_with("", "b", " "), "b");
        assert_eq!(join_with("a", "", " "), "a");
    }
}
