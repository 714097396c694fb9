//! A sequence's tokens to what its reader sees: text pieces, and the end with its reason.
//!
//! Answers that are not streamed are collected from the same events, so they cannot differ from streamed ones.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::stream::{Stream, StreamExt};
use proto::units::TokenId;

use crate::metrics::{self, Stage};
use crate::scheduler::{EndReason, Failure, Token, TokenEvent, TokenStream};
use crate::text::detokenizer::Detokenizer;
use crate::text::stop_strings::StopStrings;
use crate::text::tokenizer::Tokenizer;

/// What happens to a sequence, in order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum GenerationEvent {
    /// Log-probabilities of prompt tokens, from the second token on, before the first `Token`.
    Prompt(Vec<Token>),
    /// A generated token.
    Token(GeneratedToken),
    /// The sequence ended without a result; nothing follows.
    Failed(Failure),
}

/// A token and the text that became certain with it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GeneratedToken {
    /// Id and log-probabilities.
    pub(crate) token: Token,
    /// Whether it is a control token, which is no part of the text.
    pub(crate) special: bool,
    /// Whole characters. Empty while a character or what may be a stop string is unfinished; then it comes later.
    pub(crate) text: String,
    /// Present with the last token.
    pub(crate) end: Option<Ended>,
}

/// The end of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ended {
    /// Why.
    pub(crate) reason: FinishReason,
    /// Tokens generated, the end-of-sequence token included.
    pub(crate) generated_tokens: u32,
    /// Tokens of the prompt that were in the prefix cache when it began.
    pub(crate) cached_tokens: usize,
    /// Where the time went.
    pub(crate) timings: Timings,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FinishReason {
    /// An end-of-sequence token.
    Eos,
    /// As many tokens as were asked for.
    Length,
    /// A stop string.
    StopString,
}

/// Where a sequence's time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Timings {
    /// From submission to the first step.
    pub(crate) queue: Duration,
    /// From the first step to the end.
    pub(crate) inference: Duration,
}

/// A sequence that came to its end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generated {
    /// All text.
    pub(crate) text: String,
    /// All tokens.
    pub(crate) tokens: Vec<GeneratedToken>,
    /// Log-probabilities of the prompt from its second token on, if they were asked for.
    pub(crate) prompt: Vec<Token>,
    /// How it ended.
    pub(crate) end: Ended,
}

/// A sequence's events.
pub(crate) trait TokenEvents: Stream<Item = TokenEvent> + Send + Unpin {
    /// Nothing is done before the end, so nobody need be woken for each token.
    fn wake_rarely(&mut self);
}

impl TokenEvents for TokenStream {
    fn wake_rarely(&mut self) {
        TokenStream::wake_rarely(self);
    }
}

/// What a stream is about.
pub(crate) struct StreamInput {
    /// From the scheduler; dropping it cancels the sequence.
    pub(crate) events: Box<dyn TokenEvents>,
    /// The prompt, whose end is the context of the first token's text.
    pub(crate) prompt: Vec<TokenId>,
    /// Its stop strings.
    pub(crate) stop: StopStrings,
    /// When the request arrived.
    pub(crate) arrived: Instant,
}

/// One sequence being generated. Dropping it cancels the sequence.
pub(crate) struct GenerationStream {
    /// None once the end was given.
    events: Option<Box<dyn TokenEvents>>,
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop: StopStrings,
    generated_tokens: u32,
    cached_tokens: usize,
    queue_time: Duration,
    arrived: Instant,
    submitted: Instant,
    last_token: Option<Instant>,
}

impl GenerationStream {
    /// Right after the submission.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, input: StreamInput) -> Self {
        Self {
            events: Some(input.events),
            detokenizer: Detokenizer::new(Arc::clone(&tokenizer), &input.prompt),
            tokenizer,
            stop: input.stop,
            generated_tokens: 0,
            cached_tokens: 0,
            queue_time: Duration::ZERO,
            arrived: input.arrived,
            submitted: Instant::now(),
            last_token: None,
        }
    }

    /// The next event; none after the last one, which is a `Token` with an `end`, or `Failed`.
    pub(crate) async fn next(&mut self) -> Option<GenerationEvent> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// The next event, if it has happened.
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        loop {
            let Some(events) = &mut self.events else { return Poll::Ready(None) };
            let event = match ready!(events.poll_next_unpin(context)) {
                Some(TokenEvent::Started { queue_time, cached_tokens }) => {
                    (self.queue_time, self.cached_tokens) = (queue_time, cached_tokens);
                    continue;
                }
                Some(TokenEvent::Prompt(tokens)) => GenerationEvent::Prompt(tokens),
                Some(TokenEvent::Token { token, end, at }) => {
                    self.record_token_time(at);
                    self.token(token, end)
                }
                Some(TokenEvent::Failed(failure)) => self.fail(failure),
                // Streams end with an end; whoever breaks this has gone away.
                None => self.fail(Failure::Shards("the scheduler has stopped".to_owned())),
            };
            return Poll::Ready(Some(event));
        }
    }

    /// Waits for the end.
    pub(crate) async fn collect(mut self) -> Result<Generated, Failure> {
        let (mut text, mut tokens, mut prompt) = (String::new(), Vec::new(), Vec::new());
        // A stop string ends the sequence, so it is to be seen at once.
        if let Some(events) = self.events.as_mut().filter(|_| self.stop.is_empty()) {
            events.wake_rarely();
        }
        loop {
            match self.next().await {
                Some(GenerationEvent::Prompt(more)) => prompt.extend(more),
                Some(GenerationEvent::Token(token)) => {
                    text.push_str(&token.text);
                    let end = token.end.clone();
                    tokens.push(token);
                    if let Some(end) = end {
                        return Ok(Generated { text, tokens, prompt, end });
                    }
                }
                Some(GenerationEvent::Failed(failure)) => return Err(failure),
                None => unreachable!("a stream gives its end before it is over"),
            }
        }
    }

    fn token(&mut self, token: Token, end: Option<EndReason>) -> GenerationEvent {
        let since = Instant::now();
        self.generated_tokens += 1;
        let piece = self.detokenizer.push(token.id);
        let mut watched = self.stop.push(piece);
        if end.is_some() && !watched.stopped {
            let last = self.stop.push(self.detokenizer.finish());
            watched.text.push_str(&last.text);
            watched.stopped = last.stopped;
            if !last.stopped {
                watched.text.push_str(&self.stop.finish());
            }
        }
        let reason = match end {
            _ if watched.stopped => Some(FinishReason::StopString),
            Some(EndReason::Eos) => Some(FinishReason::Eos),
            Some(EndReason::Length) => Some(FinishReason::Length),
            None => None,
        };
        let special = self.tokenizer.is_special(token.id);
        Stage::Detokenize.done(since);
        let end = reason.map(|reason| self.end(reason));
        GenerationEvent::Token(GeneratedToken { token, special, text: watched.text, end })
    }

    fn end(&mut self, reason: FinishReason) -> Ended {
        self.events = None;
        let inference = self.submitted.elapsed().saturating_sub(self.queue_time);
        let timings = Timings { queue: self.queue_time, inference };
        metrics::record_sequence_done(&metrics::SequenceDone {
            total: self.arrived.elapsed(),
            inference,
            generated_tokens: self.generated_tokens,
        });
        let Self { generated_tokens, cached_tokens, .. } = *self;
        Ended { reason, generated_tokens, cached_tokens, timings }
    }

    fn fail(&mut self, failure: Failure) -> GenerationEvent {
        self.events = None;
        GenerationEvent::Failed(failure)
    }

    /// As the shards gave it: how fast its reader is does not count.
    fn record_token_time(&mut self, at: Instant) {
        match self.last_token.replace(at) {
            None => metrics::record_first_token(at.saturating_duration_since(self.arrived)),
            Some(before) => metrics::record_next_token(at.saturating_duration_since(before)),
        }
    }
}

impl Drop for GenerationStream {
    fn drop(&mut self) {
        if self.events.is_some() {
            metrics::record_sequence_dropped();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use futures::stream::{self, BoxStream};

    use super::*;
    use crate::text::stop_strings::StopText;
    use crate::text::tokenizer::tests::byte_level;

    /// A script, which waits for nobody.
    impl TokenEvents for BoxStream<'static, TokenEvent> {
        fn wake_rarely(&mut self) {}
    }

    /// Events of a sequence with these tokens.
    pub(crate) fn events(ids: &[u32], end: EndReason) -> Vec<TokenEvent> {
        let mut events = vec![TokenEvent::Started { queue_time: Duration::from_millis(2), cached_tokens: 0 }];
        for (index, id) in ids.iter().enumerate() {
            let token = Token {
                id: TokenId(*id),
                logprob: -0.5,
                top: vec![(TokenId(*id), -0.5), (TokenId(97), -1.5)],
            };
            events.push(TokenEvent::Token {
                token,
                end: (index + 1 == ids.len()).then_some(end),
                at: Instant::now(),
            });
        }
        events
    }

    fn stream(events: Vec<TokenEvent>, stop: &[&str], stop_text: StopText) -> GenerationStream {
        let stop = StopStrings::new(stop.iter().map(ToString::to_string).collect(), stop_text);
        let input = StreamInput {
            events: Box::new(stream::iter(events).boxed()),
            prompt: vec![TokenId(257)],
            stop,
            arrived: Instant::now(),
        };
        GenerationStream::new(Arc::new(byte_level()), input)
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[tokio::test]
    async fn the_end_of_sequence_token_is_counted_and_not_shown() {
        let mut ids = ids("ok");
        ids.push(262);
        let generated = stream(events(&ids, EndReason::Eos), &[], StopText::Cut).collect().await.unwrap();
        assert_eq!(generated.text, "ok");
        assert_eq!(generated.end.reason, FinishReason::Eos);
        assert_eq!(generated.end.generated_tokens, 3);
        assert!(generated.tokens[2].special);
        assert_eq!(generated.end.timings.queue, Duration::from_millis(2));
    }

    #[tokio::test]
    async fn a_stop_string_ends_the_stream_and_lets_go_of_the_sequence() {
        let mut stream = stream(events(&ids("one\n\ntwo"), EndReason::Length), &["\n\n"], StopText::Cut);
        let mut last = None;
        let mut text = String::new();
        while let Some(GenerationEvent::Token(token)) = stream.next().await {
            text.push_str(&token.text);
            last = token.end;
        }
        assert_eq!(text, "one");
        assert_eq!(last.map(|end| (end.reason, end.generated_tokens)), Some((FinishReason::StopString, 5)));
        assert!(stream.events.is_none(), "the sequence was not cancelled");
        assert_eq!(stream.next().await, None);
    }

    #[tokio::test]
    async fn what_was_held_back_comes_with_the_last_token() {
        let generated =
            stream(events(&ids("a<"), EndReason::Length), &["<end>"], StopText::Cut).collect().await.unwrap();
        assert_eq!(generated.text, "a<");
        assert_eq!(generated.end.reason, FinishReason::Length);
        let half = stream(events(&[97, 260], EndReason::Length), &[], StopText::Cut).collect().await.unwrap();
        assert_eq!(half.text, "a\u{fffd}");
    }

    #[tokio::test]
    async fn a_failure_ends_the_stream() {
        let mut events = events(&ids("ab"), EndReason::Length);
        events.truncate(2);
        events.push(TokenEvent::Failed(Failure::ShuttingDown));
        assert_eq!(stream(events, &[], StopText::Cut).collect().await, Err(Failure::ShuttingDown));
        let silent = stream(Vec::new(), &[], StopText::Cut).collect().await;
        assert!(matches!(silent, Err(Failure::Shards(_))), "{silent:?}");
    }
}
