//! One suite for every broker: each promise of `host/src/broker.rs` is a function of a [`Bench`], and a test of its own on each broker.
//!
//! A promise never names a broker. Entries that a promise commits need not have been appended, except where it reads them back: a
//! broker takes the position from the item, not from its source. What only one broker can be asked stands in [`redis_only`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pointsman::broker::{
    Batch, Broker, Committed, DeadReason, Decision, Feed, Follow, Head, Item, Notice,
    PartitionNumber, Proposal, Retention, Slice,
};
use pointsman::event::{EntryId, Name, NotificationId, Outcome, Position, Target};

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
mod slices;
mod sources;

use redis_only::RedisStore;

/// Makes a test of each promise on one broker, named as `conformance::<broker>::<promise>`. A broker `in memory` promises nothing beyond
/// its process.
macro_rules! suite {
    ($broker:ident, $store:expr) => {
        suite!($broker, in memory, $store, also:
            slices: [a_new_owner_continues_the_plan_from_the_stored_record];
            nodes: [
                attempts_are_counted_for_each_entry,
                what_was_committed_is_there_for_the_next_process,
            ];
            device_cursors: [bookmarks_are_there_for_the_next_process];
        );
    };
    ($broker:ident, in memory, $store:expr $(, also: $($lasting:tt)*)?) => {
        mod $broker {
            use super::*;

            $(suite!(@tests $store; $($lasting)*);)?
            suite!(@tests $store;
                sources: [
                    entries_are_read_in_the_order_of_their_append,
                    a_read_waits_for_the_first_entry,
                    a_read_without_entries_ends_after_its_wait,
                    fields_are_bytes_and_stay_so,
                    a_source_at_its_backlog_bound_takes_none,
                ];
                commits: [
                    a_new_partition_begins_at_nothing,
                    a_commit_moves_the_position_and_the_last_id_together,
                    commit_is_refused_from_another_position,
                    commit_is_refused_from_another_life,
                    each_outcome_is_counted_and_recorded_under_its_word,
                    ids_ascend_and_tell_the_time,
                    f05_four_racing_owners_without_a_lease_commit_in_order_exactly_once,
                ];
                dedupe: [
                    f14a_a_retry_within_the_window_is_a_duplicate,
                    a_retry_within_the_same_batch_is_a_duplicate,
                    f14a_a_repeat_after_the_window_is_no_duplicate,
                    h14_a_repeat_in_the_same_batch_but_after_the_window_is_no_duplicate,
                    discarded_and_unrouted_events_are_remembered,
                    f14b_a_dead_letter_is_not_remembered,
                    h13_a_quiet_time_leaves_no_bucket_behind,
                    f14d_a_full_window_stops_remembering_and_counts,
                    f14e_the_same_id_in_another_partition_is_another_event,
                ];
                logs: [
                    an_event_has_one_id_and_one_record_in_all_logs,
                    the_first_entry_of_a_log_points_to_the_floor_or_the_last_id,
                    each_entry_points_to_the_one_before_it_in_its_log,
                    a_page_continues_where_the_one_before_ended,
                    an_absent_log_is_told_apart_from_an_empty_stretch,
                    the_oldest_entries_leave_a_log_at_its_cap,
                    what_is_too_old_leaves_a_log_that_lives_on,
                    everyone_has_a_cap_of_its_own,
                    absent_records_are_none_in_their_place,
                    f11_the_floor_rises_with_time_and_never_falls,
                    h07_raising_the_age_does_not_pretend_that_the_old_is_still_there,
                ];
                slices: [
                    a_plan_in_slices_ends_with_one_id_in_all_logs,
                    last_moves_with_the_final_slice_only,
                    a_slice_is_refused_from_another_position,
                    slice_0_finds_a_duplicate_and_ends_the_plan,
                    the_slices_of_a_plan_count_once,
                    a_plan_of_one_slice_is_a_commit,
                    a_plan_that_was_begun_cannot_become_a_dead_letter,
                ];
                feeds: [
                    notices_come_in_the_order_of_commits,
                    only_followed_logs_are_heard,
                    a_small_record_comes_along_and_a_large_one_does_not,
                    following_the_same_log_again_is_acknowledged_again,
                    a_log_that_is_no_longer_followed_is_silent,
                    an_append_after_the_acknowledgement_is_heard,
                    a_tick_names_the_last_id_after_all_its_notices,
                    a_tick_during_a_plan_in_slices_names_the_id_before_it,
                    reconnecting_resets_and_a_new_follow_is_heard,
                    two_feeds_hear_the_same,
                ];
                recipients: [
                    attributes_are_replaced_as_a_whole,
                    joining_and_leaving_are_ids_in_each_partition,
                    h12_joining_during_a_plan_in_slices_begins_after_it,
                    joining_again_begins_a_new_span,
                    joining_twice_keeps_the_span,
                    leaving_what_was_not_joined_changes_nothing,
                    a_change_is_heard_in_every_partition_before_later_events,
                    nothing_is_known_of_a_stranger,
                ];
                device_cursors: [
                    a_bookmark_moves_only_from_where_it_was_seen,
                    bookmarks_of_users_devices_and_the_read_mark_stand_apart,
                    of_racing_moves_of_a_bookmark_none_is_lost,
                    one_device_more_takes_the_place_of_the_one_left_alone_for_longest,
                    devices_that_only_begin_push_out_none_that_acknowledged,
                    a_bookmark_that_is_left_alone_goes,
                ];
                dead_letters: [
                    a_dead_letter_keeps_reason_plugin_attempts_and_raw_fields,
                    dead_letters_are_listed_in_pages_oldest_first,
                    a_redriven_dead_letter_is_an_entry_again,
                    a_dropped_dead_letter_is_gone,
                    the_oldest_dead_letters_leave_at_the_bound_and_are_counted,
                    decisions_tell_each_verdict_newest_first,
                    decisions_of_one_event_are_found_however_long_ago,
                ];
                nodes: [
                    a_lease_is_for_one_node_until_it_gives_it_back,
                    a_lease_ends_by_itself,
                    a_node_of_the_same_name_has_the_lease_at_once,
                    take_overs_are_counted_until_the_position_moves,
                    lag_is_what_lies_beyond_the_position,
                    partitions_have_numbers_of_their_own,
                ];
            );
        }
    };
    (@tests $store:expr; $($area:ident: [$($promise:ident),+ $(,)?];)+) => {
        $($(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                let test = super::$area::$promise(Bench { store: Box::new($store) });
                tokio::time::timeout(Duration::from_secs(60), test).await.expect("the promise is kept within a minute");
            }
        )+)+
    };
}

suite!(embedded, on_embedded::Place::durable());
suite!(ephemeral, in memory, on_embedded::Place::ephemeral());
suite!(redis_1, RedisStore::new(1));
suite!(redis_4, RedisStore::new(4));

/// A place that holds the data of one installation, and brokers on it.
#[async_trait]
trait Store: Send + Sync {
    /// A broker as one more node opens it. Where only one process can have the data, the same broker again, unless `retention` is
    /// another than before: then as if the process had ended and begun again.
    async fn open(&self, retention: &Retention) -> Arc<dyn Broker>;

    /// As if every process had ended and one begins again.
    async fn reopen(&self, retention: &Retention) -> Arc<dyn Broker>;
}

/// Where a promise is put to the test.
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

/// A broker as a test speaks to it: about its last partition, unless it says otherwise.
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

    /// Appends entries of one field.
    async fn append(&self, values: &[&str]) -> Vec<EntryId> {
        self.broker
            .append(self.p, values.iter().map(|v| vec![field("v", v)]).collect())
            .await
            .expect("append")
    }

    /// Commits from where the partition is, and answers the outcomes.
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
                    life: head.life,
                    prev: head.position,
                    items,
                },
            )
            .await
            .expect("commit")
        {
            Committed::Done(outcomes) => outcomes,
            Committed::Refused => panic!("the commit from {} was refused", head.position),
        }
    }

    /// Commits one event to these logs under the next entry id, and answers its id.
    async fn publish(&self, record: &str, targets: &[&str]) -> NotificationId {
        let head = self.head().await;
        let outcomes = self
            .commit_from(
                &head,
                vec![commit(after(head.position.entry), record, targets)],
            )
            .await;
        assert_eq!(outcomes[0].0, Outcome::Committed);
        outcomes[0].1.expect("what is committed has an id")
    }

    /// Writes one slice from where the partition is.
    async fn slice(&self, item: Item, index: u32, is_last: bool) -> Committed {
        let head = self.head().await;
        self.broker
            .commit_slice(
                self.p,
                Slice {
                    life: head.life,
                    prev: head.position,
                    item,
                    index,
                    is_last,
                },
            )
            .await
            .expect("commit_slice")
    }

    /// The ids of a log above `after`.
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
            .get(outcome.as_str())
            .copied()
            .unwrap_or(0)
    }

    async fn ear(&self) -> Ear {
        Ear {
            feed: self.broker.feed().await.expect("feed"),
            heard: VecDeque::new(),
            p: self.p,
        }
    }
}

/// A feed as a test hears it, notice by notice.
struct Ear {
    feed: Feed,
    heard: VecDeque<Notice>,
    p: PartitionNumber,
}

impl Ear {
    /// The next notice, ticks and signs of life included.
    async fn next(&mut self) -> Notice {
        while self.heard.is_empty() {
            let batch = tokio::time::timeout(Duration::from_secs(20), self.feed.notices.recv())
                .await
                .expect("a notice comes");
            self.heard.extend(batch.expect("the feed is open"));
        }
        self.heard.pop_front().expect("it is not empty")
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

    /// Follows a log and waits until that is in force; what is heard before is dropped.
    async fn hear(&mut self, log: &str, token: u64) {
        self.follow(log, token);
        while !matches!(self.next().await, Notice::Following { token: t } if t == token) {}
    }

    /// The next notice of an append: its log and id.
    async fn append(&mut self) -> (String, NotificationId) {
        loop {
            match self.next().await {
                Notice::Append { target, id, .. } => return (target.to_string(), id),
                Notice::Tick { .. } | Notice::Alive { .. } | Notice::Following { .. } => {}
                other => panic!("expected an append, heard {other:?}"),
            }
        }
    }

    /// The `last` of the next tick, with the appends heard before it.
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
        Proposal::Commit {
            record: Bytes::copy_from_slice(record.as_bytes()),
            targets,
        },
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

/// Asks until the answer is the wanted one.
///
/// # Panics
/// If it is not within a minute.
async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), asking)
        .await
        .expect("it comes to be so");
}
