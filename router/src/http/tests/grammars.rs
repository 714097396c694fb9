//! Grammars as clients send them: compiled before anything is queued, or refused.

use grammar::{GrammarId, Kind};

use super::*;

const SCHEMA: &str = r#"{"type":"object","properties":{"b":{"type":"integer"},"a":{}},"required":["b"]}"#;

fn refusing(error: GrammarError) -> Fixture {
    with_script(Script { grammars: Some(Err(error)), ..Default::default() })
}

#[tokio::test]
async fn every_endpoint_has_its_grammar_prepared_and_sends_its_id_along() {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let openai =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}});
    let requests = [
        ("/v1/chat/completions", chat(&json!({"response_format": openai}))),
        ("/v1/completions", json!({"prompt": "a", "response_format": openai})),
        ("/generate", json!({"inputs": "a", "parameters": {"grammar": {"type": "json", "value": schema}}})),
        ("/", json!({"inputs": "a", "parameters": {"grammar": {"type": "json", "value": SCHEMA}}})),
    ];
    for (path, body) in requests {
        let fixture = serving(&["{}"]);
        let (status, answer) = fixture.answer(path, &body).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        assert_eq!(fixture.submitted().grammar, Some(GrammarId(7)), "{path}");
        let prepared = fixture.script.prepared.lock().unwrap();
        // Properties are generated in the order in which they were written.
        assert_eq!((prepared[0].kind, &*prepared[0].text), (Kind::JsonSchema, SCHEMA), "{path}");
    }
    let plain = serving(&["a"]);
    plain.answer("/generate", &json!({"inputs": "a"})).await;
    assert_eq!((plain.submitted().grammar, plain.script.prepared.lock().unwrap().len()), (None, 0));
}

#[tokio::test]
async fn what_cannot_be_enforced_is_the_clients_fault_and_nothing_is_submitted() {
    let check = async |error: GrammarError, openai: StatusCode, tgi: StatusCode, part: &str| {
        let fixture = refusing(error);
        let body = chat(&json!({"response_format": {"type": "json_object"}}));
        let (status, answer) = fixture.answer("/v1/chat/completions", &body).await;
        assert_eq!(status, openai, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{answer}");
        let body = json!({"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "a"}}});
        let (status, answer) = fixture.answer("/generate", &body).await;
        assert_eq!(status, tgi, "{answer}");
        assert!(answer["error"].as_str().unwrap().contains(part), "{answer}");
        assert!(fixture.script.submitted.lock().unwrap().is_empty());
    };
    let (bad, unprocessable) = (StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY);
    let (too_many, unavailable) = (StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE);
    check(GrammarError::Invalid("`not` at /a".to_owned()), bad, unprocessable, "`not` at /a").await;
    check(GrammarError::TooComplex, bad, unprocessable, "simplify").await;
    let unsupported = GrammarError::Unsupported("no tokens".to_owned());
    check(unsupported, unprocessable, unprocessable, "no tokens").await;
    let busy = GrammarError::Busy("256 wait".to_owned());
    check(busy, too_many, too_many, "256 wait").await;
    let gone = GrammarError::Unavailable("secret".to_owned());
    check(gone, unavailable, unavailable, "not being served").await;
}

#[tokio::test]
async fn an_error_names_the_field_that_the_grammar_came_in() {
    let fixture = refusing(GrammarError::Invalid("why".to_owned()));
    let body = chat(&json!({"response_format": {"type": "json_object"}}));
    let (_, answer) = fixture.answer("/v1/chat/completions", &body).await;
    assert_eq!(answer["error"]["param"], "response_format");
    assert_eq!(answer["error"]["message"], "`response_format`: why");
}

#[tokio::test]
async fn other_servers_names_for_grammars_are_refused_and_not_ignored() {
    let names =
        ["grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"];
    for name in names {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let mut body = chat(&json!({"prompt": "a"}));
            body[name] = json!({"type": "object"});
            let (status, answer) = serving(&["a"]).answer(path, &body).await;
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{name}: {answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains("`response_format`"), "{answer}");
        }
    }
}

#[tokio::test]
async fn a_grammar_that_fails_while_it_is_followed_fails_its_request() {
    let mut events = says("{");
    events.pop();
    events.push(TokenEvent::Failed(Failure::Grammar("too many items".to_owned())));
    let answers = Mutex::new(VecDeque::from([events.clone(), events]));
    let fixture = with_script(Script { answers, ..Default::default() });
    let body = chat(&json!({"response_format": {"type": "json_object"}}));
    let (status, answer) = fixture.answer("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(answer["error"]["message"].as_str().unwrap().contains("too many items"), "{answer}");
    let body = json!({"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "a"}}});
    let (status, answer) = fixture.answer("/generate", &body).await;
    assert_eq!((status, &answer["error_type"]), (StatusCode::FAILED_DEPENDENCY, &json!("generation")));
}
