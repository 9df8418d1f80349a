//! The work of one group: the open tables and the state that its requests change, in one durable
//! transaction.
//!
//! `commit`, `source`, `recipients`, `device_cursors` and `sweep` implement what is done with it;
//! `writer` decides which requests form a group.

use super::SharedState;
use super::layout::{Meta, Tables};
use super::store::Failure;
use crate::broker::{Notice, Partition, Retention};

/// The current group: the open tables, and the state that takes effect once the group is durable.
pub(super) struct Work<'t> {
    pub(super) tables: Tables<'t>,
    /// In the order of `partitions`.
    pub(super) metas: Vec<Meta>,
    pub(super) partitions: &'t [Partition],
    pub(super) retention: &'t Retention,
    pub(super) now_ms: u64,
    /// Why no new entries are accepted, if they are not.
    pub(super) shortage: Option<String>,
    /// Published in this order once the group is durable.
    pub(super) notices: Vec<Notice>,
}

impl Work<'_> {
    pub(super) fn number(&self, slot: usize) -> u8 {
        self.partitions[slot].number.0
    }
}

/// Runs `act` in one durable transaction and returns the resulting state and notices.
pub(super) fn transact(
    shared: &SharedState,
    metas: Vec<Meta>,
    act: impl FnOnce(&mut Work<'_>) -> Result<(), Failure>,
) -> Result<(Vec<Meta>, Vec<Notice>), Failure> {
    let transaction = shared.store.begin_write()?;
    let before = metas.clone();
    let now_ms = shared.clock.now_ms();
    let (metas, notices) = {
        let mut work = Work {
            tables: Tables::open(&transaction)?,
            metas,
            partitions: &shared.partitions,
            retention: &shared.retention,
            now_ms,
            shortage: shared.store.shortage(now_ms),
            notices: Vec::new(),
        };
        act(&mut work)?;
        for (slot, (meta, before)) in work.metas.iter().zip(&before).enumerate() {
            if meta != before {
                meta.write(shared.partitions[slot].number.0, &mut work.tables.meta)?;
            }
        }
        (work.metas, work.notices)
    };
    transaction.commit()?;
    Ok((metas, notices))
}
