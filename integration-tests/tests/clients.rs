//! Clients that other people wrote, unmodified, against the real server.

use integration_tests::{LoneShard, Model, Stack, golden, python};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn the_openai_client_chats_and_completes() {
    let stack = Stack::start(Model::Demo, &[]).await;
    python::run("openai_client.py", &[stack.url()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hugging_face_client_chats_and_generates() {
    let stack = Stack::start(Model::Demo, &[]).await;
    python::run("huggingface_client.py", &[stack.url()]);
}

#[test]
fn a_grpc_client_drives_a_shard_through_reflection() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("shard-0");
    let _shard = LoneShard::start("llama", &socket, &[]);
    let prompt = &golden("llama")["prompts"][0];
    let numbers = |value: &Value| -> Vec<u64> {
        value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect()
    };
    let ids = numbers(&prompt["token_ids"]).iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let expected = numbers(&prompt["greedy"]);
    let address = format!("unix:{}", socket.display());
    let count = expected.len().to_string();
    let report = python::run("drive_shard.py", &[&address, "--ids", &ids, "--tokens", &count]);
    let report: Value = serde_json::from_str(&report).expect("a JSON object");
    let tokens: Vec<u64> = report["tokens"]
        .as_array()
        .expect("tokens")
        .iter()
        .map(|token| token["token_id"].as_u64().expect("an id"))
        .collect();
    assert_eq!(tokens, expected);
    assert_eq!(report["finish_reason"], "FINISH_REASON_LENGTH");
    let services = report["services"].to_string();
    for service in ["lamplighter.shard.v1.Shard", "grpc.health.v1.Health"] {
        assert!(services.contains(service), "{services}");
    }
}
