//! What history no longer holds is said, and nothing else is: logs that expire, are cut or come again while somebody reads them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman::broker::Retention;
use pointsman::delivery::subscription::{Gap, GapReason, Start};
use pointsman::event::NotificationId;

use super::faulty_broker::{At, Op};
use super::fixture::{Client, Frame, SOURCE, Stage, TAG, an_hour_ahead, now_ms, to, until};
use super::on_each_broker;

on_each_broker! {
    h10_joining_a_group_with_a_past_is_no_gap,
    h11_a_new_log_is_no_gap,
    h11_a_quiet_partition_is_no_gap,
    h11_a_first_connect_is_no_gap,
    from_the_earliest_nothing_is_missing,
    since_before_the_beginning_is_no_gap,
}

fn trimmed(stage: &Stage, from: NotificationId, to: NotificationId) -> Gap {
    Gap {
        partition: stage.p,
        reason: GapReason::Trimmed,
        from,
        to,
    }
}

/// A log expires, as by its age: it is gone, and the floor is above what it held.
fn expire(stage: &Stage, log: &str, floor: NotificationId) {
    let () = stage.server().command(&format!("DEL {TAG}l:{log}"));
    let () = stage
        .server()
        .command(&format!("HSET {TAG}meta floor0 {floor}"));
}

/// 101 to 105 are in the log, the client was at 100; the log expires. Reading it finds nothing, and that looks as if nothing had been there.
#[tokio::test]
async fn f11_a_log_that_expired_is_a_gap() {
    let stage = Stage::redis_with(
        &[SOURCE],
        Retention {
            max_age_s: 1,
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
    // Told once, and the cursor is past it.
    let mut client = client.back(&hub);
    stage.event("newer", &[to("u:ann")]).await;
    client.expect(&["newer"]).await;
}

/// The same, and a new entry has made the log again: that it has no predecessor must not read as if there had been none.
#[tokio::test]
async fn f11_a_log_that_expired_and_came_again_is_a_gap() {
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
    // The log of everyone is absent, too, and says nothing of what is below the floor.
    assert_eq!(gap, trimmed(&stage, begin, NotificationId(last.0 + 1)));
    client.expect(&["new"]).await;
}

/// The floor is read, and the log expires before its page is: the floor of before says that nothing is missing.
#[tokio::test]
async fn h09_a_log_that_expires_while_it_is_about_to_be_read_is_a_gap() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let begin = client.low_water(stage.p);
    let start = client.cut();
    let last = stage.event("a", &[to("u:ann")]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Page));
    let mut client = Client::open(&hub, "ann", start);
    stop.reached().await;
    expire(&stage, "u:ann", NotificationId(last.0 + 1));
    stop.go();
    assert_eq!(client.gap().await, trimmed(&stage, begin, last));
    client.until_live().await;
}

/// The top is read, the log expires and gets a new entry above the top: the key is there, nothing lies between cursor and top, no gap. So the
/// entry above the top counts, too, with what it says of its predecessor.
#[tokio::test]
async fn h09_a_log_that_comes_again_above_what_is_being_read_is_a_gap() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let begin = client.low_water(stage.p);
    let start = client.cut();
    let last = stage.event("a", &[to("u:ann")]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Page));
    let mut client = Client::open(&hub, "ann", start);
    stop.reached().await;
    expire(&stage, "u:ann", NotificationId(last.0 + 1));
    stage.event("b", &[to("u:ann")]).await;
    stop.go();
    let gap = client.gap().await;
    assert_eq!(gap, trimmed(&stage, begin, last));
    client.expect(&["b"]).await;
}

/// The log is cut between two of its pages: the first page's predecessor was right, the second's is not where the first ended.
#[tokio::test]
async fn h09_a_log_that_is_cut_between_two_pages_is_a_gap() {
    // A page has 256.
    const N: usize = 400;
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let start = Client::live(&hub, "ann").await.cut();
    let ids = stage.events("n", N, &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    // Until the first window is full nothing more is read; by then both logs had their first page.
    client.expect(&["n1"]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::Page));
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
    // What was read stays readable, what was cut is covered, and the rest comes.
    while received.last().is_none_or(|id| id != "n400") {
        received.push(client.event().await);
    }
    let expect: Vec<String> = (201..=256)
        .chain(301..=400)
        .map(|k| format!("n{k}"))
        .collect();
    assert_eq!(received, expect);
}

/// The ids are read, then a fail-over takes the newest of them: its record is gone, and so is the id. It never was, as far as anybody will know,
/// and to say that something is missing would be false.
#[tokio::test]
async fn h09_what_a_fail_over_takes_while_it_is_read_is_no_gap() {
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

/// The index has the id, and the record is gone, as where somebody deleted it.
#[tokio::test]
async fn a_record_that_is_gone_is_a_gap() {
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
    // A gap goes before whatever waits.
    received.sort_unstable();
    assert_eq!(received, ["gap", "n1", "n3"]);
}

/// Whether a fail-over took them is asked once for all that are read at a time: thousands may be gone at once, and each question is a script.
#[tokio::test]
async fn records_that_are_gone_cost_a_question_a_window() {
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
    assert!(n_heads < 10, "{n_heads} questions for 99 records");
}

/// Reading begins where the member joined, and the entry before the first one that is read lies above the cursor: nothing is missing.
async fn h10_joining_a_group_with_a_past_is_no_gap(stage: Stage) {
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

/// The first entry of a log has none before it, and points to the floor or, lower, to the last id: whoever had that has missed nothing.
async fn h11_a_new_log_is_no_gap(stage: Stage) {
    let hub = stage.hub();
    stage.event("for others", &[to("u:bob")]).await;
    let start = Client::live(&hub, "ann").await.cut();
    stage.event("first", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["first"]).await;
}

/// Nothing was committed for longer than anything is kept: the cursor is below the floor, and above it there is nothing.
async fn h11_a_quiet_partition_is_no_gap(stage: Stage) {
    stage.event("old", &[to("u:bob")]).await;
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let last = stage.head().await.last;
    // On a broker of this process time cannot be made to pass; there the same is asked of a floor that is where the partition began.
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

/// The first to come begins at the floor where nothing newer is there, and not at the last id below it.
async fn h11_a_first_connect_is_no_gap(stage: Stage) {
    let hub = stage.hub();
    let client = Client::live(&hub, "ann").await;
    let head = stage.head().await;
    assert_eq!(client.low_water(stage.p), head.last.max(head.floor));
    let mut client = client.back(&hub);
    stage.event("first", &[to("u:ann")]).await;
    client.expect(&["first"]).await;
}

/// Whoever asks for all that is kept is not told that there was more before it.
async fn from_the_earliest_nothing_is_missing(stage: Stage) {
    stage.events("n", 3, &[to("u:ann")]).await;
    let hub = stage.hub();
    let mut client = Client::open(&hub, "ann", Start::Earliest);
    client.expect(&["n1", "n2", "n3"]).await;
}

/// A partition that is younger than what is asked for has nothing before its beginning.
async fn since_before_the_beginning_is_no_gap(stage: Stage) {
    stage.events("n", 3, &[to("u:bob")]).await;
    let hub = stage.hub();
    let mut client = Client::open(&hub, "ann", Start::Since(now_ms() - 3_600_000));
    assert!(matches!(client.frame().await, Frame::Cursor));
    client.until_live().await;
    stage.event("first", &[to("u:ann")]).await;
    client.expect(&["first"]).await;
}

/// The clock runs ahead by days and is set back: the floor stays above all that the clock now says. What is committed then must lie above it, or
/// every stream that began at the floor would pass it over.
#[tokio::test]
async fn an_id_lies_above_the_floor_whatever_the_clock_does() {
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
