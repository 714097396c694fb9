//! Which layers attend to a sliding window: `sliding_window`, `layer_types` and what Qwen adds to them.

use serde_json::Value;

use super::ConfigError;
use super::config::ModelConfig;
use crate::decoder::LayerSpec;

/// One layer after the other. `by_default` says whether layer `i` slides where `layer_types` is absent; `window` is the
/// window of those that do.
pub(super) fn layers(
    config: &ModelConfig,
    window: Option<usize>,
    by_default: impl Fn(usize) -> bool,
) -> Result<Vec<LayerSpec>, ConfigError> {
    let num_layers = config.num_hidden_layers as usize;
    let Some(types) = &config.layer_types else {
        return Ok((0..num_layers).map(|i| LayerSpec { window: window.filter(|_| by_default(i)) }).collect());
    };
    if types.len() != num_layers {
        let message = format!("has {} entries, but there are {num_layers} layers", types.len());
        return Err(ConfigError::new("layer_types", message));
    }
    let layer = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(LayerSpec { window: None }),
        "sliding_attention" if window.is_some() => Ok(LayerSpec { window }),
        "sliding_attention" => Err(ConfigError::new(
            "layer_types",
            "asks for sliding_attention, but sliding_window is null".to_owned(),
        )),
        other => {
            let message =
                format!("{other} is not supported; supported are full_attention, sliding_attention");
            Err(ConfigError::new("layer_types", message))
        }
    };
    types.iter().map(layer).collect()
}

/// `sliding_window` in tokens; `absent` is what transformers takes where the field is not there at all.
pub(super) fn tokens(config: &ModelConfig, absent: Option<usize>) -> Result<Option<usize>, ConfigError> {
    match &config.sliding_window {
        None => Ok(absent),
        Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|&tokens| tokens > 0) {
            Some(tokens) => Ok(Some(tokens as usize)),
            None => Err(ConfigError::new(
                "sliding_window",
                format!("{value} is not a positive number of tokens, or null"),
            )),
        },
    }
}
