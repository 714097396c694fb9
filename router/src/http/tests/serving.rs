//! What operators see, and what becomes of a request whose client goes away.

use super::*;

#[tokio::test]
async fn probes_tell_the_life_of_the_server() {
    let fixture = starting();
    let starting = json!({"status": "starting", "reason": "the router is starting"});
    assert_eq!(fixture.get("/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, starting.clone()));
    assert_eq!(fixture.get("/startupz").await, (StatusCode::SERVICE_UNAVAILABLE, starting));
    assert_eq!(fixture.get("/livez").await.0, StatusCode::OK);
    assert_eq!(fixture.get("/health").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let (status, answer) = fixture.answer("/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("not_ready")));
    assert_eq!(fixture.get("/info").await.1["status"], "starting");

    let fixture = serving(&[]);
    assert_eq!(fixture.get("/readyz").await, (StatusCode::OK, json!({"status": "ready", "reason": null})));
    assert_eq!(fixture.get("/startupz").await.0, StatusCode::OK);
    fixture.app.set_draining();
    assert_eq!(fixture.get("/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let (status, answer) = fixture.answer("/v1/completions", &json!({"prompt": "a"})).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("shutting_down"))
    );

    let fixture =
        with_script(Script { status: Some(Status::Failed("why".to_owned())), ..Default::default() });
    let failed = json!({"status": "failed", "reason": "why"});
    assert_eq!(fixture.get("/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, failed));
}

#[tokio::test]
async fn models_and_info_tell_what_is_served() {
    let fixture = serving(&[]);
    let (_, models) = fixture.get("/v1/models").await;
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], 64);
    let (_, info) = fixture.get("/info").await;
    for (name, value) in [
        ("model_id", json!("tiny")),
        ("model_dtype", json!("bfloat16")),
        ("model_device_type", json!("cpu")),
        ("max_input_tokens", json!(60)),
        ("max_total_tokens", json!(64)),
        ("kv_cache_tokens", json!(256)),
        ("max_concurrent_requests", json!(128)),
        ("prefix_caching", json!(true)),
        ("request_timeout", Value::Null),
        ("status", json!("ready")),
    ] {
        assert_eq!(info[name], value, "{name}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_lets_go_of_its_sequence() {
    struct Told(Arc<std::sync::atomic::AtomicBool>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }
    struct Endless(Arc<std::sync::atomic::AtomicBool>);
    impl Backend for Endless {
        fn submit(&self, _: Vec<TokenRequest>) -> Result<Vec<Box<dyn TokenEvents>>, SubmitError> {
            let told = Told(Arc::clone(&self.0));
            let events = stream::unfold(told, |told| async move { Some((token(97, None), told)) });
            Ok(vec![Box::new(events.boxed())])
        }
        fn status(&self) -> Status {
            Status::Ready
        }
        fn prepare(&self, _: Source) -> BoxFuture<'static, Result<GrammarId, GrammarError>> {
            unreachable!("no request has a grammar")
        }
    }
    let dropped = Arc::default();
    let fixture = starting();
    let info = serving(&[]).app.serving_info().unwrap().clone();
    let backend = Box::new(Endless(Arc::clone(&dropped)));
    fixture.app.serve(Serving { info, validator: validator(), backend });
    let response = fixture.post("/generate_stream", &json!({"inputs": "a"})).await;
    let mut body = response.into_body();
    for _ in 0..3 {
        body.frame().await.unwrap().unwrap();
    }
    assert!(!dropped.load(std::sync::atomic::Ordering::SeqCst));
    drop(body);
    assert!(dropped.load(std::sync::atomic::Ordering::SeqCst));
}
