//! What overtakes, and what a later state makes superfluous, over cuts and replays.

use pointsman::delivery::subscription::WINDOW;
use pointsman::event::{Priority, Route};

use super::fixture::{Client, Frame, Stage, keyed, to, until, urgent};
use super::on_each_broker;

on_each_broker! {
    f23_an_older_state_does_not_come_after_the_newer_one_that_overtook_it,
    h15_a_state_that_was_had_supersedes_older_ones_pages_before_it,
    at_most_three_overtake_and_the_cursor_is_exact_when_they_do,
    an_urgent_event_goes_ahead_of_a_replay_that_waits_for_its_socket,
    what_has_expired_is_not_sent_and_the_cursor_passes_it,
}

/// Fills the stream until it goes back to replay, which then waits for the socket: nobody takes anything.
async fn overflow(stage: &Stage, other: &mut Client) {
    stage.events("filler", 5 * WINDOW, &[to("u:ann")]).await;
    until("it overflows", async || {
        stage.metrics.stream_overflows.get() > 0
    })
    .await;
    stage.fence(other).await;
}

/// 100 has a key, urgent 105 has the same and goes ahead: the mark is 99, and 105 was had. Cut and resumed, 105 is skipped as had, and 100 would be
/// the last word.
async fn f23_an_older_state_does_not_come_after_the_newer_one_that_overtook_it(stage: Stage) {
    for is_cut in [false, true] {
        let hub = stage.hub();
        let mut other = Client::live(&hub, "bob").await;
        let mut client = Client::live(&hub, "ann").await;
        let n_before = stage.metrics.stream_overflows.get();
        stage.events("filler", 5 * WINDOW, &[to("u:ann")]).await;
        until("it overflows", async || {
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

/// The same where 105 lies pages behind 100, so that the replay reaches 100 long before 105. Its record is read first.
async fn h15_a_state_that_was_had_supersedes_older_ones_pages_before_it(stage: Stage) {
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

/// Five urgent ones behind three normal: three of them go ahead, then the mark has to move before another may. Cut after each frame, the client
/// has everything once.
async fn at_most_three_overtake_and_the_cursor_is_exact_when_they_do(stage: Stage) {
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
            "cut after {n_taken}"
        );
    }
}

/// A client that reads slowly is in replay nearly always; what is urgent for it would wait for all the rest.
async fn an_urgent_event_goes_ahead_of_a_replay_that_waits_for_its_socket(stage: Stage) {
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

/// Judged when it is handled and again when it is sent: what expires in the lane leaves it.
async fn what_has_expired_is_not_sent_and_the_cursor_passes_it(stage: Stage) {
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
    until("it is past", async || stage.head().await.now_ms > soon).await;
    stage.event("last", &[to("u:ann")]).await;
    let mut client = client;
    client.expect(&["last"]).await;
    assert!(client.low_water(stage.p) > mortal);
    match client.back(&hub).frame().await {
        Frame::Cursor => {}
        other => panic!("{other:?}"),
    }
}
