//! Reloads the configuration file while the node runs. Settings of plugins take effect at once;
//! readiness names every other changed key, which takes effect at the next start.
//!
//! An invalid file changes nothing, and a plugin that fails with its new settings keeps the old
//! ones (`plugin::registry` ensures that). The file is polled instead of watched: a look costs next
//! to nothing and also detects an orchestrator that swaps a link to the folder.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use toml::Table;

use super::{Config, DEFAULT_FILE, Error, Layers, RawConfig};
use crate::plugin::registry::Registry;
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

/// The interval between two looks. A changed file is read once two looks saw it unchanged, because
/// an editor may still be writing.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The sources of a configuration, from which it can be loaded again.
#[derive(Clone, Debug, Default)]
pub struct ConfigSource {
    /// `None`: [`DEFAULT_FILE`], if it exists.
    pub file: Option<PathBuf>,
    pub environment: Vec<(String, String)>,
    pub options: Vec<(&'static str, String)>,
}

impl ConfigSource {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// As [`Layers`] and [`Config::new`].
    pub fn load(&self) -> Result<Config, Error> {
        // Before reading: a change in between is then detected by the next look.
        let stamp = stamp(self.path());
        let layers = self.layers()?;
        let origin = ConfigOrigin {
            source: self.clone(),
            stamp,
            raw: layers.raw()?,
        };
        Ok(Config {
            origin: Some(origin),
            ..Config::new(&layers)?
        })
    }

    fn layers(&self) -> Result<Layers, Error> {
        Layers::file(self.file.as_deref())?
            .environment(self.environment.clone())?
            .options(self.options.clone())
    }

    fn path(&self) -> &Path {
        self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE))
    }
}

/// The sources of the running configuration and their state when it was loaded.
#[derive(Clone, Debug)]
pub struct ConfigOrigin {
    source: ConfigSource,
    stamp: FileStamp,
    raw: RawConfig,
}

/// The metadata that changes when a file is written or replaced. `None`: it does not exist.
pub(super) type FileStamp = Option<(u64, u64, i64, i64, i64, i64)>;

pub(super) fn stamp(path: &Path) -> FileStamp {
    let file = fs::metadata(path).ok()?;
    Some((
        file.ino(),
        file.len(),
        file.mtime(),
        file.mtime_nsec(),
        file.ctime(),
        file.ctime_nsec(),
    ))
}

/// Applies changes of the file until the node shuts down.
pub(crate) async fn follow(
    origin: ConfigOrigin,
    registry: Arc<Registry>,
    readiness: Readiness,
    shutdown: Shutdown,
) {
    let ConfigOrigin {
        source,
        stamp: mut applied,
        raw,
    } = origin;
    registry.set_config_file(source.path());
    let mut before = applied;
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = shutdown.begun() => return,
        }
        let now = stamp(source.path());
        if now != applied && now == before {
            if now.is_none() {
                // An accident, or the moment between two files. Falling back to the defaults would
                // leave events unrouted for good.
                let text = format!(
                    "{} was removed; its last content stays active",
                    source.path().display()
                );
                readiness.warn("configuration", text);
                before = now;
                continue;
            }
            applied = now;
            apply(&source, &raw, &registry, &readiness).await;
        }
        before = now;
    }
}

async fn apply(
    source: &ConfigSource,
    active: &RawConfig,
    registry: &Arc<Registry>,
    readiness: &Readiness,
) {
    // Checked as a whole, as at the start: a partly invalid file must not take effect in part.
    let source = source.clone();
    // On the blocking pool: a file of a network may take for ever.
    let load = tokio::task::spawn_blocking(move || {
        let config = source.load()?;
        Ok((config, source.layers()?.raw()?))
    });
    let loaded = load.await.unwrap_or_else(|panic| {
        let text = format!("reading it failed: {panic}");
        Err(Error::new("configuration", text))
    });
    let (config, raw) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            tracing::error!("the changed configuration is invalid and was not applied: {error}");
            return readiness.warn(
                "configuration",
                format!("{error}; the previous configuration stays active"),
            );
        }
    };
    let registry = Arc::clone(registry);
    if let Err(panic) =
        tokio::task::spawn_blocking(move || registry.configure(config.plugins)).await
    {
        tracing::error!(%panic, "applying the settings of plugins failed");
    }
    match needing_restart(active, &raw).as_slice() {
        [] => {
            tracing::info!("configuration reloaded");
            readiness.clear("configuration");
        }
        keys => {
            let text = format!("{} changed; restart the node to apply", keys.join(", "));
            tracing::warn!("settings of plugins reloaded; {text}");
            readiness.warn("configuration", text);
        }
    }
}

/// The changed keys that take effect only at a start, with their sections.
fn needing_restart(active: &RawConfig, raw: &RawConfig) -> Vec<String> {
    let table = |raw: &RawConfig| {
        let mut table = Table::try_from(raw).unwrap_or_default();
        if let Some(plugins) = table
            .get_mut("plugins")
            .and_then(|plugins| plugins.as_table_mut())
        {
            plugins.retain(|key, _| ["dir", "cache"].contains(&key));
        }
        table
    };
    let (before, after) = (table(active), table(raw));
    let mut keys = Vec::new();
    for (section, after) in &after {
        if !after.is_table() {
            if before.get(section) != Some(after) {
                keys.push(section.clone());
            }
            continue;
        }
        let empty = Table::new();
        let (before, after) = (
            before
                .get(section)
                .and_then(|b| b.as_table())
                .unwrap_or(&empty),
            after.as_table().unwrap_or(&empty),
        );
        let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
        keys.extend(
            names
                .into_iter()
                .filter(|key| before.get(*key) != after.get(*key))
                .map(|key| format!("{section}.{key}")),
        );
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_keys_that_need_a_restart_are_named() {
        let raw = |text: &str| toml::from_str::<RawConfig>(text).unwrap();
        let before = raw("[plugins]\ndir = 'a'\norder = ['x']\n[log]\nfilter = 'info'\n");
        let after = raw(
            "[plugins]\ndir = 'a'\norder = ['y']\n[plugins.x]\nenabled = false\n[log]\nfilter = 'info'\n",
        );
        assert_eq!(needing_restart(&before, &after), Vec::<String>::new());
        let after = raw(
            "[plugins]\ndir = 'b'\ncache = false\n[stream]\nheartbeat_interval = '5s'\n[broker]\nredis = 'redis://a'\n",
        );
        assert_eq!(
            needing_restart(&before, &after),
            [
                "broker.redis",
                "plugins.cache",
                "plugins.dir",
                "stream.heartbeat_interval"
            ]
        );
    }
}
