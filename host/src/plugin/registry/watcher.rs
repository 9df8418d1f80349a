//! Hears of changes in the folder of plugins and has the registry take them up, on an OS thread of its own: compiling takes seconds.
//!
//! What is heard only says when to look; what is seen decides. So nothing is missed where nothing can be heard (a network's file system, no
//! watch left to be had), only seen a little later. It promises that a file is taken up once nobody has touched it for [`SETTLED`], since
//! editors and `cp` write in pieces, and remove before they write; that a folder that is gone is an accident, and no removal of its plugins;
//! and to end soon after the [`Watcher`] does. Whether a file is any good, and what runs if it is not, is `registry`'s business.

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
use super::folder::{self, Look, Sighting};
use crate::shutdown::Alarm;

/// How long the files of a plugin are as they are before they are taken up.
const SETTLED: Duration = Duration::from_millis(150);
/// The least time between two looks: somebody may be writing there all the time.
const PACE: Duration = Duration::from_millis(25);
/// The most time between two looks, for what is not heard.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Watches while it lives.
#[derive(Debug)]
pub struct Watcher {
    is_over: Arc<AtomicBool>,
    wake: SyncSender<()>,
}

impl Watcher {
    /// Watches the folder of the registry; `None` if it has none. `alarm`: for when it can no longer do so.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(registry: Arc<Registry>, alarm: Alarm) -> std::io::Result<Option<Self>> {
        let Some(dir) = registry.dir().map(Path::to_owned) else {
            return Ok(None);
        };
        // One is as good as many: it says that something changed since the last look.
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
        // A full channel wakes it as well.
        self.wake.try_send(()).ok();
    }
}

struct Thread {
    registry: Arc<Registry>,
    dir: PathBuf,
    /// The folder that is listened to, and by what, unless it cannot be had: a folder that is made anew has the same name and another watch.
    watched: Option<(Identity, Option<RecommendedWatcher>)>,
    wake: SyncSender<()>,
    woken: Receiver<()>,
    is_over: Arc<AtomicBool>,
}

/// Device, inode, and when it was made, as inodes are used again.
type Identity = (u64, u64, Option<SystemTime>);

impl Thread {
    fn run(mut self) {
        let mut settling = Settling::default();
        while !self.is_over.load(Ordering::SeqCst) {
            // Listened to before it is looked at, so that no change falls in between.
            self.listen();
            match folder::look(&self.dir) {
                Ok(seen) => {
                    self.registry.set_folder_failure(None);
                    let due = settling.due(&self.registry.taken_up(), &seen, Instant::now());
                    if !due.is_empty() {
                        self.registry.take_up(due);
                    }
                }
                Err(reason) => {
                    settling = Settling::default();
                    self.registry.set_folder_failure(Some(reason));
                }
            }
            if settling.is_over() {
                // Woken or not: it looks.
                self.woken.recv_timeout(LOOK_EVERY).ok();
            }
            thread::sleep(PACE);
        }
    }

    /// Listens to the folder that has the name now.
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
                // A full channel: it is already going to look.
                wake.try_send(()).ok();
            }
        };
        let watcher = notify::recommended_watcher(heard).and_then(|mut watcher| {
            watcher.watch(&self.dir, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        if let Err(error) = &watcher {
            let dir = self.dir.display();
            tracing::warn!(%error, "the folder of plugins {dir} cannot be listened to; it is looked at every {} s", LOOK_EVERY.as_secs());
        }
        self.watched = Some((identity, watcher.ok()));
    }
}

/// Whether something may have changed. Reading is an access, too, and whoever looks reads.
pub fn is_change(heard: &notify::Result<notify::Event>) -> bool {
    let is_reading = |event: &notify::Event| matches!(event.kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write));
    !heard.as_ref().is_ok_and(is_reading)
}

/// Plugins whose files are not as they were taken up, and since when they are as they are.
#[derive(Debug, Default)]
struct Settling(BTreeMap<String, (Vec<Sighting>, Instant)>);

impl Settling {
    /// What is to be taken up now: with no file, for what is gone.
    fn due(&mut self, taken_up: &Look, seen: &Look, now: Instant) -> Look {
        let mut due = Look::new();
        let mut before = std::mem::take(&mut self.0);
        for name in taken_up.keys().chain(seen.keys()).collect::<BTreeSet<_>>() {
            let files = seen.get(name).cloned().unwrap_or_default();
            if files == taken_up.get(name).map_or(&[][..], Vec::as_slice) {
                continue;
            }
            let since = before
                .remove(name)
                .filter(|(files_before, _)| *files_before == files)
                .map_or(now, |(_, since)| since);
            if now.duration_since(since) >= SETTLED {
                due.insert(name.clone(), files);
            } else {
                self.0.insert(name.clone(), (files, since));
            }
        }
        due
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::tests::Scratch;
    use super::*;

    #[test]
    fn what_changes_is_due_once_it_was_left_alone_for_long_enough() {
        let folder = Scratch::new("settling");
        let (file, mut settling, began) = (
            folder.0.join("1-a.wasm"),
            Settling::default(),
            Instant::now(),
        );
        let (mut taken_up, mut at) = (Look::new(), Duration::ZERO);
        let mut due_after = |taken_up: &Look, wait: Duration| {
            at += wait;
            settling.due(taken_up, &folder.look(), began + at)
        };
        // In pieces, each a little before it would be settled.
        for n_bytes in 0..10 {
            fs::write(&file, vec![0; n_bytes]).unwrap();
            assert_eq!(
                due_after(&taken_up, SETTLED - PACE),
                Look::new(),
                "{n_bytes} bytes"
            );
        }
        assert_eq!(due_after(&taken_up, SETTLED - PACE), Look::new());
        let due = due_after(&taken_up, PACE);
        assert_eq!(
            (due.len(), due["a"].as_slice()),
            (1, folder.look()["a"].as_slice())
        );
        taken_up.extend(due);
        assert_eq!(due_after(&taken_up, SETTLED), Look::new());

        // Away for a moment, as under an editor that removes before it writes: nothing but new bytes.
        fs::remove_file(&file).unwrap();
        assert_eq!(due_after(&taken_up, PACE), Look::new());
        fs::write(&file, "other").unwrap();
        assert_eq!(due_after(&taken_up, SETTLED), Look::new());
        taken_up.extend(due_after(&taken_up, SETTLED));
        assert_eq!(taken_up, folder.look());

        // Another name for the file of the same plugin is one change, and a file that is gone is one.
        fs::rename(&file, folder.0.join("2-a.wasm")).unwrap();
        assert_eq!(due_after(&taken_up, PACE), Look::new());
        let due = due_after(&taken_up, SETTLED);
        assert!(
            due["a"].len() == 1 && due["a"][0].path.ends_with("2-a.wasm"),
            "{due:?}"
        );
        taken_up.extend(due);
        fs::remove_file(folder.0.join("2-a.wasm")).unwrap();
        assert_eq!(due_after(&taken_up, PACE), Look::new());
        assert_eq!(
            due_after(&taken_up, SETTLED),
            Look::from([("a".to_owned(), Vec::new())])
        );
    }
}
