//! Loads the files that are due, and publishes the outcomes together.

use std::sync::MutexGuard;

use super::ahead::{Ready, Wait};
use super::folder::{FileStamp, FolderSnapshot};
use super::job::{Job, Wanted};
use super::settings::{Config, Settings};
use super::slot::{Failure, LoadOutcome, Slots};
use super::{Registry, admission, folder};
use crate::event::Name;
use crate::plugin::Plugin;
use crate::plugin::runtime::plugin::file_hash;
use crate::telemetry::metrics::{PluginLabel, PluginLoadLabel};

impl Registry {
    /// Loads these plugins from their files, removes those without files, and swaps the chain once
    /// for all of them.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    pub(super) fn load_snapshot(&self, snapshot: FolderSnapshot, wait: Wait) {
        let Ready { files, slow, _code } = self.compile_ahead(snapshot, wait);
        let loading = self.begin_loading();
        // The lock may have been held by another load, or by an upload that wrote these files.
        // Entries that are outdated by now are dropped; the next scan finds them again.
        let now = self
            .dir
            .as_deref()
            .and_then(|dir| folder::snapshot(dir).ok())
            .unwrap_or_default();
        let is_still =
            |name: &str, files: &[FileStamp]| now.get(name).map_or(&[][..], Vec::as_slice) == files;
        let slow = slow.into_iter();
        let slow = slow.filter(|(name, files, _)| is_still(name, files));
        let slow = slow.collect();
        let still = files
            .into_iter()
            .filter(|(name, files)| is_still(name, files));
        self.load_snapshot_beside(&loading, still.collect(), slow);
    }

    /// Applies a changed `[plugins]` section. A plugin whose settings changed is reloaded and stays
    /// as it was if it rejects them. The order is that of the new section. The folder stays the
    /// same.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    pub fn configure(&self, config: Config) {
        self.engine.set_compile_budget(config.compile_budget());
        let _code = self.compile_for(&config);
        let loading = self.begin_loading();
        let changed = {
            let mut slots = self.slots();
            let before = std::mem::replace(&mut slots.config, config);
            let Slots {
                config, by_name, ..
            } = &mut *slots;
            let mut changed = FolderSnapshot::new();
            for (name, slot) in by_name
                .iter_mut()
                .filter(|(name, _)| config.settings(name) != before.settings(name))
            {
                if config.settings(name).enabled != before.settings(name).enabled {
                    slot.enabled = None;
                }
                changed.insert(name.clone(), slot.files.clone());
            }
            let admissions = by_name.iter().filter(|(name, slot)| {
                !slot.files.is_empty()
                    && admission::admit(name, config) != admission::admit(name, &before)
            });
            changed.extend(admissions.map(|(name, slot)| (name.clone(), slot.files.clone())));
            changed
        };
        self.load_snapshot_in(&loading, changed);
    }

    pub(super) fn load_snapshot_in(&self, loading: &MutexGuard<'_, ()>, snapshot: FolderSnapshot) {
        self.load_snapshot_beside(loading, snapshot, Vec::new());
    }

    /// Loads these files and applies these outcomes of others together with theirs.
    fn load_snapshot_beside(
        &self,
        loading: &MutexGuard<'_, ()>,
        snapshot: FolderSnapshot,
        others: Vec<(String, Vec<FileStamp>, LoadOutcome)>,
    ) {
        let jobs = self.jobs(snapshot);
        let done = jobs.into_iter().map(|(name, files, job)| {
            let done = match job {
                Job::Remove => LoadOutcome::Removed,
                Job::Rest => LoadOutcome::Disabled,
                Job::Refuse(failure) => LoadOutcome::Failed(failure),
                Job::Ignore(why) => LoadOutcome::Ignored(why),
                Job::Load(wanted) => match self.load_file(&name, &wanted) {
                    Ok(done) => done,
                    Err(failure) => LoadOutcome::Failed(failure),
                },
            };
            (name, files, done)
        });
        let done = done.chain(others).collect();
        self.apply(loading, done);
    }

    fn load_file(&self, name: &str, wanted: &Wanted) -> Result<LoadOutcome, Failure> {
        let bytes = folder::read(&wanted.path, wanted.settings.limits().file_bytes)
            .map_err(|reason| Failure::of_file(reason, None))?;
        let hash = file_hash(&bytes);
        if wanted.running.as_ref() == Some(&hash) {
            return Ok(LoadOutcome::Unchanged(hash));
        }
        if wanted.rolled_back.as_ref() == Some(&hash) {
            let reason = "was rolled back before and is not loaded again; replace it, or upload it to try it again".to_owned();
            return Err(Failure::of_file(reason, Some(hash)));
        }
        self.load_bytes(name, &bytes, &wanted.settings)
            .map(|plugin| LoadOutcome::Loaded(Box::new(plugin), wanted.settings.clone()))
    }

    pub(super) fn load_bytes(
        &self,
        name: &str,
        bytes: &[u8],
        settings: &Settings,
    ) -> Result<Plugin, Failure> {
        let hash = file_hash(bytes);
        let failed = |reason| Failure::of_file(reason, Some(hash.clone()));
        let name = Name::parse(name)
            .map_err(|e| failed(format!("does not give a valid plugin name: it {e}")))?;
        if let Some(pinned) = &settings.sha256
            && !pinned.eq_ignore_ascii_case(&hash)
        {
            return Err(failed(format!(
                "has the SHA-256 {hash}, which is not the configured one"
            )));
        }
        let config = serde_json::to_string(&settings.config)
            .map_err(|e| failed(format!("has a configuration that is not valid JSON: {e}")))?;
        // On a separate thread: WASI's synchronous functions must not run on an executor's thread,
        // and the caller may be on one.
        let load = || Plugin::load(&self.engine, name, bytes, &config, settings.limits());
        let plugin = std::thread::scope(|scope| {
            Ok(std::thread::Builder::new()
                .spawn_scoped(scope, load)?
                .join())
        });
        let plugin = plugin.map_err(|e: std::io::Error| Failure {
            is_transient: true,
            ..failed(format!(
                "was not checked, because no thread can be started: {e}"
            ))
        })?;
        let plugin =
            plugin.map_err(|_| failed("made the host panic while it was loaded".to_owned()))?;
        plugin.map_err(|e| Failure {
            is_transient: e.is_transient(),
            ..failed(e.to_string())
        })
    }

    /// Applies the outcomes of all jobs and publishes them together.
    pub(super) fn apply(
        &self,
        _: &MutexGuard<'_, ()>,
        done: Vec<(String, Vec<FileStamp>, LoadOutcome)>,
    ) {
        let mut outcomes = Vec::with_capacity(done.len());
        if let Some(dir) = &self.dir {
            for (name, ..) in done.iter().filter(|(_, files, _)| !files.is_empty()) {
                folder::forget_removal(dir, name);
            }
        }
        {
            let mut slots = self.slots();
            for (name, files, done) in done {
                let done = match done {
                    LoadOutcome::Removed => {
                        if let Ok(shadow) = self.find_shadow(&name) {
                            self.shadows.end(&shadow);
                        }
                        LoadOutcome::Removed
                    }
                    // Disabled before or while it was loaded: it must not become active, whatever
                    // the outcome.
                    _ if !slots.is_enabled(&name) => LoadOutcome::Disabled,
                    done => done,
                };
                if let LoadOutcome::Loaded(plugin, _) = &done
                    && let Some(time) = plugin.compile_time()
                {
                    let plugin = name.clone();
                    let total = self
                        .metrics
                        .plugin_compile
                        .get_or_create(&PluginLabel { plugin });
                    total.inc_by(time.as_secs_f64());
                }
                let outcome = slots
                    .by_name
                    .entry(name.clone())
                    .or_default()
                    .apply(&name, files, done);
                outcomes.extend(outcome.map(|outcome| PluginLoadLabel {
                    plugin: name,
                    outcome,
                }));
            }
            self.publish(&slots);
        }
        // Counted after publishing, so that a reader of the metric can rely on the new state.
        for label in outcomes {
            self.metrics.plugin_loads.get_or_create(&label).inc();
        }
    }
}
