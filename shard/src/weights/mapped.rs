//! What of the checkpoint's files is used as it lies there.

use std::ops::Range;
use std::sync::Arc;

use kernels::Tensor;
use kernels::mmap::MappedFile;

/// Bytes between two tensors that are moved with them: norms and biases, which are used in copies.
const GAP_BYTES: usize = 1 << 20;

/// From this share of a file in huge pages, nothing is left to be gained.
const MOST_IN_HUGE_PAGES: f64 = 0.9;

/// Parts of mapped files that are used in place.
#[derive(Default)]
pub struct MappedWeights {
    parts: Vec<(Arc<MappedFile>, Range<usize>)>,
}

impl MappedWeights {
    /// Adds a tensor, if it lies in a file without gaps: of a matrix of whose columns other ranks have a share, all of it would
    /// be taken by each.
    pub(super) fn add(&mut self, tensor: &Tensor) {
        if let Some((file, range)) = tensor.in_file() {
            self.parts.push((Arc::clone(file), range));
        }
    }

    /// Their bytes.
    pub fn size_in_bytes(&self) -> u64 {
        self.parts.iter().map(|(_, range)| range.len() as u64).sum()
    }

    /// Moves them to huge pages ([`MappedFile::move_to_huge_pages`]), all that do not lie in such yet, while others may use
    /// them. Returns how many bytes that are.
    ///
    /// # Errors
    /// Where the system has no memory for it: what was not moved is used in place, as before.
    pub fn move_to_huge_pages(self) -> std::io::Result<usize> {
        let mut moved = 0;
        for (file, ranges) in self.merged() {
            if file.share_in_huge_pages().is_some_and(|share| share >= MOST_IN_HUGE_PAGES) {
                continue;
            }
            for range in ranges {
                moved += file.move_to_huge_pages(range)?;
            }
        }
        Ok(moved)
    }

    /// Of each file, in order, what is not far apart as one.
    fn merged(mut self) -> Vec<(Arc<MappedFile>, Vec<Range<usize>>)> {
        let mut files: Vec<(Arc<MappedFile>, Vec<Range<usize>>)> = Vec::new();
        self.parts.sort_by_key(|(file, range)| (Arc::as_ptr(file).addr(), range.start));
        for (file, range) in self.parts {
            match files.last_mut().filter(|(last, _)| Arc::ptr_eq(last, &file)) {
                Some((_, ranges)) => match ranges.last_mut() {
                    Some(last) if range.start <= last.end + GAP_BYTES => last.end = last.end.max(range.end),
                    _ => ranges.push(range),
                },
                None => files.push((file, vec![range])),
            }
        }
        files
    }
}

#[cfg(test)]
mod tests {
    use kernels::DType;

    use super::*;

    #[test]
    fn tensors_that_lie_near_each_other_are_moved_together() {
        let open = || {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(8 << 20).unwrap();
            Arc::new(MappedFile::open(file.path()).unwrap())
        };
        let (first, second) = (open(), open());
        let tensor = |file: &Arc<MappedFile>, offset: usize, rows: usize| {
            Tensor::mapped(Arc::clone(file), offset, DType::BF16, rows, 512).unwrap()
        };
        let mut mapped = MappedWeights::default();
        mapped.add(&tensor(&first, 4096, 1024));
        mapped.add(&tensor(&second, 0, 8));
        mapped.add(&tensor(&first, 0, 4));
        mapped.add(&tensor(&first, 6 << 20, 64).narrow_rows(32, 32));
        // Neither a share of the columns, nor what is not in a file.
        mapped.add(&tensor(&first, 0, 4096).narrow_cols(256, 256));
        mapped.add(&Tensor::zeros(4, 4, DType::F32));
        assert_eq!(mapped.size_in_bytes(), 1024 * (1024 + 8 + 4 + 32));
        let merged = mapped.merged();
        let of = |wanted: &Arc<MappedFile>| {
            let ranges = merged.iter().filter(|(file, _)| Arc::ptr_eq(file, wanted)).flat_map(|(_, r)| r);
            ranges.map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        let last = (6 << 20) + 32 * 1024;
        assert_eq!(of(&first), [(0, (1 << 20) + 4096), (last, last + 32 * 1024)]);
        assert_eq!(of(&second), [(0, 8 * 1024)]);
    }
}
