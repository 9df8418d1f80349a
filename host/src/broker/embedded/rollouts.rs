//! Roll-outs of plugins, in a table, and the reports of the one node, in memory.

use redb::{ReadTransaction, ReadableTable as _};

use super::layout;
use super::store::Failure;
use super::work::Work;
use crate::broker::{Rollout, WantedVersions};
use crate::event::Name;

/// The row of the revision. No plugin has the empty name.
const REVISION: &str = "";

pub(super) fn rollouts(
    transaction: &ReadTransaction,
    plugins: &[Name],
) -> Result<WantedVersions, Failure> {
    let table = transaction.open_table(layout::ROLLOUTS)?;
    let mut wanted = WantedVersions {
        revision: table.get(REVISION)?.map_or(0, |row| number(row.value())),
        ..WantedVersions::default()
    };
    for plugin in plugins {
        let Some(row) = table.get(plugin.as_str())? else {
            continue;
        };
        match serde_json::from_slice(row.value()) {
            Ok(rollout) => {
                wanted.rollouts.insert(plugin.to_string(), rollout);
            }
            // A row of another version.
            Err(_) => wanted.foreign.push(plugin.to_string()),
        }
    }
    Ok(wanted)
}

impl Work<'_> {
    /// See [`crate::broker::Rollouts::set_rollout`].
    pub(super) fn set_rollout(
        &mut self,
        plugin: &Name,
        rollout: Option<&Rollout>,
        now_ms: u64,
    ) -> Result<u64, Failure> {
        let table = &mut self.tables.rollouts;
        let before = table.get(REVISION)?.map_or(0, |row| number(row.value()));
        let revision = now_ms.max(before + 1);
        match rollout {
            Some(rollout) => {
                let row = serde_json::to_vec(rollout).expect("texts and numbers are JSON");
                table.insert(plugin.as_str(), row.as_slice())?;
            }
            None => {
                table.remove(plugin.as_str())?;
            }
        }
        table.insert(REVISION, &revision.to_be_bytes()[..])?;
        Ok(revision)
    }

    /// See [`crate::broker::Rollouts::replace_rollout`].
    pub(super) fn replace_rollout(
        &mut self,
        plugin: &Name,
        before: &Rollout,
        rollout: Option<&Rollout>,
        now_ms: u64,
    ) -> Result<Option<u64>, Failure> {
        let before = serde_json::to_vec(before).expect("texts and numbers are JSON");
        let present = self.tables.rollouts.get(plugin.as_str())?;
        let is_present = present.is_some_and(|row| row.value() == before);
        if is_present {
            self.set_rollout(plugin, rollout, now_ms).map(Some)
        } else {
            Ok(None)
        }
    }
}

fn number(row: &[u8]) -> u64 {
    row.try_into().map_or(0, u64::from_be_bytes)
}
