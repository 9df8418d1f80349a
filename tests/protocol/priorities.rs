//! Overtaking by priority, and states superseded by a later event with the same collapse key,
//! across disconnects and replays.

use pointsman::delivery::subscription::WINDOW;
use pointsman::event::{Priority, Route};

use super::fixture::{Client, Frame, Stage, keyed, to, until, urgent};
use super::on_each_broker;

on_each_broker! {
    an_older_state_is_not_sent_after_the_newer_one_that_overtook_it,
    a_state_sent_ahead_supersedes_older_states_on_earlier_pages,
    a_state_sent_ahead_supersedes_older_states_after_its_membership_has_ended,
    at_most_three_events_overtake_and_the_cursor_stays_exact,
    an_urgent_event_overtakes_a_replay_that_waits_for_its_socket,
    a_missed_urgent_event_arrives_before_the_other_missed_events,
    an_expired_event_is_not_sent_and_the_cursor_passes_it,
}

/// Fills the stream until it returns to replay. The replay then waits for the socket, because the
/// client takes no frames.
async fn overflow(stage: &Stage, other: &mut Client) {
    stage.events("filler", 5 * WINDOW, &[to("u:ann")]).await;
    until("the stream overflows", async || {
        stage.metrics.stream_overflows.get() > 0
    })
    .await;
    stage.fence(other).await;
}

/// Event 100 has a collapse key; urgent event 105 has the same key and overtakes it. The low-water
/// mark is then 99 with 105 sent ahead. If a resumed stream skipped 105 as already sent and
/// replayed 100, the client would end with the older state.
async fn an_older_state_is_not_sent_after_the_newer_one_that_overtook_it(stage: Stage) {
    for is_cut in [false, true] {
        let hub = stage.hub();
        let mut other = Client::live(&hub, "bob").await;
        let mut client = Client::live(&hub, "ann").await;
        let n_before = stage.metrics.stream_overflows.get();
        stage.events("filler", 5 * WINDOW, &[to("u:ann")]).await;
        until("the stream overflows", async || {
            stage.metrics.stream_overflows.get() > n_before
        })
        .await;
        stage.event("older", &[keyed("state", to("u:ann"))]).await;
        stage
            .event("newer", &[keyed("state", urgent("u:ann"))])
            .await;
        stage.fence(&mut other).await;
        client.expect(&["newer"]).await;
        if is_cut {
            client = client.back(&hub);
        }
        for k in 1..=5 * WINDOW {
            assert_eq!(client.event().await, format!("filler{k}"));
        }
        stage.event("last", &[to("u:ann")]).await;
        client.expect(&["last"]).await;
    }
}

/// The same with 105 several pages behind 100, so that the replay reaches 100 long before 105. The
/// replay therefore reads the records of ids sent ahead first.
async fn a_state_sent_ahead_supersedes_older_states_on_earlier_pages(stage: Stage) {
    let hub = stage.hub();
    let mut other = Client::live(&hub, "bob").await;
    let mut client = Client::live(&hub, "ann").await;
    stage
        .event(
            "older",
            &[keyed(
                "state",
                Route {
                    priority: Priority::Low,
                    ..to("u:ann")
                },
            )],
        )
        .await;
    overflow(&stage, &mut other).await;
    stage
        .event("newer", &[keyed("state", urgent("u:ann"))])
        .await;
    stage.fence(&mut other).await;
    client.expect(&["newer"]).await;
    let mut client = client.back(&hub);
    for k in 1..=5 * WINDOW {
        assert_eq!(client.event().await, format!("filler{k}"));
    }
    stage.event("last", &[to("u:ann")]).await;
    client.expect(&["last"]).await;
}

/// The newer state reached ann as a member of a group. She leaves the group and joins it again
/// before her client resumes, so her membership no longer covers that state: it was sent
/// nonetheless, and the older one must not follow it.
async fn a_state_sent_ahead_supersedes_older_states_after_its_membership_has_ended(stage: Stage) {
    stage.join("ann", "crew").await;
    let hub = stage.hub();
    let mut other = Client::live(&hub, "bob").await;
    let mut client = Client::live(&hub, "ann").await;
    overflow(&stage, &mut other).await;
    stage.event("older", &[keyed("state", to("u:ann"))]).await;
    stage
        .event("newer", &[keyed("state", urgent("g:crew"))])
        .await;
    stage.fence(&mut other).await;
    client.expect(&["newer"]).await;
    let cursor = client.cut();
    stage.leave("ann", "crew").await;
    stage.join("ann", "crew").await;
    let mut client = Client::open(&hub, "ann", cursor);
    for k in 1..=5 * WINDOW {
        assert_eq!(client.event().await, format!("filler{k}"));
    }
    stage.event("last", &[to("u:ann")]).await;
    client.expect(&["last"]).await;
}

/// Five urgent events follow three normal ones. Three of them overtake; then the low-water mark has
/// to move before another may. A client that is cut after any frame receives everything exactly
/// once.
async fn at_most_three_events_overtake_and_the_cursor_stays_exact(stage: Stage) {
    let hub = stage.hub();
    let mut other = Client::live(&hub, "bob").await;
    for n_taken in 0..8 {
        let mut client = Client::live(&hub, "ann").await;
        stage.events("normal", 3, &[to("u:ann")]).await;
        stage.events("urgent", 5, &[urgent("u:ann")]).await;
        stage.fence(&mut other).await;
        let mut received = Vec::new();
        for _ in 0..n_taken {
            received.push(client.event().await);
        }
        let mut client = client.back(&hub);
        stage.event("end", &[to("u:ann")]).await;
        loop {
            let event = client.event().await;
            if event == "end" {
                break;
            }
            received.push(event);
        }
        if n_taken == 7 {
            assert_eq!(received[..4], ["urgent1", "urgent2", "urgent3", "normal1"]);
        }
        received.sort_unstable();
        assert_eq!(
            received,
            [
                "normal1", "normal2", "normal3", "urgent1", "urgent2", "urgent3", "urgent4",
                "urgent5"
            ],
            "cut after {n_taken} frames"
        );
    }
}

/// A slow client is in replay most of the time; without this rule, an urgent event would wait for
/// everything before it.
async fn an_urgent_event_overtakes_a_replay_that_waits_for_its_socket(stage: Stage) {
    let hub = stage.hub();
    let mut other = Client::live(&hub, "bob").await;
    let mut client = Client::live(&hub, "ann").await;
    overflow(&stage, &mut other).await;
    stage.events("urgent", 3, &[urgent("u:ann")]).await;
    stage.fence(&mut other).await;
    client.expect(&["urgent1", "urgent2", "urgent3"]).await;
    for k in 1..=5 * WINDOW {
        assert_eq!(client.event().await, format!("filler{k}"));
    }
    client.until_live().await;
    stage.event("last", &[to("u:ann")]).await;
    client.expect(&["last"]).await;
}

/// All of them fit the queues of the stream, so none leaves before the replay has read the last.
async fn a_missed_urgent_event_arrives_before_the_other_missed_events(stage: Stage) {
    let hub = stage.hub();
    let missed = Client::live(&hub, "ann").await.cut();
    stage.events("missed", WINDOW - 2, &[to("u:ann")]).await;
    stage.event("urgent", &[urgent("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", missed);
    client.expect(&["urgent"]).await;
    for k in 1..=WINDOW - 2 {
        assert_eq!(client.event().await, format!("missed{k}"));
    }
}

/// Expiry is checked when an event is handled and again when it is sent: an event that expires in
/// the queue leaves it.
async fn an_expired_event_is_not_sent_and_the_cursor_passes_it(stage: Stage) {
    let hub = stage.hub();
    let mut other = Client::live(&hub, "bob").await;
    let client = Client::live(&hub, "ann").await;
    let soon = stage.head().await.now_ms + 300;
    let mortal = stage
        .event(
            "mortal",
            &[Route {
                expires_ms: Some(soon),
                ..to("u:ann")
            }],
        )
        .await;
    stage.fence(&mut other).await;
    // By the clock of the node, which may be behind that of the broker by the time of an answer.
    until("the event expires", async || hub.now_ms() > soon).await;
    stage.event("last", &[to("u:ann")]).await;
    let mut client = client;
    client.expect(&["last"]).await;
    assert!(client.low_water(stage.p) > mortal);
    match client.back(&hub).frame().await {
        Frame::Cursor => {}
        other => panic!("{other:?}"),
    }
}
