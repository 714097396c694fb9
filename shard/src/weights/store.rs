//! A checkpoint's tensors as one rank uses them: sliced, and in place unless their element type must change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use kernels::mmap::MappedFile;
use kernels::{DType, Tensor};

use super::safetensors::{self, StoredTensor};
use super::{Error, Partition, Slice};

/// The tensors of a checkpoint, each to be taken once.
pub struct Weights {
    dir: PathBuf,
    partition: Partition,
    /// The element type asked for; `None` keeps what is stored.
    dtype: Option<DType>,
    tensors: BTreeMap<String, StoredTensor>,
    num_parameters: u64,
    size_in_bytes: u64,
}

impl Weights {
    /// Maps the files in `dir` and reads their headers.
    ///
    /// With `dtype`, tensors whose stored type it does not represent exactly are converted when they are taken; the others,
    /// and all without `dtype`, are used as they lie in the file.
    pub fn open(dir: &Path, dtype: Option<DType>, partition: Partition) -> Result<Self, Error> {
        let tensors = safetensors::open(dir)?;
        Ok(Self { dir: dir.to_owned(), partition, dtype, tensors, num_parameters: 0, size_in_bytes: 0 })
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
    pub fn take_matrix(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        slice: Slice,
    ) -> Result<Tensor, Error> {
        let stored = self.take(name, &[rows, cols])?;
        let whole = stored.matrix(name, rows, cols)?;
        let tensor = match slice {
            Slice::Whole => whole,
            Slice::Rows => {
                let part = self.partition.range(rows);
                whole.narrow_rows(part.start, part.len())
            }
            Slice::Cols => {
                let part = self.partition.range(cols);
                whole.narrow_cols(part.start, part.len())
            }
        };
        let tensor = match self.dtype {
            Some(dtype) if !represents(dtype, tensor.dtype()) => convert(name, &tensor, dtype)?,
            _ => tensor,
        };
        self.size_in_bytes += tensor.size_in_bytes() as u64;
        Ok(tensor)
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
        Ok(tensor)
    }

    /// Refuses tensors that were not taken, except those for which `is_redundant` holds: a model that ignores a bias
    /// answers, but wrongly.
    pub fn finish(self, is_redundant: impl Fn(&str) -> bool) -> Result<(), Error> {
        let unused: Vec<_> = self.tensors.into_keys().filter(|name| !is_redundant(name)).collect();
        match unused.first() {
            None => Ok(()),
            Some(example) => {
                Err(Error::Unused { dir: self.dir, num_tensors: unused.len(), example: example.clone() })
            }
        }
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

impl StoredTensor {
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

/// Whether every value of `stored` is a value of `asked`.
fn represents(asked: DType, stored: DType) -> bool {
    asked == stored || asked == DType::F32
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
