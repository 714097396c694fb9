//! The committed generated code is what the `.proto` files say, so that nobody needs a generator to build.

#[path = "../examples/generate.rs"]
#[expect(dead_code, reason = "only the function is used, not the example's main")]
mod generate;

use std::path::Path;

#[test]
fn committed_code_is_what_the_proto_files_generate() {
    let fresh = tempfile::tempdir().unwrap();
    generate::generate(fresh.path());
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    for file in std::fs::read_dir(fresh.path()).unwrap() {
        let name = file.unwrap().file_name();
        let read = |dir: &Path| std::fs::read(dir.join(&name)).unwrap_or_default();
        assert!(
            read(fresh.path()) == read(&committed),
            "{} is stale: run `cargo run --release -p proto --example generate`",
            name.display()
        );
    }
}
