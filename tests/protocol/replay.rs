//! The hand-over from replay to live while notices are lost, late or outdated.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman::broker::Notice;
use pointsman::delivery::subscription::{Rendered, Start, WINDOW};

use super::faulty_broker::{At, Fate, Op};
use super::fixture::{Client, Frame, SOON, Stage, to, until, urgent};
use super::on_each_broker;
use pointsman::event::{Priority, Route};

on_each_broker! {
    an_event_for_two_groups_and_a_user_is_sent_once_live_in_replay_and_on_joining,
    a_late_subscription_holds_the_cursor_back,
    a_silent_feed_is_reconnected_and_the_lost_events_are_sent,
    a_log_newly_followed_on_a_node_is_read_from_the_streams_low_water_mark,
    a_slow_stream_gets_everything_with_at_most_three_overtakers,
    a_client_that_received_no_event_resumes,
    the_cursor_of_a_quiet_client_moves_with_ticks,
    a_record_is_parsed_and_rendered_once_for_all_streams,
    a_delayed_tick_does_not_make_old_notices_new,
    a_tick_between_two_slices_does_not_repeat_the_event,
    an_alive_notice_keeps_the_feed_connected_and_moves_nothing,
    a_broker_failure_during_a_replay_loses_and_repeats_nothing,
    a_live_record_that_cannot_be_read_is_read_again_later,
    a_reset_voids_a_subscription_that_is_not_acknowledged_yet,
}

/// An event for g1 and g2 has one id in both logs. If each log had a copy with an id of its own, a
/// client that resumed after the first, or joined g2 in between, would get the second copy as well.
async fn an_event_for_two_groups_and_a_user_is_sent_once_live_in_replay_and_on_joining(
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
            "the route with the highest priority wins"
        ),
        other => panic!("{other:?}"),
    }
    stage.event("b", &[to("all")]).await;
    client.expect(&["b"]).await;
    let client = client.back(&hub);
    client.until_live().await;
    // While the client is disconnected, another event is committed and the user joins a third group
    // that it reaches.
    let start = client.cut();
    stage.event("c", &plan).await;
    stage.join("ann", "g3").await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["c"]).await;
    client.until_live().await;
    stage.event("d", &plan).await;
    client.expect(&["d"]).await;
}

/// A stream follows two logs. After a reconnect, one of them is not subscribed yet: its 105 is lost
/// while 110 of the other log arrives. A cursor of 110 would mark 105 as received.
async fn a_late_subscription_holds_the_cursor_back(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage.event("before", &[to("u:ann")]).await;
    client.expect(&["before"]).await;
    // From here on, no notice of the user's own log arrives, and the acknowledgement of its
    // subscription is held back.
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
    until("the acknowledgement is held back", async || {
        stage.puppet.n_kept().await > 0
    })
    .await;
    stage.event("lost", &[to("u:ann")]).await;
    let passed = stage.event("arrived", &[to("all")]).await;
    stage.puppet.broker.tick(stage.p).await.expect("tick");
    // The other client's events show when the node has received all of this.
    let mut other = Client::open(&hub, "bob", Start::Earliest);
    other.expect(&["arrived"]).await;
    stage.event("for bob", &[to("u:bob")]).await;
    other.expect(&["for bob"]).await;
    assert!(
        client.low_water(stage.p) < passed,
        "the low-water mark passed the event in the other log"
    );
    let start = client.cut();
    stage.puppet.release().await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["lost", "arrived"]).await;
}

/// The connection stays open but delivers nothing, ticks included. Only the missing ticks reveal
/// it.
async fn a_silent_feed_is_reconnected_and_the_lost_events_are_sent(stage: Stage) {
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
    stage.event("arrived", &[to("u:ann")]).await;
    client.expect(&["arrived"]).await;
}

/// A node that starts to follow a log has seen none of its entries: predecessors are compared with
/// the low-water mark of the stream and not with the last id that this node saw.
async fn a_log_newly_followed_on_a_node_is_read_from_the_streams_low_water_mark(stage: Stage) {
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
    // The other node has notices of everyone's log up to 110, but follows no log of this user.
    let mut other = Client::live(&there, "bob").await;
    stage.event("b", &[to("u:ann")]).await;
    stage.event("c", &[to("all")]).await;
    other.expect(&["c"]).await;
    let mut client = Client::open(&there, "ann", start);
    client.expect(&["b", "c"]).await;
}

/// If a slow stream dropped a low-priority entry, the next three entries would overtake it and
/// nothing could pass until it was read again. Streams therefore drop nothing: they return to
/// replay, and the priority queues reorder only within its window.
async fn a_slow_stream_gets_everything_with_at_most_three_overtakers(stage: Stage) {
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
    until("the stream overflows", async || {
        stage.metrics.stream_overflows.get() > 0
    })
    .await;
    let mut received = Vec::new();
    while received.len() <= n_normal {
        received.push(client.event().await);
    }
    let at = received
        .iter()
        .position(|id| id == "low")
        .expect("the low-priority event arrives");
    assert!(at <= 3, "{at} events overtook it");
    received.remove(at);
    let expect: Vec<String> = (1..=n_normal).map(|k| format!("n{k}")).collect();
    assert_eq!(received, expect);
    client.until_live().await;
}

/// The client is cut before it receives an event. Without an id from the first frame it would start
/// at the latest event again and lose the events in between.
async fn a_client_that_received_no_event_resumes(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    stage.event("a", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["a"]).await;
}

/// The low-water mark moves with ticks even if no event reaches this client; otherwise its cursor
/// would fall behind the retention.
async fn the_cursor_of_a_quiet_client_moves_with_ticks(stage: Stage) {
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let last = stage.event("for others", &[to("u:bob")]).await;
    until("the low-water mark moves", async || {
        stage.puppet.broker.tick(stage.p).await.expect("tick");
        client.low_water(stage.p) >= last
    })
    .await;
}

/// Only the id line differs between streams; they share the rest of the frame in memory.
async fn a_record_is_parsed_and_rendered_once_for_all_streams(stage: Stage) {
    let hub = stage.hub();
    let mut clients = [
        Client::live(&hub, "ann").await,
        Client::live(&hub, "bob").await,
    ];
    stage.event("a", &[to("all")]).await;
    let mut records = Vec::new();
    for client in &mut clients {
        let Frame::Event { record, .. } = client.frame().await else {
            panic!("expected an event")
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
    // A replay gets the same record as well.
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

/// A tick with last = 100 waits in the feed while the replay reads up to 105. Taken at face value,
/// it would make the notice of 105 behind it look new.
async fn a_delayed_tick_does_not_make_old_notices_new(stage: Stage) {
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
    until("a tick is held back", async || {
        stage.puppet.n_kept().await > 0
    })
    .await;
    stage.event("b", &[to("u:ann")]).await;
    until("the notice is held back", async || {
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

/// A slice of a plan reaches ann by her own log, then a tick carries the id before it, then another
/// slice reaches her by her group's log. If a tick could lower the highest handled id, the event
/// would be sent twice.
async fn a_tick_between_two_slices_does_not_repeat_the_event(stage: Stage) {
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

/// A broker that refuses writes cannot tick, and a node without ticks reconnects and replays every
/// stream. An "alive" notice counts as a tick for the silence limit, and moves no id.
async fn an_alive_notice_keeps_the_feed_connected_and_moves_nothing(stage: Stage) {
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
    // Longer than the silence after which the feed is reconnected.
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

/// Part of a replay is queued and part is sent when the broker stops answering for a while.
async fn a_broker_failure_during_a_replay_loses_and_repeats_nothing(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let n_events = 3 * WINDOW;
    stage.events("n", n_events, &[to("u:ann")]).await;
    // Every second window of records fails, so that the queues hold the one before it.
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

/// The notice arrives without its record, and reading the record fails at first: the low-water mark
/// must not pass it.
async fn a_live_record_that_cannot_be_read_is_read_again_later(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let stop = stage.puppet.stop(At::Before(Op::Records));
    // Too large to be inlined in its notice.
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

/// The connection is lost between a subscription and its acknowledgement: the acknowledgement of
/// the old request must not count for the new one.
async fn a_reset_voids_a_subscription_that_is_not_acknowledged_yet(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    // Another stream keeps the feed open.
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
    until("the stream subscribes", async || {
        stage.puppet.n_kept().await > 0
    })
    .await;
    let round = client.round(stage.p);
    // Counted before the reset, because acknowledgements of the requests that it causes may arrive
    // at any time afterwards.
    let n_old = stage.puppet.n_kept().await;
    stage
        .puppet
        .say(Notice::Reset {
            partitions: vec![stage.p],
        })
        .await;
    until("the stream handles the reset", async || {
        client.round(stage.p) > round
    })
    .await;
    stage.event("a", &[to("u:ann")]).await;
    assert!(!client.is_live());
    until("the stream subscribes again", async || {
        stage.puppet.n_kept().await > n_old
    })
    .await;
    stage.puppet.release().await;
    tokio::time::timeout(SOON, client.expect(&["a"]))
        .await
        .expect("the event arrives");
    stage.event("b", &[urgent("u:ann")]).await;
    client.expect(&["b"]).await;
}
