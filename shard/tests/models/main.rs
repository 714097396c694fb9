//! Checkpoints from disk to logits: what transformers computes, and what must be refused.

#[cfg(test)]
mod checkpoints;
#[cfg(test)]
mod goldens;
#[cfg(test)]
mod lora;
#[cfg(test)]
mod quantization;
#[cfg(test)]
mod rank;
