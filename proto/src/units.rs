//! Numbers that are easily mixed up, as types.

use serde::{Deserialize, Serialize};

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

unit!(
    /// Index of a token in the model's vocabulary.
    TokenId(u32)
);
unit!(
    /// A KV block: `0 .. num_blocks`, the same on all ranks.
    BlockId(u32)
);
unit!(
    /// An adapter that changes the model for some sequences: its place in `InfoResponse.adapter_names`.
    AdapterIndex(u32)
);
unit!(
    /// A sequence as router and shard know it; never used twice while a `Run` stream is open.
    SequenceId(u64)
);
unit!(
    /// A rank of a tensor-parallel group.
    Rank(u32)
);
