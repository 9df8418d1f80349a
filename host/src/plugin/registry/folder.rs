//! The folder of plugins as it is at one moment: which files belong to which plugin, whether a file is still the one that was seen, and its
//! bytes.
//!
//! A plugin is called by the name of its file, without `.wasm`, without a leading number and hyphen (`10-discard.wasm` is `discard`), and with
//! hyphens for underscores (Cargo writes the crate `my-router` as `my_router.wasm`): the name that the operator gave and sees, and not what
//! the guest says of itself. It promises to wait for nothing, and to answer no bytes that somebody was writing meanwhile. When to look is
//! `watcher`'s business; what becomes of what was seen, `registry`'s.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the names end of files that are being written here.
const DRAFT: &str = ".upload";
/// After so long without a change, nobody is writing them any more.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// The files of each plugin, by its name. More than one is a mistake; they are in the order of their names.
pub(in crate::plugin) type Look = BTreeMap<String, Vec<Sighting>>;

/// A file as it was seen. Equal sightings are of the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::plugin) struct Sighting {
    pub(in crate::plugin) path: PathBuf,
    /// `None`: it could not be asked for, as where a link leads nowhere.
    stamp: Option<Stamp>,
}

/// Whatever of a file changes with its bytes. The time of the last change of its state is among it, since any program may set back the time
/// at which the bytes were written, and copying often does.
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

impl Sighting {
    /// The name of the file, for people.
    pub(in crate::plugin) fn file(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

/// Looks at the `.wasm` files. Those whose names begin with a dot are somebody's half-written ones.
///
/// # Errors
/// If the folder cannot be read, with the fix.
pub(in crate::plugin) fn look(dir: &Path) -> Result<Look, String> {
    let unreadable = |error| {
        format!(
            "the folder of plugins {} cannot be read: {error}; make it, or set plugins.dir",
            dir.display()
        )
    };
    let mut look = Look::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if file.ends_with(".wasm") && !file.starts_with('.') {
            let name = called(&file);
            // Of what a link leads to: the file that is read, and that changes where a folder is swapped by its link.
            let stamp = fs::metadata(&path).ok().map(|file| Stamp::of(&file));
            look.entry(name).or_default().push(Sighting { path, stamp });
        }
    }
    for files in look.values_mut() {
        files.sort_by(|a, b| a.path.cmp(&b.path));
    }
    Ok(look)
}

/// Removes drafts of nodes that were killed as they wrote.
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
            // Whoever cannot remove it cannot write here either, and is told so.
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// A file that has just been written here.
///
/// # Errors
/// It cannot be written; the text names it.
pub(in crate::plugin) fn write(path: &Path, bytes: &[u8]) -> Result<Sighting, String> {
    let unwritable = |error: std::io::Error| {
        format!(
            "{} cannot be written: {error}; let this node write there, or copy the file there yourself",
            path.display()
        )
    };
    sweep(path.parent().unwrap_or(Path::new(".")));
    // A name of its own: other nodes may share the folder, and be given the same file at this moment.
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{file}.{:016x}{DRAFT}", rand::random::<u64>()));
    let written = || {
        let mut file = File::options().write(true).create_new(true).open(&draft)?;
        file.write_all(bytes)?;
        // Whole on the disk before it has its name: a node that is killed meanwhile finds the old file or the new one.
        file.sync_all()?;
        let file = file.metadata()?;
        fs::rename(&draft, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(file)
    };
    match written() {
        Ok(file) => Ok(Sighting {
            path: path.to_owned(),
            stamp: Some(Stamp::of(&file)),
        }),
        Err(error) => {
            // Nothing may be left of it; that it cannot be removed either, the error says.
            drop(fs::remove_file(&draft));
            Err(unwritable(error))
        }
    }
}

/// # Errors
/// It cannot be removed; the text names it.
pub(in crate::plugin) fn remove(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(format!(
            "{} cannot be removed: {error}; remove it yourself",
            path.display()
        )),
        _ => Ok(()),
    }
}

/// Whether a file may be made for a plugin of this name, and is then this plugin's.
pub(in crate::plugin) fn is_name(name: &str) -> bool {
    let is_plain =
        name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') && !name.starts_with('-');
    is_plain && (1..=64).contains(&name.len()) && called(&format!("{name}.wasm")) == name
}

/// The bytes of a file.
///
/// # Errors
/// Why not, as the end of a sentence that begins with the file's name: it has more than `max` bytes, is none, or was being written.
pub(in crate::plugin) fn read(path: &Path, max: usize) -> Result<Vec<u8>, String> {
    let unreadable = |error| format!("cannot be read: {error}");
    // To open a pipe is to wait for its other end.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is no file".to_owned());
    }
    let file = File::open(path).map_err(unreadable)?;
    let before = Stamp::of(&file.metadata().map_err(unreadable)?);
    // Not read beyond what can be used, whatever it is.
    if before.bytes > max as u64 {
        return Err(format!("has {} bytes; {max} is the most", before.bytes));
    }
    let mut bytes = Vec::new();
    (&file)
        .take(before.bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 != before.bytes
        || Stamp::of(&file.metadata().map_err(unreadable)?) != before
    {
        return Err("is still being written: it changed while it was read".to_owned());
    }
    Ok(bytes)
}

/// What the plugin in a file of this name is called: without `.wasm`, without a leading number and hyphen, with hyphens for underscores.
pub fn called(file: &str) -> String {
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

    /// A folder of a test that goes away with it.
    pub(in crate::plugin) struct Scratch(pub(in crate::plugin) PathBuf);

    impl Scratch {
        pub(in crate::plugin) fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("pointsman-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        pub(in crate::plugin) fn look(&self) -> Look {
            look(&self.0).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn what_a_killed_node_left_half_written_goes_with_a_later_upload() {
        let folder = Scratch::new("drafts");
        let make = |name: &str, age: Duration| {
            let file = File::create(folder.0.join(name)).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        };
        make(".a.wasm.0123456789abcdef.upload", 2 * ABANDONED);
        make(".a.wasm.fedcba9876543210.upload", ABANDONED / 2);
        make(".somebodys", 2 * ABANDONED);
        write(&folder.0.join("a.wasm"), b"").unwrap();
        let mut left: Vec<_> = fs::read_dir(&folder.0)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(
            left,
            [".a.wasm.fedcba9876543210.upload", ".somebodys", "a.wasm"]
        );
    }

    #[test]
    fn a_file_that_was_written_is_seen_to_be_another_whatever_its_times_say() {
        let folder = Scratch::new("sightings");
        let file = folder.0.join("a.wasm");
        fs::write(&file, "one").unwrap();
        let written = fs::metadata(&file).unwrap().modified().unwrap();
        let first = folder.look();
        assert_eq!(first, folder.look());
        // The clock of a file system ticks every few milliseconds.
        let deadline = Instant::now() + Duration::from_secs(5);
        while folder.look() == first {
            assert!(Instant::now() < deadline, "{first:?} is all that was seen");
            fs::write(&file, "two").unwrap();
            File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_modified(written)
                .unwrap();
        }

        // Two folders of which a link names one, as orchestrators mount them.
        for version in ["v1", "v2"] {
            fs::create_dir(folder.0.join(version)).unwrap();
            fs::write(folder.0.join(version).join("b.wasm"), version).unwrap();
        }
        symlink("v1", folder.0.join("now")).unwrap();
        symlink("now/b.wasm", folder.0.join("b.wasm")).unwrap();
        let before = folder.look();
        symlink("v2", folder.0.join("next")).unwrap();
        fs::rename(folder.0.join("next"), folder.0.join("now")).unwrap();
        let after = folder.look();
        assert!(
            before["a"] == after["a"] && before["b"] != after["b"],
            "{before:?} {after:?}"
        );
        assert_eq!(read(&folder.0.join("b.wasm"), 10).unwrap(), b"v2");
    }

    #[test]
    fn what_cannot_be_read_as_a_plugin_is_told_and_not_waited_for() {
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
            folder.look().into_keys().collect::<Vec<_>>(),
            ["folder", "large", "link", "pipe"]
        );
        for (file, expect) in [
            ("large.wasm", "has 11 bytes; 10 is the most"),
            ("folder.wasm", "is no file"),
            ("pipe.wasm", "is no file"),
            ("link.wasm", "cannot be read: No such file"),
        ] {
            let error = read(&folder.0.join(file), 10).unwrap_err();
            assert!(error.contains(expect), "{file}: {error}");
        }
    }

    #[test]
    fn a_plugin_is_called_by_its_file() {
        for (file, name) in [
            ("address.wasm", "address"),
            ("10-discard.wasm", "discard"),
            ("my_router.wasm", "my-router"),
            ("2-my_router.wasm", "my-router"),
            ("x-y.wasm", "x-y"),
            ("10-.wasm", "10-"),
            ("10.wasm", "10"),
        ] {
            assert_eq!(called(file), name);
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
