//! A sample of the JSON-Schema-Test-Suite: nothing that is not valid is accepted, and what is refused or missed is known.

use std::path::Path;
use std::str::FromStr;

use grammar::{Kind, Source};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::models::MODELS;

/// Groups whose schemas are refused, and valid texts that are not accepted: other orders of properties, 1.0 for the integer 1,
/// and the like. Fewer are welcome: lower the numbers.
const MOST_REFUSED: usize = 60;
const MOST_FALSE_REJECTS: usize = 20;

#[test]
fn no_text_that_is_not_valid_is_accepted() {
    let model = &MODELS[1];
    let tokenizer = Tokenizer::from_str(&model.tokenizer_json).expect("it was parsed before");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/json-schema-test-suite.jsonl");
    let suite = std::fs::read_to_string(path).expect("it is in the repository");
    let (mut refused, mut false_rejects, mut right) = (Vec::new(), Vec::new(), 0);
    for line in suite.lines() {
        let group: Value = serde_json::from_str(line).expect("JSON lines");
        let (id, schema) =
            (group["id"].as_str().expect("an id"), group["schema"].as_str().expect("a schema"));
        let compiled = match model.compile(Source { kind: Kind::JsonSchema, text: schema.into() }) {
            Ok(compiled) => compiled,
            Err(error) => {
                refused.push(format!("{id}: {error}"));
                continue;
            }
        };
        for test in group["tests"].as_array().expect("tests") {
            let text = test["text"].as_str().expect("a text");
            let tokens = tokenizer.encode(text, false).expect("any text is encoded").get_ids().to_vec();
            let mut matching = compiled.begin();
            let accepted = matching.num_allowed(&tokens).expect("it is a new one") == tokens.len()
                && matching.advance(&tokens).is_ok()
                && matching.is_accepting().expect("it goes on");
            match (accepted, test["valid"] == true) {
                (true, false) => panic!("{id}: {text} is accepted, and is not valid"),
                (false, true) => false_rejects.push(format!("{id}: {text}")),
                (true, true) | (false, false) => right += 1,
            }
        }
    }
    assert!(right > 300, "{right} texts were judged rightly");
    assert!(refused.len() <= MOST_REFUSED, "{}:\n{}", refused.len(), refused.join("\n"));
    assert!(
        false_rejects.len() <= MOST_FALSE_REJECTS,
        "{}:\n{}",
        false_rejects.len(),
        false_rejects.join("\n")
    );
}
