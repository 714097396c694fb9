//! Adapters by name.

use super::*;

const TEXTS: &str = "/v1/completions";
const CHATS: &str = "/v1/chat/completions";

fn fixture(num_answers: usize) -> Fixture {
    let answers = (0..num_answers).map(|_| says("ok")).collect();
    with_adapters(Script { answers: Mutex::new(answers), ..Default::default() }, &["tone", "form"])
}

/// The adapter of the last request, as shards and prefix cache are told it.
fn adapter(fixture: &Fixture) -> Option<u32> {
    fixture.submitted().cache_namespace.adapter.map(|adapter| adapter.0)
}

#[tokio::test]
async fn an_adapter_is_chosen_by_model_or_adapter_id_and_answers_carry_its_name() {
    let fixture = fixture(8);
    let text = |more: Value| {
        let mut body = json!({"prompt": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let cases = [
        (TEXTS, text(json!({"model": "form"})), Some(1), "form"),
        (TEXTS, text(json!({"model": "tiny"})), None, "tiny"),
        (TEXTS, text(json!({"model": "tgi", "adapter_id": "tone"})), Some(0), "tone"),
        (CHATS, chat(&json!({"model": "tone"})), Some(0), "tone"),
        (CHATS, chat(&json!({})), None, "tiny"),
    ];
    for (path, body, expected, name) in cases {
        let (status, answer) = fixture.answer(path, &body).await;
        assert_eq!((status, &answer["model"]), (StatusCode::OK, &json!(name)), "{answer}");
        assert_eq!(adapter(&fixture), expected, "{body}");
    }
    let frames = frames_of(fixture.post(CHATS, &chat(&json!({"model": "form", "stream": true}))).await).await;
    assert_eq!(frames[0]["model"], "form");
    for (parameters, expected) in [(json!({"adapter_id": "form"}), Some(1)), (json!({}), None)] {
        let body = json!({"inputs": "a", "parameters": parameters});
        let (status, answer) = fixture.answer("/generate", &body).await;
        assert_eq!((status, adapter(&fixture)), (StatusCode::OK, expected), "{answer}");
    }
}

#[tokio::test]
async fn a_name_that_there_is_not_is_refused_with_those_there_are() {
    let fixture = fixture(0);
    let (status, answer) = fixture.answer(CHATS, &chat(&json!({"model": "gpt"}))).await;
    let error = &answer["error"];
    assert_eq!((status, &error["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
    assert_eq!(error["param"], "model");
    let message = error["message"].as_str().unwrap();
    assert!(["\"gpt\"", "\"tiny\"", "tone, form"].iter().all(|part| message.contains(part)), "{message}");

    let (status, answer) = fixture.answer(TEXTS, &json!({"prompt": "a", "adapter_id": "gpt"})).await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("adapter_id")));
    let body = json!({"inputs": "a", "parameters": {"adapter_id": "gpt"}});
    let (status, answer) = fixture.answer("/generate", &body).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let message = answer["error"].as_str().unwrap();
    assert!(message.contains("there is no adapter \"gpt\": the adapters are tone, form"), "{message}");
}

#[tokio::test]
async fn adapters_are_listed_behind_their_model() {
    let (_, models) = fixture(0).get("/v1/models").await;
    let listed: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(listed, ["tiny", "tone", "form"]);
    assert_eq!((&models["data"][0]["parent"], &models["data"][2]["parent"]), (&Value::Null, &json!("tiny")));
}
