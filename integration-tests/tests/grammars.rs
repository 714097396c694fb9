//! Texts that are held to grammars, through the real executable: never malformed, whatever the model wants, and the same whatever
//! else the server does.

use futures::future::join_all;
use integration_tests::{Model, Stack};
use serde_json::{Value, json};

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 1, "maximum": 120},
            "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 2},
            "mood": {"enum": ["glad", "sad", null]},
        },
        "required": ["name", "age", "friends", "mood"],
        "additionalProperties": false,
        "$defs": {"friend": {
            "type": "object",
            "properties": {"id": {"type": "string", "pattern": "^[a-z]{2}-[0-9]{3}$"}, "close": {"type": "boolean"}},
            "required": ["id"],
            "additionalProperties": false,
        }},
    })
}

/// Whether a finished text is what [`schema`] describes.
fn assert_fits(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["name", "age", "friends", "mood"], "{text}");
    assert!((1..=12).contains(&value["name"].as_str().expect("a string").chars().count()), "{text}");
    assert!((1..=120).contains(&value["age"].as_u64().expect("a number")), "{text}");
    let friends = value["friends"].as_array().expect("an array");
    assert!(friends.len() <= 2, "{text}");
    for friend in friends {
        let id = friend["id"].as_str().expect("a string").as_bytes();
        let (letters, rest) = id.split_at(2);
        assert!(letters.iter().all(u8::is_ascii_lowercase), "{text}");
        assert!(rest[0] == b'-' && rest.len() == 4 && rest[1..].iter().all(u8::is_ascii_digit), "{text}");
        assert!(friend.get("close").is_none_or(Value::is_boolean), "{text}");
    }
    assert!([json!("glad"), json!("sad"), Value::Null].contains(&value["mood"]), "{text}");
}

fn chat(more: Value) -> Value {
    let mut body = json!({
        "model": "any", "messages": [{"role": "user", "content": "Tell me about a fox, as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "fox", "schema": schema(), "strict": true}},
        "temperature": 1.0, "max_tokens": 200,
    });
    let Value::Object(more) = more else { unreachable!("an object") };
    body.as_object_mut().expect("an object").extend(more);
    body
}

/// Texts that came to their end, of the choices of an answer.
fn finished(answer: &Value) -> Vec<&str> {
    let choices = answer["choices"].as_array().expect("choices").iter();
    let ended = choices.filter(|choice| choice["finish_reason"] == "stop");
    ended.map(|choice| choice["message"]["content"].as_str().expect("a text")).collect()
}

#[tokio::test]
async fn chats_give_json_of_the_schema_in_one_piece_and_streamed() {
    for (model, flags) in [(Model::Demo, &[][..]), (Model::Golden("llama"), &["--num-shard", "2"][..])] {
        let stack = Stack::start(model, flags).await;
        let mut num_finished = 0;
        for seed in 0..6 {
            let answer = stack.post("/v1/chat/completions", &chat(json!({"seed": seed, "n": 3}))).await.ok();
            for text in finished(&answer) {
                assert_fits(text);
                num_finished += 1;
            }
            let whole = stack.post("/v1/chat/completions", &chat(json!({"seed": seed}))).await.ok();
            let request = chat(json!({"seed": seed, "stream": true}));
            let events = stack.stream("/v1/chat/completions", &request).await.all().await;
            let pieces = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
            let text: String = pieces.collect();
            assert_eq!(whole["choices"][0]["message"]["content"], text, "{model:?}, seed {seed}");
            assert_eq!(whole["choices"][0]["message"]["content"], answer["choices"][0]["message"]["content"]);
        }
        assert!(num_finished >= 9, "{model:?}: {num_finished} of 18 texts came to their end");
    }
}

#[tokio::test]
async fn generate_gives_what_its_grammar_says_and_ends_with_it() {
    let stack = Stack::start(Model::Demo, &[]).await;
    let generate = async |grammar: Value, max_new_tokens: u32| {
        let parameters = json!({
            "grammar": grammar, "max_new_tokens": max_new_tokens, "details": true, "do_sample": true, "seed": 3,
        });
        let request = json!({"inputs": "Once upon a time", "parameters": parameters});
        stack.post("/generate", &request).await.ok()
    };
    let answer = generate(json!({"type": "regex", "value": "^[A-Z][a-z]{3,9}, [0-9]{2}$"}), 60).await;
    let text = answer["generated_text"].as_str().expect("a text");
    let (word, number) = text.split_once(", ").expect("a comma");
    assert!(
        (4..=10).contains(&word.len()) && word.bytes().skip(1).all(|byte| byte.is_ascii_lowercase()),
        "{text}"
    );
    assert!(number.len() == 2 && number.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
    assert_eq!(answer["details"]["finish_reason"], "eos_token");
    // Nothing can follow the second digit, so no step is spent on an end.
    assert_eq!(
        answer["details"]["tokens"].as_array().expect("tokens").last().expect("one")["special"],
        false
    );

    let answer = generate(json!({"type": "json", "value": schema()}), 400).await;
    assert_eq!(answer["details"]["finish_reason"], "eos_token");
    assert_fits(answer["generated_text"].as_str().expect("a text"));
    let cut = generate(json!({"type": "json", "value": schema()}), 5).await;
    assert_eq!(cut["details"]["finish_reason"], "length");
    assert!(
        answer["generated_text"]
            .as_str()
            .expect("a text")
            .starts_with(cut["generated_text"].as_str().expect("a text"))
    );
    let object = generate(json!({"type": "json_object"}), 300).await;
    if object["details"]["finish_reason"] == "eos_token" {
        let text = object["generated_text"].as_str().expect("a text");
        assert!(serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object()), "{text}");
    }
}

#[tokio::test]
async fn a_text_is_the_same_alone_and_in_company_preempted_or_on_two_shards() {
    let requests: Vec<Value> = (0..10)
        .map(|index| match index % 3 {
            0 => chat(json!({"seed": index, "max_tokens": 100})),
            1 => chat(json!({
                "seed": index, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": true, "max_tokens": 100,
            })),
            _ => chat(json!({"seed": index, "response_format": null, "max_tokens": 60, "ignore_eos": true})),
        })
        .collect();
    let path = "/v1/chat/completions";
    let reference = Stack::start(Model::Demo, &["--prefix-caching", "false"]).await;
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(reference.post(path, request).await.ok()["choices"].clone());
    }
    let cases: [(&str, &[&str], f64); 3] = [
        ("together", &[], -1.0),
        (
            "preempted",
            &["--max-batch-total-tokens", "256", "--max-total-tokens", "256", "--prefix-caching", "false"],
            0.0,
        ),
        (
            "two steps in flight, in chunks",
            &["--steps-in-flight", "2", "--max-batch-prefill-tokens", "7"],
            -1.0,
        ),
    ];
    for (name, flags, preemptions) in cases {
        let stack = Stack::start(Model::Demo, flags).await;
        // Several times, so that the cache is too small for those that run, however they come.
        let repeated = (0..4).flat_map(|_| &requests);
        let answers = join_all(repeated.map(|request| stack.post(path, request))).await;
        for (index, (answer, expected)) in answers.into_iter().zip(expected.iter().cycle()).enumerate() {
            assert_eq!(&answer.ok()["choices"], expected, "{name}: request {index}");
        }
        let seen = stack.metric("lamplighter_preemptions").await;
        assert!(seen > preemptions, "{name}: {seen} preemptions");
        // One for each step with masks.
        assert!(stack.metric("lamplighter_grammar_mask_duration_count").await > 20.0);
    }
    // Sums over two shards are added in another order, so this says only that both follow rank 0.
    let sharded = Stack::start(Model::Golden("llama_sharded"), &["--num-shard", "2"]).await;
    let answers = join_all(requests.iter().map(|request| sharded.post(path, request))).await;
    let answers: Vec<Value> = answers.into_iter().map(integration_tests::Answer::ok).collect();
    for (answer, request) in answers.iter().zip(&requests) {
        if !request["response_format"].is_null() {
            finished(answer).into_iter().for_each(assert_fits);
        }
        assert_eq!(sharded.post(path, request).await.ok()["choices"], answer["choices"]);
    }
}

#[tokio::test]
async fn what_cannot_be_enforced_is_refused_and_the_server_goes_on() {
    let stack = Stack::start(Model::Golden("llama"), &[]).await;
    let link = |index: usize| {
        let next = json!({"$ref": format!("#/$defs/n{}", index + 1)});
        (format!("n{index}"), json!({"type": "object", "properties": {"next": next}}))
    };
    let definitions: serde_json::Map<String, Value> = (0..3000).map(link).collect();
    let hostile = [
        (json!({"properties": {"a": {"not": {}}}}), "`not` at /properties/a"),
        (json!({"$ref": "#/$defs/n0", "$defs": definitions}), "256"),
        (json!({"multipleOf": 999_983}), "multipleOf"),
        (json!({"type": "string", "pattern": "a(?=b)"}), "look-around"),
    ];
    for (schema, part) in hostile {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let answer = stack.post("/v1/chat/completions", &chat(json!({"response_format": format}))).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
        let body = answer.body;
        assert_eq!(body["error"]["param"], "response_format");
        assert!(body["error"]["message"].as_str().is_some_and(|message| message.contains(part)), "{body}");
        let parameters = json!({"grammar": {"type": "json", "value": schema}, "max_new_tokens": 4});
        let answer = stack.post("/generate", &json!({"inputs": "a", "parameters": parameters})).await;
        assert_eq!(answer.status, 422, "{}", answer.body);
        let body = answer.body;
        assert_eq!(body["error_type"], "validation");
        assert!(body["error"].as_str().is_some_and(|message| message.contains(part)), "{body}");
    }
    let answer = stack.post("/v1/chat/completions", &chat(json!({"seed": 1}))).await.ok();
    finished(&answer).into_iter().for_each(assert_fits);
    assert!(stack.metric("lamplighter_grammar_compile_duration_count").await > 8.0);
}
