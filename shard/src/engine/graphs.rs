//! Recorded decode steps: launching one costs the host as much as launching a single kernel.
//!
//! A graph is for a number of rows, to which smaller batches are padded, and for batches with or without adapters. All else,
//! such as lengths and blocks, is read from device memory, so one graph serves every length of contexts, and all are recorded
//! before the first step.

use std::collections::HashMap;

use kernels::Graph;

use super::validate::Limits;

/// What a recorded step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
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

impl Extent {
    pub(super) const ALL: [Self; 2] = [Self::Whole, Self::Forward];
}

/// The graphs of one serving.
pub(super) struct Graphs {
    /// Rows, ascending.
    sizes: Vec<usize>,
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
        Self { sizes, has_adapters: limits.num_adapters > 0, recorded: HashMap::new() }
    }

    /// All shapes, the largest batches first.
    pub(super) fn shapes(&self) -> Vec<Shape> {
        let adapters: &[Adapters] =
            if self.has_adapters { &[Adapters::None, Adapters::Any] } else { &[Adapters::None] };
        let sizes = self.sizes.iter().rev();
        sizes.flat_map(|&rows| adapters.iter().map(move |&adapters| Shape { rows, adapters })).collect()
    }

    /// How many graphs there will be.
    pub(super) fn num_planned(&self) -> usize {
        self.shapes().len() * Extent::ALL.len()
    }

    /// What a batch of decode rows is padded to; none where steps of its size are not recorded.
    pub(super) fn shape(&self, num_rows: usize, adapters: Adapters) -> Option<Shape> {
        let rows = *self.sizes.iter().find(|&&size| size >= num_rows)?;
        Some(Shape { rows, adapters })
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
                tracing::warn!(rows = shape.rows, %error, "a decode step cannot be recorded as a CUDA graph");
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
    fn batches_are_padded_to_the_next_size() {
        let limits = Limits { max_step_tokens: 512, max_step_sequences: 20, num_adapters: 0, ..LIMITS };
        let graphs = Graphs::new(&[1, 2, 8, 32, 64], &limits);
        let check = |rows, expected: usize| {
            assert_eq!(graphs.shape(rows, Adapters::None).expect("a shape").rows, expected);
        };
        check(1, 1);
        check(3, 8);
        // No step has more sequences.
        check(9, 20);
        assert_eq!(graphs.shape(21, Adapters::None), None);
        let shapes: Vec<_> = graphs.shapes().iter().map(|shape| shape.rows).collect();
        assert_eq!((shapes, graphs.num_planned()), (vec![20, 8, 2, 1], 8));
    }

    #[test]
    fn where_there_are_adapters_each_size_is_recorded_with_and_without() {
        let graphs = Graphs::new(&[1, 2], &Limits { num_adapters: 2, ..LIMITS });
        let shapes: Vec<_> = graphs.shapes().into_iter().map(|shape| (shape.rows, shape.adapters)).collect();
        let (none, any) = (Adapters::None, Adapters::Any);
        assert_eq!(shapes, [(2, none), (2, any), (1, none), (1, any)]);
    }

    #[test]
    fn without_sizes_nothing_is_recorded() {
        let graphs = Graphs::new(&[], &LIMITS);
        assert_eq!((graphs.shape(1, Adapters::None), graphs.num_planned(), graphs.len()), (None, 0, 0));
    }

    #[test]
    fn what_cannot_be_recorded_is_tried_once() {
        let mut graphs = Graphs::new(&[1], &LIMITS);
        let shape = graphs.shape(1, Adapters::None).unwrap();
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
