//! One suite for every broker: each guarantee of `host/src/broker.rs` is a function of a [`Bench`],
//! which becomes a separate test for each broker.
//!
//! A guarantee never names a broker. The entries it commits need not have been appended, unless it
//! reads them back: a broker takes the position from the item and not from its source. Tests that
//! only one broker allows are in [`redis_only`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pointsman::broker::{
    Batch, Broker, CommitResult, Feed, Follow, Head, Item, NewNotification, Notice, Proposal,
    Retention, Slice,
};
use pointsman::event::{
    DeadReason, Decision, EntryId, Name, NotificationId, Outcome, PartitionNumber, Position, Target,
};

mod commits;
mod dead_letters;
mod dedupe;
mod device_cursors;
mod feeds;
mod logs;
mod nodes;
mod on_embedded;
mod recipients;
mod redis_only;
mod retries;
mod rollouts;
mod slices;
mod sources;
mod tickets;

use redis_only::RedisStore;

/// Creates a test of each guarantee for one broker, named `conformance::<broker>::<guarantee>`. A
/// broker `in memory` guarantees nothing beyond its process.
macro_rules! suite {
    ($broker:ident, $store:expr) => {
        suite!($broker, in memory, $store, also:
            slices: [a_new_owner_continues_the_plan_from_the_stored_record];
            nodes: [
                attempts_are_counted_for_each_entry,
                committed_data_survives_the_process,
            ];
            device_cursors: [device_cursors_survive_the_process];
            retries: [retries_and_their_attempts_survive_the_process];
            rollouts: [rollouts_survive_the_process];
        );
    };
    ($broker:ident, in memory, $store:expr $(, also: $($lasting:tt)*)?) => {
        mod $broker {
            use super::*;

            $(suite!(@tests $store; $($lasting)*);)?
            suite!(@tests $store;
                sources: [
                    entries_are_read_in_append_order,
                    a_read_waits_for_the_first_entry,
                    a_read_without_entries_ends_after_its_wait,
                    fields_are_kept_as_raw_bytes,
                    a_source_at_its_backlog_limit_accepts_no_entries,
                    only_the_beginning_of_a_large_entry_is_read,
                    the_position_is_part_of_the_state,
                ];
                commits: [
                    a_new_partition_is_empty,
                    a_commit_moves_the_position_and_the_last_id_together,
                    a_commit_from_another_position_is_rejected,
                    a_commit_of_another_epoch_is_rejected,
                    each_outcome_is_counted_and_recorded_under_its_name,
                    notifications_of_several_slots_are_committed_in_one_step,
                    ids_ascend_and_contain_the_time,
                    four_racing_owners_without_a_lease_commit_in_order_exactly_once,
                ];
                dedupe: [
                    a_retry_within_the_window_is_a_duplicate,
                    a_retry_within_the_same_batch_is_a_duplicate,
                    a_repeat_after_the_window_is_not_a_duplicate,
                    a_repeat_in_the_same_batch_but_after_the_window_is_not_a_duplicate,
                    discarded_and_unrouted_events_are_remembered,
                    a_dead_letter_is_not_remembered,
                    a_quiet_period_leaves_no_bucket_behind,
                    a_full_window_stops_remembering_and_counts,
                    the_same_id_in_another_partition_is_a_different_event,
                ];
                logs: [
                    an_event_has_one_id_and_one_record_in_all_logs,
                    the_first_entry_of_a_log_points_to_the_floor_or_the_last_id,
                    each_entry_points_to_the_one_before_it_in_its_log,
                    a_page_continues_where_the_one_before_ended,
                    pages_of_many_logs_are_those_of_each_log_in_order,
                    an_absent_log_differs_from_an_empty_range,
                    a_log_at_its_limit_drops_its_oldest_entries,
                    expired_entries_leave_a_log_that_is_still_in_use,
                    the_log_of_everyone_has_its_own_limit,
                    absent_records_are_none_at_their_index,
                    the_floor_rises_with_time_and_never_falls,
                    raising_max_age_does_not_hide_that_old_entries_are_gone,
                ];
                slices: [
                    a_plan_in_slices_ends_with_one_id_in_all_logs,
                    last_moves_with_the_final_slice_only,
                    a_slice_from_another_position_is_rejected,
                    slice_0_finds_a_duplicate_and_ends_the_plan,
                    a_plan_in_slices_is_counted_once,
                    notifications_of_several_slots_have_consecutive_ids_in_slices,
                    a_plan_of_one_slice_is_a_commit,
                    a_started_plan_cannot_become_a_dead_letter,
                ];
                feeds: [
                    notices_arrive_in_commit_order,
                    only_followed_logs_are_delivered,
                    a_notice_includes_a_small_record_but_not_a_large_one,
                    following_the_same_log_again_is_acknowledged_again,
                    a_log_that_is_no_longer_followed_sends_no_notices,
                    an_append_after_the_acknowledgement_is_delivered,
                    a_tick_carries_the_last_id_and_follows_its_notices,
                    a_tick_during_a_plan_in_slices_carries_the_id_before_it,
                    reconnecting_sends_a_reset_and_a_new_follow_request_works,
                    two_feeds_receive_the_same_notices,
                ];
                recipients: [
                    attributes_are_replaced_as_a_whole,
                    joining_and_leaving_are_recorded_as_ids_in_each_partition,
                    joining_during_a_plan_in_slices_begins_after_it,
                    joining_again_begins_a_new_span,
                    joining_twice_keeps_the_span,
                    leaving_a_group_without_membership_changes_nothing,
                    a_change_is_announced_in_every_partition_before_later_events,
                    an_unknown_user_has_no_attributes_and_no_groups,
                    a_membership_beyond_the_limit_is_refused_and_changes_nothing,
                    left_groups_count_separately_until_their_events_have_expired,
                ];
                device_cursors: [
                    a_device_cursor_moves_only_from_its_expected_value,
                    cursors_of_users_devices_and_read_markers_are_independent,
                    no_concurrent_move_of_a_device_cursor_is_lost,
                    a_new_device_evicts_the_least_recently_moved_one,
                    unacknowledged_devices_evict_no_acknowledged_ones,
                    an_unused_device_cursor_expires,
                ];
                dead_letters: [
                    a_dead_letter_keeps_reason_plugin_attempts_and_raw_fields,
                    dead_letters_are_listed_in_pages_oldest_first,
                    a_redriven_dead_letter_is_an_entry_again,
                    a_dropped_dead_letter_is_gone,
                    dead_letters_over_the_limit_are_trimmed_oldest_first_and_counted,
                    a_dead_letter_of_a_large_entry_holds_all_its_fields_up_to_a_limit,
                    headers_of_dead_letters_hold_no_fields,
                    decisions_list_each_verdict_newest_first,
                    decisions_of_one_event_are_found_among_all_kept,
                    the_members_of_a_chain_are_found_among_all_kept_decisions,
                ];
                retries: [
                    an_event_that_waits_for_a_retry_is_listed_and_counted_apart,
                    only_the_owner_appends_a_retry_and_only_once_it_is_due,
                    attempts_are_carried_until_the_retries_are_used_up,
                    a_retry_beyond_the_timeout_is_a_dead_letter,
                    a_retry_is_no_duplicate_of_itself_but_of_the_publishers_retry,
                    retries_beyond_the_limit_are_dead_letters_and_none_is_trimmed,
                    an_event_that_waits_for_a_retry_is_redriven_or_dropped_by_hand,
                    concurrent_renewals_append_each_retry_once_and_in_order,
                    a_plan_in_slices_keeps_the_attempts_at_its_event,
                    a_retry_is_appended_to_a_source_at_its_backlog_limit,
                ];
                nodes: [
                    a_lease_belongs_to_one_node_until_it_releases_it,
                    a_lease_expires,
                    a_node_of_the_same_name_gets_the_lease_at_once,
                    take_overs_are_counted_until_the_position_moves,
                    lag_counts_the_entries_after_the_position,
                    the_broker_clock_is_the_one_of_its_heads_and_ids,
                    partitions_have_distinct_numbers,
                ];
                tickets: [a_ticket_is_taken_once_by_any_node_or_expires];
                rollouts: [
                    a_rollout_is_the_last_one_written_on_every_node,
                    a_rollout_is_replaced_only_while_it_is_the_one_that_was_read,
                    a_node_reads_the_last_report_of_every_node,
                ];
            );
        }
    };
    (@tests $store:expr; $($area:ident: [$($promise:ident),+ $(,)?];)+) => {
        $($(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                let test = super::$area::$promise(Bench { store: Box::new($store) });
                tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test ends within a minute");
            }
        )+)+
    };
}

suite!(embedded, on_embedded::EmbeddedStore::durable());
suite!(ephemeral, in memory, on_embedded::EmbeddedStore::ephemeral());
suite!(redis_1, RedisStore::new(1));
suite!(redis_4, RedisStore::new(4));

/// The data of one installation, and a way to open brokers on it.
#[async_trait]
trait Store: Send + Sync {
    /// Opens a broker as an additional node would. If only one process can have the data, returns
    /// the same broker again; if `retention` differs from before, acts as if the process had
    /// restarted.
    async fn open(&self, retention: &Retention) -> Arc<dyn Broker>;

    /// Opens a broker as if every process had ended and one starts again.
    async fn reopen(&self, retention: &Retention) -> Arc<dyn Broker>;
}

/// The fixture of one test.
struct Bench {
    store: Box<dyn Store>,
}

impl Bench {
    async fn open(&self) -> Node {
        self.open_with(&Retention::default()).await
    }

    async fn open_with(&self, retention: &Retention) -> Node {
        Node::new(self.store.open(retention).await)
    }

    async fn reopen(&self) -> Node {
        Node::new(self.store.reopen(&Retention::default()).await)
    }
}

/// A broker with the operations that tests need. Uses its last partition unless stated otherwise.
#[derive(Clone)]
struct Node {
    broker: Arc<dyn Broker>,
    p: PartitionNumber,
}

impl Node {
    fn new(broker: Arc<dyn Broker>) -> Self {
        let p = broker
            .partitions()
            .last()
            .expect("there is a partition")
            .number;
        Self { broker, p }
    }

    async fn head(&self) -> Head {
        self.broker.head(self.p).await.expect("head")
    }

    /// Appends entries with one field each.
    async fn append(&self, values: &[&str]) -> Vec<EntryId> {
        self.broker
            .append(self.p, values.iter().map(|v| vec![field("v", v)]).collect())
            .await
            .expect("append")
    }

    /// Commits from the current position and returns the outcomes.
    async fn commit(&self, items: Vec<Item>) -> Vec<(Outcome, Option<NotificationId>)> {
        let head = self.head().await;
        self.commit_from(&head, items).await
    }

    async fn commit_from(
        &self,
        head: &Head,
        items: Vec<Item>,
    ) -> Vec<(Outcome, Option<NotificationId>)> {
        match self
            .broker
            .commit(
                self.p,
                Batch {
                    epoch: head.epoch,
                    prev: head.position,
                    items,
                },
            )
            .await
            .expect("commit")
        {
            CommitResult::Done(outcomes) => outcomes,
            CommitResult::Conflict => panic!("the commit from {} was rejected", head.position),
        }
    }

    /// Commits one event to these logs under the next entry id and returns its id.
    async fn publish(&self, record: &str, targets: &[&str]) -> NotificationId {
        let head = self.head().await;
        let outcomes = self
            .commit_from(
                &head,
                vec![commit(after(head.position.entry), record, targets)],
            )
            .await;
        assert_eq!(outcomes[0].0, Outcome::Committed);
        outcomes[0].1.expect("a committed event has an id")
    }

    /// Writes one slice from the current position.
    async fn slice(&self, item: Item, index: u32, is_last: bool) -> CommitResult {
        let head = self.head().await;
        self.broker
            .commit_slice(
                self.p,
                Slice {
                    epoch: head.epoch,
                    prev: head.position,
                    item,
                    index,
                    is_last,
                },
            )
            .await
            .expect("commit_slice")
    }

    /// Returns the ids of a log above `after`.
    async fn ids(&self, log: &str, after: NotificationId) -> Vec<NotificationId> {
        let page = self
            .broker
            .page(self.p, &target(log), after, 10_000)
            .await
            .expect("page");
        assert!(page.is_last);
        page.entries.into_iter().map(|(id, _)| id).collect()
    }

    async fn count(&self, outcome: Outcome) -> u64 {
        self.broker
            .state(self.p)
            .await
            .expect("state")
            .outcomes
            .get(&outcome)
            .copied()
            .unwrap_or(0)
    }

    async fn receiver(&self) -> Receiver {
        Receiver {
            feed: self.broker.feed().await.expect("feed"),
            received: VecDeque::new(),
            p: self.p,
        }
    }
}

/// A feed that a test reads one notice at a time.
struct Receiver {
    feed: Feed,
    received: VecDeque<Notice>,
    p: PartitionNumber,
}

impl Receiver {
    /// The next notice, including ticks and `Alive`.
    async fn next(&mut self) -> Notice {
        while self.received.is_empty() {
            let batch = tokio::time::timeout(Duration::from_secs(20), self.feed.notices.recv())
                .await
                .expect("a notice arrives");
            self.received.extend(batch.expect("the feed is open"));
        }
        self.received.pop_front().expect("it is not empty")
    }

    fn follow(&self, log: &str, token: u64) {
        self.feed
            .follow
            .send(Follow::Start {
                partition: self.p,
                target: target(log),
                token,
            })
            .expect("the feed is open");
    }

    /// Follows a log and waits until the request is in effect. Discards the notices received
    /// before.
    async fn follow_and_wait(&mut self, log: &str, token: u64) {
        self.follow(log, token);
        while !matches!(self.next().await, Notice::Following { token: t } if t == token) {}
    }

    /// The next append: its log and id.
    async fn append(&mut self) -> (String, NotificationId) {
        loop {
            match self.next().await {
                Notice::Append { target, id, .. } => return (target.to_string(), id),
                Notice::Tick { .. } | Notice::Alive { .. } | Notice::Following { .. } => {}
                other => panic!("expected an append, received {other:?}"),
            }
        }
    }

    /// The `last` of the next tick, with the appends received before it.
    async fn tick(&mut self) -> (NotificationId, Vec<NotificationId>) {
        let mut appended = Vec::new();
        loop {
            match self.next().await {
                Notice::Tick {
                    partition, last, ..
                } if partition == self.p => return (last, appended),
                Notice::Append { id, .. } => appended.push(id),
                _ => {}
            }
        }
    }
}

fn field(name: &str, value: &str) -> (Bytes, Bytes) {
    (
        Bytes::copy_from_slice(name.as_bytes()),
        Bytes::copy_from_slice(value.as_bytes()),
    )
}

fn target(log: &str) -> Target {
    log.parse().expect("a target")
}

fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

/// The id of the next entry in the same millisecond.
fn after(entry: EntryId) -> EntryId {
    EntryId {
        ms: entry.ms.max(1_700_000_000_000),
        seq: entry.seq + 1,
    }
}

fn item(entry: EntryId, proposal: Proposal) -> Item {
    let decision = Decision {
        event_id: entry.to_string(),
        event_source: "/test".into(),
        event_type: "t".into(),
        ..Decision::default()
    };
    Item {
        entry,
        dedupe: None,
        proposal,
        decision,
    }
}

fn commit(entry: EntryId, record: &str, targets: &[&str]) -> Item {
    let mut targets: Vec<Target> = targets.iter().map(|log| target(log)).collect();
    targets.sort_unstable();
    item(
        entry,
        Proposal::commit(Bytes::copy_from_slice(record.as_bytes()), targets),
    )
}

/// An item with a notification for each record, by its logs.
fn commit_all(entry: EntryId, notifications: &[(&'static str, &[&str])]) -> Item {
    let new = |(record, logs): &(&'static str, &[&str])| NewNotification {
        record: Bytes::from_static(record.as_bytes()),
        targets: logs.iter().map(|log| target(log)).collect(),
    };
    item(
        entry,
        Proposal::Commit(notifications.iter().map(new).collect()),
    )
}

fn dead(entry: EntryId, reason: &str) -> Item {
    item(
        entry,
        Proposal::DeadLetter(DeadReason {
            reason: reason.into(),
            plugin: None,
            attempts: 1,
            fields: vec![field("v", reason)],
        }),
    )
}

/// The same item from a publisher that gave the event an id.
fn with_id(mut item: Item, publisher_id: u8) -> Item {
    item.dedupe = Some([publisher_id; 16]);
    item
}

/// Polls until the condition holds.
///
/// # Panics
/// If it does not hold within a minute.
async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), asking)
        .await
        .expect("the condition holds within a minute");
}
