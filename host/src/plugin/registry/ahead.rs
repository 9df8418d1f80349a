//! Compiles files before the registry is locked to load them, so that a file that takes long to
//! compile holds up neither other files nor admin commands.
//!
//! A file that has not been compiled within [`PATIENCE`] is left to compile: the others are loaded
//! without it, its plugin is reported as `compiling`, and the watcher loads it once it is ready.
//! When its file changes meanwhile, the compilation is stopped.

use std::time::{Duration, Instant};

use super::folder::{self, FileStamp, FolderSnapshot};
use super::job::Job;
use super::slot::{Failure, LoadOutcome};
use super::{AdminError, Registry};
use crate::plugin::LoadError;
use crate::plugin::registry::settings::{Config, Settings};
use crate::plugin::runtime::compile;
use crate::plugin::runtime::compiler::Compilation;
use crate::plugin::runtime::plugin::file_hash;

/// How long files that were found together wait for each other to be compiled, so that they become
/// active together.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long loading waits for files to be compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Until all are. Nothing loads what is left over later.
    All,
    /// For [`PATIENCE`]; the watcher loads the rest.
    Briefly,
}

/// Files whose code is ready, or that are refused without compiling them.
pub(super) struct Ready {
    pub(super) files: FolderSnapshot,
    /// Keeps the code until the files are loaded.
    pub(super) _code: Vec<Compilation>,
    /// The files that are still being compiled.
    pub(super) slow: Vec<(String, Vec<FileStamp>, LoadOutcome)>,
}

impl Registry {
    /// Compiles these files, as far as they are to be loaded and were not compiled before.
    pub(super) fn compile_ahead(&self, mut files: FolderSnapshot, wait: Wait) -> Ready {
        let deadline = Instant::now() + PATIENCE;
        let mut under_way = Vec::new();
        for (name, files, job) in self.jobs(files.clone()) {
            let Job::Load(wanted) = job else { continue };
            // Files that cannot be read, or that are refused at once, are reported when loaded.
            let Ok(bytes) = folder::read(&wanted.path, wanted.settings.limits().file_bytes) else {
                continue;
            };
            let hash = file_hash(&bytes);
            if [&wanted.running, &wanted.rolled_back].contains(&&Some(hash)) {
                continue;
            }
            if let Ok(compilation) = self.begin_to_compile(&bytes, &wanted.settings) {
                under_way.push((name, files, compilation));
            }
        }
        let mut code = Vec::new();
        let mut slow = Vec::new();
        for (name, stamps, compilation) in under_way {
            match wait {
                Wait::All => compilation.wait(),
                Wait::Briefly => compilation.wait_until(deadline),
            }
            if compilation.has_ended() {
                code.push(compilation);
            } else {
                files.remove(&name);
                slow.push((name, stamps, LoadOutcome::Compiling(compilation)));
            }
        }
        Ready {
            files,
            _code: code,
            slow,
        }
    }

    /// Compiles the files of the plugins whose settings differ in this configuration, and returns
    /// the code to be held until they are loaded. Code of active plugins is there already.
    pub(super) fn compile_for(&self, config: &Config) -> Vec<Compilation> {
        let changed: Vec<_> = {
            let slots = self.slots();
            let changed = slots
                .by_name
                .iter()
                .filter(|(name, _)| config.settings(name) != slots.config.settings(name));
            let files = changed.filter_map(|(name, slot)| {
                Some((slot.files.first()?.path.clone(), config.settings(name)))
            });
            files.filter(|(_, settings)| settings.enabled).collect()
        };
        let code = changed.into_iter().filter_map(|(path, settings)| {
            let bytes = folder::read(&path, settings.limits().file_bytes).ok()?;
            self.begin_to_compile(&bytes, &settings).ok()
        });
        // All are begun before the first is awaited.
        let code: Vec<Compilation> = code.collect();
        code.iter().for_each(Compilation::wait);
        code
    }

    /// Begins to compile a file, or finds the compilation that is under way.
    ///
    /// # Errors
    /// The file is refused without compiling it.
    pub(super) fn begin_to_compile(
        &self,
        bytes: &[u8],
        settings: &Settings,
    ) -> Result<Compilation, LoadError> {
        let hash = file_hash(bytes);
        if let Some(pinned) = &settings.sha256
            && !pinned.eq_ignore_ascii_case(&hash)
        {
            return Err(LoadError::of_file("is not the pinned one"));
        }
        compile::begin(&self.engine, bytes, &hash, &settings.limits())
    }

    /// Compiles the bytes of an upload, and returns the code to be held until they are loaded.
    /// Errors are left to the load.
    pub(super) fn compile_upload(&self, name: &str, bytes: &[u8]) -> Option<Compilation> {
        let settings = self.slots().config.settings(name);
        self.compile_bytes(bytes, &settings)
    }

    /// As [`Registry::compile_upload`], for a candidate, whose hash may be any.
    pub(super) fn compile_candidate(&self, name: &str, bytes: &[u8]) -> Option<Compilation> {
        let settings = Settings {
            sha256: None,
            ..self.slots().config.settings(name)
        };
        self.compile_bytes(bytes, &settings)
    }

    fn compile_bytes(&self, bytes: &[u8], settings: &Settings) -> Option<Compilation> {
        let compilation = self.begin_to_compile(bytes, settings).ok()?;
        compilation.wait();
        Some(compilation)
    }

    /// Whether a file is still being compiled for the watcher to load.
    pub(super) fn is_compiling(&self) -> bool {
        let slots = self.slots();
        slots
            .by_name
            .values()
            .any(|slot| slot.compilation.is_some())
    }
}

impl From<Failure> for AdminError {
    fn from(failure: Failure) -> Self {
        if failure.is_transient {
            Self::Impossible(format!("it {}", failure.reason))
        } else {
            Self::InvalidFile(failure.reason)
        }
    }
}

impl Failure {
    pub(super) fn of_compiling(file: &str) -> Self {
        Self {
            reason: format!(
                "{file} is still being compiled; wait, or build the image with its code (pointsman plugin compile)"
            ),
            hash: None,
            is_transient: false,
        }
    }
}
