//! Admin commands: uploads, removals, disabling, enabling and rollbacks.
//!
//! Each changes one plugin and returns its state afterwards. A command that fails has changed
//! nothing, except where its documentation says so.

use std::collections::BTreeSet;

use super::ahead::Wait;
use super::folder::FolderSnapshot;
use super::slot::{Failure, LoadOutcome};
use super::state::{PluginState, Refusal};
use super::{AdminError, Registry, admission, folder};
use crate::clock::now_ms;
use crate::plugin::runtime::engine::MAX_PLUGINS;
use crate::plugin::runtime::plugin::file_hash;
use crate::telemetry::metrics::PluginLoadLabel;

impl Registry {
    /// Checks that a file may be uploaded under this name. `is_new`: it adds a plugin instead of
    /// replacing one.
    ///
    /// # Errors
    /// There is no such plugin, or there is one although a new one is to be added; or this node
    /// loads no plugin of this name.
    pub fn check_upload(&self, name: &str, is_new: bool) -> Result<(), AdminError> {
        let slots = self.slots();
        let has_file = slots
            .by_name
            .get(name)
            .is_some_and(|slot| !slot.files.is_empty());
        if has_file && is_new {
            return Err(AdminError::Impossible(format!(
                "the plugin '{name}' already exists; omit create=true to replace it"
            )));
        }
        // An active plugin may be replaced whatever its name.
        if slots
            .by_name
            .get(name)
            .is_none_or(|slot| slot.running.is_none())
        {
            admission::admit(name, &slots.config)
                .map_err(|why| AdminError::Impossible(why.of_upload(name)))?;
        }
        if !has_file && !is_new && !slots.config.names(name) && !slots.is_missing(name) {
            let with_files = slots
                .by_name
                .iter()
                .filter(|(_, slot)| !slot.files.is_empty());
            let named = slots.config.plugins.keys().chain(&slots.config.order);
            let known: BTreeSet<&str> = named
                .chain(with_files.map(|(name, _)| name))
                .map(String::as_str)
                .collect();
            let near = admission::near(name, known.iter().copied());
            let candidates = match (near.as_slice(), known.is_empty()) {
                ([], true) => "it has none".to_owned(),
                ([], false) => {
                    let known: Vec<&str> = known.into_iter().collect();
                    format!("its plugins: {}", known.join(", "))
                }
                (near, _) => format!("did you mean '{}'?", near.join("' or '")),
            };
            return Err(AdminError::New(format!(
                "this node has no plugin '{name}' ({candidates}); add ?create=true to add a new plugin"
            )));
        }
        Ok(())
    }

    /// Checks a file, writes it into the folder under this name and makes it active. `is_new`: it
    /// adds a plugin instead of replacing one.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// As for [`Registry::check_upload`], or the file is invalid. On an error nothing has changed,
    /// except that the refusal is recorded.
    pub fn upload(
        &self,
        name: &str,
        bytes: &[u8],
        is_new: bool,
    ) -> Result<PluginState, AdminError> {
        // Before the lock: other plugins are loaded meanwhile.
        let _code = (self.dir.is_some() && self.check_upload(name, is_new).is_ok())
            .then(|| self.compile_upload(name, bytes));
        let loading = self.begin_loading();
        let Some(dir) = &self.dir else {
            return Err(AdminError::Impossible(
                "this node has no plugin folder; start it with --plugins DIR".to_owned(),
            ));
        };
        self.check_upload(name, is_new)?;
        let (settings, path) = {
            let slots = self.slots();
            let slot = slots.by_name.get(name);
            if slot.is_none_or(|slot| slot.running.is_none()) && slots.n_running() >= MAX_PLUGINS {
                return Err(AdminError::Impossible(format!(
                    "the limit of {MAX_PLUGINS} plugins per node is reached; remove one"
                )));
            }
            let path = slot.and_then(|slot| slot.files.first()).map_or_else(
                || dir.join(format!("{name}.wasm")),
                |file| file.path.clone(),
            );
            (slots.config.settings(name), path)
        };
        let loaded = self.load_bytes(name, bytes, &settings);
        let running = self.slots().running_as(name, &settings);
        let done = match loaded {
            Ok(plugin) if running.as_deref() == Some(plugin.hash()) => {
                LoadOutcome::Unchanged(plugin.hash().to_owned())
            }
            Ok(plugin) => LoadOutcome::Loaded(Box::new(plugin), settings),
            Err(failure) if failure.is_transient => return Err(failure.into()),
            Err(Failure { reason, hash, .. }) => {
                tracing::error!(
                    plugin.name = name,
                    plugin.failed_hash = hash,
                    "plugin upload refused: it {reason}"
                );
                self.refuse(name, &format!("the uploaded file {reason}"), hash);
                return Err(AdminError::InvalidFile(reason));
            }
        };
        // Written before it becomes active, so that a restart loads the version that decides now.
        let stamp = folder::write(&path, bytes)?;
        self.apply(&loading, vec![(name.to_owned(), vec![stamp], done)]);
        let state = self.state(name)?;
        // The active version may have been rolled back after it was found to equal the upload.
        if state.generation > 0 && state.hash != file_hash(bytes) {
            return Err(AdminError::Impossible(
                "it was rolled back during the upload; upload it again".to_owned(),
            ));
        }
        Ok(state)
    }

    /// Removes a plugin together with its file. From then on, no event waits for it, also on other
    /// nodes with this folder and after a restart, until it has a file again.
    ///
    /// # Errors
    /// There is no such plugin, or its file cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), AdminError> {
        let loading = self.begin_loading();
        let files = {
            let slots = self.slots();
            let files = slots.by_name.get(name).map(|slot| slot.files.clone());
            let files = files.unwrap_or_default();
            if files.is_empty() && !slots.is_missing(name) {
                return Err(AdminError::Unknown(name.to_owned()));
            }
            files
        };
        let record = || match &self.dir {
            Some(dir) if folder::is_name(name) => folder::note_removal(dir, name),
            _ => Ok(()),
        };
        record()?;
        // The file goes first: a scan in between would otherwise load the plugin again.
        for file in &files {
            if let Err(error) = folder::remove(&file.path) {
                if let Some(dir) = &self.dir {
                    folder::forget_removal(dir, name);
                }
                return Err(error);
            }
        }
        // Once more, because a node that loaded the file in between has withdrawn the record. An
        // error does no harm: events then wait on the other nodes.
        record().ok();
        self.slots()
            .by_name
            .entry(name.to_owned())
            .or_default()
            .is_removed = true;
        self.load_snapshot_in(
            &loading,
            FolderSnapshot::from([(name.to_owned(), Vec::new())]),
        );
        Ok(())
    }

    /// Deactivates a plugin, overriding the configuration, until it is enabled, the node ends or
    /// the configured `enabled` changes. Takes effect immediately, even while files are being
    /// loaded.
    ///
    /// # Errors
    /// There is no such plugin.
    pub fn disable(&self, name: &str) -> Result<PluginState, AdminError> {
        {
            let mut slots = self.slots();
            let files = slots.set_enabled(name, false)?;
            if let Some(slot) = slots.by_name.get_mut(name) {
                slot.apply(name, files, LoadOutcome::Disabled);
            }
            self.publish(&slots);
        }
        self.state(name)
    }

    /// Activates a plugin, overriding the configuration, until the node ends or the configured
    /// `enabled` changes.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// There is no such plugin, or its file is invalid.
    pub fn enable(&self, name: &str) -> Result<PluginState, AdminError> {
        let files = self.slots().set_enabled(name, true)?;
        let files = FolderSnapshot::from([(name.to_owned(), files)]);
        let _code = self.compile_ahead(files, Wait::All);
        let loading = self.begin_loading();
        let files = self.slots().set_enabled(name, true)?;
        self.load_snapshot_in(&loading, FolderSnapshot::from([(name.to_owned(), files)]));
        match self.state(name)? {
            PluginState {
                generation: 0,
                failure: Some(reason),
                ..
            } => Err(AdminError::Impossible(reason)),
            state => Ok(state),
        }
    }

    /// Reactivates the previous generation. The file stays in place and is not loaded again until
    /// it changes.
    ///
    /// # Errors
    /// There is no such plugin, or no generation to roll back to.
    pub fn roll_back(&self, name: &str) -> Result<PluginState, AdminError> {
        {
            let mut slots = self.slots();
            let slot = slots
                .by_name
                .get(name)
                .filter(|slot| !slot.files.is_empty())
                .ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
            let Some(number) = slot
                .running
                .as_ref()
                .filter(|_| slot.previous.is_some())
                .map(|running| running.number)
            else {
                let fix = "upload the wanted version";
                return Err(AdminError::Impossible(format!(
                    "'{name}' has no earlier generation to roll back to; {fix}"
                )));
            };
            self.roll_back_in(&mut slots, name, number, "was withdrawn by an operator");
        }
        self.state(name)
    }

    pub(super) fn refuse(&self, name: &str, reason: &str, hash: Option<String>) {
        let mut slots = self.slots();
        // Unknown names get no metric label, because they come from outside and are unbounded.
        let Some(slot) = slots
            .by_name
            .get_mut(name)
            .filter(|slot| !slot.files.is_empty())
        else {
            return;
        };
        slot.refusal = Some(Refusal {
            at_ms: now_ms(),
            hash,
            reason: reason.to_owned(),
        });
        self.metrics
            .plugin_loads
            .get_or_create(&PluginLoadLabel {
                plugin: name.to_owned(),
                outcome: "failed",
            })
            .inc();
    }
}
