//! Tokens are the bytes that the tokenizer's own decoder makes of them.

use std::str::FromStr;

use grammar::{Engine, Error};
use tokenizers::Tokenizer;

use crate::models::MODELS;

#[test]
fn a_tokens_bytes_are_those_that_decoding_gives() {
    for model in &*MODELS {
        let tokenizer = Tokenizer::from_str(&model.tokenizer_json).expect("it was parsed before");
        let added = tokenizer.get_added_tokens_decoder();
        // Behind one that is decoded alike whatever follows, as a text's first space may be dropped.
        let before = tokenizer.token_to_id("a").expect("there is an a");
        let mut compared = 0;
        for id in 0..model.vocab_size as u32 {
            let bytes = model.engine.token_bytes(id);
            match (tokenizer.id_to_token(id), added.get(&id)) {
                (None, _) => assert!(bytes.is_empty(), "{}: {id} is no token", model.name),
                (Some(_), Some(token)) if token.special => {
                    assert_eq!(bytes.first(), Some(&0xff), "{}: {id} is a control token", model.name);
                }
                (Some(piece), _) => {
                    let decoded = tokenizer.decode(&[before, id], false).expect("tokens are decoded");
                    let decoded = decoded.strip_prefix('a').expect("the first token is an a");
                    if decoded.contains('\u{fffd}') {
                        // A part of a character: no text by itself.
                        assert!(std::str::from_utf8(bytes).is_err(), "{}: {id} {piece:?}", model.name);
                    } else {
                        assert_eq!(bytes, decoded.as_bytes(), "{}: {id} {piece:?}", model.name);
                        compared += 1;
                    }
                }
            }
        }
        assert!(compared > 150, "{}: {compared} tokens were compared", model.name);
    }
}

#[test]
fn bytes_of_any_text_are_put_together_by_its_tokens() {
    for model in &*MODELS {
        let tokenizer = Tokenizer::from_str(&model.tokenizer_json).expect("it was parsed before");
        for text in ["{\"é\": \"東京 🦊\"}", "plain words, and  two spaces", "\t\r\n\u{0}\u{7f}"] {
            let ids = tokenizer.encode(text, false).expect("any text is encoded").get_ids().to_vec();
            let bytes = model.text(&ids);
            // Llama 2's puts a space before a text.
            let bytes = bytes.strip_prefix(b" ").filter(|_| model.name == "byte fallback").unwrap_or(&bytes);
            assert_eq!(bytes, text.as_bytes(), "{}", model.name);
        }
    }
}

#[test]
fn a_tokenizer_whose_tokens_are_not_known_as_bytes_is_refused() {
    let json = MODELS[1].tokenizer_json.replace(
        r#""decoder":{"type":"ByteLevel""#,
        r#""decoder":{"type":"WordPiece","prefix":"x","cleanup":false,"unused":{"type":"x""#,
    );
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap_or_default();
    if json.is_null() {
        json = serde_json::from_str(&MODELS[1].tokenizer_json).expect("it is JSON");
    }
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": false});
    let error = Engine::new(&json.to_string(), 384, &[2]).err().expect("it is refused");
    assert!(matches!(&error, Error::Model(message) if message.contains("WordPiece")), "{error}");
}
