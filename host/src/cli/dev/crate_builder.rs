//! Builds one plugin crate at start and after every change, until it is dropped.
//!
//! Only the crate's build inputs ([`SOURCES`]) and its configuration are watched. As with the
//! plugin folder, a file system notification only triggers a scan; the scan detects the changes,
//! and Cargo determines what has to be rebuilt.

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

/// Quiet time before a build starts: editors save a file in several steps.
const SETTLED: Duration = Duration::from_millis(80);
/// Maximum time between two scans, in case a notification is lost.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Maximum number of files scanned; changes to further files are not detected.
const MAX_FILES: usize = 10_000;

/// The build loop of one crate. Dropping it ends its thread and a build in progress.
#[derive(Debug)]
pub(super) struct CrateBuilder {
    shared: Arc<Shared>,
    wake: SyncSender<()>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    is_over: AtomicBool,
    under_way: Mutex<Option<Build>>,
}

impl CrateBuilder {
    /// Starts the loop with a first build. `folder` receives the built plugin files.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn open(
        known: &Crate,
        profile: &Profile,
        folder: &Path,
        settings: &Arc<Settings>,
    ) -> anyhow::Result<Self> {
        let (wake, woken) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        let builder = BuildLoop {
            known: known.clone(),
            profile: profile.clone(),
            folder: folder.to_owned(),
            settings: Arc::clone(settings),
            shared: Arc::clone(&shared),
            wake: wake.clone(),
            watcher: None,
        };
        let thread = thread::Builder::new()
            .name(format!("build-{}", known.name))
            .spawn(move || builder.run(&woken));
        Ok(Self {
            shared,
            wake,
            thread: Some(thread.context("cannot start a thread")?),
        })
    }
}

impl Drop for CrateBuilder {
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
        // If the channel is full, a wake-up is already pending.
        self.wake.try_send(()).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// State of the build thread.
struct BuildLoop {
    known: Crate,
    profile: Profile,
    folder: PathBuf,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    wake: SyncSender<()>,
    watcher: Option<(BTreeSet<PathBuf>, RecommendedWatcher)>,
}

/// Build inputs of a crate: files and folders.
const SOURCES: [&str; 7] = [
    "src",
    "vendor",
    "wit",
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    ".cargo",
];

/// Size and modification time of a file, which reveal that it was saved.
type Seen = (u64, Option<SystemTime>);

/// A scan of a crate: its source files, and the folders that contain them.
#[derive(Debug, Default, PartialEq)]
struct Sources {
    files: BTreeMap<PathBuf, Seen>,
    folders: BTreeSet<PathBuf>,
    /// The plugin's configuration file. A change to it requires no build.
    config: Option<Seen>,
}

impl BuildLoop {
    fn run(mut self, woken: &Receiver<()>) {
        let mut built: Option<Sources> = None;
        while !self.is_over() {
            let seen = Sources::of(&self.known.folder);
            self.listen(&seen.folders);
            let is_to_be_built = built.as_ref().is_none_or(|built| built.files != seen.files);
            let is_to_be_configured = built
                .as_ref()
                .is_none_or(|built| built.config != seen.config);
            if is_to_be_configured && let Err(error) = self.settings.write() {
                println!("{}: configuration not updated: {error:#}", self.known.name);
            }
            if is_to_be_built {
                self.build();
            }
            if is_to_be_built || is_to_be_configured {
                // The scan from before the build, so that a file saved during the build counts as a
                // change.
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
            // `drop` sets the flag before it takes `under_way`: a build that `drop` did not see
            // there is ended here.
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
            Ok(_) => println!("{name}: built; no changes"),
            Err(error) => {
                println!("{name}: build failed: {error:#}; the previous version stays active")
            }
        }
    }

    /// Atomically copies a file into the plugin folder. Returns `false` if the folder already has
    /// an identical file.
    fn put(&self, file: &Path) -> anyhow::Result<bool> {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.file_name().context("a file has a name")?;
        let place = self.folder.join(name);
        if fs::read(&place).is_ok_and(|there| there == bytes) {
            return Ok(false);
        }
        // The node ignores names that start with a dot, so it never sees a partial file.
        let draft = self.folder.join(format!(".{}", name.to_string_lossy()));
        fs::write(&draft, bytes)
            .and_then(|()| fs::rename(&draft, &place))
            .with_context(|| format!("cannot write {}", place.display()))?;
        Ok(true)
    }

    /// Watches exactly these folders, not recursively: `target` changes all the time.
    fn listen(&mut self, folders: &BTreeSet<PathBuf>) {
        if self
            .watcher
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
        let watcher = notify::recommended_watcher(heard).and_then(|mut watcher| {
            folders
                .iter()
                .try_for_each(|folder| watcher.watch(folder, RecursiveMode::NonRecursive))?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => self.watcher = Some((folders.clone(), watcher)),
            Err(error) => {
                tracing::debug!(%error, "cannot watch the crate; it is scanned every {} s instead", LOOK_EVERY.as_secs())
            }
        }
    }
}

impl Sources {
    fn of(folder: &Path) -> Self {
        // The crate's folder itself is watched for the build inputs directly in it.
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
            // Hidden files are temporary files of editors.
            let entries = entries
                .map_while(Result::ok)
                .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
            open.extend(entries.map(|entry| entry.path()));
            sources.folders.insert(path);
        }
        sources
    }
}

/// `None` if the path is not a file.
fn look(path: &Path) -> Option<Seen> {
    let seen = fs::metadata(path).ok().filter(|seen| seen.is_file())?;
    Some((seen.len(), seen.modified().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_build_inputs_and_the_configuration_of_a_crate_are_scanned() {
        let folder =
            std::env::temp_dir().join(format!("pointsman-crate-builder-{}", std::process::id()));
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
