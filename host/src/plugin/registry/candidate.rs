//! Candidates for plugins at work: checked as any file is, and put beside their plugin, or in its place in a chain that nobody works by.
//!
//! It promises that a candidate passed every check of a load under its plugin's own limits and configuration, and that it is of its plugin's kind.
//! What a candidate beside a plugin does is `plugin::shadow`'s business; what one does with past events, `rehearsal`'s.

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use bytes::Bytes;

use super::{OrderError, Registry};
use crate::event::Name;
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::registry::settings::Settings;
use crate::plugin::registry::state::PluginState;
use crate::plugin::shadow::{self, Shadows};
use crate::plugin::{Plugin, Role};

/// A candidate in its plugin's place.
#[derive(Clone, Debug)]
pub struct Understudy {
    pub name: Name,
    /// SHA-256 of its file, in hexadecimal.
    pub hash: String,
    /// What it says its version is.
    pub version: String,
    /// The plugins at work now, with the candidate in place of its plugin.
    pub chain: Arc<Chain>,
}

impl Registry {
    /// The candidates beside plugins.
    pub(crate) fn shadows(&self) -> &Shadows {
        &self.shadows
    }

    /// Puts a candidate beside a plugin at work, in place of another: it is asked about the same events, and nothing comes of what it answers.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// No such plugin is at work, the candidate is no good, or there are too many.
    pub fn begin_shadow(&self, name: &str, bytes: Bytes) -> Result<shadow::Report, OrderError> {
        // Until it is beside its plugin, or the plugin could be taken out before it, and leave it behind.
        let loading = self.begin_loading();
        let (candidate, _) = self.candidate(&loading, name, &bytes)?;
        tracing::info!(
            plugin.name = name,
            plugin.candidate_hash = candidate.hash(),
            "a candidate begins beside the plugin"
        );
        self.shadows
            .begin(&self.engine, candidate, bytes, self.metrics.clone())
            .map_err(OrderError::Impossible)
    }

    /// How the candidate beside a plugin fares.
    ///
    /// # Errors
    /// There is none.
    pub fn shadow(&self, name: &str) -> Result<shadow::Report, OrderError> {
        Ok(self.find_shadow(name)?.report())
    }

    /// Ends the candidate beside a plugin.
    ///
    /// # Errors
    /// There is none.
    pub fn end_shadow(&self, name: &str) -> Result<(), OrderError> {
        let shadow = self.find_shadow(name)?;
        self.shadows.end(&shadow);
        Ok(())
    }

    /// Has the candidate beside a plugin take its place, for good: its file becomes the plugin's. It is then no candidate any more.
    ///
    /// # Errors
    /// There is none, or as [`Registry::upload`]; it is a candidate still.
    pub fn promote(&self, name: &str) -> Result<PluginState, OrderError> {
        let shadow = self.find_shadow(name)?;
        let state = self.upload(name, &shadow.bytes())?;
        self.shadows.end(&shadow);
        Ok(state)
    }

    /// The chain at work with a candidate in its plugin's place; the one at work stays what it is.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// No such plugin is at work, or the candidate is no good.
    pub fn understudy(&self, name: &str, bytes: &[u8]) -> Result<Understudy, OrderError> {
        let (plugin, settings) = self.candidate(&self.begin_loading(), name, bytes)?;
        let (name, hash, version) = (
            plugin.name().clone(),
            plugin.hash().to_owned(),
            plugin.manifest().version.clone(),
        );
        let candidate = Arc::new(Generation::new(plugin, 0, settings, false, Instant::now()));
        let chain = Arc::new(self.chain().with(&candidate));
        Ok(Understudy {
            name,
            hash,
            version,
            chain,
        })
    }

    /// Loads a candidate as the plugin of this name would be loaded.
    fn candidate(
        &self,
        _loading: &MutexGuard<'_, ()>,
        name: &str,
        bytes: &[u8],
    ) -> Result<(Plugin, Settings), OrderError> {
        let chain = self.chain();
        let at_work = chain
            .generations()
            .find(|generation| generation.plugin.name().as_str() == name);
        let at_work = at_work.ok_or_else(|| OrderError::Unknown(name.to_owned()))?;
        // The file that may be at work is pinned, and not what is compared with it.
        let settings = Settings {
            sha256: None,
            ..at_work.settings.clone()
        };
        let candidate = self
            .load_bytes(name, bytes, &settings)
            .map_err(|failure| OrderError::Refused(failure.reason))?;
        let kind = |plugin: &Plugin| [Role::Filter, Role::Router].map(|role| plugin.has_role(role));
        if kind(&candidate) != kind(&at_work.plugin) {
            let reason = "is of another kind (filter, router or both) than the plugin at work, so there is nothing to compare; upload it";
            return Err(OrderError::Refused(reason.to_owned()));
        }
        Ok((candidate, settings))
    }

    pub(super) fn find_shadow(&self, name: &str) -> Result<Arc<shadow::Shadow>, OrderError> {
        let shadow = Name::parse(name)
            .ok()
            .and_then(|name| self.shadows.of(&name));
        shadow.ok_or_else(|| OrderError::NoCandidate(name.to_owned()))
    }
}
