//! Cursors: they are small, belong to one user, and also resume on partitions added since.

use pointsman::broker::{Partitions as _, Retention, Sources as _};
use pointsman::delivery::hub::Hub;
use pointsman::delivery::subscription::Start;
use pointsman::delivery::subscription::cursor::{Cursor, CursorError};
use pointsman::event::PartitionNumber;
use pointsman::shutdown::Shutdown;
use pointsman::telemetry::metrics::Metrics;

use super::fixture::{Client, Frame, SOURCE, Stage, TAG, name, next_entry, to, urgent};
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::sse::Request;

/// One position per log or shard would not fit the id that browsers send back. A cursor has one
/// position per partition, and groups add nothing to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_over_eight_partitions_with_three_ids_sent_ahead_has_126_characters() {
    let sources: Vec<String> = (0..8).map(|k| format!("pointsman:{k}")).collect();
    let stage = Stage::embedded_with(
        &sources.iter().map(String::as_str).collect::<Vec<_>>(),
        Retention::default(),
    )
    .await;
    for k in 0..300 {
        stage.join("ann", &format!("group{k}")).await;
    }
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    let mut other = Client::live(&hub, "bob").await;
    for number in 0..8 {
        let (normal, urgent) = ([to("g:group7")], [urgent("g:group7")]);
        stage
            .commit_in(
                PartitionNumber(number),
                &[("normal", &normal), ("urgent", &urgent)],
            )
            .await;
        // Both clients share one feed, so `bob` receiving the fence shows that `ann`'s stream saw
        // the events before it.
        stage
            .commit_in(PartitionNumber(number), &[("fence", &[to("u:bob")])])
            .await;
        other.expect(&["fence"]).await;
    }
    client.expect(&["urgent", "urgent", "urgent"]).await;
    let cursor = client.cursor.as_deref().expect("a cursor");
    assert_eq!(cursor.len(), 126);
    assert!(
        cursor
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'),
        "{cursor}"
    );
    let read = Cursor::decode(cursor, &name("ann")).expect("its own");
    assert_eq!((read.positions.len(), read.sent_ahead.len()), (8, 3));
    let mut client = client.back(&hub);
    let mut received = Vec::new();
    for _ in 0..13 {
        received.push(client.event().await);
    }
    received.sort_unstable();
    assert_eq!(
        received,
        [["normal"; 8].as_slice(), &["urgent"; 5]].concat()
    );
}

/// A Redis stream per recipient would take 4 KB before it holds anything; a log is an index in a
/// sorted set.
#[tokio::test]
async fn a_log_with_one_entry_takes_less_than_300_bytes() {
    let stage = Stage::redis().await;
    stage.event("a", &[to("u:ann")]).await;
    let n_bytes: u64 = stage
        .server()
        .command(&format!("MEMORY USAGE {TAG}l:u:ann"));
    assert!(n_bytes < 300, "{n_bytes}");
    stage.events("n", 19, &[to("u:ann")]).await;
    let n_bytes: u64 = stage
        .server()
        .command(&format!("MEMORY USAGE {TAG}l:u:ann"));
    assert!(n_bytes < 1_500, "{n_bytes}");
}

/// If users were hashed over shards, every user would move when the number of shards changes.
/// Partitions are the sources, and a partition added after the cursor was written is read from its
/// beginning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_added_partition_is_read_from_its_beginning() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    let mut client = Client::live(&hub, "ann").await;
    stage.event("a", &[to("u:ann")]).await;
    client.expect(&["a"]).await;
    let start = client.cut();
    let wider = stage
        .another_with(&[SOURCE.into(), "pointsman:added".into()])
        .await;
    let added = wider.partitions().last().expect("two").number;
    let head = wider.head(added).await.expect("head");
    let item = stage.item(
        next_entry(head.position.entry),
        "in the new one",
        &[to("u:ann")],
    );
    let batch = pointsman::broker::Batch {
        epoch: head.epoch,
        prev: head.position,
        items: vec![item],
    };
    wider.commit(added, batch).await.expect("commit");
    stage.event("in the old one", &[to("u:ann")]).await;
    let hub = Hub::start(wider, Metrics::default(), &Shutdown::new());
    let mut client = Client::open(&hub, "ann", start);
    let mut received = [client.event().await, client.event().await];
    received.sort_unstable();
    assert_eq!(received, ["in the new one", "in the old one"]);
    // A cursor that names a partition removed since is still valid.
    let start = client.cut();
    let hub = stage.hub();
    stage.event("b", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", start);
    client.expect(&["b"]).await;
}

/// Two users share a browser. The cursor that the first left behind does not describe the second,
/// and would skip that user's backlog.
#[test]
fn the_cursor_of_another_user_is_ignored() {
    let node = Node::builder().start();
    let mut alice = node.stream("alice");
    let publish = |id: &str| {
        node.publisher()
            .publish(&[event(id, "t", serde_json::json!({ "everyone": true }))])
    };
    publish("a");
    alice.next_notification(SOON);
    let left_behind = alice.last_event_id().to_owned();
    assert_eq!(
        Cursor::decode(&left_behind, &name("bob")),
        Err(CursorError::OtherUser)
    );
    publish("b");
    alice.next_notification(SOON);
    let mut bob = Request::new(node.addr(), "user=bob")
        .last_event_id(&left_behind)
        .open(SOON)
        .expect("a stream");
    bob.next_state("cursor", SOON);
    publish("c");
    assert_eq!(
        bob.next_notification(SOON).id,
        "c",
        "the stream starts at the latest event"
    );
}

/// A client that names an unknown start gets a gap, and then the events from now on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_start_is_a_gap_and_then_the_latest() {
    let stage = Stage::redis().await;
    let hub = stage.hub();
    stage.event("before", &[to("u:ann")]).await;
    let mut client = Client::open(&hub, "ann", Start::Unknown);
    assert_eq!(client.gap().await.reason.as_str(), "unknown");
    assert!(matches!(client.frame().await, Frame::Cursor));
    stage.event("after", &[to("u:ann")]).await;
    client.expect(&["after"]).await;
}
