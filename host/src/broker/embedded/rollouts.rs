//! Roll-outs of plugins, in a table, and the reports of the one node, in memory.

use std::collections::BTreeMap;

use redb::{ReadTransaction, ReadableTable as _};

use super::layout;
use super::store::Failure;
use super::work::Work;
use crate::broker::Rollout;
use crate::event::Name;

pub(super) fn rollouts(
    transaction: &ReadTransaction,
) -> Result<BTreeMap<String, Rollout>, Failure> {
    let table = transaction.open_table(layout::ROLLOUTS)?;
    let mut found = BTreeMap::new();
    for row in table.iter()? {
        let (plugin, rollout) = row?;
        // A row of another version is left out, as on Redis.
        if let Ok(rollout) = serde_json::from_slice(rollout.value()) {
            found.insert(plugin.value().to_owned(), rollout);
        }
    }
    Ok(found)
}

impl Work<'_> {
    /// See [`crate::broker::Rollouts::set_rollout`].
    pub(super) fn set_rollout(
        &mut self,
        plugin: &Name,
        rollout: Option<&Rollout>,
    ) -> Result<(), Failure> {
        match rollout {
            Some(rollout) => {
                let row = serde_json::to_vec(rollout).expect("texts and numbers are JSON");
                self.tables
                    .rollouts
                    .insert(plugin.as_str(), row.as_slice())?;
            }
            None => {
                self.tables.rollouts.remove(plugin.as_str())?;
            }
        }
        Ok(())
    }
}
