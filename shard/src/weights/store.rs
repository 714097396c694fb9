//! A checkpoint's tensors as one rank uses them: sliced, and in place unless their element type must change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use kernels::mmap::MappedFile;
use kernels::ops::lora::{Lora, LowRank};
use kernels::{Context, DType, Place, Tensor};

use super::adapter::{Adapter, StoredLowRank};
use super::mapped::MappedWeights;
use super::safetensors::{self, StoredTensor};
use super::{Error, Partition, Slice};
use crate::config::Quantization;

/// In which form tensors are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct WeightTypes {
    /// The element type of matrices that are not quantized; `None` keeps what is stored.
    pub dtype: Option<DType>,
    /// The format of linear layers' weights; `None` leaves them dense.
    pub quantization: Option<Quantization>,
}

/// The tensors of a checkpoint, each to be taken once.
pub struct Weights<'a> {
    context: &'a Context,
    dir: PathBuf,
    partition: Partition,
    types: WeightTypes,
    tensors: BTreeMap<String, StoredTensor>,
    /// Each with whether a layer has taken a part of it.
    adapters: Vec<(Adapter, bool)>,
    mapped: MappedWeights,
    num_parameters: u64,
    size_in_bytes: u64,
}

impl<'a> Weights<'a> {
    /// Maps the files in `dir` and reads their headers. `context`: what computes with them, and quantizes.
    ///
    /// With a `dtype`, tensors whose stored type it does not represent exactly are converted when they are taken; the
    /// others, and all without it, are used as they lie in the file.
    pub fn open(
        context: &'a Context,
        dir: &Path,
        types: WeightTypes,
        partition: Partition,
    ) -> Result<Self, Error> {
        let tensors = safetensors::open(dir)?;
        Ok(Self {
            context,
            dir: dir.to_owned(),
            partition,
            types,
            tensors,
            adapters: Vec::new(),
            mapped: MappedWeights::default(),
            num_parameters: 0,
            size_in_bytes: 0,
        })
    }

    /// With adapters, which change the linear layers that are taken from here.
    #[must_use]
    pub fn with_adapters(self, adapters: Vec<Adapter>) -> Self {
        Self { adapters: adapters.into_iter().map(|adapter| (adapter, false)).collect(), ..self }
    }

    /// What they were opened with.
    pub(crate) fn context(&self) -> &'a Context {
        self.context
    }

    /// The format in which linear layers' weights are wanted; `None`: dense.
    pub(crate) fn quantization(&self) -> Option<Quantization> {
        self.types.quantization
    }

    /// Where no type was asked for: that in which the tensor `name` is stored.
    pub(crate) fn settle_dtype(&mut self, name: &str) {
        let stored = self.tensors.get(name).and_then(StoredTensor::dtype);
        self.types.dtype = self.types.dtype.or(stored);
    }

    /// Whose slices these are.
    pub fn partition(&self) -> Partition {
        self.partition
    }

    /// Parameters of the tensors taken so far, those of the other ranks included.
    pub fn num_parameters(&self) -> u64 {
        self.num_parameters
    }

    /// Bytes of this rank's slices taken so far.
    pub fn size_in_bytes(&self) -> u64 {
        self.size_in_bytes
    }

    /// The matrix `name`, `[rows, cols]` in the file, or this rank's part of it.
    pub fn take_matrix(&mut self, name: &str, shape: [usize; 2], slice: Slice) -> Result<Tensor, Error> {
        let (tensor, stored) = self.take_host_matrix(name, shape, slice)?;
        self.place(&tensor, &stored)
    }

    /// As [`Weights::take_matrix`], of matrices that are multiplied with one input: on a GPU they lie one below the
    /// other, so that they are one product.
    pub fn take_matrices(
        &mut self,
        matrices: &[(String, [usize; 2])],
        slice: Slice,
    ) -> Result<Vec<Tensor>, Error> {
        let mut taken = Vec::with_capacity(matrices.len());
        for (name, shape) in matrices {
            taken.push(self.take_host_matrix(name, *shape, slice)?);
        }
        let is_one_type = taken.windows(2).all(|pair| pair[0].0.dtype() == pair[1].0.dtype());
        if self.context.place() == Place::Host || !is_one_type {
            return taken.into_iter().map(|(tensor, stored)| self.place(&tensor, &stored)).collect();
        }
        let host: Vec<_> = taken.iter().map(|(tensor, _)| tensor).collect();
        let stacked = self.context.upload_stacked(&host)?;
        let mut start = 0;
        Ok(taken
            .iter()
            .map(|(tensor, stored)| {
                stored.release();
                let part = stacked.narrow_rows(start, tensor.rows());
                start += tensor.rows();
                part
            })
            .collect())
    }

    /// In the element type that is wanted, in host memory.
    fn take_host_matrix(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        slice: Slice,
    ) -> Result<(Tensor, StoredTensor), Error> {
        let stored = self.take(name, &[rows, cols])?;
        let whole = stored.matrix(name, rows, cols)?;
        let tensor = self.in_its_type(name, self.sliced(whole, slice))?;
        self.size_in_bytes += tensor.size_in_bytes() as u64;
        Ok((tensor, stored))
    }

    /// This rank's part of a matrix.
    fn sliced(&self, whole: Tensor, slice: Slice) -> Tensor {
        match slice {
            Slice::Whole => whole,
            Slice::Rows => {
                let part = self.partition.range(whole.rows());
                whole.narrow_rows(part.start, part.len())
            }
            Slice::Cols => {
                let part = self.partition.range(whole.cols());
                whole.narrow_cols(part.start, part.len())
            }
        }
    }

    /// The matrix in the element type that is wanted.
    fn in_its_type(&self, name: &str, tensor: Tensor) -> Result<Tensor, Error> {
        match self.types.dtype {
            Some(dtype) if !represents(dtype, tensor.dtype(), self.context) => convert(name, &tensor, dtype),
            _ => Ok(tensor),
        }
    }

    /// The whole matrix `name`, `[rows, cols]`, as it is stored, for a format to make its weight of. The format adds the
    /// weight's size.
    pub(crate) fn take_stored(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
    ) -> Result<StoredMatrix, Error> {
        let stored = self.take(name, &[rows, cols])?;
        Ok(StoredMatrix { name: name.to_owned(), matrix: stored.matrix(name, rows, cols)?, stored })
    }

    /// Counts the bytes of a weight that was made of a stored one.
    pub(crate) fn add_size(&mut self, bytes: usize) {
        self.size_in_bytes += bytes as u64;
    }

    /// The vector `name` of `len` elements, or this rank's part of it, as f32 `[1, len]`: norms and biases are small, and
    /// are added to f32 activations.
    pub fn take_vector(&mut self, name: &str, len: usize, slice: Slice) -> Result<Tensor, Error> {
        let stored = self.take(name, &[len])?;
        let part = match slice {
            Slice::Rows => self.partition.range(len),
            Slice::Whole | Slice::Cols => 0..len,
        };
        let tensor = stored.matrix(name, 1, len)?.narrow_cols(part.start, part.len()).to_dtype(DType::F32)?;
        self.size_in_bytes += tensor.size_in_bytes() as u64;
        self.place(&tensor, &stored)
    }

    /// What adapters do to linear layers with one input, `[outputs, inputs]` each, of which this rank has a part of the
    /// outputs ([`Slice::Rows`]) or of the inputs ([`Slice::Cols`]); `None`: nothing.
    ///
    /// A share of the inputs is one of the sum that the factor `a` makes: all ranks together change the layer as one does.
    pub(crate) fn take_lora(
        &mut self,
        layers: &[(&str, [usize; 2])],
        slice: Slice,
    ) -> Result<Option<Lora>, Error> {
        let mut changes = Vec::with_capacity(self.adapters.len());
        let mut adapters = std::mem::take(&mut self.adapters);
        for (adapter, took_any) in &mut adapters {
            let mut parts = Vec::with_capacity(layers.len());
            for (layer, shape) in layers {
                let stored = adapter.take(layer, *shape)?;
                *took_any |= stored.is_some();
                parts.push(stored.map(|stored| self.low_rank(stored, *shape, slice)).transpose()?);
            }
            changes.push(parts);
        }
        self.adapters = adapters;
        if changes.iter().flatten().all(Option::is_none) {
            return Ok(None);
        }
        let share =
            |size: usize, of: Slice| if slice == of { self.partition.range(size).len() } else { size };
        let inputs = share(layers[0].1[1], Slice::Cols);
        let outputs: Vec<_> = layers.iter().map(|(_, [outputs, _])| share(*outputs, Slice::Rows)).collect();
        Ok(Some(Lora::new(self.context, inputs, &outputs, changes)?))
    }

    /// This rank's share of what an adapter does to a layer `[outputs, inputs]`.
    fn low_rank(
        &mut self,
        stored: StoredLowRank,
        [outputs, inputs]: [usize; 2],
        slice: Slice,
    ) -> Result<LowRank, Error> {
        let StoredLowRank { a: (name_a, a), b: (name_b, b), rank, scale } = stored;
        let slice_of = |factor: Slice| if slice == factor { slice } else { Slice::Whole };
        let host_a =
            self.in_its_type(&name_a, self.sliced(a.matrix(&name_a, rank, inputs)?, slice_of(Slice::Cols)))?;
        let host_b =
            self.in_its_type(&name_b, self.sliced(b.matrix(&name_b, outputs, rank)?, slice_of(Slice::Rows)))?;
        self.size_in_bytes += (host_a.size_in_bytes() + host_b.size_in_bytes()) as u64;
        Ok(LowRank { a: self.place(&host_a, &a)?, b: self.place(&host_b, &b)?, scale })
    }

    /// What of the tensors taken so far is used as it lies in the files.
    pub(crate) fn take_mapped(&mut self) -> MappedWeights {
        std::mem::take(&mut self.mapped)
    }

    /// Refuses tensors that were not taken, except those for which `is_redundant` holds: a model that ignores a bias
    /// answers, but wrongly.
    pub fn finish(self, is_redundant: impl Fn(&str) -> bool) -> Result<(), Error> {
        for (adapter, took_any) in &self.adapters {
            adapter.finish(*took_any)?;
        }
        let unused: Vec<_> = self.tensors.into_keys().filter(|name| !is_redundant(name)).collect();
        match unused.first() {
            None => Ok(()),
            Some(example) => {
                Err(Error::Unused { dir: self.dir, num_tensors: unused.len(), example: example.clone() })
            }
        }
    }

    /// The tensor where operations expect it. Where that is not where it is stored, the stored pages are not read again.
    fn place(&mut self, tensor: &Tensor, stored: &StoredTensor) -> Result<Tensor, Error> {
        let placed = self.context.upload(tensor)?;
        self.mapped.add(&placed);
        if placed.place() == Place::Device {
            stored.release();
        }
        Ok(placed)
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<StoredTensor, Error> {
        let Some(stored) = self.tensors.remove(name) else {
            return Err(Error::Missing {
                dir: self.dir.clone(),
                name: name.to_owned(),
                expected: shape.to_vec(),
            });
        };
        if stored.shape != shape {
            return Err(Error::Shape {
                path: stored.path.to_path_buf(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: stored.shape,
            });
        }
        self.num_parameters += shape.iter().product::<usize>() as u64;
        Ok(stored)
    }
}

/// A matrix of the checkpoint that is read once.
pub(crate) struct StoredMatrix {
    name: String,
    /// f32, f16 or bf16, in place where the file keeps it aligned.
    pub(crate) matrix: Tensor,
    stored: StoredTensor,
}

impl StoredMatrix {
    /// Tells the system that its pages are not read again, so that they do not count as this process's memory.
    pub(crate) fn release(self) {
        self.stored.release();
    }

    /// What is wrong with its values.
    pub(crate) fn error(&self, message: String) -> Error {
        Error::Value { path: self.stored.path.to_path_buf(), name: self.name.clone(), message }
    }
}

impl StoredTensor {
    /// Tells the system that its pages are not read again.
    fn release(&self) {
        let size =
            self.shape.iter().product::<usize>() * self.dtype().map_or(0, |dtype| dtype.size_in_bytes());
        self.file.release(self.offset..self.offset + size);
    }

    /// The stored elements as a matrix, in place where the file keeps them aligned. `[rows, cols]` are those of the header,
    /// so the bytes lie in the file.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, Error> {
        let dtype = self.dtype().ok_or_else(|| Error::StoredType {
            path: self.path.to_path_buf(),
            name: name.to_owned(),
            found: format!("{:?}", self.stored_type),
        })?;
        if self.offset.is_multiple_of(dtype.size_in_bytes()) {
            return Ok(Tensor::mapped(self.file.clone(), self.offset, dtype, rows, cols)?);
        }
        Ok(copy_unaligned(&self.file, self.offset, dtype, rows, cols))
    }
}

/// Whether a tensor is used as it is stored: every value of `stored` is a value of `asked`, and the device multiplies
/// both (a GPU computes in the type of the weights).
fn represents(asked: DType, stored: DType, context: &Context) -> bool {
    asked == stored || (asked == DType::F32 && context.place() == Place::Host)
}

fn convert(name: &str, tensor: &Tensor, dtype: DType) -> Result<Tensor, Error> {
    let converted = tensor.to_dtype(dtype)?;
    let overflows = |row: usize| -> Result<bool, Error> {
        Ok(converted.view().row_f32(row)?.iter().any(|v| !v.is_finite()))
    };
    // Half precision ends at 65504; bfloat16 and f32 hold all that the other types do.
    if dtype == DType::F16 {
        for row in 0..converted.rows() {
            if overflows(row)? {
                return Err(Error::Overflow { name: name.to_owned(), dtype });
            }
        }
    }
    Ok(converted)
}

/// The format allows a tensor at any byte; a file of mixed element types may use that.
fn copy_unaligned(file: &MappedFile, offset: usize, dtype: DType, rows: usize, cols: usize) -> Tensor {
    let bytes = &file.bytes()[offset..offset + rows * cols * dtype.size_in_bytes()];
    let mut out = Tensor::zeros(rows, cols, dtype);
    match dtype {
        DType::F32 => fill(out.as_mut_slice(), bytes, f32::from_le_bytes),
        DType::F16 => fill(out.as_mut_slice(), bytes, f16::from_le_bytes),
        _ => fill(out.as_mut_slice(), bytes, bf16::from_le_bytes),
    }
    out
}

fn fill<T, const N: usize>(out: &mut [T], bytes: &[u8], from_le_bytes: fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    out.iter_mut().zip(elements).for_each(|(out, element)| *out = from_le_bytes(*element));
}
