//! Each operation on the device against the same on the CPU, in f32 on the same rounded inputs. The device is a GPU, or the
//! driver that computes on the CPU (`make test-cuda`).

mod activation;
mod attention;
mod context;
mod embedding;
mod kv_cache;
mod linear;
mod lora;
mod moe;
mod norm;
mod rotary;
mod sampling;

use half::{bf16, f16};
use kernels::{Context, DType, Element, Tensor, View, ViewMut};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// The element types of activations.
const ACTIVATIONS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Packed; with gaps of whole vectors; so that no row begins where a vector may.
const LAYOUTS: [Layout; 3] =
    [Layout { left: 0, right: 0 }, Layout { left: 8, right: 16 }, Layout { left: 3, right: 2 }];

/// Elements of the memory before and behind each row.
#[derive(Debug, Clone, Copy)]
struct Layout {
    left: usize,
    right: usize,
}

/// Both contexts and a source of numbers, the same in each run.
struct Fixture {
    cpu: Context,
    cuda: Context,
    random: SmallRng,
    /// Up to so many rows of a product, what belongs to it is computed in one kernel, with nothing rounded in between.
    most_fused_rows: usize,
}

impl Fixture {
    fn new(seed: u64) -> Self {
        Self {
            cpu: Context::cpu_with_f32_activations(1),
            cuda: Context::cuda(0, 2).expect("a device"),
            random: SmallRng::seed_from_u64(seed),
            most_fused_rows: 16,
        }
    }

    /// With the kernels that are chosen by size, and with plain ones.
    fn of_all_kernels(seed: u64) -> [Self; 2] {
        let plain = Context::cuda_with_plain_kernels(0, 2).expect("a device");
        [Self::new(seed), Self { cuda: plain, most_fused_rows: 0, ..Self::new(seed) }]
    }

    /// How much larger errors are where several operations are not one kernel.
    fn unfused(&self, factor: f32) -> f32 {
        if self.most_fused_rows == 0 { factor } else { 1.0 }
    }

    /// Values in -1 .. 1, rounded to `dtype`, as f32 on the host.
    fn values(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..rows * cols).map(|_| self.random.random_range(-1.0..1.0)).collect();
        let tensor = Tensor::from_slice(&values, rows, cols);
        tensor.to_dtype(dtype).and_then(|rounded| rounded.to_dtype(DType::F32)).expect("a float type")
    }

    /// The f32 matrix on the device in `dtype`.
    fn upload(&self, values: &Tensor, dtype: DType, layout: Layout) -> OnDevice {
        let (rows, cols) = (values.rows(), values.cols());
        let width = layout.left + cols + layout.right;
        let mut whole = vec![f32::NAN; rows * width];
        for row in 0..rows {
            whole[row * width + layout.left..][..cols].copy_from_slice(values.view().row(row));
        }
        let whole = Tensor::from_slice(&whole, rows, width).to_dtype(dtype).expect("a float type");
        OnDevice { whole: self.cuda.upload(&whole).expect("memory"), layout }
    }

    /// A vector or packed matrix on the device in f32, as weights of norms are.
    fn weights(&self, values: &Tensor) -> Tensor {
        self.cuda.upload(values).expect("memory")
    }

    /// An output full of NaN.
    fn poisoned(&self, rows: usize, cols: usize, dtype: DType, layout: Layout) -> OnDevice {
        self.upload(&Tensor::from_slice(&vec![f32::NAN; rows * cols], rows, cols), dtype, layout)
    }

    /// Elements within `tolerance` of the expected, relative to those above 1, and gaps as they were.
    fn check(&self, what: &str, actual: &OnDevice, expected: &Tensor, tolerance: f32) {
        let whole = download_f32(&self.cuda, actual.whole.view());
        let Layout { left, right } = actual.layout;
        assert_eq!(whole.cols(), left + expected.cols() + right, "{what}: columns");
        for row in 0..expected.rows() {
            let (actual, expected) = (whole.view().row::<f32>(row), expected.view().row::<f32>(row));
            let (before, actual) = actual.split_at(left);
            let (actual, behind) = actual.split_at(expected.len());
            let untouched = before.iter().chain(behind).all(|value| value.is_nan());
            assert!(untouched, "{what}: row {row} was written beside its columns: {before:?}, {behind:?}");
            for (col, (actual, expected)) in actual.iter().zip(expected).enumerate() {
                let difference = (actual - expected).abs();
                assert!(
                    difference <= tolerance * expected.abs().max(1.0),
                    "{what}: row {row}, column {col} is {actual}, expected {expected}"
                );
            }
        }
    }
}

/// A matrix on the device with gaps of NaN around its rows.
struct OnDevice {
    whole: Tensor,
    layout: Layout,
}

impl OnDevice {
    fn cols(&self) -> usize {
        self.whole.cols() - self.layout.left - self.layout.right
    }
    fn view(&self) -> View<'_> {
        self.whole.view().narrow_cols(self.layout.left, self.cols())
    }
    fn view_mut(&mut self) -> ViewMut<'_> {
        let cols = self.cols();
        self.whole.view_mut().narrow_cols(self.layout.left, cols)
    }
}

/// Any float matrix of the device, as f32 on the host.
fn download_f32(cuda: &Context, view: View<'_>) -> Tensor {
    fn typed<T: Element>(cuda: &Context, view: View<'_>, zero: T) -> Tensor {
        let mut values = vec![zero; view.rows() * view.cols()];
        cuda.download(view, &mut values).expect("the stream works");
        Tensor::from_slice(&values, view.rows(), view.cols()).to_dtype(DType::F32).expect("a float type")
    }
    match view.dtype() {
        DType::F32 => typed(cuda, view, 0.0_f32),
        DType::F16 => typed(cuda, view, f16::ZERO),
        DType::BF16 => typed(cuda, view, bf16::ZERO),
        dtype => panic!("{dtype:?} is no float type"),
    }
}

/// Of a value that was computed in f32 in another order, then rounded to `dtype`: twice the spacing of its numbers.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 2.0_f32.powi(-10),
        DType::BF16 => 2.0_f32.powi(-7),
        dtype => panic!("{dtype:?} is no type of activations"),
    }
}
