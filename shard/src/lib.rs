//! Lamplighter's shard: owns tensors, computes tokens, knows no text.
