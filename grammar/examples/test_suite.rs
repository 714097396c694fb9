//! Holds grammars against a suite of JSON schemas with texts that are valid and texts that are not:
//! `cargo run --release -p grammar --example test_suite -- FILE [NAME]`.
//!
//! FILE has a JSON object in each line: `{"id", "schema": "<JSON>", "tests": [{"valid": bool, "text": "<JSON>"}]}`, as made from the
//! JSON-Schema-Test-Suite. A text is accepted where its bytes, one token each, are allowed to the end. NAME: only ids that hold it.
#![expect(clippy::print_stdout, reason = "a program for people")]

use std::sync::mpsc;

use grammar::{Compiled, Compiler, Engine, Error, Kind, Source};
use serde_json::Value;

/// The end of a text, behind the 256 bytes.
const END: u32 = 256;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or_else(|| anyhow::anyhow!("give the file of the suite"))?;
    let wanted = arguments.next().unwrap_or_default();
    let compiler = Compiler::start(1, || Engine::new(&byte_tokenizer(), 257, &[END]))?;
    let (mut groups, mut refused, mut right) = (0, 0, 0);
    let (mut false_accepts, mut false_rejects) = (0, 0);
    for line in std::fs::read_to_string(path)?.lines() {
        let group: Value = serde_json::from_str(line)?;
        let id = group["id"].as_str().unwrap_or_default();
        if !id.contains(&wanted) {
            continue;
        }
        groups += 1;
        let schema = group["schema"].as_str().unwrap_or_default();
        let compiled = match compile(&compiler, schema)? {
            Ok(compiled) => compiled,
            Err(error) => {
                refused += 1;
                println!("refused        {id}: {error}");
                continue;
            }
        };
        let mut all_right = true;
        for test in group["tests"].as_array().into_iter().flatten() {
            let (text, valid) = (test["text"].as_str().unwrap_or_default(), test["valid"] == true);
            let accepted = accepts(&compiled, text);
            if accepted == valid {
                continue;
            }
            all_right = false;
            if accepted {
                false_accepts += 1;
                println!("FALSE ACCEPT   {id}: {text}");
            } else {
                false_rejects += 1;
                println!("false reject   {id}: {text}");
            }
        }
        right += usize::from(all_right);
    }
    println!(
        "{groups} groups: {refused} refused, {right} all right; texts: {false_accepts} false accepts, {false_rejects} false rejects"
    );
    anyhow::ensure!(groups > 0, "no group was tested");
    Ok(())
}

fn compile(compiler: &Compiler, schema: &str) -> anyhow::Result<Result<std::sync::Arc<Compiled>, Error>> {
    let (sender, receiver) = mpsc::channel();
    let done = Box::new(move |outcome| {
        let _ = sender.send(outcome);
    });
    compiler.compile(Source { kind: Kind::JsonSchema, text: schema.into() }, done)?;
    let outcome = receiver.recv()?;
    Ok(outcome.map(|id| compiler.find(id).expect("it was compiled just now")))
}

fn accepts(compiled: &Compiled, text: &str) -> bool {
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    let mut matching = compiled.begin();
    matching.num_allowed(&tokens).is_ok_and(|allowed| allowed == tokens.len())
        && matching.advance(&tokens).is_ok()
        && matching.is_accepting().unwrap_or(false)
}

/// A token for each byte, and one that ends texts.
fn byte_tokenizer() -> String {
    let character = |byte: u8| {
        let is_byte = |code: &u32| {
            let character = char::from_u32(*code).expect("a low code");
            grammar::pieces::byte_of_char(character) == Some(byte)
        };
        (0x21..0x144).find(is_byte).and_then(char::from_u32).expect("each byte has a character")
    };
    let vocab: serde_json::Map<String, Value> =
        (0..=255).map(|byte: u8| (character(byte).to_string(), byte.into())).collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{
            "id": END, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        }],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    })
    .to_string()
}
