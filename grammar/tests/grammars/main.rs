//! Grammars over real tokenizers: what masks allow is what the grammar says, whatever is asked of it.

mod hostile;
mod masks;
mod models;
mod suite;
mod tokens;
mod walks;
