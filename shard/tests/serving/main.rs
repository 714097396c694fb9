//! The engine and its service, driven as the router drives them. The checkpoints are those of
//! `integration-tests/goldens`: tiny, random, and with known answers.

#[cfg(test)]
mod checkpoints;
#[cfg(test)]
mod driver;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod grammars;
#[cfg(test)]
mod ranks;
#[cfg(test)]
mod service;
