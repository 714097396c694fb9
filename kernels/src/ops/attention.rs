//! Attention over paged keys and values (Kwon et al. 2023, "PagedAttention", arXiv:2309.06180).

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use half::{bf16, f16};

use super::operands::{
    SharedRows, matrix, matrix_mut, on_cuda, require, require_f32_matrix, require_float, u32_vector,
    unsupported_float,
};
use crate::simd::amx::Amx;
use crate::simd::{Float, LANES, Lanes};
use crate::{Context, DType, Result, View, ViewMut};

mod cache;
#[cfg(feature = "cuda")]
mod cuda;
mod products;
mod rotary_write_kv;
mod state;
mod tables;
mod tile;
mod tiles;

pub use cache::{KvLayer, write_kv};
pub use rotary_write_kv::{HeadNorms, RotaryAndPages, rotary_write_kv};
pub use tables::{BlockTables, NewBlocks};

use tile::{Merge, Output, Splits, Tile, Whole};

const OP: &str = "paged_attention";

/// Where the sequences of a flat batch lie. Sequence `s` owns query rows `query_starts[s] .. query_starts[s + 1]`; the
/// last of them is position `kv_lens[s] - 1`, and each row attends to all positions up to its own.
///
/// The arrays lie where the context computes. What a launch depends on is told beside them, so that a GPU is not waited for;
/// the CPU reads the arrays.
#[derive(Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// u32 `[1, num_sequences + 1]`: ascending row numbers, the first 0.
    pub query_starts: View<'a>,
    /// u32 `[1, num_sequences]`: tokens of each sequence whose keys and values are in the cache, those of this step
    /// included. On a GPU, 0 for a row that only fills a recorded batch up, and gets zeros.
    pub kv_lens: View<'a>,
    /// u32 `[1, num_sequences * max_blocks]` or longer: row by row; entries behind a sequence's last block are not read.
    pub block_tables: View<'a>,
    /// u32 `[1, num_sequences]`: which row of `block_tables` is each sequence's; without it, sequence `s` has row `s`.
    pub table_rows: Option<View<'a>>,
    /// Columns of `block_tables`.
    pub max_blocks: usize,
    /// The first sequences, so many, have one row each.
    pub num_decodes: usize,
    /// The most rows of a sequence.
    pub max_query_len: usize,
}

impl<'a> AttentionBatch<'a> {
    /// Of arrays in host memory.
    pub fn from_slices(
        query_starts: &'a [u32],
        kv_lens: &'a [u32],
        block_tables: &'a [u32],
        max_blocks: usize,
    ) -> Self {
        let vector = |array: &'a [u32]| View::from_slice(array, 1, array.len());
        let rows = || query_starts.windows(2).map(|ends| ends[1].saturating_sub(ends[0]) as usize);
        Self {
            query_starts: vector(query_starts),
            kv_lens: vector(kv_lens),
            block_tables: vector(block_tables),
            table_rows: None,
            max_blocks,
            num_decodes: rows().take_while(|&rows| rows == 1).count(),
            max_query_len: rows().max().unwrap_or(0),
        }
    }
}

/// The arrays of an [`AttentionBatch`] in host memory.
#[derive(Clone, Copy)]
struct Sequences<'a> {
    query_starts: &'a [u32],
    kv_lens: &'a [u32],
    block_tables: &'a [u32],
    table_rows: Option<&'a [u32]>,
    max_blocks: usize,
}

impl<'a> Sequences<'a> {
    fn of(op: &'static str, batch: &AttentionBatch<'a>) -> Result<Self> {
        let vector = |name, view: View<'a>| u32_vector(op, name, view, view.cols());
        Ok(Self {
            query_starts: vector("query_starts", batch.query_starts)?,
            kv_lens: vector("kv_lens", batch.kv_lens)?,
            block_tables: vector("block_tables", batch.block_tables)?,
            table_rows: batch
                .table_rows
                .map(|rows| u32_vector(op, "table_rows", rows, batch.kv_lens.cols()))
                .transpose()?,
            max_blocks: batch.max_blocks,
        })
    }

    /// Its row of the tables, and all behind it; none where there is no such row.
    fn table(&self, sequence: usize) -> Option<&'a [u32]> {
        let row = self.table_rows.map_or(sequence, |rows| rows[sequence] as usize);
        let first = row.checked_mul(self.max_blocks)?;
        let table = self.block_tables.get(first..)?;
        (table.len() >= self.max_blocks).then_some(table)
    }
}

/// How scores are made: the product of query and key times `scale`, then the soft cap, then the ALiBi bias. The vectors lie
/// where the context computes.
#[derive(Clone, Copy)]
pub struct AttentionParams<'a> {
    /// Multiplies the dot products.
    pub scale: f32,
    /// A row attends to the last `window` positions only, its own included; at least 1.
    pub window: Option<usize>,
    /// A score becomes `cap * tanh(score / cap)`; positive (Gemma Team 2024, "Gemma 2", arXiv:2408.00118).
    pub soft_cap: Option<f32>,
    /// f32 `[1, heads]`: slope times (key's position - query's position) is added (Press et al. 2021, "ALiBi",
    /// arXiv:2108.12409).
    pub alibi_slopes: Option<View<'a>>,
    /// f32 `[1, heads]`: a score that takes its part of the softmax and gives no value (Xiao et al. 2023, arXiv:2309.17453; as
    /// learned numbers in gpt-oss).
    pub sinks: Option<View<'a>>,
}

impl AttentionParams<'_> {
    /// Scaled products of all positions up to the row's own, and nothing else.
    pub fn new(scale: f32) -> Self {
        Self { scale, window: None, soft_cap: None, alibi_slopes: None, sinks: None }
    }
}

/// Causal attention of a flat batch of decode rows and prefill chunks over the cache (this step's keys and values must
/// have been written). `query`, `out`: f32 `[rows, heads * head_dim]`, heads a multiple of the cache's kv heads.
///
/// A row's result depends on its query, its position, the parameters and the cache's contents only, not on how a prompt is
/// cut into chunks, on other rows, on the number of threads, or on which blocks hold a sequence: positions are cut at fixed
/// places, and the parts are merged in order (as in Dao et al. 2023, "Flash-Decoding").
pub fn paged_attention(
    context: &Context,
    query: View<'_>,
    cache: &KvLayer,
    batch: &AttentionBatch<'_>,
    params: AttentionParams<'_>,
    out: ViewMut<'_>,
) -> Result<()> {
    check_params(&params)?;
    on_cuda!(context, |device| cuda::paged_attention(device, query, cache, batch, params, &out));
    let sequences = Sequences::of(OP, batch)?;
    check(query, cache, sequences, &out)?;
    let scoring = Scoring::of(params, query.cols() / cache.head_dim)?;
    let tiled = cache.dtype() == DType::BF16 && tiles::fit(cache.block_size, cache.head_dim);
    let amx = context.level().amx().filter(|_| tiled);
    let attention = Attention { query, cache, sequences, scoring, out: SharedRows::new(out), amx };
    PLAN.with_borrow_mut(|plan| {
        attention.plan(context.num_threads(), plan);
        let plan = &SharedPlan::new(plan);
        if attention.is_small(plan.num_tasks()) {
            (0..plan.num_tasks()).for_each(|task| attention.run(context, plan, task));
        } else {
            context.parallel_for(plan.num_tasks(), |task| attention.run(context, plan, task));
        }
    });
    Ok(())
}

fn check(query: View<'_>, cache: &KvLayer, sequences: Sequences<'_>, out: &ViewMut<'_>) -> Result<()> {
    let Sequences { query_starts, kv_lens, block_tables, table_rows, max_blocks } = sequences;
    let shape = (query.rows(), query.cols());
    require_f32_matrix(OP, "query", matrix(query), shape)?;
    require_f32_matrix(OP, "out", matrix_mut(out), shape)?;
    require_float(OP, cache.keys.dtype())?;
    let kv_cols = cache.kv_heads * cache.head_dim;
    require(OP, query.cols().is_multiple_of(kv_cols) && query.cols() > 0, || {
        format!(
            "query has {} columns, expected a multiple of {} kv heads x {}",
            shape.1, cache.kv_heads, cache.head_dim
        )
    })?;
    require(
        OP,
        query_starts.len() == kv_lens.len() + 1
            && (table_rows.is_some() || block_tables.len() >= kv_lens.len() * max_blocks),
        || {
            format!(
                "{} query starts and {} block table entries for {} sequences of {max_blocks} blocks",
                query_starts.len(),
                block_tables.len(),
                kv_lens.len()
            )
        },
    )?;
    let covers = query_starts[0] == 0 && query_starts.last().is_some_and(|&end| end as usize == query.rows());
    require(OP, covers && query_starts.is_sorted(), || {
        format!("query starts {query_starts:?} do not ascend from 0 to the {} rows", query.rows())
    })?;
    for (sequence, &kv_len) in kv_lens.iter().enumerate() {
        let rows = query_starts[sequence + 1] - query_starts[sequence];
        let blocks = (kv_len as usize).div_ceil(cache.block_size);
        require(OP, rows <= kv_len && blocks <= max_blocks, || {
            format!("sequence {sequence} has {rows} rows, {kv_len} tokens and a table of {max_blocks} blocks")
        })?;
        let Some(table) = sequences.table(sequence) else {
            return require(OP, false, || {
                let entries = block_tables.len();
                format!(
                    "sequence {sequence} has a row beyond the {entries} entries of tables of {max_blocks} blocks"
                )
            });
        };
        let table = &table[..blocks];
        require(OP, table.iter().all(|&block| (block as usize) < cache.num_blocks()), || {
            format!(
                "sequence {sequence} has a block beyond the {} of the cache: {table:?}",
                cache.num_blocks()
            )
        })?;
    }
    Ok(())
}

fn check_params(params: &AttentionParams<'_>) -> Result<()> {
    require(OP, params.window != Some(0), || "a window of 0 positions".into())?;
    require(OP, params.soft_cap.is_none_or(|cap| cap > 0.0), || {
        format!("a soft cap of {:?}, expected a positive number", params.soft_cap)
    })
}

/// [`AttentionParams`] in host memory.
#[derive(Clone, Copy)]
struct Scoring<'a> {
    scale: f32,
    window: Option<usize>,
    soft_cap: Option<f32>,
    alibi_slopes: Option<&'a [f32]>,
    sinks: Option<&'a [f32]>,
}

impl<'a> Scoring<'a> {
    fn of(params: AttentionParams<'a>, num_heads: usize) -> Result<Self> {
        let of_heads = |name, vector: Option<View<'a>>| -> Result<Option<&'a [f32]>> {
            let Some(vector) = vector else { return Ok(None) };
            require_f32_matrix(OP, name, matrix(vector), (1, num_heads))?;
            Ok(Some(vector.into_slice()))
        };
        let AttentionParams { scale, window, soft_cap, .. } = params;
        Ok(Self {
            scale,
            window,
            soft_cap,
            alibi_slopes: of_heads("alibi_slopes", params.alibi_slopes)?,
            sinks: of_heads("sinks", params.sinks)?,
        })
    }
}

struct Attention<'a> {
    query: View<'a>,
    cache: &'a KvLayer,
    sequences: Sequences<'a>,
    scoring: Scoring<'a>,
    out: SharedRows<'a>,
    /// Where products of tiles are used.
    amx: Option<Amx>,
}

thread_local! {
    /// Kept from call to call, so that a decode step allocates nothing.
    static PLAN: RefCell<Plan> = RefCell::default();
}

/// How the work is cut into tasks.
#[derive(Default)]
struct Plan {
    sequences: Vec<Planned>,
    /// Of the sequences that are cut along their keys: `[sequences][kv heads, splits, queries, state]`.
    states: Vec<Lanes>,
    /// Of the same: `[sequences][kv heads]` parts that are not done. Whoever does the last merges all.
    parts_left: Vec<AtomicU32>,
}

/// The tasks of one sequence: kv heads x tiles x parts.
struct Planned {
    first_task: usize,
    /// Groups of rows.
    tiles: usize,
    /// Into which the splits of the one tile are dealt; 1 where there are more tiles.
    parts: usize,
    splits: Range<usize>,
    /// In [`Plan::states`].
    first_state: usize,
    /// Of one split of one kv head.
    states_len: usize,
    /// In [`Plan::parts_left`].
    first_left: usize,
}

/// A plan while its tasks run.
struct SharedPlan<'a> {
    sequences: &'a [Planned],
    states: *mut Lanes,
    parts_left: &'a [AtomicU32],
}

// SAFETY: tasks reach disjoint states: those of their own splits, or, of the last task of a kv head, all of that head, whose
// other tasks are done.
unsafe impl Sync for SharedPlan<'_> {}

impl<'a> SharedPlan<'a> {
    fn new(plan: &'a mut Plan) -> Self {
        let Plan { sequences, states, parts_left } = plan;
        Self { sequences, states: states.as_mut_ptr(), parts_left }
    }

    /// A last entry stands behind all sequences.
    fn num_tasks(&self) -> usize {
        self.sequences.last().map_or(0, |end| end.first_task)
    }
}

/// Rows of a tile.
#[derive(Clone, Copy)]
struct Rows {
    sequence: usize,
    first: usize,
    len: usize,
    /// Of the sequence.
    end: usize,
}

impl<'a> Attention<'a> {
    fn group(&self) -> usize {
        self.query.cols() / (self.cache.kv_heads * self.cache.head_dim)
    }

    /// A tile's rows read each block together.
    fn tile_rows(&self) -> usize {
        tile::rows_per_tile(self.group(), self.amx.is_some())
    }

    fn num_rows(&self, sequence: usize) -> usize {
        (self.sequences.query_starts[sequence + 1] - self.sequences.query_starts[sequence]) as usize
    }

    /// Pairs of rows and visible positions, about.
    fn pairs(&self, sequence: usize) -> usize {
        let len = self.sequences.kv_lens[sequence] as usize;
        self.num_rows(sequence) * self.scoring.window.map_or(len, |window| len.min(window))
    }

    /// Whether waking another thread would take longer than the work.
    fn is_small(&self, num_tasks: usize) -> bool {
        const MULTIPLY_ADDS: usize = 200_000;
        /// What a task takes beside them: about a microsecond.
        const OF_A_TASK: usize = 25_000;
        let pairs: usize = (0..self.sequences.kv_lens.len()).map(|sequence| self.pairs(sequence)).sum();
        2 * pairs * self.query.cols() + OF_A_TASK * num_tasks < MULTIPLY_ADDS
    }

    /// Cuts sequences of a single tile along their keys where tasks would be too few or too uneven for the threads.
    fn plan(&self, num_threads: usize, plan: &mut Plan) {
        const TASKS_PER_THREAD: usize = 8;
        let kv_heads = self.cache.kv_heads;
        let num_sequences = self.sequences.kv_lens.len();
        let pairs: usize = (0..num_sequences).map(|sequence| self.pairs(sequence)).sum();
        let pairs_per_task = (kv_heads * pairs).div_ceil(num_threads * TASKS_PER_THREAD).max(1);
        let (mut first_task, mut first_state, mut first_left) = (0, 0, 0);
        plan.sequences.clear();
        for sequence in 0..num_sequences {
            let rows = self.num_rows(sequence);
            let tiles = rows.div_ceil(self.tile_rows());
            let splits = self.splits(sequence);
            let parts = match tiles {
                1 if num_threads > 1 => self.pairs(sequence).div_ceil(pairs_per_task).min(splits.len()),
                _ => 1,
            };
            let states_len = rows * self.group() * state::len(self.cache.head_dim.div_ceil(LANES));
            let planned = Planned { first_task, tiles, parts, splits, first_state, states_len, first_left };
            first_task += kv_heads * tiles * parts;
            if parts > 1 {
                first_state += kv_heads * planned.splits.len() * states_len;
                first_left += kv_heads;
            }
            plan.sequences.push(planned);
        }
        plan.sequences.push(Planned {
            first_task,
            tiles: 0,
            parts: 1,
            splits: 0..0,
            first_state,
            states_len: 0,
            first_left,
        });
        if plan.states.len() < first_state {
            plan.states.resize(first_state, Lanes::ZERO);
        }
        plan.parts_left.clear();
        for planned in plan.sequences.iter().filter(|planned| planned.parts > 1) {
            let count = || AtomicU32::new(planned.parts as u32);
            plan.parts_left.extend(std::iter::repeat_with(count).take(kv_heads));
        }
    }

    /// Splits that the rows of a sequence see.
    fn splits(&self, sequence: usize) -> Range<usize> {
        let (rows, len) = (self.num_rows(sequence), self.sequences.kv_lens[sequence] as usize);
        let first = self.scoring.window.map_or(0, |window| (len - rows + 1).saturating_sub(window));
        let size = tile::split_positions(self.cache.block_size);
        first / size..len.div_ceil(size)
    }

    fn run(&self, context: &Context, plan: &SharedPlan<'_>, task: usize) {
        match self.cache.keys.dtype() {
            DType::F32 => self.run_task::<f32>(context, plan, task),
            DType::F16 => self.run_task::<f16>(context, plan, task),
            DType::BF16 => self.run_task::<bf16>(context, plan, task),
            dtype => unreachable!("{}", unsupported_float(OP, dtype)),
        }
    }

    fn run_task<T: Float>(&self, context: &Context, plan: &SharedPlan<'_>, task: usize) {
        // The last that begins at or before the task: those without tasks begin where the next one does.
        let sequence = plan.sequences.partition_point(|planned| planned.first_task <= task) - 1;
        let planned = &plan.sequences[sequence];
        let task = task - planned.first_task;
        let (kv_head, task) = (task % self.cache.kv_heads, task / self.cache.kv_heads);
        let end = self.sequences.query_starts[sequence + 1] as usize;
        let start = self.sequences.query_starts[sequence] as usize;
        if planned.parts > 1 {
            let rows = Rows { sequence, first: start, len: end - start, end };
            return self.run_part::<T>(context, plan, rows, kv_head, task);
        }
        // The last tile sees the most positions, so it comes first.
        let first = start + (planned.tiles - 1 - task) * self.tile_rows();
        let rows = Rows { sequence, first, len: self.tile_rows().min(end - first), end };
        let output = self.output(rows, kv_head);
        context.level().run_with_dots(Whole { tile: self.tile::<T>(rows, kv_head), output });
    }

    /// Some of the splits of a sequence with a single tile.
    fn run_part<T: Float>(
        &self,
        context: &Context,
        plan: &SharedPlan<'_>,
        rows: Rows,
        kv_head: usize,
        part: usize,
    ) {
        let planned = &plan.sequences[rows.sequence];
        let (num_splits, states_len) = (planned.splits.len(), planned.states_len);
        let first_state = planned.first_state + kv_head * num_splits * states_len;
        let own = part * num_splits / planned.parts..(part + 1) * num_splits / planned.parts;
        // SAFETY: `plan` has made room for the states of all splits; see also `SharedPlan`.
        let states = |splits: Range<usize>| unsafe {
            let first = plan.states.add(first_state + splits.start * states_len);
            std::slice::from_raw_parts_mut(first, splits.len() * states_len)
        };
        let splits = planned.splits.start + own.start..planned.splits.start + own.end;
        let tile = self.tile::<T>(rows, kv_head);
        context.level().run_with_dots(Splits { tile, states: states(own), range: splits });
        // Release what was written here, acquire what the others wrote.
        if plan.parts_left[planned.first_left + kv_head].fetch_sub(1, Ordering::AcqRel) == 1 {
            let output = self.output(rows, kv_head);
            context.level().run(Merge { states: states(0..num_splits), states_len, output });
        }
    }

    fn output(&self, rows: Rows, kv_head: usize) -> Output<'a> {
        let (group, head_dim) = (self.group(), self.cache.head_dim);
        Output {
            out: self.out.at(rows.first, kv_head * group * head_dim),
            out_stride: self.out.row_stride(),
            group,
            head_dim,
            sinks: self.scoring.sinks.map(|sinks| &sinks[kv_head * group..][..group]),
        }
    }

    fn tile<T: Float>(&self, rows: Rows, kv_head: usize) -> Tile<'a, T> {
        let KvLayer { kv_heads, block_size, head_dim, .. } = *self.cache;
        let columns = self.group() * head_dim;
        let kv_len = self.sequences.kv_lens[rows.sequence] as usize;
        Tile {
            query: self.query.narrow_rows(rows.first, rows.len).narrow_cols(kv_head * columns, columns),
            first_position: kv_len - (rows.end - rows.first),
            keys: self.cache.keys.as_slice::<T>(),
            values: self.cache.values.as_slice::<T>(),
            table: self.sequences.table(rows.sequence).expect("checked by the operation"),
            kv_heads,
            kv_head,
            block_size,
            head_dim,
            scoring: self.scoring,
            amx: self.amx,
        }
    }
}
