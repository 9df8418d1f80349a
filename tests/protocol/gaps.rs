//! Gaps. A stream announces history that is no longer kept, and announces nothing else: logs
//! expire, are trimmed, or are created again while streams read them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman::broker::Retention;
use pointsman::delivery::subscription::{Gap, GapReason, Start};
use pointsman::event::NotificationId;

use super::faulty_broker::{At, Op};
use super::fixture::{Client, Frame, SOURCE, Stage, TAG, an_hour_ahead, now_ms, to, until};
use super::on_each_broker;

on_each_broker! {
    joining_a_group_with_earlier_events_is_not_a_gap,
    a_new_log_is_not_a_gap,
    a_quiet_partition_is_not_a_gap,
    a_quiet_partition_is_not_a_gap_after_its_next_event,
    a_first_connect_is_not_a_gap,
    a_stream_from_the_earliest_event_has_no_gap,
    a_stream_from_the_earliest_event_that_is_cut_before_it_has_no_gap,
    a_stream_since_before_the_partition_began_has_no_gap,
}

fn trimmed(stage: &Stage, from: NotificationId, to: NotificationId) -> Gap {
    Gap {
        partition: stage.p,
        reason: GapReason::Trimmed,
        from,
        to,
    }
}

/// Expires a log as its age would: the key is gone, and the floor lies above its last entry.
fn expire(stage: &Stage, log: &str, floor: NotificationId) {
    let () = stage.server().command(&format!("DEL {TAG}l:{log}"));
    let () = stage
        .server()
        .command(&format!("HSET {TAG}meta floor0 {floor}"));
}

/// Entries 101 to 105 are in the log and the client is at 100 when the log expires. Reading it then
/// finds nothing, as if nothing had been there.
#[tokio::test]
async fn an_expired_log_is_announced_as_a_gap() {
    let stage = Stage::redis_with(
        &[SOURCE],
        Retention {
            max_age: std::time::Duration::from_secs(1),
            ..Retention::default()
        },
    )
    .await;
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let last = *stage
        .events("n", 5, &[to("u:ann")])
        .await
        .last()
        .expect("five");
    until("the log expires", async || {
        stage
            .server()
            .command::<i64>(&format!("EXISTS {TAG}l:u:ann"))
            == 0
    })
    .await;
    let mut client = Client::open(&hub, "ann", start);
    let gap = client.gap().await;
    assert!(
        gap.reason == GapReason::Trimmed && gap.to >= last,
        "{gap:?}"
    );
    stage.event("new", &[to("u:ann")]).await;
    client.expect(&["new"]).await;
    // The gap is announced once; the cursor is past it.
    let mut client = client.back(&hub);
    stage.event("newer", &[to("u:ann")]).await;
    client.expect(&["newer"]).await;
}

/// The same after a new entry created the log again. A missing predecessor must not read as if
/// there had been no earlier entry.
#[tokio::test]
async fn a_log_that_expired_and_was_created_again_is_announced_as_a_gap() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let begin = client.low_water(stage.p);
    let start = client.cut();
    let last = *stage
        .events("n", 5, &[to("u:ann")])
        .await
        .last()
        .expect("five");
    expire(&stage, "u:ann", NotificationId(last.0 + 1));
    stage.event("new", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    let gap = client.gap().await;
    // The log of everyone is absent, too, and shows nothing below the floor.
    assert_eq!(gap, trimmed(&stage, begin, NotificationId(last.0 + 1)));
    client.expect(&["new"]).await;
}

/// The log expires after the floor was read and before its page is. Compared with the earlier
/// floor, nothing would seem to be missing.
#[tokio::test]
async fn a_log_that_expires_just_before_it_is_read_is_announced_as_a_gap() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let begin = client.low_water(stage.p);
    let start = client.cut();
    let last = stage.event("a", &[to("u:ann")]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Pages));
    let mut client = Client::open(&hub, "ann", start);
    stop.reached().await;
    expire(&stage, "u:ann", NotificationId(last.0 + 1));
    stop.go();
    assert_eq!(client.gap().await, trimmed(&stage, begin, last));
    client.until_live().await;
}

/// After the top was read, the log expires and gets a new entry above the top: the key exists and
/// the range between cursor and top is empty, so no gap would be announced. The predecessor of the
/// first entry above the top therefore counts, too.
#[tokio::test]
async fn a_log_created_again_above_the_top_of_the_replay_is_announced_as_a_gap() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let begin = client.low_water(stage.p);
    let start = client.cut();
    let last = stage.event("a", &[to("u:ann")]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Pages));
    let mut client = Client::open(&hub, "ann", start);
    stop.reached().await;
    expire(&stage, "u:ann", NotificationId(last.0 + 1));
    stage.event("b", &[to("u:ann")]).await;
    stop.go();
    let gap = client.gap().await;
    assert_eq!(gap, trimmed(&stage, begin, last));
    client.expect(&["b"]).await;
}

/// The log is trimmed between two of its pages: the predecessor of the first page was right, that
/// of the second is not the last entry of the first.
#[tokio::test]
async fn a_log_trimmed_between_two_pages_is_announced_as_a_gap() {
    // A page has 256 entries.
    const N: usize = 400;
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let ids = stage.events("n", N, &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    // The replay pauses while a window waits in the queue; by then it has read the first page of
    // both logs.
    client.expect(&["n1"]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Pages));
    let mut received = Vec::new();
    for k in 2..=200 {
        assert_eq!(client.event().await, format!("n{k}"));
    }
    stop.reached().await;
    let () = stage
        .server()
        .command(&format!("ZREMRANGEBYRANK {TAG}l:u:ann 0 299"));
    stop.go();
    let gap = loop {
        match client.frame().await {
            Frame::Event { id, .. } => received.push(id),
            Frame::Gap(gap) => break gap,
            Frame::Cursor => {}
        }
    };
    assert_eq!(gap.to, ids[299]);
    assert!(gap.from <= ids[255], "{gap:?}");
    // Entries read before are still sent, the trimmed ones are covered by the gap, and the rest
    // follows.
    while received.last().is_none_or(|id| id != "n400") {
        received.push(client.event().await);
    }
    let expect: Vec<String> = (201..=256)
        .chain(301..=400)
        .map(|k| format!("n{k}"))
        .collect();
    assert_eq!(received, expect);
}

/// A fail-over takes the newest id after its page was read: the record and the id are gone. In the
/// new history the event never existed, so announcing a gap would be false.
#[tokio::test]
async fn an_event_lost_in_a_fail_over_during_its_replay_is_not_a_gap() {
    let stage = Stage::redis().await;
    stage.number_ids();
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    stage.event("lost", &[to("u:ann")]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Records));
    let mut client = Client::open(&hub, "ann", start);
    stop.reached().await;
    stage.server().fail_over();
    stop.go();
    client.expect(&["kept"]).await;
    stage.event("new", &[to("u:ann")]).await;
    client.expect(&["new"]).await;
}

/// The log has the id but its record is gone, for example deleted by hand.
#[tokio::test]
async fn a_missing_record_is_announced_as_a_gap() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let ids = stage.events("n", 3, &[to("u:ann")]).await;
    let () = stage.server().command(&format!("DEL {TAG}e:{}", ids[1]));
    let mut client = Client::open(&hub, "ann", start);
    let mut received = Vec::new();
    while received.len() < 3 {
        match client.frame().await {
            Frame::Event { id, .. } => received.push(id),
            Frame::Gap(gap) => {
                assert_eq!(gap, trimmed(&stage, NotificationId(ids[1].0 - 1), ids[1]));
                received.push("gap".into());
            }
            Frame::Cursor => {}
        }
    }
    // A gap is sent before queued events.
    received.sort_unstable();
    assert_eq!(received, ["gap", "n1", "n3"]);
}

/// A missing record may be due to a fail-over, so the head is read again before a gap is announced:
/// once per window and not per record, because thousands may be missing at once and each head is a
/// script call.
#[tokio::test]
async fn missing_records_cost_one_head_per_window() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let ids = stage.events("n", 100, &[to("u:ann")]).await;
    let gone: Vec<String> = ids[..99].iter().map(|id| format!("{TAG}e:{id}")).collect();
    let () = stage.server().command(&format!("DEL {}", gone.join(" ")));
    let n_heads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_heads);
    stage.puppet.lose(move |at| {
        counted.fetch_add(usize::from(at == At::Before(Op::Head)), Ordering::Relaxed);
        false
    });
    let mut client = Client::open(&hub, "ann", start);
    while !matches!(client.frame().await, Frame::Event { id, .. } if id == "n100") {}
    let n_heads = n_heads.load(Ordering::Relaxed);
    assert!(
        n_heads < 10,
        "{n_heads} heads were read for 99 missing records"
    );
}

/// A group's log is read from the id of joining, and its first entry's predecessor lies above the
/// cursor. Nothing is missing.
async fn joining_a_group_with_earlier_events_is_not_a_gap(stage: Stage) {
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    stage.events("past", 3, &[to("g:ops")]).await;
    stage.join("ann", "ops").await;
    stage.event("first", &[to("g:ops")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["first"]).await;
    stage.event("second", &[to("g:ops")]).await;
    client.expect(&["second"]).await;
}

/// The predecessor of the first entry of a log is the floor or the last id, whichever is lower: a
/// client that had received everything until then has missed nothing.
async fn a_new_log_is_not_a_gap(stage: Stage) {
    let hub = stage.hub();
    stage.event("for others", &[to("u:bob")]).await;
    let start = Client::live(&hub, "ann").await.cut();
    stage.event("first", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["first"]).await;
}

/// Nothing was committed for longer than the retention: the cursor is below the floor, and there is
/// nothing above it.
async fn a_quiet_partition_is_not_a_gap(stage: Stage) {
    stage.event("old", &[to("u:bob")]).await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let last = stage.head().await.last;
    // The embedded broker has no way to let time pass; there the floor stays where the partition
    // began.
    if stage.is_redis() {
        let () = stage
            .server()
            .command(&format!("HSET {TAG}meta floor0 {}", last.0 + 1));
    }
    let mut client = client.back(&hub);
    assert!(matches!(client.frame().await, Frame::Cursor));
    client.until_live().await;
    stage.event("new", &[to("u:ann")]).await;
    client.expect(&["new"]).await;
}

/// As above, but the next event is committed while the client is away. The log of everyone was
/// never written to, which looks like a log that expired to a client that stands below the floor.
async fn a_quiet_partition_is_not_a_gap_after_its_next_event(stage: Stage) {
    stage.event("old", &[to("u:bob")]).await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let last = stage.head().await.last;
    if stage.is_redis() {
        let () = stage
            .server()
            .command(&format!("HSET {TAG}meta floor0 {}", last.0 + 1));
    }
    let mut client = client.back(&hub);
    client.until_live().await;
    assert!(matches!(client.frame().await, Frame::Cursor));
    client.take_cursor().await;
    let start = client.cut();
    stage.event("new", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["new"]).await;
}

/// The first stream of a new partition starts at the floor if the last id lies below it.
async fn a_first_connect_is_not_a_gap(stage: Stage) {
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let head = stage.head().await;
    assert_eq!(client.low_water(stage.p), head.last.max(head.floor));
    let mut client = client.back(&hub);
    stage.event("first", &[to("u:ann")]).await;
    client.expect(&["first"]).await;
}

/// A client that starts at the earliest event gets no gap for events trimmed before it.
async fn a_stream_from_the_earliest_event_has_no_gap(stage: Stage) {
    stage.events("n", 3, &[to("u:ann")]).await;
    let hub = stage.hub();
    let mut client = Client::open(&hub, "ann", Start::Earliest);
    client.expect(&["n1", "n2", "n3"]).await;
}

/// The client resumes where nothing was received: it still requests the earliest.
async fn a_stream_from_the_earliest_event_that_is_cut_before_it_has_no_gap(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::open(&hub, "ann", Start::Earliest);
    assert!(matches!(client.frame().await, Frame::Cursor));
    let start = client.cut();
    stage.event("first", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["first"]).await;
}

/// A partition younger than the requested time has nothing before its beginning.
async fn a_stream_since_before_the_partition_began_has_no_gap(stage: Stage) {
    stage.events("n", 3, &[to("u:bob")]).await;
    let hub = stage.hub();
    let mut client = Client::open(&hub, "ann", Start::Since(now_ms() - 3_600_000));
    assert!(matches!(client.frame().await, Frame::Cursor));
    client.until_live().await;
    stage.event("first", &[to("u:ann")]).await;
    client.expect(&["first"]).await;
}

/// The clock ran days ahead and was set back, so the floor lies above every id that the clock now
/// gives. New ids must lie above the floor; otherwise every stream that started at the floor would
/// skip them.
#[tokio::test]
async fn new_ids_lie_above_the_floor_after_the_clock_is_set_back() {
    let stage = Stage::redis().await;
    let floor = an_hour_ahead();
    let () = stage
        .server()
        .command(&format!("HSET {TAG}meta floor0 {floor}"));
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    assert!(stage.event("a", &[to("u:ann")]).await > floor);
    client.expect(&["a"]).await;
}
