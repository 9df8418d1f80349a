//! The action for each plugin whose files, settings or name rules changed.

use std::path::PathBuf;

use super::admission::Inadmissible;
use super::folder::{FileStamp, FolderSnapshot};
use super::settings::Settings;
use super::slot::Failure;
use super::{Registry, admission};
use crate::plugin::runtime::engine::MAX_PLUGINS;

/// The action for one plugin whose files changed.
pub(super) enum Job {
    /// Its files are gone.
    Remove,
    /// It is disabled.
    Rest,
    Load(Wanted),
    Refuse(Failure),
    Ignore(Inadmissible),
}

/// A file to load.
pub(super) struct Wanted {
    pub(super) path: PathBuf,
    pub(super) settings: Settings,
    /// Hash of the active file, if its settings are unchanged.
    pub(super) running: Option<String>,
    /// Hash of the file that was rolled back with the same settings.
    pub(super) rolled_back: Option<String>,
}

impl Registry {
    /// Determines the action for each of these files.
    pub(super) fn jobs(&self, snapshot: FolderSnapshot) -> Vec<(String, Vec<FileStamp>, Job)> {
        let slots = self.slots();
        let mut n_running = slots.n_running();
        let job = |(name, files): (String, Vec<FileStamp>)| {
            let settings = slots.config.settings(&name);
            let slot = slots.by_name.get(&name);
            let is_running = slot.is_some_and(|slot| slot.running.is_some());
            // The rules for names do not deactivate a plugin, only the configuration does.
            let ignored = admission::admit(&name, &slots.config).err();
            let ignored = ignored.filter(|why| !is_running || *why == Inadmissible::NotConfigured);
            let job = match (files.first(), ignored) {
                (None, _) => Job::Remove,
                (Some(_), Some(why)) => Job::Ignore(why),
                (Some(_), None) if !slots.is_enabled(&name) => Job::Rest,
                (Some(_), None)
                    if slot.is_none_or(|slot| slot.running.is_none())
                        && n_running >= MAX_PLUGINS =>
                {
                    let reason = format!(
                        "exceeds the limit of {MAX_PLUGINS} plugins per node; remove one and write this file again"
                    );
                    Job::Refuse(Failure::of_file(reason, None))
                }
                (Some(first), None) => {
                    n_running += usize::from(slot.is_none_or(|slot| slot.running.is_none()));
                    // Refused only while the earlier generation is active: a rolled-back version is
                    // better than none.
                    let active = slot.filter(|slot| slot.running.is_some());
                    let rolled_back = active
                        .and_then(|slot| slot.rolled_back.as_ref())
                        .filter(|(_, then)| *then == settings);
                    Job::Load(Wanted {
                        path: first.path.clone(),
                        running: slots.running_as(&name, &settings),
                        rolled_back: rolled_back.map(|(hash, _)| hash.clone()),
                        settings,
                    })
                }
            };
            (name, files, job)
        };
        snapshot.into_iter().map(job).collect()
    }
}
