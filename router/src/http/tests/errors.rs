//! What goes wrong, with its status, in the form of the API.

use super::*;

#[tokio::test]
async fn errors_have_their_status_and_the_apis_form() {
    let check = async |path: &str, body: &Value, status: StatusCode, part: &str| {
        let (given, answer) = serving(&[]).answer(path, body).await;
        assert_eq!(given, status, "{path} {body}: {answer}");
        let (message, kind) = if path.starts_with("/v1/") {
            (&answer["error"]["message"], &answer["error"]["type"])
        } else {
            (&answer["error"], &answer["error_type"])
        };
        assert!(message.as_str().unwrap().contains(part), "{part:?} is not in {answer}");
        assert!(kind.is_string());
    };
    let (bad, unprocessable) = (StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY);
    let chats = "/v1/chat/completions";
    check(chats, &json!({}), bad, "`messages`").await;
    check(chats, &json!({"messages": []}), bad, "empty").await;
    check(chats, &json!({"messages": [{"content": "x"}]}), bad, "`role`").await;
    check(chats, &json!({"messages": [{"role": "user"}]}), bad, "`content`").await;
    let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]});
    check(chats, &image, unprocessable, "`text`").await;
    check(chats, &chat(&json!({"top_p": 2})), bad, "`top_p` must be > 0.0 and <= 1.0. Given: 2").await;
    check(chats, &chat(&json!({"temperature": "hot"})), bad, "`temperature`").await;
    check(chats, &chat(&json!({"top_logprobs": 2})), bad, "`logprobs`").await;
    check(chats, &chat(&json!({"max_tokens": 1000})), bad, "1000").await;
    check(chats, &chat(&json!({"stream_options": {}})), bad, "`stream_options`").await;
    check(chats, &chat(&json!({"logit_bias": {"x": 1}})), bad, "`logit_bias`").await;
    check(chats, &chat(&json!({"response_format": {"type": "xml"}})), bad, "`response_format`").await;
    check(chats, &chat(&json!({"tool_choice": "required"})), unprocessable, "`tool_choice`").await;
    check(chats, &chat(&json!({"grammar": {}})), unprocessable, "`grammar`").await;
    check(chats, &chat(&json!({"best_of": 2})), unprocessable, "`best_of`").await;
    let texts = "/v1/completions";
    check(texts, &json!({"prompt": ["a", "a", "a", "a", "a"]}), bad, "batch size of 4").await;
    check(texts, &json!({"prompt": []}), bad, "empty").await;
    check(texts, &json!({"prompt": {"a": 1}}), bad, "`prompt`").await;
    check(texts, &json!({"prompt": [1, "a"]}), bad, "`prompt`").await;
    check(texts, &json!({"prompt": [-1]}), bad, "`prompt`").await;
    check(texts, &json!({"prompt": [100_000]}), bad, "vocabulary").await;
    check(texts, &json!({"prompt": "a", "logprobs": 6}), bad, "`logprobs`").await;
    check(texts, &json!({"prompt": "a", "suffix": "b"}), unprocessable, "`suffix`").await;
    check(texts, &json!({"prompt": "a", "echo": true}), unprocessable, "`echo`").await;
    for path in ["/generate", "/generate_stream"] {
        let with = |parameters: Value| json!({"inputs": "a", "parameters": parameters});
        check(path, &json!({}), unprocessable, "Input validation error: missing field `inputs`").await;
        check(
            path,
            &json!({"inputs": ""}),
            unprocessable,
            "Input validation error: `inputs` cannot be empty",
        )
        .await;
        check(
            path,
            &with(json!({"temperature": 0})),
            unprocessable,
            "`temperature` must be strictly positive",
        )
        .await;
        check(path, &with(json!({"top_k": 0})), unprocessable, "`top_k` must be strictly positive").await;
        check(path, &with(json!({"grammar": {"type": "json"}})), unprocessable, "`grammar`").await;
        check(path, &with(json!({"adapter_id": "x"})), unprocessable, "`adapter_id`").await;
        check(path, &with(json!({"watermark": true})), unprocessable, "`watermark`").await;
        check(path, &with(json!({"best_of": 3})), unprocessable, "`best_of`").await;
    }
    let twice = json!({"inputs": "a", "parameters": {"best_of": 2, "do_sample": true}});
    check("/generate_stream", &twice, unprocessable, "not supported when streaming").await;
    let greedy = json!({"inputs": "a", "parameters": {"best_of": 2}});
    check("/generate", &greedy, unprocessable, "you must use sampling when `best_of` is > 1").await;
    check(texts, &json!({"prompt": "a", "best_of": 2, "stream": true}), bad, "cannot be streamed").await;
    check(texts, &json!({"prompt": "a", "best_of": 1, "n": 2}), bad, "`best_of` must be >= `n`").await;
    check(texts, &json!({"prompt": "a", "best_of": 9}), bad, "--max-best-of").await;
    let prefill = json!({"inputs": "a", "parameters": {"decoder_input_details": true}});
    check("/generate_stream", &prefill, unprocessable, "`decoder_input_details`").await;
}

#[tokio::test]
async fn bodies_are_checked_before_they_are_read() {
    let fixture = serving(&[]);
    let plain = Request::post("/generate").body(Body::from("{}")).unwrap();
    assert_eq!(json_of(fixture.send(plain).await).await.0, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let (status, answer) = json_of(fixture.post_bytes("/v1/completions", "{\"prompt\":").await).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::BAD_REQUEST, &json!("malformed_json")));
    let long = " ".repeat(2_000_001);
    let (status, answer) = json_of(fixture.post_bytes("/v1/completions", long.clone()).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
    let chunks = stream::iter([Ok::<_, std::io::Error>(long)]);
    let (status, _) = json_of(fixture.post_bytes("/generate", Body::from_stream(chunks)).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "without a content length");
}

#[tokio::test]
async fn unknown_paths_and_methods_are_answered_in_json() {
    let fixture = serving(&[]);
    let (status, answer) = fixture.get("/v1/nothing").await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let (status, answer) = fixture.get("/nothing").await;
    assert_eq!((status, &answer["error_type"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let (status, answer) = fixture.get("/generate").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{answer}");
}

#[tokio::test]
async fn overload_and_drain_are_told_with_when_to_try_again() {
    let check = async |refusal: SubmitError, status: StatusCode, seconds: &str| {
        let fixture = with_script(Script { refusal: Some(refusal), ..Default::default() });
        for path in ["/v1/completions", "/generate", "/generate_stream"] {
            let response = fixture.post(path, &json!({"prompt": "a", "inputs": "a"})).await;
            assert_eq!(response.status(), status, "{path}");
            assert_eq!(response.headers()["retry-after"], seconds);
            json_of(response).await;
        }
    };
    check(SubmitError::Overloaded { limit: 8 }, StatusCode::TOO_MANY_REQUESTS, "1").await;
    check(SubmitError::Draining, StatusCode::SERVICE_UNAVAILABLE, "5").await;
    check(SubmitError::Unavailable, StatusCode::SERVICE_UNAVAILABLE, "5").await;
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_its_status() {
    let failing = |failure: Failure| {
        let events = vec![
            TokenEvent::Started { queue_time: Duration::ZERO, cached_tokens: 0 },
            TokenEvent::Failed(failure),
        ];
        with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
    };
    let check = async |path: &str, status: StatusCode| {
        let body = json!({"prompt": "a", "inputs": "a", "stream": true});
        let (given, answer) = failing(Failure::Shards("gone".to_owned())).answer(path, &body).await;
        assert_eq!(given, status, "{answer}");
    };
    check("/generate", StatusCode::FAILED_DEPENDENCY).await;
    check("/generate_stream", StatusCode::FAILED_DEPENDENCY).await;
    check("/v1/completions", StatusCode::INTERNAL_SERVER_ERROR).await;
    for path in ["/generate", "/generate_stream", "/v1/completions"] {
        let body = json!({"prompt": "a", "inputs": "a", "stream": true});
        let response = failing(Failure::OutOfMemory).post(path, &body).await;
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()["retry-after"], "5");
        let (_, answer) = json_of(response).await;
        let kind = if path == "/v1/completions" { &answer["error"]["code"] } else { &answer["error_type"] };
        assert!(kind == "out_of_memory" || kind == "overloaded", "{answer}");
        assert!(answer.to_string().contains("--max-batch-prefill-tokens"), "{answer}");
    }
    let (status, _) = failing(Failure::ShuttingDown).answer("/generate", &json!({"inputs": "a"})).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_failure_behind_the_first_token_is_the_last_frame() {
    let failing = || {
        let events = vec![token(97, None), TokenEvent::Failed(Failure::Shards("gone".to_owned()))];
        with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
    };
    let frames = frames_of(failing().post("/generate_stream", &json!({"inputs": "a"})).await).await;
    assert_eq!(frames.last().unwrap()["error_type"], "generation");
    let body = chat(&json!({"stream": true}));
    let frames = frames_of(failing().post("/v1/chat/completions", &body).await).await;
    assert_eq!(frames.last().unwrap()["error"]["code"], "generation_failed");
}
