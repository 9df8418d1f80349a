//! Devices: acknowledgements that race each other, the stream that begins there, the trimming of what they speak of, and a fail-over.

use std::sync::Arc;

use pointsman::broker::{BookmarkOf, Broker, Retention};
use pointsman::delivery::device_cursors::{Bookmarks, Refusal};
use pointsman::delivery::subscription::cursor::Cursor;
use pointsman::delivery::subscription::{GapReason, Start};

use super::faulty_broker::{At, Op, Puppet};
use super::fixture::{Client, SOURCE, Stage, name, to};
use super::on_each_broker;

on_each_broker! {
    a_device_that_never_acknowledged_begins_where_it_first_began,
    a_device_begins_after_what_it_acknowledged,
    an_acknowledgement_that_is_overtaken_by_a_further_one_does_not_take_it_back,
    an_acknowledgement_whose_answer_was_lost_is_given_again,
    a_stream_that_begins_while_its_device_acknowledges_misses_nothing,
    two_streams_of_a_new_device_that_begin_at_once_begin_at_one_place,
    in_sync_the_acknowledgement_of_one_device_counts_for_all_and_a_beginning_for_none,
    what_is_yet_to_come_cannot_be_acknowledged,
    an_urgent_one_that_went_ahead_is_remembered,
}

fn bookmarks(puppet: &Arc<Puppet>) -> Bookmarks {
    Bookmarks::new(Arc::clone(puppet) as Arc<dyn Broker>)
}

fn device(text: &str) -> BookmarkOf {
    BookmarkOf::Device(name(text))
}

fn cursor(start: &Start) -> Cursor {
    match start {
        Start::Cursor(cursor) => cursor.clone(),
        other => panic!("a cursor was expected: {other:?}"),
    }
}

impl Stage {
    fn bookmarks(&self) -> Bookmarks {
        bookmarks(&self.puppet)
    }
}

async fn acknowledge(bookmarks: &Bookmarks, of: &str, place: &Start) {
    bookmarks
        .acknowledge(&name("ann"), &cursor(place), &[device(of)])
        .await
        .expect("it is taken");
}

async fn start(bookmarks: &Bookmarks, of: &str) -> Start {
    bookmarks
        .start(&name("ann"), name(of), false, None)
        .await
        .expect("a place")
}

async fn start_in_sync(bookmarks: &Bookmarks, of: &str) -> Start {
    bookmarks
        .start(&name("ann"), name(of), true, None)
        .await
        .expect("a place")
}

/// What a client of ann has that took these events.
async fn having(stage: &Stage, start: Start, events: &[&str]) -> Start {
    let mut client = Client::open(&stage.hub(), "ann", start);
    client.expect(events).await;
    client.cut()
}

async fn a_device_that_never_acknowledged_begins_where_it_first_began(stage: Stage) {
    let bookmarks = stage.bookmarks();
    stage.event("before", &[to("u:ann")]).await;
    let first = start(&bookmarks, "phone").await;
    stage.event("at night", &[to("u:ann")]).await;
    let another = self::bookmarks(&stage.another().await);
    assert_eq!(start(&another, "phone").await, first);
    having(&stage, start(&another, "phone").await, &["at night"]).await;
    // Another device begins now.
    stage.event("later", &[to("u:ann")]).await;
    let other = start(&bookmarks, "tablet").await;
    stage.event("last", &[to("u:ann")]).await;
    having(&stage, other, &["last"]).await;
}

async fn a_device_begins_after_what_it_acknowledged(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.events("e", 4, &[to("u:ann")]).await;
    let second = having(&stage, first.clone(), &["e1", "e2"]).await;
    let third = having(&stage, second.clone(), &["e3"]).await;
    // In whatever order they come.
    for place in [&third, &second, &first] {
        acknowledge(&bookmarks, "phone", place).await;
    }
    having(&stage, start(&bookmarks, "phone").await, &["e4"]).await;
}

/// The slower one has seen where the bookmark was, and comes to move it when it is further.
async fn an_acknowledgement_that_is_overtaken_by_a_further_one_does_not_take_it_back(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.events("e", 3, &[to("u:ann")]).await;
    let near = having(&stage, first.clone(), &["e1"]).await;
    let far = having(&stage, near.clone(), &["e2"]).await;
    let mut stop = stage.puppet.stop(At::Before(Op::MoveBookmark));
    let slow = tokio::spawn({
        let (bookmarks, near) = (bookmarks.clone(), near.clone());
        async move { acknowledge(&bookmarks, "phone", &near).await }
    });
    stop.reached().await;
    acknowledge(&self::bookmarks(&stage.another().await), "phone", &far).await;
    stop.go();
    slow.await.expect("it is taken");
    assert_eq!(start(&bookmarks, "phone").await, far);
    having(&stage, far, &["e3"]).await;
}

async fn an_acknowledgement_whose_answer_was_lost_is_given_again(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.events("e", 2, &[to("u:ann")]).await;
    let place = having(&stage, first, &["e1"]).await;
    let mut stop = stage.puppet.stop(At::After(Op::MoveBookmark));
    let lost = tokio::spawn({
        let (bookmarks, place) = (bookmarks.clone(), cursor(&place));
        async move {
            bookmarks
                .acknowledge(&name("ann"), &place, &[device("phone")])
                .await
        }
    });
    stop.reached().await;
    stop.fail();
    assert!(matches!(
        lost.await.expect("no panic"),
        Err(Refusal::Broker(_))
    ));
    acknowledge(&bookmarks, "phone", &place).await;
    having(&stage, start(&bookmarks, "phone").await, &["e2"]).await;
}

/// Which of the two is first nobody can say; what was acknowledged meanwhile may come again, and nothing is missing.
async fn a_stream_that_begins_while_its_device_acknowledges_misses_nothing(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.events("e", 2, &[to("u:ann")]).await;
    let place = having(&stage, first, &["e1"]).await;
    let mut stop = stage.puppet.stop(At::After(Op::Bookmarks));
    let beginning = tokio::spawn({
        let bookmarks = bookmarks.clone();
        async move { start(&bookmarks, "phone").await }
    });
    stop.reached().await;
    acknowledge(&self::bookmarks(&stage.another().await), "phone", &place).await;
    stop.go();
    having(&stage, beginning.await.expect("a place"), &["e1", "e2"]).await;
    having(&stage, start(&bookmarks, "phone").await, &["e2"]).await;
}

/// One has read the head and is slow to keep it; meanwhile the other began, and something came.
async fn two_streams_of_a_new_device_that_begin_at_once_begin_at_one_place(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let mut stop = stage.puppet.stop(At::Before(Op::MoveBookmark));
    let slow = tokio::spawn({
        let bookmarks = bookmarks.clone();
        async move { start(&bookmarks, "phone").await }
    });
    stop.reached().await;
    stage.event("before", &[to("u:ann")]).await;
    let quick = start(&self::bookmarks(&stage.another().await), "phone").await;
    stage.event("after", &[to("u:ann")]).await;
    stop.go();
    assert_eq!(slow.await.expect("a place"), quick);
    having(&stage, quick, &["after"]).await;
}

async fn in_sync_the_acknowledgement_of_one_device_counts_for_all_and_a_beginning_for_none(
    stage: Stage,
) {
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.events("e", 4, &[to("u:ann")]).await;
    // Where the tablet begins, nobody has seen what came before.
    let tablet = start(&bookmarks, "tablet").await;
    assert_eq!(start_in_sync(&bookmarks, "phone").await, first);
    let second = having(&stage, first.clone(), &["e1", "e2"]).await;
    acknowledge(&bookmarks, "watch", &second).await;
    assert_eq!(start_in_sync(&bookmarks, "phone").await, second);
    assert_eq!(
        start(&bookmarks, "phone").await,
        first,
        "who does not ask for it is not in sync"
    );
    assert_eq!(
        start_in_sync(&bookmarks, "tablet").await,
        tablet,
        "it is further itself"
    );
    // One that nobody has seen yet begins where the others are, and that is its first bookmark.
    assert_eq!(start_in_sync(&bookmarks, "car").await, second);
    let third = having(&stage, second.clone(), &["e3"]).await;
    acknowledge(&bookmarks, "watch", &third).await;
    assert_eq!(start(&bookmarks, "car").await, second);
    // What was read is no device.
    let fourth = having(&stage, third.clone(), &["e4"]).await;
    bookmarks
        .acknowledge(&name("ann"), &cursor(&fourth), &[BookmarkOf::ReadMark])
        .await
        .expect("it is taken");
    assert_eq!(start_in_sync(&bookmarks, "phone").await, third);
}

/// It would never move backwards to where things are.
async fn what_is_yet_to_come_cannot_be_acknowledged(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    let mut ahead = cursor(&first);
    ahead.positions[0].low_water.0 += 1_000_000_000;
    let refused = bookmarks
        .acknowledge(&name("ann"), &ahead, &[device("phone")])
        .await;
    assert!(matches!(refused, Err(Refusal::Ahead)), "{refused:?}");
    let mut overtaken = cursor(&first);
    overtaken.had.push((stage.p, ahead.positions[0].low_water));
    let refused = bookmarks
        .acknowledge(&name("ann"), &overtaken, &[device("phone")])
        .await;
    assert!(matches!(refused, Err(Refusal::Ahead)), "{refused:?}");
    assert_eq!(start(&bookmarks, "phone").await, first);
    // Nor does a device begin there for good.
    let asked = Some(Start::Cursor(ahead));
    bookmarks
        .start(&name("ann"), name("tablet"), false, asked)
        .await
        .expect("a place");
    assert_eq!(start(&bookmarks, "tablet").await, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_was_away_for_longer_than_the_log_reaches_is_told_of_the_gap() {
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
        let bookmarks = stage.bookmarks();
        let first = start(&bookmarks, "phone").await;
        stage.events("e", 5, &[to("u:ann")]).await;
        // An acknowledgement of what is trimmed meanwhile is one like any other.
        acknowledge(&bookmarks, "phone", &first).await;
        let mut client = Client::open(&stage.hub(), "ann", start(&bookmarks, "phone").await);
        assert_eq!(client.gap().await.reason, GapReason::Trimmed);
        client.expect(&["e3", "e4", "e5"]).await;
    }
}

/// Once each, also for a device that acknowledges in the middle of an overtaking.
async fn an_urgent_one_that_went_ahead_is_remembered(stage: Stage) {
    let bookmarks = stage.bookmarks();
    let mut place = cursor(&start(&bookmarks, "phone").await);
    let ids = stage
        .commit(&[
            ("slow", &[to("u:ann")]),
            ("urgent", &[super::fixture::urgent("u:ann")]),
        ])
        .await;
    place.had.push((stage.p, ids[1]));
    acknowledge(&bookmarks, "phone", &Start::Cursor(place)).await;
    having(&stage, start(&bookmarks, "phone").await, &["slow"]).await;
    stage.event("end", &[to("u:ann")]).await;
    having(&stage, start(&bookmarks, "phone").await, &["slow", "end"]).await;
}

/// Redis was restarted without the tail: what the phone acknowledged is of a life that is over, and its ids are given out again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_acknowledged_what_a_fail_over_lost_is_told_so_and_sees_what_came_instead() {
    let stage = Stage::redis().await;
    stage.number_ids();
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.event("kept", &[to("u:ann")]).await;
    let survived = having(&stage, first.clone(), &["kept"]).await;
    stage.server().snapshot();
    stage.event("lost", &[to("u:ann")]).await;
    let lost = having(&stage, survived.clone(), &["lost"]).await;
    acknowledge(&bookmarks, "phone", &lost).await;
    acknowledge(&bookmarks, "tablet", &survived).await;
    // What users acknowledged may lie on another primary than the partition, as here, and be whole.
    stage
        .server()
        .fail_over_but("pointsman:bookmarks:{pointsman:user:ann}");
    stage.event("instead", &[to("u:ann")]).await;

    let mut client = Client::open(&stage.hub(), "ann", start(&bookmarks, "phone").await);
    assert_eq!(client.gap().await.reason, GapReason::Rewound);
    client.expect(&["instead"]).await;
    let after = client.cut();
    // The tablet never had what was lost.
    having(&stage, start(&bookmarks, "tablet").await, &["instead"]).await;
    // In sync it is told what the phone is told.
    let mut client = Client::open(
        &stage.hub(),
        "ann",
        start_in_sync(&bookmarks, "tablet").await,
    );
    assert_eq!(client.gap().await.reason, GapReason::Rewound);
    // A late acknowledgement from before does not undo one from after.
    acknowledge(&bookmarks, "phone", &after).await;
    acknowledge(&bookmarks, "phone", &lost).await;
    assert_eq!(start(&bookmarks, "phone").await, after);
    stage.event("next", &[to("u:ann")]).await;
    having(&stage, start(&bookmarks, "phone").await, &["next"]).await;
}

/// Nothing was lost, as nothing was there: before the first event of all a reader stands at the floor, above every id that was ever given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_redis_before_the_first_event_is_no_gap_for_a_device() {
    let stage = Stage::redis().await;
    let bookmarks = stage.bookmarks();
    let first = start(&bookmarks, "phone").await;
    stage.server().change_replid();
    stage.event("at night", &[to("u:ann")]).await;
    let had = having(&stage, start(&bookmarks, "phone").await, &["at night"]).await;
    acknowledge(&bookmarks, "phone", &had).await;
    acknowledge(&bookmarks, "phone", &first).await;
    stage.event("in the morning", &[to("u:ann")]).await;
    having(
        &stage,
        start(&bookmarks, "phone").await,
        &["in the morning"],
    )
    .await;
}

/// What comes under an id that was issued again is another notification, which nobody has read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_and_lost_in_a_fail_over_does_not_make_read_what_comes_under_its_ids() {
    let stage = Stage::redis().await;
    stage.number_ids();
    let bookmarks = stage.bookmarks();
    let kept = stage.event("kept", &[to("u:ann")]).await;
    stage.server().snapshot();
    let lost = stage.event("lost", &[to("u:ann")]).await;
    let mark = cursor(&having(&stage, Start::Earliest, &["kept", "lost"]).await);
    bookmarks
        .acknowledge(&name("ann"), &mark, &[BookmarkOf::ReadMark])
        .await
        .expect("it is taken");
    let standing = bookmarks.standing(&mark).await.expect("heads");
    assert!(standing.covers(stage.p, kept) && standing.covers(stage.p, lost));
    stage
        .server()
        .fail_over_but("pointsman:bookmarks:{pointsman:user:ann}");
    assert_eq!(
        stage.event("instead", &[to("u:ann")]).await,
        lost,
        "the id is issued again"
    );
    let mark = bookmarks
        .read_mark(&name("ann"))
        .await
        .expect("it is there")
        .expect("it was kept");
    let standing = bookmarks.standing(&mark).await.expect("heads");
    assert!(standing.covers(stage.p, kept) && !standing.covers(stage.p, lost));
}
