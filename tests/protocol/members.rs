//! Joining and leaving groups and changing attributes while events are committed. A user receives
//! every group event committed during the membership, and none committed outside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman::broker::embedded::Embedded;
use pointsman::broker::{
    Logs as _, Notice, Partitions as _, RecipientChange, Retention, Users as _,
};
use pointsman::delivery::subscription::Start;
use pointsman::event::criteria::{Attributes, Criteria, Operator, Test};
use pointsman::event::{Route, Value};
use pointsman::shutdown::Shutdown;
use pointsman::telemetry::metrics::ReasonLabel;

use super::faulty_broker::{At, Fate, Op};
use super::fixture::{Client, Stage, name, to, until};
use super::on_each_broker;
use crate::harness::node::Folder;

on_each_broker! {
    a_member_receives_events_from_joining_to_leaving_live_and_in_replay,
    a_half_written_plan_reaches_a_member_who_leaves_and_not_one_who_joins,
    joining_during_a_replay_takes_effect,
    an_event_right_after_joining_is_not_skipped,
    leaving_and_joining_again_hides_the_events_in_between,
    attributes_are_evaluated_when_an_event_is_sent,
    a_change_reaches_a_stream_whose_feed_was_lost,
    streams_of_a_user_share_a_read_that_began_after_the_change,
}

fn attributes(plan: &str) -> RecipientChange {
    RecipientChange::Attributes(Attributes::from([(
        "plan".into(),
        Value::Text(plan.into()),
    )]))
}

fn for_pro(route: Route) -> Route {
    let test = Test {
        attribute: "plan".into(),
        operator: Operator::Equals,
        values: vec![Value::Text("pro".into())],
    };
    Route {
        when: Some(Criteria::new(vec![vec![test]]).expect("a condition")),
        ..route
    }
}

/// Joined and left are ids. If they were times, a clock that had run ahead would place earlier
/// events after joining, and a clock set back would place later events before it.
async fn a_member_receives_events_from_joining_to_leaving_live_and_in_replay(stage: Stage) {
    if stage.is_redis() {
        // Ids run an hour ahead of every clock.
        stage.number_ids();
    }
    let hub = stage.hub();
    let mut live = Client::live(&hub, "ann").await;
    let away = Client::live(&hub, "ann").await.cut();
    let events = async |id: &str| stage.event(id, &[to("g:ops")]).await;
    events("before").await;
    stage.join("ann", "ops").await;
    events("during1").await;
    events("during2").await;
    live.expect(&["during1", "during2"]).await;
    events("during3").await;
    stage.leave("ann", "ops").await;
    events("after").await;
    stage.event("end", &[to("u:ann")]).await;
    live.expect(&["during3", "end"]).await;
    let mut away = Client::open(&hub, "ann", away);
    away.expect(&["during1", "during2", "during3", "end"]).await;
}

/// The plan was made before one user joined and before the other left. It does not matter which of
/// its slices are still to be written then.
async fn a_half_written_plan_reaches_a_member_who_leaves_and_not_one_who_joins(stage: Stage) {
    let hub = stage.hub();
    stage.join("bob", "ops").await;
    let mut ann = Client::live(&hub, "ann").await;
    let mut bob = Client::live(&hub, "bob").await;
    let plan = [to("g:other g:ops")];
    stage.slice("large", &plan, &["g:other"], 0, false).await;
    stage.join("ann", "ops").await;
    stage.leave("bob", "ops").await;
    stage.slice("large", &plan, &["g:ops"], 1, true).await;
    stage.event("next", &[to("g:ops")]).await;
    stage.event("end", &[to("all")]).await;
    ann.expect(&["next", "end"]).await;
    bob.expect(&["large", "end"]).await;
}

/// The user joins after the replay has read the memberships. The change starts another replay
/// immediately instead of after the current one.
async fn joining_during_a_replay_takes_effect(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let mut stop = stage.puppet.stop(At::After(Op::Recipient));
    let mut client = Client::open(&hub, "ann", start);
    stop.reached().await;
    stage.join("ann", "ops").await;
    stage.event("first", &[to("g:ops")]).await;
    stop.go();
    client.expect(&["first"]).await;
}

/// The event follows the change so closely that one batch of notices holds both and a tick behind
/// them. The low-water mark must not pass the event before the group's log is read.
async fn an_event_right_after_joining_is_not_skipped(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage.puppet.sift(|_, _| Fate::Keep).await;
    stage.join("ann", "ops").await;
    stage.event("for the group", &[to("g:ops")]).await;
    stage.event("for ann", &[to("u:ann")]).await;
    stage.puppet.broker.tick(stage.p).await.expect("tick");
    until("all notices are held back", async || {
        stage.puppet.n_kept().await >= 3
    })
    .await;
    stage.puppet.release().await;
    client.expect(&["for the group", "for ann"]).await;
    stage.event("last", &[to("g:ops")]).await;
    client.expect(&["last"]).await;
}

/// Only the newest membership of a user in a group counts.
async fn leaving_and_joining_again_hides_the_events_in_between(stage: Stage) {
    let hub = stage.hub();
    let mut live = Client::live(&hub, "ann").await;
    let away = Client::live(&hub, "ann").await.cut();
    stage.join("ann", "ops").await;
    stage.leave("ann", "ops").await;
    stage.event("between", &[to("g:ops")]).await;
    stage.join("ann", "ops").await;
    stage.event("again", &[to("g:ops")]).await;
    live.expect(&["again"]).await;
    let mut away = Client::open(&hub, "ann", away);
    away.expect(&["again"]).await;
    live.until_live().await;
    stage.event("both", &[to("g:ops")]).await;
    live.expect(&["both"]).await;
    away.expect(&["both"]).await;
}

/// A user with the plan "free" at commit and "pro" when the event is sent receives it; the reverse
/// does not hold.
async fn attributes_are_evaluated_when_an_event_is_sent(stage: Stage) {
    let hub = stage.hub();
    let away = Client::live(&hub, "ann").await.cut();
    let mut live = Client::live(&hub, "ann").await;
    stage.event("while free", &[for_pro(to("all"))]).await;
    stage.change("ann", attributes("pro")).await;
    stage.event("while pro", &[for_pro(to("all"))]).await;
    // Either event may come first: the live stream may already have passed `while free` when the
    // change arrives, and a cursor does not go back.
    assert!(["while free", "while pro"].contains(&live.event().await.as_str()));
    let mut away = Client::open(&hub, "ann", away);
    away.expect(&["while free", "while pro"]).await;
    let start = away.cut();
    stage.event("missed", &[for_pro(to("all"))]).await;
    stage.change("ann", attributes("free")).await;
    let mut away = Client::open(&hub, "ann", start);
    stage.event("end", &[to("all")]).await;
    away.expect(&["end"]).await;
}

/// The notice of the change is lost with the connection. After reconnecting, the node reads all
/// memberships again.
async fn a_change_reaches_a_stream_whose_feed_was_lost(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage
        .puppet
        .sift(|notice, _| {
            if matches!(notice, Notice::RecipientChanged { .. }) {
                Fate::Drop
            } else {
                Fate::Pass
            }
        })
        .await;
    stage.join("ann", "ops").await;
    stage
        .puppet
        .say(Notice::Reset {
            partitions: vec![stage.p],
        })
        .await;
    stage.event("first", &[to("g:ops")]).await;
    client.expect(&["first"]).await;
}

/// While the memberships are read for one stream, all others of the user wait for the next read: the
/// present one may have begun before the change that they were told of.
async fn streams_of_a_user_share_a_read_that_began_after_the_change(stage: Stage) {
    const STREAMS: usize = 20;
    let hub = stage.hub();
    let mut clients = Vec::new();
    for _ in 0..STREAMS {
        clients.push(Client::live(&hub, "ann").await);
    }
    let n_reads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_reads);
    stage.puppet.lose(move |at| {
        counted.fetch_add(
            usize::from(at == At::Before(Op::Recipient)),
            Ordering::SeqCst,
        );
        false
    });
    // A stream that opens reads them, without the group.
    let mut stop = stage.puppet.stop(At::After(Op::Recipient));
    clients.push(Client::open(&hub, "ann", Start::Latest));
    stop.reached().await;
    stage.join("ann", "ops").await;
    let replays = || {
        let recipient = ReasonLabel {
            reason: "recipient",
        };
        stage.metrics.replays.get_or_create(&recipient).get()
    };
    until("every stream replays", async || replays() > STREAMS as u64).await;
    let mut witness = Client::live(&hub, "bob").await;
    stage.event("for bob", &[to("u:bob")]).await;
    witness.expect(&["for bob"]).await;
    // One read of each user.
    assert_eq!(n_reads.load(Ordering::SeqCst), 2);
    stop.go();
    for client in &mut clients {
        client.until_live().await;
    }
    stage.event("for the group", &[to("g:ops")]).await;
    for client in &mut clients {
        client.expect(&["for the group"]).await;
    }
}

/// A change is announced in every partition, with the ids of that partition, before it is
/// acknowledged: a commit in one partition must not be judged by the state of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_membership_change_is_ordered_with_commits_in_every_partition() {
    for on_redis in [true, false] {
        let sources = ["pointsman:events", "pointsman:b", "pointsman:c"];
        let stage = if on_redis {
            Stage::redis_with(&sources, Retention::default()).await
        } else {
            Stage::embedded_with(&sources, Retention::default()).await
        };
        let hub = stage.hub();
        let numbers: Vec<_> = stage
            .puppet
            .partitions()
            .iter()
            .map(|partition| partition.number)
            .collect();
        let mut client = Client::live(&hub, "ann").await;
        for round in 0..10 {
            // The notices of one partition are held back; in the others, events follow the change
            // immediately.
            let slow = numbers[round % numbers.len()];
            stage
                .puppet
                .sift(move |notice, _| match notice {
                    Notice::RecipientChanged { partition, .. }
                    | Notice::Append { partition, .. }
                    | Notice::Tick { partition, .. }
                        if *partition == slow =>
                    {
                        Fate::Keep
                    }
                    _ => Fate::Pass,
                })
                .await;
            let plan = [to("g:ops")];
            let mut expect = Vec::new();
            for &number in &numbers {
                stage.commit_in(number, &[("not yet", &plan)]).await;
            }
            stage.join("ann", "ops").await;
            for &number in &numbers {
                let id = format!("{round} in {}", number.0);
                stage.commit_in(number, &[(id.as_str(), &plan)]).await;
                expect.push(id);
            }
            let mut received = Vec::new();
            for _ in 1..expect.len() {
                received.push(client.event().await);
            }
            stage.puppet.release().await;
            received.push(client.event().await);
            received.sort_unstable();
            assert_eq!(received, expect);
            stage.leave("ann", "ops").await;
            for &number in &numbers {
                stage.commit_in(number, &[("not any more", &plan)]).await;
            }
        }
        for &number in &numbers {
            stage.commit_in(number, &[("end", &[to("all")])]).await;
            client.expect(&["end"]).await;
        }
    }
}

/// A partition is removed from the configuration while a user is a member. Its leftover membership
/// must not disturb leaving and joining again.
#[tokio::test]
async fn a_removed_partition_keeps_no_user_in_a_group() {
    let folder = Folder::new();
    let open = |sources: &[&str]| {
        let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
        Arc::new(
            Embedded::open(
                folder.path(),
                &sources,
                Retention::default(),
                Shutdown::new().alarm("the writer"),
            )
            .expect("the folder opens"),
        )
    };
    let broker = open(&["a", "b"]);
    let group = name("ops");
    broker
        .change_recipient(
            &name("ann"),
            RecipientChange::Join {
                group: group.clone(),
            },
        )
        .await
        .expect("join");
    broker.close();
    drop(broker);
    let broker = open(&["a"]);
    let p = broker.partitions()[0].number;
    let span = async || {
        broker
            .recipient(&name("ann"))
            .await
            .expect("recipient")
            .groups
            .get(&group)
            .and_then(|spans| spans.get(&p).copied())
    };
    assert!(span().await.is_some_and(|span| span.left.is_none()));
    broker
        .change_recipient(
            &name("ann"),
            RecipientChange::Leave {
                group: group.clone(),
            },
        )
        .await
        .expect("leave");
    assert!(span().await.is_none_or(|span| span.left.is_some()));
    broker
        .change_recipient(
            &name("ann"),
            RecipientChange::Join {
                group: group.clone(),
            },
        )
        .await
        .expect("join");
    assert!(
        span().await.is_some_and(|span| span.left.is_none()),
        "{:?}",
        span().await
    );
}
