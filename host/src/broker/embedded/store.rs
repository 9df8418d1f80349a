//! The store file: locked to one process, reopened after a failure, and never mistaken for an empty
//! store.
//!
//! Every commit uses redb's two-phase commit and quick repair. This costs a second fsync and has
//! three benefits. After kill -9 the store opens at once, whereas the default walks the whole file.
//! A torn commit is never opened: the byte that makes a commit current is written only after its
//! data is on disk, so correctness does not depend on a checksum over bytes that publishers choose.
//! And when an fsync fails, after which the kernel may discard the pages it could not write, the
//! previous commit is still intact.
//!
//! The contents of the file are defined in `layout` and written by `writer`.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read as _, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use anyhow::{Context as _, anyhow, bail};
use redb::backends::InMemoryBackend;
use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase as _, StorageError,
    WriteTransaction,
};

use crate::broker::{Error, Finding, Severity};

const FILE: &str = "store.redb";
const NEW_FILE: &str = "store.redb.new";
const LOCK: &str = "lock";

/// Page cache. The frequently used pages of a busy node take a few MiB; the kernel caches the rest.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// In memory, redb's pages are the data itself; a larger cache would only duplicate it.
const EPHEMERAL_CACHE_BYTES: usize = 4 * 1024 * 1024;
/// New entries are rejected when the file can grow by less than this, so that the outcomes of
/// waiting entries still fit: if publishers could fill the disk completely, processing the backlog
/// could no longer drain it.
const RESERVE_BYTES: u64 = 64 * 1024 * 1024;
/// How often free space is measured.
const MEASURE_EVERY_MS: u64 = 1_000;
/// The minimum interval between attempts to reopen a failed store.
const REOPEN_EVERY_MS: u64 = 1_000;

/// Why a request to the store failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The store failed. The request has not taken effect, unless the failure occurred while
    /// committing: then it may have.
    Store(redb::Error),
    /// The store is intact; the request itself was rejected.
    Answer(Error),
}

impl Failure {
    /// The store as a whole is corrupt.
    pub(super) fn damaged(what: String) -> Self {
        Self::Store(redb::Error::Corrupted(what))
    }

    /// One row has content that this version does not write. The caller gets an error; the rest of
    /// the store is still usable.
    pub(super) fn unreadable(row: &str, error: &serde_json::Error) -> Self {
        let text = format!("{row} cannot be read ({error}); restore the data folder from a copy");
        tracing::error!("{text}");
        Self::Answer(Error::Permanent(text))
    }

    pub(super) fn into_text(self) -> anyhow::Error {
        match self {
            Self::Store(error) => error.into(),
            Self::Answer(error) => error.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Answer(error)
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        Self::Store(error.into())
    }
}

impl From<redb::TableError> for Failure {
    fn from(error: redb::TableError) -> Self {
        Self::Store(error.into())
    }
}

impl From<redb::TransactionError> for Failure {
    fn from(error: redb::TransactionError) -> Self {
        Self::Store(error.into())
    }
}

impl From<redb::CommitError> for Failure {
    fn from(error: redb::CommitError) -> Self {
        Self::Store(error.into())
    }
}

/// Where the store is kept.
#[derive(Debug)]
pub(super) enum Medium {
    /// In memory: lost when the process ends.
    Memory,
    Folder(PathBuf),
    /// A folder on a disk that fails on demand.
    #[cfg(test)]
    Failing(PathBuf, std::sync::Arc<super::tests::disk::Switch>),
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Store {
    medium: Medium,
    /// `None` while it cannot be opened, and after it was closed. A std lock, held only while a
    /// transaction begins.
    database: RwLock<Option<Database>>,
    /// Holds the file lock while the store is open; the kernel releases it when the process ends.
    lock: Mutex<Option<File>>,
    trouble: Mutex<Option<Trouble>>,
    room: Mutex<Room>,
}

#[derive(Debug, Default)]
struct Room {
    is_short: bool,
    measured_ms: u64,
}

#[derive(Debug)]
struct Trouble {
    text: String,
    is_full: bool,
    /// When the store failed, or when reopening was last tried, in milliseconds since the Unix
    /// epoch.
    tried_ms: u64,
}

impl Store {
    /// Opens the store or creates it. `prepare` runs in the first transaction; a new store is kept
    /// only if it succeeds.
    ///
    /// # Errors
    /// The text names the folder and the fix: another process uses it, it holds something else, it
    /// is damaged, or it is not writable.
    pub(super) fn open<T>(
        medium: Medium,
        prepare: impl FnOnce(&WriteTransaction) -> anyhow::Result<T>,
    ) -> anyhow::Result<(Self, T)> {
        let run = |database: &Database| -> anyhow::Result<T> {
            let mut transaction = database.begin_write()?;
            transaction.set_quick_repair(true);
            let prepared = prepare(&transaction)?;
            transaction.commit()?;
            Ok(prepared)
        };
        let Some(dir) = medium.dir() else {
            let database = Builder::new()
                .set_cache_size(EPHEMERAL_CACHE_BYTES)
                .create_with_backend(InMemoryBackend::new())?;
            let prepared = run(&database)?;
            return Ok((Self::with(medium, database, None), prepared));
        };
        fs::create_dir_all(dir)
            .with_context(|| format!("the data folder {} cannot be created", dir.display()))?;
        let lock = lock(dir)?;
        let about = || format!("the data folder {}", dir.display());
        let (database, prepared) = if dir.join(FILE).try_exists().with_context(about)? {
            let database = medium.database().with_context(about)?;
            let prepared = run(&database).with_context(about)?;
            (database, prepared)
        } else {
            // A new store is renamed to its final name only when it is complete, so an empty or
            // truncated file of that name is always a damaged store.
            let path = dir.join(NEW_FILE);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(about);
                }
                _ => {}
            }
            let database = Builder::new().create(&path).with_context(about)?;
            let prepared = run(&database).with_context(about)?;
            database.close().with_context(about)?;
            fs::rename(&path, dir.join(FILE)).with_context(about)?;
            // Sync the folder: without it, a crash could undo the rename.
            File::open(dir)
                .and_then(|dir| dir.sync_all())
                .with_context(about)?;
            (medium.database().with_context(about)?, prepared)
        };
        Ok((Self::with(medium, database, Some(lock)), prepared))
    }

    fn with(medium: Medium, database: Database, lock: Option<File>) -> Self {
        Self {
            medium,
            database: RwLock::new(Some(database)),
            lock: Mutex::new(lock),
            trouble: Mutex::new(None),
            room: Mutex::default(),
        }
    }

    /// Closes the file and lets another process open it. Reads in progress fail.
    pub(super) fn close(&self) {
        let database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Err(error)) = database.map(Database::close) {
            tracing::warn!(%error, "the store was not closed cleanly; it will be repaired when it is opened");
        }
        self.lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Begins a read of everything committed so far.
    pub(super) fn begin_read(&self) -> Result<ReadTransaction, Failure> {
        match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => Ok(database.begin_read()?),
            None => Err(Failure::Answer(self.unavailable())),
        }
    }

    /// Begins a write. Only one write transaction exists at a time; a second one waits.
    pub(super) fn begin_write(&self) -> Result<WriteTransaction, Failure> {
        let mut transaction = match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => database.begin_write()?,
            None => return Err(Failure::Answer(self.unavailable())),
        };
        transaction.set_quick_repair(!matches!(self.medium, Medium::Memory));
        Ok(transaction)
    }

    /// Records that the store failed and returns the error for the caller.
    pub(super) fn failed(&self, failure: Failure, now_ms: u64) -> Error {
        let error = match failure {
            Failure::Answer(error) => return error,
            Failure::Store(redb::Error::DatabaseClosed) => return self.unavailable(),
            Failure::Store(error) => error,
        };
        let is_full = matches!(&error, redb::Error::Io(io) if matches!(io.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded));
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        // Keep the first error, which names the cause; errors after it only report that an earlier
        // one occurred.
        if trouble.is_none() || !matches!(error, redb::Error::PreviousIo) {
            let text = match is_full {
                true => format!(
                    "no space is left for {}; free disk space there and the node resumes by itself",
                    self.name()
                ),
                false => format!(
                    "{} failed: {error}; the node tries to reopen it every second",
                    self.name()
                ),
            };
            tracing::error!(%error, "{text}");
            *trouble = Some(Trouble {
                text,
                is_full,
                tried_ms: now_ms,
            });
        }
        drop(trouble);
        self.unavailable()
    }

    /// # Errors
    /// The failure of the store, until it is reopened.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.is_failed() {
            Err(self.unavailable())
        } else {
            Ok(())
        }
    }

    /// Whether the store has failed and has not been reopened since.
    pub(super) fn is_failed(&self) -> bool {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Reopens a failed store if an attempt is due. After an I/O error, redb rejects every request
    /// until then.
    ///
    /// # Errors
    /// The store cannot be reopened yet.
    pub(super) fn reopen(&self, now_ms: u64) -> Result<(), Error> {
        {
            let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *trouble {
                None => return Ok(()),
                Some(trouble)
                    if trouble.tried_ms.abs_diff(now_ms) >= REOPEN_EVERY_MS
                        && self.medium.dir().is_some() =>
                {
                    trouble.tried_ms = now_ms
                }
                Some(_) => {
                    drop(trouble);
                    return Err(self.unavailable());
                }
            }
        }
        let mut slot = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        // Close it first: its file lock would prevent opening it again.
        drop(slot.take());
        match self.medium.database() {
            Ok(database) => {
                *slot = Some(database);
                *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
                tracing::info!("{} was reopened", self.name());
                Ok(())
            }
            Err(error) => {
                drop(slot);
                tracing::error!(
                    error = format!("{error:#}"),
                    "{} cannot be reopened",
                    self.name()
                );
                Err(self.unavailable())
            }
        }
    }

    /// Why no new entries are accepted, if the disk has too little free space.
    pub(super) fn shortage(&self, now_ms: u64) -> Option<String> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if room.measured_ms.abs_diff(now_ms) >= MEASURE_EVERY_MS {
            let free = self.medium.free();
            // Assume enough space if the file system does not report it; when it is full, writes
            // fail.
            *room = Room {
                is_short: free.is_some_and(|free| free < RESERVE_BYTES),
                measured_ms: now_ms,
            };
        }
        let mib = RESERVE_BYTES / 1024 / 1024;
        room.is_short.then(|| {
            format!(
                "less than {mib} MiB are free for {}; new events are rejected until space is freed",
                self.name()
            )
        })
    }

    /// The problems of the store, for a start-up check.
    pub(super) fn findings(&self, now_ms: u64) -> Vec<Finding> {
        let trouble = self
            .trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|trouble| trouble.text.clone());
        let refusal = trouble.map(|text| Finding {
            name: "disk",
            severity: Severity::Refusal,
            text,
        });
        let warning = self.shortage(now_ms).map(|text| Finding {
            name: "room",
            severity: Severity::Warning,
            text,
        });
        refusal.into_iter().chain(warning).collect()
    }

    fn unavailable(&self) -> Error {
        match &*self.trouble.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Trouble {
                text,
                is_full: true,
                ..
            }) => Error::Full(text.clone()),
            Some(Trouble { text, .. }) => Error::Unavailable(text.clone()),
            None => Error::Unavailable(format!("{} is closed", self.name())),
        }
    }

    fn name(&self) -> String {
        match self.medium.dir() {
            Some(dir) => format!("the store in {}", dir.display()),
            None => "the store in memory".to_owned(),
        }
    }
}

impl Medium {
    fn dir(&self) -> Option<&Path> {
        match self {
            Self::Memory => None,
            Self::Folder(dir) => Some(dir),
            #[cfg(test)]
            Self::Failing(dir, _) => Some(dir),
        }
    }

    /// The number of bytes by which the file can grow, if known.
    fn free(&self) -> Option<u64> {
        #[cfg(test)]
        if let Self::Failing(_, switch) = self {
            return Some(switch.free());
        }
        let stat = rustix::fs::statvfs(self.dir()?).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Opens the existing file of a folder.
    fn database(&self) -> anyhow::Result<Database> {
        let dir = self.dir().context("a store in memory cannot be reopened")?;
        let path = dir.join(FILE);
        let damaged = |what: &str| {
            anyhow!(
                "its {FILE} is not a valid store or is damaged ({what}); restore the folder from a copy or use another one"
            )
        };
        let length = fs::metadata(&path)?.len();
        if length == 0 {
            return Err(damaged("it is empty"));
        }
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES);
        // redb trusts a file that was closed cleanly, and panics if such a file was truncated or
        // overwritten afterwards.
        let opened = catch_unwind(AssertUnwindSafe(|| match self {
            #[cfg(test)]
            Self::Failing(_, switch) => {
                builder.create_with_backend(super::tests::disk::Disk::open(&path, switch)?)
            }
            _ => builder.open(&path),
        }));
        match opened {
            Ok(Ok(database)) => Ok(database),
            Ok(Err(DatabaseError::Storage(StorageError::Io(error))))
                if error.kind() != ErrorKind::InvalidData =>
            {
                Err(error.into())
            }
            Ok(Err(error)) => Err(damaged(&error.to_string())),
            Err(_) => Err(damaged("its pages contradict each other")),
        }
    }
}

/// Locks the folder for this process.
fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join(LOCK);
    let open = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let mut file = open.with_context(|| {
        format!(
            "the data folder {} is not writable: {} cannot be opened",
            dir.display(),
            path.display()
        )
    })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Best effort: the holder writes its process id after taking the lock, so it may not be
            // there yet.
            let holder = match (&file).take(20).read_to_string(&mut holder) {
                Ok(_) if !holder.trim().is_empty() => format!("process {}", holder.trim()),
                _ => "another process".to_owned(),
            };
            bail!(
                "the data folder {} is in use by {holder}; stop it or use another folder",
                dir.display()
            );
        }
        Err(TryLockError::Error(error)) => {
            return Err(error)
                .with_context(|| format!("the data folder {} cannot be locked", dir.display()));
        }
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(file)
}
