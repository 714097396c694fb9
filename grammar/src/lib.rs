//! What a grammar allows, in tokens: from a JSON schema or a regex to the tokens that may come next.
//!
//! A [`Source`] is checked against [`limits`] and compiled by an [`Engine`], which knows a model's tokens
//! ([`pieces`], `vocabulary`). A [`Matching`] follows one sequence through it. A [`Compiler`] does the compiling on threads
//! of its own and keeps what it has compiled. docs/grammar.md tells what is enforced.

mod compiler;
mod engine;
mod error;
pub mod limits;
mod patterns;
pub mod pieces;
mod schema;
mod source;
mod vocabulary;

pub use compiler::{Busy, Compiler, Done, GrammarId, Outcome};
pub use engine::{Compiled, Engine, Matching, Progress};
pub use error::Error;
pub use source::{Kind, Source};
