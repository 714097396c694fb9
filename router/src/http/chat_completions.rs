//! `POST /v1/chat/completions`.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::grammar;
use super::openai::{self, Endpoint, TokenLogprob};
use crate::error::RequestError;
use crate::stream::{Generated, GeneratedToken};
use crate::text::chat_template::Conversation;
use crate::text::tokenizer::Tokenizer;
use crate::validate::{Dialect, GenerationRequest, Prompt, StandingParameters};

/// Continues a chat.
pub(super) struct ChatCompletions {
    logprobs: bool,
}

impl Endpoint for ChatCompletions {
    const ID_PREFIX: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    type WholeChoice = WholeChoice;
    type ChunkChoice<'a> = ChunkChoice<'a>;
    /// Whether the first chunk was sent.
    type Progress = bool;

    fn take(
        fields: &mut Fields,
        standing: StandingParameters,
    ) -> Result<(GenerationRequest, Self), RequestError> {
        let messages: Vec<Map<String, Value>> = fields.require("messages")?;
        let messages: Vec<Value> = messages.into_iter().map(message).collect::<Result<_, _>>()?;
        if messages.is_empty() {
            return Err(RequestError::invalid(
                "messages",
                "`messages` cannot be empty: send at least one message",
            ));
        }
        let tools: Option<Vec<Value>> = fields.take("tools")?;
        let tools = tools.filter(|tools| !tools.is_empty());
        let tools = match ToolChoice::take(fields)? {
            ToolChoice::Auto => tools,
            ToolChoice::None => None,
        };
        let grammar = grammar::take(fields, "response_format")?;
        fields.refuse("functions", |_| false, "use `tools`")?;
        fields.refuse("function_call", |value| value == "auto" || value == "none", "use `tools`")?;
        fields.refuse("audio", |_| false, "the model gives text")?;
        fields.refuse("modalities", |value| *value == json!(["text"]), "the model gives text")?;
        fields.refuse("tool_prompt", |_| false, "write it into a system message")?;
        fields.refuse("web_search_options", |_| false, "the server has no access to the network")?;

        let logprobs = fields.take("logprobs")?.unwrap_or(false);
        let top_logprobs: Option<u32> = fields.take("top_logprobs")?;
        if top_logprobs.is_some_and(|top| top > 0) && !logprobs {
            let message = "`top_logprobs` needs `logprobs`: set it to true";
            return Err(RequestError::invalid("top_logprobs", message));
        }
        let variables: Option<Map<String, Value>> = fields.take("chat_template_kwargs")?;
        // The older name of the same field.
        let max_tokens: Option<u32> = fields.take("max_tokens")?;
        fields.refuse(
            "best_of",
            |value| value.as_u64() == Some(1),
            "use `n`, and choose one of the answers",
        )?;
        let generation = GenerationRequest {
            model: openai::take_model(fields)?,
            prompt: Prompt::Chat(Conversation { messages, tools, variables: variables.unwrap_or_default() }),
            dialect: Dialect::OpenAi,
            sampling: openai::take_sampling(fields)?,
            max_new_tokens: fields.take("max_completion_tokens")?.or(max_tokens),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            top_n_tokens: top_logprobs.unwrap_or(0),
            prompt_logprobs: false,
            stop: fields.strings("stop")?,
            n: fields.take("n")?.unwrap_or(1),
            best_of: None,
            truncate: None,
            grammar,
            standing,
        };
        fields.without_effect(&["reasoning_effort"]);
        Ok((generation, Self { logprobs }))
    }

    fn whole(&self, tokenizer: &Tokenizer, index: usize, generated: Generated) -> WholeChoice {
        WholeChoice {
            index,
            logprobs: self.logprobs.then(|| Logprobs::new(tokenizer, &generated.tokens)),
            finish_reason: openai::finish_reason(generated.end.reason),
            message: Message { role: "assistant", content: generated.text },
        }
    }

    fn chunks<'a>(
        &self,
        tokenizer: &Tokenizer,
        index: usize,
        begun: &mut bool,
        token: &'a GeneratedToken,
        mut write: impl FnMut(ChunkChoice<'a>),
    ) {
        let choice = |delta| ChunkChoice { index, delta, logprobs: None, finish_reason: None };
        if !std::mem::replace(begun, true) {
            write(choice(Delta { role: Some("assistant"), content: Some("") }));
        }
        let logprobs = (self.logprobs && openai::is_content(token))
            .then(|| Logprobs::new(tokenizer, std::slice::from_ref(token)));
        if !token.text.is_empty() || logprobs.is_some() {
            let delta = Delta { role: None, content: Some(&token.text) };
            write(ChunkChoice { logprobs, ..choice(delta) });
        }
        if let Some(end) = &token.end {
            let finish_reason = Some(openai::finish_reason(end.reason));
            write(ChunkChoice { finish_reason, ..choice(Delta::default()) });
        }
    }
}

/// A message in the form that templates expect: its content is one string, and its calls' arguments are objects.
fn message(mut message: Map<String, Value>) -> Result<Value, RequestError> {
    if !message.get("role").is_some_and(Value::is_string) {
        return Err(RequestError::invalid(
            "messages",
            "`messages`: each message needs a `role`, such as \"user\"",
        ));
    }
    let calls =
        message.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|list| !list.is_empty()));
    let content = match message.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts.iter().map(part_text).collect::<Result<String, _>>()?,
        None | Some(Value::Null) if calls || message["role"] == "assistant" => String::new(),
        _ => {
            let message = "`messages`: the `content` of a message must be a string or a list of text parts";
            return Err(RequestError::invalid("messages", message));
        }
    };
    message.insert("content".to_owned(), content.into());
    // Clients fill in what they do not set; templates ask whether these are defined.
    message.retain(|_, value| !value.is_null());
    if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for call in calls {
            parse_arguments(call);
        }
    }
    Ok(Value::Object(message))
}

fn part_text(part: &Value) -> Result<&str, RequestError> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text") | None, _) => Err(RequestError::invalid(
            "messages",
            "`messages`: a text part is {\"type\": \"text\", \"text\": ...}",
        )),
        (Some(_), _) => Err(RequestError::unsupported(
            "messages",
            "`messages`: only parts of type `text` are supported: the model reads no images, sounds or files",
        )),
    }
}

/// OpenAI's arguments are JSON in a string; templates write them with `tojson`, and would quote them once more.
fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok())
        && object.is_object()
    {
        *arguments = object;
    }
}

/// Whether the tools are shown to the model.
enum ToolChoice {
    Auto,
    None,
}

impl ToolChoice {
    fn take(fields: &mut Fields) -> Result<Self, RequestError> {
        let given: Option<Value> = fields.take("tool_choice")?;
        match given.as_ref().map(|value| value.as_str()) {
            None | Some(Some("auto")) => Ok(Self::Auto),
            Some(Some("none")) => Ok(Self::None),
            Some(_) => Err(RequestError::unsupported(
                "tool_choice",
                "`tool_choice` other than \"auto\" and \"none\" is not supported yet: use \"auto\", and ask for the call in a \
                 message",
            )),
        }
    }
}

#[derive(Serialize)]
pub(super) struct WholeChoice {
    index: usize,
    message: Message,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
}

impl Logprobs {
    fn new(tokenizer: &Tokenizer, tokens: &[GeneratedToken]) -> Self {
        let content = tokens.iter().filter(|token| openai::is_content(token));
        Self { content: content.map(|token| TokenLogprob::new(tokenizer, &token.token)).collect() }
    }
}

#[derive(Serialize)]
pub(super) struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}
