//! `generation_config.json`, of which only the ids that end a sequence concern the shard.

use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::config::ModelConfig;
use super::{ConfigError, LoadError};

#[derive(Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Value>,
}

/// The ids that end a sequence: those of generation_config.json if it names some, else those of config.json; maybe none.
pub(super) fn eos_token_ids(model_dir: &Path, config: &ModelConfig) -> Result<Vec<u32>, LoadError> {
    let path = model_dir.join("generation_config.json");
    let generation = match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice::<GenerationConfig>(&text)
            .map_err(|source| LoadError::Json { path: path.clone(), source })?
            .eos_token_id
            .filter(|value| !value.is_null()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(source) => return Err(LoadError::Io { path, source }),
    };
    match (generation, &config.eos_token_id) {
        (Some(value), _) => parse(&value).map_err(|source| LoadError::Config { path, source }),
        (None, Some(value)) => {
            parse(value).map_err(|source| LoadError::Config { path: model_dir.join("config.json"), source })
        }
        (None, None) => Ok(Vec::new()),
    }
}

/// One id, a list of ids, or null.
fn parse(value: &Value) -> Result<Vec<u32>, ConfigError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value {
        Value::Null => Some(Vec::new()),
        Value::Array(values) => values.iter().map(id).collect(),
        value => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| ConfigError::new("eos_token_id", format!("{value} is neither an id nor a list of ids")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_end_is_one_id_or_several_or_none() {
        let check = |value: Value, expected: Option<&[u32]>| {
            assert_eq!(parse(&value).ok().as_deref(), expected, "{value}");
        };
        check(json!(2), Some(&[2]));
        check(json!([2, 7]), Some(&[2, 7]));
        check(json!(null), Some(&[]));
        check(json!(-1), None);
        check(json!("</s>"), None);
        check(json!([2, 4_294_967_296_u64]), None);
    }
}
