//! Products of tiles of bf16 (Intel AMX): sixteen by sixteen sums of f32, each over pairs of bf16, in one instruction of sixteen
//! cycles. A sum is carried on from pair to pair in the order of k, in whatever company.
//!
//! The compiler knows no tile registers, so the loops are whole pieces of assembly. Registers 0 to 3 hold sums, 4 and 5 tiles of
//! the left operand, 6 and 7 tiles of the right one.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile, and pairs of bf16 in a row of it.
pub(crate) const TILE: usize = 16;
/// Elements of k that one instruction multiplies.
pub(crate) const TILE_K: usize = 2 * TILE;
/// Bytes of a full row of a tile.
pub(crate) const TILE_ROW_BYTES: usize = 64;
/// Bytes of a full tile.
pub(crate) const TILE_BYTES: usize = TILE * TILE_ROW_BYTES;

/// Exists only where this CPU multiplies tiles and the system lets this process.
#[derive(Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    pub(crate) fn detect() -> Option<Self> {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        AVAILABLE.get_or_init(|| has_instructions() && ask_system()).then_some(Self(()))
    }

    /// Shapes the tile registers of this thread, until the result is dropped: `rows` of the left operand, `columns` of the
    /// right one, at most [`TILE`] each.
    #[expect(clippy::unused_self, reason = "a value is the proof that the instructions exist")]
    pub(crate) fn shape(self, rows: usize, columns: usize) -> Shaped {
        let mut shaped = Shaped { columns, of_this_thread: PhantomData };
        shaped.reshape(rows, columns);
        shaped
    }

    /// Multiplies what is in registers so often, and returns how many operations on numbers that is: for what measures the CPU.
    pub(crate) fn multiply_registers(self, repeats: usize) -> usize {
        let shaped = self.shape(TILE, TILE);
        // SAFETY: the CPU has the instructions, and the registers a shape.
        unsafe {
            asm!(
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {repeats}",
                "jnz 2b",
                repeats = inout(reg) repeats.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack)
            );
        }
        drop(shaped);
        4 * 2 * TILE * TILE * TILE_K * repeats.max(1)
    }
}

fn has_instructions() -> bool {
    const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
    let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
    std::arch::x86_64::__cpuid(0).eax >= 7 && edx & TILE_AND_BF16 == TILE_AND_BF16
}

/// Linux gives tile registers, whose 8 KiB each switch of threads then saves, only to processes that ask.
#[cfg(target_os = "linux")]
fn ask_system() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: changes what this process may use, nothing else.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask_system() -> bool {
    false
}

/// What the instruction reads (Intel's manual, "TILECFG").
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tile registers of this thread, in use.
pub(crate) struct Shaped {
    columns: usize,
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Shaped {
    fn drop(&mut self) {
        // SAFETY: the CPU has the instruction; nobody else uses tile registers.
        unsafe {
            asm!("tilerelease", options(nostack, preserves_flags));
        }
    }
}

/// The left operand: rows of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) first: *const u8,
    /// Bytes from row to row.
    pub(crate) stride: usize,
    /// Bytes from what is multiplied in one step to that of the next: 64 where rows lie as they are.
    pub(crate) step: usize,
}

/// A row-major matrix of f32, whose tiles are sums.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub(crate) first: *mut f32,
    /// Bytes from row to row.
    pub(crate) stride: usize,
    /// Whether what is there is added to; else sums begin at zero.
    pub(crate) carries_on: bool,
}

/// What is asked for, for the L2 cache, beside each step of [`Shaped::square`]; addresses may be any.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// [`Ahead::SOON_BYTES`] beside each step.
    pub(crate) soon: *const u8,
    /// [`Ahead::LATER_BYTES`] beside each step.
    pub(crate) later: *const u8,
}

impl Ahead {
    pub(crate) const SOON_BYTES: usize = 512;
    pub(crate) const LATER_BYTES: usize = 128;
}

/// A loop over k: zeroes or loads sums, runs the lines for each step, stores sums. Tiles are named by register, register of their
/// row of tiles, and offset in it.
macro_rules! tile_loop {
    ($steps:expr, $sums:expr, [$($tile:literal $row:literal $offset:literal)*], $($line:literal,)* in: $($operand:tt)*) => {
        asm!(
            "test {carries_on}, {carries_on}",
            "jnz 3f",
            $(concat!("tilezero ", $tile),)*
            "jmp 2f",
            "3:",
            $(concat!("tileloadd ", $tile, ", [", $row, " + {sums_line}*1 + ", $offset, "]"),)*
            ".p2align 4",
            "2:",
            $($line,)*
            "dec {steps}",
            "jnz 2b",
            $(concat!("tilestored [", $row, " + {sums_line}*1 + ", $offset, "], ", $tile),)*
            steps = inout(reg) $steps => _,
            carries_on = in(reg) usize::from($sums.carries_on),
            sums = in(reg) $sums.first,
            sums_line = in(reg) $sums.stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
            $($operand)*
        )
    };
}

impl Shaped {
    /// Another shape, as of [`Amx::shape`]; what is in registers is lost.
    pub(crate) fn reshape(&mut self, rows: usize, columns: usize) {
        assert!((1..=TILE).contains(&rows) && (1..=TILE).contains(&columns), "{rows} x {columns}");
        let (sums, left, right) = ((rows, 4 * columns), (rows, TILE_ROW_BYTES), (TILE, 4 * columns));
        let shapes = [sums, sums, sums, sums, left, left, right, right];
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in shapes.into_iter().enumerate() {
            (config.rows[i], config.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        // SAFETY: the CPU has the instruction, `config` is a valid palette, and only this module uses tile registers.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
        }
        self.columns = columns;
    }

    /// One tile of rows times `RIGHT` (1 to 4) tiles side by side, over `steps` (at least one) tiles of k.
    ///
    /// `right`: `[step][tile][pair of k][column]`, without gaps. `sums`: a tile high, `RIGHT` full tiles wide.
    ///
    /// # Safety
    /// The operands can be read, and the sums written, as far as said, for the rows and columns of this shape.
    #[inline(always)]
    pub(crate) unsafe fn row<const RIGHT: usize>(
        &self,
        left: Left,
        right: *const u8,
        steps: usize,
        sums: Sums,
    ) {
        debug_assert!(steps > 0);
        let right_line = 4 * self.columns;
        macro_rules! run {
            ([$($tile:literal $row:literal $offset:literal)*], $($load:literal $product:literal,)*) => {{
                tile_loop!(
                    steps, sums, [$($tile $row $offset)*],
                    "tileloadd tmm4, [{left} + {left_line}*1]",
                    $($load, "add {right}, {right_tile}", $product,)*
                    "add {left}, {left_step}",
                    in: left = inout(reg) left.first => _,
                    left_line = in(reg) left.stride,
                    left_step = in(reg) left.step,
                    right = inout(reg) right => _,
                    right_line = in(reg) right_line,
                    right_tile = in(reg) TILE * right_line
                );
            }};
        }
        // SAFETY: the caller's promise.
        unsafe {
            match RIGHT {
                1 => run!(["tmm0" "{sums}" "0"],
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                ),
                2 => run!(["tmm0" "{sums}" "0" "tmm1" "{sums}" "64"],
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {right_line}*1]" "tdpbf16ps tmm1, tmm4, tmm7",
                ),
                3 => run!(["tmm0" "{sums}" "0" "tmm1" "{sums}" "64" "tmm2" "{sums}" "128"],
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {right_line}*1]" "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm2, tmm4, tmm6",
                ),
                4 => {
                    run!(["tmm0" "{sums}" "0" "tmm1" "{sums}" "64" "tmm2" "{sums}" "128" "tmm3" "{sums}" "192"],
                        "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{right} + {right_line}*1]" "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm2, tmm4, tmm6",
                        "tileloadd tmm7, [{right} + {right_line}*1]" "tdpbf16ps tmm3, tmm4, tmm7",
                    );
                }
                _ => unreachable!("no registers for {RIGHT} tiles"),
            }
        }
    }

    /// Begins the sums of [`Shaped::add`] at zero.
    #[expect(clippy::unused_self, reason = "only who has the registers may")]
    pub(crate) fn zero(&mut self) {
        // SAFETY: the CPU has the instruction, and the registers a shape.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2",
                out("tmm0") _, out("tmm1") _, out("tmm2") _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// One step of [`Shaped::row`] with up to three tiles, for a left operand without gaps that is made on the way. The sums stay in
    /// registers, of which the compiler uses none, until any other function than [`Shaped::store`] is called.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn add<const RIGHT: usize>(&mut self, left: *const u8, right: *const u8) {
        let right_line = 4 * self.columns;
        macro_rules! run {
            ($($load:literal $product:literal,)*) => {{
                asm!(
                    "tileloadd tmm4, [{left} + {left_line}*1]",
                    $($load, "add {right}, {right_tile}", $product,)*
                    left = in(reg) left,
                    left_line = in(reg) TILE_ROW_BYTES,
                    right = inout(reg) right => _,
                    right_line = in(reg) right_line,
                    right_tile = in(reg) TILE * right_line,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly)
                );
            }};
        }
        // SAFETY: the caller's promise.
        unsafe {
            match RIGHT {
                1 => run!(
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                ),
                2 => run!(
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {right_line}*1]" "tdpbf16ps tmm1, tmm4, tmm7",
                ),
                3 => run!(
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {right_line}*1]" "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{right} + {right_line}*1]" "tdpbf16ps tmm2, tmm4, tmm6",
                ),
                _ => unreachable!("no registers for {RIGHT} tiles"),
            }
        }
    }

    /// Writes the sums of [`Shaped::add`].
    ///
    /// # Safety
    /// They can be written, for the rows and columns of this shape.
    #[inline(always)]
    #[expect(clippy::unused_self, reason = "only who has the registers may")]
    pub(crate) unsafe fn store<const RIGHT: usize>(&mut self, first: *mut f32, stride: usize) {
        macro_rules! run {
            ($($line:literal)*) => {{
                asm!($($line,)* sums = in(reg) first, line = in(reg) stride, options(nostack, preserves_flags));
            }};
        }
        // SAFETY: the caller's promise.
        unsafe {
            run!("tilestored [{sums} + {line}*1], tmm0");
            if RIGHT > 1 {
                run!("tilestored [{sums} + {line}*1 + 64], tmm1");
            }
            if RIGHT > 2 {
                run!("tilestored [{sums} + {line}*1 + 128], tmm2");
            }
        }
    }

    /// Two tiles of rows, `left` and `lower`, which have the same stride and step, times `RIGHT` (1 or 2) tiles; otherwise as
    /// [`Shaped::row`]. All tiles are full. Asks for `soon` and `later` meanwhile.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn square<const RIGHT: usize>(
        &self,
        left: Left,
        lower: *const u8,
        right: *const u8,
        steps: usize,
        sums: Sums,
        ahead: Ahead,
    ) {
        debug_assert!(steps > 0 && self.columns == TILE);
        macro_rules! run {
            ([$($tile:literal $row:literal $offset:literal)*], $($line:literal,)*) => {{
                tile_loop!(
                    steps, sums, [$($tile $row $offset)*],
                    "tileloadd tmm4, [{left} + {left_line}*1]",
                    "tileloadd tmm6, [{right} + {line}*1]", "tdpbf16ps tmm0, tmm4, tmm6",
                    $($line,)*
                    "add {left}, {left_step}",
                    "add {lower}, {left_step}",
                    "prefetcht1 [{soon}]", "prefetcht1 [{soon} + 64]",
                    "prefetcht1 [{soon} + 128]", "prefetcht1 [{soon} + 192]",
                    "prefetcht1 [{soon} + 256]", "prefetcht1 [{soon} + 320]",
                    "prefetcht1 [{soon} + 384]", "prefetcht1 [{soon} + 448]",
                    "add {soon}, 512",
                    "prefetcht1 [{later}]", "prefetcht1 [{later} + 64]",
                    "add {later}, 128",
                    in: left = inout(reg) left.first => _,
                    lower = inout(reg) lower => _,
                    left_line = in(reg) left.stride,
                    left_step = in(reg) left.step,
                    right = inout(reg) right => _,
                    line = in(reg) TILE_ROW_BYTES,
                    soon = inout(reg) ahead.soon => _,
                    later = inout(reg) ahead.later => _,
                    lower_sums = in(reg) sums.first.cast::<u8>().wrapping_add(TILE * sums.stride)
                );
            }};
        }
        // SAFETY: the caller's promise.
        unsafe {
            match RIGHT {
                1 => run!(["tmm0" "{sums}" "0" "tmm2" "{lower_sums}" "0"],
                    "tileloadd tmm5, [{lower} + {left_line}*1]", "tdpbf16ps tmm2, tmm5, tmm6",
                    "add {right}, 1024",
                ),
                2 => {
                    run!(["tmm0" "{sums}" "0" "tmm1" "{sums}" "64" "tmm2" "{lower_sums}" "0" "tmm3" "{lower_sums}" "64"],
                        "tileloadd tmm7, [{right} + {line}*1 + 1024]", "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{lower} + {left_line}*1]", "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        "add {right}, 2048",
                    );
                }
                _ => unreachable!("no registers for {RIGHT} tiles"),
            }
        }
    }
}
