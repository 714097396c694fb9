//! Text to token ids and back. Ids only outside of this module, text only inside; no JSON of clients, no HTTP.

pub(crate) mod chat_template;
pub(crate) mod detokenizer;
pub(crate) mod stop_strings;
pub(crate) mod text_workers;
pub(crate) mod tokenizer;

mod strftime;

/// Files of the model directory that turn text into token ids: what is wrong with them, and where.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The file is not there or cannot be read.
    #[error(
        "{path} cannot be read: {error}; the model directory needs tokenizer.json (a tokenizer of the `tokenizers` library)"
    )]
    Read {
        /// Which file.
        path: String,
        /// Why. Not named `source`: the message has it already.
        error: std::io::Error,
    },
    /// The file is there, but not what it should be.
    #[error("{path} is broken: {reason}; download the model again, or repair the file")]
    Broken {
        /// Which file.
        path: String,
        /// What the parser says.
        reason: String,
    },
}
