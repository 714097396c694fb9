//! OpenAI's endpoints: forms of requests and answers.

use super::*;

#[tokio::test]
async fn a_chat_is_answered_in_openais_form() {
    let fixture = serving(&["Hello"]);
    let (status, body) = fixture.answer("/v1/chat/completions", &chat(&json!({"model": "any"}))).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["model"], "tiny");
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(body["choices"][0]["message"], json!({"role": "assistant", "content": "Hello"}));
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["logprobs"], Value::Null);
    let prompt_tokens = fixture.submitted().prompt.len();
    let usage = json!({
        "prompt_tokens": prompt_tokens, "completion_tokens": 6, "total_tokens": prompt_tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    });
    assert_eq!(body["usage"], usage);
}

#[tokio::test]
async fn a_streamed_chat_has_the_text_of_the_other_one() {
    let answer = "Zwei <b> 你好\"\\\n\u{1}";
    let request = chat(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let frames = frames_of(serving(&[answer]).post("/v1/chat/completions", &request).await).await;
    assert_eq!(frames[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String =
        frames.iter().filter_map(|frame| frame["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, answer);
    let [.., last, usage, done] = frames.as_slice() else { panic!("too few frames: {frames:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["usage"], Value::Null);
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], answer.len() + 1);
    assert_eq!(*done, json!("[DONE]"));
    let (_, whole) = serving(&[answer]).answer("/v1/chat/completions", &chat(&json!({}))).await;
    assert_eq!(whole["choices"][0]["message"]["content"], text);
}

#[tokio::test]
async fn explicit_nulls_are_absent_fields() {
    let body = chat(&json!({
        "model": null, "max_tokens": null, "max_completion_tokens": null, "temperature": null, "top_p": null, "n": null,
        "stop": null, "stream": null, "stream_options": null, "seed": null, "frequency_penalty": null,
        "presence_penalty": null, "logit_bias": null, "logprobs": null, "top_logprobs": null, "top_k": null,
        "min_p": null, "typical_p": null, "repetition_penalty": null, "ignore_eos": null, "tools": null,
        "tool_choice": null, "response_format": null, "user": null, "grammar": null, "priority": null,
        "timeout": null, "cache_salt": null, "functions": null, "unknown": null,
    }));
    let (status, body) = serving(&["ok"]).answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let parameters = json!({
        "best_of": null, "temperature": null, "repetition_penalty": null, "frequency_penalty": null, "top_k": null,
        "top_p": null, "typical_p": null, "do_sample": null, "max_new_tokens": null, "return_full_text": null,
        "stop": null, "truncate": null, "watermark": null, "details": null, "decoder_input_details": null,
        "seed": null, "top_n_tokens": null, "grammar": null, "adapter_id": null, "priority": null, "user": null,
        "timeout": null, "cache_salt": null,
    });
    for body in [json!({"inputs": "a", "parameters": parameters}), json!({"inputs": "a", "parameters": null})]
    {
        let (status, answer) = serving(&["ok"]).answer("/generate", &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
}

#[tokio::test]
async fn fields_reach_the_scheduler() {
    let fixture = serving(&["ok", "ok"]);
    let body = chat(&json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "typical_p": 0.8, "seed": -1, "n": 2,
        "repetition_penalty": 1.5, "frequency_penalty": -1.0, "presence_penalty": 0.5, "max_completion_tokens": 9,
        "ignore_eos": true, "logprobs": true, "top_logprobs": 2, "logit_bias": {"97": -100},
    }));
    let (status, answer) = fixture.answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    let request = fixture.submitted();
    let expected = Sampling {
        temperature: 0.5,
        top_k: 7,
        top_p: 0.9,
        min_p: 0.1,
        typical_p: 0.8,
        // The second choice's: one more than was asked for.
        seed: 0,
        repetition_penalty: 1.5,
        frequency_penalty: -1.0,
        presence_penalty: 0.5,
        logit_bias: vec![(TokenId(97), -100.0)],
    };
    assert_eq!(request.sampling, expected);
    assert_eq!((request.max_new_tokens, request.ignore_eos, request.top_n_tokens), (9, true, 2));
}

#[tokio::test]
async fn chat_logprobs_have_text_bytes_and_finite_numbers() {
    let body = chat(&json!({"logprobs": true, "top_logprobs": 2}));
    let (_, answer) = serving(&["é"]).answer("/v1/chat/completions", &body).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 2, "one for each byte, none for the end: {content:?}");
    assert_eq!(content[0]["bytes"], json!([0xc3]));
    assert_eq!(content[1]["bytes"], json!([0xa9]));
    assert_eq!(content[0]["logprob"], json!(-0.25));
    assert_eq!(content[0]["top_logprobs"][1], json!({"token": "z", "logprob": -9999.0, "bytes": [122]}));
    let frames = frames_of(
        serving(&["é"]).post("/v1/chat/completions", &chat(&json!({"logprobs": true, "stream": true}))).await,
    )
    .await;
    let reported =
        frames.iter().filter(|frame| frame["choices"][0]["logprobs"]["content"].is_array()).count();
    assert_eq!(reported, 2);
}

#[tokio::test]
async fn stop_strings_are_cut_in_openais_answers_and_kept_in_tgis() {
    let (_, answer) =
        serving(&["one<end>two"]).answer("/v1/chat/completions", &chat(&json!({"stop": "<end>"}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "one");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let body = json!({"inputs": "a", "parameters": {"stop": ["<end>"], "details": true}});
    let (_, answer) = serving(&["one<end>two"]).answer("/generate", &body).await;
    assert_eq!(answer["generated_text"], "one<end>");
    assert_eq!(answer["details"]["finish_reason"], "stop_sequence");
}

#[tokio::test]
async fn messages_may_have_parts_and_earlier_tool_calls() {
    let fixture = serving(&["ok", "ok"]);
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "e"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "0", "type": "function",
            "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "content": "5", "tool_call_id": "0"},
    ]);
    let (status, answer) = fixture.answer("/v1/chat/completions", &json!({"messages": messages})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let messages = json!([messages[0]]);
    let (status, answer) = fixture.answer("/v1/chat/completions", &json!({"messages": messages})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(fixture.submitted().prompt.contains(&TokenId(257)), "the parts are one text");
}

#[tokio::test]
async fn completions_take_texts_and_ids_and_answer_in_order() {
    let fixture = serving(&["one", "two"]);
    let body = json!({"prompt": ["a", "b"], "logprobs": 1});
    let (status, answer) = fixture.answer("/v1/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["object"], "text_completion");
    let texts: Vec<_> =
        answer["choices"].as_array().unwrap().iter().map(|c| (&c["index"], &c["text"])).collect();
    assert_eq!(texts, [(&json!(0), &json!("one")), (&json!(1), &json!("two"))]);
    let logprobs = &answer["choices"][1]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["t", "w", "o"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!(logprobs["top_logprobs"][0]["t"], json!(-0.25));
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    assert_eq!(fixture.submitted().max_new_tokens, 16);
    for (prompt, choices) in [(json!([97, 98]), 1), (json!([[97], [98, 99]]), 2), (json!("text"), 1)] {
        let (status, answer) =
            serving(&["x", "y"]).answer("/v1/completions", &json!({"prompt": prompt})).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer["choices"].as_array().unwrap().len(), choices);
    }
}

#[tokio::test]
async fn streamed_completions_interleave_choices_by_index() {
    let body = json!({"prompt": "a", "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let frames = frames_of(serving(&["one", "two"]).post("/v1/completions", &body).await).await;
    for (index, expected) in [(0, "one"), (1, "two")] {
        let of_choice = || frames.iter().filter(|frame| frame["choices"][0]["index"] == index);
        let text: String = of_choice().filter_map(|frame| frame["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, expected);
        assert_eq!(of_choice().filter(|frame| frame["choices"][0]["finish_reason"] == "stop").count(), 1);
    }
    assert_eq!(frames[frames.len() - 2]["usage"]["completion_tokens"], 8);
    assert_eq!(frames[frames.len() - 1], json!("[DONE]"));
}

#[tokio::test]
async fn values_that_ask_for_nothing_are_accepted() {
    let body = chat(&json!({
        "response_format": {"type": "text"}, "tool_choice": "none", "tools": [{"type": "function"}], "best_of": 1,
        "user": "x", "store": false, "metadata": {}, "parallel_tool_calls": true, "service_tier": "auto",
        "min_tokens": 0, "something_new": [1],
    }));
    let (status, answer) = serving(&["ok"]).answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let body = json!({"inputs": "a", "parameters": {"watermark": false, "best_of": 1, "top_p": 1.0}});
    let (status, answer) = serving(&["ok"]).answer("/generate", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn completions_keep_the_likeliest_of_each_prompt_and_count_all() {
    let answers = [("a", -2.0), ("bb", -1.0), ("ccc", -1.0), ("d", -3.0)];
    let answers = answers.map(|(text, logprob)| says_at(text, logprob));
    let fixture = with_script(Script { answers: Mutex::new(answers.into()), ..Default::default() });
    let body = json!({"prompt": ["x", "y"], "best_of": 2, "max_tokens": 9});
    let (status, answer) = fixture.answer("/v1/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["bb", "ccc"]);
    assert_eq!(answer["choices"][1]["index"], 1);
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    assert_eq!(answer["usage"]["completion_tokens"], 2 + 3 + 4 + 2);
}
