//! From a model id to a directory: a local one, or the embedded demo model.

use std::path::{Path, PathBuf};

/// Name under which the embedded model is served.
const DEMO_NAME: &str = "lamplighter-demo";

macro_rules! demo_file {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../integration-tests/demo-model/checkpoint/", $name)).as_slice())
    };
}

/// The demo model: see `integration-tests/demo-model/README.md` for how it is made and what it can do.
const DEMO_FILES: [(&str, &[u8]); 6] = [
    demo_file!("config.json"),
    demo_file!("generation_config.json"),
    demo_file!("model.safetensors"),
    demo_file!("tokenizer.json"),
    demo_file!("tokenizer_config.json"),
    demo_file!("chat_template.jinja"),
];

/// A model on disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Model {
    /// Directory with config.json, safetensors files and the tokenizer.
    pub(crate) directory: PathBuf,
    /// Name under which it is served.
    pub(crate) name: String,
}

/// Why a model id is not a model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    #[error(
        "--model-id {id}: there is no such directory. Models are not downloaded yet: run `hf download {id} \
         --local-dir DIR` and give --model-id DIR"
    )]
    NotLocal { id: String },
    #[error("--model-id {id}: there is no such directory")]
    Missing { id: String },
    #[error(
        "--model-id {id}: {missing} is not in it: give the directory of a model in Hugging Face's layout"
    )]
    Incomplete { id: String, missing: &'static str },
    #[error("the demo model cannot be written to {}: {source}", path.display())]
    Demo { path: PathBuf, source: std::io::Error },
}

/// The directory of `model_id`, or of the demo model, which is written below `run_directory`.
pub(crate) fn resolve(model_id: Option<&str>, run_directory: &Path) -> Result<Model, ModelError> {
    match model_id {
        Some(id) => local(id),
        None => demo(run_directory),
    }
}

fn local(id: &str) -> Result<Model, ModelError> {
    let directory = Path::new(id);
    if !directory.is_dir() {
        let id = id.to_owned();
        return Err(if is_hub_id(&id) { ModelError::NotLocal { id } } else { ModelError::Missing { id } });
    }
    for missing in ["config.json", "tokenizer.json"] {
        if !directory.join(missing).is_file() {
            return Err(ModelError::Incomplete { id: id.to_owned(), missing });
        }
    }
    let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    let name =
        directory.file_name().map_or_else(|| id.to_owned(), |name| name.to_string_lossy().into_owned());
    Ok(Model { directory, name })
}

/// `org/name`, as on the hub: two components, neither of them `.` or `..`.
fn is_hub_id(id: &str) -> bool {
    let parts: Vec<&str> = id.split('/').collect();
    matches!(parts.as_slice(), [org, name] if ![org, name].iter().any(|part| part.is_empty() || part.starts_with('.')))
}

fn demo(run_directory: &Path) -> Result<Model, ModelError> {
    let directory = run_directory.join(DEMO_NAME);
    let write = || {
        std::fs::create_dir(&directory)?;
        DEMO_FILES.iter().try_for_each(|(name, bytes)| std::fs::write(directory.join(name), bytes))
    };
    write().map_err(|source| ModelError::Demo { path: directory.clone(), source })?;
    Ok(Model { directory, name: DEMO_NAME.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_id_the_demo_model_is_written_and_found() {
        let run_directory = tempfile::tempdir().unwrap();
        let model = resolve(None, run_directory.path()).unwrap();
        assert_eq!(model.name, DEMO_NAME);
        // What was written is what a local directory must have.
        let again = resolve(model.directory.to_str(), run_directory.path()).unwrap();
        assert_eq!(again, model);
    }

    #[test]
    fn each_wrong_id_has_its_own_remedy() {
        let empty = tempfile::tempdir().unwrap();
        let check = |id: &str, expected: &str| {
            let error = resolve(Some(id), empty.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{id}: {error}");
        };
        check("org/name", "hf download org/name");
        check("/no/such/directory", "there is no such directory");
        check("./name", "there is no such directory");
        check(empty.path().to_str().unwrap(), "config.json is not in it");
    }
}
