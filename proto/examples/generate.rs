//! Writes `src/gen/` anew from the `.proto` files: `cargo run --release -p proto --example generate`. Needs no protoc.
#![expect(clippy::unwrap_used, reason = "a developer's tool: a panic is its error message")]

use std::path::Path;

fn main() {
    generate(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen"));
}

/// Generates messages, client, server and descriptor set to `out`.
pub(crate) fn generate(out: &Path) {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let files = protox::compile(["lamplighter/shard/v1/shard.proto"], [&include]).unwrap();
    let descriptor = out.join("shard_descriptor.bin");
    std::fs::write(&descriptor, prost::Message::encode_to_vec(&files)).unwrap();
    tonic_prost_build::configure().out_dir(out).compile_fds(files).unwrap();
}
