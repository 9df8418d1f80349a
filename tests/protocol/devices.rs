//! Device cursors and the read marker: acknowledgements that race each other and the start of a
//! stream, the trimming of acknowledged events, and fail-overs.

use std::sync::Arc;

use pointsman::broker::{Broker, CursorOwner, Retention};
use pointsman::delivery::device_cursors::{AcknowledgeError, DeviceCursors};
use pointsman::delivery::subscription::cursor::{Cursor, SentAhead, SentRoute};
use pointsman::delivery::subscription::{GapReason, Start};
use pointsman::event::{NotificationId, PartitionNumber};

use super::faulty_broker::{At, Op, Puppet};
use super::fixture::{Client, SOURCE, Stage, name, to};
use super::on_each_broker;

on_each_broker! {
    a_device_without_acknowledgements_starts_where_it_first_started,
    a_device_starts_after_its_furthest_acknowledgement,
    an_overtaken_acknowledgement_does_not_move_the_device_cursor_back,
    an_acknowledgement_whose_reply_was_lost_can_be_repeated,
    a_stream_that_starts_while_its_device_acknowledges_misses_nothing,
    two_first_streams_of_a_device_that_race_start_at_the_same_position,
    in_sync_an_acknowledgement_counts_for_all_devices_and_a_first_start_for_none,
    ids_that_are_not_issued_yet_cannot_be_acknowledged,
    an_acknowledged_id_that_was_sent_ahead_is_remembered,
}

fn device_cursors(puppet: &Arc<Puppet>) -> DeviceCursors {
    DeviceCursors::new(Arc::clone(puppet) as Arc<dyn Broker>)
}

fn device(text: &str) -> CursorOwner {
    CursorOwner::Device(name(text))
}

fn cursor(start: &Start) -> Cursor {
    match start {
        Start::Cursor(cursor) => cursor.clone(),
        other => panic!("expected a cursor, got {other:?}"),
    }
}

fn sent(partition: PartitionNumber, id: NotificationId) -> SentAhead {
    SentAhead {
        partition,
        id,
        route: SentRoute::new(0),
    }
}

impl Stage {
    fn device_cursors(&self) -> DeviceCursors {
        device_cursors(&self.puppet)
    }
}

async fn acknowledge(device_cursors: &DeviceCursors, of: &str, place: &Start) {
    device_cursors
        .acknowledge(&name("ann"), &cursor(place), &[device(of)])
        .await
        .expect("the acknowledgement is accepted");
}

async fn start(device_cursors: &DeviceCursors, of: &str) -> Start {
    device_cursors
        .start(&name("ann"), name(of), false, None)
        .await
        .expect("a start")
}

async fn start_in_sync(device_cursors: &DeviceCursors, of: &str) -> Start {
    device_cursors
        .start(&name("ann"), name(of), true, None)
        .await
        .expect("a start")
}

/// The cursor of one of ann's clients that starts at `start` and then receives exactly these
/// events.
async fn having(stage: &Stage, start: Start, events: &[&str]) -> Start {
    let mut client = Client::open(&stage.hub(), "ann", start);
    client.expect(events).await;
    client.cut()
}

async fn a_device_without_acknowledgements_starts_where_it_first_started(stage: Stage) {
    let device_cursors = stage.device_cursors();
    stage.event("before", &[to("u:ann")]).await;
    let first = start(&device_cursors, "phone").await;
    stage.event("at night", &[to("u:ann")]).await;
    let another = self::device_cursors(&stage.another().await);
    assert_eq!(start(&another, "phone").await, first);
    having(&stage, start(&another, "phone").await, &["at night"]).await;
    // Another device starts now.
    stage.event("later", &[to("u:ann")]).await;
    let other = start(&device_cursors, "tablet").await;
    stage.event("last", &[to("u:ann")]).await;
    having(&stage, other, &["last"]).await;
}

async fn a_device_starts_after_its_furthest_acknowledgement(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.events("e", 4, &[to("u:ann")]).await;
    let second = having(&stage, first.clone(), &["e1", "e2"]).await;
    let third = having(&stage, second.clone(), &["e3"]).await;
    // The order of the acknowledgements does not matter.
    for place in [&third, &second, &first] {
        acknowledge(&device_cursors, "phone", place).await;
    }
    having(&stage, start(&device_cursors, "phone").await, &["e4"]).await;
}

/// The slower acknowledgement has read the device cursor and writes only after another one has
/// moved it further.
async fn an_overtaken_acknowledgement_does_not_move_the_device_cursor_back(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.events("e", 3, &[to("u:ann")]).await;
    let near = having(&stage, first.clone(), &["e1"]).await;
    let far = having(&stage, near.clone(), &["e2"]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::MoveDeviceCursor));
    let slow = tokio::spawn({
        let (device_cursors, near) = (device_cursors.clone(), near.clone());
        async move { acknowledge(&device_cursors, "phone", &near).await }
    });
    stop.reached().await;
    acknowledge(&self::device_cursors(&stage.another().await), "phone", &far).await;
    stop.go();
    slow.await.expect("the acknowledgement is accepted");
    assert_eq!(start(&device_cursors, "phone").await, far);
    having(&stage, far, &["e3"]).await;
}

async fn an_acknowledgement_whose_reply_was_lost_can_be_repeated(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.events("e", 2, &[to("u:ann")]).await;
    let place = having(&stage, first, &["e1"]).await;
    let mut stop = stage.puppet.stop(At::After(Op::MoveDeviceCursor));
    let lost = tokio::spawn({
        let (device_cursors, place) = (device_cursors.clone(), cursor(&place));
        async move {
            device_cursors
                .acknowledge(&name("ann"), &place, &[device("phone")])
                .await
        }
    });
    stop.reached().await;
    stop.fail();
    assert!(matches!(
        lost.await.expect("no panic"),
        Err(AcknowledgeError::Broker(_))
    ));
    acknowledge(&device_cursors, "phone", &place).await;
    having(&stage, start(&device_cursors, "phone").await, &["e2"]).await;
}

/// The order of the two is undefined: events acknowledged meanwhile may be repeated, and none is
/// missing.
async fn a_stream_that_starts_while_its_device_acknowledges_misses_nothing(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.events("e", 2, &[to("u:ann")]).await;
    let place = having(&stage, first, &["e1"]).await;
    let mut stop = stage.puppet.stop(At::After(Op::DeviceCursors));
    let beginning = tokio::spawn({
        let device_cursors = device_cursors.clone();
        async move { start(&device_cursors, "phone").await }
    });
    stop.reached().await;
    acknowledge(
        &self::device_cursors(&stage.another().await),
        "phone",
        &place,
    )
    .await;
    stop.go();
    having(&stage, beginning.await.expect("a start"), &["e1", "e2"]).await;
    having(&stage, start(&device_cursors, "phone").await, &["e2"]).await;
}

/// One stream has read the head and is slow to store it; meanwhile the other stream starts and an
/// event is committed.
async fn two_first_streams_of_a_device_that_race_start_at_the_same_position(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let mut stop = stage.puppet.stop(At::Before(Op::MoveDeviceCursor));
    let slow = tokio::spawn({
        let device_cursors = device_cursors.clone();
        async move { start(&device_cursors, "phone").await }
    });
    stop.reached().await;
    stage.event("before", &[to("u:ann")]).await;
    let quick = start(&self::device_cursors(&stage.another().await), "phone").await;
    stage.event("after", &[to("u:ann")]).await;
    stop.go();
    assert_eq!(slow.await.expect("a start"), quick);
    having(&stage, quick, &["after"]).await;
}

async fn in_sync_an_acknowledgement_counts_for_all_devices_and_a_first_start_for_none(
    stage: Stage,
) {
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.events("e", 4, &[to("u:ann")]).await;
    // The start of the tablet is not an acknowledgement of the events before it.
    let tablet = start(&device_cursors, "tablet").await;
    assert_eq!(start_in_sync(&device_cursors, "phone").await, first);
    let second = having(&stage, first.clone(), &["e1", "e2"]).await;
    acknowledge(&device_cursors, "watch", &second).await;
    assert_eq!(start_in_sync(&device_cursors, "phone").await, second);
    assert_eq!(
        start(&device_cursors, "phone").await,
        first,
        "a stream that does not request sync is not in sync"
    );
    assert_eq!(
        start_in_sync(&device_cursors, "tablet").await,
        tablet,
        "its own device cursor is further"
    );
    // A device unknown so far starts where the others are, and stores that as its first device
    // cursor.
    assert_eq!(start_in_sync(&device_cursors, "car").await, second);
    let third = having(&stage, second.clone(), &["e3"]).await;
    acknowledge(&device_cursors, "watch", &third).await;
    assert_eq!(start(&device_cursors, "car").await, second);
    // The read marker is not a device.
    let fourth = having(&stage, third.clone(), &["e4"]).await;
    device_cursors
        .acknowledge(&name("ann"), &cursor(&fourth), &[CursorOwner::ReadMarker])
        .await
        .expect("the acknowledgement is accepted");
    assert_eq!(start_in_sync(&device_cursors, "phone").await, third);
}

/// Such a device cursor would never move back to the events that exist.
async fn ids_that_are_not_issued_yet_cannot_be_acknowledged(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    let mut ahead = cursor(&first);
    ahead.positions[0].low_water.0 += 1_000_000_000;
    let refused = device_cursors
        .acknowledge(&name("ann"), &ahead, &[device("phone")])
        .await;
    assert!(
        matches!(refused, Err(AcknowledgeError::Ahead)),
        "{refused:?}"
    );
    let mut overtaken = cursor(&first);
    overtaken
        .sent_ahead
        .push(sent(stage.p, ahead.positions[0].low_water));
    let refused = device_cursors
        .acknowledge(&name("ann"), &overtaken, &[device("phone")])
        .await;
    assert!(
        matches!(refused, Err(AcknowledgeError::Ahead)),
        "{refused:?}"
    );
    assert_eq!(start(&device_cursors, "phone").await, first);
    // A new device does not store such a start either.
    let asked = Some(Start::Cursor(ahead));
    device_cursors
        .start(&name("ann"), name("tablet"), false, asked)
        .await
        .expect("a start");
    assert_eq!(start(&device_cursors, "tablet").await, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_was_offline_beyond_the_log_limit_gets_a_gap() {
    for stage in [
        Stage::redis_with(
            &[SOURCE],
            Retention {
                log_entries: 3,
                ..Retention::default()
            },
        )
        .await,
        Stage::embedded_with(
            &[SOURCE],
            Retention {
                log_entries: 3,
                ..Retention::default()
            },
        )
        .await,
    ] {
        let device_cursors = stage.device_cursors();
        let first = start(&device_cursors, "phone").await;
        stage.events("e", 5, &[to("u:ann")]).await;
        // Acknowledging events trimmed meanwhile is valid.
        acknowledge(&device_cursors, "phone", &first).await;
        let mut client = Client::open(&stage.hub(), "ann", start(&device_cursors, "phone").await);
        assert_eq!(client.gap().await.reason, GapReason::Trimmed);
        client.expect(&["e3", "e4", "e5"]).await;
    }
}

/// Each event arrives once, even if the device acknowledges in the middle of an overtaking.
async fn an_acknowledged_id_that_was_sent_ahead_is_remembered(stage: Stage) {
    let device_cursors = stage.device_cursors();
    let mut place = cursor(&start(&device_cursors, "phone").await);
    let ids = stage
        .commit(&[
            ("slow", &[to("u:ann")]),
            ("urgent", &[super::fixture::urgent("u:ann")]),
        ])
        .await;
    place.sent_ahead.push(sent(stage.p, ids[1]));
    acknowledge(&device_cursors, "phone", &Start::Cursor(place)).await;
    having(&stage, start(&device_cursors, "phone").await, &["slow"]).await;
    stage.event("end", &[to("u:ann")]).await;
    having(
        &stage,
        start(&device_cursors, "phone").await,
        &["slow", "end"],
    )
    .await;
}

/// Redis lost its tail: the phone has acknowledged events of a past epoch, and their ids are issued
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_acknowledged_lost_events_gets_a_gap_and_their_replacements() {
    let stage = Stage::redis().await;
    stage.number_ids();
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.event("kept", &[to("u:ann")]).await;
    let survived = having(&stage, first.clone(), &["kept"]).await;
    stage.server().snapshot();
    stage.event("lost", &[to("u:ann")]).await;
    let lost = having(&stage, survived.clone(), &["lost"]).await;
    acknowledge(&device_cursors, "phone", &lost).await;
    acknowledge(&device_cursors, "tablet", &survived).await;
    // The device cursors of a user may lie on another primary than the partition and survive, as
    // here.
    stage
        .server()
        .fail_over_but("pointsman:device-cursors:{pointsman:user:ann}");
    stage.event("instead", &[to("u:ann")]).await;

    let mut client = Client::open(&stage.hub(), "ann", start(&device_cursors, "phone").await);
    assert_eq!(client.gap().await.reason, GapReason::Rewound);
    client.expect(&["instead"]).await;
    let after = client.cut();
    // The tablet never received the lost event.
    having(&stage, start(&device_cursors, "tablet").await, &["instead"]).await;
    // In sync, it gets the same gap as the phone.
    let mut client = Client::open(
        &stage.hub(),
        "ann",
        start_in_sync(&device_cursors, "tablet").await,
    );
    assert_eq!(client.gap().await.reason, GapReason::Rewound);
    // A late acknowledgement from before the fail-over does not undo one from after it.
    acknowledge(&device_cursors, "phone", &after).await;
    acknowledge(&device_cursors, "phone", &lost).await;
    assert_eq!(start(&device_cursors, "phone").await, after);
    stage.event("next", &[to("u:ann")]).await;
    having(&stage, start(&device_cursors, "phone").await, &["next"]).await;
}

/// Nothing was lost because nothing had been committed: before the first event a cursor stands at
/// the floor, above every id issued so far.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_restart_before_the_first_event_is_not_a_gap_for_a_device() {
    let stage = Stage::redis().await;
    let device_cursors = stage.device_cursors();
    let first = start(&device_cursors, "phone").await;
    stage.server().change_replid();
    stage.event("at night", &[to("u:ann")]).await;
    let had = having(&stage, start(&device_cursors, "phone").await, &["at night"]).await;
    acknowledge(&device_cursors, "phone", &had).await;
    acknowledge(&device_cursors, "phone", &first).await;
    stage.event("in the morning", &[to("u:ann")]).await;
    having(
        &stage,
        start(&device_cursors, "phone").await,
        &["in the morning"],
    )
    .await;
}

/// An event under a reissued id is another notification, which the user has not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_marker_does_not_cover_events_under_ids_issued_again() {
    let stage = Stage::redis().await;
    stage.number_ids();
    let device_cursors = stage.device_cursors();
    let kept = stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    let lost = stage.event("lost", &[to("u:ann")]).await;
    let mark = cursor(&having(&stage, Start::Earliest, &["kept", "lost"]).await);
    device_cursors
        .acknowledge(&name("ann"), &mark, &[CursorOwner::ReadMarker])
        .await
        .expect("the acknowledgement is accepted");
    let valid = device_cursors.valid_part(&mark).await.expect("heads");
    assert!(valid.covers(stage.p, kept) && valid.covers(stage.p, lost));
    stage
        .server()
        .fail_over_but("pointsman:device-cursors:{pointsman:user:ann}");
    assert_eq!(
        stage.event("instead", &[to("u:ann")]).await,
        lost,
        "the id is issued again"
    );
    let mark = device_cursors
        .read_marker(&name("ann"))
        .await
        .expect("the broker answers")
        .expect("the read marker is kept");
    let valid = device_cursors.valid_part(&mark).await.expect("heads");
    assert!(valid.covers(stage.p, kept) && !valid.covers(stage.p, lost));
}
