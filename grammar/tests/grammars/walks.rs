//! Random walks: a model that wants to leave the grammar at every token. What it finishes is valid.

use grammar::Progress;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::models::{MODELS, Model, allowed};

/// Tokens after which a walk prefers to end what is open, and at which it gives up.
const LONG: usize = 60;
const TOO_LONG: usize = 1500;

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object"}),
        json!({}),
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 20},
                "born": {"type": "integer", "minimum": -500, "maximum": 2030},
                "height": {"type": "number", "exclusiveMinimum": 0, "maximum": 3.5},
                "tags": {"type": "array", "items": {"enum": ["a", "b c", "\u{e9}\"\\"]}, "minItems": 1, "maxItems": 4},
                "friend": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/friend"}]},
            },
            "required": ["name", "born", "friend"],
            "additionalProperties": false,
            "$defs": {"friend": {
                "type": "object",
                "properties": {"nick name": {"type": "string", "pattern": "^[a-z]+-[0-9]{2}$"}, "close": {"type": "boolean"}},
                "required": ["nick name"],
                "additionalProperties": {"type": "integer", "multipleOf": 5},
            }},
        }),
        json!({
            "$ref": "#/$defs/tree",
            "$defs": {"tree": {
                "type": "object",
                "properties": {"value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["value", "children"],
                "additionalProperties": false,
            }},
        }),
        json!({
            "type": "object",
            "patternProperties": {"^x-": {"type": "string", "format": "uuid"}},
            "properties": {"kind": {"const": {"a": [1, "two", null]}}, "ip": {"type": "string", "format": "ipv4"}},
            "required": ["kind"],
            "additionalProperties": false,
        }),
        json!({
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": ["string", "null"]}}, "required": ["b"]},
            ],
            "maxProperties": 2,
        }),
        json!({
            "type": "array",
            "prefixItems": [{"type": "string"}, {"type": "boolean"}],
            "items": {"oneOf": [{"type": "integer"}, {"type": "object", "properties": {"z": {}}, "additionalProperties": false}]},
            "minItems": 2,
            "maxItems": 5,
        }),
        // An unknown format says nothing, and neither do annotations.
        json!({"type": "string", "format": "phone", "maxLength": 30, "deprecated": true, "x-order": 1}),
    ]
}

/// Tokens of a walk that came to its end.
fn walk(model: &Model, compiled: &grammar::Compiled, rng: &mut StdRng) -> Option<Vec<u32>> {
    let (mut matching, mut tokens) = (compiled.begin(), Vec::new());
    let mut mask = vec![0; model.engine.mask_words()];
    while tokens.len() < TOO_LONG {
        matching.write_mask(&mut mask).expect("the grammar goes on");
        let ids = allowed(&mask);
        let closing = |id: &&u32| {
            model.eos.contains(id)
                || model.engine.token_bytes(**id).first().is_some_and(|byte| b"\"}]".contains(byte))
        };
        let ends: Vec<u32> = ids.iter().filter(closing).copied().collect();
        let from = if tokens.len() > LONG && !ends.is_empty() && rng.random_bool(0.8) { &ends } else { &ids };
        let token = from[rng.random_range(..from.len())];
        tokens.push(token);
        if matching.advance(&[token]).expect("it is allowed") == Progress::Complete {
            return Some(tokens);
        }
    }
    None
}

#[test]
fn whatever_is_finished_is_valid() {
    for model in &*MODELS {
        for (index, schema) in schemas().iter().enumerate() {
            let validator = jsonschema::options()
                .should_validate_formats(true)
                .should_ignore_unknown_formats(true)
                .build(schema)
                .expect("a valid schema");
            let compiled = model.schema(schema);
            let mut finished = 0;
            for seed in 0..30 {
                let mut rng = StdRng::seed_from_u64(1000 * index as u64 + seed);
                let Some(tokens) = walk(model, &compiled, &mut rng) else { continue };
                finished += 1;
                let text = String::from_utf8(model.text(&tokens)).expect("a finished text is UTF-8");
                let value: Value = match serde_json::from_str(&text) {
                    Ok(value) => value,
                    // JSON has no largest number, and floats have one.
                    Err(error) if error.to_string().contains("number out of range") => continue,
                    Err(error) => panic!("{}: {error}: {text}", model.name),
                };
                if let Err(error) = validator.validate(&value) {
                    panic!("{}: {error}: {text} for {schema}", model.name);
                }
            }
            assert!(finished >= 10, "{}: {finished} of 30 walks ended for {schema}", model.name);
        }
    }
}

#[test]
fn whatever_is_finished_matches_the_regex() {
    for regex in ["[A-Z][a-z]{1,8}, [0-9]{1,3}", "(?:a|bc)*d", "é+ (ü|ß){2}", "^/[^/\n]{1,5}/$"] {
        let whole = validator_of(regex);
        for model in &*MODELS {
            let compiled = model.compile(grammar::Source::regex(regex)).expect("it can be enforced");
            let finished = (0..30)
                .filter_map(|seed| walk(model, &compiled, &mut StdRng::seed_from_u64(seed)))
                .inspect(|tokens| {
                    let text = String::from_utf8(model.text(tokens)).expect("a finished text is UTF-8");
                    assert!(
                        whole.is_valid(&Value::from(text.as_str())),
                        "{}: {text:?} for {regex}",
                        model.name
                    );
                })
                .count();
            assert!(finished >= 10, "{}: {finished} of 30 walks ended for {regex}", model.name);
        }
    }
}

/// What is valid is a string that matches.
fn validator_of(regex: &str) -> jsonschema::Validator {
    let anchored = format!("^(?:{})$", regex.trim_start_matches('^').trim_end_matches('$'));
    jsonschema::validator_for(&json!({"type": "string", "pattern": anchored})).expect("a valid schema")
}
