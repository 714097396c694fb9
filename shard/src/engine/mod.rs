//! Sequences and their steps. One thread owns model, KV cache and sequences; the service talks to it by commands.
//!
//! A step: [`validate`] refuses what breaks the contract before anything is changed, [`sequence`] keeps what the
//! router sends only once, [`batch`] makes the flat input of the model, [`serving`] runs it on [`rank`] and answers, and
//! [`chooser`] chooses tokens; on a GPU [`device`] does both. A step is launched, and later collected: on a GPU a step that
//! has arrived is launched before the tokens of the one before are read, and decode steps are recorded ([`graphs`]). A step that
//! memory does not suffice for is computed without some of its sequences ([`shortage`]). Masks of grammars are computed on other
//! threads meanwhile ([`grammars`]).

mod batch;
mod chooser;
mod device;
mod device_sampling;
mod grammars;
mod graphs;
mod huge_pages;
mod memory;
mod rank;
mod sequence;
mod serving;
mod shortage;
mod step;
mod thread;
mod validate;
mod verdicts;
mod warmup;

pub use step::{Engine, EngineOptions, Origin};
pub(crate) use thread::{Answer, EngineEvents, EngineGone, EngineHandle, Loaded, spawn};

/// Tokens in one KV block. Large enough that attention reads contiguous memory and tables stay short, small enough
/// that half a block wasted per sequence does not count.
const BLOCK_SIZE_TOKENS: usize = 32;
