//! One crate under the eyes of its author: built at once, and again after each change, until nobody wants it any more.
//!
//! What is looked at is what a crate is built from, and its configuration; anything else may come and go in its folder. As with the folder of
//! plugins, what is heard only says when to look, and what is seen decides: whether anything is to be built, Cargo knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use pointsman::plugin::registry::watcher::is_change;

use super::super::plugin::toolchain::{Build, Profile};
use super::{CONFIG, Crate, Settings};

/// How long nothing changes before it is built: editors write in pieces.
const SETTLED: Duration = Duration::from_millis(80);
/// The most time between two looks, for what is not heard.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The most files that are looked at; beyond it, changes are not seen.
const MAX_FILES: usize = 10_000;

/// Ends its thread, and what it builds, as it is dropped.
#[derive(Debug)]
pub(super) struct Workshop {
    shared: Arc<Shared>,
    wake: SyncSender<()>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    is_over: AtomicBool,
    under_way: Mutex<Option<Build>>,
}

impl Workshop {
    /// Begins with a first build. `folder`: where what is built is put.
    pub(super) fn open(
        known: &Crate,
        profile: &Profile,
        folder: &Path,
        settings: &Arc<Settings>,
    ) -> anyhow::Result<Self> {
        let (wake, woken) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        let bench = Bench {
            known: known.clone(),
            profile: profile.clone(),
            folder: folder.to_owned(),
            settings: Arc::clone(settings),
            shared: Arc::clone(&shared),
            wake: wake.clone(),
            ears: None,
        };
        let thread = thread::Builder::new()
            .name(format!("build-{}", known.name))
            .spawn(move || bench.work(&woken));
        Ok(Self {
            shared,
            wake,
            thread: Some(thread.context("cannot start a thread")?),
        })
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        if let Some(build) = self
            .shared
            .under_way
            .lock()
            .expect("no panic under this lock")
            .take()
        {
            build.end();
        }
        // A full channel wakes it as well.
        self.wake.try_send(()).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// What the thread has.
struct Bench {
    known: Crate,
    profile: Profile,
    folder: PathBuf,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    wake: SyncSender<()>,
    ears: Option<(BTreeSet<PathBuf>, RecommendedWatcher)>,
}

/// What a crate is built from.
const SOURCES: [&str; 7] = [
    "src",
    "vendor",
    "wit",
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    ".cargo",
];

/// What of a file changes as it is saved.
type Seen = (u64, Option<SystemTime>);

/// The files of a crate, each as it was seen, and the folders that they are in.
#[derive(Debug, Default, PartialEq)]
struct Sources {
    files: BTreeMap<PathBuf, Seen>,
    folders: BTreeSet<PathBuf>,
    /// What the plugin is configured with; nothing is to be built for it.
    config: Option<Seen>,
}

impl Bench {
    fn work(mut self, woken: &Receiver<()>) {
        let mut built: Option<Sources> = None;
        while !self.is_over() {
            let seen = Sources::of(&self.known.folder);
            self.listen(&seen.folders);
            let is_to_be_built = built.as_ref().is_none_or(|built| built.files != seen.files);
            let is_to_be_configured = built
                .as_ref()
                .is_none_or(|built| built.config != seen.config);
            if is_to_be_configured && let Err(error) = self.settings.write() {
                println!("{}: not configured anew: {error:#}", self.known.name);
            }
            if is_to_be_built {
                self.build();
            }
            if is_to_be_built || is_to_be_configured {
                // As it was before: what is saved meanwhile is seen as a change.
                built = Some(seen);
                continue;
            }
            match woken.recv_timeout(LOOK_EVERY) {
                Ok(()) => while woken.recv_timeout(SETTLED).is_ok() {},
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn is_over(&self) -> bool {
        self.shared.is_over.load(Ordering::SeqCst)
    }

    fn build(&self) {
        let name = &self.known.name;
        println!("{name}: building");
        let began = Instant::now();
        let outcome = Build::start(&self.known.folder, &self.profile, true).and_then(|build| {
            *self
                .shared
                .under_way
                .lock()
                .expect("no panic under this lock") = Some(build.clone());
            if self.is_over() {
                build.end();
            }
            let made = build.finish();
            self.shared
                .under_way
                .lock()
                .expect("no panic under this lock")
                .take();
            made?
                .iter()
                .map(|file| self.put(file))
                .collect::<anyhow::Result<Vec<_>>>()
        });
        if self.is_over() {
            return;
        }
        match outcome {
            Ok(changed) if changed.contains(&true) => {
                println!("{name}: built in {:.1} s", began.elapsed().as_secs_f64())
            }
            Ok(_) => println!("{name}: built, and nothing has changed"),
            Err(error) => println!("{name}: not built: {error:#}; what is at work stays at work"),
        }
    }

    /// Puts a file where the node finds it, in one step; `false`: it is what is there.
    fn put(&self, file: &Path) -> anyhow::Result<bool> {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.file_name().context("a file has a name")?;
        let place = self.folder.join(name);
        if fs::read(&place).is_ok_and(|there| there == bytes) {
            return Ok(false);
        }
        // A name with a dot first is one that nobody looks at.
        let draft = self.folder.join(format!(".{}", name.to_string_lossy()));
        fs::write(&draft, bytes)
            .and_then(|()| fs::rename(&draft, &place))
            .with_context(|| format!("cannot write {}", place.display()))?;
        Ok(true)
    }

    /// Listens to these folders and no others: Cargo's own would never be quiet.
    fn listen(&mut self, folders: &BTreeSet<PathBuf>) {
        if self
            .ears
            .as_ref()
            .is_some_and(|(heard, _)| heard == folders)
        {
            return;
        }
        let wake = self.wake.clone();
        let heard = move |event: notify::Result<notify::Event>| {
            if is_change(&event) {
                wake.try_send(()).ok();
            }
        };
        let ears = notify::recommended_watcher(heard).and_then(|mut ears| {
            folders
                .iter()
                .try_for_each(|folder| ears.watch(folder, RecursiveMode::NonRecursive))?;
            Ok(ears)
        });
        match ears {
            Ok(ears) => self.ears = Some((folders.clone(), ears)),
            Err(error) => {
                tracing::debug!(%error, "the crate cannot be listened to; it is looked at every {} s", LOOK_EVERY.as_secs())
            }
        }
    }
}

impl Sources {
    fn of(folder: &Path) -> Self {
        // The folder itself, for the files in it that are one of these.
        let mut sources = Self {
            config: look(&folder.join(CONFIG)),
            folders: BTreeSet::from([folder.to_owned()]),
            ..Self::default()
        };
        let mut open: Vec<PathBuf> = SOURCES.iter().map(|name| folder.join(name)).collect();
        while let Some(path) = open.pop() {
            if sources.files.len() == MAX_FILES {
                break;
            }
            if let Some(seen) = look(&path) {
                sources.files.insert(path, seen);
                continue;
            }
            let Ok(entries) = fs::read_dir(&path) else {
                continue;
            };
            // What is hidden is an editor's.
            let entries = entries
                .map_while(Result::ok)
                .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
            open.extend(entries.map(|entry| entry.path()));
            sources.folders.insert(path);
        }
        sources
    }
}

/// `None`: it is no file.
fn look(path: &Path) -> Option<Seen> {
    let seen = fs::metadata(path).ok().filter(|seen| seen.is_file())?;
    Some((seen.len(), seen.modified().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crate_is_built_from_is_looked_at_and_nothing_else_in_its_folder() {
        let folder =
            std::env::temp_dir().join(format!("pointsman-workshop-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for path in ["Cargo.toml", "src/lib.rs", "src/deep/er.rs"] {
            write(path, "");
        }
        let mut before = Sources::of(&folder);
        assert_eq!(
            before.folders,
            [&folder, &folder.join("src"), &folder.join("src/deep")]
                .map(PathBuf::clone)
                .into()
        );
        for (path, is_source, is_config) in [
            ("src/lib.rs", true, false),
            ("src/deep/er.rs", true, false),
            ("src/new/one.rs", true, false),
            ("wit/world.wit", true, false),
            ("vendor/sdk/src/lib.rs", true, false),
            ("Cargo.toml", true, false),
            ("Cargo.lock", true, false),
            ("build.rs", true, false),
            (".cargo/config.toml", true, false),
            ("config.json", false, true),
            ("events.jsonl", false, false),
            ("golden.json", false, false),
            ("README.md", false, false),
            ("target/debug/x", false, false),
            ("src/.lib.rs.swp", false, false),
            ("notes/src/x.rs", false, false),
        ] {
            write(path, path);
            let now = Sources::of(&folder);
            assert_eq!(
                (now.files != before.files, now.config != before.config),
                (is_source, is_config),
                "{path}"
            );
            before = now;
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
