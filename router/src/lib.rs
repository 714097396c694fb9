//! Lamplighter's router: HTTP and text in front, scheduling behind; knows no tensors.
