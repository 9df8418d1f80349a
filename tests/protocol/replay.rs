//! From history to live, while notices are lost, late or old.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman::broker::Notice;
use pointsman::delivery::subscription::{Rendered, Start, WINDOW};

use super::faulty_broker::{At, Fate, Op};
use super::fixture::{Client, Frame, SOON, Stage, to, until, urgent};
use super::on_each_broker;
use pointsman::event::{Priority, Route};

on_each_broker! {
    f09_an_event_by_two_groups_and_by_name_comes_once_live_in_replay_and_on_joining,
    f10_a_late_subscription_holds_the_cursor_back,
    f10_a_silent_feed_is_made_again_and_what_it_lost_is_sent,
    f10_a_log_followed_late_on_a_node_is_read_from_the_streams_own_mark,
    f17_a_stream_that_reads_slowly_gets_everything_with_at_most_three_overtakers,
    f20_a_client_that_received_nothing_resumes,
    f20_a_client_that_was_quiet_for_long_has_a_young_cursor,
    f21_a_record_is_parsed_and_rendered_once_for_all_streams,
    h06_a_tick_that_waited_does_not_make_old_notices_new,
    h06_a_tick_between_two_slices_does_not_bring_the_event_again,
    h16_a_sign_of_life_from_a_broker_that_cannot_write_moves_nothing,
    a_broker_that_fails_in_the_midst_of_a_replay_costs_nothing_and_doubles_nothing,
    a_live_record_that_cannot_be_read_is_read_again,
    a_reset_while_a_subscription_is_under_way_voids_it,
}

/// E is for g1 and g2, a copy in each log with an id of its own: who resumes at the first gets the second as well. Or joins g2 in between.
async fn f09_an_event_by_two_groups_and_by_name_comes_once_live_in_replay_and_on_joining(
    stage: Stage,
) {
    let hub = stage.hub();
    stage.join("ann", "g1").await;
    stage.join("ann", "g2").await;
    let mut client = Client::live(&hub, "ann").await;
    let plan = [
        to("g:g1"),
        Route {
            priority: Priority::High,
            ..to("g:g2 g:g3")
        },
        to("u:ann all"),
    ];
    stage.event("a", &plan).await;
    match client.frame().await {
        Frame::Event { id, priority, .. } => assert_eq!(
            (id.as_str(), priority),
            ("a", Priority::High),
            "the highest priority wins"
        ),
        other => panic!("{other:?}"),
    }
    stage.event("b", &[to("all")]).await;
    client.expect(&["b"]).await;
    let client = client.back(&hub);
    client.until_live().await;
    // While away: one more, and a group by which it comes, too.
    let start = client.cut();
    stage.event("c", &plan).await;
    stage.join("ann", "g3").await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["c"]).await;
    client.until_live().await;
    stage.event("d", &plan).await;
    client.expect(&["d"]).await;
}

/// A stream follows two logs. The connection was made again, and one of the two is not subscribed yet: its 105 is lost, 110 of the other
/// comes. A cursor of 110 would say that 105 was had.
async fn f10_a_late_subscription_holds_the_cursor_back(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage.event("before", &[to("u:ann")]).await;
    client.expect(&["before"]).await;
    // From here on the own log is not heard, and the answer that says it is stays away.
    let own = super::fixture::target("u:ann");
    stage
        .puppet
        .sift(move |notice, log| match notice {
            Notice::Following { .. } if log == Some(&own) => Fate::Keep,
            Notice::Append { target, .. } if *target == own => Fate::Drop,
            _ => Fate::Pass,
        })
        .await;
    stage
        .puppet
        .say(Notice::Reset {
            partitions: vec![stage.p],
        })
        .await;
    until("the answer is kept", async || {
        stage.puppet.n_kept().await > 0
    })
    .await;
    stage.event("lost", &[to("u:ann")]).await;
    let passed = stage.event("heard", &[to("all")]).await;
    stage.puppet.broker.tick(stage.p).await.expect("tick");
    // The other client says when all of that has been heard.
    let mut other = Client::open(&hub, "bob", Start::Earliest);
    other.expect(&["heard"]).await;
    stage.event("for bob", &[to("u:bob")]).await;
    other.expect(&["for bob"]).await;
    assert!(
        client.low_water(stage.p) < passed,
        "the mark passed what the other log has"
    );
    let start = client.cut();
    stage.puppet.release().await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["lost", "heard"]).await;
}

/// The connection is there and says nothing, ticks included. Nobody would ever know.
async fn f10_a_silent_feed_is_made_again_and_what_it_lost_is_sent(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage
        .puppet
        .sift(|notice, _| match notice {
            Notice::Append { .. } | Notice::Tick { .. } => Fate::Drop,
            _ => Fate::Pass,
        })
        .await;
    stage.event("lost", &[to("u:ann")]).await;
    client.expect(&["lost"]).await;
    stage.puppet.release().await;
    stage.event("heard", &[to("u:ann")]).await;
    client.expect(&["heard"]).await;
}

/// A node that follows a log from now on has seen nothing of it: what the stream has had is what counts, and not what this node saw last.
async fn f10_a_log_followed_late_on_a_node_is_read_from_the_streams_own_mark(stage: Stage) {
    let (here, there) = (stage.hub(), stage.another().await);
    let there = pointsman::delivery::hub::Hub::start(
        there,
        pointsman::telemetry::metrics::Metrics::default(),
        &pointsman::shutdown::Shutdown::new(),
    );
    let mut client = Client::live(&here, "ann").await;
    stage.event("a", &[to("u:ann")]).await;
    client.expect(&["a"]).await;
    let start = client.cut();
    // The other node hears of everyone's log, up to 110; the own log of the client nobody follows.
    let mut other = Client::live(&there, "bob").await;
    stage.event("b", &[to("u:ann")]).await;
    stage.event("c", &[to("all")]).await;
    other.expect(&["c"]).await;
    let mut client = Client::open(&there, "ann", start);
    client.expect(&["b", "c"]).await;
}

/// A slow stream sheds a low entry, and the three after it become the overtakers: nothing may pass until it is read again. So nothing is
/// shed: the stream goes back to replay, and lanes reorder only within its window.
async fn f17_a_stream_that_reads_slowly_gets_everything_with_at_most_three_overtakers(
    stage: Stage,
) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage
        .event(
            "low",
            &[Route {
                priority: Priority::Low,
                ..to("u:ann")
            }],
        )
        .await;
    let n_normal = 6 * WINDOW;
    stage.events("n", n_normal, &[to("u:ann")]).await;
    until("it overflowed", async || {
        stage.metrics.stream_overflows.get() > 0
    })
    .await;
    let mut received = Vec::new();
    while received.len() <= n_normal {
        received.push(client.event().await);
    }
    let at = received.iter().position(|id| id == "low").expect("it came");
    assert!(at <= 3, "{at} overtook it");
    received.remove(at);
    let expect: Vec<String> = (1..=n_normal).map(|k| format!("n{k}")).collect();
    assert_eq!(received, expect);
    client.until_live().await;
}

/// Connected, nothing received, cut: without an id the client would begin at the latest again, and lose what came between.
async fn f20_a_client_that_received_nothing_resumes(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    stage.event("a", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["a"]).await;
}

/// Nothing for this client for days: its mark moves with the ticks all the same, or its cursor would be older than what is kept.
async fn f20_a_client_that_was_quiet_for_long_has_a_young_cursor(stage: Stage) {
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let last = stage.event("for others", &[to("u:bob")]).await;
    until("the mark moves", async || {
        stage.puppet.broker.tick(stage.p).await.expect("tick");
        client.low_water(stage.p) >= last
    })
    .await;
}

/// What differs between streams is the id line. The rest is one piece of memory.
async fn f21_a_record_is_parsed_and_rendered_once_for_all_streams(stage: Stage) {
    let hub = stage.hub();
    let mut clients = [
        Client::live(&hub, "ann").await,
        Client::live(&hub, "bob").await,
    ];
    stage.event("a", &[to("all")]).await;
    let mut records = Vec::new();
    for client in &mut clients {
        let Frame::Event { record, .. } = client.frame().await else {
            panic!("an event comes")
        };
        records.push(record);
    }
    assert!(Arc::ptr_eq(&records[0], &records[1]));
    let n_rendered = AtomicUsize::new(0);
    for record in &records {
        record.rendered(0, |_| {
            n_rendered.fetch_add(1, Ordering::Relaxed);
            Rendered {
                before_target: "before".into(),
                after_target: "after".into(),
            }
        });
    }
    assert_eq!(n_rendered.into_inner(), 1);
    // From history it is the same one as well.
    let mut late = Client::open(&hub, "cid", Start::Earliest);
    late.until_live().await;
    loop {
        match late.frame().await {
            Frame::Event { record, .. } => break assert!(Arc::ptr_eq(&record, &records[0])),
            Frame::Cursor => {}
            Frame::Gap(gap) => panic!("{gap:?}"),
        }
    }
}

/// A tick (last = 100) waits in the feed while the replay reads up to 105; taken for the truth, it would make the notice of 105 behind it a new one.
async fn h06_a_tick_that_waited_does_not_make_old_notices_new(stage: Stage) {
    let hub = stage.hub();
    let mut keeper = Client::live(&hub, "ann").await;
    stage.event("a", &[to("u:ann")]).await;
    keeper.expect(&["a"]).await;
    let own = super::fixture::target("u:ann");
    stage
        .puppet
        .sift(move |notice, _| match notice {
            Notice::Tick { .. } => Fate::Keep,
            Notice::Append { target, .. } if *target == own => Fate::Keep,
            _ => Fate::Pass,
        })
        .await;
    stage.puppet.broker.tick(stage.p).await.expect("tick");
    until("a tick is kept", async || stage.puppet.n_kept().await > 0).await;
    stage.event("b", &[to("u:ann")]).await;
    until("the notice is kept", async || {
        stage.puppet.n_kept().await > 1
    })
    .await;
    let start = keeper.cut();
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["b"]).await;
    client.until_live().await;
    stage.puppet.release().await;
    stage.event("c", &[to("u:ann")]).await;
    client.expect(&["c"]).await;
}

/// A slice of a plan reaches ann by her own log, then a tick names the id before it, then another slice reaches her by her group's log. If a tick
/// could lower the mark, the event would be a new one.
async fn h06_a_tick_between_two_slices_does_not_bring_the_event_again(stage: Stage) {
    stage.join("ann", "ops").await;
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let plan = [to("u:ann g:ops")];
    stage.slice("large", &plan, &["u:ann"], 0, false).await;
    client.expect(&["large"]).await;
    stage.puppet.broker.tick(stage.p).await.expect("tick");
    stage.slice("large", &plan, &["g:ops"], 1, true).await;
    stage.event("next", &[to("u:ann")]).await;
    client.expect(&["next"]).await;
}

/// A broker that refuses writes cannot tick, and a node that hears no tick connects again and replays every stream. "Alive" counts as a tick for
/// the 3 s, and knows nothing of ids.
async fn h16_a_sign_of_life_from_a_broker_that_cannot_write_moves_nothing(stage: Stage) {
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
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
    let before = (client.low_water(stage.p), client.round(stage.p));
    stage.event("a", &[to("u:ann")]).await;
    // Longer than the silence that makes the feed be connected again.
    let quiet = tokio::time::Instant::now()
        + pointsman::delivery::hub::SILENCE
        + std::time::Duration::from_secs(2);
    while tokio::time::Instant::now() < quiet {
        stage.puppet.say(Notice::Alive { partition: stage.p }).await;
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    assert_eq!((client.low_water(stage.p), client.round(stage.p)), before);
    assert!(hub.silent().is_empty());
}

/// Some ids of a replay wait in the lanes, some were sent, then the broker does not answer for a while.
async fn a_broker_that_fails_in_the_midst_of_a_replay_costs_nothing_and_doubles_nothing(
    stage: Stage,
) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let n_events = 3 * WINDOW;
    stage.events("n", n_events, &[to("u:ann")]).await;
    // Each second window of records is lost, so that the lanes hold the one before it.
    let mut n_windows = 0;
    stage.puppet.lose(move |at| {
        n_windows += usize::from(at == At::Before(Op::Records));
        at == At::Before(Op::Records) && n_windows % 2 == 0
    });
    let mut client = Client::open(&hub, "ann", start);
    for k in 1..=n_events {
        assert_eq!(client.event().await, format!("n{k}"));
    }
    stage.puppet.lose(|_| false);
    client.until_live().await;
    stage.event("last", &[to("u:ann")]).await;
    client.expect(&["last"]).await;
}

/// The notice came without its record, and the record cannot be had just now: the mark must not pass it.
async fn a_live_record_that_cannot_be_read_is_read_again(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let stop = stage.puppet.stop(At::Before(Op::Records));
    // Too large to come along with its notice.
    let body = serde_json::value::RawValue::from_string(format!("\"{}\"", "x".repeat(20_000)))
        .expect("JSON");
    stage
        .event(
            "large",
            &[Route {
                body: Some(body),
                ..to("u:ann")
            }],
        )
        .await;
    stage.event("small", &[to("u:ann")]).await;
    stop.fail();
    client.expect(&["large", "small"]).await;
}

/// Asked to follow, and before it is in force the connection is lost: the answer to the old request must not count for the new one.
async fn a_reset_while_a_subscription_is_under_way_voids_it(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    // Somebody keeps the feed busy.
    let _keeper = Client::live(&hub, "bob").await;
    stage
        .puppet
        .sift(|notice, _| {
            if matches!(notice, Notice::Following { .. }) {
                Fate::Keep
            } else {
                Fate::Pass
            }
        })
        .await;
    let mut client = Client::open(&hub, "ann", start);
    until("it asked", async || stage.puppet.n_kept().await > 0).await;
    let round = client.round(stage.p);
    // Before the reset: the answers to what is asked because of it may come at any time after.
    let n_old = stage.puppet.n_kept().await;
    stage
        .puppet
        .say(Notice::Reset {
            partitions: vec![stage.p],
        })
        .await;
    until("the reset is heard", async || client.round(stage.p) > round).await;
    stage.event("a", &[to("u:ann")]).await;
    assert!(!client.is_live());
    until("it asked again", async || {
        stage.puppet.n_kept().await > n_old
    })
    .await;
    stage.puppet.release().await;
    tokio::time::timeout(SOON, client.expect(&["a"]))
        .await
        .expect("it comes");
    stage.event("b", &[urgent("u:ann")]).await;
    client.expect(&["b"]).await;
}
