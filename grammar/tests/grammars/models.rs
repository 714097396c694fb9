//! Tokenizers to test with, and compiling with them.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, LazyLock, mpsc};

use grammar::{Compiled, Compiler, Engine, Error, Source};
use serde_json::json;

/// A tokenizer, and what ends its texts.
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) tokenizer_json: String,
    pub(crate) vocab_size: usize,
    pub(crate) eos: Vec<u32>,
    pub(crate) engine: Arc<Engine>,
    compiler: Compiler,
}

/// The demo model's tokenizer, a small one of its kind, and one with bytes for what it does not know.
pub(crate) static MODELS: LazyLock<[Model; 3]> = LazyLock::new(|| {
    let read = |path: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests").join(path);
        std::fs::read_to_string(path).expect("it is in the repository")
    };
    [
        // More logits than tokens, as models have that are padded.
        Model::new("demo", read("demo-model/checkpoint/tokenizer.json"), 2112, &[2, 0]),
        Model::new("byte level", read("goldens/llama/tokenizer.json"), 384, &[2]),
        Model::new("byte fallback", byte_fallback(), 420, &[2]),
    ]
});

impl Model {
    fn new(name: &'static str, tokenizer_json: String, vocab_size: usize, eos: &[u32]) -> Self {
        let engine = Engine::new(&tokenizer_json, vocab_size, eos).expect("a tokenizer of a known kind");
        let engine = Arc::new(engine);
        let of_compiler = Engine::new(&tokenizer_json, vocab_size, eos);
        let compiler = Compiler::start(1, move || of_compiler).expect("a thread can be started");
        Self { name, tokenizer_json, vocab_size, eos: eos.to_vec(), engine, compiler }
    }

    /// Compiles as servers do.
    pub(crate) fn compile(&self, source: Source) -> Result<Arc<Compiled>, Error> {
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |outcome| sender.send(outcome).expect("it is waited for"));
        self.compiler.compile(source, done).expect("there is room");
        let id = receiver.recv().expect("an outcome comes")?;
        Ok(self.compiler.find(id).expect("it was compiled just now"))
    }

    /// The text of tokens, without those that end it.
    pub(crate) fn text(&self, tokens: &[u32]) -> Vec<u8> {
        let tokens = tokens.iter().filter(|token| !self.eos.contains(token));
        tokens.flat_map(|&token| self.engine.token_bytes(token).to_vec()).collect()
    }

    /// Compiles a schema, which must be possible.
    pub(crate) fn schema(&self, schema: &serde_json::Value) -> Arc<Compiled> {
        self.compile(Source::json_schema(schema)).unwrap_or_else(|error| panic!("{schema}: {error}"))
    }
}

/// The ids that a mask allows.
pub(crate) fn allowed(mask: &[u32]) -> Vec<u32> {
    let bits = mask.iter().zip((0..).step_by(32));
    bits.flat_map(|(word, first)| (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit))
        .collect()
}

/// As Llama 2's: spaces are U+2581, and the first word of a text gets one.
fn byte_fallback() -> String {
    let mut vocab = String::from(r#""<unk>":0,"<s>":1,"</s>":2,"#);
    for byte in 0..=255u16 {
        write!(vocab, r#""<0x{byte:02X}>":{},"#, byte + 3).expect("a string takes all");
    }
    let pieces = (' '..='~').map(String::from);
    let others = ["é", "▁", "▁a", "\":", "▁\"", "true", "null", "▁{"].map(String::from);
    for (id, piece) in (259..).zip(pieces.chain(others)) {
        let piece = piece.replace(' ', "▁▁");
        write!(vocab, "{}:{id},", json!(piece)).expect("a string takes all");
    }
    vocab.pop();
    let merges = r#"["▁ ▁","▁ a","\" :","▁ \"","▁ {"]"#;
    let added = [(0, "<unk>"), (1, "<s>"), (2, "</s>")].map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    });
    format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":{},
        "normalizer":{{"type":"Sequence","normalizers":[{{"type":"Prepend","prepend":"▁"}},{{"type":"Replace","pattern":{{"String":" "}},"content":"▁"}}]}},
        "pre_tokenizer":null,"post_processor":null,
        "decoder":{{"type":"Sequence","decoders":[{{"type":"Replace","pattern":{{"String":"▁"}},"content":" "}},{{"type":"ByteFallback"}},{{"type":"Fuse"}},{{"type":"Strip","content":" ","start":1,"stop":0}}]}},
        "model":{{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":null,
        "fuse_unk":true,"byte_fallback":true,"vocab":{{{vocab}}},"merges":{merges}}}}}"#,
        json!(added)
    )
}
