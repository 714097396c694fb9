//! How many blocks stay free for sequences that run when others are let in.

/// Most blocks that are kept for each running sequence.
const MAX_BLOCKS: f32 = 16.0;
/// Of a block, what a sequence that ends takes from the headroom.
const DECREASE: f32 = 1.0 / 16.0;

/// Blocks kept for each running sequence: the watermark below which nobody is let in.
///
/// One block is the least, since a running sequence will soon ask for it. Who is let in above that and preempted when the
/// others have grown has computed his prompt in vain; so each preemption doubles the headroom, and each sequence that comes
/// to its end lowers it by a little. Where outputs are short or blocks plenty it stays at one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Headroom {
    blocks: f32,
}

impl Headroom {
    pub(crate) fn new() -> Self {
        Self { blocks: 1.0 }
    }

    /// Blocks for each running sequence.
    pub(crate) fn blocks(self) -> usize {
        self.blocks as usize
    }

    /// A running sequence had to give its blocks to another one.
    pub(crate) fn preempted(&mut self) {
        self.blocks = (self.blocks * 2.0).min(MAX_BLOCKS);
    }

    /// A running sequence came to its end.
    pub(crate) fn ended(&mut self) {
        self.blocks = (self.blocks - DECREASE).max(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preemptions_raise_it_and_ends_lower_it_within_bounds() {
        let mut headroom = Headroom::new();
        headroom.ended();
        assert_eq!(headroom.blocks(), 1);
        headroom.preempted();
        headroom.preempted();
        assert_eq!(headroom.blocks(), 4);
        (0..16).for_each(|_| headroom.ended());
        assert_eq!(headroom.blocks(), 3);
        (0..100).for_each(|_| headroom.preempted());
        assert_eq!(headroom.blocks(), 16);
        (0..1000).for_each(|_| headroom.ended());
        assert_eq!(headroom.blocks(), 1);
    }
}
