//! The cache of compiled plugins for the next start: one file of machine code per plugin file, in a
//! folder that is private to this user.
//!
//! Compiled code is executed as it is found, so code that another user may have written is never
//! used: the folder and its files must belong to the user of this process, and no other user may
//! have write access. Any other folder is refused with the reason, and the node runs without a
//! cache. The key of a file is a hash of the plugin's bytes and everything in the engine that
//! shapes the code (its version, its settings, the processor). A checksum protects the contents: a
//! truncated or corrupt file is removed and its plugin is compiled again.
//!
//! Several processes may share a folder: files are created by renaming and never modified. The
//! folder holds at most [`MAX_FILES`] files of at most [`MAX_BYTES`] in total; the least recently
//! used are evicted first. Compiling is in `compile`.
//!
//! This is the only file of the host that may use `unsafe`, for a single call: see [`revive`].

use std::ffi::CString;
use std::fs::{DirBuilder, File, Metadata};
use std::hash::{Hash as _, Hasher};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::process::geteuid;
use sha2::{Digest as _, Sha256};
use wasmtime::component::Component;

use crate::telemetry::metrics::{Metrics, PluginCacheLabel};

/// The maximum number of files in the folder.
const MAX_FILES: usize = 256;
/// The maximum size of all files together, in bytes. Compiled Python takes about 100 MiB.
const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// The maximum size of one file, in bytes.
pub(super) const MAX_FILE_BYTES: u64 = MAX_BYTES / 4;
/// The first bytes of a file; the number is incremented when the layout changes.
const MAGIC: &[u8; 24] = b"pointsman plugin code 1\n";
/// The suffix of file names.
const SUFFIX: &str = ".code";
/// An older draft was left behind by a process that died.
const DRAFT_AGE: Duration = Duration::from_secs(3600);

/// A handle that is cheap to clone.
#[derive(Clone, Debug)]
pub struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    /// The folder that was checked, even if its name now refers to another one.
    folder: OwnedFd,
    metrics: Metrics,
}

/// The key of compiled code.
pub(super) struct Key([u8; 32]);

impl Key {
    /// `file_hash`: the SHA-256 of the plugin's file, in hexadecimal.
    pub(super) fn new(engine: &wasmtime::Engine, file_hash: &str) -> Self {
        let mut hasher = Hashing(Sha256::new());
        engine.precompile_compatibility_hash().hash(&mut hasher);
        let Hashing(mut sha) = hasher;
        // The conversion of the bytes before they are compiled may change with the host's version.
        sha.update(concat!("pointsman ", env!("CARGO_PKG_VERSION"), " "));
        sha.update(file_hash);
        Self(sha.finalize().into())
    }

    fn file(&self) -> String {
        let hexadecimal: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        hexadecimal + SUFFIX
    }
}

/// A [`Hasher`] that computes SHA-256: its result decides which code is executed, for which 64 bits
/// are not enough.
struct Hashing(Sha256);

impl Hasher for Hashing {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Never called; the digest is taken instead.
    fn finish(&self) -> u64 {
        0
    }
}

impl Cache {
    /// As [`Cache::open`], but logs a warning and returns `None` on failure.
    pub fn open_if_safe(folder: &Path, metrics: Metrics) -> Option<Self> {
        let opened = Self::open(folder, metrics);
        opened
            .inspect_err(|reason| {
                tracing::warn!(
                    "plugins are compiled at each start: the plugin cache {} {reason}",
                    folder.display()
                );
            })
            .ok()
    }

    /// Opens the folder, creating it if it does not exist.
    ///
    /// # Errors
    /// Why it cannot be used, with the fix, as the rest of a sentence that begins with its name.
    pub fn open(path: &Path, metrics: Metrics) -> Result<Self, String> {
        let elsewhere = "set plugins.cache to another folder, or to false";
        if let Some(parent) = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            std::fs::create_dir_all(parent)
                .map_err(|e| format!("cannot be created: {e}; {elsewhere}"))?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                return Err(format!("cannot be created: {e}; {elsewhere}"));
            }
            _ => {}
        }
        // Links are not followed, because another user could have created one. From here on the
        // folder is accessed through its descriptor, so replacing its name has no effect.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| {
            format!("cannot be opened as a folder (links are not followed): {e}; {elsewhere}")
        })?;
        let folder = File::from(folder);
        let metadata = folder
            .metadata()
            .map_err(|e| format!("cannot be inspected: {e}; {elsewhere}"))?;
        let user = geteuid().as_raw();
        if metadata.uid() != user {
            return Err(format!(
                "belongs to user {} and not to user {user} of this process; {elsewhere}",
                metadata.uid()
            ));
        }
        let mode = metadata.mode() & 0o777;
        if mode != 0o700 {
            return Err(format!(
                "has mode {mode:03o} instead of 700, so other users may write code into it; remove it, or {elsewhere}"
            ));
        }
        Ok(Self(Arc::new(Shared {
            path: path.to_owned(),
            folder: folder.into(),
            metrics,
        })))
    }

    /// Returns the code for this key, if it is present and intact.
    pub(super) fn take(&self, engine: &wasmtime::Engine, key: &Key) -> Option<Component> {
        let file = key.file();
        let taken = self.read(&file, key).and_then(|code| match code {
            Some(code) => revive(engine, &code).map(Some).map_err(|e| e.to_string()),
            None => Ok(None),
        });
        match taken {
            Ok(Some(component)) => {
                self.count("hit");
                Some(component)
            }
            Ok(None) => {
                self.count("miss");
                None
            }
            Err(reason) => {
                self.count("corrupt");
                tracing::warn!(
                    file,
                    "removed an invalid file of compiled code from {}; its plugin is compiled again: {reason}",
                    self.0.path.display()
                );
                // A failure is ignored: another process may have removed it first.
                unlinkat(&self.0.folder, file.as_str(), AtFlags::empty()).ok();
                None
            }
        }
    }

    /// Stores code under this key. A failure is logged; the plugin is then compiled again at the
    /// next start.
    pub(super) fn put(&self, key: &Key, code: &[u8]) {
        if let Err(reason) = self.write(key, code) {
            self.count("write_failed");
            tracing::warn!(
                "cannot store a compiled plugin in {}: {reason}",
                self.0.path.display()
            );
        }
        if let Err(error) = self.make_room(&key.file(), MAX_FILES, MAX_BYTES) {
            tracing::warn!(%error, "cannot remove old compiled plugins from {}", self.0.path.display());
        }
    }

    /// `None`: the file does not exist.
    fn read(&self, file: &str, key: &Key) -> Result<Option<Vec<u8>>, String> {
        // Neither follows a link nor blocks on a pipe that was put there.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.0.folder, file, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let metadata = file.metadata().map_err(|e| e.to_string())?;
        check_owner(&metadata)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
            return Err("it is not a regular file, or it is too large".to_owned());
        }
        // Read into memory before it is checked, so that the bytes that run are the bytes checked.
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        (&file)
            .take(MAX_FILE_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        let head = head(key, bytes.get(MAGIC.len() + 64..).unwrap_or_default());
        if !bytes.starts_with(&head) {
            return Err("it is truncated or corrupt".to_owned());
        }
        bytes.drain(..head.len());
        // The modification time records the last use. If it cannot be set, the file is evicted
        // sooner.
        file.set_modified(SystemTime::now()).ok();
        Ok(Some(bytes))
    }

    fn write(&self, key: &Key, code: &[u8]) -> io::Result<()> {
        // A random name: nodes in containers may have the same process id.
        let draft = format!(".{:032x}{SUFFIX}", rand::random::<u128>());
        let written = self.write_draft(&draft, key, code).and_then(|()| {
            // Atomic; a file that another process has put there meanwhile has the same contents.
            Ok(renameat(
                &self.0.folder,
                draft.as_str(),
                &self.0.folder,
                key.file().as_str(),
            )?)
        });
        if written.is_err() {
            unlinkat(&self.0.folder, draft.as_str(), AtFlags::empty()).ok();
        }
        written
    }

    fn write_draft(&self, draft: &str, key: &Key, code: &[u8]) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(
            &self.0.folder,
            draft,
            flags,
            Mode::RUSR | Mode::WUSR,
        )?);
        file.write_all(&head(key, code))?;
        // Not synced: if a crash truncates the file, the checksum detects it.
        file.write_all(code)
    }

    /// Evicts the least recently used files until the limits hold, and removes abandoned drafts.
    fn make_room(&self, newest: &str, max_files: usize, max_bytes: u64) -> io::Result<()> {
        let mut files: Vec<(SystemTime, u64, CString)> = Vec::new();
        for entry in Dir::read_from(&self.0.folder)? {
            let name = entry?.file_name().to_owned();
            if !name.to_bytes().ends_with(SUFFIX.as_bytes()) {
                continue;
            }
            // A file that is gone was removed by another process.
            let Ok(file) = statat(&self.0.folder, &name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let used = UNIX_EPOCH
                + Duration::from_secs(u64::try_from(file.st_mtime).unwrap_or(0))
                + Duration::from_nanos(file.st_mtime_nsec);
            if name.to_bytes().starts_with(b".") {
                if used.elapsed().is_ok_and(|age| age > DRAFT_AGE) {
                    unlinkat(&self.0.folder, &name, AtFlags::empty()).ok();
                }
            } else {
                // Several files may have been used within one clock tick; the one just written must
                // stay.
                let used = if name.to_bytes() == newest.as_bytes() {
                    SystemTime::now() + DRAFT_AGE
                } else {
                    used
                };
                files.push((used, file.st_size as u64, name));
            }
        }
        files.sort();
        let (mut n_files, mut n_bytes) = (
            files.len(),
            files.iter().map(|(_, bytes, _)| bytes).sum::<u64>(),
        );
        for (_, bytes, name) in files {
            if n_files <= max_files && n_bytes <= max_bytes {
                break;
            }
            unlinkat(&self.0.folder, &name, AtFlags::empty()).ok();
            (n_files, n_bytes) = (n_files - 1, n_bytes - bytes);
        }
        Ok(())
    }

    fn count(&self, outcome: &'static str) {
        self.0
            .metrics
            .plugin_compile_cache
            .get_or_create(&PluginCacheLabel { outcome })
            .inc();
    }
}

/// The header of a file with this code: the magic, the key and the checksum of key and code.
fn head(key: &Key, code: &[u8]) -> Vec<u8> {
    let mut sum = Sha256::new();
    sum.update(key.0);
    sum.update(code);
    [&MAGIC[..], &key.0[..], &sum.finalize()[..]].concat()
}

fn check_owner(metadata: &Metadata) -> Result<(), String> {
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "other users may have written it (user {}, mode {:03o})",
            metadata.uid(),
            metadata.mode() & 0o777
        ));
    }
    Ok(())
}

/// Turns compiled code into a component. `code`: from a file of a [`Cache`] that was checked, or
/// from the compiler of this host.
#[expect(
    unsafe_code,
    reason = "compiled code cannot be verified, only trusted: see the head of this file"
)]
pub(super) fn revive(engine: &wasmtime::Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: the bytes are those that `Engine::precompile_component` returned. Either `compiler`
    // made them just now, in this process or in a child that runs this executable and wrote them
    // into a pipe that only the two have. Or they come from a file that only this user can have
    // written, in a folder that only this user can write to, and only `Cache::put` writes there:
    // the checksum proves that they are unchanged, and the key in it that they were made by this
    // version of wasmtime with these settings for this processor. They are in memory, where no
    // other process can change them, and wasmtime compares its version and settings.
    unsafe { Component::deserialize(engine, code) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;
    use crate::plugin::registry::folder::tests::Scratch;

    fn engine(has_deadlines: bool) -> wasmtime::Engine {
        wasmtime::Engine::new(wasmtime::Config::new().epoch_interruption(has_deadlines)).unwrap()
    }

    fn component(engine: &wasmtime::Engine) -> Vec<u8> {
        let text = r#"(component (core module $m (func (export "f"))))"#;
        engine
            .precompile_component(&wat::parse_str(text).unwrap())
            .unwrap()
    }

    fn private(scratch: &Scratch) -> PathBuf {
        scratch.0.join("made/private")
    }

    fn n_outcomes(cache: &Cache, outcome: &'static str) -> u64 {
        cache
            .0
            .metrics
            .plugin_compile_cache
            .get_or_create(&PluginCacheLabel { outcome })
            .get()
    }

    #[test]
    fn cache_entry_matches_only_the_same_bytes_and_settings() {
        let scratch = Scratch::new("cache-keys");
        let cache = Cache::open(&private(&scratch), Metrics::default()).unwrap();
        assert_eq!(
            fs::metadata(private(&scratch)).unwrap().mode() & 0o777,
            0o700
        );
        let (one, other) = (engine(true), engine(false));
        assert!(cache.take(&one, &Key::new(&one, "a")).is_none());
        cache.put(&Key::new(&one, "a"), &component(&one));
        assert!(cache.take(&one, &Key::new(&one, "a")).is_some());
        assert!(cache.take(&one, &Key::new(&one, "b")).is_none());
        assert!(cache.take(&other, &Key::new(&other, "a")).is_none());
        // Another process, or the next start.
        let again = Cache::open(&private(&scratch), Metrics::default()).unwrap();
        assert!(again.take(&one, &Key::new(&one, "a")).is_some());
        assert_eq!(
            (
                n_outcomes(&cache, "hit"),
                n_outcomes(&cache, "miss"),
                n_outcomes(&again, "hit")
            ),
            (1, 3, 1)
        );
    }

    #[test]
    fn a_corrupt_or_foreign_cache_file_is_removed() {
        let scratch = Scratch::new("cache-damage");
        let cache = Cache::open(&private(&scratch), Metrics::default()).unwrap();
        let engine = engine(true);
        let (key, other) = (Key::new(&engine, "a"), Key::new(&engine, "b"));
        let file = private(&scratch).join(key.file());
        let whole = || {
            cache.put(&key, &component(&engine));
            fs::read(&file).unwrap()
        };
        let damages: [(&str, &dyn Fn()); 7] = [
            ("truncated", &|| fs::write(&file, &whole()[..200]).unwrap()),
            ("empty", &|| fs::write(&file, []).unwrap()),
            ("longer", &|| {
                fs::write(&file, [whole(), vec![0]].concat()).unwrap()
            }),
            ("corrupt", &|| {
                let mut bytes = whole();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(&file, bytes).unwrap();
            }),
            ("of another plugin", &|| {
                cache.put(&other, &component(&engine));
                fs::copy(private(&scratch).join(other.file()), &file).unwrap();
            }),
            ("writable by others", &|| {
                whole();
                fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
            }),
            ("a link", &|| {
                fs::write(scratch.0.join("elsewhere"), whole()).unwrap();
                fs::remove_file(&file).unwrap();
                symlink(scratch.0.join("elsewhere"), &file).unwrap();
            }),
        ];
        for (n, (what, damage)) in (1..).zip(damages) {
            damage();
            assert!(cache.take(&engine, &key).is_none(), "{what}");
            assert!(
                fs::symlink_metadata(&file).is_err(),
                "{what} is still there"
            );
            assert_eq!(n_outcomes(&cache, "corrupt"), n, "{what}");
        }
        whole();
        assert!(cache.take(&engine, &key).is_some());
    }

    #[test]
    fn a_cache_folder_that_others_may_write_to_is_refused() {
        let scratch = Scratch::new("cache-folders");
        let refused = |path: &Path, expect: &str| {
            let error = Cache::open(path, Metrics::default()).unwrap_err();
            assert!(
                error.contains(expect) && error.contains("plugins.cache"),
                "{}: {error}",
                path.display()
            );
        };
        for mode in [0o755, 0o770, 0o777, 0o500] {
            let path = scratch.0.join(format!("{mode:o}"));
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            refused(&path, &format!("has mode {mode:03o} instead of 700"));
        }
        let own = scratch.0.join("own");
        Cache::open(&own, Metrics::default()).unwrap();
        symlink(&own, scratch.0.join("link")).unwrap();
        refused(
            &scratch.0.join("link"),
            "cannot be opened as a folder (links are not followed)",
        );
        fs::write(scratch.0.join("file"), "").unwrap();
        refused(&scratch.0.join("file"), "cannot be opened as a folder");
        refused(&scratch.0.join("file/below"), "cannot be created");
        // Only root can change the owner of a folder; other users test one that belongs to root.
        if geteuid().is_root() {
            let given = scratch.0.join("given");
            DirBuilder::new().mode(0o700).create(&given).unwrap();
            chown(&given, Some(65_534), None).unwrap();
            refused(&given, "belongs to user 65534 and not to user 0");
        } else {
            refused(Path::new("/"), "belongs to user 0");
        }
    }

    #[test]
    fn the_least_recently_used_cache_files_are_evicted_first() {
        let scratch = Scratch::new("cache-room");
        let cache = Cache::open(&private(&scratch), Metrics::default()).unwrap();
        let engine = engine(true);
        let names = ["a", "b", "c", "d"].map(|name| Key::new(&engine, name));
        let path = |key: &Key| private(&scratch).join(key.file());
        let is_there = || {
            names
                .iter()
                .map(|key| path(key).exists())
                .collect::<Vec<_>>()
        };
        for (age, key) in names.iter().enumerate() {
            cache.put(key, &component(&engine));
            let used = SystemTime::now() - Duration::from_secs(1_000 * (age as u64 + 1));
            File::options()
                .write(true)
                .open(path(key))
                .unwrap()
                .set_modified(used)
                .unwrap();
        }
        // The last one is the least recently used, until it is used here.
        assert!(cache.take(&engine, &names[3]).is_some());
        let drafts = [(".1-0.code", Duration::ZERO), (".2-0.code", DRAFT_AGE * 2)];
        for (name, age) in drafts {
            File::create(private(&scratch).join(name))
                .unwrap()
                .set_modified(SystemTime::now() - age)
                .unwrap();
        }
        fs::write(private(&scratch).join("foreign"), "").unwrap();
        cache.make_room("", 3, MAX_BYTES).unwrap();
        assert_eq!(is_there(), [true, true, false, true]);
        let one = fs::metadata(path(&names[0])).unwrap().len();
        cache.make_room("", 3, one * 2).unwrap();
        assert_eq!(is_there(), [true, false, false, true]);
        cache.make_room(&names[0].file(), 1, MAX_BYTES).unwrap();
        assert_eq!(is_there(), [true, false, false, false]);
        assert_eq!(
            drafts.map(|(name, _)| private(&scratch).join(name).exists()),
            [true, false]
        );
        assert!(private(&scratch).join("foreign").exists());
    }
}
