//! Reads files that an operator replaces while the node runs: neither a pipe nor a file without end
//! may stop the node.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;

/// The size up to which a configuration, a certificate or a file with secrets or keys is read, in
/// bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// Reads a regular file of up to 1 MiB.
///
/// # Errors
/// It cannot be read, is not a regular file, or is larger.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a pipe would otherwise block until its other end is opened.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!(
            "it has more than {MAX_BYTES} bytes"
        )));
    }
    Ok(bytes)
}

/// As [`read`], a text in UTF-8.
///
/// # Errors
/// As for [`read`]; or it is not UTF-8.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}
