//! Compiled plugins, kept for the next start: what a plugin's file was compiled to, in a file of its own, in a folder of this user alone.
//!
//! Compiled code is run as it is found, so nothing is taken that anybody but this user's own nodes may have written: the folder and each file in
//! it belong to the user of this process, and nobody else may write there. A folder that is otherwise is refused with the reason, and the node
//! works without a cache. A file is found by the hash of the plugin's bytes together with whatever of the engine shapes the code (its version,
//! its settings, the processor), and guarded by a checksum: one that is torn or has rotted is removed, and its plugin compiled anew.
//!
//! Several processes may use one folder at once: files come by renaming, and are never changed. There are at most [`MAX_FILES`] of at most
//! [`MAX_BYTES`] in all; those that were used longest ago leave first. What is compiled, and when, is `plugin::compile`'s business.
//!
//! This is the one file of the host that may use `unsafe`, for one call: see [`revive`].

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

/// The most files in the folder.
const MAX_FILES: usize = 256;
/// The most bytes of all files together. Compiled Python is some 100 MiB.
const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// The most bytes of one file.
const MAX_FILE_BYTES: u64 = MAX_BYTES / 4;
/// What a file begins with; the number grows when its layout changes.
const MAGIC: &[u8; 24] = b"pointsman plugin code 1\n";
/// How the names of files end.
const SUFFIX: &str = ".code";
/// A draft that is older was left behind by a process that died.
const DRAFT_AGE: Duration = Duration::from_secs(3600);

/// A cheap handle.
#[derive(Clone, Debug)]
pub struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    /// The folder that was looked at, whatever has its name by now.
    folder: OwnedFd,
    metrics: Metrics,
}

/// By which compiled code is found.
pub(in crate::plugin) struct Key([u8; 32]);

impl Key {
    /// `file_hash`: of the plugin's file, in hexadecimal.
    pub(in crate::plugin) fn new(engine: &wasmtime::Engine, file_hash: &str) -> Self {
        let mut hasher = Hashing(Sha256::new());
        engine.precompile_compatibility_hash().hash(&mut hasher);
        let Hashing(mut sha) = hasher;
        // What this host makes of the bytes before it compiles them may change with its version.
        sha.update(concat!("pointsman ", env!("CARGO_PKG_VERSION"), " "));
        sha.update(file_hash);
        Self(sha.finalize().into())
    }

    fn file(&self) -> String {
        let hexadecimal: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        hexadecimal + SUFFIX
    }
}

/// Whatever is hashed, as SHA-256: 64 bits would do for a table, and not for what decides which code runs.
struct Hashing(Sha256);

impl Hasher for Hashing {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Nobody asks: the digest is taken in its place.
    fn finish(&self) -> u64 {
        0
    }
}

impl Cache {
    /// [`Cache::open`], or a warning and no cache.
    pub fn open_if_safe(folder: &Path, metrics: Metrics) -> Option<Self> {
        let opened = Self::open(folder, metrics);
        opened
            .inspect_err(|reason| {
                tracing::warn!("plugins are compiled at each start: the folder for compiled ones, {}, {reason}", folder.display());
            })
            .ok()
    }

    /// Opens the folder, and makes it where it is not there.
    ///
    /// # Errors
    /// Why it cannot be used, with the fix, as the end of a sentence that begins with its name.
    pub fn open(path: &Path, metrics: Metrics) -> Result<Self, String> {
        let elsewhere = "set plugins.cache to another folder, or to false";
        if let Some(parent) = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            std::fs::create_dir_all(parent)
                .map_err(|e| format!("cannot be made: {e}; {elsewhere}"))?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                return Err(format!("cannot be made: {e}; {elsewhere}"));
            }
            _ => {}
        }
        // Not through a link, which another user could have put there; and from now on by what was opened, not by its name.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| {
            format!("cannot be opened as a folder, and not a link to one: {e}; {elsewhere}")
        })?;
        let folder = File::from(folder);
        let metadata = folder
            .metadata()
            .map_err(|e| format!("cannot be looked at: {e}; {elsewhere}"))?;
        let user = geteuid().as_raw();
        if metadata.uid() != user {
            return Err(format!(
                "belongs to user {} and not to user {user}, who runs this; {elsewhere}",
                metadata.uid()
            ));
        }
        let mode = metadata.mode() & 0o777;
        if mode != 0o700 {
            return Err(format!(
                "has the mode {mode:03o} and not 700, so others may put code there; remove it, or {elsewhere}"
            ));
        }
        Ok(Self(Arc::new(Shared {
            path: path.to_owned(),
            folder: folder.into(),
            metrics,
        })))
    }

    /// The code under this key, if it is there and whole.
    pub(in crate::plugin) fn take(
        &self,
        engine: &wasmtime::Engine,
        key: &Key,
    ) -> Option<Component> {
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
                self.count("damaged");
                tracing::warn!(
                    file,
                    "compiled code in {} is of no use and removed, its plugin compiled anew: {reason}",
                    self.0.path.display()
                );
                // Another process may have done so.
                unlinkat(&self.0.folder, file.as_str(), AtFlags::empty()).ok();
                None
            }
        }
    }

    /// Keeps code under this key. If that cannot be, the log says why, and the plugin is compiled at the next start as well.
    pub(in crate::plugin) fn put(&self, key: &Key, component: &Component) {
        let written = component
            .serialize()
            .map_err(|e| e.to_string())
            .and_then(|code| self.write(key, &code).map_err(|e| e.to_string()));
        if let Err(reason) = written {
            self.count("unwritten");
            tracing::warn!(
                "a compiled plugin cannot be kept in {}: {reason}",
                self.0.path.display()
            );
        }
        if let Err(error) = self.make_room(&key.file(), MAX_FILES, MAX_BYTES) {
            tracing::warn!(%error, "old compiled plugins in {} cannot be removed", self.0.path.display());
        }
    }

    /// `None`: there is no such file.
    fn read(&self, file: &str, key: &Key) -> Result<Option<Vec<u8>>, String> {
        // Whatever was put there is not waited for, nor followed.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.0.folder, file, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let metadata = file.metadata().map_err(|e| e.to_string())?;
        check_owner(&metadata)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
            return Err("it is no file, or too large for one of ours".to_owned());
        }
        // Into memory, and only then checked: what is run is what was checked.
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        (&file)
            .take(MAX_FILE_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        let head = head(key, bytes.get(MAGIC.len() + 64..).unwrap_or_default());
        if !bytes.starts_with(&head) {
            return Err("it is torn or has rotted".to_owned());
        }
        bytes.drain(..head.len());
        // What was used lately stays longest. If that cannot be noted, it leaves sooner.
        file.set_modified(SystemTime::now()).ok();
        Ok(Some(bytes))
    }

    fn write(&self, key: &Key, code: &[u8]) -> io::Result<()> {
        // By chance: nodes in containers have the same number as a process.
        let draft = format!(".{:032x}{SUFFIX}", rand::random::<u128>());
        let written = self.write_draft(&draft, key, code).and_then(|()| {
            // In one step, and over what another process has put there meanwhile: it is the same.
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
        // Not waited for until it is on the disk: what a crash tears, the checksum finds.
        file.write_all(code)
    }

    /// Removes files, those that were used longest ago first, until there are no more than so many; and drafts that nobody writes any more.
    fn make_room(&self, newest: &str, max_files: usize, max_bytes: u64) -> io::Result<()> {
        let mut files: Vec<(SystemTime, u64, CString)> = Vec::new();
        for entry in Dir::read_from(&self.0.folder)? {
            let name = entry?.file_name().to_owned();
            if !name.to_bytes().ends_with(SUFFIX.as_bytes()) {
                continue;
            }
            // What is gone by now was removed by another process.
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
                // Files may have been used in the same tick of the clock; the one just written has to stay.
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
            .plugin_cache
            .get_or_create(&PluginCacheLabel { outcome })
            .inc();
    }
}

/// What a file with this code begins with: what it is, whose code it is, and the checksum of it all.
fn head(key: &Key, code: &[u8]) -> Vec<u8> {
    let mut sum = Sha256::new();
    sum.update(key.0);
    sum.update(code);
    [&MAGIC[..], &key.0[..], &sum.finalize()[..]].concat()
}

fn check_owner(metadata: &Metadata) -> Result<(), String> {
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "others may have written it (user {}, mode {:03o})",
            metadata.uid(),
            metadata.mode() & 0o777
        ));
    }
    Ok(())
}

/// Makes compiled code a component again.
#[expect(
    unsafe_code,
    reason = "code that was compiled cannot be checked again, so it is run on trust: see the head of this file"
)]
fn revive(engine: &wasmtime::Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: these are bytes that `Component::serialize` answered. They come from a file that only this user can have written, in a folder where
    // only this user can put any, and only `Cache::put` puts them there. Their checksum says that they are as they were written, and the key in
    // it that they were made by this version of wasmtime with these settings for this processor. They are in memory, where nobody changes them.
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

    fn component(engine: &wasmtime::Engine) -> Component {
        Component::from_binary(
            engine,
            &wat::parse_str(r#"(component (core module $m (func (export "f"))))"#).unwrap(),
        )
        .unwrap()
    }

    fn private(scratch: &Scratch) -> PathBuf {
        scratch.0.join("made/private")
    }

    fn n_outcomes(cache: &Cache, outcome: &'static str) -> u64 {
        cache
            .0
            .metrics
            .plugin_cache
            .get_or_create(&PluginCacheLabel { outcome })
            .get()
    }

    #[test]
    fn what_was_put_is_taken_by_the_same_bytes_under_the_same_settings_only() {
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
    fn a_file_that_is_not_as_it_was_written_is_removed() {
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
            ("torn", &|| fs::write(&file, &whole()[..200]).unwrap()),
            ("empty", &|| fs::write(&file, []).unwrap()),
            ("longer", &|| {
                fs::write(&file, [whole(), vec![0]].concat()).unwrap()
            }),
            ("rotten", &|| {
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
            assert_eq!(n_outcomes(&cache, "damaged"), n, "{what}");
        }
        whole();
        assert!(cache.take(&engine, &key).is_some());
    }

    #[test]
    fn a_folder_where_others_may_write_is_refused() {
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
            refused(&path, &format!("has the mode {mode:03o} and not 700"));
        }
        let own = scratch.0.join("own");
        Cache::open(&own, Metrics::default()).unwrap();
        symlink(&own, scratch.0.join("link")).unwrap();
        refused(
            &scratch.0.join("link"),
            "cannot be opened as a folder, and not a link",
        );
        fs::write(scratch.0.join("file"), "").unwrap();
        refused(&scratch.0.join("file"), "cannot be opened as a folder");
        refused(&scratch.0.join("file/below"), "cannot be made");
        // Root may give a folder away; anybody else finds one that is root's.
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
    fn what_was_used_longest_ago_leaves_first() {
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
        // The last one was used longest ago, and is used now.
        assert!(cache.take(&engine, &names[3]).is_some());
        let drafts = [(".1-0.code", Duration::ZERO), (".2-0.code", DRAFT_AGE * 2)];
        for (name, age) in drafts {
            File::create(private(&scratch).join(name))
                .unwrap()
                .set_modified(SystemTime::now() - age)
                .unwrap();
        }
        fs::write(private(&scratch).join("of-somebody"), "").unwrap();
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
        assert!(private(&scratch).join("of-somebody").exists());
    }
}
