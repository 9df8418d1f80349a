//! A randomised simulation that combines all faults: owners that race, stall and are killed, lost
//! replies, plans in slices, clients that read slowly, are cut and resume on another node, logs
//! that are trimmed, members that come and go, and fail-overs that lose a tail. The code under test
//! and Redis are real. [`oracle`] computes the expected deliveries from the final content of the
//! source.
//!
//! A seed repeats the same choices, though not the same timing. `LONG=1` runs for minutes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pointsman::broker::{Broker, Partitions as _, RecipientChange, Retention};
use pointsman::delivery::hub::{Hub, StreamGuard};
use pointsman::delivery::subscription::cursor::Cursor;
use pointsman::delivery::subscription::{BufferBudget, Filter, Gap, Next, Start};
use pointsman::event::{Name, NotificationId, PartitionNumber, Priority, Span};
use pointsman::shutdown::Shutdown;
use pointsman::telemetry::metrics::Metrics;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::faulty_broker::{At, Op, Puppet, Stop};
use super::fixture::{SOON, SOURCE, Stage, answered, event_id, name, now_ms, until};
use super::ingest::{Owner, address};
use crate::harness::seed;

mod oracle;

const USERS: [&str; 3] = ["ann", "bob", "cid"];
/// Members for the whole run. Only ann joins and leaves "crew".
const MEMBERS: [(&str, &str); 3] = [("ann", "ops"), ("bob", "ops"), ("cid", "dev")];
const STEPS: usize = 250;
/// Requests or replies that one owner loses at most, because it waits longer after each.
const LOST_ANSWERS: usize = 3;
/// Users without a client in a large plan, which is written in three slices with some of the
/// [`USERS`] in each.
const STRANGERS: usize = 2_100;

/// The faults of a run. Some exclude each other because the expected result would be undefined.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Fail-overs lose tails, and memberships with them, so no user joins or leaves.
    FailOvers,
    /// A user joins and leaves, on Redis or on the embedded broker.
    Members { is_redis: bool },
    /// Logs keep fewer entries than clients miss while disconnected.
    ShortLogs,
}

/// A frame that a client received from one partition.
#[derive(Clone, Debug)]
enum Received {
    Event {
        uid: String,
        id: NotificationId,
        priority: Priority,
        key: Option<Name>,
    },
    Gap(Gap),
}

struct Client {
    user: &'static str,
    stream: Option<StreamGuard>,
    cursor: Option<String>,
    /// The start in each partition, from the first cursor.
    begin: HashMap<PartitionNumber, NotificationId>,
    received: HashMap<PartitionNumber, Vec<Received>>,
}

impl Client {
    fn new(user: &'static str) -> Self {
        Self {
            user,
            stream: None,
            cursor: None,
            begin: HashMap::new(),
            received: HashMap::new(),
        }
    }

    fn connect(&mut self, hub: &Hub) {
        let user = name(self.user);
        let start = self.cursor.as_ref().map_or(Start::Latest, |cursor| {
            Start::Cursor(Cursor::decode(cursor, &user).expect("its own"))
        });
        self.stream = Some(hub.open(user, start, Filter::default()));
    }

    /// Takes up to `n` frames that are ready.
    fn take(&mut self, n: usize) {
        let Some(guard) = &self.stream else { return };
        let stream = guard.stream();
        for _ in 0..n {
            let mut subscription = stream.lock();
            let Some(next) = subscription.next(now_ms()) else {
                break;
            };
            let mut cursor = String::new();
            subscription.encode_cursor(&mut cursor);
            drop(subscription);
            let read = Cursor::decode(&cursor, &name(self.user))
                .unwrap_or_else(|error| panic!("{cursor}: {error}"));
            if self.begin.is_empty() {
                self.begin = read
                    .positions
                    .iter()
                    .map(|position| (position.partition, position.low_water))
                    .collect();
            }
            let (partition, received) = match next {
                Next::Notification {
                    partition,
                    id,
                    record,
                    route_match,
                } => {
                    let route = record.route(route_match.route);
                    let (priority, key) = (route.priority, route.collapse.clone());
                    (
                        partition,
                        Received::Event {
                            uid: event_id(&record),
                            id,
                            priority,
                            key,
                        },
                    )
                }
                Next::Gap(gap) => {
                    self.received
                        .entry(gap.partition)
                        .or_default()
                        .push(Received::Gap(gap));
                    // A gap has no cursor of its own.
                    continue;
                }
                Next::Cursor => {
                    self.cursor = Some(cursor);
                    continue;
                }
            };
            self.cursor = Some(cursor);
            self.received.entry(partition).or_default().push(received);
        }
        stream.made_room();
    }

    fn has(&self, partition: PartitionNumber, uid: &str) -> bool {
        let is_it =
            |received: &Received| matches!(received, Received::Event { uid: of, .. } if of == uid);
        self.received
            .get(&partition)
            .is_some_and(|received| received.iter().any(is_it))
    }
}

/// A published event.
#[derive(Clone)]
struct Published {
    partition: PartitionNumber,
    fields: Vec<(Bytes, Bytes)>,
}

/// A membership, and the top id when joining and leaving were acknowledged. Events committed during
/// a change may be judged either way.
#[derive(Clone, Copy, Debug)]
struct Stay {
    span: Span,
    joined_by: NotificationId,
    left_by: Option<NotificationId>,
}

struct Play {
    kind: Kind,
    random: StdRng,
    stage: Stage,
    partitions: Vec<PartitionNumber>,
    hubs: Vec<(Hub, Arc<Puppet>)>,
    owners: Vec<(Owner, PartitionNumber, Arc<Puppet>)>,
    /// Points at which owners are stopped or will be.
    stalled: Vec<Stop>,
    clients: Vec<Client>,
    published: Vec<Published>,
    /// The memberships of ann in "crew" so far, by partition.
    stays: Vec<HashMap<PartitionNumber, Stay>>,
    has_snapshot: bool,
    n_started: usize,
}

fn field(name: &str, value: &str) -> (Bytes, Bytes) {
    (
        Bytes::copy_from_slice(name.as_bytes()),
        Bytes::copy_from_slice(value.as_bytes()),
    )
}

impl Play {
    async fn begin(kind: Kind, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let sources = [SOURCE, "pointsman:more"];
        let sources = &sources[..random.random_range(1..=2)];
        let retention = match kind {
            Kind::ShortLogs => Retention {
                log_entries: 30,
                everyone_entries: 60,
                ..Retention::default()
            },
            _ => Retention {
                log_entries: 100_000,
                everyone_entries: 100_000,
                ..Retention::default()
            },
        };
        let stage = match kind {
            Kind::Members { is_redis: false } => Stage::embedded_with(sources, retention).await,
            _ => Stage::redis_with(sources, retention).await,
        };
        if stage.is_redis() && random.random() {
            for source in sources {
                stage.number_ids_of(source);
            }
        }
        for (user, group) in MEMBERS {
            stage.join(user, group).await;
        }
        let partitions = stage
            .puppet
            .partitions()
            .iter()
            .map(|partition| partition.number)
            .collect();
        let mut hubs = Vec::new();
        for n in 0..2_u64 {
            let puppet = stage.another().await;
            let mut chance = StdRng::seed_from_u64(seed ^ n);
            puppet.lose(move |at| {
                matches!(
                    at,
                    At::Before(Op::Pages | Op::Records | Op::Head | Op::Recipient)
                ) && chance.random_bool(0.02)
            });
            hubs.push((
                // So little that streams return to replay for lack of it all the time.
                Hub::start_within(
                    BufferBudget::new(2 * 1024),
                    Arc::clone(&puppet) as Arc<dyn Broker>,
                    Metrics::default(),
                    &Shutdown::new(),
                ),
                puppet,
            ));
        }
        let clients = USERS
            .iter()
            .chain(&USERS)
            .map(|user| Client::new(user))
            .collect();
        let mut play = Self {
            kind,
            random,
            stage,
            partitions,
            hubs,
            owners: Vec::new(),
            stalled: Vec::new(),
            clients,
            published: Vec::new(),
            stays: Vec::new(),
            has_snapshot: false,
            n_started: 0,
        };
        for partition in play.partitions.clone() {
            for _ in 0..2 {
                play.start_owner(partition).await;
            }
        }
        for at in 0..play.clients.len() {
            play.clients[at].connect(&play.hubs[at % 2].0);
        }
        // Every client needs its first cursor before the run starts.
        until("every client has a cursor", async || {
            play.clients.iter_mut().for_each(|client| client.take(1));
            play.clients.iter().all(|client| client.cursor.is_some())
        })
        .await;
        play
    }

    /// Starts an owner that always believes it holds the lease.
    async fn start_owner(&mut self, partition: PartitionNumber) {
        let broker = self.stage.another().await;
        broker.everyone_owns();
        let mut chance = StdRng::seed_from_u64(self.random.random());
        let mut n_left = LOST_ANSWERS;
        broker.lose(move |at| {
            let (At::Before(op) | At::After(op)) = at;
            let is_lost =
                n_left > 0 && matches!(op, Op::Commit | Op::Slice) && chance.random_bool(0.02);
            n_left -= usize::from(is_lost);
            is_lost
        });
        self.n_started += 1;
        let owner = Owner::start_on(
            &broker,
            partition,
            &format!("owner{}", self.n_started),
            address(),
        );
        self.owners.push((owner, partition, broker));
    }

    /// Invents an event. `at` is the number of others to be published before it in the same batch.
    fn event(&mut self, at: usize) -> Published {
        let uid = format!("e{}", self.published.len() + at);
        let random = &mut self.random;
        let mut fields = vec![
            field("type", "t"),
            field("id", &uid),
            field("source", "/test"),
        ];
        match random.random_range(0..100) {
            0..30 => fields.push(field("user", USERS.choose(random).expect("some"))),
            30..50 => fields.push(field(
                "groups",
                ["ops", "ops,dev", "dev"].choose(random).expect("some"),
            )),
            50..60 => fields.extend([field("groups", "ops,crew"), field("users", "ann,bob")]),
            60..79 => fields.push(field("group", "crew")),
            79 => {
                // Sorted, these names lie before, between and after those of the users.
                let strangers =
                    (0..STRANGERS).map(|k| format!("{}{k}", ["a", "b", "c", "d"][k % 4]));
                let users: Vec<String> = strangers.chain(USERS.map(Into::into)).collect();
                fields.push(field("users", &users.join(",")));
            }
            80..90 => fields.push(field("everyone", "true")),
            // An event without recipients, or an invalid entry.
            _ if random.random() => {}
            _ => fields[0] = field("no-type", "t"),
        }
        fields.push(field(
            "priority",
            ["low", "normal", "normal", "high", "urgent"]
                .choose(random)
                .expect("some"),
        ));
        if random.random_bool(0.2) {
            fields.push(field(
                "collapse",
                ["k1", "k2"].choose(random).expect("some"),
            ));
        }
        if random.random_bool(0.05) {
            fields.push(field("ttl", "200ms"));
        }
        Published {
            partition: *self.partitions.choose(random).expect("some"),
            fields,
        }
    }

    /// Publishes like a real publisher: retries until the events are acknowledged.
    async fn publish(&mut self, partition: PartitionNumber, events: Vec<Published>) {
        let entries: Vec<_> = events.iter().map(|event| event.fields.clone()).collect();
        let broker = &self.stage.puppet.broker;
        answered("the events are published", async || {
            broker.append(partition, entries.clone()).await
        })
        .await;
        self.published.extend(events);
    }

    /// Ann joins "crew" or leaves it. The request is repeated until it is answered, as by any
    /// caller whose connection broke.
    async fn change_crew(&mut self) {
        let (ann, crew) = (name("ann"), name("crew"));
        let broker = &self.stage.puppet.broker;
        let before = self
            .stays
            .pop_if(|stays| stays.values().all(|stay| stay.left_by.is_none()));
        let group = crew.clone();
        let change = if before.is_some() {
            RecipientChange::Leave { group }
        } else {
            RecipientChange::Join { group }
        };
        answered("the membership is changed", async || {
            broker.change_recipient(&ann, change.clone()).await
        })
        .await;
        let recipient = answered("the membership is read", async || {
            broker.recipient(&ann).await
        })
        .await;
        let mut stays = HashMap::new();
        for &partition in &self.partitions {
            let top = answered("the head is read", async || broker.head(partition).await)
                .await
                .top();
            let before = before.as_ref().map(|before| before[&partition]);
            let span = recipient
                .groups
                .get(&crew)
                .and_then(|spans| spans.get(&partition))
                .copied();
            // The broker may forget an ended membership within which no event is kept.
            let forgotten = before.map(|Stay { span, .. }| Span {
                left: Some(span.joined),
                ..span
            });
            let stay = Stay {
                span: span.or(forgotten).expect("a user who joined is a member"),
                joined_by: before.map_or(top, |before| before.joined_by),
                left_by: before.map(|_| top),
            };
            stays.insert(partition, stay);
        }
        self.stays.push(stays);
    }

    fn fail_over(&mut self) {
        self.stage.server().fail_over();
        if self.random.random() {
            self.stage.server().cut("pubsub");
        }
    }

    /// Every owner holds a batch, read partly before the replica's state and partly after it, while
    /// another primary takes over.
    async fn fail_over_in_the_midst(&mut self) {
        let stops: Vec<Stop> = self
            .owners
            .iter()
            .map(|(.., broker)| broker.stop(At::Before(Op::Commit)))
            .collect();
        self.publish_some().await;
        self.stage.server().snapshot();
        self.has_snapshot = true;
        self.publish_some().await;
        self.fail_over();
        stops.into_iter().for_each(Stop::go);
    }

    /// Publishes some events and gives the owners a moment to read them.
    async fn publish_some(&mut self) {
        for _ in 0..self.random.random_range(1..5) {
            let event = self.event(0);
            self.publish(event.partition, vec![event]).await;
        }
        tokio::time::sleep(Duration::from_millis(self.random.random_range(0..20))).await;
    }

    async fn step(&mut self) {
        match self.random.random_range(0..1_000) {
            0..500 => {
                let event = self.event(0);
                self.publish(event.partition, vec![event]).await;
            }
            500..520 => {
                // The publisher does not know whether its request got through and retries.
                if let Some(again) = self.published.choose(&mut self.random).cloned() {
                    self.publish(again.partition, vec![again]).await;
                }
            }
            520..526 => {
                // More than an unread stream can queue.
                let burst: Vec<_> = (0..300)
                    .map(|at| Published {
                        partition: self.partitions[0],
                        ..self.event(at)
                    })
                    .collect();
                self.publish(self.partitions[0], burst).await;
            }
            526..850 => {
                let (at, n) = (
                    self.random.random_range(0..self.clients.len()),
                    self.random.random_range(1..30),
                );
                self.clients[at].take(n);
                tokio::task::yield_now().await;
            }
            850..900 => {
                let at = self.random.random_range(0..self.clients.len());
                let client = &mut self.clients[at];
                client.stream = None;
                if self.random.random_bool(0.8) {
                    client.connect(&self.hubs[self.random.random_range(0..2)].0);
                }
            }
            900..915 => {
                let at = self.random.random_range(0..self.owners.len());
                let (owner, partition, _) = self.owners.remove(at);
                owner.kill().await;
                self.start_owner(partition).await;
            }
            915..930 => {
                let at = *[
                    At::Before(Op::Commit),
                    At::After(Op::Commit),
                    At::Before(Op::Slice),
                ]
                .choose(&mut self.random)
                .expect("some");
                let (.., broker) = self.owners.choose(&mut self.random).expect("some");
                self.stalled.push(broker.stop(at));
            }
            930..945 if !self.stalled.is_empty() => {
                let stop = self
                    .stalled
                    .swap_remove(self.random.random_range(0..self.stalled.len()));
                if self.random.random() {
                    stop.go()
                } else {
                    stop.fail()
                }
            }
            945..965 if self.stage.is_redis() => self.stage.server().cut("pubsub"),
            965..972 if self.stage.is_redis() => self.stage.server().cut("normal"),
            972..988 if matches!(self.kind, Kind::FailOvers) => {
                self.stage.server().snapshot();
                self.has_snapshot = true;
            }
            988..994 if matches!(self.kind, Kind::FailOvers) && self.has_snapshot => {
                self.fail_over()
            }
            994..1_000 if matches!(self.kind, Kind::FailOvers) => {
                self.fail_over_in_the_midst().await
            }
            972..994 if matches!(self.kind, Kind::Members { .. }) => self.change_crew().await,
            _ => tokio::time::sleep(Duration::from_millis(self.random.random_range(0..5))).await,
        }
    }

    /// Ends all faults, reconnects every client and takes frames until a final event has reached
    /// each of them.
    async fn settle(&mut self) {
        for (_, puppet) in &self.hubs {
            puppet.lose(|_| false);
        }
        self.stalled.clear();
        for partition in self.partitions.clone() {
            // Low priority, so that everything else is sent before it.
            let fields = vec![
                field("type", "t"),
                field("id", "end"),
                field("source", "/end"),
                field("everyone", "true"),
                field("priority", "low"),
            ];
            self.publish(partition, vec![Published { partition, fields }])
                .await;
        }
        for (at, client) in self
            .clients
            .iter_mut()
            .enumerate()
            .filter(|(_, client)| client.stream.is_none())
        {
            client.connect(&self.hubs[at % 2].0);
        }
        let deadline = Instant::now() + 3 * SOON;
        loop {
            self.clients
                .iter_mut()
                .for_each(|client| client.take(1_000));
            let is_done = |client: &Client| {
                self.partitions
                    .iter()
                    .all(|&partition| client.has(partition, "end"))
            };
            if self.clients.iter().all(is_done) {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "a client did not receive the final event"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for (owner, ..) in self.owners.drain(..) {
            owner.stop().await;
        }
    }
}

async fn play(kind: Kind, seed: u64) {
    let mut play = Play::begin(kind, seed).await;
    for _ in 0..STEPS {
        play.step().await;
    }
    play.settle().await;
    play.check().await;
}

/// The number of runs of each kind.
fn n_plays() -> u64 {
    if std::env::var_os("LONG").is_some_and(|long| long != "0") {
        200
    } else {
        3
    }
}

async fn plays(kind: Kind) {
    let seed = seed::seed(&format!("{kind:?}"));
    for n in 0..n_plays() {
        let seed = seed.wrapping_add(n);
        eprintln!("{kind:?}: POINTSMAN_TEST_SEED={seed}");
        play(kind, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fail_overs_lose_only_events_that_a_gap_announces() {
    plays(Kind::FailOvers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_receive_exactly_their_events_on_redis() {
    plays(Kind::Members { is_redis: true }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_receive_exactly_their_events_on_the_embedded_broker() {
    plays(Kind::Members { is_redis: false }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_trimmed_from_short_logs_are_announced() {
    plays(Kind::ShortLogs).await;
}
