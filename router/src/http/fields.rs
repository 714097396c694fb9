//! A JSON body, field by field: an explicit `null` is an absent field, errors name the field, and no field of a known
//! meaning is ignored silently.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::RequestError;

/// TGI's default of `--payload-limit`.
pub(super) const MAX_BODY_BYTES: usize = 2_000_000;

/// Two megabytes in this time are 270 kbit/s.
const BODY_DEADLINE: Duration = Duration::from_mins(1);

/// The fields of an object that were not taken yet.
#[derive(Debug, Default)]
pub(super) struct Fields(Map<String, Value>);

impl From<Map<String, Value>> for Fields {
    fn from(object: Map<String, Value>) -> Self {
        Self(object)
    }
}

impl Fields {
    /// Reads a request's body.
    pub(super) async fn read(request: Request) -> Result<Self, RequestError> {
        let (head, body) = request.into_parts();
        let header = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let content_type =
            header(CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if content_type != "application/json" && !content_type.ends_with("+json") {
            return Err(RequestError::ContentType);
        }
        if header(CONTENT_LENGTH).parse::<usize>().is_ok_and(|length| length > MAX_BODY_BYTES) {
            return Err(RequestError::BodyTooLarge { limit: MAX_BODY_BYTES });
        }
        Self::parse(&read_body(body).await?)
    }

    /// The fields of a body.
    pub(super) fn parse(json: &[u8]) -> Result<Self, RequestError> {
        let value: Value =
            serde_json::from_slice(json).map_err(|error| RequestError::MalformedJson(error.to_string()))?;
        match value {
            Value::Object(map) => Ok(Self(map)),
            _ => Err(RequestError::Invalid {
                param: None,
                message: "the body must be a JSON object".to_owned(),
            }),
        }
    }

    /// Takes a field; `null` is absent.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, RequestError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| RequestError::invalid(name, format!("`{name}`: {error}"))),
        }
    }

    /// Takes a field that must be there.
    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, RequestError> {
        self.take(name)?.ok_or_else(|| RequestError::invalid(name, format!("missing field `{name}`")))
    }

    /// Takes an object, to be taken apart in its turn.
    pub(super) fn object(&mut self, name: &'static str) -> Result<Option<Fields>, RequestError> {
        Ok(self.take::<Map<String, Value>>(name)?.map(Self))
    }

    /// A seed: any 64 bits, negative numbers included, as other servers take them.
    pub(super) fn seed(&mut self) -> Result<Option<u64>, RequestError> {
        let number: Option<serde_json::Number> = self.take("seed")?;
        let bits =
            |number: serde_json::Number| number.as_u64().or_else(|| number.as_i64().map(i64::cast_unsigned));
        match number.map(bits) {
            None => Ok(None),
            Some(Some(seed)) => Ok(Some(seed)),
            Some(None) => Err(RequestError::invalid("seed", "`seed` must be an integer of 64 bits")),
        }
    }

    /// A string, or a list of strings.
    pub(super) fn strings(&mut self, name: &'static str) -> Result<Vec<String>, RequestError> {
        match self.take::<Value>(name)? {
            None => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one]),
            Some(list @ Value::Array(_)) => serde_json::from_value(list)
                .map_err(|error| RequestError::invalid(name, format!("`{name}`: {error}"))),
            Some(_) => {
                Err(RequestError::invalid(name, format!("`{name}` must be a string or a list of strings")))
            }
        }
    }

    /// Refuses a field that is known and not served, unless it has a value that asks for nothing.
    pub(super) fn refuse(
        &mut self,
        name: &'static str,
        harmless: impl FnOnce(&Value) -> bool,
        remedy: &str,
    ) -> Result<(), RequestError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if harmless(&value) => Ok(()),
            Some(_) => {
                Err(RequestError::unsupported(name, format!("`{name}` is not supported yet: {remedy}")))
            }
        }
    }

    /// Refuses fields that were put beside the object to which they belong: there they would have no effect.
    pub(super) fn refuse_misplaced(
        &mut self,
        names: &[&'static str],
        object: &str,
    ) -> Result<(), RequestError> {
        match names.iter().find(|name| self.0.get(**name).is_some_and(|value| !value.is_null())) {
            Some(name) => {
                Err(RequestError::invalid(name, format!("`{name}` belongs into `{object}`: move it there")))
            }
            None => Ok(()),
        }
    }

    /// Forgets fields that have no effect by their definition; docs/http.md lists them.
    pub(super) fn without_effect(&mut self, names: &[&'static str]) {
        for name in names {
            self.0.shift_remove(*name);
        }
    }

    /// What is left is unknown. Clients send fields that only some servers have, so this is no error.
    pub(super) fn finish(self) {
        for name in self.0.keys() {
            tracing::debug!(field = name.chars().take(64).collect::<String>(), "ignoring an unknown field");
        }
    }
}

async fn read_body(body: Body) -> Result<bytes::Bytes, RequestError> {
    let collect = Limited::new(body, MAX_BODY_BYTES).collect();
    match tokio::time::timeout(BODY_DEADLINE, collect).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(RequestError::BodyTooLarge { limit: MAX_BODY_BYTES })
        }
        Ok(Err(_)) => Err(RequestError::BodyIncomplete("the connection was closed")),
        Err(_) => Err(RequestError::BodyIncomplete("it took longer than a minute")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn null_is_absent_everywhere() {
        let mut fields = fields(r#"{"a":null,"seed":null,"stop":null,"options":null,"grammar":null}"#);
        assert_eq!(fields.take::<f32>("a").unwrap(), None);
        assert_eq!(fields.seed().unwrap(), None);
        assert_eq!(fields.strings("stop").unwrap(), Vec::<String>::new());
        assert!(fields.object("options").unwrap().is_none());
        fields.refuse("grammar", |_| false, "").unwrap();
    }

    #[test]
    fn errors_name_the_field() {
        let error = fields(r#"{"top_p":"high"}"#).take::<f32>("top_p").unwrap_err();
        assert_eq!(error.to_string(), "`top_p`: invalid type: string \"high\", expected f32");
        let error = fields("{}").require::<String>("inputs").unwrap_err();
        assert_eq!(error.to_string(), "missing field `inputs`");
        let error = fields(r#"{"n":-1}"#).take::<u32>("n").unwrap_err();
        assert!(error.to_string().starts_with("`n`: "), "{error}");
    }

    #[test]
    fn seeds_are_64_bits_of_either_sign() {
        let check =
            |json: &str, expected: Option<u64>| assert_eq!(fields(json).seed().ok().flatten(), expected);
        check(r#"{"seed":-1}"#, Some(u64::MAX));
        check(r#"{"seed":18446744073709551615}"#, Some(u64::MAX));
        check(r#"{"seed":1.5}"#, None);
        assert!(fields(r#"{"seed":1.5}"#).seed().is_err());
    }

    #[test]
    fn bodies_that_are_no_object_are_refused() {
        for body in ["", "{", "[1]", "\"x\"", "{\"a\":1e999}"] {
            assert!(Fields::parse(body.as_bytes()).is_err(), "{body:?}");
        }
        let deep = "[".repeat(100_000);
        assert!(Fields::parse(deep.as_bytes()).is_err());
    }
}
