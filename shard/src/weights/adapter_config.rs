//! PEFT's `adapter_config.json`: ranks and scales, and what is refused because it would change the numbers.

use std::path::Path;

use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::AdapterError;

/// Of the layers of one adapter.
#[derive(Debug)]
pub(super) struct AdapterConfig {
    rank: usize,
    alpha: f64,
    /// Divide by the rank's root (Kalajdzievski 2023, arXiv:2312.03732).
    is_rank_stabilized: bool,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

#[derive(Deserialize)]
struct Fields {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    use_rslora: Option<bool>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// A field that changes the numbers, whether a value of it asks for nothing, and what to do.
type Refused = (&'static str, fn(&Value) -> bool, &'static str);

const MERGE: &str = "merge the adapter into its base model (PEFT: merge_and_unload), and serve that";

const REFUSED: &[Refused] = &[
    ("bias", |value| value == "none", "biases are not changed here: train with bias=\"none\""),
    ("use_dora", is_off, MERGE),
    ("modules_to_save", is_empty, MERGE),
    ("lora_bias", is_off, MERGE),
    ("fan_in_fan_out", is_off, MERGE),
    ("use_qalora", is_off, MERGE),
    ("use_bdlora", is_off, MERGE),
    ("kasa_config", is_empty, MERGE),
    ("lora_ga_config", is_empty, MERGE),
    ("monteclora_config", is_empty, MERGE),
    ("velora_config", is_empty, MERGE),
    ("layer_replication", is_empty, "layers are not repeated here"),
    ("target_parameters", is_empty, MERGE),
    ("trainable_token_indices", is_empty, MERGE),
    ("alora_invocation_tokens", is_empty, "an adapter is for all of a request's tokens here"),
    ("arrow_config", is_empty, "adapters are not mixed here"),
    (
        "init_lora_weights",
        keeps_base_weights,
        "it changes the base model's weights too: save the adapter with path_initial_model_for_weight_conversion, \
         which makes a plain one of it",
    ),
];

fn is_off(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        other => other.is_null(),
    }
}

/// Other ways to begin the training with leave no trace but in the factors.
fn keeps_base_weights(value: &Value) -> bool {
    let name = value.as_str().unwrap_or_default().to_ascii_lowercase();
    !["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|way| name.starts_with(way))
}

impl AdapterConfig {
    pub(super) fn read(path: &Path) -> Result<Self, AdapterError> {
        let text =
            std::fs::read(path).map_err(|source| AdapterError::Io { path: path.to_owned(), source })?;
        let fields = serde_json::from_slice(&text)
            .map_err(|source| AdapterError::Json { path: path.to_owned(), source })?;
        Self::of(fields).map_err(|(field, message)| AdapterError::Config {
            path: path.to_owned(),
            field: field.to_owned(),
            message,
        })
    }

    fn of(fields: Fields) -> Result<Self, (&'static str, String)> {
        let kind = fields.peft_type.as_deref().unwrap_or("absent");
        if kind != "LORA" {
            return Err(("peft_type", format!("is {kind}; only LORA is supported")));
        }
        for (field, is_harmless, remedy) in REFUSED {
            if let Some(value) = fields.others.get(*field).filter(|value| !is_harmless(value)) {
                return Err((field, format!("is {value}, which is not supported: {remedy}")));
            }
        }
        let rank_of = |value: &Value| value.as_u64().map(|rank| rank as usize);
        let config = Self {
            rank: fields.r,
            alpha: fields.lora_alpha,
            is_rank_stabilized: fields.use_rslora.unwrap_or(false),
            ranks: patterns("rank_pattern", fields.rank_pattern, rank_of)?,
            alphas: patterns("alpha_pattern", fields.alpha_pattern, Value::as_f64)?,
        };
        if config.rank == 0 || config.ranks.iter().any(|(_, rank)| *rank == 0) {
            return Err(("r", "is 0; expected at least 1".to_owned()));
        }
        Ok(config)
    }

    /// The rank that a layer's factors have.
    pub(super) fn rank(&self, layer: &str) -> usize {
        of_layer(&self.ranks, layer).unwrap_or(self.rank)
    }

    /// What the product of a layer's factors is multiplied with.
    pub(super) fn scale(&self, layer: &str) -> f32 {
        let rank = self.rank(layer) as f64;
        let divisor = if self.is_rank_stabilized { rank.sqrt() } else { rank };
        (of_layer(&self.alphas, layer).unwrap_or(self.alpha) / divisor) as f32
    }
}

/// As PEFT reads them: a key is a regular expression for the end of a module's name, from a dot on, and the first that
/// matches counts.
fn patterns<T>(
    field: &'static str,
    given: Option<Map<String, Value>>,
    value_of: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Regex, T)>, (&'static str, String)> {
    let pattern = |(key, value): (String, Value)| {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
            .map_err(|error| (field, format!("has the key {key:?}, which cannot be read: {error}")))?;
        let number = value_of(&value).ok_or_else(|| (field, format!("has {value} at {key:?}, no number")))?;
        Ok((regex, number))
    };
    given.unwrap_or_default().into_iter().map(pattern).collect()
}

fn of_layer<T: Copy>(patterns: &[(Regex, T)], layer: &str) -> Option<T> {
    patterns.iter().find(|(regex, _)| regex.is_match(layer)).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(mut fields: Value) -> Result<AdapterConfig, (&'static str, String)> {
        let defaults = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"});
        for (name, value) in defaults.as_object().unwrap() {
            fields.as_object_mut().unwrap().entry(name).or_insert_with(|| value.clone());
        }
        AdapterConfig::of(serde_json::from_value(fields).unwrap())
    }

    #[test]
    fn scales_are_alpha_over_the_rank_or_its_root() {
        let layer = "model.layers.1.self_attn.q_proj";
        let check = |fields, rank, scale: f32| {
            let config = config(fields).unwrap();
            assert_eq!((config.rank(layer), config.scale(layer).to_bits()), (rank, scale.to_bits()));
        };
        check(json!({}), 8, 2.0);
        check(json!({"use_rslora": true, "r": 16}), 16, 4.0);
        check(json!({"rank_pattern": {"q_proj": 4}}), 4, 4.0);
        check(json!({"rank_pattern": {"proj": 4, "layers.0.self_attn.q_proj": 2}}), 8, 2.0);
        check(json!({"alpha_pattern": {r"layers\.[01]\..*q_proj": 4}}), 8, 0.5);
        check(json!({"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 8, "q_proj": 4}}), 8, 1.0);
    }

    #[test]
    fn what_would_change_the_numbers_otherwise_is_refused_by_its_field() {
        let check = |fields: Value, expected: &str| {
            let (field, message) = config(fields).unwrap_err();
            assert_eq!(field, expected, "{message}");
        };
        check(json!({"peft_type": "IA3"}), "peft_type");
        check(json!({"r": 0}), "r");
        check(json!({"bias": "all"}), "bias");
        check(json!({"use_dora": true}), "use_dora");
        check(json!({"modules_to_save": ["lm_head"]}), "modules_to_save");
        check(json!({"init_lora_weights": "pissa_niter_16"}), "init_lora_weights");
        check(json!({"rank_pattern": {"(": 4}}), "rank_pattern");
        check(json!({"alpha_pattern": {"q_proj": "4"}}), "alpha_pattern");
        config(json!({"use_dora": false, "modules_to_save": null, "init_lora_weights": true, "layer_replication": []}))
            .expect("all of it asks for nothing");
    }
}
