//! TGI's endpoints: forms of requests and answers.

use super::*;

#[tokio::test]
async fn generate_answers_in_tgis_form() {
    let mut events = says("ok");
    let prompt_token = Token { id: TokenId(98), logprob: -2.0, top: Vec::new() };
    events.insert(1, TokenEvent::Prompt(vec![prompt_token]));
    let fixture = with_script(Script { answers: Mutex::new([events].into()), ..Default::default() });
    let parameters = json!({"decoder_input_details": true, "top_n_tokens": 2, "return_full_text": true,
        "do_sample": true, "seed": 42, "max_new_tokens": 5});
    let response = fixture.post("/generate", &json!({"inputs": "ab", "parameters": parameters})).await;
    let headers = response.headers().clone();
    let (status, answer) = json_of(response).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["generated_text"], "abok");
    let details = &answer["details"];
    assert_eq!(details["finish_reason"], "eos_token");
    assert_eq!(details["generated_tokens"], 3);
    assert_eq!(details["seed"], 42);
    let prefill = json!([{"id": 97, "text": "a", "logprob": null}, {"id": 98, "text": "b", "logprob": -2.0}]);
    assert_eq!(details["prefill"], prefill);
    assert_eq!(details["tokens"][0], json!({"id": 111, "text": "o", "logprob": -0.25, "special": false}));
    assert_eq!(details["tokens"][2], json!({"id": 262, "text": "</s>", "logprob": -0.25, "special": true}));
    assert_eq!(details["top_tokens"][0][1]["logprob"], Value::Null);
    let header = |name: &str| headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("x-compute-type"), "cpu");
    assert_eq!(header("x-compute-characters"), "2");
    assert_eq!(header("x-prompt-tokens"), "2");
    assert_eq!(header("x-generated-tokens"), "3");
    assert_eq!(header("x-queue-time"), "3");
    for name in ["x-total-time", "x-validation-time", "x-inference-time", "x-time-per-token"] {
        assert!(header(name).parse::<u64>().is_ok(), "{name}");
    }
    assert!(header("x-compute-time").parse::<f64>().is_ok());
}

#[tokio::test]
async fn generate_without_details_is_the_text_alone() {
    let fixture = serving(&["ok", "ok"]);
    let (_, answer) = fixture.answer("/generate", &json!({"inputs": "a"})).await;
    assert_eq!(answer, json!({"generated_text": "ok"}));
    assert!(fixture.submitted().sampling.temperature > 0.0, "without parameters TGI samples");
    assert_eq!(fixture.submitted().max_new_tokens, 63);
    fixture.answer("/generate", &json!({"inputs": "a", "parameters": {}})).await;
    assert!(fixture.submitted().sampling.temperature <= 0.0, "with parameters it does not");
}

#[tokio::test]
async fn generate_stream_tells_each_token_and_the_text_at_the_end() {
    let body = json!({"inputs": "ab", "parameters": {"details": true, "top_n_tokens": 1}});
    let response = serving(&["ok"]).post("/generate_stream", &body).await;
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    assert_eq!(response.headers()["x-compute-type"], "cpu");
    let frames = frames_of(response).await;
    assert_eq!(frames.len(), 3, "{frames:?}");
    assert_eq!(frames[0]["index"], 1);
    assert_eq!(frames[0]["token"], json!({"id": 111, "text": "o", "logprob": -0.25, "special": false}));
    assert!(frames[0]["top_tokens"].is_array());
    assert_eq!((&frames[0]["generated_text"], &frames[0]["details"]), (&Value::Null, &Value::Null));
    assert_eq!(frames[2]["generated_text"], "ok");
    let details =
        json!({"finish_reason": "eos_token", "generated_tokens": 3, "seed": null, "input_length": 2});
    assert_eq!(frames[2]["details"], details);
}

#[tokio::test]
async fn the_root_answers_as_hugging_faces_inference_api() {
    let fixture = serving(&["ok", "ok", "ok"]);
    let (_, answer) = fixture.answer("/", &json!({"inputs": "ab"})).await;
    assert_eq!(answer, json!([{"generated_text": "abok"}]));
    let short = json!({"inputs": "ab", "parameters": {"return_full_text": false}, "stream": false});
    assert_eq!(fixture.answer("/", &short).await.1, json!([{"generated_text": "ok"}]));
    let frames = frames_of(fixture.post("/", &json!({"inputs": "ab", "stream": true})).await).await;
    assert_eq!(frames.last().unwrap()["generated_text"], "abok");
}

#[tokio::test]
async fn log_probabilities_have_the_same_digits_streamed_or_not() {
    let parameters = json!({"details": true});
    let events = || {
        let token = Token { id: TokenId(97), logprob: -0.1, top: Vec::new() };
        let events = vec![TokenEvent::Token { token, end: Some(EndReason::Length), at: Instant::now() }];
        with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
    };
    let body = json!({"inputs": "a", "parameters": parameters});
    for path in ["/generate", "/generate_stream"] {
        let text = text_of(events().post(path, &body).await).await;
        assert!(text.contains("\"logprob\":-0.1,"), "{text}");
    }
}

#[tokio::test]
async fn generate_answers_with_the_likeliest_of_several() {
    let answers = [says_at("longer", -0.5), says_at("ab", -0.1)];
    let fixture = with_script(Script { answers: Mutex::new(answers.into()), ..Default::default() });
    let parameters = json!({"best_of": 2, "do_sample": true, "seed": 5, "details": true});
    let (status, answer) =
        fixture.answer("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["generated_text"], "ab");
    let details = &answer["details"];
    assert_eq!((&details["seed"], &details["generated_tokens"]), (&json!(6), &json!(3)));
    let others = details["best_of_sequences"].as_array().unwrap();
    assert_eq!(others.len(), 1);
    assert_eq!((&others[0]["generated_text"], &others[0]["seed"]), (&json!("longer"), &json!(5)));
    assert_eq!(others[0]["tokens"].as_array().unwrap().len(), 7);
    assert!(others[0].get("best_of_sequences").is_none());
}

#[tokio::test]
async fn the_likeliest_is_told_alone_without_details() {
    let answers = [says_at("a", -0.5), says_at("b", f32::NAN)];
    let fixture = with_script(Script { answers: Mutex::new(answers.into()), ..Default::default() });
    let body = json!({"inputs": "x", "parameters": {"best_of": 2, "do_sample": true}});
    assert_eq!(fixture.answer("/generate", &body).await.1, json!({"generated_text": "a"}));
}
