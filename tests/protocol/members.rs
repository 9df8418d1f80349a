//! Joining, leaving and changing attributes, while events are committed. Nobody sees what was committed outside of the time that they were a
//! member, and nothing within it is missed.

use std::sync::Arc;

use pointsman::broker::embedded::Embedded;
use pointsman::broker::{Broker, Notice, RecipientChange, Retention};
use pointsman::event::criteria::{Attributes, Criteria, Operator, Test};
use pointsman::event::{Route, Value};
use pointsman::shutdown::Shutdown;

use super::faulty_broker::{At, Fate, Op};
use super::fixture::{Client, Stage, name, to, until};
use super::on_each_broker;
use crate::harness::node::Folder;

on_each_broker! {
    h12_a_member_sees_from_joining_to_leaving_live_and_in_replay,
    h12_a_plan_half_written_when_somebody_joins_is_not_theirs_and_when_somebody_leaves_it_is,
    joining_while_a_replay_runs_is_noticed,
    an_event_right_after_joining_is_not_passed_over,
    leaving_and_joining_again_hides_what_came_between,
    attributes_are_judged_on_the_way_to_the_socket,
    a_change_reaches_a_stream_whose_feed_was_lost,
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

/// By times, what was committed under a clock that ran ahead would lie after joining, and what came then before it. So joined and left are ids.
async fn h12_a_member_sees_from_joining_to_leaving_live_and_in_replay(stage: Stage) {
    if stage.is_redis() {
        // An hour ahead of every clock.
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

/// The plan was made before the one joined, and before the other left; which of its slices is written meanwhile tells nothing.
async fn h12_a_plan_half_written_when_somebody_joins_is_not_theirs_and_when_somebody_leaves_it_is(
    stage: Stage,
) {
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

/// The replay has read who the user is; then the user joins. The change makes another replay of it, at once and not when this one is through.
async fn joining_while_a_replay_runs_is_noticed(stage: Stage) {
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

/// The event follows the change so closely that both are in one batch of notices; and a tick behind them. The mark must not pass it before the group's log
/// is read.
async fn an_event_right_after_joining_is_not_passed_over(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage.puppet.sift(|_, _| Fate::Keep).await;
    stage.join("ann", "ops").await;
    stage.event("for the group", &[to("g:ops")]).await;
    stage.event("for ann", &[to("u:ann")]).await;
    stage.puppet.broker.tick(stage.p).await.expect("tick");
    until("all of it waits", async || stage.puppet.n_kept().await >= 3).await;
    stage.puppet.release().await;
    client.expect(&["for the group", "for ann"]).await;
    stage.event("last", &[to("g:ops")]).await;
    client.expect(&["last"]).await;
}

/// A user has one membership of a group, the newest.
async fn leaving_and_joining_again_hides_what_came_between(stage: Stage) {
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

/// "Free" at the commit and "pro" on the way to the socket gets it; the reverse does not.
async fn attributes_are_judged_on_the_way_to_the_socket(stage: Stage) {
    let hub = stage.hub();
    let away = Client::live(&hub, "ann").await.cut();
    let mut live = Client::live(&hub, "ann").await;
    stage.event("while free", &[for_pro(to("all"))]).await;
    stage.change("ann", attributes("pro")).await;
    stage.event("while pro", &[for_pro(to("all"))]).await;
    // What the cursor has passed is not revisited; whether it had is a race that only an event between the two can end.
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

/// The notice of the change goes down with the connection; who connects again reads everything again.
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

/// A change is said in every partition before it is acknowledged, each with its own ids: a commit in one must not be judged by what is known of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h12_a_change_races_with_commits_in_no_partition() {
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
            // In one partition the notice of the change waits; in the others events follow it at once.
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

/// A partition was taken out of the configuration while somebody was a member; leaving and joining again must not stumble over what is left of it.
#[tokio::test]
async fn a_partition_that_is_gone_holds_nobody_in_a_group() {
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
