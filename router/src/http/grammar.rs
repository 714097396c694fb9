//! What a text is to be, as clients say it: OpenAI's `response_format` and TGI's `grammar`.

use grammar::Source;
use serde_json::Value;

use super::fields::Fields;
use crate::error::RequestError;
use crate::validate::RequestedGrammar;

/// Takes the grammar that the field `name` describes, in either API's form; none where it asks for plain text.
pub(super) fn take(
    fields: &mut Fields,
    name: &'static str,
) -> Result<Option<RequestedGrammar>, RequestError> {
    let Some(mut given) = fields.object(name)? else { return Ok(None) };
    let within = |error: RequestError| match error {
        RequestError::Invalid { message, .. } => {
            RequestError::invalid(name, format!("within `{name}`: {message}"))
        }
        other => other,
    };
    let kind: String = given.require("type").map_err(within)?;
    let value: Option<Value> = given.take("value").map_err(within)?;
    let source = match (kind.as_str(), value) {
        ("text", None) => None,
        ("json_object", None) => Some(Source::json_object()),
        ("json" | "json_object", Some(schema)) => Some(Source::json_schema(&parsed(name, schema)?)),
        ("json_schema", value) => {
            let mut described = match value {
                // TGI's form: `value` has what OpenAI's `json_schema` has.
                Some(Value::Object(described)) => Fields::from(described),
                Some(_) => return Err(invalid(name, "`value` must be an object with a `schema`")),
                None => given
                    .object("json_schema")
                    .map_err(within)?
                    .ok_or_else(|| invalid(name, "`json_schema` is missing: it has the `schema`"))?,
            };
            let schema: Value = described.require("schema").map_err(within)?;
            // Whatever cannot be enforced is refused, whether this is said or not.
            described.take::<bool>("strict").map_err(within)?;
            described.without_effect(&["name", "description"]);
            described.finish();
            Some(Source::json_schema(&parsed(name, schema)?))
        }
        ("regex", Some(Value::String(regex))) => Some(Source::regex(&regex)),
        ("json" | "regex" | "text", _) => {
            return Err(invalid(
                name,
                "`value` must be a schema with \"json\", a string with \"regex\", and absent with \"text\"",
            ));
        }
        (other, _) => {
            let other: String = other.chars().take(50).collect();
            let message =
                format!("the type {other:?} is none of text, json_object, json_schema, json and regex");
            return Err(invalid(name, &message));
        }
    };
    given.finish();
    Ok(source.map(|source| RequestedGrammar { source, param: name }))
}

/// A schema may be JSON in a string.
fn parsed(name: &'static str, schema: Value) -> Result<Value, RequestError> {
    match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| invalid(name, &format!("the schema is a string that is not JSON: {error}"))),
        other => Ok(other),
    }
}

fn invalid(name: &'static str, message: &str) -> RequestError {
    RequestError::invalid(name, format!("`{name}`: {message}"))
}

#[cfg(test)]
mod tests {
    use grammar::Kind;
    use serde_json::json;

    use super::*;

    fn take_from(given: &Value) -> Result<Option<RequestedGrammar>, RequestError> {
        let body = json!({"grammar": given}).to_string();
        take(&mut Fields::parse(body.as_bytes())?, "grammar")
    }

    #[test]
    fn both_apis_forms_are_understood() {
        let schema = json!({"type": "integer", "properties": {"b": {}, "a": {}}});
        let text = schema.to_string();
        let check = |given: Value, kind: Kind, text: &str| {
            let source = take_from(&given).unwrap().expect("a grammar").source;
            assert_eq!((source.kind, &*source.text), (kind, text), "{given}");
        };
        check(json!({"type": "json_object"}), Kind::JsonSchema, r#"{"type":"object"}"#);
        check(json!({"type": "json", "value": schema}), Kind::JsonSchema, &text);
        check(json!({"type": "json", "value": text}), Kind::JsonSchema, &text);
        check(json!({"type": "json_object", "value": schema}), Kind::JsonSchema, &text);
        let described = json!({"name": "x", "schema": schema, "strict": true});
        check(json!({"type": "json_schema", "value": described}), Kind::JsonSchema, &text);
        check(json!({"type": "json_schema", "json_schema": described}), Kind::JsonSchema, &text);
        check(json!({"type": "regex", "value": "a+"}), Kind::Regex, "a+");
        assert_eq!(take_from(&json!({"type": "text"})).unwrap(), None);
        assert_eq!(take_from(&json!(null)).unwrap(), None);
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_named() {
        let check = |given: Value, part: &str| {
            let error = take_from(&given).expect_err("it is refused").to_string();
            assert!(error.contains("`grammar`") && error.contains(part), "{part:?} is not in {error:?}");
        };
        check(json!({}), "missing field `type`");
        check(json!({"type": "xml"}), "\"xml\"");
        check(json!({"type": "regex"}), "a string with");
        check(json!({"type": "regex", "value": 7}), "a string with");
        check(json!({"type": "json"}), "a schema with");
        check(json!({"type": "json", "value": "{"}), "not JSON");
        check(json!({"type": "json_schema"}), "`json_schema` is missing");
        check(json!({"type": "json_schema", "json_schema": {"name": "x"}}), "missing field `schema`");
        check(json!({"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}), "`strict`");
    }
}
