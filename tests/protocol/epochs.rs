//! Fail-overs that lose the tail of the logs. The new primary issues the lost ids again, so a
//! client that received them must get a `gap` before anything arrives under the same ids.
//!
//! The tests simulate a fail-over on one Redis server: its data goes back to the state of a
//! replica, and its replication id changes. Ids run ahead of the clock so that exactly the same ids
//! are issued again.

use pointsman::broker::Notice;
use pointsman::delivery::subscription::{Gap, GapReason, Start};
use pointsman::event::NotificationId;

use super::faulty_broker::Fate;
use super::fixture::{Client, Frame, Stage, target, to, until, urgent};

async fn stage() -> Stage {
    let stage = Stage::redis().await;
    stage.number_ids();
    stage
}

fn rewound(stage: &Stage, from: NotificationId, to: NotificationId) -> Gap {
    Gap {
        partition: stage.p,
        reason: GapReason::Rewound,
        from,
        to,
    }
}

/// Ids up to 103 were sent; the new primary has ids up to 101 and issues 102 again. Without the
/// epoch, every open stream would skip it silently.
#[tokio::test]
async fn an_open_stream_gets_a_gap_for_a_lost_tail_and_then_the_events_under_the_same_ids() {
    for cuts in [false, true] {
        let stage = stage().await;
        let hub = stage.hub();
        let mut client = Client::live(&hub, "ann").await;
        let kept = stage.event("kept", &[to("u:ann")]).await;
        stage.server().snapshot();
        let lost = stage.events("lost", 2, &[to("u:ann")]).await;
        client.expect(&["kept", "lost1", "lost2"]).await;
        stage.server().fail_over();
        if cuts {
            stage.server().cut("normal");
            stage.server().cut("pubsub");
            until("Redis answers again", async || {
                stage.puppet.broker.head(stage.p).await.is_ok()
            })
            .await;
        }
        assert_eq!(
            stage.event("new", &[to("u:ann")]).await,
            lost[0],
            "the id is issued again"
        );
        assert_eq!(client.gap().await, rewound(&stage, kept, lost[1]));
        client.expect(&["new"]).await;
        stage.event("newer", &[to("u:ann")]).await;
        client.expect(&["newer"]).await;
    }
}

/// A cursor that returns after the fail-over gets the gap if it stands above the last surviving id.
/// A cursor at or below that id resumes without one.
#[tokio::test]
async fn a_cursor_above_the_last_surviving_id_gets_a_gap_and_one_below_resumes_exactly() {
    let stage = stage().await;
    let hub = stage.hub();
    let mut far = Client::live(&hub, "ann").await;
    let mut near = Client::live(&hub, "ann").await;
    let kept = stage.event("kept", &[to("u:ann")]).await;
    near.expect(&["kept"]).await;
    let near = near.cut();
    stage.server().snapshot();
    let lost = stage.events("lost", 3, &[to("u:ann")]).await;
    far.expect(&["kept", "lost1", "lost2", "lost3"]).await;
    let far = far.cut();
    stage.server().fail_over();
    assert_eq!(stage.events("new", 2, &[to("u:ann")]).await, lost[..2]);
    let mut near = Client::open(&hub, "ann", near);
    near.expect(&["new1", "new2"]).await;
    let mut far = Client::open(&hub, "ann", far);
    assert_eq!(far.gap().await, rewound(&stage, kept, lost[2]));
    far.expect(&["new1", "new2"]).await;
}

/// B is promoted and dies; then C is promoted, which never saw B's epoch. Numbered epochs would
/// give both the second number, so epochs have names.
#[tokio::test]
async fn a_cursor_of_an_epoch_unknown_to_the_new_primary_gets_a_gap_from_the_origin() {
    let stage = stage().await;
    let hub = stage.hub();
    let before = stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    stage.server().fail_over();
    let of_b = stage.head().await.epoch;
    let mut client = Client::live(&hub, "ann").await;
    let ids = stage.events("b", 2, &[to("u:ann")]).await;
    client.expect(&["b1", "b2"]).await;
    let start = client.cut();
    stage.server().fail_over();
    let head = stage.head().await;
    assert!(
        head.epochs.iter().all(|(epoch, _)| *epoch != of_b),
        "the epoch {of_b} is listed: {:?}",
        head.epochs
    );
    assert_eq!(head.last, before);
    assert_eq!(
        stage.events("c", 2, &[to("u:ann")]).await,
        ids,
        "the same ids are issued again"
    );
    let mut client = Client::open(&hub, "ann", start);
    assert_eq!(
        client.gap().await,
        rewound(&stage, NotificationId(0), ids[1])
    );
    // Everything that is kept follows, because the part that the client received is unknown.
    // Nothing was trimmed, so no second gap comes.
    client.expect(&["kept", "c1", "c2"]).await;
}

/// Two fail-overs happened since. The last id that survived the second one is higher than the last
/// id that survived the first, and does not bound the loss of the first.
#[tokio::test]
async fn the_gap_starts_where_the_next_epoch_began_and_not_where_the_newest_did() {
    let stage = stage().await;
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let kept = stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    let lost = stage.events("lost", 3, &[to("u:ann")]).await;
    client.expect(&["kept", "lost1", "lost2", "lost3"]).await;
    let start = client.cut();
    stage.server().fail_over();
    stage.events("new", 6, &[to("u:ann")]).await;
    stage.server().change_replid();
    let mut client = Client::open(&hub, "ann", start);
    assert_eq!(client.gap().await, rewound(&stage, kept, lost[2]));
    client
        .expect(&["new1", "new2", "new3", "new4", "new5", "new6"])
        .await;
}

/// The low-water mark is 99, and 105 was sent ahead. 100 survives and 105 does not: the low-water
/// mark alone requires no gap, and the reissued 105 would be skipped as already sent.
#[tokio::test]
async fn an_id_sent_ahead_does_not_outlive_its_epoch() {
    let stage = stage().await;
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let mut other = Client::live(&hub, "bob").await;
    let kept = stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    stage.events("lost", 4, &[to("u:ann")]).await;
    let ahead = stage.event("ahead", &[urgent("u:ann")]).await;
    stage.fence(&mut other).await;
    client.expect(&["ahead"]).await;
    let start = client.cut();
    stage.server().fail_over();
    let again = stage.events("new", 6, &[to("u:ann")]).await;
    assert!(again.contains(&ahead));
    let mut client = Client::open(&hub, "ann", start);
    assert_eq!(client.gap().await, rewound(&stage, kept, ahead));
    client
        .expect(&["kept", "new1", "new2", "new3", "new4", "new5", "new6"])
        .await;
}

/// The replay has read the new epoch while the feed still holds notices of the old one. If the
/// stream acted on them, it would send their ids twice.
#[tokio::test]
async fn notices_of_an_older_epoch_still_in_the_feed_are_ignored() {
    for tick_comes_first in [false, true] {
        let stage = stage().await;
        let hub = stage.hub();
        let mut client = Client::live(&hub, "ann").await;
        stage.event("kept", &[to("u:ann")]).await;
        client.expect(&["kept"]).await;
        stage.server().snapshot();
        let own = target("u:ann");
        stage
            .puppet
            .sift(move |notice, _| match notice {
                Notice::Append { target, .. } if *target == own => Fate::Keep,
                // The node learns of the new epoch only from a head that its streams read or from a
                // tick.
                Notice::Tick { .. } if !tick_comes_first => Fate::Keep,
                _ => Fate::Pass,
            })
            .await;
        let lost = stage.event("lost", &[to("u:ann")]).await;
        until("the notice is held back", async || {
            stage.puppet.n_kept().await > 0
        })
        .await;
        let round = client.round(stage.p);
        stage.server().fail_over();
        if tick_comes_first {
            until("the node notices the new epoch", async || {
                client.round(stage.p) > round
            })
            .await;
        } else {
            client = client.back(&hub);
            assert!(matches!(client.frame().await, Frame::Cursor));
        }
        client.until_live().await;
        stage.puppet.release().await;
        assert_eq!(stage.event("new", &[to("u:ann")]).await, lost);
        client.expect(&["new"]).await;
    }
}

/// The first notice that a node receives carries an epoch that began after its streams had read the
/// previous one.
#[tokio::test]
async fn an_epoch_that_begins_before_the_first_notice_is_noticed() {
    let stage = stage().await;
    stage
        .puppet
        .sift(|notice, _| {
            if matches!(notice, Notice::Tick { .. }) {
                Fate::Drop
            } else {
                Fate::Pass
            }
        })
        .await;
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage.server().change_replid();
    stage.puppet.release().await;
    stage.event("new", &[to("u:ann")]).await;
    client.expect(&["new"]).await;
}

/// A stream reads its head from a former primary after its node has noticed the new epoch.
#[tokio::test]
async fn a_stream_that_starts_in_a_past_epoch_moves_to_the_present_one() {
    let stage = stage().await;
    let hub = stage.hub();
    let mut other = Client::live(&hub, "bob").await;
    let old = stage.head().await;
    stage.server().change_replid();
    stage.fence(&mut other).await;
    stage.puppet.answer_once(old);
    let mut client = Client::open(&hub, "ann", Start::Latest);
    assert!(matches!(client.frame().await, Frame::Cursor));
    stage.event("new", &[to("u:ann")]).await;
    client.expect(&["new"]).await;
}

/// The feed is still connected to a former primary on which another node ticks, while commands
/// reach the new primary. A tick of an older epoch does not count as a tick, so the feed is
/// reconnected after the usual silence.
#[tokio::test]
async fn ticks_of_an_older_epoch_do_not_keep_a_feed_connected() {
    let stage = stage().await;
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let old = stage.head().await;
    stage
        .puppet
        .sift(|notice, _| {
            if matches!(notice, Notice::Tick { .. } | Notice::Append { .. }) {
                Fate::Drop
            } else {
                Fate::Pass
            }
        })
        .await;
    stage.server().change_replid();
    // A second stream reads the new epoch.
    let _late = Client::live(&hub, "bob").await;
    stage.event("new", &[to("u:ann")]).await;
    until("the feed is reconnected", async || {
        stage
            .puppet
            .say(Notice::Tick {
                partition: stage.p,
                epoch: old.epoch,
                last: old.last,
            })
            .await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        stage.metrics.feed_resets.get() > 0
    })
    .await;
    client.expect(&["new"]).await;
}

/// A restart or a promotion between two slices of a plan that survives completely: nothing was
/// lost, although `last` does not yet cover the plan.
#[tokio::test]
async fn an_epoch_that_begins_within_a_plan_neither_repeats_the_event_nor_reports_a_gap() {
    let stage = stage().await;
    let hub = stage.hub();
    let mut open = Client::live(&hub, "ann").await;
    let mut away = Client::live(&hub, "ann").await;
    let plan = [to("u:ann u:ben")];
    stage.slice("large", &plan, &["u:ann"], 0, false).await;
    open.expect(&["large"]).await;
    away.expect(&["large"]).await;
    let away = away.cut();
    stage.server().change_replid();
    stage.slice("large", &plan, &["u:ben"], 1, true).await;
    stage.event("next", &[to("u:ann")]).await;
    open.expect(&["next"]).await;
    Client::open(&hub, "ann", away).expect(&["next"]).await;
}
