//! As `amx.rs`, where there are no such instructions: no value of these types exists.

pub(crate) const TILE: usize = 16;
pub(crate) const TILE_K: usize = 2 * TILE;
pub(crate) const TILE_ROW_BYTES: usize = 64;
pub(crate) const TILE_BYTES: usize = TILE * TILE_ROW_BYTES;

#[derive(Clone, Copy)]
pub(crate) enum Amx {}

impl Amx {
    pub(crate) fn detect() -> Option<Self> {
        None
    }

    pub(crate) fn shape(self, _rows: usize, _columns: usize) -> Shaped {
        Shaped(self)
    }

    pub(crate) fn multiply_registers(self, _repeats: usize) -> usize {
        match self {}
    }
}

/// Its field is hidden, so that the compiler does not warn of what others do with it, which is never reached.
pub(crate) struct Shaped(Amx);

#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) first: *const u8,
    pub(crate) stride: usize,
    pub(crate) step: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub(crate) first: *mut f32,
    pub(crate) stride: usize,
    pub(crate) carries_on: bool,
}

#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) soon: *const u8,
    pub(crate) later: *const u8,
}

impl Ahead {
    pub(crate) const SOON_BYTES: usize = 512;
    pub(crate) const LATER_BYTES: usize = 128;
}

impl Shaped {
    pub(crate) fn reshape(&mut self, _rows: usize, _columns: usize) {
        match self.0 {}
    }

    pub(crate) unsafe fn row<const RIGHT: usize>(
        &self,
        left: Left,
        right: *const u8,
        steps: usize,
        sums: Sums,
    ) {
        let _ = (left.first, left.stride, left.step, right, steps, sums.first, sums.stride, sums.carries_on);
        match self.0 {}
    }

    pub(crate) fn zero(&mut self) {
        match self.0 {}
    }

    pub(crate) unsafe fn add<const RIGHT: usize>(&mut self, left: *const u8, right: *const u8) {
        let _ = (left, right);
        match self.0 {}
    }

    pub(crate) unsafe fn store<const RIGHT: usize>(&mut self, first: *mut f32, stride: usize) {
        let _ = (first, stride);
        match self.0 {}
    }

    pub(crate) unsafe fn square<const RIGHT: usize>(
        &self,
        left: Left,
        lower: *const u8,
        right: *const u8,
        steps: usize,
        sums: Sums,
        ahead: Ahead,
    ) {
        let _ = (left, lower, right, steps, sums, ahead.soon, ahead.later);
        match self.0 {}
    }
}
