//! The fixture of the protocol tests: a broker, the events committed to it, and clients that
//! receive, disconnect and resume.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use pointsman::broker::embedded::Embedded;
use pointsman::broker::redis::{Prefix, Redis};
use pointsman::broker::{
    Batch, Broker, CommitResult, Error, Head, Item, Proposal, RecipientChange, Retention, Slice,
};
pub(super) use pointsman::clock::now_ms;
use pointsman::delivery::hub::{Hub, StreamGuard};
use pointsman::delivery::subscription::cursor::Cursor;
use pointsman::delivery::subscription::{Filter, Gap, Next, Record, Start};
use pointsman::event::{
    Decision, EntryId, Event, Name, Notification, NotificationId, Outcome, PartitionNumber, Plan,
    Priority, Route, Target,
};
use pointsman::shutdown::Shutdown;
use pointsman::telemetry::metrics::Metrics;

use super::faulty_broker::Puppet;
use crate::harness::redis::RedisServer;

pub(super) const SOURCE: &str = "pointsman:events";
/// The prefix of the keys of its partition.
pub(super) const TAG: &str = "pointsman:{pointsman:events}:";
/// The time limit for everything that must happen, also on a busy machine.
pub(super) const SOON: Duration = Duration::from_secs(60);

/// Polls until `is_so` returns `true`.
pub(super) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, asking)
        .await
        .unwrap_or_else(|_| panic!("timed out: {what}"));
}

/// Repeats a request until the broker answers it. [`Error::Unavailable`] is retried; every other
/// error panics.
pub(super) async fn answered<T>(
    what: &str,
    mut ask: impl AsyncFnMut() -> pointsman::broker::Result<T>,
) -> T {
    let mut answer = None;
    until(what, async || match ask().await {
        Ok(found) => {
            answer = Some(found);
            true
        }
        Err(Error::Unavailable(_)) => false,
        Err(error) => panic!("{what}: {error}"),
    })
    .await;
    answer.expect("the loop ends with an answer")
}

pub(super) fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

pub(super) fn target(log: &str) -> Target {
    log.parse().expect("a target")
}

/// A route to these targets, which are separated by spaces.
pub(super) fn to(targets: &str) -> Route {
    let to = targets.split(' ').map(target).collect();
    Route {
        by: name("test"),
        to,
        when: None,
        priority: Priority::Normal,
        expires_ms: None,
        collapse: None,
        event_name: None,
        slot: None,
        body: None,
    }
}

pub(super) fn urgent(targets: &str) -> Route {
    Route {
        priority: Priority::Urgent,
        ..to(targets)
    }
}

pub(super) fn keyed(key: &str, route: Route) -> Route {
    Route {
        collapse: Some(name(key)),
        ..route
    }
}

/// An installation: one broker, and the state that its nodes share.
pub(super) struct Stage {
    server: Option<RedisServer>,
    sources: Vec<String>,
    retention: Retention,
    pub(super) puppet: Arc<Puppet>,
    pub(super) metrics: Metrics,
    n_fences: AtomicU64,
    /// The partition under test: the first one.
    pub(super) p: PartitionNumber,
}

impl Stage {
    pub(super) async fn redis() -> Self {
        Self::redis_with(&[SOURCE], Retention::default()).await
    }

    pub(super) async fn redis_with(sources: &[&str], retention: Retention) -> Self {
        let server = RedisServer::start();
        let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
        let broker: Arc<dyn Broker> = Arc::new(
            Redis::connect(
                &server.url(),
                &Prefix::default(),
                &sources,
                retention.clone(),
            )
            .await
            .expect("connect"),
        );
        let p = broker.partitions()[0].number;
        Self {
            server: Some(server),
            sources,
            retention,
            puppet: Puppet::over(broker),
            metrics: Metrics::default(),
            n_fences: AtomicU64::new(0),
            p,
        }
    }

    pub(super) async fn embedded() -> Self {
        Self::embedded_with(&[SOURCE], Retention::default()).await
    }

    pub(super) async fn embedded_with(sources: &[&str], retention: Retention) -> Self {
        let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
        let broker: Arc<dyn Broker> = Arc::new(
            Embedded::ephemeral(
                &sources,
                retention.clone(),
                Shutdown::new().alarm("the writer"),
            )
            .expect("memory"),
        );
        let p = broker.partitions()[0].number;
        Self {
            server: None,
            sources,
            retention,
            puppet: Puppet::over(broker),
            metrics: Metrics::default(),
            n_fences: AtomicU64::new(0),
            p,
        }
    }

    pub(super) fn server(&self) -> &RedisServer {
        self.server.as_ref().expect("this test runs on Redis")
    }

    pub(super) fn is_redis(&self) -> bool {
        self.server.is_some()
    }

    /// The broker of another node.
    pub(super) async fn another(&self) -> Arc<Puppet> {
        self.another_with(&self.sources).await
    }

    /// The broker of another node that is configured with other sources.
    pub(super) async fn another_with(&self, sources: &[String]) -> Arc<Puppet> {
        match &self.server {
            Some(server) => {
                let (url, prefix) = (server.url(), Prefix::default());
                let connect =
                    async || Redis::connect(&url, &prefix, sources, self.retention.clone()).await;
                Puppet::over(Arc::new(answered("another node connects", connect).await))
            }
            // One process owns the data; here, another node is another user of the same broker.
            None => Puppet::over(Arc::clone(&self.puppet.broker)),
        }
    }

    pub(super) fn hub(&self) -> Hub {
        Hub::start(
            Arc::clone(&self.puppet) as Arc<dyn Broker>,
            self.metrics.clone(),
            &Shutdown::new(),
        )
    }

    pub(super) async fn head(&self) -> Head {
        self.puppet.broker.head(self.p).await.expect("head")
    }

    pub(super) fn item(&self, entry: EntryId, id: &str, routes: &[Route]) -> Item {
        let document =
            format!(r#"{{"specversion":"1.0","id":"{id}","source":"/test","type":"t"}}"#);
        let event = Event::from_json(entry, "/test", document.as_bytes()).expect("an event");
        let plan = Plan {
            routes: routes.to_vec(),
        };
        let targets = plan.targets();
        let record =
            Bytes::from(serde_json::to_vec(&Notification { entry, event, plan }).expect("JSON"));
        Item {
            entry,
            dedupe: None,
            proposal: Proposal::commit(record, targets),
            decision: Decision::default(),
        }
    }

    /// Commits events under the next entry ids, as an owner would, and returns their notification
    /// ids.
    pub(super) async fn commit(&self, events: &[(&str, &[Route])]) -> Vec<NotificationId> {
        self.commit_in(self.p, events).await
    }

    pub(super) async fn commit_in(
        &self,
        partition: PartitionNumber,
        events: &[(&str, &[Route])],
    ) -> Vec<NotificationId> {
        let broker = &self.puppet.broker;
        let mut ids = Vec::with_capacity(events.len());
        for some in events.chunks(64) {
            let head = broker.head(partition).await.expect("head");
            let entry = next_entry(head.position.entry);
            let items = (0..)
                .zip(some)
                .map(|(k, (id, routes))| {
                    self.item(
                        EntryId {
                            seq: entry.seq + k,
                            ..entry
                        },
                        id,
                        routes,
                    )
                })
                .collect();
            match broker
                .commit(
                    partition,
                    Batch {
                        epoch: head.epoch,
                        prev: head.position,
                        items,
                    },
                )
                .await
                .expect("commit")
            {
                CommitResult::Done(outcomes) => {
                    ids.extend(outcomes.into_iter().map(|(outcome, id)| {
                        assert_eq!(outcome, Outcome::Committed);
                        id.expect("a committed event has an id")
                    }))
                }
                CommitResult::Conflict => panic!("the commit from {} was refused", head.position),
            }
        }
        ids
    }

    pub(super) async fn event(&self, id: &str, routes: &[Route]) -> NotificationId {
        self.commit(&[(id, routes)]).await[0]
    }

    /// Commits events `prefix1` to `prefixN`, all with the same routes.
    pub(super) async fn events(
        &self,
        prefix: &str,
        n: usize,
        routes: &[Route],
    ) -> Vec<NotificationId> {
        let ids: Vec<String> = (1..=n).map(|k| format!("{prefix}{k}")).collect();
        let events: Vec<(&str, &[Route])> = ids.iter().map(|id| (id.as_str(), routes)).collect();
        self.commit(&events).await
    }

    /// Writes one slice of a plan: the event has all of `routes`, the slice covers `logs`.
    pub(super) async fn slice(
        &self,
        id: &str,
        routes: &[Route],
        logs: &[&str],
        index: u32,
        is_last: bool,
    ) -> NotificationId {
        let head = self.head().await;
        let entry = if index == 0 {
            next_entry(head.position.entry)
        } else {
            head.position.entry
        };
        let mut item = self.item(entry, id, routes);
        let Proposal::Commit(notifications) = &mut item.proposal else {
            unreachable!("`item` proposes a commit")
        };
        notifications[0].targets = logs.iter().map(|log| target(log)).collect();
        let slice = Slice {
            epoch: head.epoch,
            prev: head.position,
            item,
            index,
            is_last,
        };
        match self
            .puppet
            .broker
            .commit_slice(self.p, slice)
            .await
            .expect("commit_slice")
        {
            CommitResult::Done(outcomes) => outcomes[0].1.expect("an id"),
            CommitResult::Conflict => panic!("the slice was refused"),
        }
    }

    /// The events in a log, as the ids that their publishers gave them.
    pub(super) async fn log(&self, log: &str) -> Vec<String> {
        let page = self
            .puppet
            .broker
            .page(self.p, &target(log), NotificationId(0), 100_000)
            .await
            .expect("page");
        let ids: Vec<NotificationId> = page.entries.iter().map(|entry| entry.0).collect();
        let records = self
            .puppet
            .broker
            .records(self.p, &ids)
            .await
            .expect("records");
        records
            .into_iter()
            .map(|record| event_id(&Record::parse(&record.expect("a record")).expect("JSON")))
            .collect()
    }

    pub(super) async fn change(&self, user: &str, change: RecipientChange) {
        self.puppet
            .broker
            .change_recipient(&name(user), change)
            .await
            .expect("change_recipient");
    }

    pub(super) async fn leave(&self, user: &str, group: &str) {
        self.change(user, RecipientChange::Leave { group: name(group) })
            .await;
    }

    pub(super) async fn join(&self, user: &str, group: &str) {
        self.change(user, RecipientChange::Join { group: name(group) })
            .await;
    }

    /// Waits, by an event of its own, until the client's node has received every notice published
    /// so far. This holds for every stream on that node.
    pub(super) async fn fence(&self, client: &mut Client) {
        let id = format!("fence {}", self.n_fences.fetch_add(1, Ordering::Relaxed));
        self.event(&id, &[to(&format!("u:{}", client.user))]).await;
        while client.event().await != id {}
    }

    /// Moves ids an hour ahead of the clock, as after a clock that ran ahead. Ids are then
    /// consecutive numbers, so that an epoch that lost its tail issues exactly the same ids again.
    pub(super) fn number_ids(&self) {
        self.number_ids_of(SOURCE);
    }

    pub(super) fn number_ids_of(&self, source: &str) {
        let () = self.server().command(&format!(
            "HSET pointsman:{{{source}}}:meta last {}",
            an_hour_ahead()
        ));
    }
}

pub(super) fn an_hour_ahead() -> NotificationId {
    NotificationId::at_ms(now_ms() + 3_600_000)
}

/// The next entry id in the same millisecond.
pub(super) fn next_entry(entry: EntryId) -> EntryId {
    EntryId {
        ms: entry.ms.max(1_700_000_000_000),
        seq: entry.seq + 1,
    }
}

pub(super) fn event_id(record: &Record) -> String {
    record.notification().event.id.to_string()
}

/// A frame that a client receives.
#[derive(Debug)]
pub(super) enum Frame {
    Event {
        id: String,
        priority: Priority,
        record: Arc<Record>,
    },
    Gap(Gap),
    Cursor,
}

/// A client with an open stream. Its cursor is that of the last frame it took.
pub(super) struct Client {
    user: Name,
    guard: StreamGuard,
    pub(super) cursor: Option<String>,
}

impl Client {
    pub(super) fn open(hub: &Hub, user: &str, start: Start) -> Self {
        Self {
            user: name(user),
            guard: hub.open(name(user), start, Filter::default()),
            cursor: None,
        }
    }

    /// A new client whose stream is live and that has taken its first frame, the cursor.
    pub(super) async fn live(hub: &Hub, user: &str) -> Self {
        let mut client = Self::open(hub, user, Start::Latest);
        assert!(matches!(client.frame().await, Frame::Cursor));
        client.until_live().await;
        client
    }

    pub(super) async fn until_live(&self) {
        until("the stream is live", async || {
            self.guard.stream().lock().is_live()
        })
        .await;
    }

    pub(super) fn is_live(&self) -> bool {
        self.guard.stream().lock().is_live()
    }

    /// The low-water mark of a partition.
    pub(super) fn low_water(&self, partition: PartitionNumber) -> NotificationId {
        self.guard.stream().lock().marks(partition).0
    }

    pub(super) fn round(&self, partition: PartitionNumber) -> u64 {
        self.guard.stream().lock().round(partition)
    }

    /// Takes the next frame, as a socket does.
    pub(super) async fn frame(&mut self) -> Frame {
        let stream = self.guard.stream();
        let taking = std::future::poll_fn(|cx| {
            stream.register(cx.waker());
            let mut subscription = stream.lock();
            let Some(next) = subscription.next(now_ms()) else {
                return Poll::Pending;
            };
            let mut cursor = String::new();
            subscription.encode_cursor(&mut cursor);
            Poll::Ready((next, cursor))
        });
        let (next, cursor) = tokio::time::timeout(SOON, taking)
            .await
            .expect("a frame arrives");
        stream.made_room();
        assert!(cursor.len() <= 126, "{cursor}");
        let read = Cursor::decode(&cursor, &self.user);
        assert!(
            read.is_ok(),
            "the cursor {cursor} cannot be read back: {read:?}"
        );
        // A gap has no cursor of its own: with the present cursor, a client that is cut before the
        // next gap would never get that one.
        if !matches!(next, Next::Gap(_)) {
            self.cursor = Some(cursor);
        }
        match next {
            Next::Notification {
                record,
                route_match,
                ..
            } => Frame::Event {
                id: event_id(&record),
                priority: record.route(route_match.route).priority,
                record,
            },
            Next::Gap(gap) => Frame::Gap(gap),
            Next::Cursor => Frame::Cursor,
        }
    }

    /// Takes the next event; panics if a gap comes first.
    pub(super) async fn event(&mut self) -> String {
        loop {
            match self.frame().await {
                Frame::Event { id, .. } => return id,
                Frame::Cursor => {}
                Frame::Gap(gap) => panic!("expected an event, received {gap:?}"),
            }
        }
    }

    /// Takes as many events as `events` names and compares them.
    pub(super) async fn expect(&mut self, events: &[&str]) {
        let mut received = VecDeque::new();
        for _ in events {
            received.push_back(self.event().await);
        }
        assert_eq!(received, events);
    }

    /// Takes the next gap; panics if an event comes first.
    pub(super) async fn gap(&mut self) -> Gap {
        loop {
            match self.frame().await {
                Frame::Gap(gap) => return gap,
                Frame::Cursor => {}
                Frame::Event { id, .. } => panic!("expected a gap, received {id}"),
            }
        }
    }

    /// Takes the cursor that a stream sends at intervals.
    pub(super) async fn take_cursor(&mut self) {
        self.guard.stream().lock().request_cursor();
        assert!(matches!(self.frame().await, Frame::Cursor));
    }

    /// The start with which the client would resume.
    pub(super) fn resume(&self) -> Start {
        let cursor = self
            .cursor
            .as_ref()
            .expect("the client took a frame with a cursor");
        Start::Cursor(Cursor::decode(cursor, &self.user).expect("its own cursor"))
    }

    /// Disconnects, and resumes on this hub with the client's cursor.
    pub(super) fn back(self, hub: &Hub) -> Self {
        let (start, cursor) = (self.resume(), self.cursor);
        let user = self.user;
        drop(self.guard);
        Self {
            guard: hub.open(user.clone(), start, Filter::default()),
            user,
            cursor,
        }
    }

    /// Disconnects, and returns the start with which the client would resume.
    pub(super) fn cut(self) -> Start {
        self.resume()
    }
}
