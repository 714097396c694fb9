//! Clients that ask at random and leave at random.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::{Value, json};

/// No request takes so long, however busy the machine is: one that does has no end.
const NO_END: Duration = Duration::from_mins(2);

/// How requests ended.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    complete: AtomicU64,
    left: AtomicU64,
    refused: AtomicU64,
    timed_out: AtomicU64,
    invalid: AtomicU64,
    problems: Mutex<Vec<String>>,
}

/// How a request ended, where all is well.
enum End {
    /// With all of its answer.
    Complete,
    /// 429.
    Refused,
    /// Its own `timeout` was over.
    TimedOut,
    /// It was not meant to be served.
    Invalid,
}

/// What is asked, and what the client does then.
struct Question {
    path: &'static str,
    body: Value,
    streamed: bool,
    class: Option<&'static str>,
    /// Whether it may end with a timeout.
    hurried: bool,
    /// Whether it must be refused as not valid.
    invalid: bool,
    patience: Patience,
}

/// When the client leaves.
#[derive(Clone, Copy)]
enum Patience {
    /// Not before the end.
    All,
    /// After a time, wherever the request is then.
    For(Duration),
    /// After so many pieces of the stream.
    Pieces(usize),
    /// Not before the end, with a pause after each piece.
    Slow,
}

/// One client.
pub(crate) struct Client {
    url: String,
    http: reqwest::Client,
    random: StdRng,
    tally: Arc<Tally>,
}

impl Client {
    pub(crate) fn new(url: &str, random: StdRng, tally: Arc<Tally>) -> Self {
        Self { url: url.to_owned(), http: integration_tests::client(), random, tally }
    }

    /// Asks one thing after the other.
    pub(crate) async fn ask_until(mut self, over: Arc<AtomicBool>) {
        while !over.load(Ordering::Relaxed) {
            let question = self.question();
            let described = format!("{} {}", question.path, question.body);
            let longest = match question.patience {
                Patience::For(time) => time,
                Patience::All | Patience::Pieces(_) | Patience::Slow => NO_END,
            };
            let end = match tokio::time::timeout(longest, self.ask(&question)).await {
                Ok(end) => end,
                Err(_) if longest < NO_END => Ok(None),
                Err(_) => Err(format!("there was no end in {NO_END:?}")),
            };
            self.count(end, &described);
            tokio::time::sleep(Duration::from_millis(self.random.random_range(0..150))).await;
        }
    }

    fn count(&self, end: Result<Option<End>, String>, question: &str) {
        let Tally { complete, left, refused, timed_out, invalid, problems } = &*self.tally;
        let counter = match end {
            Ok(None) => left,
            Ok(Some(End::Complete)) => complete,
            Ok(Some(End::Refused)) => refused,
            Ok(Some(End::TimedOut)) => timed_out,
            Ok(Some(End::Invalid)) => invalid,
            Err(problem) => {
                let question: String = question.chars().take(300).collect();
                problems
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(format!("{question}: {problem}"));
                return;
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// None where the client has left by its own choice.
    async fn ask(&self, question: &Question) -> Result<Option<End>, String> {
        let mut request = self.http.post(format!("{}{}", self.url, question.path)).json(&question.body);
        if let Some(class) = question.class {
            request = request.header("x-request-priority", class);
        }
        let response = request.send().await.map_err(|error| format!("no answer: {error:?}"))?;
        let status = response.status().as_u16();
        match status {
            200 if question.invalid => Err("an invalid request was served".to_owned()),
            200 if question.streamed => read_stream(response, question).await,
            200 => whole(&text(response).await?).map(|()| Some(End::Complete)),
            429 => text(response).await.map(|_| Some(End::Refused)),
            400 | 422 if question.invalid => text(response).await.map(|_| Some(End::Invalid)),
            408 | 503 | 504 if question.hurried => text(response).await.map(|_| Some(End::TimedOut)),
            status => Err(format!("status {status}: {}", text(response).await?)),
        }
    }

    fn question(&mut self) -> Question {
        let random = &mut self.random;
        let streamed = random.random_bool(0.5);
        let invalid = random.random_bool(0.03);
        let hurried = random.random_bool(0.15);
        let prompt = prompt(random);
        let max_tokens =
            if random.random_bool(0.1) { random.random_range(200..400) } else { random.random_range(1..80) };
        let mut common = json!({"seed": random.random_range(0..1_000_000_u32)});
        if random.random_bool(0.5) {
            common["temperature"] = json!(random.random_range(0.1..1.5));
            common["top_p"] = json!(random.random_range(0.5..0.99));
        }
        if random.random_bool(0.3) {
            common["frequency_penalty"] = json!(random.random_range(-1.0..1.0));
        }
        if random.random_bool(0.3) {
            common["stop"] = json!(["\n\n", "lamp"]);
        }
        if random.random_bool(0.3) {
            common["cache_salt"] = json!(format!("tenant {}", random.random_range(0..3)));
        }
        if hurried {
            common["timeout"] = json!(random.random_range(0.005..0.5));
        }
        let class =
            random.random_bool(0.5).then(|| ["interactive", "default", "batch"][random.random_range(0..3)]);
        if class.is_none() && random.random_bool(0.5) {
            common["priority"] = json!(random.random_range(-200..200));
        }
        let (path, mut body) = match random.random_range(0..3) {
            0 => {
                let mut body = json!({"prompt": prompt, "max_tokens": max_tokens, "stream": streamed, "ignore_eos": true});
                if random.random_bool(0.2) {
                    body["n"] = json!(random.random_range(2..4));
                }
                if random.random_bool(0.3) {
                    body["logprobs"] = json!(random.random_range(0..5));
                }
                ("/v1/completions", with(body, common))
            }
            1 => {
                let messages = json!([{"role": "system", "content": SYSTEMS[random.random_range(0..3)]},
                    {"role": "user", "content": prompt}]);
                let body =
                    json!({"messages": messages, "max_completion_tokens": max_tokens, "stream": streamed});
                ("/v1/chat/completions", with(body, common))
            }
            _ => {
                common.as_object_mut().expect("an object").remove("frequency_penalty");
                common.as_object_mut().expect("an object").remove("temperature");
                let mut parameters = with(
                    json!({"max_new_tokens": max_tokens, "details": true, "do_sample": true, "repetition_penalty": 1.1}),
                    common,
                );
                if random.random_bool(0.3) {
                    parameters["decoder_input_details"] = json!(!streamed);
                }
                let path = if streamed { "/generate_stream" } else { "/generate" };
                (path, json!({"inputs": prompt, "parameters": parameters}))
            }
        };
        if invalid {
            let parameters =
                if body.get("parameters").is_some() { &mut body["parameters"] } else { &mut body };
            parameters["top_p"] = json!(7.5);
        }
        let patience = match random.random_range(0..10) {
            0 | 1 => Patience::For(Duration::from_millis(random.random_range(0..60))),
            2 => Patience::For(Duration::from_millis(random.random_range(0..2000))),
            3 | 4 if streamed => Patience::Pieces(random.random_range(0..30)),
            5 if streamed => Patience::Slow,
            _ => Patience::All,
        };
        Question { path, body, streamed, class, hurried, invalid, patience }
    }
}

impl Tally {
    pub(crate) fn total(&self) -> u64 {
        let Self { complete, left, refused, timed_out, invalid, .. } = self;
        [complete, left, refused, timed_out, invalid].iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The first of the requests that did not end as they should.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).iter().take(10).cloned().collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        write!(
            f,
            "{} requests: {} complete, {} left by their clients, {} refused for want of room, {} over their own time, {} not \
             valid; {} with another end",
            self.total(),
            count(&self.complete),
            count(&self.left),
            count(&self.refused),
            count(&self.timed_out),
            count(&self.invalid),
            self.problems.lock().unwrap_or_else(PoisonError::into_inner).len(),
        )
    }
}

const SYSTEMS: [&str; 3] = [
    "You tell short stories for children.",
    "You tell stories about lamps, foxes and the sea, in plain words, and you never repeat a story that you have told before, \
     however much somebody asks for it, because there are always new ones to be told.",
    "Answer in one sentence.",
];

/// Words, sometimes many, often with a beginning that others have too.
fn prompt(random: &mut StdRng) -> String {
    const WORDS: [&str; 12] =
        ["once", "a", "fox", "the", "lamp", "sea", "house", "old", "little", "went", "to", "said"];
    let shared = match random.random_range(0..4) {
        0 | 1 => "",
        2 => "There was a lamplighter who knew every street of the town by its sound. ",
        _ => {
            "In the harbour lay a ship that nobody had ever seen leave or arrive, and every child had a tale about it. "
        }
    };
    let repeats = if shared.is_empty() { 0 } else { random.random_range(1..5) };
    let words =
        if random.random_bool(0.1) { random.random_range(100..400) } else { random.random_range(1..40) };
    let words: Vec<&str> = (0..words).map(|_| WORDS[random.random_range(0..WORDS.len())]).collect();
    shared.repeat(repeats) + &words.join(" ")
}

fn with(mut body: Value, more: Value) -> Value {
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    body
}

/// An answer in one piece has what was asked for.
fn whole(text: &str) -> Result<(), String> {
    let answer: Value = serde_json::from_str(text).map_err(|error| format!("{error}: {text}"))?;
    let ended = match answer["choices"].as_array() {
        Some(choices) => {
            !choices.is_empty() && choices.iter().all(|choice| choice["finish_reason"].is_string())
        }
        None => answer["details"]["finish_reason"].is_string(),
    };
    if ended { Ok(()) } else { Err(format!("the answer has no end: {text}")) }
}

async fn text(response: reqwest::Response) -> Result<String, String> {
    response.text().await.map_err(|error| format!("the answer is broken off: {error:?}"))
}

/// Reads a stream for as long as the client has patience.
async fn read_stream(response: reqwest::Response, question: &Question) -> Result<Option<End>, String> {
    let mut pieces = response.bytes_stream();
    let mut text = Vec::new();
    let mut num_pieces = 0;
    loop {
        if matches!(question.patience, Patience::Pieces(most) if num_pieces >= most) {
            return Ok(None);
        }
        match pieces.next().await {
            Some(Ok(piece)) => text.extend_from_slice(&piece),
            Some(Err(error)) => return Err(format!("the stream is broken off: {error:?}")),
            None => break,
        }
        num_pieces += 1;
        if matches!(question.patience, Patience::Slow) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let text = String::from_utf8(text).map_err(|error| error.to_string())?;
    let events = text.split("\n\n").filter_map(|event| event.trim_start().strip_prefix("data:"));
    let last = events.last().unwrap_or_default().trim();
    match serde_json::from_str::<Value>(last) {
        Err(_) if last == "[DONE]" => Ok(Some(End::Complete)),
        Ok(event) if event["generated_text"].is_string() => Ok(Some(End::Complete)),
        Ok(event) if !event["error"].is_null() && question.hurried => Ok(Some(End::TimedOut)),
        _ => Err(format!("the stream ends with {last:?}")),
    }
}
