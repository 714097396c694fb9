//! Which request goes first.

use std::collections::BTreeMap;

use super::entry::Entry;
use super::state::RequestId;

/// Requests that wait for KV blocks, oldest first. A preempted one returns to the place of its age, which is before all
/// that came after it.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// By age. Priority classes would stand before it in the key.
    entries: BTreeMap<RequestId, Entry>,
}

impl Queue {
    pub(crate) fn push(&mut self, entry: Entry) {
        self.entries.insert(entry.id, entry);
    }

    pub(crate) fn remove(&mut self, request: RequestId) -> Option<Entry> {
        self.entries.remove(&request)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// In the order in which they are to be admitted.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Empties the queue.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Entry> + use<> {
        std::mem::take(&mut self.entries).into_values()
    }
}
