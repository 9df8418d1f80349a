//! Tests random histories against a simple model. Across appends, ticks, losses, overflows,
//! rewinds, trims and resumes, each notification arrives once (again only after a gap that
//! announces it), in order except for higher priorities, by the route that wins at the time of
//! sending, and never after it has expired. None is missing except those expired by every route and
//! those superseded by a later one with the same key.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use proptest::collection::vec;
use proptest::prelude::*;

use super::cursor::{MAX_SENT_AHEAD, SentAhead, SentRoute};
use super::*;
use crate::event::criteria::Pool;
use crate::event::{EntryId, Event, Notification, Plan, Position as EntryPosition, Route};

/// A step of a history. The numbers choose among the possibilities at the time.
#[derive(Clone, Debug)]
enum Step {
    /// Commits to a partition, with one route or two to the same user. Its notice waits in the
    /// feed, or is lost together with the feed.
    Commit {
        partition: u8,
        route: Choice,
        other: Option<Choice>,
        is_lost: bool,
    },
    /// Time passes.
    Wait {
        ms: u8,
    },
    Tick {
        partition: u8,
    },
    /// The node receives this many of the notices that wait.
    Receive {
        partition: u8,
        n: u8,
    },
    /// The socket takes this many items.
    Send(u8),
    /// The active replay handles this many ids.
    Replay {
        partition: u8,
        n: u8,
    },
    /// The connection breaks; the client resumes with its last cursor.
    Cut,
    /// The feed of a partition is reset.
    Reset {
        partition: u8,
    },
    /// The log of a partition is trimmed to this many entries.
    Trim {
        partition: u8,
        n_kept: u8,
    },
    /// The newest notifications of a partition are lost, an epoch begins, and their ids are issued
    /// again. The feed is cut or continues.
    FailOver {
        partition: u8,
        n_lost: u8,
        cuts: bool,
    },
}

/// A route: priority, one of two collapse keys or none, and a time to live, if limited.
#[derive(Clone, Copy, Debug)]
struct Choice {
    priority: usize,
    key: u8,
    ttl_ms: Option<u64>,
}

fn choice() -> impl Strategy<Value = Choice> {
    (0..4_usize, 0..6_u8, prop::option::weighted(0.3, 1..40_u64)).prop_map(
        |(priority, key, ttl_ms)| Choice {
            priority,
            key,
            ttl_ms,
        },
    )
}

/// Uses a socket that often breaks, or a slow one, so that buffers overflow while a stream stays
/// live.
fn steps(has_fail_overs: bool, is_slow: bool) -> impl Strategy<Value = Vec<Step>> {
    let (sends, breaks) = if is_slow { (6, 1) } else { (40, 10) };
    let fail_overs = if has_fail_overs { 6 } else { 0 };
    let step = prop_oneof![
        80 => (0..2_u8, choice(), prop::option::weighted(0.2, choice()), prop::bool::weighted(0.05))
            .prop_map(|(partition, route, other, is_lost)| Step::Commit { partition, route, other, is_lost }),
        20 => (1..20_u8).prop_map(|ms| Step::Wait { ms }),
        20 => (0..2_u8).prop_map(|partition| Step::Tick { partition }),
        80 => (0..2_u8, 1..5_u8).prop_map(|(partition, n)| Step::Receive { partition, n }),
        sends => (0..4_u8).prop_map(Step::Send),
        40 => (0..2_u8, 1..9_u8).prop_map(|(partition, n)| Step::Replay { partition, n }),
        breaks => Just(Step::Cut),
        breaks => (0..2_u8).prop_map(|partition| Step::Reset { partition }),
        breaks => (0..2_u8, 1..12_u8).prop_map(|(partition, n_kept)| Step::Trim { partition, n_kept }),
        fail_overs => (0..2_u8, 0..4_u8, any::<bool>()).prop_map(|(partition, n_lost, cuts)| Step::FailOver { partition, n_lost, cuts }),
    ];
    vec(step, 0..300)
}

fn record(event: u64, priority: usize, key: u8) -> Arc<Record> {
    record_of(event, [route(priority, key, None)])
}

fn route(priority: usize, key: u8, expires_ms: Option<u64>) -> Route {
    Route {
        by: Name::parse("test").unwrap(),
        to: vec![Target::User(Name::parse("ann").unwrap())],
        when: None,
        priority: Priority::ALL[priority],
        expires_ms,
        collapse: (key < 2).then(|| Name::parse(&format!("k{key}")).unwrap()),
        event_name: None,
        body: None,
        slot: None,
    }
}

fn record_of(event: u64, routes: impl IntoIterator<Item = Route>) -> Arc<Record> {
    let document = format!(r#"{{"type":"t","id":"{event}"}}"#);
    let event = Event::from_json(EntryId::default(), "test", document.as_bytes()).unwrap();
    let notification = Notification {
        entry: EntryId::default(),
        event,
        plan: Plan {
            routes: routes.into_iter().collect(),
        },
    };
    Arc::new(Record::parse(&serde_json::to_vec(&notification).unwrap()).unwrap())
}

fn routes(record: &Record) -> &[Route] {
    &record.notification().plan.routes
}

/// The event of a record: notification ids are issued again after a rewind, event ids never.
fn event_of(record: &Record) -> u64 {
    record.notification().event.id.as_str().parse().unwrap()
}

/// A replay in progress: the last id of the head, and the next id to hand over.
struct Running {
    round: u64,
    last: u64,
    next: u64,
}

enum Notice {
    Append(u64, Arc<Record>),
    Tick(u64),
}

/// An item of one partition that the client received.
#[derive(Clone, Debug)]
enum Received {
    Event {
        id: u64,
        event: u64,
        priority: Priority,
        key: Option<Name>,
        /// One of its routes has a key.
        is_state: bool,
    },
    /// Notifications above this id may arrive again.
    Rewound { from: u64 },
}

/// A partition in the broker, with the node's state for it.
struct SimulatedPartition {
    history: BTreeMap<u64, Arc<Record>>,
    epochs: Vec<(Epoch, NotificationId)>,
    n_epochs: u16,
    running: Option<Running>,
    /// The feed delivers nothing more until it is reset.
    is_feed_lost: bool,
    feed: VecDeque<(Epoch, Notice)>,
    /// The epoch that the node considers current.
    believed: Option<Epoch>,
    received: Vec<Received>,
    /// All routes with a key that were ever committed, including those that were lost: id, key.
    keyed: Vec<(u64, Name)>,
    n_rewinds: usize,
}

impl SimulatedPartition {
    fn epoch(&self) -> Epoch {
        self.epochs.last().unwrap().0
    }

    fn last(&self) -> u64 {
        self.history.keys().next_back().copied().unwrap_or(50)
    }
}

/// A broker of two partitions, a node and a client.
struct World {
    partitions: [SimulatedPartition; 2],
    subscription: Subscription,
    cursor: Option<String>,
    n_events: u64,
    /// The clock of both broker and node.
    now_ms: u64,
}

fn number(partition: u8) -> PartitionNumber {
    PartitionNumber(partition)
}

impl World {
    fn new() -> Self {
        let partition = || SimulatedPartition {
            history: BTreeMap::new(),
            epochs: vec![(Epoch::from_bits(0), NotificationId(0))],
            n_epochs: 0,
            running: None,
            is_feed_lost: false,
            feed: VecDeque::new(),
            believed: None,
            received: Vec::new(),
            keyed: Vec::new(),
            n_rewinds: 0,
        };
        let mut world = Self {
            partitions: [partition(), partition()],
            subscription: Subscription::new(
                Name::parse("ann").unwrap(),
                Start::Latest,
                Filter::default(),
                [],
            ),
            cursor: None,
            n_events: 0,
            now_ms: 1_000,
        };
        world.connect(Start::Latest);
        // Even a client that received no notification has a cursor.
        world.replay(0, 0);
        world.replay(1, 0);
        world.send(1);
        assert!(world.cursor.is_some());
        world
    }

    fn partition(&mut self, number: u8) -> &mut SimulatedPartition {
        &mut self.partitions[usize::from(number)]
    }

    fn connect(&mut self, start: Start) {
        self.subscription = Subscription::new(
            Name::parse("ann").unwrap(),
            start,
            Filter::default(),
            [number(0), number(1)],
        );
        let ticket = self.subscription.begin_recipient_read();
        self.subscription
            .set_recipient(ticket, Arc::default(), &Pool::default());
        for partition in 0..2 {
            self.reset(partition);
        }
    }

    /// Reconnects the feed: notices that waited in it are lost.
    fn reset(&mut self, partition: u8) {
        let place = self.partition(partition);
        place.is_feed_lost = false;
        place.feed.clear();
        self.enter_replay(partition);
    }

    fn enter_replay(&mut self, partition: u8) {
        let round = self.subscription.enter_replay(number(partition));
        self.run(partition, round);
    }

    fn run(&mut self, partition: u8, round: u64) {
        self.partition(partition).running = Some(Running {
            round,
            last: 0,
            next: 0,
        });
    }

    fn replay(&mut self, partition: u8, n: u8) {
        let now_ms = self.now_ms;
        let place = &mut self.partitions[usize::from(partition)];
        let (last, epoch) = (place.last(), place.epoch());
        let Some(running) = &mut place.running else {
            return;
        };
        assert_eq!(running.round, self.subscription.round(number(partition)));
        if running.next == 0 {
            let head = Head {
                epoch,
                epochs: place.epochs.clone(),
                last: NotificationId(last),
                pending: None,
                position: EntryPosition::default(),
                floor: NotificationId(0),
                origin: NotificationId(0),
                now_ms,
            };
            self.subscription.begin(number(partition), &head);
            for id in self.subscription.unread_sent_ahead(number(partition)) {
                let record = place.history.get(&id.0).cloned();
                self.subscription
                    .set_sent_ahead(number(partition), id, record.as_deref());
            }
            running.last = last;
            running.next = self.subscription.marks(number(partition)).0.0 + 1;
        }
        for _ in 0..n {
            if !self.subscription.has_room(number(partition)) {
                return;
            }
            let Some((&id, record)) = place
                .history
                .range(running.next..)
                .next()
                .filter(|(id, _)| **id <= running.last)
            else {
                let again = self.subscription.go_live(
                    number(partition),
                    NotificationId(running.last),
                    now_ms,
                );
                place.running = again.map(|round| Running {
                    round,
                    last: 0,
                    next: 0,
                });
                return;
            };
            self.subscription
                .handle(number(partition), NotificationId(id), record, now_ms);
            running.next = id + 1;
        }
    }

    /// Reads the current epoch, and sends the stream to replay if it is in another.
    fn check_epoch(&mut self, partition: u8) -> Epoch {
        let place = self.partition(partition);
        let current = place.epoch();
        let is_new = place.believed != Some(current);
        place.believed = Some(current);
        if self
            .subscription
            .epoch(number(partition))
            .map_or(is_new, |epoch| epoch != current)
        {
            self.enter_replay(partition);
        }
        current
    }

    fn receive(&mut self, partition: u8) {
        let Some((epoch, notice)) = self.partition(partition).feed.pop_front() else {
            return;
        };
        if self.partition(partition).believed != Some(epoch) && self.check_epoch(partition) != epoch
        {
            return;
        }
        let is_elsewhere = self
            .subscription
            .is_live_in_other_epoch(number(partition), epoch);
        match notice {
            Notice::Append(id, record) => {
                if let Some(round) = self.subscription.on_append(
                    number(partition),
                    epoch,
                    NotificationId(id),
                    &record,
                    self.now_ms,
                ) {
                    self.run(partition, round);
                }
            }
            Notice::Tick(last) => {
                self.subscription
                    .on_tick(number(partition), epoch, NotificationId(last))
            }
        }
        if is_elsewhere {
            self.check_epoch(partition);
        }
    }

    fn send(&mut self, n: u8) {
        for _ in 0..n {
            let Some(next) = self.subscription.next(self.now_ms) else {
                return;
            };
            let mut cursor = String::new();
            self.subscription.encode_cursor(&mut cursor);
            let read = Cursor::decode(&cursor, &Name::parse("ann").unwrap());
            assert!(read.is_ok(), "{cursor} {read:?}: {:?}", self.subscription);
            assert!(self.subscription.ahead.sent().count() <= MAX_SENT_AHEAD);
            match next {
                Next::Notification {
                    partition,
                    id,
                    record,
                    route_match,
                } => {
                    let Route {
                        priority, collapse, ..
                    } = record.route(route_match.route);
                    let holding = routes(&record)
                        .iter()
                        .enumerate()
                        .filter(|(_, route)| holds(route, self.now_ms))
                        .rev();
                    let winner = holding
                        .max_by_key(|(_, route)| route.priority)
                        .map(|(n, _)| n);
                    assert_eq!(
                        Some(route_match.route),
                        winner,
                        "{id:?} of {record:?} at {}",
                        self.now_ms
                    );
                    let (priority, key) = (*priority, collapse.clone());
                    let is_state = routes(&record).iter().any(|route| route.collapse.is_some());
                    self.partition(partition.0).received.push(Received::Event {
                        id: id.0,
                        event: event_of(&record),
                        priority,
                        key,
                        is_state,
                    });
                }
                Next::Gap(gap) => {
                    assert_eq!(gap.reason, GapReason::Rewound, "nothing was trimmed");
                    assert!(gap.from < gap.to, "{gap:?}");
                    self.partition(gap.partition.0)
                        .received
                        .push(Received::Rewound { from: gap.from.0 });
                    continue;
                }
                Next::Cursor => {}
            }
            self.cursor = Some(cursor);
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Commit {
                partition,
                route: choice,
                other,
                is_lost,
            } => {
                self.n_events += 1;
                let made = |choice: Choice| {
                    route(
                        choice.priority,
                        choice.key,
                        choice.ttl_ms.map(|ttl_ms| self.now_ms + ttl_ms),
                    )
                };
                let record = record_of(
                    self.n_events,
                    [Some(choice), other].into_iter().flatten().map(made),
                );
                let place = self.partition(partition);
                let id = place.last() + 1 + u64::from(choice.key) % 3;
                place.history.insert(id, Arc::clone(&record));
                place.keyed.extend(
                    routes(&record)
                        .iter()
                        .filter_map(|route| Some((id, route.collapse.clone()?))),
                );
                // FIFO: a feed loses a tail, never something in between.
                place.is_feed_lost |= is_lost;
                if !place.is_feed_lost {
                    place
                        .feed
                        .push_back((place.epoch(), Notice::Append(id, record)));
                }
            }
            Step::Wait { ms } => self.now_ms += u64::from(ms),
            Step::Tick { partition } => {
                let place = self.partition(partition);
                if !place.is_feed_lost {
                    place
                        .feed
                        .push_back((place.epoch(), Notice::Tick(place.last())));
                }
            }
            Step::Receive { partition, n } => (0..n).for_each(|_| self.receive(partition)),
            Step::Send(n) => self.send(n),
            Step::Replay { partition, n } => self.replay(partition, n),
            Step::Cut => {
                let start = self
                    .cursor
                    .as_ref()
                    .map(|cursor| Cursor::decode(cursor, &Name::parse("ann").unwrap()).unwrap());
                self.connect(start.map_or(Start::Latest, Start::Cursor));
            }
            Step::Reset { partition } => self.reset(partition),
            Step::Trim { partition, n_kept } => {
                let history = &mut self.partition(partition).history;
                if let Some(&first) = history.keys().rev().nth(usize::from(n_kept)) {
                    *history = history.split_off(&(first + 1));
                }
            }
            Step::FailOver {
                partition,
                n_lost,
                cuts,
            } => {
                let place = self.partition(partition);
                // At least one entry of a trimmed log survives.
                let lost: Vec<u64> = place
                    .history
                    .keys()
                    .skip(1)
                    .rev()
                    .take(n_lost.into())
                    .copied()
                    .collect();
                place.history.retain(|id, _| !lost.contains(id));
                place.n_rewinds += usize::from(!lost.is_empty());
                // The promoted replica had not received epochs that began after its last entry.
                let last = NotificationId(place.last());
                place.epochs.retain(|(_, survived)| *survived <= last);
                place.n_epochs += 1;
                place.epochs.push((Epoch::from_bits(place.n_epochs), last));
                if cuts {
                    self.reset(partition);
                }
            }
        }
    }

    /// Lets everything settle: lost feeds and new epochs are detected, replays end, the socket
    /// drains all.
    fn settle(&mut self) {
        for partition in 0..2 {
            if self.partition(partition).is_feed_lost {
                self.reset(partition);
            }
            self.take(&Step::Tick { partition });
        }
        for _ in 0..200 {
            for partition in 0..2 {
                self.take(&Step::Receive { partition, n: 255 });
                self.replay(partition, 255);
            }
            self.send(255);
        }
        assert!(self.subscription.is_idle(), "{:?}", self.subscription);
    }

    fn check(&self) {
        for place in &self.partitions {
            place.check(self.now_ms);
        }
    }
}

fn holds(route: &Route, now_ms: u64) -> bool {
    route
        .expires_ms
        .is_none_or(|expires_ms| expires_ms > now_ms)
}

impl SimulatedPartition {
    fn check(&self, now_ms: u64) {
        let Self {
            history,
            received,
            keyed,
            ..
        } = self;
        // Received since the last rewind, except those that the rewind allowed to repeat.
        let mut received_ids: HashMap<u64, u64> = HashMap::new();
        let mut ever: HashSet<u64> = HashSet::new();
        let mut before: Vec<(u64, Priority, &Option<Name>)> = Vec::new();
        let mut n_rewound = 0;
        for one in received {
            match one {
                Received::Rewound { from } => {
                    n_rewound += 1;
                    received_ids.retain(|_, id| *id <= *from);
                    before.clear();
                }
                Received::Event {
                    id,
                    event,
                    priority,
                    key,
                    is_state,
                } => {
                    assert!(
                        received_ids.insert(*event, *id).is_none(),
                        "{id} arrived twice: {received:?}"
                    );
                    ever.insert(*event);
                    for (earlier, early, early_key) in
                        before.iter().filter(|(earlier, ..)| earlier > id)
                    {
                        // Only a more urgent one may precede it. An id with a key may come back
                        // late, even by a route without one, but never after its successor.
                        assert!(
                            early > priority || *is_state,
                            "{earlier} arrived before {id}: {received:?}"
                        );
                        assert!(
                            key.is_none() || key != *early_key,
                            "the older state {id} arrived after {earlier}: {received:?}"
                        );
                    }
                    before.push((*id, *priority, key));
                }
            }
        }
        assert!(
            n_rewound == 0 || self.n_rewinds > 0,
            "a gap without a rewind: {received:?}"
        );
        for (&id, record) in history {
            let is_state = |key: &Name| {
                routes(record)
                    .iter()
                    .any(|route| route.collapse.as_ref() == Some(key))
            };
            let is_superseded = keyed
                .iter()
                .any(|(later, key)| *later > id && is_state(key));
            let is_expired = routes(record).iter().all(|route| !holds(route, now_ms));
            assert!(
                ever.contains(&event_of(record)) || is_superseded || is_expired,
                "{id} is missing from {received:?}"
            );
        }
    }
}

const P: PartitionNumber = PartitionNumber(0);

/// Returns a subscription that overflowed in its first epoch, with this urgent notification about
/// to be sent ahead of the replay.
fn overflowed(urgent_id: u64) -> Subscription {
    let mut subscription = Subscription::new(
        Name::parse("ann").unwrap(),
        Start::Latest,
        Filter::default(),
        [P],
    );
    let ticket = subscription.begin_recipient_read();
    subscription.set_recipient(ticket, Arc::default(), &Pool::default());
    let round = subscription.enter_replay(P);
    subscription.begin(P, &head(&[(1, 0)], 50));
    assert_eq!(subscription.go_live(P, NotificationId(50), 0), None);
    assert!(matches!(subscription.next(0), Some(Next::Cursor)));
    let mut id = 50;
    let normal = Priority::Normal as usize;
    while subscription.round(P) == round {
        id += 1;
        assert!(id < urgent_id);
        subscription.on_append(
            P,
            Epoch::from_bits(1),
            NotificationId(id),
            &record(id, normal, 9),
            0,
        );
    }
    subscription.on_append(
        P,
        Epoch::from_bits(1),
        NotificationId(urgent_id),
        &record(urgent_id, Priority::Urgent as usize, 9),
        0,
    );
    assert_eq!(subscription.ahead.n_pending(), 1);
    subscription
}

fn head(epochs: &[(u16, u64)], last: u64) -> Head {
    let epochs: Vec<_> = epochs
        .iter()
        .map(|&(epoch, survived)| (Epoch::from_bits(epoch), NotificationId(survived)))
        .collect();
    let (epoch, last) = (epochs.last().unwrap().0, NotificationId(last));
    let (floor, origin) = (NotificationId(0), NotificationId(0));
    Head {
        epoch,
        epochs,
        last,
        pending: None,
        position: EntryPosition::default(),
        floor,
        origin,
        now_ms: 0,
    }
}

/// It belongs to the ended epoch. If it were sent, the cursor would list its id as sent ahead, and
/// the notification with the same id in the new epoch would be skipped.
#[test]
fn an_urgent_notification_waiting_to_be_sent_ahead_is_dropped_with_its_epoch() {
    let mut subscription = overflowed(100);
    subscription.begin(P, &head(&[(1, 0), (2, 50)], 50));
    // The socket has room again and drains everything.
    while subscription.next(0).is_some() {}
    assert_eq!(subscription.go_live(P, NotificationId(50), 0), None);
    let epoch = Epoch::from_bits(2);
    subscription.on_append(
        P,
        epoch,
        NotificationId(100),
        &record(7, Priority::Normal as usize, 9),
        0,
    );
    match subscription.next(0) {
        Some(Next::Notification { record, .. }) => assert_eq!(event_of(&record), 7),
        other => panic!("{other:?}"),
    }
    assert!(subscription.next(0).is_none());
}

/// The log is trimmed before the replay reaches the id: it then waits in its queue, before later
/// ones of its priority. The cursor keeps no id below the low-water mark, with which it could not
/// be parsed.
#[test]
fn an_urgent_notification_waiting_to_be_sent_ahead_keeps_its_order_when_its_log_is_trimmed() {
    let mut subscription = overflowed(100);
    subscription.begin(P, &head(&[(1, 0)], 200));
    subscription.handle(
        P,
        NotificationId(150),
        &record(150, Priority::Urgent as usize, 9),
        0,
    );
    assert_eq!(subscription.go_live(P, NotificationId(200), 0), None);
    for expect in [100, 150] {
        assert!(
            matches!(subscription.next(0), Some(Next::Notification { id, .. }) if id.0 == expect)
        );
    }
    let mut cursor = String::new();
    subscription.encode_cursor(&mut cursor);
    let cursor = Cursor::decode(&cursor, &Name::parse("ann").unwrap()).expect("its own");
    assert_eq!(
        (cursor.positions[0].low_water, cursor.sent_ahead.len()),
        (NotificationId(200), 0)
    );
    // The same if the index lists the id but the record is gone: the subscription still holds the
    // record, so nothing is missing.
    let mut subscription = overflowed(100);
    subscription.begin(P, &head(&[(1, 0)], 200));
    assert!(!subscription.skip(P, NotificationId(100)));
    assert!(matches!(
        subscription.next(0),
        Some(Next::Notification {
            id: NotificationId(100),
            ..
        })
    ));
}

/// A subscription resumed with a cursor at 50 that lists 60 as sent ahead by this route.
fn resumed_after(route: usize) -> Subscription {
    let position = Position {
        partition: P,
        epoch: Epoch::from_bits(1),
        low_water: NotificationId(50),
    };
    let sent_ahead = SentAhead {
        partition: P,
        id: NotificationId(60),
        route: SentRoute::new(route),
    };
    let cursor = Cursor {
        positions: vec![position],
        sent_ahead: vec![sent_ahead],
    };
    let mut subscription = Subscription::new(
        Name::parse("ann").unwrap(),
        Start::Cursor(cursor),
        Filter::default(),
        [P],
    );
    subscription.begin(P, &head(&[(1, 0)], 60));
    subscription
}

/// The newer state was sent ahead and has expired when the client resumes. The older state stays
/// superseded.
#[test]
fn a_state_sent_ahead_supersedes_older_ones_even_after_it_has_expired() {
    let mut subscription = resumed_after(0);
    let newer = record_of(60, [route(Priority::Urgent as usize, 0, Some(1_000))]);
    let now_ms = 2_000;
    subscription.set_sent_ahead(P, NotificationId(60), Some(&newer));
    subscription.handle(
        P,
        NotificationId(55),
        &record(55, Priority::Low as usize, 0),
        now_ms,
    );
    subscription.handle(P, NotificationId(60), &newer, now_ms);
    assert_eq!(subscription.go_live(P, NotificationId(60), now_ms), None);
    assert!(matches!(subscription.next(now_ms), Some(Next::Cursor)));
    assert!(subscription.next(now_ms).is_none());
}

/// The cursor names the route that sent it. Older states of another route are not superseded.
#[test]
fn a_notification_sent_ahead_supersedes_older_states_of_its_route_only() {
    let newer = record_of(
        60,
        [
            route(Priority::Urgent as usize, 0, Some(1_000)),
            route(Priority::High as usize, 1, None),
        ],
    );
    let now_ms = 2_000;
    for (sent_by, older) in [(0, [55, 56]), (1, [54, 56])] {
        let mut subscription = resumed_after(sent_by);
        subscription.set_sent_ahead(P, NotificationId(60), Some(&newer));
        for (id, key) in [(54, 0), (55, 1), (56, 9)] {
            subscription.handle(
                P,
                NotificationId(id),
                &record(id, Priority::Low as usize, key),
                now_ms,
            );
        }
        assert!(matches!(subscription.next(now_ms), Some(Next::Cursor)));
        for expected in older {
            let next = subscription.next(now_ms);
            assert!(
                matches!(&next, Some(Next::Notification { id, .. }) if id.0 == expected),
                "{next:?}"
            );
        }
        assert!(subscription.next(now_ms).is_none());
    }
}

/// A hostile client may name a route that the plan does not have.
#[test]
fn a_cursor_that_names_an_unknown_route_supersedes_nothing() {
    let mut subscription = resumed_after(62);
    subscription.set_sent_ahead(
        P,
        NotificationId(60),
        Some(&record(60, Priority::Urgent as usize, 0)),
    );
    subscription.handle(
        P,
        NotificationId(54),
        &record(54, Priority::Low as usize, 0),
        0,
    );
    assert!(matches!(subscription.next(0), Some(Next::Cursor)));
    assert!(matches!(
        subscription.next(0),
        Some(Next::Notification {
            id: NotificationId(54),
            ..
        })
    ));
}

/// It waits for a slow socket until its winning route expires: the other route delivers it, in its
/// original position.
#[test]
fn a_notification_that_expires_by_one_route_arrives_by_another() {
    let mut subscription = Subscription::new(
        Name::parse("ann").unwrap(),
        Start::Latest,
        Filter::default(),
        [P],
    );
    let ticket = subscription.begin_recipient_read();
    subscription.set_recipient(ticket, Arc::default(), &Pool::default());
    subscription.enter_replay(P);
    subscription.begin(P, &head(&[(1, 0)], 50));
    assert_eq!(subscription.go_live(P, NotificationId(50), 0), None);
    let (normal, low) = (Priority::Normal as usize, Priority::Low as usize);
    let both = record_of(
        60,
        [
            route(Priority::Urgent as usize, 9, Some(1_000)),
            route(normal, 9, None),
        ],
    );
    for (id, record) in [
        (55, record(55, normal, 9)),
        (60, both),
        (65, record(65, normal, 9)),
        (66, record(66, low, 9)),
    ] {
        subscription.on_append(P, Epoch::from_bits(1), NotificationId(id), &record, 0);
    }
    assert!(matches!(subscription.next(2_000), Some(Next::Cursor)));
    for expect in [55, 60, 65, 66] {
        assert!(
            matches!(subscription.next(2_000), Some(Next::Notification { id, .. }) if id.0 == expect),
            "{expect}"
        );
    }
    assert_eq!(subscription.marks(P).0, NotificationId(66));
}

/// The first one waits to be sent ahead by a route that expires; by its other route it is still
/// urgent.
#[test]
fn a_notification_waiting_to_be_sent_ahead_switches_to_another_urgent_route() {
    let mut subscription = overflowed(100);
    let urgent = Priority::Urgent as usize;
    let both = record_of(110, [route(urgent, 9, Some(1_000)), route(urgent, 9, None)]);
    let passing = record_of(
        115,
        [
            route(urgent, 9, Some(1_000)),
            route(Priority::Low as usize, 9, None),
        ],
    );
    for (id, record) in [(110, both), (115, passing)] {
        subscription.on_append(P, Epoch::from_bits(1), NotificationId(id), &record, 0);
    }
    assert_eq!(subscription.ahead.n_pending(), 3);
    subscription.begin(P, &head(&[(1, 0)], 115));
    for expect in [100, 110] {
        assert!(
            matches!(subscription.next(2_000), Some(Next::Notification { id, .. }) if id.0 == expect),
            "{expect}"
        );
    }
    assert!(
        subscription.next(2_000).is_none(),
        "the third is left to the replay"
    );
}

/// A stream that ends before it began lacks a position in some partition; a cursor without that
/// partition would restart it there.
#[test]
fn no_cursor_is_written_until_every_partition_has_a_position() {
    let mut subscription = Subscription::new(
        Name::parse("ann").unwrap(),
        Start::Latest,
        Filter::default(),
        [number(0), number(1)],
    );
    subscription.begin(number(0), &head(&[(1, 0)], 50));
    let mut cursor = String::new();
    subscription.encode_cursor(&mut cursor);
    assert_eq!(cursor, "");
    subscription.begin(number(1), &head(&[(1, 0)], 50));
    subscription.encode_cursor(&mut cursor);
    assert_eq!(
        Cursor::decode(&cursor, &Name::parse("ann").unwrap())
            .unwrap()
            .positions
            .len(),
        2
    );
}

/// `LONG=1` runs twenty times as many cases.
fn cases() -> u32 {
    if std::env::var_os("LONG").is_some_and(|long| long != "0") {
        100_000
    } else {
        5_000
    }
}

fn play(steps: &[Step]) {
    let mut world = World::new();
    for step in steps {
        world.take(step);
    }
    world.settle();
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_notification_arrives_once_and_in_order_under_any_history(steps in prop_oneof![steps(false, false), steps(false, true)]) {
        play(&steps);
    }

    #[test]
    fn a_fail_over_repeats_nothing_without_a_gap_and_loses_nothing_that_survived(steps in prop_oneof![steps(true, false), steps(true, true)]) {
        play(&steps);
    }
}
