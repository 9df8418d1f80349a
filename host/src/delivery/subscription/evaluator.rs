//! Evaluates records for the reader of one stream: the recipient as last read from the broker, the
//! claims of the token and the filter of the stream.
//!
//! The partitions of a stream replay concurrently and each reads the recipient, so that results may
//! arrive out of order: tickets keep a later result from being replaced by an earlier one.
//! `recipients` decides which route wins. All times here are the broker's.

use std::sync::Arc;

use crate::delivery::recipients::{Moment, Reader, RouteMatch, winning_route};
use crate::event::criteria::{Criteria, Pool};
use crate::event::{Name, NotificationId, PartitionNumber, Recipient, Target};

use super::{Filter, Record};

#[derive(Debug)]
pub(super) struct Evaluator {
    reader: Reader,
    filter: Filter,
    /// Shared by the streams of a user whose tokens claim nothing.
    recipient: Arc<Recipient>,
    /// Counters of reads of the recipient: those begun so far, the one that `recipient` came from,
    /// and the first that is recent enough.
    n_reads: u64,
    recipient_read: u64,
    needed_read: u64,
}

impl Evaluator {
    pub(super) fn new(reader: Reader, filter: Filter) -> Self {
        Self {
            reader,
            filter,
            recipient: Arc::default(),
            n_reads: 0,
            recipient_read: 0,
            needed_read: 1,
        }
    }

    pub(super) fn user(&self) -> &Name {
        &self.reader.user
    }

    /// Returns the ticket of a read of the recipient that is about to start.
    pub(super) fn begin_read(&mut self) -> u64 {
        self.n_reads += 1;
        self.n_reads
    }

    /// Replaces the known recipient unless the result of a later read is already known.
    pub(super) fn set_recipient(
        &mut self,
        ticket: u64,
        known: Arc<Recipient>,
        partitions: impl Iterator<Item = PartitionNumber> + Clone,
        pool: &Pool,
    ) {
        if ticket > self.recipient_read {
            self.recipient_read = ticket;
            self.recipient = self.reader.as_recipient(known, partitions);
            if let Some(own) = Arc::get_mut(&mut self.recipient) {
                own.attributes = pool.share(std::mem::take(&mut own.attributes));
            }
        }
    }

    /// The recipient changed: only a read that starts from now on is recent enough.
    pub(super) fn require_new_read(&mut self) {
        self.needed_read = self.n_reads + 1;
    }

    /// Whether the known recipient is recent enough.
    pub(super) fn is_current(&self) -> bool {
        self.recipient_read >= self.needed_read
    }

    /// The logs to read in a partition above `after`, each with the id after which to start.
    pub(super) fn logs(
        &self,
        partition: PartitionNumber,
        after: NotificationId,
    ) -> Vec<(Target, NotificationId)> {
        self.recipient.logs(self.user(), partition, after)
    }

    /// Returns the route that wins for the reader at this time, if the filter passes it.
    pub(super) fn evaluate(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Record,
        now_ms: u64,
    ) -> Option<RouteMatch> {
        let moment = Moment {
            partition,
            id,
            now_ms,
        };
        let attributes = &self.recipient.attributes;
        let holds = |route: usize, criteria: &Criteria| record.holds(route, criteria, attributes);
        let winner = winning_route(
            &record.notification().plan,
            self.user(),
            &self.recipient,
            moment,
            holds,
        )?;
        self.filter
            .passes(record.notification(), record.route(winner.route))
            .then_some(winner)
    }
}
