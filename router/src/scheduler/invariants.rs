//! What must hold between any two events.

use super::entry::Running;
use super::state::Scheduler;

impl Scheduler {
    /// Panics where the state contradicts itself. To be called between events.
    pub(crate) fn check_invariants(&self) {
        self.blocks.check_invariants(self.running.values().map(|running| &running.sequence.table));
        self.check_announced();
        for Running { entry, sequence } in self.running.values() {
            let known = entry.len() + sequence.sampling;
            assert!(sequence.computed <= known, "{:?} is computed beyond its end", entry.id);
            let blocks = sequence.computed.div_ceil(self.limits.budget.block_size);
            assert_eq!(
                sequence.table.blocks().len(),
                blocks,
                "{:?} holds other blocks than it needs",
                entry.id
            );
            let rows = self.in_flight.iter().flat_map(|step| &step.rows);
            let rows = rows.filter(|row| row.sequence == sequence.id);
            assert_eq!(sequence.steps_in_flight, rows.clone().count(), "{:?} miscounts its steps", entry.id);
            assert_eq!(
                sequence.sampling,
                rows.filter(|row| row.samples).count(),
                "{:?} miscounts tokens",
                entry.id
            );
        }
        let both = self.queue.iter().find(|entry| self.running.contains_key(&entry.id));
        assert!(both.is_none(), "{both:?} is waiting and running");
        self.fairness.check_invariants(self.queue.len(), self.running.len());
        for entry in self.queue.iter().chain(self.running.values().map(|running| &running.entry)) {
            let prompt_tokens = entry.request.prompt.len();
            assert!(entry.overtaken_by <= prompt_tokens, "{:?} is overtaken by too many", entry.id);
            assert_eq!(self.deadlines.get(entry.id), entry.deadline(), "{:?} has another deadline", entry.id);
        }
        assert!(
            self.deadlines.len() <= self.queue.len() + self.running.len(),
            "a deadline outlives its request"
        );
        assert!(self.in_flight.len() <= self.limits.steps_in_flight, "too many steps in flight");
    }
}
