//! Reads logs and records. `commit` writes them.

use std::ops::Bound;

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable};

use super::layout::{self, Meta};
use super::store::Failure;
use crate::broker::Page;
use crate::event::{NotificationId, Target};

/// Reads up to `limit` ids of each log above its id, with the floor of the same snapshot: an entry
/// missing from a page is below that floor.
pub(super) fn pages(
    transaction: &ReadTransaction,
    partition: u8,
    logs: &[(Target, NotificationId)],
    limit: usize,
    now_ms: u64,
) -> Result<Vec<Page>, Failure> {
    let index = transaction.open_table(layout::INDEX)?;
    let lengths = transaction.open_table(layout::LOGS)?;
    let floor = Meta::read(partition, transaction)?.floor(now_ms);
    let read = |(target, after): &(Target, NotificationId)| {
        let log = target.to_string();
        let (entries, is_last) = entries(&index, partition, &log, *after, limit)?;
        let is_present = !entries.is_empty() || lengths.get((partition, log.as_str()))?.is_some();
        Ok(Page {
            entries,
            is_present,
            is_last,
            floor,
        })
    };
    logs.iter().map(read).collect()
}

/// The ids of a log above `after` with their predecessors, and whether no further ones follow.
fn entries(
    index: &impl ReadableTable<(u8, &'static str, u64), u64>,
    partition: u8,
    log: &str,
    after: NotificationId,
    limit: usize,
) -> Result<(Vec<(NotificationId, NotificationId)>, bool), Failure> {
    let mut rows = index.range((
        Bound::Excluded((partition, log, after.0)),
        Bound::Included((partition, log, u64::MAX)),
    ))?;
    let mut entries = Vec::new();
    let mut is_last = true;
    for row in &mut rows {
        if entries.len() == limit {
            is_last = false;
            break;
        }
        let (key, pred) = row?;
        entries.push((NotificationId(key.value().2), NotificationId(pred.value())));
    }
    Ok((entries, is_last))
}

/// Reads the records of these ids; `None` for a record that no longer exists.
pub(super) fn records(
    transaction: &ReadTransaction,
    partition: u8,
    ids: &[NotificationId],
) -> Result<Vec<Option<Bytes>>, Failure> {
    let table = transaction.open_table(layout::RECORDS)?;
    let find = |id: &NotificationId| {
        Ok(table
            .get((partition, id.0))?
            .map(|record| Bytes::copy_from_slice(record.value())))
    };
    ids.iter().map(find).collect()
}
