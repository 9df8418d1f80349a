//! Watches the plugin folder and has the registry load its changes. Runs on an OS thread of its
//! own, because compiling takes seconds.
//!
//! A file system notification only triggers a scan; the scan decides. Changes are therefore never
//! missed where notifications are unavailable (a network file system, no watch descriptor left),
//! only found later. A file is loaded once it has been unchanged for [`SETTLED`], because editors
//! and `cp` write in pieces, and some remove a file before they write it. An active plugin whose
//! file is gone without a record of its removal stays active for [`GRACE`]. A missing folder is
//! treated as an accident and does not remove its plugins. The thread ends soon after the
//! [`Watcher`] is dropped.
//!
//! Checking and loading the files is in `registry`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};

use super::Registry;
use super::ahead::Wait;
use super::folder::{self, FileStamp, FolderSnapshot};
use super::slot::GRACE;
use crate::shutdown::Alarm;

/// How long the files of a plugin must be unchanged before they are loaded.
const SETTLED: Duration = Duration::from_millis(150);
/// The minimum time between two scans, because the folder may be written to all the time.
const PACE: Duration = Duration::from_millis(25);
/// The time between two scans while an active plugin has lost its file.
const LOOK_FOR_LOST_EVERY: Duration = Duration::from_millis(250);
/// The time between two scans while a file is being compiled, which is loaded when it is ready.
const COMPILING_PACE: Duration = Duration::from_millis(200);
/// How much earlier the time of a record may be than the removal: file systems round it, and the
/// record may be written only once.
const RECORD_LAG: Duration = Duration::from_secs(1);
/// The maximum time between two scans, for changes without a notification.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Watches the folder until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    is_over: Arc<AtomicBool>,
    wake: SyncSender<()>,
}

impl Watcher {
    /// Watches the folder of the registry; `None` if it has none. `alarm` is raised when the thread
    /// ends unexpectedly.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start(registry: Arc<Registry>, alarm: Alarm) -> std::io::Result<Option<Self>> {
        let Some(dir) = registry.dir().map(Path::to_owned) else {
            return Ok(None);
        };
        // A capacity of one suffices: a message only means that something changed since the last
        // scan.
        let (wake, woken) = sync_channel(1);
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = Thread {
            registry,
            dir,
            watched: None,
            wake: wake.clone(),
            woken,
            is_over: Arc::clone(&is_over),
        };
        thread::Builder::new()
            .name("plugin-folder".into())
            .spawn(move || {
                let _alarm = alarm;
                thread.run();
            })?;
        Ok(Some(Self { is_over, wake }))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // If the channel is full, the thread is woken anyway.
        self.wake.try_send(()).ok();
    }
}

struct Thread {
    registry: Arc<Registry>,
    dir: PathBuf,
    /// The folder being watched and its watcher, if one could be created. A folder that is created
    /// again has the same name but needs a new watcher.
    watched: Option<(Identity, Option<RecommendedWatcher>)>,
    wake: SyncSender<()>,
    woken: Receiver<()>,
    is_over: Arc<AtomicBool>,
}

/// Device, inode and creation time; inodes alone are reused.
type Identity = (u64, u64, Option<SystemTime>);

impl Thread {
    fn run(mut self) {
        let mut settling = Settling::default();
        let mut last_seen = BTreeMap::new();
        while !self.is_over.load(Ordering::SeqCst) {
            // Watch before scanning: a change between the two then triggers another scan.
            self.listen();
            let began = SystemTime::now();
            match folder::snapshot(&self.dir) {
                Ok(seen) => {
                    self.registry.set_folder_failure(None);
                    let mut removed = folder::removals(&self.dir);
                    // A removal writes its record once more after the file: an older one was left
                    // beside the file by something else, such as a copy of the folder.
                    removed.retain(|name, at| {
                        let last = last_seen.get(name);
                        !seen.contains_key(name)
                            && last.is_none_or(|last| *at + RECORD_LAG >= *last)
                    });
                    let removed: BTreeSet<String> = removed.into_keys().collect();
                    last_seen.extend(seen.keys().map(|name| (name.clone(), began)));
                    let lost: BTreeSet<String> = self.registry.active_names();
                    let is_lost =
                        |name: &String| !seen.contains_key(name) && !removed.contains(name);
                    let lost = lost.into_iter().filter(is_lost).collect();
                    self.registry.note_absent(&removed, &lost);
                    let due = settling.due(&self.registry.loaded(), &seen, &lost, Instant::now());
                    if !due.is_empty() {
                        self.registry.load_snapshot(due, Wait::Briefly);
                    }
                }
                Err(reason) => {
                    settling = Settling::default();
                    self.registry.set_folder_failure(Some(reason));
                }
            }
            if let Some(pause) = settling.pause() {
                let pause = if self.registry.is_compiling() {
                    COMPILING_PACE.min(pause)
                } else {
                    pause
                };
                // Scan whether woken or timed out.
                self.woken.recv_timeout(pause).ok();
            }
            thread::sleep(PACE);
        }
    }

    /// Watches the folder that has the name now.
    fn listen(&mut self) {
        let identity = fs::metadata(&self.dir)
            .ok()
            .map(|dir| (dir.dev(), dir.ino(), dir.created().ok()));
        if self.watched.as_ref().map(|(identity, _)| *identity) == identity {
            return;
        }
        self.watched = None;
        let Some(identity) = identity else { return };
        let wake = self.wake.clone();
        let heard = move |event: notify::Result<notify::Event>| {
            if is_change(&event) {
                // If the channel is full, a scan is already due.
                wake.try_send(()).ok();
            }
        };
        let watcher = notify::recommended_watcher(heard).and_then(|mut watcher| {
            watcher.watch(&self.dir, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        if let Err(error) = &watcher {
            let dir = self.dir.display();
            tracing::warn!(%error, "cannot watch the plugin folder {dir}; it is scanned every {} s instead", LOOK_EVERY.as_secs());
        }
        self.watched = Some((identity, watcher.ok()));
    }
}

/// Whether something may have changed. Read accesses are ignored: a scan causes some itself.
pub fn is_change(heard: &notify::Result<notify::Event>) -> bool {
    let is_reading = |event: &notify::Event| matches!(event.kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write));
    !heard.as_ref().is_ok_and(is_reading)
}

/// Plugins whose files differ from those last loaded, and since when they have been unchanged.
#[derive(Debug, Default)]
struct Settling {
    since: BTreeMap<String, (Vec<FileStamp>, Instant)>,
    /// How many of them are active plugins that have lost their files.
    n_lost: usize,
}

impl Settling {
    /// Returns the files to load now; an empty list stands for a plugin whose files are gone.
    /// `lost`: active plugins whose files are gone and were not removed by an admin command.
    fn due(
        &mut self,
        loaded: &FolderSnapshot,
        seen: &FolderSnapshot,
        lost: &BTreeSet<String>,
        now: Instant,
    ) -> FolderSnapshot {
        let mut due = FolderSnapshot::new();
        let mut before = std::mem::take(&mut self.since);
        self.n_lost = 0;
        for name in loaded.keys().chain(seen.keys()).collect::<BTreeSet<_>>() {
            let files = seen.get(name).cloned().unwrap_or_default();
            if files == loaded.get(name).map_or(&[][..], Vec::as_slice) {
                continue;
            }
            let since = before
                .remove(name)
                .filter(|(files_before, _)| *files_before == files)
                .map_or(now, |(_, since)| since);
            let is_lost = files.is_empty() && lost.contains(name);
            let settled = if is_lost { GRACE } else { SETTLED };
            if now.duration_since(since) >= settled {
                due.insert(name.clone(), files);
            } else {
                self.n_lost += usize::from(is_lost);
                self.since.insert(name.clone(), (files, since));
            }
        }
        due
    }

    /// How long nothing needs to be looked at without a notification; `None`: something settles.
    fn pause(&self) -> Option<Duration> {
        match self.since.len() - self.n_lost {
            0 if self.n_lost > 0 => Some(LOOK_FOR_LOST_EVERY),
            0 => Some(LOOK_EVERY),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::tests::Scratch;
    use super::*;

    #[test]
    fn changed_files_are_due_once_they_have_settled() {
        let folder = Scratch::new("settling");
        let (file, mut settling, began) = (
            folder.0.join("1-a.wasm"),
            Settling::default(),
            Instant::now(),
        );
        let (mut loaded, mut at) = (FolderSnapshot::new(), Duration::ZERO);
        let mut due_after = |loaded: &FolderSnapshot, wait: Duration| {
            at += wait;
            settling.due(loaded, &folder.snapshot(), &BTreeSet::new(), began + at)
        };
        // Written in pieces, each just before the file would count as settled.
        for n_bytes in 0..10 {
            fs::write(&file, vec![0; n_bytes]).unwrap();
            assert_eq!(
                due_after(&loaded, SETTLED - PACE),
                FolderSnapshot::new(),
                "{n_bytes} bytes"
            );
        }
        assert_eq!(due_after(&loaded, SETTLED - PACE), FolderSnapshot::new());
        let due = due_after(&loaded, PACE);
        assert_eq!(
            (due.len(), due["a"].as_slice()),
            (1, folder.snapshot()["a"].as_slice())
        );
        loaded.extend(due);
        assert_eq!(due_after(&loaded, SETTLED), FolderSnapshot::new());

        // Missing for a moment, as with an editor that removes before it writes: only the new bytes
        // count.
        fs::remove_file(&file).unwrap();
        assert_eq!(due_after(&loaded, PACE), FolderSnapshot::new());
        fs::write(&file, "other").unwrap();
        assert_eq!(due_after(&loaded, SETTLED), FolderSnapshot::new());
        loaded.extend(due_after(&loaded, SETTLED));
        assert_eq!(loaded, folder.snapshot());

        // Renaming the file of a plugin is one change, and so is removing it.
        fs::rename(&file, folder.0.join("2-a.wasm")).unwrap();
        assert_eq!(due_after(&loaded, PACE), FolderSnapshot::new());
        let due = due_after(&loaded, SETTLED);
        assert!(
            due["a"].len() == 1 && due["a"][0].path.ends_with("2-a.wasm"),
            "{due:?}"
        );
        loaded.extend(due);
        fs::remove_file(folder.0.join("2-a.wasm")).unwrap();
        assert_eq!(due_after(&loaded, PACE), FolderSnapshot::new());
        assert_eq!(
            due_after(&loaded, SETTLED),
            FolderSnapshot::from([("a".to_owned(), Vec::new())])
        );
    }

    #[test]
    fn an_active_plugin_whose_file_vanished_is_due_after_the_grace_period() {
        let folder = Scratch::new("vanished");
        let file = folder.0.join("a.wasm");
        fs::write(&file, "one").unwrap();
        let (loaded, lost) = (folder.snapshot(), BTreeSet::from(["a".to_owned()]));
        let (mut settling, began) = (Settling::default(), Instant::now());
        let mut due_at = |at: Duration| {
            let due = settling.due(&loaded, &folder.snapshot(), &lost, began + at);
            (due.keys().cloned().collect::<Vec<_>>(), settling.pause())
        };
        let nothing = Vec::<String>::new();
        assert_eq!(due_at(Duration::ZERO), (nothing.clone(), Some(LOOK_EVERY)));
        fs::remove_file(&file).unwrap();
        let waits = (nothing.clone(), Some(LOOK_FOR_LOST_EVERY));
        assert_eq!(due_at(Duration::ZERO), waits);
        assert_eq!(due_at(GRACE / 2), waits);
        // Back in time, but not for long: the grace period begins again.
        fs::write(&file, "two").unwrap();
        assert_eq!(due_at(GRACE / 2), (nothing, None));
        fs::remove_file(&file).unwrap();
        assert_eq!(due_at(GRACE), waits);
        assert_eq!(due_at(GRACE * 3 / 2), waits);
        assert_eq!(due_at(GRACE * 2).0, ["a"]);
    }
}
