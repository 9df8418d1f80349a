//! The file under the broker: locked to one process, opened again after a failure, never mistaken for an empty one.
//!
//! Every commit is made with redb's two-phase commit and quick repair. It costs a second fsync, and buys three things. After kill -9 the
//! store opens at once, where the default walks the whole file. A torn commit is never the one that is opened: the byte that makes
//! it current is written after its data is on the disk, so nothing rests on a checksum over bytes that publishers choose. And when an
//! fsync fails (after which the kernel may forget the pages it could not write), the commit before still stands.
//!
//! What is in the file is `layout`'s business, who writes it `writer`'s.

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

/// Memory for pages: the hot ends of the tables of a busy node are a few MiB; the kernel caches the rest of the file.
const CACHE_BYTES: usize = 64 * 1024 * 1024;
/// In memory, redb's pages are the data itself; a cache of them would hold it twice.
const EPHEMERAL_CACHE_BYTES: usize = 4 * 1024 * 1024;
/// With less room than this for the file to grow, new entries are refused, so that those that wait still find room for their outcomes:
/// a disk that publishers fill to its end could not be emptied by doing the work.
const RESERVE_BYTES: u64 = 64 * 1024 * 1024;
/// How often the room is measured.
const MEASURE_EVERY_MS: u64 = 1_000;
/// A failed store is opened again at most so often.
const REOPEN_EVERY_MS: u64 = 1_000;

/// Why a request to the store came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The store failed. What was asked has not happened, or, if it failed while committing, may have.
    Store(redb::Error),
    /// The store is well and the answer is no.
    Answer(Error),
}

impl Failure {
    /// What all rests on cannot be right.
    pub(super) fn damaged(what: String) -> Self {
        Self::Store(redb::Error::Corrupted(what))
    }

    /// One row is not what this pointsman writes. Whoever needs it is told so; what else is in the store is as good as before.
    pub(super) fn unreadable(row: &str, error: &serde_json::Error) -> Self {
        let text = format!("{row} cannot be read ({error}): put back a copy of the data folder");
        tracing::error!("{text}");
        Self::Answer(Error::Refused(text))
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
    /// In memory: gone with the process.
    Memory,
    Folder(PathBuf),
    /// A folder on a disk that fails on command.
    #[cfg(test)]
    Failing(PathBuf, std::sync::Arc<super::tests::disk::Switch>),
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Store {
    medium: Medium,
    /// `None` while it cannot be opened, and once it is closed. A std lock: held for the moment in which a transaction begins.
    database: RwLock<Option<Database>>,
    /// Held, and thereby locked, as long as the store is open; the kernel lets go of it with the process.
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
    /// When it failed, or was last tried to be opened again, in milliseconds since the Unix epoch.
    tried_ms: u64,
}

impl Store {
    /// Opens the store, or makes it. `prepare` runs in its first transaction, and only if that succeeds is a new store kept.
    ///
    /// # Errors
    /// The text names the folder and the fix: another process has it, it holds something else, it is damaged, it cannot be written.
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
            .with_context(|| format!("the data folder {} cannot be made", dir.display()))?;
        let lock = lock(dir)?;
        let about = || format!("the data folder {}", dir.display());
        let (database, prepared) = if dir.join(FILE).try_exists().with_context(about)? {
            let database = medium.database().with_context(about)?;
            let prepared = run(&database).with_context(about)?;
            (database, prepared)
        } else {
            // A new store gets its name only when it is whole: so a file of that name that is empty or cut short is a damaged one.
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

    /// Closes the file and lets another process have it. Reads still under way end with an error.
    pub(super) fn close(&self) {
        let database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Err(error)) = database.map(Database::close) {
            tracing::warn!(%error, "the store was not closed in order; it is repaired when it is opened");
        }
        self.lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Begins to read: what was committed until now.
    pub(super) fn begin_read(&self) -> Result<ReadTransaction, Failure> {
        match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => Ok(database.begin_read()?),
            None => Err(Failure::Answer(self.away())),
        }
    }

    /// Begins to write. Only one transaction at a time; a second waits.
    pub(super) fn begin_write(&self) -> Result<WriteTransaction, Failure> {
        let mut transaction = match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => database.begin_write()?,
            None => return Err(Failure::Answer(self.away())),
        };
        transaction.set_quick_repair(!matches!(self.medium, Medium::Memory));
        Ok(transaction)
    }

    /// Notes that the store failed, and answers what to tell whoever asked.
    pub(super) fn failed(&self, failure: Failure, now_ms: u64) -> Error {
        let error = match failure {
            Failure::Answer(error) => return error,
            Failure::Store(redb::Error::DatabaseClosed) => return self.away(),
            Failure::Store(error) => error,
        };
        let is_full = matches!(&error, redb::Error::Io(io) if matches!(io.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded));
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        // The first error says what happened; those after it only say that something did.
        if trouble.is_none() || !matches!(error, redb::Error::PreviousIo) {
            let text = match is_full {
                true => format!(
                    "no space is left for {}: make room there; it goes on by itself",
                    self.name()
                ),
                false => format!(
                    "{} failed: {error}; it is opened again every second",
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
        self.away()
    }

    /// # Errors
    /// What is wrong with the store, while it is out of work.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.is_failed() {
            Err(self.away())
        } else {
            Ok(())
        }
    }

    /// Whether the store has failed since it was opened.
    pub(super) fn is_failed(&self) -> bool {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Opens a failed store again, if it is time to try. redb refuses everything after an I/O error until then.
    ///
    /// # Errors
    /// Why it does not work yet.
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
                    return Err(self.away());
                }
            }
        }
        let mut slot = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        // It is closed first: its lock on the file would keep the new one out.
        drop(slot.take());
        match self.medium.database() {
            Ok(database) => {
                *slot = Some(database);
                *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
                tracing::info!("{} is open again", self.name());
                Ok(())
            }
            Err(error) => {
                drop(slot);
                tracing::error!(
                    error = format!("{error:#}"),
                    "{} cannot be opened again",
                    self.name()
                );
                Err(self.away())
            }
        }
    }

    /// Why no new entries are taken, if the disk has too little room for them.
    pub(super) fn shortage(&self, now_ms: u64) -> Option<String> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if room.measured_ms.abs_diff(now_ms) >= MEASURE_EVERY_MS {
            let free = self.medium.free();
            // A file system that does not tell is taken to have room; when it is full, it will say so.
            *room = Room {
                is_short: free.is_some_and(|free| free < RESERVE_BYTES),
                measured_ms: now_ms,
            };
        }
        let mib = RESERVE_BYTES / 1024 / 1024;
        room.is_short.then(|| format!("less than {mib} MiB are free for {}: new events are refused until there is room again", self.name()))
    }

    /// What stands against the store, for a start-up check.
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

    fn away(&self) -> Error {
        match &*self.trouble.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Trouble {
                text,
                is_full: true,
                ..
            }) => Error::Full(text.clone()),
            Some(Trouble { text, .. }) => Error::Away(text.clone()),
            None => Error::Away(format!("{} is closed", self.name())),
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

    /// The bytes by which the file can grow, if that is known.
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
        let dir = self
            .dir()
            .context("a store in memory is never opened again")?;
        let path = dir.join(FILE);
        let damaged = |what: &str| {
            anyhow!(
                "its {FILE} is no store, or a damaged one ({what}): put back a copy of the folder, or give another one"
            )
        };
        let length = fs::metadata(&path)?.len();
        if length == 0 {
            return Err(damaged("it is empty"));
        }
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES);
        // redb trusts a file that was closed in order, and panics on one that was cut short or overwritten since.
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

/// Takes the folder for this process.
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
            "the data folder {} cannot be written: {} is refused",
            dir.display(),
            path.display()
        )
    })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only a courtesy: what stands there was written by the holder, and may not be there yet.
            let holder = match (&file).take(20).read_to_string(&mut holder) {
                Ok(_) if !holder.trim().is_empty() => format!("the process {}", holder.trim()),
                _ => "another process".to_owned(),
            };
            bail!(
                "the data folder {} is in use by {holder}: stop it, or give another folder",
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
