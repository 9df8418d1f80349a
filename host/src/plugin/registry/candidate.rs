//! Candidates for active plugins: a new file, a new section of the configuration, or both. They are
//! loaded like any file, then run in a plugin's shadow or in its place in a separate chain that
//! decides nothing.
//!
//! A candidate has passed every check of a load and has the same roles as its plugin. The part that
//! is not given, file or settings, is that of the active plugin. Shadowing is in `plugin::shadow`;
//! backtesting on past events is in `preview::backtest`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use serde::Serialize;

use super::folder::FolderSnapshot;
use super::section::{MAX_BYTES, Section};
use super::{AdminError, Registry, folder, section};
use crate::event::Name;
use crate::plugin::Plugin;
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::registry::settings::Settings;
use crate::plugin::registry::state::{PluginKind, PluginState};
use crate::plugin::runtime::compiler::Compilation;
use crate::plugin::runtime::plugin::{file_hash, short_hash};
use crate::plugin::shadow::{CandidateSource, Shadow, ShadowReport, Shadows};

/// The parts in which a candidate differs from the active version; at least one is given.
#[derive(Clone, Debug, Default)]
pub struct CandidateParts {
    /// The bytes of a plugin file. `None`: the active file.
    pub file: Option<Bytes>,
    /// A configuration file in TOML with the section of the plugin. `None`: the active settings.
    pub config: Option<String>,
}

/// A promoted candidate, or the changes that are left to the operator.
#[derive(Clone, Debug, Serialize)]
pub struct Promotion {
    #[serde(flatten)]
    pub plugin: PluginState,
    /// The changes that this node may not make, for example on a read-only mount. Nothing has
    /// changed if there are any.
    pub changes: Vec<Change>,
}

/// A change that makes a candidate the active version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// Replace the plugin's file.
    File {
        path: PathBuf,
        /// SHA-256 of the new file, in hexadecimal.
        hash: String,
        /// Why the node does not do it.
        reason: String,
    },
    /// Replace the section of the configuration file.
    Section {
        path: PathBuf,
        /// The new section, as TOML.
        text: String,
        /// Why the node does not do it.
        reason: String,
    },
}

/// A loaded candidate.
pub(super) struct Candidate {
    pub(super) plugin: Plugin,
    pub(super) settings: Settings,
    pub(super) source: CandidateSource,
}

/// A candidate in place of its plugin.
#[derive(Clone, Debug)]
pub struct CandidateChain {
    pub name: Name,
    /// SHA-256 of its file, in hexadecimal.
    pub hash: String,
    /// The first 12 hex digits of the SHA-256 of its configuration, as in decision records.
    pub config_hash: String,
    /// The version in its manifest.
    pub version: String,
    /// The active chain, with the candidate in place of its plugin.
    pub chain: Arc<Chain>,
}

/// A configuration file before and after a promotion.
struct SectionEdit {
    path: PathBuf,
    old: String,
    new: String,
}

impl Registry {
    /// The shadow candidates.
    pub(crate) fn shadows(&self) -> &Shadows {
        &self.shadows
    }

    /// Starts a candidate in the shadow of an active plugin, replacing an earlier candidate. It is
    /// called for the same events, and its answers have no effect.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// No such plugin is active, the candidate is invalid, or there are too many candidates.
    pub fn begin_shadow(
        &self,
        name: &str,
        parts: CandidateParts,
    ) -> Result<ShadowReport, AdminError> {
        let _code = self.compile_parts(name, &parts);
        // Held until the candidate is registered: otherwise its plugin could be removed first and
        // leave the candidate behind.
        let loading = self.begin_loading();
        let Candidate { plugin, source, .. } = self.candidate(&loading, name, parts)?;
        tracing::info!(
            plugin.name = name,
            plugin.candidate_hash = plugin.hash(),
            "shadow candidate started"
        );
        self.shadows
            .begin(&self.engine, plugin, source, self.metrics.clone())
            .map_err(AdminError::Impossible)
    }

    /// Reports on the candidate of a plugin.
    ///
    /// # Errors
    /// The plugin has no candidate.
    pub fn shadow(&self, name: &str) -> Result<ShadowReport, AdminError> {
        Ok(self.find_shadow(name)?.report())
    }

    /// Stops the candidate of a plugin.
    ///
    /// # Errors
    /// The plugin has no candidate.
    pub fn end_shadow(&self, name: &str) -> Result<(), AdminError> {
        let shadow = self.find_shadow(name)?;
        self.shadows.end(&shadow);
        Ok(())
    }

    /// Replaces a plugin by its candidate in shadow: the candidate's file becomes the plugin's file,
    /// its section replaces that in the configuration file, and the shadow ends. If this node may not
    /// write one of them, nothing changes, and the answer lists the changes.
    ///
    /// # Errors
    /// The plugin has no candidate, or as for [`Registry::upload`]; the candidate then stays in
    /// place.
    pub fn promote(&self, name: &str) -> Result<Promotion, AdminError> {
        let shadow = self.find_shadow(name)?;
        let promotion = self.promote_source(name, shadow.source())?;
        // Ended only after it succeeded: a failed promotion keeps the candidate.
        if promotion.changes.is_empty() {
            self.shadows.end(&shadow);
        }
        Ok(promotion)
    }

    /// Like [`Registry::promote`], with a candidate that was not in shadow.
    ///
    /// # Errors
    /// The candidate is invalid, or as for [`Registry::promote`].
    pub fn promote_parts(
        &self,
        name: &str,
        parts: CandidateParts,
    ) -> Result<Promotion, AdminError> {
        let _code = self.compile_parts(name, &parts);
        let source = self.candidate(&self.begin_loading(), name, parts)?.source;
        self.promote_source(name, &source)
    }

    /// Compiles the file of a candidate, if it is not the active one.
    pub(super) fn compile_parts(&self, name: &str, parts: &CandidateParts) -> Option<Compilation> {
        let file = parts.file.as_ref()?;
        self.compile_candidate(name, file)
    }

    fn promote_source(
        &self,
        name: &str,
        source: &CandidateSource,
    ) -> Result<Promotion, AdminError> {
        let section = source.section.as_deref();
        let section = section.map(|text| Section::parse(name, text)).transpose();
        let section = section.map_err(AdminError::InvalidConfig)?;
        let active = self.state(name)?;
        let is_new_file = active.hash != file_hash(&source.bytes);
        let mut changes = Vec::new();
        let edit = section
            .as_ref()
            .and_then(|section| match self.section_edit(name, section) {
                Ok(edit) => Some(edit),
                Err(change) => {
                    changes.push(change);
                    None
                }
            });
        changes.extend(
            is_new_file
                .then(|| self.file_change(name, source))
                .flatten(),
        );
        if !changes.is_empty() {
            return Ok(Promotion {
                plugin: active,
                changes,
            });
        }
        let file = is_new_file.then_some(&source.bytes);
        let plugin = match (section, edit) {
            (Some(section), Some(edit)) => {
                self.apply_section(name, file, &section.settings, &edit)?
            }
            _ => self.upload(name, &source.bytes, false)?,
        };
        Ok(Promotion { plugin, changes })
    }

    /// Writes the section and makes it active, with the file if that is new. On an error nothing
    /// has changed.
    fn apply_section(
        &self,
        name: &str,
        file: Option<&Bytes>,
        settings: &Settings,
        edit: &SectionEdit,
    ) -> Result<PluginState, AdminError> {
        // Written before it becomes active, so that a restart loads the version that decides now.
        // The reload that follows finds the settings that are active by then.
        section::write(&edit.path, &edit.new).map_err(AdminError::Folder)?;
        let replace = |settings: Option<Settings>| {
            let mut slots = self.slots();
            match settings {
                Some(settings) => slots.config.plugins.insert(name.to_owned(), settings),
                None => slots.config.plugins.remove(name),
            }
        };
        let before = replace(Some(settings.clone()));
        let applied = match file {
            Some(bytes) => self.upload(name, bytes, false),
            None => self.reload(name),
        };
        applied.inspect_err(|_| {
            replace(before.clone());
            if let Err(error) = section::write(&edit.path, &edit.old) {
                tracing::error!(
                    plugin.name = name,
                    "the configuration still has the section of a refused candidate: {error}"
                );
            }
        })
    }

    /// Loads the plugin's file with its present settings.
    fn reload(&self, name: &str) -> Result<PluginState, AdminError> {
        let loading = self.begin_loading();
        let files = {
            let slots = self.slots();
            slots.by_name.get(name).map(|slot| slot.files.clone())
        };
        let files = files.unwrap_or_default();
        self.load_snapshot_in(&loading, FolderSnapshot::from([(name.to_owned(), files)]));
        let state = self.state(name)?;
        match &state.failure {
            Some(reason) => Err(AdminError::Impossible(reason.clone())),
            None => Ok(state),
        }
    }

    /// The configuration file with the section of a candidate.
    ///
    /// # Errors
    /// The change that is left to the operator.
    fn section_edit(&self, name: &str, section: &Section) -> Result<SectionEdit, Change> {
        let path = self.config_file.get().cloned().unwrap_or_default();
        // The file itself and not a link to it is replaced.
        let path = fs::canonicalize(&path).unwrap_or(path);
        let left = |reason: String| Change::Section {
            path: path.clone(),
            text: section.text.clone(),
            reason,
        };
        let old = fs::read_to_string(&path)
            .map_err(|error| left(format!("it cannot be read: {error}")))?;
        let new = section.replaced_in(name, &old).ok_or_else(|| {
            left(format!(
                "[plugins.{name}] is not written there as a section of its own"
            ))
        })?;
        folder::check_writable(path.parent().unwrap_or(Path::new(".")))
            .map_err(|error| left(format!("its folder cannot be written: {error}")))?;
        Ok(SectionEdit { path, old, new })
    }

    /// The change of the file that is left to the operator, if this node cannot write it.
    fn file_change(&self, name: &str, source: &CandidateSource) -> Option<Change> {
        let path = {
            let slots = self.slots();
            let slot = slots.by_name.get(name);
            slot.and_then(|slot| slot.files.first())?.path.clone()
        };
        let error = folder::check_writable(path.parent().unwrap_or(Path::new("."))).err()?;
        Some(Change::File {
            path,
            hash: file_hash(&source.bytes),
            reason: format!("the folder cannot be written: {error}"),
        })
    }

    /// Builds a chain with a candidate in place of its plugin; the active chain is unchanged.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// No such plugin is active, another one is missing, or the candidate is invalid.
    pub fn candidate_chain(
        &self,
        name: &str,
        parts: CandidateParts,
    ) -> Result<CandidateChain, AdminError> {
        if let Err(missing) = self.complete_chain() {
            return Err(AdminError::Impossible(format!(
                "without the plugin '{}', every decision would differ; GET /readyz shows how to fix it",
                missing.join("' and '")
            )));
        }
        let _code = self.compile_parts(name, &parts);
        let candidate = self.candidate(&self.begin_loading(), name, parts)?;
        let Candidate {
            plugin, settings, ..
        } = candidate;
        let (name, hash, version) = (
            plugin.name().clone(),
            plugin.hash().to_owned(),
            plugin.manifest().version.clone(),
        );
        let config_hash = short_hash(plugin.config_hash());
        let candidate = Arc::new(Generation::new(plugin, 0, settings, false, Instant::now()));
        let chain = Arc::new(self.chain().with(&candidate));
        Ok(CandidateChain {
            name,
            hash,
            config_hash,
            version,
            chain,
        })
    }

    /// Loads a candidate, with the file or the settings of the active plugin where it has none.
    pub(super) fn candidate(
        &self,
        _loading: &MutexGuard<'_, ()>,
        name: &str,
        parts: CandidateParts,
    ) -> Result<Candidate, AdminError> {
        let chain = self.chain();
        let active = chain
            .generations()
            .find(|generation| generation.plugin.name().as_str() == name);
        let active = active.ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
        let section = parts.config.map(|text| {
            if text.len() > MAX_BYTES {
                return Err(format!(
                    "the configuration has {} bytes; the limit is {MAX_BYTES}",
                    text.len()
                ));
            }
            Section::parse(name, &text)
        });
        let section = section.transpose().map_err(AdminError::InvalidConfig)?;
        let settings = section
            .as_ref()
            .map_or(&active.settings, |section| &section.settings);
        // A pinned hash restricts the active file, not a candidate for comparison.
        let settings = Settings {
            sha256: None,
            ..settings.clone()
        };
        let bytes = match parts.file {
            Some(bytes) => bytes,
            None => self.active_file(name, active)?,
        };
        let candidate = self.load_bytes(name, &bytes, &settings)?;
        if PluginKind::of(&candidate) != PluginKind::of(&active.plugin) {
            let reason = "is of a different kind (filter, router or both) than the active plugin, so there is nothing to compare; upload it instead";
            return Err(AdminError::InvalidFile(reason.to_owned()));
        }
        Ok(Candidate {
            plugin: candidate,
            settings,
            source: CandidateSource {
                bytes,
                section: section.map(|section| section.text),
            },
        })
    }

    /// The bytes of the active version.
    pub(super) fn active_file(&self, name: &str, active: &Generation) -> Result<Bytes, AdminError> {
        let path = {
            let slots = self.slots();
            let slot = slots.by_name.get(name);
            slot.and_then(|slot| slot.files.first().map(|file| file.path.clone()))
        };
        let bytes = path
            .and_then(|path| folder::read(&path, active.settings.limits().file_bytes).ok())
            .filter(|bytes| file_hash(bytes) == active.plugin.hash());
        bytes.map(Bytes::from).ok_or_else(|| {
            AdminError::Impossible(format!(
                "the folder no longer contains the active version of '{name}'; send the file as well"
            ))
        })
    }

    pub(super) fn find_shadow(&self, name: &str) -> Result<Arc<Shadow>, AdminError> {
        let shadow = Name::parse(name)
            .ok()
            .and_then(|name| self.shadows.of(&name));
        shadow.ok_or_else(|| AdminError::NoCandidate(name.to_owned()))
    }
}
