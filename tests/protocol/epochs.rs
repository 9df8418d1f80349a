//! Fail-overs that lose a tail: the ids of the lost are issued again, and who had them must be told before anything else comes under them.
//!
//! A fail-over is played on one Redis: its data becomes what a replica had, and its replication id another one. Ids are made to run
//! ahead of the clock, so that they are issued again number by number.

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

/// Ids up to 103 were sent, the new primary has ..101 and issues 102 again: every open stream would skip it, silently.
#[tokio::test]
async fn f08_an_open_stream_is_told_of_a_lost_tail_and_gets_what_comes_under_the_same_ids() {
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
            until("Redis is there again", async || {
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

/// The same for a cursor that comes back afterwards, if it stands above what survived; below it, nothing happened.
#[tokio::test]
async fn f08_a_cursor_above_what_survived_is_told_and_one_below_it_resumes_exactly() {
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

/// B is promoted, and dies; C, which never heard of B, is promoted: counted, both lives would be the second one. So lives have names.
#[tokio::test]
async fn h02_a_life_that_the_present_one_never_heard_of_is_no_history() {
    let stage = stage().await;
    let hub = stage.hub();
    let before = stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    stage.server().fail_over();
    let of_b = stage.head().await.life;
    let mut client = Client::live(&hub, "ann").await;
    let ids = stage.events("b", 2, &[to("u:ann")]).await;
    client.expect(&["b1", "b2"]).await;
    let start = client.cut();
    stage.server().fail_over();
    let head = stage.head().await;
    assert!(
        head.lives.iter().all(|(life, _)| *life != of_b),
        "{of_b} again: {:?}",
        head.lives
    );
    assert_eq!(head.last, before);
    assert_eq!(
        stage.events("c", 2, &[to("u:ann")]).await,
        ids,
        "the very same ids"
    );
    let mut client = Client::open(&hub, "ann", start);
    assert_eq!(
        client.gap().await,
        rewound(&stage, NotificationId(0), ids[1])
    );
    // All that there is comes after it: nobody knows what of it was had.
    let mut received = Vec::new();
    while received.len() < 3 {
        match client.frame().await {
            Frame::Event { id, .. } => received.push(id),
            Frame::Gap(gap) => assert_eq!(
                gap.reason,
                GapReason::Trimmed,
                "before the first of all is the floor"
            ),
            Frame::Cursor => {}
        }
    }
    assert_eq!(received, ["kept", "c1", "c2"]);
}

/// Two fail-overs since: what survived the second is more than what survived the first, and says nothing about it.
#[tokio::test]
async fn h03_the_life_after_ones_own_says_what_survived_and_not_the_newest() {
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

/// Low-water mark 99, 105 went ahead. 100 survives, 105 does not: the mark is no reason for a gap, and the new 105 would be skipped as had.
#[tokio::test]
async fn h04_an_id_that_went_ahead_does_not_outlive_its_life() {
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

/// The replay read the new life; the feed still holds notices of the old one. Sent, they would come again.
#[tokio::test]
async fn h05_notices_of_the_old_life_that_are_still_in_the_feed_are_ignored() {
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
                // The node knows of the new life only by what its streams read, or by a tick that it hears.
                Notice::Tick { .. } if !tick_comes_first => Fate::Keep,
                _ => Fate::Pass,
            })
            .await;
        let lost = stage.event("lost", &[to("u:ann")]).await;
        until("the notice is kept", async || {
            stage.puppet.n_kept().await > 0
        })
        .await;
        let round = client.round(stage.p);
        stage.server().fail_over();
        if tick_comes_first {
            until("the node knows of the new life", async || {
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

/// The first notice that a node hears at all is of a life that began after its streams had read theirs.
#[tokio::test]
async fn a_life_that_begins_before_the_node_hears_anything_is_noticed() {
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

/// A stream reads the head of a primary that is none any more, after its node has heard of the new life.
#[tokio::test]
async fn a_stream_that_begins_in_a_life_that_is_over_does_not_stay_there() {
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

/// The feed is left on a primary that is none any more, and somebody ticks there; the commands reach the new one. A tick of an older life is no
/// tick, so that the feed is made again after the usual silence.
#[tokio::test]
async fn h05_ticks_of_an_older_life_do_not_keep_a_feed() {
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
    // Somebody comes, and reads the new life.
    let _late = Client::live(&hub, "bob").await;
    stage.event("new", &[to("u:ann")]).await;
    until("the feed is made again", async || {
        stage
            .puppet
            .say(Notice::Tick {
                partition: stage.p,
                life: old.life,
                last: old.last,
            })
            .await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        stage.metrics.feed_resets.get() > 0
    })
    .await;
    client.expect(&["new"]).await;
}
