//! Where a request stands among others: priority, account, time, and the cache that it shares.

use super::*;
use crate::scheduler::{CacheNamespace, Standing};

const PATHS: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream", "/"];

/// A request to `path` with `fields` where the dialect has them.
fn body(path: &str, fields: &Value) -> Value {
    let mut body = match path {
        "/v1/chat/completions" => chat(&json!({})),
        "/v1/completions" => json!({"prompt": "a"}),
        _ => return json!({"inputs": "a", "parameters": fields}),
    };
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// A sequence that finds so many tokens of its prompt in the cache.
fn cached(cached_tokens: usize) -> Vec<TokenEvent> {
    let mut events = says("ok");
    events[0] = TokenEvent::Started { queue_time: Duration::ZERO, cached_tokens };
    events
}

fn failing(failure: &Failure, begun: bool) -> Fixture {
    let mut events = Vec::new();
    if begun {
        events = vec![TokenEvent::Started { queue_time: Duration::ZERO, cached_tokens: 0 }, token(97, None)];
    }
    events.push(TokenEvent::Failed(failure.clone()));
    with_script(Script { answers: Mutex::new([events].into()), ..Default::default() })
}

#[tokio::test]
async fn where_a_request_stands_reaches_the_scheduler() {
    let fields = json!({"priority": -7, "user": "someone", "timeout": 1.5, "cache_salt": "mine"});
    for path in PATHS {
        let fixture = serving(&["ok"]);
        assert_eq!(fixture.post(path, &body(path, &fields)).await.status(), StatusCode::OK, "{path}");
        let TokenRequest { standing, cache_namespace, .. } = fixture.submitted();
        let Standing { priority, account, timeout } = standing;
        assert_eq!((priority, timeout), (-7, Some(Duration::from_millis(1500))), "{path}");
        assert!(account.is_some_and(|account| account.starts_with("user:")), "{path}");
        assert_eq!(cache_namespace, CacheNamespace { adapter: None, salt: Some("mine".into()) }, "{path}");
    }
}

#[tokio::test]
async fn a_header_names_a_class_of_priority() {
    for path in PATHS {
        for (class, priority) in [("interactive", -100), ("default", 0), ("batch", 100)] {
            let fixture = serving(&["ok"]);
            let header = ("x-request-priority", class);
            assert_eq!(
                fixture.post_with(path, header, &body(path, &json!({}))).await.status(),
                StatusCode::OK
            );
            assert_eq!(fixture.submitted().standing.priority, priority, "{path} {class}");
        }
        let fixture = serving(&["ok"]);
        let key = ("authorization", "Bearer secret");
        fixture.post_with(path, key, &body(path, &json!({"user": "x"}))).await;
        let account = fixture.submitted().standing.account.expect("a key is an account");
        assert!(account.starts_with("key:") && !account.contains("secret"), "{path} {account}");
    }
}

#[tokio::test]
async fn priorities_that_contradict_each_other_or_are_unknown_are_refused() {
    let check = async |path: &str, class: &str, fields: Value, parts: &[&str]| {
        let header = ("x-request-priority", class);
        let response = serving(&[]).post_with(path, header, &body(path, &fields)).await;
        let (status, answer) = json_of(response).await;
        let expected =
            if path.starts_with("/v1") { StatusCode::BAD_REQUEST } else { StatusCode::UNPROCESSABLE_ENTITY };
        assert_eq!(status, expected, "{answer}");
        assert!(parts.iter().all(|part| answer.to_string().contains(part)), "{answer}");
    };
    for path in PATHS {
        check(path, "batch", json!({"priority": 1}), &["`priority` is 1", "means 100", "one of them"]).await;
        check(path, "urgent", json!({}), &["`interactive`", "`default`", "`batch`", "urgent"]).await;
        check(path, "default", json!({"priority": "high"}), &["`priority`"]).await;
        check(path, "default", json!({"priority": 5000}), &["`priority`", "1000"]).await;
        check(path, "default", json!({"timeout": 0}), &["`timeout`", "> 0", "86400"]).await;
        check(path, "default", json!({"cache_salt": ""}), &["`cache_salt`", "at least 1"]).await;
        check(path, "default", json!({"user": 7}), &["`user`"]).await;
    }
}

#[tokio::test]
async fn tgis_fields_belong_into_its_parameters() {
    for (name, value) in
        [("priority", json!(1)), ("user", json!("x")), ("timeout", json!(1)), ("cache_salt", json!("x"))]
    {
        let (status, answer) = serving(&[]).answer("/generate", &json!({"inputs": "a", name: value})).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
        let expected = format!("`{name}` belongs into `parameters`");
        assert!(answer["error"].as_str().unwrap().contains(&expected), "{answer}");
    }
}

#[tokio::test]
async fn cached_tokens_of_a_prompt_are_those_that_no_choice_computed() {
    let script = || {
        // Two choices each of two prompts; the second choice of a prompt finds what the first one computed.
        let answers = [cached(0), cached(3), cached(4), cached(4)];
        with_script(Script { answers: Mutex::new(answers.into()), ..Default::default() })
    };
    let whole = json!({"prompt": ["aaaaa", "aaaaa"], "n": 2});
    let (_, answer) = script().answer("/v1/completions", &whole).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 10);
    assert_eq!(answer["usage"]["prompt_tokens_details"], json!({"cached_tokens": 4}));
    let mut streamed = whole;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let frames = frames_of(script().post("/v1/completions", &streamed).await).await;
    let [.., usage, _] = frames.as_slice() else { panic!("too few frames: {frames:?}") };
    assert_eq!(usage["usage"], answer["usage"]);
}

#[tokio::test]
async fn time_that_is_over_is_told_with_the_limit_and_what_to_do() {
    let timeout = Duration::from_millis(2500);
    for path in PATHS {
        let expected = if path.starts_with("/v1") { "queue_timeout" } else { "overloaded" };
        let response =
            failing(&Failure::QueueTimeout { timeout }, false).post(path, &body(path, &json!({}))).await;
        assert_eq!(response.headers()["retry-after"], "5");
        let (status, answer) = json_of(response).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        let text = answer.to_string();
        assert!(
            [expected, "2500 ms", "`timeout`", "--request-timeout"].iter().all(|part| text.contains(part)),
            "{text}"
        );
    }
    for path in ["/v1/chat/completions", "/v1/completions", "/generate", "/"] {
        let response = failing(&Failure::Timeout { timeout }, true).post(path, &body(path, &json!({}))).await;
        let (status, answer) = json_of(response).await;
        assert_eq!(status, StatusCode::GATEWAY_TIMEOUT, "{path}");
        let text = answer.to_string();
        assert!(["timeout", "2500 ms", "--request-timeout"].iter().all(|part| text.contains(part)), "{text}");
    }
}

#[tokio::test]
async fn time_that_is_over_while_streaming_is_the_last_frame() {
    let failure = Failure::Timeout { timeout: Duration::from_secs(1) };
    let body = chat(&json!({"stream": true}));
    let frames = frames_of(failing(&failure, true).post("/v1/chat/completions", &body).await).await;
    assert_eq!(frames.last().unwrap()["error"]["code"], "timeout");
    let frames =
        frames_of(failing(&failure, true).post("/generate_stream", &json!({"inputs": "a"})).await).await;
    assert_eq!(frames.last().unwrap()["error_type"], "timeout");
}

#[tokio::test]
async fn what_is_there_goes_out_in_one_write() {
    let response = serving(&["abc"]).post("/v1/chat/completions", &chat(&json!({"stream": true}))).await;
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    let text = std::str::from_utf8(&first).unwrap();
    assert!(text.contains(r#""content":"a""#) && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(body.frame().await.is_none());
}
