//! Attention over pages: decode rows, chunks of prompts, all parameters.

use kernels::ops::attention::{BlockTables, NewBlocks, paged_attention, write_kv};
use kernels::{
    AttentionBatch, AttentionParams, Context, DType, Error, KvLayer, Result, Staging, Tensor, View,
};
use rand::RngExt;
use rand::seq::SliceRandom;

use super::{Fixture, LAYOUTS, Layout};

const BLOCK_SIZE: usize = KvLayer::DEVICE_BLOCK_SIZE;
/// Head sizes that have kernels with tensor cores.
const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

#[derive(Debug, Clone, Copy)]
struct Shape {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    dtype: DType,
    kv_dtype: DType,
}

#[derive(Debug, Clone, Copy, Default)]
struct Features {
    window: Option<usize>,
    soft_cap: Option<f32>,
    alibi: bool,
    sinks: bool,
}

const FEATURES: [Features; 6] = [
    Features { window: None, soft_cap: None, alibi: false, sinks: false },
    Features { window: Some(40), soft_cap: None, alibi: false, sinks: false },
    Features { window: None, soft_cap: Some(2.5), alibi: false, sinks: false },
    Features { window: None, soft_cap: None, alibi: true, sinks: false },
    Features { window: Some(1), soft_cap: None, alibi: false, sinks: true },
    Features { window: Some(70), soft_cap: Some(4.0), alibi: true, sinks: true },
];

/// Rows of this step, and tokens with those before; those of one row first. A row without tokens only fills a batch up.
type Lens<'a> = &'a [(usize, usize)];

/// Of the sums of weighted values, which are below 1: the weights are rounded to the type that products are computed in, and
/// the result to that of activations, each by up to half of the spacing of numbers below 1.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2.0_f32.powi(-11),
        DType::BF16 => 2.0_f32.powi(-8),
        dtype => panic!("{dtype:?} is no type of activations"),
    }
}

/// Values that the type of a cache holds exactly.
fn exact(fixture: &mut Fixture, rows: usize, cols: usize, dtype: DType) -> Tensor {
    if dtype != DType::F8E4M3 {
        return fixture.values(rows, cols, dtype);
    }
    let values: Vec<f32> = (0..rows * cols)
        .map(|_| {
            let sign = if fixture.random.random() { 1.0 } else { -1.0 };
            match fixture.random.random_range(0..7) {
                0 => sign * fixture.random.random_range(0..8) as f32 / 512.0,
                exponent => {
                    let fraction = fixture.random.random_range(8..16) as f32 / 8.0;
                    sign * fraction * 2.0_f32.powi(exponent - 7)
                }
            }
        })
        .collect();
    Tensor::from_slice(&values, rows, cols)
}

/// Sequences in caches of both contexts, with NaN wherever no token is.
struct Cached {
    shape: Shape,
    on_cpu: KvLayer,
    on_device: KvLayer,
    max_blocks: usize,
    /// `[sequences][max_blocks]`, in no order.
    tables: Vec<u32>,
}

impl Cached {
    fn new(fixture: &mut Fixture, shape: Shape, kv_lens: &[usize]) -> Self {
        let Shape { kv_heads, head_dim, kv_dtype, .. } = shape;
        let max_blocks = kv_lens.iter().map(|len| len.div_ceil(BLOCK_SIZE)).max().unwrap_or(0) + 1;
        let num_blocks = max_blocks * kv_lens.len();
        let mut tables: Vec<u32> = (0..num_blocks as u32).collect();
        tables.shuffle(&mut fixture.random);
        let layer = |context: &Context, dtype| {
            let mut layer =
                KvLayer::new(context, num_blocks, kv_heads, BLOCK_SIZE, head_dim, dtype).expect("memory");
            let slots: Vec<u32> = (0..(num_blocks * BLOCK_SIZE) as u32).collect();
            let cols = kv_heads * head_dim;
            let rubbish = Tensor::from_slice(&vec![f32::NAN; slots.len() * cols], slots.len(), cols);
            write(context, &rubbish, &rubbish, &slots, &mut layer);
            layer
        };
        let mut this = Self {
            shape,
            on_cpu: layer(&fixture.cpu, DType::F32),
            on_device: layer(&fixture.cuda, kv_dtype),
            max_blocks,
            tables,
        };
        for (sequence, &len) in kv_lens.iter().enumerate() {
            let table = &this.tables[sequence * max_blocks..][..max_blocks];
            let slot = |p: usize| table[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
            let slots: Vec<u32> = (0..len).map(slot).collect();
            let [keys, values] = [0, 1].map(|_| exact(fixture, len, kv_heads * head_dim, kv_dtype));
            write(&fixture.cpu, &keys, &values, &slots, &mut this.on_cpu);
            write(&fixture.cuda, &keys, &values, &slots, &mut this.on_device);
        }
        this
    }

    fn cols(&self) -> usize {
        self.shape.kv_heads * self.shape.group * self.shape.head_dim
    }

    fn heads(&self) -> usize {
        self.shape.kv_heads * self.shape.group
    }
}

fn write(context: &Context, keys: &Tensor, values: &Tensor, slots: &[u32], layer: &mut KvLayer) {
    let upload = |tensor: &Tensor| context.upload(tensor).expect("memory");
    let (keys, values) = (upload(keys), upload(values));
    let slots = upload(&Tensor::from_slice(slots, 1, slots.len()));
    write_kv(context, keys.view(), values.view(), slots.view(), layer).expect("shapes fit");
}

/// The index arrays of a batch in host memory.
struct Arrays {
    query_starts: Vec<u32>,
    kv_lens: Vec<u32>,
    tables: Vec<u32>,
    max_blocks: usize,
}

impl Arrays {
    /// Of the sequences of a cache, without those that have no tokens where `only_real`.
    fn new(cached: &Cached, lens: Lens<'_>, only_real: bool) -> Self {
        let mut this =
            Self { query_starts: vec![0], kv_lens: vec![], tables: vec![], max_blocks: cached.max_blocks };
        for (sequence, &(rows, len)) in lens.iter().enumerate().filter(|(_, lens)| !only_real || lens.1 > 0) {
            this.query_starts.push(this.query_starts[this.query_starts.len() - 1] + rows as u32);
            this.kv_lens.push(len as u32);
            this.tables.extend(&cached.tables[sequence * cached.max_blocks..][..cached.max_blocks]);
        }
        this
    }

    fn batch(&self) -> AttentionBatch<'_> {
        AttentionBatch::from_slices(&self.query_starts, &self.kv_lens, &self.tables, self.max_blocks)
    }
}

/// Vectors of the heads, where a context computes.
struct OfHeads {
    slopes: Tensor,
    sinks: Tensor,
}

impl OfHeads {
    fn new(context: &Context, heads: usize) -> Self {
        let upload = |value: &dyn Fn(usize) -> f32| {
            let values: Vec<f32> = (0..heads).map(value).collect();
            context.upload(&Tensor::from_slice(&values, 1, heads)).expect("memory")
        };
        Self {
            slopes: upload(&|head| 0.5_f32.powi(head as i32 % 7 + 1)),
            sinks: upload(&|head| head as f32 * 0.7 - 1.0),
        }
    }

    fn params(&self, head_dim: usize, features: Features) -> AttentionParams<'_> {
        AttentionParams {
            window: features.window,
            soft_cap: features.soft_cap,
            alibi_slopes: features.alibi.then(|| self.slopes.view()),
            sinks: features.sinks.then(|| self.sinks.view()),
            // Scores of some units: a few positions weigh much.
            ..AttentionParams::new(3.0 * (head_dim as f32).powf(-0.5))
        }
    }
}

/// What the CPU computes for all rows, and zeros for those that only fill up.
fn on_cpu(fixture: &Fixture, cached: &Cached, lens: Lens<'_>, query: &Tensor, features: Features) -> Tensor {
    let cols = cached.cols();
    let mut starts = vec![];
    let mut row = 0;
    for &(rows, len) in lens {
        if len > 0 {
            starts.extend(row..row + rows);
        }
        row += rows;
    }
    let real: Vec<f32> = starts.iter().flat_map(|&row| query.view().row::<f32>(row).to_vec()).collect();
    let real = Tensor::from_slice(&real, starts.len(), cols);
    let mut out = Tensor::zeros(real.rows(), cols, DType::F32);
    let of_heads = OfHeads::new(&fixture.cpu, cached.heads());
    let params = of_heads.params(cached.shape.head_dim, features);
    let arrays = Arrays::new(cached, lens, true);
    paged_attention(&fixture.cpu, real.view(), &cached.on_cpu, &arrays.batch(), params, out.view_mut())
        .expect("shapes fit");
    let mut expected = vec![0.0_f32; row * cols];
    for (i, &row) in starts.iter().enumerate() {
        expected[row * cols..][..cols].copy_from_slice(out.view().row(i));
    }
    Tensor::from_slice(&expected, row, cols)
}

fn check(fixture: &mut Fixture, shape: Shape, layout: Layout, features: Features, lens: Lens<'_>) {
    check_tables(fixture, (shape, layout, features), lens, Tables::Sent);
}

/// Where the block tables of a batch come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tables {
    /// In the batch's order, with it.
    Sent,
    /// From rows that sequences name, in which they have grown.
    Kept,
}

/// The tables of `cached` among others, in two pieces each, and the row of each sequence.
fn kept(fixture: &Fixture, cached: &Cached, num_sequences: usize) -> (BlockTables, Vec<u32>) {
    let columns = cached.max_blocks + 3;
    let rows: Vec<u32> = (0..num_sequences as u32).map(|sequence| 2 * sequence + 1).rev().collect();
    let mut tables =
        BlockTables::new(&fixture.cuda, 2 * num_sequences + 1, columns, num_sequences).expect("memory");
    let first = cached.max_blocks / 2;
    for (column, end) in [(0, first), (first, cached.max_blocks)] {
        let new = rows.iter().zip(cached.tables.chunks(cached.max_blocks)).map(|(&row, table)| NewBlocks {
            row: row as usize,
            column,
            ids: &table[column..end],
        });
        tables.append(&fixture.cuda, new).expect("they fit");
    }
    (tables, rows)
}

fn check_tables(
    fixture: &mut Fixture,
    (shape, layout, features): (Shape, Layout, Features),
    lens: Lens<'_>,
    tables: Tables,
) {
    let kv_lens: Vec<usize> = lens.iter().map(|lens| lens.1).collect();
    let cached = Cached::new(fixture, shape, &kv_lens);
    let rows = lens.iter().map(|lens| lens.0).sum();
    let query = fixture.values(rows, cached.cols(), shape.dtype);
    let expected = on_cpu(fixture, &cached, lens, &query, features);

    let arrays = Arrays::new(&cached, lens, false);
    let on_host = arrays.batch();
    let upload = |view: View<'_>| {
        let array = Tensor::from_slice(view.into_slice::<u32>(), 1, view.cols());
        fixture.cuda.upload(&array).expect("memory")
    };
    let there = [on_host.query_starts, on_host.kv_lens, on_host.block_tables].map(upload);
    let [query_starts, kv_lens, block_tables] = there.each_ref().map(Tensor::view);
    let mut batch = AttentionBatch { query_starts, kv_lens, block_tables, ..on_host };
    let (kept, table_rows) = kept(fixture, &cached, lens.len());
    let table_rows = upload(View::from_slice(&table_rows, 1, table_rows.len()));
    if tables == Tables::Kept {
        batch.block_tables = kept.entries();
        batch.max_blocks = kept.max_blocks();
        batch.table_rows = Some(table_rows.view());
    }
    let of_heads = OfHeads::new(&fixture.cuda, cached.heads());
    let params = of_heads.params(shape.head_dim, features);
    let query = fixture.upload(&query, shape.dtype, layout);
    let mut out = fixture.poisoned(rows, cached.cols(), shape.dtype, layout);
    paged_attention(&fixture.cuda, query.view(), &cached.on_device, &batch, params, out.view_mut())
        .expect("shapes fit");
    let what = format!("{shape:?} {features:?} {layout:?} {lens:?} {tables:?}");
    fixture.check(&what, &out, &expected, tolerance(shape.dtype));
}

/// Decodes, rows that fill up, and chunks with and without what came before them.
fn ragged(fixture: &mut Fixture, max_chunk: usize) -> Vec<(usize, usize)> {
    let mut len = |most: usize| fixture.random.random_range(1..=most);
    let mut lens: Vec<_> = (0..3).map(|_| (1, len(300))).collect();
    lens.extend([(1, 0), (2, 2)]);
    for most_before in [1, 100] {
        let rows = len(max_chunk).max(2);
        lens.push((rows, rows - 1 + len(most_before)));
    }
    lens
}

#[test]
fn kernels_with_tensor_cores_attend_as_the_cpu_does() {
    let mut fixture = Fixture::new(31);
    let groups = [1, 3, 4, 7, 8];
    let mut case = 0;
    for head_dim in HEAD_DIMS {
        for dtype in [DType::BF16, DType::F16] {
            for kv_dtype in [dtype, DType::F8E4M3] {
                let group = groups[case % groups.len()];
                let shape = Shape { kv_heads: 1 + case % 2, group, head_dim, dtype, kv_dtype };
                let lens = ragged(&mut fixture, 160 / group);
                let features = FEATURES[case % FEATURES.len()];
                check(&mut fixture, shape, LAYOUTS[case % 2], features, &lens);
                case += 1;
            }
        }
    }
}

#[test]
fn all_parameters_do_what_they_do_on_the_cpu() {
    for mut fixture in Fixture::of_all_kernels(32) {
        for (i, features) in FEATURES.into_iter().enumerate() {
            for (kv_dtype, group) in [(DType::F16, 4), (DType::F8E4M3, 3)] {
                let shape = Shape { kv_heads: 2, group, head_dim: 64, dtype: DType::F16, kv_dtype };
                let lens = ragged(&mut fixture, 50);
                check(&mut fixture, shape, LAYOUTS[i % 2], features, &lens);
            }
        }
    }
}

#[test]
fn any_head_size_and_any_types_attend_as_the_cpu_does() {
    let mut fixture = Fixture::new(33);
    let head_dims = [33, 64, 1, 112, 300];
    let kv_dtypes = [DType::F32, DType::F16, DType::BF16, DType::F8E4M3];
    let mut case = 0;
    for dtype in super::ACTIVATIONS {
        for kv_dtype in kv_dtypes {
            let (group, head_dim) = ([1, 3, 7][case % 3], head_dims[case % head_dims.len()]);
            let shape = Shape { kv_heads: 1 + case % 2, group, head_dim, dtype, kv_dtype };
            let lens = ragged(&mut fixture, 6);
            // The last layout is for no kernel that loads 16 bytes at once.
            check(&mut fixture, shape, LAYOUTS[2], FEATURES[case % FEATURES.len()], &lens);
            case += 1;
        }
    }
}

#[test]
fn lengths_at_the_borders_of_blocks_units_and_splits_are_seen_to_the_end() {
    for mut fixture in Fixture::of_all_kernels(34) {
        let mut lens: Vec<_> =
            [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 700].map(|len| (1, len)).into();
        for (head_dim, group, kv_dtype) in [(128, 8, DType::F16), (64, 20, DType::F8E4M3)] {
            let shape = Shape { kv_heads: 1, group, head_dim, dtype: DType::F16, kv_dtype };
            check(&mut fixture, shape, LAYOUTS[0], Features::default(), &lens);
            lens.truncate(11);
        }
        let chunks = [(2, 2), (31, 31), (32, 33), (33, 64), (65, 65), (64, 129), (1, 1), (7, 200)];
        let shape = Shape { kv_heads: 1, group: 2, head_dim: 128, dtype: DType::F16, kv_dtype: DType::F16 };
        check(&mut fixture, shape, LAYOUTS[0], FEATURES[1], &chunks);
    }
}

#[test]
fn sequences_find_their_tables_in_the_rows_that_they_name() {
    for mut fixture in Fixture::of_all_kernels(38) {
        for (head_dim, kv_dtype) in [(64, DType::F16), (128, DType::F8E4M3), (40, DType::F16)] {
            let shape = Shape { kv_heads: 2, group: 2, head_dim, dtype: DType::F16, kv_dtype };
            let lens = ragged(&mut fixture, 40);
            check_tables(&mut fixture, (shape, LAYOUTS[0], Features::default()), &lens, Tables::Kept);
        }
    }
}

#[test]
fn what_is_outside_of_the_tables_is_not_appended() {
    let fixture = Fixture::new(39);
    for context in [&fixture.cpu, &fixture.cuda] {
        let mut tables = BlockTables::new(context, 2, 3, 2).expect("memory");
        let mut append = |row, column, ids: &[u32]| tables.append(context, [NewBlocks { row, column, ids }]);
        append(0, 0, &[5, 6]).expect("it fits");
        append(1, 2, &[7]).expect("it fits");
        append(0, 2, &[8]).expect("it fits");
        append(1, 9, &[]).expect("nothing");
        for (row, column, ids) in [(2, 0, &[1][..]), (0, 3, &[1]), (1, 2, &[1, 2])] {
            assert!(matches!(append(row, column, ids), Err(Error::Shape { .. })));
        }
        let mut entries = [0_u32; 6];
        context.download(tables.entries(), &mut entries).expect("shapes fit");
        assert_eq!(entries, [5, 6, 8, 0, 0, 7]);
    }
}

/// Records one launch for sequences of up to `longest` tokens, and replays it for each of `steps`.
fn check_recorded(fixture: &mut Fixture, shape: Shape, longest: &[usize], steps: &[Vec<usize>]) {
    let cached = Cached::new(fixture, shape, longest);
    let rows = longest.len();
    let query = fixture.values(rows, cached.cols(), shape.dtype);
    let there = fixture.upload(&query, shape.dtype, LAYOUTS[0]);
    let mut out = fixture.poisoned(rows, cached.cols(), shape.dtype, LAYOUTS[0]);
    let features = Features::default();
    let params = AttentionParams::new(3.0 * (shape.head_dim as f32).powf(-0.5));
    let mut staging = Staging::new(&fixture.cuda, &[rows + 1, rows, cached.tables.len()]).expect("memory");
    let mut graph = None;
    for step in steps {
        let lens: Vec<_> = step.iter().map(|&len| (1, len)).collect();
        let arrays = Arrays::new(&cached, &lens, false);
        let on_host = arrays.batch();
        let [query_starts, kv_lens, block_tables] = staging
            .send(&fixture.cuda, [&arrays.query_starts, &arrays.kv_lens, &arrays.tables])
            .expect("the stream works");
        let batch = AttentionBatch { query_starts, kv_lens, block_tables, ..on_host };
        let mut run = || {
            paged_attention(&fixture.cuda, there.view(), &cached.on_device, &batch, params, out.view_mut())
        };
        if graph.is_none() {
            run().expect("shapes fit");
            graph = Some(fixture.cuda.capture(run).expect("it has run before"));
        }
        graph.as_ref().expect("just recorded").launch().expect("the stream works");
        let expected = on_cpu(fixture, &cached, &lens, &query, features);
        fixture.check(&format!("{shape:?} {step:?}"), &out, &expected, tolerance(shape.dtype));
    }
}

#[test]
fn one_recorded_launch_serves_every_length_of_contexts() {
    let mut fixture = Fixture::new(35);
    let steps: [[usize; 4]; 8] = [
        [1, 1, 1, 1],
        [3000, 2500, 290, 40],
        [5, 129, 0, 1],
        [2999, 1, 33, 7],
        [0, 2047, 290, 0],
        [1, 2500, 1, 0],
        [0, 0, 0, 0],
        [3000, 2500, 290, 40],
    ];
    for (kv_heads, group, kv_dtype) in [(2, 4, DType::BF16), (1, 20, DType::F8E4M3)] {
        let shape = Shape { kv_heads, group, head_dim: 128, dtype: DType::BF16, kv_dtype };
        check_recorded(&mut fixture, shape, &[3000, 2500, 290, 40], &steps.map(Vec::from));
    }
}

#[test]
fn one_recorded_launch_serves_more_sequences_than_the_device_has_blocks() {
    let mut fixture = Fixture::new(40);
    // More than a warp looks at in one go, too.
    for (sequences, short, long) in [(300, 70, 500), (1100, 20, 150)] {
        let mut steps: Vec<Vec<usize>> = (0..3)
            .map(|_| (0..sequences).map(|_| fixture.random.random_range(0..=short)).collect())
            .collect();
        // Far longer than the others: these are split.
        for (step, sequence) in [(0, 7), (1, sequences - 1), (1, 0)] {
            steps[step][sequence] = long;
        }
        steps.push(vec![1; sequences]);
        // What only fills the batch up.
        steps.push((0..sequences).map(|sequence| if sequence < 3 { long } else { 0 }).collect());
        let longest = vec![long; sequences];
        let shape = Shape { kv_heads: 1, group: 2, head_dim: 64, dtype: DType::F16, kv_dtype: DType::F16 };
        check_recorded(&mut fixture, shape, &longest, &steps);
    }
}

#[test]
fn arrays_that_point_outside_of_the_memory_are_kept_within_it() {
    for mut fixture in Fixture::of_all_kernels(36) {
        for (head_dim, kv_dtype) in [(64, DType::F16), (64, DType::F8E4M3), (40, DType::F16)] {
            let shape = Shape { kv_heads: 1, group: 2, head_dim, dtype: DType::F16, kv_dtype };
            let cached = Cached::new(&mut fixture, shape, &[40, 40, 40]);
            let query = fixture.values(5, cached.cols(), shape.dtype);
            let there = fixture.upload(&query, shape.dtype, LAYOUTS[0]);
            let mut out = fixture.poisoned(5, cached.cols(), shape.dtype, LAYOUTS[0]);
            let vector = |values: &[u32]| {
                fixture.cuda.upload(&Tensor::from_slice(values, 1, values.len())).expect("memory")
            };
            let (starts, lens) = (vector(&[0, 1, u32::MAX - 7, 3]), vector(&[u32::MAX, 1 << 31, 200]));
            let tables = vector(&vec![u32::MAX; cached.tables.len()]);
            let batch = AttentionBatch {
                query_starts: starts.view(),
                kv_lens: lens.view(),
                block_tables: tables.view(),
                table_rows: None,
                max_blocks: cached.max_blocks,
                num_decodes: 1,
                max_query_len: 5,
            };
            let params = AttentionParams::new(1.0);
            paged_attention(&fixture.cuda, there.view(), &cached.on_device, &batch, params, out.view_mut())
                .expect("shapes fit");
            fixture.cuda.synchronize().expect("nothing outside was touched");
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let mut fixture = Fixture::new(37);
    let shape = Shape { kv_heads: 2, group: 2, head_dim: 64, dtype: DType::F16, kv_dtype: DType::F16 };
    let cached = Cached::new(&mut fixture, shape, &[40, 3]);
    let query = fixture.values(2, cached.cols(), DType::F16);
    let there = fixture.upload(&query, DType::F16, LAYOUTS[0]);
    let mut out = fixture.poisoned(2, cached.cols(), DType::F16, LAYOUTS[0]);
    let vector =
        |values: &[u32]| fixture.cuda.upload(&Tensor::from_slice(values, 1, values.len())).expect("memory");
    let (starts, lens, tables) = (vector(&[0, 1, 2]), vector(&[40, 3]), vector(&cached.tables));
    let good = AttentionBatch {
        query_starts: starts.view(),
        kv_lens: lens.view(),
        block_tables: tables.view(),
        table_rows: None,
        max_blocks: cached.max_blocks,
        num_decodes: 2,
        max_query_len: 1,
    };
    let params = AttentionParams::new(1.0);
    let mut attend =
        |query: View<'_>, batch: AttentionBatch<'_>, params: AttentionParams<'_>| -> Result<()> {
            paged_attention(&fixture.cuda, query, &cached.on_device, &batch, params, out.view_mut())
        };
    attend(there.view(), good, params).expect("all fits");
    let host = [0_u32, 1, 2];
    let slopes = [1.0_f32; 4];
    let refused = [
        attend(query.view(), good, params),
        attend(there.view().narrow_cols(0, 64), good, params),
        attend(there.view(), AttentionBatch { query_starts: View::from_slice(&host, 1, 3), ..good }, params),
        attend(there.view(), AttentionBatch { kv_lens: starts.view(), ..good }, params),
        attend(there.view(), AttentionBatch { block_tables: lens.view(), ..good }, params),
        attend(there.view(), AttentionBatch { table_rows: Some(starts.view()), ..good }, params),
        attend(
            there.view(),
            AttentionBatch { table_rows: Some(lens.view()), max_blocks: 5 + cached.tables.len(), ..good },
            params,
        ),
        attend(there.view(), AttentionBatch { num_decodes: 3, ..good }, params),
        attend(there.view(), AttentionBatch { max_query_len: 3, ..good }, params),
        attend(there.view(), good, AttentionParams { window: Some(0), ..params }),
        attend(there.view(), good, AttentionParams { soft_cap: Some(-1.0), ..params }),
        attend(
            there.view(),
            good,
            AttentionParams { sinks: Some(View::from_slice(&slopes, 1, 4)), ..params },
        ),
    ];
    for (i, refused) in refused.into_iter().enumerate() {
        assert!(matches!(refused, Err(Error::Shape { .. } | Error::DType { .. })), "case {i}: {refused:?}");
    }
    let layer = |block_size, dtype| KvLayer::new(&fixture.cuda, 2, 1, block_size, 64, dtype);
    assert!(matches!(layer(16, DType::F16), Err(Error::Shape { .. })));
    assert!(matches!(layer(32, DType::U8), Err(Error::DType { .. })));
}
