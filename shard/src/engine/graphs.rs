//! Recorded decode steps: launching one costs the host as much as launching a single kernel.
//!
//! A graph is for a number of rows, to which smaller batches are padded, and for batches with or without adapters: all else, such
//! as lengths and blocks, is read from device memory. A launch has as many blocks as the longest context of its graph needs, and
//! those that a step's contexts do not need take time to begin and end; so contexts up to 1024, 2048 and 4096 tokens have graphs
//! of their own. One is for all longer ones.

use std::collections::HashMap;

use kernels::Graph;
use kernels::ops::attention::SAME_LAUNCH_FROM_TOKENS;

use super::validate::Limits;

/// Of the first graphs: contexts up to 1024 tokens in blocks of 32.
const LEAST_BLOCKS: usize = 32;

/// What a recorded step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    /// Of the longest context.
    pub(super) max_blocks: usize,
    pub(super) adapters: Adapters,
}

/// Whether a step computes what adapters change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Adapters {
    /// No row has one: nothing is launched for them.
    None,
    /// Any of them, on any rows.
    Any,
}

/// How much of a step is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Extent {
    /// All of it.
    Whole,
    /// Up to the last layer: what follows waits for masks.
    Forward,
}

/// The graphs of one serving.
pub(super) struct Graphs {
    /// Rows, ascending.
    sizes: Vec<usize>,
    /// Blocks of the longest sequence.
    most_blocks: usize,
    /// From so many blocks on, one graph is for all lengths.
    same_from_blocks: usize,
    has_adapters: bool,
    /// Or why one could not be recorded.
    recorded: HashMap<(Shape, Extent), kernels::Result<Graph>>,
}

impl Graphs {
    /// For batches of up to each of `sizes` rows, as far as a step can have them.
    pub(super) fn new(sizes: &[usize], limits: &Limits) -> Self {
        let most_rows = limits.max_logit_rows();
        let mut sizes: Vec<_> =
            sizes.iter().map(|&size| size.min(most_rows)).filter(|&size| size > 0).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let most_blocks = limits.max_total_tokens.div_ceil(limits.block_size);
        let same_from_blocks = SAME_LAUNCH_FROM_TOKENS.div_ceil(limits.block_size);
        let has_adapters = limits.num_adapters > 0;
        Self { sizes, most_blocks, same_from_blocks, has_adapters, recorded: HashMap::new() }
    }

    /// The shapes to record before the first step: short contexts, the largest batches first.
    pub(super) fn first_shapes(&self) -> Vec<Shape> {
        let max_blocks = self.columns(1);
        let adapters: &[Adapters] =
            if self.has_adapters { &[Adapters::None, Adapters::Any] } else { &[Adapters::None] };
        let sizes = self.sizes.iter().rev();
        sizes
            .flat_map(|&rows| adapters.iter().map(move |&adapters| Shape { rows, max_blocks, adapters }))
            .collect()
    }

    /// What a batch of decode rows is padded to; none where steps of its size are not recorded.
    pub(super) fn shape(&self, num_rows: usize, max_blocks: usize, adapters: Adapters) -> Option<Shape> {
        let rows = *self.sizes.iter().find(|&&size| size >= num_rows)?;
        Some(Shape { rows, max_blocks: self.columns(max_blocks), adapters })
    }

    fn columns(&self, max_blocks: usize) -> usize {
        match max_blocks.next_power_of_two().max(LEAST_BLOCKS) {
            columns if columns < self.same_from_blocks => columns.min(self.most_blocks),
            _ => self.most_blocks,
        }
    }

    /// The graph of a shape, recorded by `record` when it is asked for the first time.
    pub(super) fn get(
        &mut self,
        shape: Shape,
        extent: Extent,
        record: impl FnOnce() -> kernels::Result<Graph>,
    ) -> Option<&Graph> {
        let recorded = self.recorded.entry((shape, extent)).or_insert_with(|| {
            record().inspect_err(|error| {
                let Shape { rows, max_blocks, .. } = shape;
                tracing::warn!(rows, max_blocks, %error, "a decode step cannot be recorded as a CUDA graph");
            })
        });
        recorded.as_ref().ok()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.recorded.values().flatten().count()
    }

    /// Of each whole step that was recorded, its shape and how many kernels of ours it launches.
    pub(super) fn launches(&self) -> Vec<(Shape, usize)> {
        let whole = self.recorded.iter().filter(|((_, extent), _)| *extent == Extent::Whole);
        whole.filter_map(|((shape, _), graph)| Some((*shape, graph.as_ref().ok()?.num_launches()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::validate::tests::LIMITS;
    use super::*;

    #[test]
    fn batches_are_padded_to_the_next_size_and_tables_to_a_power_of_two() {
        let limits = Limits {
            max_step_tokens: 512,
            max_step_sequences: 20,
            max_total_tokens: 4 * 100,
            num_adapters: 0,
            ..LIMITS
        };
        let graphs = Graphs::new(&[1, 2, 8, 32, 64], &limits);
        let check = |rows, blocks, expected: (usize, usize)| {
            let Shape { rows, max_blocks, .. } = graphs.shape(rows, blocks, Adapters::None).expect("a shape");
            assert_eq!((rows, max_blocks), expected);
        };
        check(1, 3, (1, 32));
        check(3, 33, (8, 64));
        // No sequence has more blocks, and no step more sequences.
        check(9, 65, (20, 100));
        assert_eq!(graphs.shape(21, 1, Adapters::None), None);
        let first: Vec<_> = graphs.first_shapes().iter().map(|shape| shape.rows).collect();
        assert_eq!(first, [20, 8, 2, 1]);
    }

    #[test]
    fn one_graph_is_for_all_long_contexts() {
        let limits = Limits { max_total_tokens: 1 << 17, block_size: 32, num_adapters: 0, ..LIMITS };
        let graphs = Graphs::new(&[1], &limits);
        let columns: Vec<_> = [1, 32, 33, 100, 128, 129, 256, 257, 4096]
            .map(|blocks| graphs.shape(1, blocks, Adapters::None).expect("a shape").max_blocks)
            .to_vec();
        assert_eq!(columns, [32, 32, 64, 128, 128, 4096, 4096, 4096, 4096]);
    }

    #[test]
    fn where_there_are_adapters_each_size_is_recorded_with_and_without() {
        let graphs = Graphs::new(&[1, 2], &Limits { num_adapters: 2, ..LIMITS });
        let first: Vec<_> =
            graphs.first_shapes().into_iter().map(|shape| (shape.rows, shape.adapters)).collect();
        let (none, any) = (Adapters::None, Adapters::Any);
        assert_eq!(first, [(2, none), (2, any), (1, none), (1, any)]);
    }

    #[test]
    fn without_sizes_nothing_is_recorded() {
        let graphs = Graphs::new(&[], &LIMITS);
        assert_eq!(
            (graphs.shape(1, 1, Adapters::None), graphs.first_shapes().len(), graphs.len()),
            (None, 0, 0)
        );
    }

    #[test]
    fn what_cannot_be_recorded_is_tried_once() {
        let mut graphs = Graphs::new(&[1], &LIMITS);
        let shape = graphs.shape(1, 1, Adapters::None).unwrap();
        let mut tries = 0;
        for _ in 0..2 {
            let record = || {
                tries += 1;
                kernels::Context::cpu(1).capture(|| Ok::<_, kernels::Error>(()))
            };
            assert!(graphs.get(shape, Extent::Whole, record).is_none());
        }
        assert_eq!(tries, 1);
    }
}
