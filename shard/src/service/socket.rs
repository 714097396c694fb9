//! The Unix socket: for its owner only, and never taken from a shard that still listens.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

/// `sockaddr_un` has 108 bytes for a path with its closing zero.
const MAX_PATH_BYTES: usize = 107;

/// A bound socket; its file is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
}

impl Socket {
    /// Binds `path` with mode 0600. A file that a dead shard left behind is replaced.
    pub(super) fn bind(path: &Path) -> anyhow::Result<(Self, UnixListener)> {
        let parent = match path.parent() {
            Some(parent) if parent == Path::new("") => Path::new("."),
            Some(parent) => parent,
            None => bail!("--uds-path {} is not a path for a socket", path.display()),
        };
        ensure!(
            parent.is_dir(),
            "--uds-path {}: the directory {} does not exist: create it first",
            path.display(),
            parent.display()
        );
        check_free(path)?;
        // Between bind and chmod a socket has the mode that the umask gives, so it is made in a directory that nobody
        // else can enter. (The umask itself belongs to all threads of a process.)
        let private = parent.join(format!(".{}", std::process::id()));
        let bound_path = private.join("s");
        for path in [path, &bound_path] {
            let len = path.as_os_str().as_bytes().len();
            ensure!(
                len <= MAX_PATH_BYTES,
                "the socket path {} has {len} bytes but the system allows {MAX_PATH_BYTES}: choose a shorter --uds-path",
                path.display()
            );
        }
        // Left behind by a process of the same id that died here.
        let _ = std::fs::remove_dir_all(&private);
        DirBuilder::new()
            .mode(0o700)
            .create(&private)
            .with_context(|| format!("creating {}", private.display()))?;
        let listener = bind_and_move(&bound_path, path);
        let _ = std::fs::remove_dir_all(&private);
        let listener = listener.with_context(|| format!("binding {}", path.display()))?;
        Ok((Self { path: path.to_owned() }, listener))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nothing is lost if it is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn bind_and_move(bound_path: &Path, path: &Path) -> std::io::Result<UnixListener> {
    let listener = UnixListener::bind(bound_path)?;
    listener.set_nonblocking(true)?;
    std::fs::set_permissions(bound_path, Permissions::from_mode(0o600))?;
    std::fs::rename(bound_path, path)?;
    Ok(listener)
}

/// Refuses a path where somebody listens, or that is something else than a socket.
fn check_free(path: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    ensure!(metadata.file_type().is_socket(), "--uds-path {} exists and is not a socket", path.display());
    ensure!(
        UnixStream::connect(path).is_err(),
        "--uds-path {}: another process listens there: end it, or choose another path",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_for_its_owner_only_and_goes_with_its_guard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard-0");
        let (socket, _listener) = Socket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_socket_is_replaced_only_if_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard-0");
        let listener = UnixListener::bind(&path).unwrap();
        let message = Socket::bind(&path).unwrap_err().to_string();
        assert!(message.contains("another process listens"), "{message}");
        drop(listener);
        let (_socket, _listener) = Socket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn paths_that_cannot_work_are_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let check = |path: PathBuf, expected: &str| {
            let message = Socket::bind(&path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(dir.path().join("no/shard-0"), "does not exist");
        check(dir.path().join("x".repeat(108)), "choose a shorter");
        std::fs::write(dir.path().join("file"), "").unwrap();
        check(dir.path().join("file"), "is not a socket");
    }
}
