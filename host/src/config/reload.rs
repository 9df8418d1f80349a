//! What changes in the configuration's file while the node runs: the settings of plugins take effect at once, everything else when the node
//! starts again, and readiness says so.
//!
//! It promises that a file that is no configuration changes nothing, and that a plugin that does not take its new settings goes on with the
//! old ones (that is `plugin::registry`'s doing). The file is looked at, and not listened to: one look costs nothing, and sees the file of an
//! orchestrator that swaps a link to its folder.

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

/// Between two looks. A file is read once it was the same in two of them: an editor may still be writing.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Where a configuration came from, so that it can be made again.
#[derive(Clone, Debug, Default)]
pub struct ConfigSource {
    /// `None`: [`DEFAULT_FILE`], where it is there.
    pub file: Option<PathBuf>,
    pub environment: Vec<(String, String)>,
    pub options: Vec<(&'static str, String)>,
}

impl ConfigSource {
    /// # Errors
    /// As [`Layers`] and [`Config::new`] have them.
    pub fn make(&self) -> Result<Config, Error> {
        // Looked at before it is read: what changes in between is seen as a change.
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

/// What a configuration was made from.
#[derive(Clone, Debug)]
pub struct ConfigOrigin {
    source: ConfigSource,
    stamp: FileStamp,
    raw: RawConfig,
}

/// What of a file changes when it is written or swapped. `None`: it is not there.
type FileStamp = Option<(u64, u64, i64, i64, i64, i64)>;

fn stamp(path: &Path) -> FileStamp {
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

/// Takes over what changes, until the node shuts down.
pub(crate) async fn follow(
    origin: ConfigOrigin,
    registry: Arc<Registry>,
    readiness: Readiness,
    shutdown: Shutdown,
) {
    let ConfigOrigin {
        source,
        stamp: mut taken_up,
        raw,
    } = origin;
    let mut before = taken_up;
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = shutdown.begun() => return,
        }
        let now = stamp(source.path());
        if now != taken_up && now == before {
            if now.is_none() {
                // An accident, or the moment between two files: without it, everything would be as by default, and events unrouted for good.
                let text = format!(
                    "{} is gone; what it said is in force",
                    source.path().display()
                );
                readiness.warn("configuration", text);
                before = now;
                continue;
            }
            taken_up = now;
            take_up(&source, &raw, &registry, &readiness).await;
        }
        before = now;
    }
}

async fn take_up(
    source: &ConfigSource,
    in_force: &RawConfig,
    registry: &Arc<Registry>,
    readiness: &Readiness,
) {
    // Checked as a whole, as at the start: half of a mistake must not take effect.
    let made = source
        .make()
        .and_then(|config| Ok((config, source.layers()?.raw()?)));
    let (config, raw) = match made {
        Ok(made) => made,
        Err(error) => {
            tracing::error!("the configuration was not taken over: {error}");
            return readiness.warn(
                "configuration",
                format!("{error}; what was configured before is in force"),
            );
        }
    };
    let registry = Arc::clone(registry);
    if let Err(panic) =
        tokio::task::spawn_blocking(move || registry.configure(config.plugins)).await
    {
        tracing::error!(%panic, "taking over the settings of plugins failed");
    }
    match waiting(in_force, &raw).as_slice() {
        [] => {
            tracing::info!("the configuration was taken over");
            readiness.clear("configuration");
        }
        keys => {
            let text = format!(
                "{} changed; that takes effect when the node starts again",
                keys.join(", ")
            );
            tracing::warn!("the settings of plugins were taken over; {text}");
            readiness.warn("configuration", text);
        }
    }
}

/// The keys, and with them the sections, that take effect at a start only and differ.
fn waiting(in_force: &RawConfig, raw: &RawConfig) -> Vec<String> {
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
    let (before, after) = (table(in_force), table(raw));
    let mut keys = Vec::new();
    for (section, after) in &after {
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
    fn what_takes_effect_at_a_start_only_is_named() {
        let raw = |text: &str| toml::from_str::<RawConfig>(text).unwrap();
        let before = raw("[plugins]\ndir = 'a'\norder = ['x']\n[log]\nfilter = 'info'\n");
        let after = raw(
            "[plugins]\ndir = 'a'\norder = ['y']\n[plugins.x]\nenabled = false\n[log]\nfilter = 'info'\n",
        );
        assert_eq!(waiting(&before, &after), Vec::<String>::new());
        let after = raw(
            "[plugins]\ndir = 'b'\ncache = false\n[stream]\nheartbeat_s = 5\n[broker]\nredis = 'redis://a'\n",
        );
        assert_eq!(
            waiting(&before, &after),
            [
                "broker.redis",
                "plugins.cache",
                "plugins.dir",
                "stream.heartbeat_s"
            ]
        );
    }
}
