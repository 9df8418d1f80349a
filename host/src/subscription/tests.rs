//! Random histories against a simple model: whatever is appended, ticked, lost, overflowed, cut and resumed, each notification comes once,
//! in order but for higher priorities, and none is missing but those that a later one with the same key made superfluous.

use std::collections::{BTreeMap, HashMap};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::event::{EntryId, Event, Plan, Position as EntryPosition};

const LIFE: Life = Life::from_bits(7);

/// What may happen next; the numbers choose among what is possible at the time.
#[derive(Clone, Debug)]
enum Step {
    /// Commits to a partition: priority, and a collapse key of two or none. Its notice arrives, or is lost with the feed.
    Commit {
        partition: u8,
        priority: usize,
        key: u8,
        is_lost: bool,
    },
    Tick {
        partition: u8,
    },
    /// The socket takes so many.
    Send(u8),
    /// A replay that runs handles so many.
    Replay {
        partition: u8,
        n: u8,
    },
    /// The connection breaks; the client comes back with its last cursor.
    Cut,
    /// The feed of a partition is reset.
    Reset {
        partition: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..2_u8, 0..4_usize, 0..6_u8, prop::bool::weighted(0.05)).prop_map(|(partition, priority, key, is_lost)| Step::Commit { partition, priority, key, is_lost }),
        2 => (0..2_u8).prop_map(|partition| Step::Tick { partition }),
        4 => (0..4_u8).prop_map(Step::Send),
        4 => (0..2_u8, 1..9_u8).prop_map(|(partition, n)| Step::Replay { partition, n }),
        1 => Just(Step::Cut),
        1 => (0..2_u8).prop_map(|partition| Step::Reset { partition }),
    ];
    vec(step, 0..400)
}

fn record(priority: usize, key: u8) -> Arc<Record> {
    let event = Event::from_json(EntryId::default(), "test", br#"{"type":"t"}"#).unwrap();
    let collapse = (key < 2).then(|| Name::parse(&format!("k{key}")).unwrap());
    let user = Target::User(Name::parse("ann").unwrap());
    let route = Route {
        by: Name::parse("test").unwrap(),
        to: vec![user],
        when: None,
        priority: Priority::ALL[priority],
        expires_ms: None,
        collapse,
        event_name: None,
        body: None,
    };
    let notification = Notification { entry: EntryId::default(), event, plan: Plan { routes: vec![route] } };
    Arc::new(Record::parse(&serde_json::to_vec(&notification).unwrap()).unwrap())
}

/// A replay under way: what the head said, and the next id to hand over.
struct Running {
    round: u64,
    last: u64,
    next: u64,
}

/// A broker of two partitions, a node and a client.
struct World {
    history: [BTreeMap<u64, Arc<Record>>; 2],
    subscription: Subscription,
    running: [Option<Running>; 2],
    /// The feed says nothing more until it is reset.
    is_deaf: [bool; 2],
    cursor: Option<String>,
    received: Vec<(u8, u64)>,
    /// How far both clocks are; ids are spread so that numbers differ between partitions.
    next_id: u64,
}

fn number(partition: u8) -> PartitionNumber {
    PartitionNumber(partition)
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            history: Default::default(),
            subscription: Subscription::new(Name::parse("ann").unwrap(), Start::Latest, Filter::default(), []),
            running: [None, None],
            is_deaf: [false; 2],
            cursor: None,
            received: Vec::new(),
            next_id: 100,
        };
        world.connect(Start::Latest);
        // A client that never received anything has its cursor.
        world.begin_all();
        world.send(1);
        assert!(world.cursor.is_some());
        world
    }

    fn connect(&mut self, start: Start) {
        self.subscription = Subscription::new(Name::parse("ann").unwrap(), start, Filter::default(), [number(0), number(1)]);
        let ticket = self.subscription.read_recipient();
        self.subscription.set_recipient(ticket, Arc::default());
        self.is_deaf = [false; 2];
        for partition in 0..2 {
            self.reset(partition);
        }
    }

    fn last(&self, partition: u8) -> u64 {
        self.history[usize::from(partition)].keys().next_back().copied().unwrap_or(50)
    }

    fn reset(&mut self, partition: u8) {
        self.is_deaf[usize::from(partition)] = false;
        let round = self.subscription.enter_replay(number(partition));
        self.running[usize::from(partition)] = Some(Running { round, last: 0, next: 0 });
    }

    fn begin_all(&mut self) {
        self.replay(0, 0);
        self.replay(1, 0);
    }

    fn replay(&mut self, partition: u8, n: u8) {
        let at = usize::from(partition);
        let last = self.last(partition);
        let Some(running) = &mut self.running[at] else { return };
        assert_eq!(running.round, self.subscription.round(number(partition)));
        if running.next == 0 {
            let head = Head {
                life: LIFE,
                lives: vec![(LIFE, NotificationId(0))],
                last: NotificationId(last),
                pending: None,
                position: EntryPosition::default(),
                floor: NotificationId(0),
                origin: NotificationId(0),
                now_ms: 0,
            };
            self.subscription.begin(number(partition), &head, 0);
            for id in self.subscription.had_unknown(number(partition)) {
                let record = self.history[at].get(&id.0).cloned();
                self.subscription.had_is(number(partition), id, record.as_deref(), 0);
            }
            running.last = last;
            running.next = self.subscription.marks(number(partition)).0.0 + 1;
        }
        for _ in 0..n {
            if !self.subscription.has_room(number(partition)) {
                return;
            }
            let Some((&id, record)) = self.history[at].range(running.next..).next().filter(|(id, _)| **id <= running.last) else {
                let again = self.subscription.go_live(number(partition), NotificationId(running.last), 0);
                self.running[at] = again.map(|round| Running { round, last: 0, next: 0 });
                return;
            };
            self.subscription.handle(number(partition), NotificationId(id), record, 0);
            running.next = id + 1;
        }
    }

    fn send(&mut self, n: u8) {
        for _ in 0..n {
            let Some(next) = self.subscription.next(0) else { return };
            let mut cursor = String::new();
            self.subscription.encode_cursor(&mut cursor);
            match next {
                Next::Notification { partition, id, .. } => self.received.push((partition.0, id.0)),
                Next::Gap(gap) => panic!("nothing is missing, but {gap:?} was announced"),
                Next::Cursor => {}
            }
            assert!(self.subscription.had.len() <= MAX_HAD);
            self.cursor = Some(cursor);
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Commit { partition, priority, key, is_lost } => {
                self.next_id += 1 + u64::from(key);
                let (id, record) = (self.next_id, record(priority, key));
                self.history[usize::from(partition)].insert(id, Arc::clone(&record));
                // A feed loses a tail, never something in between: FIFO.
                self.is_deaf[usize::from(partition)] |= is_lost;
                if !self.is_deaf[usize::from(partition)]
                    && let Some(round) = self.subscription.on_append(number(partition), LIFE, NotificationId(id), &record, 0)
                {
                    self.running[usize::from(partition)] = Some(Running { round, last: 0, next: 0 });
                }
            }
            Step::Tick { partition } => {
                if !self.is_deaf[usize::from(partition)] {
                    self.subscription.on_tick(number(partition), LIFE, NotificationId(self.last(partition)));
                }
            }
            Step::Send(n) => self.send(n),
            Step::Replay { partition, n } => self.replay(partition, n),
            Step::Cut => {
                let start = self.cursor.as_ref().map(|cursor| Cursor::decode(cursor, &Name::parse("ann").unwrap()).unwrap());
                self.connect(start.map_or(Start::Latest, Start::Cursor));
            }
            Step::Reset { partition } => self.reset(partition),
        }
    }

    /// Everything settles: lost feeds are noticed, replays end, the socket takes all.
    fn settle(&mut self) {
        for partition in 0..2 {
            if self.is_deaf[usize::from(partition)] {
                self.reset(partition);
            }
        }
        for _ in 0..200 {
            for partition in 0..2 {
                self.replay(partition, 255);
            }
            self.send(255);
        }
        assert!(self.subscription.is_idle(), "{:?}", self.subscription);
    }

    fn check(&self) {
        let mut at: HashMap<(u8, u64), usize> = HashMap::new();
        for (place, &one) in self.received.iter().enumerate() {
            assert!(at.insert(one, place).is_none(), "{one:?} came twice: {:?}", self.received);
        }
        for partition in 0..2_u8 {
            let history = &self.history[usize::from(partition)];
            let route = |id: u64| history[&id].route(0);
            let superseded = |id: u64| {
                route(id).collapse.is_some() && history.range(id + 1..).any(|(_, later)| later.route(0).collapse == route(id).collapse)
            };
            for &id in history.keys() {
                assert!(at.contains_key(&(partition, id)) || superseded(id), "{partition}/{id} is missing of {:?}", self.received);
            }
            let came: Vec<u64> = self.received.iter().filter(|(p, _)| *p == partition).map(|&(_, id)| id).collect();
            for (place, &id) in came.iter().enumerate() {
                for &earlier in came[..place].iter().filter(|&&earlier| earlier > id) {
                    // Only what is more urgent may have come first. An id with a key may come back late, but never after its successor.
                    let (late, early) = (route(id), route(earlier));
                    assert!(early.priority > late.priority || late.collapse.is_some(), "{earlier} came before {id}: {came:?}");
                    assert!(
                        late.collapse.is_none() || late.collapse != early.collapse,
                        "the older state {id} came after {earlier}: {came:?}"
                    );
                }
            }
        }
    }
}

/// `LONG=1` runs twenty times as many.
fn cases() -> u32 {
    if std::env::var_os("LONG").is_some_and(|long| long != "0") { 100_000 } else { 5_000 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_notification_comes_once_and_in_order_whatever_happens(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
        }
        world.settle();
        world.check();
    }
}
