//! A chat's messages to the text that the model was trained to continue, by the model's own Jinja template.
//!
//! Templates are written for `transformers`, that is for Python's Jinja2: Python's string methods are there, `tojson`
//! writes what Python's `json.dumps` writes, and `raise_exception` and `strftime_now` exist. A template can reach
//! nothing outside of itself, and fuel bounds its running time.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Deserialize;
use serde::Serialize as _;

use super::{LoadError, strftime};

/// Instructions of one rendering: some thousand messages' worth, a fraction of a second.
const FUEL: u64 = 5_000_000;

/// Nested loops, macros and calls; the stack of a worker thread holds several times as many.
const RECURSION_LIMIT: usize = 200;

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// The model's chat template, compiled.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a template sees.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    /// In the form that templates expect: `role`, `content` as a string, and whatever else a message has.
    pub(crate) messages: Vec<serde_json::Value>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<serde_json::Value>>,
    /// Further variables of the template, as `enable_thinking`. They do not replace the variables that exist.
    pub(crate) variables: serde_json::Map<String, serde_json::Value>,
}

/// The template did not accept this conversation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model's chat template refuses these messages: {0}")]
pub(crate) struct TemplateError(pub(crate) String);

/// The parts of `tokenizer_config.json` that matter here.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<TemplateSource>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TemplateSource {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

impl ChatTemplate {
    /// Reads `chat_template.jinja` in `model_dir`, or else the template in its `tokenizer_config.json`. A model without
    /// either has none.
    pub(crate) fn load(model_dir: &Path) -> Result<Option<Self>, LoadError> {
        let config_path = model_dir.join("tokenizer_config.json");
        let config: TokenizerConfig = match read(&config_path)? {
            Some(json) => serde_json::from_str(&json).map_err(|error| broken(&config_path, &error))?,
            None => TokenizerConfig::default(),
        };
        let template_path = model_dir.join("chat_template.jinja");
        let (path, source) = match (read(&template_path)?, config.chat_template) {
            (Some(source), _) => (template_path, TemplateSource::One(source)),
            (None, Some(source)) => (config_path, source),
            (None, None) => return Ok(None),
        };
        let templates = match source {
            TemplateSource::One(source) => vec![(DEFAULT.to_owned(), source)],
            TemplateSource::Named(named) => {
                named.into_iter().map(|named| (named.name, named.template)).collect()
            }
        };
        let (bos, eos) = (config.bos_token, config.eos_token);
        Self::compile(templates, bos.map(SpecialToken::into_text), eos.map(SpecialToken::into_text))
            .map(Some)
            .map_err(|error| broken(&path, &error))
    }

    /// Compiles templates by name: `default`, and `tool_use` for requests with tools, if there is one.
    pub(crate) fn compile(
        templates: Vec<(String, String)>,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TemplateError> {
        let mut environment = environment();
        for (name, source) in templates {
            environment
                .add_template_owned(name, without_generation_tags(&source))
                .map_err(|error| TemplateError(describe(&error)))?;
        }
        if environment.get_template(DEFAULT).is_err() {
            return Err(TemplateError("none of the chat templates has the name \"default\"".to_owned()));
        }
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The text of a conversation, up to where the model's answer begins. Special tokens are in it as text.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        let with_tools =
            conversation.tools.as_ref().and_then(|_| self.environment.get_template(TOOL_USE).ok());
        let template = match with_tools {
            Some(template) => template,
            None => {
                self.environment.get_template(DEFAULT).map_err(|error| TemplateError(describe(&error)))?
            }
        };
        let mut context: serde_json::Map<String, serde_json::Value> = conversation.variables.clone();
        context.insert("messages".to_owned(), conversation.messages.clone().into());
        context.insert("tools".to_owned(), conversation.tools.clone().into());
        context.insert("documents".to_owned(), serde_json::Value::Null);
        context.insert("add_generation_prompt".to_owned(), true.into());
        // Absent tokens stay undefined, which templates print as nothing.
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            context.remove(name);
            if let Some(token) = token {
                context.insert(name.to_owned(), token.clone().into());
            }
        }
        template.render(Value::from(Serde(&context))).map_err(|error| TemplateError(describe(&error)))
    }
}

fn read(path: &Path) -> Result<Option<String>, LoadError> {
    match std::fs::read_to_string(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LoadError::Read { path: path.display().to_string(), error }),
    }
}

fn broken(path: &Path, reason: &dyn std::fmt::Display) -> LoadError {
    LoadError::Broken { path: path.display().to_string(), reason: reason.to_string() }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // As `transformers` sets up Jinja2.
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        strftime::now(&format).map_err(|error| Error::new(ErrorKind::InvalidOperation, error))
    });
    environment
}

/// The innermost reason and its line; never the template's values, which are the user's text.
fn describe(error: &Error) -> String {
    let mut innermost = error;
    while let Some(cause) =
        std::error::Error::source(innermost).and_then(|cause| cause.downcast_ref::<Error>())
    {
        innermost = cause;
    }
    let reason = match innermost.detail() {
        Some(detail) => detail.to_owned(),
        None => innermost.kind().to_string(),
    };
    match innermost.line().or_else(|| error.line()) {
        Some(line) => format!("{reason} (line {line} of the template)"),
        None => reason,
    }
}

/// `transformers` knows `{% generation %}` blocks, which mark the assistant's text for training and print it as it is.
fn without_generation_tags(source: &str) -> String {
    let mut source = source.to_owned();
    for open in ["{%", "{%-", "{%+"] {
        for close in ["%}", "-%}", "+%}"] {
            for (tag, plain) in [("generation", "if true"), ("endgeneration", "endif")] {
                source = source.replace(&format!("{open} {tag} {close}"), &format!("{open} {plain} {close}"));
            }
        }
    }
    source
}

/// `json.dumps(value, ensure_ascii=False)`, with the arguments that templates give it.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter with keyword arguments")]
fn to_json(Serde(value): Serde<serde_json::Value>, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let sort_keys: Option<bool> = arguments.get("sort_keys")?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    // Accepted for their defaults, which is all that templates give.
    let _: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings"));
        }
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let value = if sort_keys == Some(true) { sorted(value) } else { value };
    let mut bytes = Vec::new();
    let formatter =
        PythonFormatter { item, key, indent: indent.map(|width| width.min(16)), depth: 0, empty: true };
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

fn sorted(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            entries.into_iter().collect()
        }
        serde_json::Value::Array(items) => items.into_iter().map(sorted).collect(),
        other => other,
    }
}

/// Python's separators and indentation.
struct PythonFormatter {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    /// Whether the collection that is being written has no item yet.
    empty: bool,
}

impl PythonFormatter {
    fn open<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn begin_item<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }

    fn line<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b"[")
    }
    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b"]")
    }
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.begin_item(writer, first)
    }
    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.empty = false;
        Ok(())
    }
    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b"{")
    }
    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b"}")
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.begin_item(writer, first)
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.empty = false;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// ChatML, as the demo model's.
    pub(crate) const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
        {{ message['content'] | trim }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn render(source: &str, conversation: &Conversation) -> Result<String, TemplateError> {
        ChatTemplate::compile(
            vec![(DEFAULT.to_owned(), source.to_owned())],
            Some("<s>".to_owned()),
            Some("</s>".to_owned()),
        )?
        .render(conversation)
    }

    fn hello() -> Conversation {
        Conversation {
            messages: vec![json!({"role": "user", "content": "Hi \u{1f600} <b>"})],
            ..Default::default()
        }
    }

    #[test]
    fn a_chat_becomes_the_text_up_to_the_answer() {
        let text = render(CHATML, &hello()).unwrap();
        assert_eq!(text, "<|im_start|>user\nHi \u{1f600} <b><|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn pythons_jinja_is_understood() {
        let check = |source: &str, expected: &str| {
            assert_eq!(render(source, &hello()).unwrap(), expected, "{source}");
        };
        check("{{ bos_token }}{{ messages[0].content.split(' ')[0] }}{{ eos_token }}", "<s>Hi</s>");
        check(
            "{%- set ns = namespace(n=0) -%}{%- for m in messages[::-1] -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.n }}",
            "1",
        );
        check(
            "{{ '  x'.lstrip() + 'Y'.lower() }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'.startswith('ab') }}",
            "xybTrue",
        );
        check("{% if tools is none %}no tools{% endif %}{{ nothing }}", "no tools");
        check("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}", "user");
        check("  {% if true %}\nx\n  {% endif %}\ny", "x\ny");
        check("{{ strftime_now('%Y') | length }}", "4");
        check("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02");
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let value = json!({"b": [1, 2.5, null, true], "a": "é<'\"", "e": [], "o": {}});
        let conversation = Conversation { messages: vec![value], ..Default::default() };
        let check =
            |source: &str, expected: &str| assert_eq!(render(source, &conversation).unwrap(), expected);
        check("{{ messages[0] | tojson }}", r#"{"b": [1, 2.5, null, true], "a": "é<'\"", "e": [], "o": {}}"#);
        check(
            "{{ messages[0] | tojson(indent=2) }}",
            "{\n  \"b\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"a\": \"é<'\\\"\",\n  \"e\": [],\n  \"o\": {}\n}",
        );
        check(
            "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True, ensure_ascii=False) }}",
            r#"{"a":"é<'\"","b":[1,2.5,null,true],"e":[],"o":{}}"#,
        );
    }

    #[test]
    fn a_refusal_of_the_template_is_the_error() {
        let error = render("{{ raise_exception('roles must alternate') }}", &hello()).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn endless_templates_run_out_of_fuel() {
        let source = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        assert!(render(source, &hello()).unwrap_err().to_string().contains("fuel"));
        let source = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        assert!(render(source, &hello()).unwrap_err().to_string().contains("recursion"));
    }

    #[test]
    fn variables_of_the_request_do_not_replace_the_templates_own() {
        let variables = json!({"enable_thinking": false, "messages": [], "bos_token": "x"});
        let conversation = Conversation { variables: variables.as_object().unwrap().clone(), ..hello() };
        let text =
            render("{{ enable_thinking }}{{ messages | length }}{{ bos_token }}", &conversation).unwrap();
        assert_eq!(text, "False1<s>");
    }

    #[test]
    fn templates_are_found_in_both_files_and_the_tools_one_is_for_tools() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::load(dir.path()).unwrap().is_none());
        let config = json!({
            "eos_token": {"content": "</s>"},
            "chat_template": [
                {"name": "default", "template": "plain{{ eos_token }}"}, {"name": "tool_use", "template": "tools"}
            ],
        });
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
        assert_eq!(template.render(&hello()).unwrap(), "plain</s>");
        let with_tools = Conversation { tools: Some(vec![json!({})]), ..hello() };
        assert_eq!(template.render(&with_tools).unwrap(), "tools");
        std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(ChatTemplate::load(dir.path()).unwrap().unwrap().render(&hello()).unwrap(), "file");
        std::fs::write(dir.path().join("chat_template.jinja"), "{% if %}").unwrap();
        let error = ChatTemplate::load(dir.path()).err().expect("the template is broken").to_string();
        assert!(error.contains("chat_template.jinja is broken"), "{error}");
    }
}
