//! Reads logs and records. `commit` writes them.

use std::ops::Bound;

use bytes::Bytes;
use redb::ReadTransaction;

use super::layout::{self, Meta};
use super::store::Failure;
use crate::broker::Page;
use crate::event::NotificationId;

/// Reads up to `limit` ids of a log above `after`, with the floor of the same snapshot: an entry
/// missing from the page is below that floor.
pub(super) fn page(
    transaction: &ReadTransaction,
    partition: u8,
    log: &str,
    after: NotificationId,
    limit: usize,
    now_ms: u64,
) -> Result<Page, Failure> {
    let index = transaction.open_table(layout::INDEX)?;
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
    let is_present = !entries.is_empty()
        || transaction
            .open_table(layout::LOGS)?
            .get((partition, log))?
            .is_some();
    let floor = Meta::read(partition, transaction)?.floor(now_ms);
    Ok(Page {
        entries,
        is_present,
        is_last,
        floor,
    })
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
