//! The checkpoint's own chat template, rendered as `transformers` renders it.

mod limits;
mod python;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

use crate::error::{CheckpointError, Result};
pub use limits::{indentable, with_stack, writable};
use python::{strftime, tojson};

const NAME: &str = "chat";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template with the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    file: PathBuf,
    tokens: Vec<(String, String)>,
}

/// `{% generation %}` marks what the assistant said, for training only.
static GENERATION: LazyLock<std::result::Result<regex::Regex, regex::Error>> =
    LazyLock::new(|| regex::Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}"));

/// What a template may do: an instruction costs 1, as do 64 bytes that it makes. A conversation of a million characters takes a
/// tenth of it; a template made to never end, or to fill the memory, ends as an error within a second.
const FUEL: u64 = 2_000_000;

/// Reads a JSON file; `None` where there is none.
pub(crate) fn read_json(path: &Path) -> Result<Option<Json>> {
    let bytes = match crate::files::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(CheckpointError::Io { file: path.to_path_buf(), source });
        }
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| CheckpointError::Invalid {
        file: path.to_path_buf(),
        problem: format!("not valid JSON: {error}"),
        hint: Some("fetch the file again".into()),
    })
}

/// A special token of `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn special_token(config: &Json, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// The template of `tokenizer_config.json`: a string, or the entry named `default` of a list.
fn from_settings(settings: &Json) -> Option<String> {
    let value = settings.get("chat_template")?;
    if let Some(text) = value.as_str() {
        return Some(text.to_string());
    }
    let list = value.as_array()?;
    let named = |entry: &&Json| entry.get("name").and_then(Json::as_str) == Some("default");
    let only = || list.first().filter(|_| list.len() == 1);
    let entry = list.iter().find(named).or_else(only)?;
    Some(entry.get("template")?.as_str()?.to_string())
}

/// The text of a checkpoint's template and the file it is in.
fn source(dir: &Path, settings_file: PathBuf, settings: Option<&Json>) -> Result<Option<(PathBuf, String)>> {
    let alone = dir.join("chat_template.jinja");
    match crate::files::read_text(&alone) {
        Ok(source) => return Ok(Some((alone, source))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(CheckpointError::Io { file: alone, source }),
    }
    if let Some(source) = settings.and_then(from_settings) {
        return Ok(Some((settings_file, source)));
    }
    let legacy = dir.join("chat_template.json");
    Ok(read_json(&legacy)?.as_ref().and_then(from_settings).map(|source| (legacy, source)))
}

/// The text of a checkpoint's template, as it stands there.
pub(crate) fn template_text(dir: &Path) -> Result<Option<String>> {
    let settings_file = dir.join("tokenizer_config.json");
    let settings = read_json(&settings_file)?;
    Ok(source(dir, settings_file, settings.as_ref())?.map(|(_, text)| text))
}

impl ChatTemplate {
    /// Loads `chat_template.jinja`, or else the `chat_template` of `tokenizer_config.json` or
    /// `chat_template.json`. `None` where the checkpoint has none.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let settings_file = dir.join("tokenizer_config.json");
        let settings = read_json(&settings_file)?;
        let Some((file, source)) = source(dir, settings_file, settings.as_ref())? else { return Ok(None) };
        let mut tokens = Vec::new();
        for key in ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"] {
            if let Some(text) = settings.as_ref().and_then(|value| special_token(value, key)) {
                tokens.push((key.to_string(), text));
            }
        }
        Self::compile(file, &source, tokens).map(Some)
    }

    /// Compiles a template's source; `file` is named in errors, `tokens` are the variables like
    /// `bos_token` it may use.
    pub fn compile(file: PathBuf, source: &str, tokens: Vec<(String, String)>) -> Result<Self> {
        let wrong = |problem: String| CheckpointError::Invalid {
            file: file.clone(),
            problem: format!("chat template: {problem}"),
            hint: Some("run without the chat template, or give plain text".into()),
        };
        let mut env = Environment::new();
        let syntax = env.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|error| wrong(describe(&error)))?);
        env.set_fuel(Some(FUEL));
        env.set_formatter(|out, state, value| {
            writable(value)?;
            minijinja::escape_formatter(out, state, value)
        });
        env.set_unknown_method_callback(unknown_method_callback);
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |text: String| -> std::result::Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        let source = GENERATION
            .as_ref()
            .map_err(|error| wrong(error.to_string()))?
            .replace_all(source, |found: &regex::Captures<'_>| {
                let part = |i| found.get(i).map_or("", |part| part.as_str());
                let body = if part(2).is_empty() { "if true" } else { "endif" };
                format!("{{%{} {body} {}%}}", part(1), part(3))
            })
            .into_owned();
        env.add_template_owned(NAME, source).map_err(|error| wrong(describe(&error)))?;
        Ok(Self { env, file, tokens })
    }

    /// Renders a conversation; `add_generation_prompt` opens the assistant's turn at its end.
    /// Templates that print the date get today's (UTC).
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        self.render_at(messages, add_generation_prompt, now.map_or(0, |time| time.as_secs()))
    }

    /// As [`ChatTemplate::render`], for the given moment in seconds since the epoch.
    pub fn render_at(&self, messages: &[Message], add_generation_prompt: bool, unix_time: u64) -> Result<String> {
        let messages: Value = messages
            .iter()
            .map(|message| {
                Value::from_pairs([
                    ("role", Value::from(message.role.as_str())),
                    ("content", Value::from(message.content.as_str())),
                ])
            })
            .collect();
        self.render_values(messages, Value::from(()), Vec::new(), add_generation_prompt, unix_time)
    }

    /// Whether the template reads `tools`; one that does not would leave them out without a word.
    pub fn knows_tools(&self) -> bool {
        self.env.get_template(NAME).is_ok_and(|t| t.undeclared_variables(false).contains("tools"))
    }

    /// Renders messages as a client sent them (whatever keys they carry), with the tools and further variables it sent.
    pub fn render_request(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        variables: &serde_json::Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let more = variables.iter().map(|(k, v)| (k.as_str(), value_of(v))).collect();
        let tools = tools.map_or(Value::from(()), value_of);
        self.render_values(value_of(messages), tools, more, add_generation_prompt, now)
    }

    fn render_values(
        &self,
        messages: Value,
        tools: Value,
        more: Vec<(&str, Value)>,
        add_generation_prompt: bool,
        unix_time: u64,
    ) -> Result<String> {
        let mut context = vec![
            ("messages", messages),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", tools),
            ("documents", Value::from(())),
            ("strftime_now", Value::from_function(move |format: String| strftime(&format, unix_time))),
        ];
        context.extend(more);
        for (key, text) in &self.tokens {
            context.push((key.as_str(), Value::from(text.as_str())));
        }
        let rendered = self.env.get_template(NAME).and_then(|template| {
            // The context goes where it is used: what a template makes of it is dropped there.
            let context = Value::from_pairs(context);
            with_stack(template.source(), || template.render(context))
        });
        rendered.map_err(|error| CheckpointError::Invalid {
            file: self.file.clone(),
            problem: format!("chat template: {}", describe(&error)),
            hint: Some("check the order and the roles of the messages, or run without the chat template".into()),
        })
    }
}

/// A JSON value as templates see it.
fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (_, Some(u)) => Value::from(u),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(list) => list.iter().map(value_of).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), value_of(v)))),
    }
}

fn describe(error: &Error) -> String {
    let text = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    match error.line() {
        Some(line) => format!("{text} (line {line})"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    const LLAMA3: &str = "{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}";
    const MISTRAL: &str = "{%- set ns = namespace(turns=0) %}
{{- bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant') }}
    {% endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.turns = ns.turns + 1 %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'].rstrip() + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}";

    fn load(source: &str) -> ChatTemplate {
        let dir = tempfile::tempdir().unwrap();
        let settings = serde_json::json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
            "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]});
        assert!(ChatTemplate::load(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        ChatTemplate::load(dir.path()).unwrap().unwrap()
    }

    fn talk(roles: &[&str]) -> Vec<Message> {
        roles.iter().map(|role| Message::new(*role, format!(" {role}<é> "))).collect()
    }

    #[test]
    fn chatml_and_llama3_render_as_in_python() {
        let chatml = load(CHATML).render(&talk(&["system", "user"]), true).unwrap();
        assert_eq!(
            chatml,
            "<|im_start|>system\n system<é> <|im_end|>\n<|im_start|>user\n user<é> <|im_end|>\n<|im_start|>assistant\n"
        );
        let llama = load(LLAMA3).render_at(&talk(&["system", "user"]), true, 1_709_164_800).unwrap();
        assert_eq!(
            llama,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 29 Feb 2024\n\nsystem<é><|eot_id|><|start_header_id|>user<|end_header_id|>\n\nuser<é><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn a_request_brings_tools_and_variables() {
        let many = load("{{ messages | tojson(indent=1000000000) }}").render(&talk(&["user"]), false);
        assert!(many.unwrap_err().to_string().contains("an indent of 1000000000 is too much"));
        let template = load("{{ tools | tojson }}|{{ messages[0].name }}|{{ mode }}|{{ tools is none }}");
        let messages = serde_json::json!([{"role": "user", "content": "x", "name": "n"}]);
        let tools = serde_json::json!([{"type": "function", "function": {"strict": true, "n": 2}}]);
        let variables = serde_json::json!({"mode": "fast"}).as_object().unwrap().clone();
        assert!(template.knows_tools() && !load(CHATML).knows_tools());
        let set = "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools %}x{% endif %}";
        assert!(load(set).knows_tools());
        let text = template.render_request(&messages, Some(&tools), &variables, true).unwrap();
        let want = "[{\"type\": \"function\", \"function\": {\"strict\": true, \"n\": 2}}]|n|fast|False";
        assert_eq!(text, want);
        assert_eq!(template.render_request(&messages, None, &variables, true).unwrap(), "null|n|fast|True");
    }

    #[test]
    fn mistral_alternates_or_says_why_not() {
        let template = load(MISTRAL);
        let text = template.render(&talk(&["user", "assistant", "user"]), false).unwrap();
        assert_eq!(text, "<s>\n[INST]  user<é>  [/INST]  assistant<é></s>[INST]  user<é>  [/INST]");
        let error = template.render(&talk(&["user", "user"]), false).unwrap_err().to_string();
        assert!(error.contains("roles must alternate") && error.contains("tokenizer_config.json"), "{error}");
    }

    #[test]
    fn own_file_wins_json_is_plain_and_a_syntax_error_has_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("chat_template.jinja");
        std::fs::write(&file, "{{ messages | tojson }}|{{ {'a': [1]} | tojson(indent=2) }}|{{ tools is none }}")
            .unwrap();
        let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
        let text = template.render(&[Message::new("u", "<a> & 'b' \\u003c \"é\"\n")], false).unwrap();
        assert_eq!(
            text,
            "[{\"role\": \"u\", \"content\": \"<a> & 'b' \\\\u003c \\\"é\\\"\\n\"}]|{\n  \"a\": [\n    1\n  ]\n}|True"
        );
        std::fs::write(&file, "\n{% if %}").unwrap();
        let error = ChatTemplate::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert_eq!(
            strftime("%-d %A %B %j %H:%M %p %F %%", 951_782_399),
            "28 Monday February 059 23:59 PM 2000-02-28 %"
        );
    }
}
