//! Recorded decode steps: launching one costs the host as much as launching a single kernel.
//!
//! A graph is for a number of rows, to which smaller batches are padded, and for tables of a number of blocks, a power of two:
//! all else, such as lengths and blocks, is read from device memory.

use std::collections::HashMap;

use kernels::Graph;

use super::validate::Limits;

/// Columns of the tables of the first graphs: contexts up to 1024 tokens in blocks of 32.
const LEAST_BLOCKS: usize = 32;

/// What a recorded step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    /// Columns of the block tables.
    pub(super) max_blocks: usize,
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
        Self { sizes, most_blocks, recorded: HashMap::new() }
    }

    /// The shapes to record before the first step: short contexts, the largest batches first.
    pub(super) fn first_shapes(&self) -> Vec<Shape> {
        let max_blocks = self.columns(1);
        self.sizes.iter().rev().map(|&rows| Shape { rows, max_blocks }).collect()
    }

    /// What a batch of decode rows is padded to; none where steps of its size are not recorded.
    pub(super) fn shape(&self, num_rows: usize, max_blocks: usize) -> Option<Shape> {
        let rows = *self.sizes.iter().find(|&&size| size >= num_rows)?;
        Some(Shape { rows, max_blocks: self.columns(max_blocks) })
    }

    fn columns(&self, max_blocks: usize) -> usize {
        max_blocks.next_power_of_two().max(LEAST_BLOCKS).min(self.most_blocks)
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
                let Shape { rows, max_blocks } = shape;
                tracing::warn!(rows, max_blocks, %error, "a decode step cannot be recorded as a CUDA graph");
            })
        });
        recorded.as_ref().ok()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.recorded.values().flatten().count()
    }
}

#[cfg(test)]
mod tests {
    use super::super::validate::tests::LIMITS;
    use super::*;

    #[test]
    fn batches_are_padded_to_the_next_size_and_tables_to_a_power_of_two() {
        let limits =
            Limits { max_step_tokens: 512, max_step_sequences: 20, max_total_tokens: 4 * 100, ..LIMITS };
        let graphs = Graphs::new(&[1, 2, 8, 32, 64], &limits);
        let check = |rows, blocks, expected: (usize, usize)| {
            let Shape { rows, max_blocks } = graphs.shape(rows, blocks).expect("a shape");
            assert_eq!((rows, max_blocks), expected);
        };
        check(1, 3, (1, 32));
        check(3, 33, (8, 64));
        // No sequence has more blocks, and no step more sequences.
        check(9, 65, (20, 100));
        assert_eq!(graphs.shape(21, 1), None);
        let first: Vec<_> = graphs.first_shapes().iter().map(|shape| shape.rows).collect();
        assert_eq!(first, [20, 8, 2, 1]);
    }

    #[test]
    fn without_sizes_nothing_is_recorded() {
        let graphs = Graphs::new(&[], &LIMITS);
        assert_eq!((graphs.shape(1, 1), graphs.first_shapes().len(), graphs.len()), (None, 0, 0));
    }

    #[test]
    fn what_cannot_be_recorded_is_tried_once() {
        let mut graphs = Graphs::new(&[1], &LIMITS);
        let shape = graphs.shape(1, 1).unwrap();
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
