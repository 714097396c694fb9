//! Why a grammar cannot be used.

/// By whose fault it is. Messages are for the client: they name what cannot be enforced and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The grammar's own: it is not one, asks for what cannot be enforced, or is beyond a limit.
    #[error("{0}")]
    Grammar(String),
    /// The model's: its tokens are not known as bytes, so that no grammar can be enforced.
    #[error("this model cannot be held to a grammar: {0}")]
    Model(String),
}

impl Error {
    pub(crate) fn grammar(message: impl Into<String>) -> Self {
        Self::Grammar(message.into())
    }

    /// What llguidance says, without its backtraces and copies of the grammar.
    pub(crate) fn of_engine(error: &anyhow::Error) -> Self {
        let text = error.to_string();
        let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it cannot be compiled");
        let line = line.trim().trim_start_matches("panic: ");
        let mut end = line.len().min(300);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        Self::Grammar(line[..end].to_owned())
    }
}
