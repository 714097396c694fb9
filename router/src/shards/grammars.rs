//! Grammars on their way to the rank that chooses tokens, which checks and compiles them before a request is queued.

use grammar::limits::MAX_COMPILE;
use grammar::{GrammarId, Kind, Source};
use proto::client;
use proto::v1;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Channel;

/// Why there is no grammar. Messages are for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GrammarError {
    /// The grammar is at fault.
    #[error("{0}")]
    Invalid(String),
    /// The model has no grammars.
    #[error("{0}")]
    Unsupported(String),
    /// Too many wait to be compiled.
    #[error("{0}")]
    Busy(String),
    /// It takes too long to compile.
    #[error("it was not compiled within {} s: simplify it", MAX_COMPILE.as_secs())]
    TooComplex,
    /// The shard does not answer.
    #[error("{0}")]
    Unavailable(String),
}

/// Has grammars compiled. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct GrammarClient {
    channel: Channel,
}

impl GrammarClient {
    /// Of rank 0.
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// Has a grammar checked and compiled, unless it is known. It is compiled to the end also where nobody waits any longer.
    pub(crate) async fn prepare(&self, source: Source) -> Result<GrammarId, GrammarError> {
        let kind = match source.kind {
            Kind::JsonSchema => v1::GrammarKind::JsonSchema,
            Kind::Regex => v1::GrammarKind::Regex,
        };
        let request = v1::PrepareGrammarRequest { kind: kind.into(), text: source.text.as_ref().to_owned() };
        let mut client = client::shard_client(self.channel.clone());
        let Ok(answer) = timeout(MAX_COMPILE, client.prepare_grammar(request)).await else {
            return Err(GrammarError::TooComplex);
        };
        match answer.map(|response| response.into_inner().grammar_id) {
            Ok(0) => Err(GrammarError::Unavailable("the shard gave a grammar no id".to_owned())),
            Ok(id) => Ok(GrammarId(id)),
            Err(status) => {
                let message = status.message().to_owned();
                Err(match status.code() {
                    Code::InvalidArgument => GrammarError::Invalid(message),
                    Code::FailedPrecondition | Code::Unimplemented => GrammarError::Unsupported(message),
                    Code::ResourceExhausted => GrammarError::Busy(message),
                    _ => GrammarError::Unavailable(message),
                })
            }
        }
    }
}
