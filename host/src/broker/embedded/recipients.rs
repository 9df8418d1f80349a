//! Attributes and memberships of users: reads and changes them.

use std::collections::BTreeMap;

use redb::{ReadTransaction, ReadableTable};
use serde::{Deserialize, Serialize};

use super::layout::{self, Meta};
use super::store::Failure;
use super::work::Work;
use crate::broker::{Error, GroupLimit, Notice, Partition, RecipientChange};
use crate::event::criteria::Attributes;
use crate::event::{Name, NotificationId, PartitionNumber, Recipient, Span};

/// A user's row: JSON.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct RecipientRow {
    attributes: Attributes,
    groups: BTreeMap<Name, BTreeMap<PartitionNumber, Span>>,
}

impl RecipientRow {
    fn find(
        user: &Name,
        table: &impl ReadableTable<&'static str, &'static [u8]>,
    ) -> Result<Option<Self>, Failure> {
        let Some(row) = table.get(user.as_str())? else {
            return Ok(None);
        };
        match Self::read(row.value()) {
            Ok(stored) => Ok(Some(stored)),
            Err(error) => Err(Failure::unreadable(
                &format!("the row of user '{user}'"),
                &error,
            )),
        }
    }

    pub(super) fn read(row: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(row)
    }

    /// Refuses a membership beyond `most`, or one of an unknown group if as many have ended.
    fn require_room(&self, is_known: bool, most: u32) -> Result<(), Error> {
        let n_joined = self
            .groups
            .values()
            .filter(|spans| is_member(spans))
            .count();
        let n_left = self.groups.len() - n_joined;
        let limit = if n_joined >= most as usize {
            GroupLimit::Joined
        } else if !is_known && n_left >= most as usize {
            GroupLimit::Left
        } else {
            return Ok(());
        };
        Err(Error::TooManyGroups { limit, most })
    }

    /// Removes memberships that ended so long ago that none of their notifications can be replayed.
    /// Returns `false` if nothing remains.
    pub(super) fn retain(&mut self, floors: &BTreeMap<PartitionNumber, NotificationId>) -> bool {
        let is_of_use = |(number, span): (&PartitionNumber, &Span)| {
            span.left
                .is_none_or(|left| floors.get(number).is_some_and(|&floor| left >= floor))
        };
        self.groups.retain(|_, spans| spans.iter().any(is_of_use));
        !self.attributes.is_empty() || !self.groups.is_empty()
    }
}

fn is_member(spans: &BTreeMap<PartitionNumber, Span>) -> bool {
    spans.values().any(|span| span.left.is_none())
}

impl Work<'_> {
    /// See [`crate::broker::Users::change_recipient`]. Joining or leaving a second time changes
    /// nothing.
    pub(super) fn change_recipient(
        &mut self,
        user: &Name,
        change: &RecipientChange,
    ) -> Result<(), Failure> {
        let mut stored = RecipientRow::find(user, &self.tables.users)?.unwrap_or_default();
        let tops = || {
            self.partitions
                .iter()
                .zip(&self.metas)
                .map(|(partition, meta)| (partition.number, meta.top()))
        };
        match change {
            RecipientChange::Join { group } => {
                if !stored.groups.get(group).is_some_and(is_member) {
                    // First, so that memberships of long ago do not count.
                    stored.retain(&self.floors());
                    let is_known = stored.groups.contains_key(group);
                    stored.require_room(is_known, self.retention.max_groups_per_user)?;
                    let spans = tops()
                        .map(|(number, top)| {
                            (
                                number,
                                Span {
                                    joined: top,
                                    left: None,
                                },
                            )
                        })
                        .collect();
                    stored.groups.insert(group.clone(), spans);
                }
            }
            RecipientChange::Leave { group } => {
                if let Some(spans) = stored.groups.get_mut(group) {
                    complete(spans, self.partitions, &self.metas);
                    // A span of a partition that was removed from the configuration would stay
                    // open, and joining again would find the user still a member.
                    spans.retain(|number, _| {
                        self.partitions
                            .iter()
                            .any(|partition| partition.number == *number)
                    });
                    for (number, top) in tops() {
                        if let Some(span) = spans.get_mut(&number) {
                            span.left.get_or_insert(top);
                        }
                    }
                }
            }
            RecipientChange::Attributes(attributes) => stored.attributes = attributes.clone(),
        }
        // Otherwise a row would grow forever.
        if stored.retain(&self.floors()) {
            let row = serde_json::to_vec(&stored).expect("names, numbers and attributes are JSON");
            self.tables.users.insert(user.as_str(), row.as_slice())?;
        } else {
            self.tables.users.remove(user.as_str())?;
        }
        let changed = self
            .partitions
            .iter()
            .map(|partition| Notice::RecipientChanged {
                partition: partition.number,
                user: user.clone(),
            });
        self.notices.extend(changed);
        Ok(())
    }

    pub(super) fn floors(&self) -> BTreeMap<PartitionNumber, NotificationId> {
        self.partitions
            .iter()
            .zip(&self.metas)
            .map(|(partition, meta)| (partition.number, meta.floor(self.now_ms)))
            .collect()
    }
}

/// Adds spans for partitions that were added after a member joined: membership there starts at the
/// partition's origin.
fn complete(spans: &mut BTreeMap<PartitionNumber, Span>, partitions: &[Partition], metas: &[Meta]) {
    if is_member(spans) {
        for (partition, meta) in partitions.iter().zip(metas) {
            spans.entry(partition.number).or_insert(Span {
                joined: meta.origin(),
                left: None,
            });
        }
    }
}

pub(super) fn recipient(
    transaction: &ReadTransaction,
    user: &Name,
    partitions: &[Partition],
    metas: &[Meta],
) -> Result<Recipient, Failure> {
    let table = transaction.open_table(layout::USERS)?;
    let RecipientRow {
        attributes,
        mut groups,
    } = RecipientRow::find(user, &table)?.unwrap_or_default();
    for spans in groups.values_mut() {
        complete(spans, partitions, metas);
    }
    Ok(Recipient { attributes, groups })
}
