//! Which adapter changes the model for a request: by its name, in `adapter_id` or in OpenAI's `model`.

use proto::units::AdapterIndex;

use crate::error::RequestError;

/// What TGI's clients send as the model's name.
const PLACEHOLDER: &str = "tgi";

/// What a client asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModelChoice {
    /// OpenAI's `model`: an adapter, or the base model.
    pub(crate) model: Option<String>,
    /// TGI's `adapter_id`: an adapter.
    pub(crate) adapter_id: Option<String>,
}

/// The models that are served by name.
#[derive(Debug, Clone)]
pub(crate) struct ModelNames {
    /// The model without an adapter.
    pub(crate) base: String,
    /// In the shards' order.
    pub(crate) adapters: Vec<String>,
}

impl ModelNames {
    /// The adapter that was asked for; `None`: the base model. Where there are adapters, a name that is none of these is
    /// refused: the base model's answer would be taken for another's.
    pub(super) fn check(&self, choice: ModelChoice) -> Result<Option<AdapterIndex>, RequestError> {
        let of_model = match &choice.model {
            Some(model) => self.named(model)?,
            None => None,
        };
        let Some(adapter_id) = choice.adapter_id else { return Ok(of_model) };
        let Some(adapter) = self.find(&adapter_id) else {
            let message = format!(
                "`adapter_id`: there is no adapter {}: {}",
                quoted(&adapter_id),
                self.what_there_is()
            );
            return Err(RequestError::invalid("adapter_id", message));
        };
        if of_model.is_some_and(|of_model| of_model != adapter) {
            let message =
                "`adapter_id` and `model` name two adapters: a request has one, so leave one of them out";
            return Err(RequestError::invalid("adapter_id", message));
        }
        Ok(Some(adapter))
    }

    /// What answers carry.
    pub(crate) fn name(&self, adapter: Option<AdapterIndex>) -> &str {
        adapter.map_or(&self.base, |AdapterIndex(index)| &self.adapters[index as usize])
    }

    fn named(&self, model: &str) -> Result<Option<AdapterIndex>, RequestError> {
        match self.find(model) {
            // Without adapters there is one model, which answers to any name.
            None if self.adapters.is_empty() || model == self.base || model == PLACEHOLDER => Ok(None),
            None => Err(RequestError::ModelNotFound {
                message: format!(
                    "`model`: there is no model {}: the base model is {:?}; {}",
                    quoted(model),
                    self.base,
                    self.what_there_is()
                ),
            }),
            found => Ok(found),
        }
    }

    fn find(&self, name: &str) -> Option<AdapterIndex> {
        self.adapters.iter().position(|adapter| adapter == name).map(|index| AdapterIndex(index as u32))
    }

    fn what_there_is(&self) -> String {
        match &*self.adapters {
            [] => "the server has none; it is started with them by --lora-adapters".to_owned(),
            names => format!("the adapters are {}", names.join(", ")),
        }
    }
}

/// A name of a client's, no longer than is worth repeating.
fn quoted(name: &str) -> String {
    format!("{:?}", name.chars().take(64).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        adapters: &[&str],
        model: Option<&str>,
        adapter_id: Option<&str>,
    ) -> Result<Option<u32>, String> {
        let adapters = adapters.iter().map(|&name| name.to_owned()).collect();
        let names = ModelNames { base: "base".to_owned(), adapters };
        let own = |name: &str| name.to_owned();
        let choice = ModelChoice { model: model.map(own), adapter_id: adapter_id.map(own) };
        names
            .check(choice)
            .map(|found| found.map(|AdapterIndex(index)| index))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_adapter_is_found_by_either_name() {
        let adapters = ["tone", "form"];
        assert_eq!(check(&adapters, None, None), Ok(None));
        assert_eq!(check(&adapters, Some("base"), None), Ok(None));
        assert_eq!(check(&adapters, Some("tgi"), None), Ok(None));
        assert_eq!(check(&adapters, Some("form"), None), Ok(Some(1)));
        assert_eq!(check(&adapters, None, Some("tone")), Ok(Some(0)));
        assert_eq!(check(&adapters, Some("base"), Some("tone")), Ok(Some(0)));
        assert_eq!(check(&adapters, Some("tone"), Some("tone")), Ok(Some(0)));
        assert_eq!(check(&[], Some("any"), None), Ok(None));
    }

    #[test]
    fn unknown_names_are_refused_with_those_there_are() {
        let error = check(&["tone", "form"], Some("other"), None).unwrap_err();
        assert!(
            error.contains("\"other\"") && error.contains("\"base\"") && error.contains("tone, form"),
            "{error}"
        );
        let error = check(&["tone", "form"], None, Some("other")).unwrap_err();
        assert!(error.contains("`adapter_id`") && error.contains("tone, form"), "{error}");
        let error = check(&[], None, Some("other")).unwrap_err();
        assert!(error.contains("--lora-adapters"), "{error}");
        let error = check(&["tone", "form"], Some("tone"), Some("form")).unwrap_err();
        assert!(error.contains("two adapters"), "{error}");
    }
}
