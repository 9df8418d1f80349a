//! The plugin folder at one moment: the files of each plugin, whether a file is still the one that
//! was seen, and its bytes.
//!
//! A plugin is named after its file: without `.wasm`, without a leading number and hyphen
//! (`10-discard.wasm` is `discard`), and with hyphens for underscores (Cargo writes the crate
//! `my-router` as `my_router.wasm`). The operator chose this name and sees it; the name in the
//! guest's manifest does not count.
//!
//! Nothing here blocks, and a file that was written to while it was read is never returned.
//! `watcher` decides when to take a snapshot; loading is in `registry`.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::AdminError;
use crate::escape::printable;

/// The suffix of files that are being written by a node.
const DRAFT: &str = ".upload";
/// The suffix of the hidden files that record removals.
const REMOVED: &str = ".removed";
/// The age after which an unchanged draft counts as abandoned.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// The files of each plugin, by plugin name, sorted by path. More than one file is a mistake.
pub(super) type FolderSnapshot = BTreeMap<String, Vec<FileStamp>>;

/// A file as it was seen. Equal stamps imply equal bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileStamp {
    pub(super) path: PathBuf,
    /// `None`: the metadata could not be read, for example of a dangling link.
    stamp: Option<Stamp>,
}

/// The metadata that changes with the bytes of a file. It includes the time of the last status
/// change (`ctime`), because programs can set the modification time back, and copying often does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    written: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &Metadata) -> Self {
        let (written, changed) = (
            (file.mtime(), file.mtime_nsec()),
            (file.ctime(), file.ctime_nsec()),
        );
        Self {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.len(),
            written,
            changed,
        }
    }
}

impl FileStamp {
    /// The order of file names as people count: `9-a.wasm` before `10-a.wasm`.
    pub(super) fn natural_order(&self, other: &Self) -> Ordering {
        let name = |file: &Self| file.path.file_name().unwrap_or_default().to_owned();
        let (one, other_name) = (name(self), name(other));
        natural_order(one.as_encoded_bytes(), other_name.as_encoded_bytes())
            // Equal numbers with other leading zeros, or another folder.
            .then_with(|| self.path.cmp(&other.path))
    }

    /// The file name, for messages.
    pub(super) fn file(&self) -> String {
        printable(&self.path.file_name().unwrap_or_default().to_string_lossy())
    }
}

/// Checks that the plugin folder can be read.
///
/// # Errors
/// One line that names the folder and the fix.
pub fn check_folder(dir: &Path) -> Result<(), String> {
    snapshot(dir).map(drop)
}

/// Lists the `.wasm` files. Names that begin with a dot are files that are still being written.
///
/// # Errors
/// The folder cannot be read; the text includes the fix.
pub(super) fn snapshot(dir: &Path) -> Result<FolderSnapshot, String> {
    let unreadable = |error| {
        format!(
            "the plugin folder {} cannot be read: {error}; create it, or set plugins.dir",
            dir.display()
        )
    };
    let mut snapshot = FolderSnapshot::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if file.ends_with(".wasm") && !file.starts_with('.') {
            // It appears in logs, readiness and metrics.
            let name = printable(&name_of_file(&file));
            // Follows links: the target is the file that is read, and it changes when a folder is
            // swapped through a link.
            let stamp = fs::metadata(&path).ok().map(|file| Stamp::of(&file));
            snapshot
                .entry(name)
                .or_default()
                .push(FileStamp { path, stamp });
        }
    }
    for files in snapshot.values_mut() {
        files.sort_by(FileStamp::natural_order);
    }
    Ok(snapshot)
}

/// Compares runs of digits by their value and everything else by its bytes.
fn natural_order(mut one: &[u8], mut other: &[u8]) -> Ordering {
    loop {
        let (Some(a), Some(b)) = (one.first(), other.first()) else {
            return one.len().cmp(&other.len());
        };
        let order = if a.is_ascii_digit() && b.is_ascii_digit() {
            let (a, b) = (take_number(&mut one), take_number(&mut other));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            let order = a.cmp(b);
            (one, other) = (&one[1..], &other[1..]);
            order
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Takes the digits at the beginning, and returns them without leading zeros.
fn take_number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|byte| !byte.is_ascii_digit());
    let (digits, rest) = text.split_at(end.unwrap_or(text.len()));
    *text = rest;
    let zeros = digits.iter().take_while(|byte| **byte == b'0').count();
    &digits[zeros..]
}

/// Removes drafts of nodes that were killed while they wrote.
fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let age = entry
            .metadata()
            .and_then(|file| file.modified())
            .ok()
            .and_then(|written| written.elapsed().ok());
        if name.starts_with('.') && name.ends_with(DRAFT) && age.is_some_and(|age| age > ABANDONED)
        {
            // A failure is ignored: without permission the write that follows fails and reports it.
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Writes a file atomically and returns it as it was seen.
///
/// # Errors
/// The file cannot be written; the text names it.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<FileStamp, AdminError> {
    let unwritable = |error: std::io::Error| {
        let text = format!(
            "{} cannot be written: {error}; make the folder writable for this node, or copy the file there yourself",
            path.display()
        );
        folder_error(&error, text)
    };
    sweep(path.parent().unwrap_or(Path::new(".")));
    // A random name: other nodes may share the folder and receive the same file at this moment.
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{file}.{:016x}{DRAFT}", rand::random::<u64>()));
    let written = || {
        let mut file = File::options().write(true).create_new(true).open(&draft)?;
        file.write_all(bytes)?;
        // Synced before it is renamed: a node that is killed meanwhile finds either the old file or
        // the new one, never a partial one.
        file.sync_all()?;
        let file = file.metadata()?;
        fs::rename(&draft, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(file)
    };
    match written() {
        Ok(file) => Ok(FileStamp {
            path: path.to_owned(),
            stamp: Some(Stamp::of(&file)),
        }),
        Err(error) => {
            // Best effort: the error already reports that the folder is not writable.
            drop(fs::remove_file(&draft));
            Err(unwritable(error))
        }
    }
}

/// Checks that files can be created in this folder, by creating one and removing it again.
///
/// # Errors
/// That of the system, for example of a read-only mount.
pub(super) fn check_writable(dir: &Path) -> std::io::Result<()> {
    let draft = dir.join(format!(".check.{:016x}{DRAFT}", rand::random::<u64>()));
    File::options().write(true).create_new(true).open(&draft)?;
    fs::remove_file(&draft)
}

/// Removes a file; a missing one is not an error.
///
/// # Errors
/// The file cannot be removed; the text names it.
pub(super) fn remove(path: &Path) -> Result<(), AdminError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            let text = format!(
                "{} cannot be removed: {error}; remove it yourself",
                path.display()
            );
            Err(folder_error(&error, text))
        }
        _ => Ok(()),
    }
}

/// A folder that is mounted read-only, or belongs to another user, is how the node was set up and
/// not a fault.
fn folder_error(error: &std::io::Error, text: String) -> AdminError {
    match error.kind() {
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => AdminError::Impossible(text),
        _ => AdminError::Folder(text),
    }
}

/// The plugins that an admin command removed, on this node or another one with this folder. A file
/// that is gone for any other reason is missed.
/// Each with the time of its record.
pub(super) fn removals(dir: &Path) -> BTreeMap<String, SystemTime> {
    let name = |entry: fs::DirEntry| {
        let file = entry.file_name().to_string_lossy().into_owned();
        let name = file.strip_prefix('.')?.strip_suffix(REMOVED)?;
        // A link or a folder with this name is not a record: no command makes one.
        let record = fs::symlink_metadata(entry.path()).ok();
        let at = record.filter(Metadata::is_file)?.modified().ok()?;
        is_name(name).then(|| (name.to_owned(), at))
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(name).collect()
}

/// Records that a plugin was removed on purpose, for other nodes with this folder and later starts.
///
/// # Errors
/// The record cannot be written; the text names it.
pub(super) fn note_removal(dir: &Path, name: &str) -> Result<(), AdminError> {
    let path = dir.join(format!(".{name}{REMOVED}"));
    let text = "removed by an admin command; delete this file to miss the plugin\n";
    fs::write(&path, text).map_err(|error| {
        let text = format!(
            "{} cannot be written: {error}; without it, other nodes with this folder and this node after a restart wait for the plugin",
            path.display()
        );
        folder_error(&error, text)
    })
}

/// Withdraws the record of a removal, because the plugin has a file again. A record that cannot be
/// deleted has no effect while the file exists.
pub(super) fn forget_removal(dir: &Path, name: &str) {
    drop(fs::remove_file(dir.join(format!(".{name}{REMOVED}"))));
}

/// Whether `NAME.wasm` is a valid file name that yields this plugin name.
pub(super) fn is_name(name: &str) -> bool {
    let is_plain =
        name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') && !name.starts_with('-');
    is_plain && (1..=64).contains(&name.len()) && name_of_file(&format!("{name}.wasm")) == name
}

/// Reads a file.
///
/// # Errors
/// Why not, as the rest of a sentence that begins with the file name: it is larger than `max`
/// bytes, is not a regular file, or was being written.
pub(super) fn read(path: &Path, max: usize) -> Result<Vec<u8>, String> {
    let unreadable = |error| format!("cannot be read: {error}");
    // Checked before it is opened: opening a pipe would block until its other end is opened.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let file = File::open(path).map_err(unreadable)?;
    let before = Stamp::of(&file.metadata().map_err(unreadable)?);
    // Checked before it is read, so that memory stays bounded.
    if before.bytes > max as u64 {
        return Err(format!("has {} bytes; the limit is {max}", before.bytes));
    }
    let mut bytes = Vec::new();
    (&file)
        .take(before.bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 != before.bytes
        || Stamp::of(&file.metadata().map_err(unreadable)?) != before
    {
        return Err("is still being written: it changed while it was being read".to_owned());
    }
    Ok(bytes)
}

/// The plugin name for a file name: without `.wasm`, without a leading number and hyphen, with
/// hyphens for underscores.
pub fn name_of_file(file: &str) -> String {
    let stem = file.strip_suffix(".wasm").unwrap_or(file);
    let unnumbered = match stem.split_once('-') {
        Some((number, rest))
            if !number.is_empty()
                && number.bytes().all(|b| b.is_ascii_digit())
                && !rest.is_empty() =>
        {
            rest
        }
        _ => stem,
    };
    unnumbered.replace('_', "-")
}

#[cfg(test)]
pub(in crate::plugin) mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;
    use std::time::{Instant, SystemTime};

    use super::*;

    /// A test folder that is removed when dropped.
    pub(in crate::plugin) struct Scratch(pub(in crate::plugin) PathBuf);

    impl Scratch {
        pub(in crate::plugin) fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("pointsman-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        pub(in crate::plugin::registry) fn snapshot(&self) -> FolderSnapshot {
            snapshot(&self.0).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn a_later_upload_removes_the_drafts_of_killed_nodes() {
        let folder = Scratch::new("drafts");
        let make = |name: &str, age: Duration| {
            let file = File::create(folder.0.join(name)).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        };
        make(".a.wasm.0123456789abcdef.upload", 2 * ABANDONED);
        make(".a.wasm.fedcba9876543210.upload", ABANDONED / 2);
        make(".foreign", 2 * ABANDONED);
        write(&folder.0.join("a.wasm"), b"").unwrap();
        let mut left: Vec<_> = fs::read_dir(&folder.0)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(
            left,
            [".a.wasm.fedcba9876543210.upload", ".foreign", "a.wasm"]
        );
    }

    #[test]
    fn a_rewritten_file_is_detected_even_if_its_modification_time_is_set_back() {
        let folder = Scratch::new("stamps");
        let file = folder.0.join("a.wasm");
        fs::write(&file, "one").unwrap();
        let written = fs::metadata(&file).unwrap().modified().unwrap();
        let first = folder.snapshot();
        assert_eq!(first, folder.snapshot());
        // The clock of a file system may tick only every few milliseconds.
        let deadline = Instant::now() + Duration::from_secs(5);
        while folder.snapshot() == first {
            assert!(
                Instant::now() < deadline,
                "the change was never seen: {first:?}"
            );
            fs::write(&file, "two").unwrap();
            File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_modified(written)
                .unwrap();
        }

        // Two folders behind one link, as orchestrators mount them.
        for version in ["v1", "v2"] {
            fs::create_dir(folder.0.join(version)).unwrap();
            fs::write(folder.0.join(version).join("b.wasm"), version).unwrap();
        }
        symlink("v1", folder.0.join("now")).unwrap();
        symlink("now/b.wasm", folder.0.join("b.wasm")).unwrap();
        let before = folder.snapshot();
        symlink("v2", folder.0.join("next")).unwrap();
        fs::rename(folder.0.join("next"), folder.0.join("now")).unwrap();
        let after = folder.snapshot();
        assert!(
            before["a"] == after["a"] && before["b"] != after["b"],
            "{before:?} {after:?}"
        );
        assert_eq!(read(&folder.0.join("b.wasm"), 10).unwrap(), b"v2");
    }

    #[test]
    fn unreadable_files_are_reported_without_blocking() {
        let folder = Scratch::new("reading");
        fs::write(folder.0.join("large.wasm"), [0; 11]).unwrap();
        fs::create_dir(folder.0.join("folder.wasm")).unwrap();
        assert!(
            Command::new("mkfifo")
                .arg(folder.0.join("pipe.wasm"))
                .status()
                .unwrap()
                .success()
        );
        symlink("nowhere", folder.0.join("link.wasm")).unwrap();
        assert_eq!(
            folder.snapshot().into_keys().collect::<Vec<_>>(),
            ["folder", "large", "link", "pipe"]
        );
        for (file, expect) in [
            ("large.wasm", "has 11 bytes; the limit is 10"),
            ("folder.wasm", "is not a regular file"),
            ("pipe.wasm", "is not a regular file"),
            ("link.wasm", "cannot be read: No such file"),
        ] {
            let error = read(&folder.0.join(file), 10).unwrap_err();
            assert!(error.contains(expect), "{file}: {error}");
        }
    }

    #[test]
    fn numbers_in_file_names_count_by_their_value() {
        let mut names = [
            "10-b.wasm",
            "9-a.wasm",
            "b.wasm",
            "010-a.wasm",
            "a12.wasm",
            "a2.wasm",
            "a.wasm",
            "2-c.wasm",
        ]
        .map(|name| FileStamp {
            path: PathBuf::from(name),
            stamp: None,
        });
        names.sort_by(FileStamp::natural_order);
        assert_eq!(
            names.map(|file| file.file()),
            [
                "2-c.wasm",
                "9-a.wasm",
                "010-a.wasm",
                "10-b.wasm",
                "a.wasm",
                "a2.wasm",
                "a12.wasm",
                "b.wasm"
            ]
        );
    }

    #[test]
    fn a_plugin_is_named_after_its_file() {
        for (file, name) in [
            ("address.wasm", "address"),
            ("10-discard.wasm", "discard"),
            ("my_router.wasm", "my-router"),
            ("2-my_router.wasm", "my-router"),
            ("x-y.wasm", "x-y"),
            ("10-.wasm", "10-"),
            ("10.wasm", "10"),
        ] {
            assert_eq!(name_of_file(file), name);
        }
        for name in ["a", "my-router", "x1", "10"] {
            assert!(is_name(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "../a",
            "a/b",
            ".a",
            "-a",
            "1-a",
            "my_router",
            "a.b",
            "\u{e4}",
            "a\n",
            &"a".repeat(65),
        ] {
            assert!(!is_name(name), "{name}");
        }
    }
}
