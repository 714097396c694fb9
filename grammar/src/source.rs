//! A grammar as text: what crosses from the router to a shard.

use std::sync::Arc;

/// How a grammar is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A JSON schema, as JSON text.
    JsonSchema,
    /// A regular expression that the whole text matches, in the syntax of Rust's `regex` crate.
    Regex,
}

/// A grammar's text. Equal texts are one grammar.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// How it is written.
    pub kind: Kind,
    /// The text.
    pub text: Arc<str>,
}

impl Source {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self { kind: Kind::JsonSchema, text: r#"{"type":"object"}"#.into() }
    }

    /// What a JSON schema describes; properties come in the schema's order.
    pub fn json_schema(schema: &serde_json::Value) -> Self {
        Self { kind: Kind::JsonSchema, text: schema.to_string().into() }
    }

    /// What a regex matches from beginning to end.
    pub fn regex(regex: &str) -> Self {
        Self { kind: Kind::Regex, text: regex.into() }
    }
}
