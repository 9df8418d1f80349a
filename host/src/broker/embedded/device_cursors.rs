//! Device cursors and read markers: one row per user, moved by compare-and-set, removed when they
//! expire.

use std::collections::BTreeMap;

use redb::{ReadTransaction, ReadableTable};
use serde::{Deserialize, Serialize};

use super::layout;
use super::store::Failure;
use super::writer::Work;
use crate::broker::{Bookmark, BookmarkOf, Retention};
use crate::event::Name;

/// A user's row: JSON.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Stored {
    devices: BTreeMap<Name, Kept>,
    read_mark: Option<Kept>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    bookmark: Bookmark,
    /// When it was last moved, in milliseconds since the Unix epoch.
    moved_ms: u64,
}

impl Stored {
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
        let is_kept = |which: &BookmarkOf, kept: &Kept| {
            kept.moved_ms >= now_ms.saturating_sub(retention.bookmark_age_ms(which))
        };
        self.devices
            .retain(|device, kept| is_kept(&BookmarkOf::Device(device.clone()), kept));
        self.read_mark
            .take_if(|kept| !is_kept(&BookmarkOf::ReadMark, kept));
        !self.devices.is_empty() || self.read_mark.is_some()
    }

    /// Evicts the least recently moved devices of one kind, acknowledged or not, until there is
    /// room for one more.
    fn make_room(&mut self, is_acknowledged: bool, most: u32) {
        let mut of_the_kind: Vec<(u64, Name)> = self
            .devices
            .iter()
            .filter(|(_, kept)| kept.bookmark.is_acknowledged == is_acknowledged)
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
    /// See [`crate::broker::Broker::move_bookmark`].
    pub(super) fn move_bookmark(
        &mut self,
        user: &Name,
        which: &BookmarkOf,
        seen: Option<&Bookmark>,
        to: Bookmark,
    ) -> Result<bool, Failure> {
        let mut stored = Stored::find(user, &self.tables.bookmarks)?;
        stored.retain(self.retention, self.now_ms);
        let have = match which {
            BookmarkOf::Device(device) => stored.devices.get(device),
            BookmarkOf::ReadMark => stored.read_mark.as_ref(),
        };
        if have.map(|kept| &kept.bookmark) != seen {
            return Ok(false);
        }
        let kept = Kept {
            bookmark: to,
            moved_ms: self.now_ms,
        };
        match which {
            BookmarkOf::Device(device) => {
                stored.devices.remove(device);
                stored.make_room(kept.bookmark.is_acknowledged, self.retention.devices);
                stored.devices.insert(device.clone(), kept);
            }
            BookmarkOf::ReadMark => stored.read_mark = Some(kept),
        }
        let row = serde_json::to_vec(&stored).expect("names, texts and numbers are JSON");
        self.tables
            .bookmarks
            .insert(user.as_str(), row.as_slice())?;
        Ok(true)
    }
}

pub(super) fn bookmarks(
    transaction: &ReadTransaction,
    user: &Name,
    retention: &Retention,
    now_ms: u64,
) -> Result<BTreeMap<BookmarkOf, Bookmark>, Failure> {
    let mut stored = Stored::find(user, &transaction.open_table(layout::BOOKMARKS)?)?;
    stored.retain(retention, now_ms);
    let devices = stored
        .devices
        .into_iter()
        .map(|(device, kept)| (BookmarkOf::Device(device), kept.bookmark));
    Ok(devices
        .chain(
            stored
                .read_mark
                .map(|kept| (BookmarkOf::ReadMark, kept.bookmark)),
        )
        .collect())
}
