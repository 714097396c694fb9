//! As `amx.rs`, in plain Rust, for tests where the CPU has no such instructions: what each reads, writes and adds up, in its
//! order (Intel's manual, "TILELOADD", "TDPBF16PS", "TILESTORED"). Products of two bf16 are f32 exactly.

use std::marker::PhantomData;

pub(crate) const TILE: usize = 16;
pub(crate) const TILE_K: usize = 2 * TILE;
pub(crate) const TILE_ROW_BYTES: usize = 64;
pub(crate) const TILE_BYTES: usize = TILE * TILE_ROW_BYTES;

#[derive(Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    #[expect(clippy::unnecessary_wraps, reason = "as of the instructions")]
    pub(crate) fn detect() -> Option<Self> {
        Some(Self(()))
    }

    #[expect(clippy::unused_self, reason = "as of the instructions")]
    pub(crate) fn shape(self, rows: usize, columns: usize) -> Shaped {
        let mut shaped =
            Shaped { rows, columns, sums: [[[0.0; TILE]; TILE]; 3], of_this_thread: PhantomData };
        shaped.reshape(rows, columns);
        shaped
    }

    #[expect(clippy::unused_self, reason = "as of the instructions")]
    pub(crate) fn multiply_registers(self, repeats: usize) -> usize {
        4 * 2 * TILE * TILE * TILE_K * repeats.max(1)
    }
}

/// Sums of a tile.
type Tile = [[f32; TILE]; TILE];
/// Pairs of bf16, widened.
type Pairs = [[f32; TILE_K]; TILE];

pub(crate) struct Shaped {
    rows: usize,
    columns: usize,
    /// Of [`Shaped::add`].
    sums: [Tile; 3],
    of_this_thread: PhantomData<*const ()>,
}

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
#[expect(dead_code, reason = "nothing is asked for ahead")]
pub(crate) struct Ahead {
    pub(crate) soon: *const u8,
    pub(crate) later: *const u8,
}

impl Ahead {
    pub(crate) const SOON_BYTES: usize = 512;
    pub(crate) const LATER_BYTES: usize = 128;
}

/// Rows of pairs, so many bytes of each; denormal numbers count as zeros.
unsafe fn load_pairs(first: *const u8, stride: usize, rows: usize, bytes: usize) -> Pairs {
    let mut pairs = [[0.0; TILE_K]; TILE];
    for (row, pairs) in pairs.iter_mut().enumerate().take(rows) {
        for (i, to) in pairs.iter_mut().enumerate().take(bytes / 2) {
            // SAFETY: the caller's promise.
            let bits = unsafe { first.wrapping_add(row * stride + 2 * i).cast::<u16>().read_unaligned() };
            *to = if bits & 0x7f80 == 0 { 0.0 } else { f32::from_bits(u32::from(bits) << 16) };
        }
    }
    pairs
}

impl Shaped {
    pub(crate) fn reshape(&mut self, rows: usize, columns: usize) {
        assert!((1..=TILE).contains(&rows) && (1..=TILE).contains(&columns), "{rows} x {columns}");
        (self.rows, self.columns) = (rows, columns);
        self.sums = [[[f32::NAN; TILE]; TILE]; 3];
    }

    unsafe fn left(&self, first: *const u8, stride: usize) -> Pairs {
        // SAFETY: the caller's promise.
        unsafe { load_pairs(first, stride, self.rows, TILE_ROW_BYTES) }
    }

    unsafe fn right(&self, first: *const u8) -> Pairs {
        // SAFETY: the caller's promise.
        unsafe { load_pairs(first, 4 * self.columns, TILE, 4 * self.columns) }
    }

    unsafe fn load_sums(&self, first: *const f32, stride: usize) -> Tile {
        let mut tile = [[0.0; TILE]; TILE];
        for (row, tile) in tile.iter_mut().enumerate().take(self.rows) {
            for (column, to) in tile.iter_mut().enumerate().take(self.columns) {
                // SAFETY: the caller's promise.
                *to = unsafe {
                    first.cast::<u8>().wrapping_add(row * stride + 4 * column).cast::<f32>().read_unaligned()
                };
            }
        }
        tile
    }

    unsafe fn store_sums(&self, tile: &Tile, first: *mut f32, stride: usize) {
        for (row, tile) in tile.iter().enumerate().take(self.rows) {
            for (column, &sum) in tile.iter().enumerate().take(self.columns) {
                // SAFETY: the caller's promise.
                unsafe {
                    first
                        .cast::<u8>()
                        .wrapping_add(row * stride + 4 * column)
                        .cast::<f32>()
                        .write_unaligned(sum);
                }
            }
        }
    }

    fn multiply(&self, sums: &mut Tile, left: &Pairs, right: &Pairs) {
        for (sums, left) in sums.iter_mut().zip(left).take(self.rows) {
            let mut both = [0.0; TILE_K];
            for (pair, right) in left.as_chunks::<2>().0.iter().zip(right) {
                for (i, sum) in both.iter_mut().enumerate() {
                    *sum += pair[i % 2] * right[i];
                }
            }
            for (sum, [even, odd]) in sums.iter_mut().zip(both.as_chunks::<2>().0).take(self.columns) {
                *sum += even + odd;
            }
        }
    }

    pub(crate) unsafe fn row<const RIGHT: usize>(
        &self,
        left: Left,
        right: *const u8,
        steps: usize,
        sums: Sums,
    ) {
        assert!(steps > 0 && (1..=4).contains(&RIGHT));
        let right_tile = 4 * TILE * self.columns;
        for tile in 0..RIGHT {
            let to = sums.first.wrapping_add(tile * TILE);
            // SAFETY: the caller's promise.
            unsafe {
                let mut tile_sums =
                    if sums.carries_on { self.load_sums(to, sums.stride) } else { [[0.0; TILE]; TILE] };
                for step in 0..steps {
                    let left = self.left(left.first.wrapping_add(step * left.step), left.stride);
                    let right = self.right(right.wrapping_add((step * RIGHT + tile) * right_tile));
                    self.multiply(&mut tile_sums, &left, &right);
                }
                self.store_sums(&tile_sums, to, sums.stride);
            }
        }
    }

    pub(crate) fn zero(&mut self) {
        self.sums = [[[0.0; TILE]; TILE]; 3];
    }

    pub(crate) unsafe fn add<const RIGHT: usize>(&mut self, left: *const u8, right: *const u8) {
        assert!((1..=3).contains(&RIGHT));
        // SAFETY: the caller's promise.
        unsafe {
            let left = self.left(left, TILE_ROW_BYTES);
            for tile in 0..RIGHT {
                let right = self.right(right.wrapping_add(tile * 4 * TILE * self.columns));
                let mut sums = self.sums[tile];
                self.multiply(&mut sums, &left, &right);
                self.sums[tile] = sums;
            }
        }
    }

    pub(crate) unsafe fn store<const RIGHT: usize>(&mut self, first: *mut f32, stride: usize) {
        for tile in 0..RIGHT {
            // SAFETY: the caller's promise.
            unsafe { self.store_sums(&self.sums[tile], first.wrapping_add(tile * TILE), stride) }
        }
    }

    pub(crate) unsafe fn square<const RIGHT: usize>(
        &self,
        left: Left,
        lower: *const u8,
        right: *const u8,
        steps: usize,
        sums: Sums,
        _: Ahead,
    ) {
        assert!(self.columns == TILE && self.rows == TILE);
        let lower_sums = sums.first.cast::<u8>().wrapping_add(TILE * sums.stride).cast();
        // SAFETY: the caller's promise.
        unsafe {
            self.row::<RIGHT>(left, right, steps, sums);
            self.row::<RIGHT>(
                Left { first: lower, ..left },
                right,
                steps,
                Sums { first: lower_sums, ..sums },
            );
        }
    }
}
