//! Guarantees of a user's data: attributes, and memberships as ranges of ids.

use super::*;
use pointsman::broker::{Error, GroupLimit, RecipientChange};
use pointsman::event::criteria::Attributes;
use pointsman::event::{Span, Value};

impl Node {
    async fn change(&self, user: &str, change: RecipientChange) {
        self.broker
            .change_recipient(&name(user), change)
            .await
            .expect("change_recipient");
    }

    async fn join(&self, user: &str, group: &str) {
        self.change(user, RecipientChange::Join { group: name(group) })
            .await;
    }

    async fn leave(&self, user: &str, group: &str) {
        self.change(user, RecipientChange::Leave { group: name(group) })
            .await;
    }

    /// The limit that refuses to let the user join a group, if any does.
    async fn refusal(&self, user: &str, group: &str) -> Option<GroupLimit> {
        let join = RecipientChange::Join { group: name(group) };
        match self.broker.change_recipient(&name(user), join).await {
            Ok(()) => None,
            Err(Error::TooManyGroups { limit, most: 2 }) => Some(limit),
            Err(error) => panic!("{error}"),
        }
    }

    /// The user's span of a group in the partition under test.
    async fn span(&self, user: &str, group: &str) -> Option<Span> {
        let recipient = self.broker.recipient(&name(user)).await.expect("recipient");
        recipient
            .groups
            .get(&name(group))
            .and_then(|spans| spans.get(&self.p).copied())
    }
}

pub(super) async fn attributes_are_replaced_as_a_whole(bench: Bench) {
    let node = bench.open().await;
    let first = Attributes::from([
        ("plan".into(), Value::Text("pro \"ü\"".into())),
        ("age".into(), Value::Integer(i64::MAX)),
        ("ok".into(), Value::Flag(true)),
    ]);
    node.change("1", RecipientChange::Attributes(first.clone()))
        .await;
    assert_eq!(
        node.broker.recipient(&name("1")).await.unwrap().attributes,
        first
    );
    node.join("1", "ops").await;
    let second = Attributes::from([("score".into(), Value::Decimal(0.25))]);
    node.change("1", RecipientChange::Attributes(second.clone()))
        .await;
    let recipient = node.broker.recipient(&name("1")).await.unwrap();
    assert_eq!(recipient.attributes, second);
    assert_eq!(recipient.groups.len(), 1, "memberships are unchanged");
    node.change("1", RecipientChange::Attributes(Attributes::default()))
        .await;
    assert_eq!(
        node.broker.recipient(&name("1")).await.unwrap().attributes,
        Attributes::default()
    );
}

pub(super) async fn joining_and_leaving_are_recorded_as_ids_in_each_partition(bench: Bench) {
    let node = bench.open().await;
    let before = node.publish("R", &["g:ops"]).await;
    node.join("1", "ops").await;
    let during = node.publish("R", &["g:ops"]).await;
    node.leave("1", "ops").await;
    node.publish("R", &["g:ops"]).await;
    assert_eq!(
        node.span("1", "ops").await,
        Some(Span {
            joined: before,
            left: Some(during)
        })
    );
    for partition in node
        .broker
        .partitions()
        .iter()
        .filter(|partition| partition.number != node.p)
    {
        let other = Node {
            p: partition.number,
            ..node.clone()
        };
        assert_eq!(
            other.span("1", "ops").await,
            Some(Span {
                joined: NotificationId(0),
                left: Some(NotificationId(0))
            })
        );
    }
}

/// The plan was made before the user joined, so its id must not lie above the start of the span.
pub(super) async fn joining_during_a_plan_in_slices_begins_after_it(bench: Bench) {
    let node = bench.open().await;
    let entry = after(node.head().await.position.entry);
    node.slice(commit(entry, "R", &["g:ops"]), 0, false).await;
    node.join("1", "ops").await;
    node.slice(commit(entry, "R", &["g:other"]), 1, true).await;
    let head = node.head().await;
    assert_eq!(
        node.span("1", "ops").await,
        Some(Span {
            joined: head.last,
            left: None
        })
    );
}

/// A user has one span per group, the newest: the events of an earlier span are no longer visible.
pub(super) async fn joining_again_begins_a_new_span(bench: Bench) {
    let node = bench.open().await;
    node.join("1", "ops").await;
    node.leave("1", "ops").await;
    let between = node.publish("R", &["g:ops"]).await;
    node.join("1", "ops").await;
    assert_eq!(
        node.span("1", "ops").await,
        Some(Span {
            joined: between,
            left: None
        })
    );
}

pub(super) async fn joining_twice_keeps_the_span(bench: Bench) {
    let node = bench.open().await;
    node.join("1", "ops").await;
    let span = node.span("1", "ops").await;
    node.publish("R", &["g:ops"]).await;
    node.join("1", "ops").await;
    assert_eq!(node.span("1", "ops").await, span);
}

pub(super) async fn leaving_a_group_without_membership_changes_nothing(bench: Bench) {
    let node = bench.open().await;
    node.leave("1", "ops").await;
    assert_eq!(node.span("1", "ops").await, None);
    node.join("1", "ops").await;
    node.leave("1", "ops").await;
    let span = node.span("1", "ops").await;
    node.publish("R", &["g:ops"]).await;
    node.leave("1", "ops").await;
    assert_eq!(node.span("1", "ops").await, span);
}

pub(super) async fn a_change_is_announced_in_every_partition_before_later_events(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    let all: Vec<Node> = node
        .broker
        .partitions()
        .iter()
        .map(|partition| Node {
            p: partition.number,
            ..node.clone()
        })
        .collect();
    for one in &all {
        let target = target("all");
        receiver
            .feed
            .follow
            .send(Follow::Start {
                partition: one.p,
                target,
                token: one.p.0.into(),
            })
            .unwrap();
    }
    node.join("ü 1", "ops").await;
    node.change("ü 1", RecipientChange::Attributes(Attributes::default()))
        .await;
    for one in &all {
        one.publish("R", &["all"]).await;
    }
    let mut changes = std::collections::BTreeMap::new();
    let mut n_appends = 0;
    while n_appends < all.len() {
        match receiver.next().await {
            Notice::RecipientChanged { partition, user } => {
                assert_eq!(user, name("ü 1"));
                *changes.entry(partition).or_insert(0) += 1;
            }
            Notice::Append { partition, .. } => {
                assert_eq!(changes.get(&partition), Some(&2), "in {partition:?}");
                n_appends += 1;
            }
            _ => {}
        }
    }
}

pub(super) async fn an_unknown_user_has_no_attributes_and_no_groups(bench: Bench) {
    let node = bench.open().await;
    assert_eq!(
        node.broker.recipient(&name("stranger")).await.unwrap(),
        pointsman::event::Recipient::default()
    );
}

pub(super) async fn a_membership_beyond_the_limit_is_refused_and_changes_nothing(bench: Bench) {
    let retention = Retention {
        max_groups_per_user: 2,
        ..Retention::default()
    };
    let node = bench.open_with(&retention).await;
    node.join("1", "a").await;
    node.join("1", "b").await;
    let before = node.broker.recipient(&name("1")).await.unwrap();
    node.publish("R", &["g:a"]).await;
    for _ in 0..2 {
        assert_eq!(node.refusal("1", "c").await, Some(GroupLimit::Joined));
    }
    assert_eq!(node.refusal("1", "a").await, None, "is a member");
    assert_eq!(node.refusal("2", "c").await, None, "another user");
    assert_eq!(node.broker.recipient(&name("1")).await.unwrap(), before);
    node.change("1", RecipientChange::Attributes(Attributes::default()))
        .await;
    node.leave("1", "a").await;
    assert_eq!(node.refusal("1", "c").await, None, "after leaving one");
    assert_eq!(node.refusal("1", "a").await, Some(GroupLimit::Joined));
}

/// Their events can still be delivered, so a user who keeps joining and leaving other groups would
/// have ever more logs.
pub(super) async fn left_groups_count_separately_until_their_events_have_expired(bench: Bench) {
    let retention = Retention {
        max_groups_per_user: 2,
        max_age: Duration::from_secs(5),
        ..Retention::default()
    };
    let node = bench.open_with(&retention).await;
    node.join("1", "a").await;
    node.join("1", "b").await;
    for partition in node.broker.partitions() {
        let p = partition.number;
        let node = Node { p, ..node.clone() };
        node.publish("R", &["g:a", "g:b"]).await;
    }
    node.leave("1", "a").await;
    node.leave("1", "b").await;
    assert_eq!(node.refusal("1", "c").await, Some(GroupLimit::Left));
    assert_eq!(node.refusal("1", "a").await, None, "joins it again");
    assert_eq!(node.refusal("1", "c").await, None, "one is left");
    assert_eq!(node.refusal("1", "b").await, Some(GroupLimit::Joined));
    // Leaving is never refused.
    node.leave("1", "a").await;
    node.leave("1", "c").await;
    assert_eq!(node.refusal("1", "d").await, Some(GroupLimit::Left));
    until(async || node.refusal("1", "d").await.is_none()).await;
}
