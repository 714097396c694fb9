//! What grammars cost a server: tokens per second with and without one, and how long masks take. `make bench-grammar`.
#![expect(clippy::print_stdout, reason = "a program for people")]

use std::time::Instant;

use futures::future::join_all;
use integration_tests::{Model, Stack};
use serde_json::{Value, json};

/// Of each request. A grammar that is used for the first time computes slower masks, so each measurement has one before it.
const TOKENS: u64 = 200;
const ROUNDS: usize = 3;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(measure());
    Ok(())
}

/// Grammars that last for all tokens.
fn formats() -> Vec<(&'static str, Value)> {
    let object = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mood": {"enum": ["glad", "sad", "so-so"]},
            "notes": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        },
        "required": ["name", "age", "mood", "notes"],
        "additionalProperties": false,
    });
    let of =
        |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "bench", "schema": schema}});
    vec![
        ("none", json!(null)),
        ("objects of a schema", of(json!({"type": "array", "items": object, "minItems": 1000}))),
        ("any JSON", of(json!({"type": "array", "minItems": 1000}))),
        ("digits", json!({"type": "regex", "value": "[0-9]{1000}"})),
    ]
}

async fn measure() {
    println!(
        "{:>5}  {:<20} {:>9} {:>9} {:>10} {:>14}",
        "batch", "grammar", "tokens/s", "of none", "mask us", "step waits us"
    );
    for batch in [1, 8] {
        let mut free = None;
        for (name, format) in formats() {
            let stack = Stack::start(Model::Demo, &[]).await;
            run(&stack, batch, &format).await;
            let before = [mask_sum(&stack).await, wait_sum(&stack).await];
            let began = Instant::now();
            let mut tokens = 0;
            for _ in 0..ROUNDS {
                tokens += run(&stack, batch, &format).await;
            }
            let rate = tokens as f64 / began.elapsed().as_secs_f64();
            let [mask, wait] = [mask_sum(&stack).await, wait_sum(&stack).await];
            let mean = |now: (f64, f64), before: (f64, f64)| match now.1 - before.1 {
                steps if steps > 0.0 => format!("{:.0}", (now.0 - before.0) / steps * 1e6),
                _ => "-".to_owned(),
            };
            let share = rate / *free.get_or_insert(rate);
            println!(
                "{batch:>5}  {name:<20} {rate:>9.0} {share:>9.3} {:>10} {:>14}",
                mean(mask, before[0]),
                mean(wait, before[1])
            );
        }
    }
}

/// Sum in seconds and number of steps.
async fn mask_sum(stack: &Stack) -> (f64, f64) {
    let name = "lamplighter_grammar_mask_duration";
    (stack.metric(&format!("{name}_sum")).await, stack.metric(&format!("{name}_count")).await)
}

async fn wait_sum(stack: &Stack) -> (f64, f64) {
    let name = "lamplighter_grammar_mask_wait_duration";
    (stack.metric(&format!("{name}_sum")).await, stack.metric(&format!("{name}_count")).await)
}

/// Tokens generated.
async fn run(stack: &Stack, batch: u64, format: &Value) -> u64 {
    let requests: Vec<Value> = (0..batch)
        .map(|seed| {
            json!({
                "model": "any", "prompt": "A list of people:", "max_tokens": TOKENS, "temperature": 1.0, "seed": seed,
                "ignore_eos": true, "response_format": format,
            })
        })
        .collect();
    let answers = join_all(requests.iter().map(|request| stack.post("/v1/completions", request))).await;
    answers
        .into_iter()
        .map(|answer| answer.ok()["usage"]["completion_tokens"].as_u64().expect("usage is counted"))
        .sum()
}
