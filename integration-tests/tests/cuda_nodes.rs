//! A model that is split over two hosts, each played by a launcher on this one, with a GPU each (or the emulated driver:
//! `make test-cuda`).

use std::net::TcpListener;
use std::time::Duration;

use integration_tests::{Model, Node, Stack, golden};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const EXIT_TIMEOUT: Duration = Duration::from_mins(1);

const MODEL: Model = Model::Golden("llama");

/// Two launchers that have met.
struct Hosts {
    first: Stack,
    second: Node,
}

/// Two ports, one behind the other, that are free as far as one can know.
fn free_ports() -> u16 {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// Whether there is one GPU only: NCCL refuses two ranks on it. The emulated driver does not show its devices there, and has
/// one for each process.
fn has_one_gpu() -> bool {
    num_real_gpus() == Some(1)
}

fn num_real_gpus() -> Option<usize> {
    Some(std::fs::read_dir("/proc/driver/nvidia/gpus").ok()?.count())
}

impl Hosts {
    /// The second host is told where it is as a `LeaderWorkerSet` tells it.
    async fn start() -> Self {
        let (master_port, shard_port) = (free_ports().to_string(), free_ports().to_string());
        let common = [
            ["--device", "cuda"],
            ["--dtype", "float32"],
            ["--num-shard", "2"],
            ["--master-port", &master_port],
            ["--max-batch-prefill-tokens", "64"],
            ["--max-batch-size", "4"],
            ["--max-total-tokens", "512"],
        ];
        let common = common.concat();
        let mut variables =
            vec![("LWS_GROUP_SIZE", "2"), ("LWS_WORKER_INDEX", "1"), ("LWS_LEADER_ADDRESS", "127.0.0.1")];
        if num_real_gpus().is_some() {
            variables.push(("CUDA_VISIBLE_DEVICES", "1"));
        }
        let second = Node::start(MODEL, &[&common[..], &["--shard-port", &shard_port]].concat(), &variables);
        let first =
            Stack::start(MODEL, &[&common[..], &["--num-nodes", "2", "--node-rank", "0"]].concat()).await;
        Self { first, second }
    }
}

fn ask(prompt: &Value, max_new_tokens: usize) -> Value {
    let parameters = json!({"max_new_tokens": max_new_tokens, "details": true, "ignore_eos": true});
    json!({"inputs": prompt["text"], "parameters": parameters})
}

#[tokio::test]
async fn two_hosts_give_the_tokens_of_one_and_end_together() {
    if has_one_gpu() {
        return;
    }
    let Hosts { mut first, mut second } = Hosts::start().await;
    let golden = golden("llama");
    for prompt in golden["prompts"].as_array().expect("prompts") {
        let greedy = prompt["greedy"].as_array().expect("ids");
        let answer = first.post("/generate", &ask(prompt, greedy.len())).await.ok();
        let tokens = answer["details"]["tokens"].as_array().expect("tokens");
        let ids: Vec<_> = tokens.iter().map(|token| token["id"].clone()).collect();
        assert_eq!(ids, greedy[..ids.len()], "{}\n{}", first.log(), second.log());
        assert!(!ids.is_empty());
    }
    let serves = "node 1 of 2 serves, with shards 1 to 1 of 2; requests go to node 0 at 127.0.0.1";
    assert!(second.log().contains(serves), "{}", second.log());

    first.signal(Signal::SIGTERM);
    assert!(first.exit(EXIT_TIMEOUT).await.success(), "{}", first.log());
    assert!(second.exit(EXIT_TIMEOUT).await.success(), "{}", second.log());
}

#[tokio::test]
async fn a_host_that_is_asked_to_end_lets_running_requests_finish() {
    if has_one_gpu() {
        return;
    }
    let Hosts { mut first, mut second } = Hosts::start().await;
    let body = json!({"prompt": "the quick", "max_tokens": 200, "ignore_eos": true, "stream": true});
    let mut stream = first.stream("/v1/completions", &body).await;
    stream.next_json().await.expect("a first event");
    second.signal(Signal::SIGTERM);
    let mut num_events = 1;
    while let Some(event) = stream.next_json().await {
        assert!(event.get("error").is_none(), "{event}");
        num_events += 1;
    }
    assert!(num_events > 100, "{num_events} events");
    assert!(first.exit(EXIT_TIMEOUT).await.success(), "{}", first.log());
    assert!(second.exit(EXIT_TIMEOUT).await.success(), "{}", second.log());
    assert!(first.log().contains("node 1 at 127.0.0.1 was asked to end"), "{}", first.log());
}

#[tokio::test]
async fn a_killed_host_ends_the_other_with_an_error_that_names_it() {
    if has_one_gpu() {
        return;
    }
    let Hosts { mut first, second } = Hosts::start().await;
    second.signal(Signal::SIGKILL);
    assert!(!first.exit(EXIT_TIMEOUT).await.success());
    assert!(first.log().contains("node 1 at 127.0.0.1 is gone: see its log"), "{}", first.log());

    let Hosts { first, mut second } = Hosts::start().await;
    first.signal(Signal::SIGKILL);
    assert!(!second.exit(EXIT_TIMEOUT).await.success());
    assert!(second.log().contains("node 0 at 127.0.0.1 is gone: see its log"), "{}", second.log());
}
