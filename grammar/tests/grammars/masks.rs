//! A mask allows a token if and only if it can be taken up.

use grammar::{Matching, Progress, Source};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::models::{MODELS, Model, allowed};

fn mask(model: &Model, matching: &mut Matching) -> Vec<u32> {
    let mut mask = vec![0; model.engine.mask_words()];
    matching.write_mask(&mut mask).expect("the grammar goes on");
    mask
}

#[test]
fn a_token_is_allowed_where_it_can_be_taken_up_and_nowhere_else() {
    let sources = [
        Source::json_object(),
        Source::json_schema(&json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "mood": {"enum": ["glad", "sad"]},
            },
            "required": ["name", "age"],
            "additionalProperties": false,
        })),
        Source::regex(r"[a-z]{2,9}( [a-z]+)*\."),
    ];
    let mut rng = StdRng::seed_from_u64(7);
    let mut forced_states = 0;
    let mut compared = 0;
    for model in &*MODELS {
        for source in &sources {
            let compiled = model.compile(source.clone()).expect("it can be enforced");
            let mut matching = compiled.begin();
            for _ in 0..25 {
                let mask = mask(model, &mut matching);
                let ids = allowed(&mask);
                for token in 0..model.vocab_size as u32 {
                    let fits = matching.num_allowed(&[token]).expect("the grammar goes on") == 1;
                    let is_allowed = mask[token as usize / 32] >> (token % 32) & 1 == 1;
                    // Where the text is forced, its usual tokens are, too: one of those that fit.
                    let forced = ids.len() == 1 && fits && !is_allowed;
                    assert!(is_allowed == fits || forced, "{}, {source:?}: {token}, {fits}", model.name);
                    forced_states += usize::from(forced);
                    compared += 1;
                }
                let token = ids[rng.random_range(..ids.len())];
                if matching.advance(&[token]).expect("it is allowed") == Progress::Complete {
                    break;
                }
            }
        }
    }
    assert!(compared > 50_000 && forced_states < compared / 100, "{compared} pairs, {forced_states} forced");
}

#[test]
fn a_sequence_goes_on_from_its_tokens_as_if_it_had_never_stopped() {
    let model = &MODELS[0];
    let compiled = model.schema(&json!({"type": "array", "items": {"type": "string"}, "minItems": 3}));
    let separate = compiled.separate();
    let mut rng = StdRng::seed_from_u64(11);
    let (mut matching, mut tokens) = (compiled.begin(), Vec::new());
    loop {
        let here = mask(model, &mut matching);
        let mut resumed = separate.begin();
        assert_eq!(resumed.advance(&tokens).expect("they were allowed"), Progress::Open);
        assert_eq!(mask(model, &mut resumed), here, "after {tokens:?}");
        let ids = allowed(&here);
        tokens.push(ids[rng.random_range(..ids.len())]);
        let last = *tokens.last().expect("one was pushed");
        if tokens.len() == 60 || matching.advance(&[last]).expect("it is allowed") == Progress::Complete {
            return;
        }
    }
}

#[test]
fn a_text_that_nothing_can_follow_is_complete_without_an_end_token() {
    let model = &MODELS[0];
    let compiled = model.compile(Source::regex("yes|no")).expect("it can be enforced");
    let mut matching = compiled.begin();
    let mut tokens = Vec::new();
    loop {
        let ids = allowed(&mask(model, &mut matching));
        assert!(ids.iter().all(|id| !model.eos.contains(id)), "an end is allowed after {tokens:?}");
        tokens.push(ids[0]);
        if matching.advance(&[ids[0]]).expect("it is allowed") == Progress::Complete {
            break;
        }
    }
    assert!(["yes", "no"].iter().any(|text| model.text(&tokens) == text.as_bytes()), "{tokens:?}");
}

#[test]
fn a_text_that_may_go_on_is_complete_with_an_end_token_only() {
    let model = &MODELS[0];
    let compiled = model.compile(Source::regex("a*")).expect("it can be enforced");
    let mut matching = compiled.begin();
    let ids = allowed(&mask(model, &mut matching));
    assert!(model.eos.iter().all(|eos| ids.contains(eos)), "all end tokens are allowed: {ids:?}");
    let a = ids.iter().copied().find(|id| model.text(&[*id]) == b"a").expect("an a is allowed");
    assert_eq!(matching.advance(&[a]).expect("it is allowed"), Progress::Open);
    assert_eq!(matching.advance(&[model.eos[1]]).expect("it is allowed"), Progress::Complete);
}

#[test]
fn a_token_that_is_not_allowed_breaks_the_sequence_and_no_other() {
    let model = &MODELS[0];
    let compiled = model.compile(Source::regex("[0-9]+")).expect("it can be enforced");
    let (mut broken, mut other) = (compiled.begin(), compiled.begin());
    assert!(broken.advance(&[1]).is_err(), "a control token is no digit");
    assert!(broken.write_mask(&mut vec![0; model.engine.mask_words()]).is_err());
    assert!(!allowed(&mask(model, &mut other)).is_empty());
}
