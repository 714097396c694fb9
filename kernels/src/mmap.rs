//! Read-only mapped files.

use std::path::Path;

use crate::tensor::{Error, Result};

/// A file mapped for reading. Ranks that map the same file share its pages.
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole file.
    ///
    /// The file must not be truncated or written while it is mapped: readers would see the change or end with
    /// SIGBUS. Checkpoints are written once and then only read.
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("mapping {}", path.display());
        let file = std::fs::File::open(path).map_err(|source| Error::Io { context: context(), source })?;
        // SAFETY: see above; the project never writes to model directories.
        let map = unsafe { memmap2::Mmap::map(&file) }
            .map_err(|source| Error::Io { context: context(), source })?;
        Ok(Self { map })
    }

    /// Tells the system that these bytes are not read soon: they no longer count as this process's memory, and are there
    /// again (from the page cache or the disk) when they are read after all.
    ///
    /// # Panics
    /// Where the range is outside.
    pub fn release(&self, range: std::ops::Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.map.len(), "release: {range:?} of the file");
        // SAFETY: the map is of a file and is never written, so there is nothing in its pages that would be lost.
        // It is only advice: that it was not followed is no error.
        let _ = unsafe {
            self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
        };
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
