//! Device cursors and read markers: one row per user, moved by compare-and-set, removed when they
//! expire.

use std::collections::BTreeMap;

use redb::{ReadTransaction, ReadableTable};
use serde::{Deserialize, Serialize};

use super::layout;
use super::store::Failure;
use super::work::Work;
use crate::broker::{CursorOwner, Retention, StoredCursor};
use crate::event::Name;

/// A user's row: JSON.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct DeviceCursorsRow {
    devices: BTreeMap<Name, TimedCursor>,
    read_mark: Option<TimedCursor>,
}

/// A cursor with the time of its last move.
#[derive(Serialize, Deserialize)]
struct TimedCursor {
    #[serde(flatten)]
    cursor: StoredCursor,
    /// When it was last moved, in milliseconds since the Unix epoch.
    moved_ms: u64,
}

impl DeviceCursorsRow {
    fn find(
        user: &Name,
        table: &impl ReadableTable<&'static str, &'static [u8]>,
    ) -> Result<Self, Failure> {
        let Some(row) = table.get(user.as_str())? else {
            return Ok(Self::default());
        };
        Self::read(row.value()).map_err(|error| {
            Failure::unreadable(
                &format!("the row of the device cursors of user '{user}'"),
                &error,
            )
        })
    }

    pub(super) fn read(row: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(row)
    }

    /// Removes expired cursors. Returns `false` if nothing remains.
    pub(super) fn retain(&mut self, retention: &Retention, now_ms: u64) -> bool {
        let is_kept = |which: &CursorOwner, kept: &TimedCursor| {
            kept.moved_ms >= now_ms.saturating_sub(retention.cursor_ttl_ms(which))
        };
        self.devices
            .retain(|device, kept| is_kept(&CursorOwner::Device(device.clone()), kept));
        self.read_mark
            .take_if(|kept| !is_kept(&CursorOwner::ReadMarker, kept));
        !self.devices.is_empty() || self.read_mark.is_some()
    }

    /// Evicts the least recently moved devices of one kind, acknowledged or not, until there is
    /// room for one more.
    fn make_room(&mut self, is_acknowledged: bool, most: u32) {
        let mut of_the_kind: Vec<(u64, Name)> = self
            .devices
            .iter()
            .filter(|(_, kept)| kept.cursor.is_acknowledged == is_acknowledged)
            .map(|(device, kept)| (kept.moved_ms, device.clone()))
            .collect();
        of_the_kind.sort_unstable();
        let n_surplus = (of_the_kind.len() + 1).saturating_sub(most.max(1) as usize);
        for (_, device) in of_the_kind.drain(..n_surplus) {
            self.devices.remove(&device);
        }
    }
}

impl Work<'_> {
    /// See [`crate::broker::Users::move_device_cursor`].
    pub(super) fn move_device_cursor(
        &mut self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: StoredCursor,
    ) -> Result<bool, Failure> {
        let mut stored = DeviceCursorsRow::find(user, &self.tables.device_cursors)?;
        stored.retain(self.retention, self.now_ms);
        let have = match which {
            CursorOwner::Device(device) => stored.devices.get(device),
            CursorOwner::ReadMarker => stored.read_mark.as_ref(),
        };
        if have.map(|kept| &kept.cursor) != seen {
            return Ok(false);
        }
        let kept = TimedCursor {
            cursor: to,
            moved_ms: self.now_ms,
        };
        match which {
            CursorOwner::Device(device) => {
                stored.devices.remove(device);
                stored.make_room(
                    kept.cursor.is_acknowledged,
                    self.retention.max_devices_per_user,
                );
                stored.devices.insert(device.clone(), kept);
            }
            CursorOwner::ReadMarker => stored.read_mark = Some(kept),
        }
        let row = serde_json::to_vec(&stored).expect("names, texts and numbers are JSON");
        self.tables
            .device_cursors
            .insert(user.as_str(), row.as_slice())?;
        Ok(true)
    }
}

pub(super) fn device_cursors(
    transaction: &ReadTransaction,
    user: &Name,
    retention: &Retention,
    now_ms: u64,
) -> Result<BTreeMap<CursorOwner, StoredCursor>, Failure> {
    let mut stored =
        DeviceCursorsRow::find(user, &transaction.open_table(layout::DEVICE_CURSORS)?)?;
    stored.retain(retention, now_ms);
    let devices = stored
        .devices
        .into_iter()
        .map(|(device, kept)| (CursorOwner::Device(device), kept.cursor));
    Ok(devices
        .chain(
            stored
                .read_mark
                .map(|kept| (CursorOwner::ReadMarker, kept.cursor)),
        )
        .collect())
}
