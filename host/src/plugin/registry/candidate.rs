//! Candidates for active plugins: loaded like any file, then run in a plugin's shadow or in its
//! place in a separate chain that decides nothing.
//!
//! A candidate has passed every check of a load with its plugin's own limits and configuration, and
//! has the same roles as its plugin. Shadowing is in `plugin::shadow`; backtesting on past events
//! is in `preview::backtest`.

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use bytes::Bytes;

use super::{AdminError, Registry};
use crate::event::Name;
use crate::plugin::Plugin;
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::registry::settings::Settings;
use crate::plugin::registry::state::{PluginKind, PluginState};
use crate::plugin::shadow::{Shadow, ShadowReport, Shadows};

/// A candidate in place of its plugin.
#[derive(Clone, Debug)]
pub struct CandidateChain {
    pub name: Name,
    /// SHA-256 of its file, in hexadecimal.
    pub hash: String,
    /// The version in its manifest.
    pub version: String,
    /// The active chain, with the candidate in place of its plugin.
    pub chain: Arc<Chain>,
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
    pub fn begin_shadow(&self, name: &str, bytes: Bytes) -> Result<ShadowReport, AdminError> {
        // Held until the candidate is registered: otherwise its plugin could be removed first and
        // leave the candidate behind.
        let loading = self.begin_loading();
        let (candidate, _) = self.candidate(&loading, name, &bytes)?;
        tracing::info!(
            plugin.name = name,
            plugin.candidate_hash = candidate.hash(),
            "shadow candidate started"
        );
        self.shadows
            .begin(&self.engine, candidate, bytes, self.metrics.clone())
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

    /// Replaces a plugin by its candidate: the candidate's file becomes the plugin's file, and the
    /// shadow ends.
    ///
    /// # Errors
    /// The plugin has no candidate, or as for [`Registry::upload`]; the candidate then stays in
    /// place.
    pub fn promote(&self, name: &str) -> Result<PluginState, AdminError> {
        let shadow = self.find_shadow(name)?;
        let state = self.upload(name, &shadow.bytes(), false)?;
        // Ended only after the upload succeeded: a failed promotion keeps the candidate.
        self.shadows.end(&shadow);
        Ok(state)
    }

    /// Builds a chain with a candidate in place of its plugin; the active chain is unchanged.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// No such plugin is active, another one is missing, or the candidate is invalid.
    pub fn candidate_chain(&self, name: &str, bytes: &[u8]) -> Result<CandidateChain, AdminError> {
        if let Err(missing) = self.complete_chain() {
            return Err(AdminError::Impossible(format!(
                "without the plugin '{}', every decision would differ; GET /readyz shows how to fix it",
                missing.join("' and '")
            )));
        }
        let (plugin, settings) = self.candidate(&self.begin_loading(), name, bytes)?;
        let (name, hash, version) = (
            plugin.name().clone(),
            plugin.hash().to_owned(),
            plugin.manifest().version.clone(),
        );
        let candidate = Arc::new(Generation::new(plugin, 0, settings, false, Instant::now()));
        let chain = Arc::new(self.chain().with(&candidate));
        Ok(CandidateChain {
            name,
            hash,
            version,
            chain,
        })
    }

    /// Loads a candidate with the limits and configuration of the active plugin.
    fn candidate(
        &self,
        _loading: &MutexGuard<'_, ()>,
        name: &str,
        bytes: &[u8],
    ) -> Result<(Plugin, Settings), AdminError> {
        let chain = self.chain();
        let active = chain
            .generations()
            .find(|generation| generation.plugin.name().as_str() == name);
        let active = active.ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
        // A pinned hash restricts the active file, not a candidate for comparison.
        let settings = Settings {
            sha256: None,
            ..active.settings.clone()
        };
        let candidate = self
            .load_bytes(name, bytes, &settings)
            .map_err(|failure| AdminError::InvalidFile(failure.reason))?;
        if PluginKind::of(&candidate) != PluginKind::of(&active.plugin) {
            let reason = "is of a different kind (filter, router or both) than the active plugin, so there is nothing to compare; upload it instead";
            return Err(AdminError::InvalidFile(reason.to_owned()));
        }
        Ok((candidate, settings))
    }

    pub(super) fn find_shadow(&self, name: &str) -> Result<Arc<Shadow>, AdminError> {
        let shadow = Name::parse(name)
            .ok()
            .and_then(|name| self.shadows.of(&name));
        shadow.ok_or_else(|| AdminError::NoCandidate(name.to_owned()))
    }
}
