//! `kill -9` loses nothing. Events flow from a publisher that retries, through a node that is
//! killed repeatedly, to clients that resume with their last event id. Each client receives each of
//! its notifications exactly once and in order.
//!
//! The expectation comes from the published events; the node's own counters only show whether a
//! kill fell while commits were in flight. `POINTSMAN_TEST_SEED` repeats a run; `LONG=10` makes it
//! ten times as long.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::harness::node::Node;
use crate::harness::publish::{self, Publisher, event};
use crate::harness::redis::RedisServer;
use crate::harness::seed;
use crate::harness::sse::{Follower, Notification};

const N_USERS: usize = 50;
const N_GROUPS: usize = 5;
const N_EVENTS: usize = 20_000;
const N_KILLS: usize = 50;

/// A node is killed at a random moment within this time after it began to commit again, in
/// milliseconds.
const LIFE_MS: u64 = 900;
/// A kill counts as in flight if the position moved within this time before it.
const IN_FLIGHT: Duration = Duration::from_secs(1);
/// Time limit for everything that must happen eventually.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn kill_9_with_a_data_folder_loses_repeats_and_reorders_nothing() {
    let (random, _) = seed::generator("kill -9 with --data");
    let node = Node::builder().data().start();
    let publisher = Publishing::Post(node.publisher());
    // Only the node knows its position: its count of outcomes moves with it.
    run(node, random, publisher, |node| {
        node.metric_if_up("pointsman_events_total")
            .filter(|n| *n > 0.0)
            .map(|n| n.to_string())
    });
}

#[test]
fn kill_9_on_redis_loses_repeats_and_reorders_nothing() {
    let (random, _) = seed::generator("kill -9 with --redis");
    let server = RedisServer::with(&["--appendonly", "yes", "--appendfsync", "everysec"]);
    let node = Node::builder().redis(server.url()).start();
    let publisher = Publishing::Add(Mutex::new(server.connection()));
    let position = Mutex::new(server.connection());
    run(node, random, publisher, move |_| {
        let mut connection = position.lock().expect("no panic under the lock");
        redis::cmd("HGET")
            .arg("pointsman:{pointsman:events}:meta")
            .arg("pos")
            .query(&mut connection)
            .expect("HGET")
    });
}

/// The way events are published.
enum Publishing {
    Post(Publisher),
    Add(Mutex<redis::Connection>),
}

impl Publishing {
    /// Returns when the batch is stored. Repeated attempts, and parts stored by an earlier one,
    /// must have no visible effect.
    fn publish(&self, batch: &[Value]) {
        match self {
            Self::Post(publisher) => publisher.publish_surely(batch, PATIENCE),
            Self::Add(connection) => {
                let entries: Vec<_> = batch
                    .iter()
                    .map(|event| vec![("event", event.to_string())])
                    .collect();
                publish::xadd(
                    &mut connection.lock().expect("no panic under the lock"),
                    "pointsman:events",
                    &entries,
                );
            }
        }
    }
}

/// The recipients of an event.
#[derive(Clone, Copy)]
enum To {
    User(usize),
    Group(usize),
    Everyone,
}

struct Published {
    to: To,
    priority: &'static str,
}

/// Most events are `normal`, as in production; `low` ones are there to be overtaken and `high` ones
/// to overtake.
fn invent(random: &mut StdRng) -> Published {
    let to = match random.random_range(0..100) {
        0 => To::Everyone,
        1..10 => To::Group(random.random_range(0..N_GROUPS)),
        _ => To::User(random.random_range(0..N_USERS)),
    };
    let priority = match random.random_range(0..20) {
        0 => "urgent",
        1 => "high",
        2 => "low",
        _ => "normal",
    };
    Published { to, priority }
}

impl Published {
    fn event(&self, number: usize) -> Value {
        let more = match self.to {
            To::User(user) => json!({ "user": user.to_string() }),
            To::Group(group) => json!({ "group": group.to_string() }),
            To::Everyone => json!({ "everyone": true }),
        };
        let mut event = event(&number.to_string(), "durability", more);
        event["priority"] = json!(self.priority);
        event["data"] = json!({ "number": number });
        event
    }

    fn reaches(&self, user: usize) -> bool {
        match self.to {
            To::User(only) => only == user,
            To::Group(group) => user % N_GROUPS == group,
            To::Everyone => true,
        }
    }
}

/// State shared by the publisher and the killer.
#[derive(Default)]
struct Progress {
    published: AtomicUsize,
    kills: AtomicUsize,
    /// Milliseconds to wait between two batches, so that the events last until the last kill.
    pace_ms: AtomicU64,
    is_over: AtomicBool,
}

fn run(
    mut node: Node,
    mut random: StdRng,
    publishing: Publishing,
    position: impl Fn(&Node) -> Option<String>,
) {
    let long: usize =
        std::env::var("LONG").map_or(1, |text| text.parse().expect("LONG is a number"));
    let (n_events, n_kills) = (N_EVENTS * long, N_KILLS * long);
    for user in 0..N_USERS {
        node.join(&(user % N_GROUPS).to_string(), &user.to_string());
    }
    let followers: Vec<Follower> = (0..N_USERS)
        .map(|user| node.follower(&user.to_string()))
        .collect();
    let mut plan: Vec<Published> = (0..n_events).map(|_| invent(&mut random)).collect();
    // The last event has the lowest priority, so a client that has received it has received
    // everything.
    plan.push(Published {
        to: To::Everyone,
        priority: "low",
    });
    let progress = Progress::default();
    let n_in_flight = std::thread::scope(|scope| {
        let publisher = scope.spawn(|| publish_all(&plan, n_kills, &publishing, &progress));
        let n_in_flight =
            kill_again_and_again(&mut node, n_kills, n_events, random, &position, &progress);
        progress.is_over.store(true, Ordering::Relaxed);
        publisher.join().expect("the publisher");
        n_in_flight
    });
    check_deliveries(&plan, followers);
    assert!(
        2 * n_in_flight >= n_kills,
        "only {n_in_flight} of {n_kills} kills fell while commits were in flight"
    );
    eprintln!("{n_in_flight} of {n_kills} kills fell while commits were in flight");
}

fn publish_all(plan: &[Published], n_kills: usize, publishing: &Publishing, progress: &Progress) {
    const BATCH: usize = 10;
    for (batch, events) in plan.chunks(BATCH).enumerate() {
        let first = batch * BATCH;
        let events: Vec<Value> = events
            .iter()
            .enumerate()
            .map(|(n, published)| published.event(first + n))
            .collect();
        publishing.publish(&events);
        if batch.is_multiple_of(16) {
            // Like a publisher that did not get the response; kills rarely fall between storing and
            // responding.
            publishing.publish(&events);
        }
        progress
            .published
            .store(first + events.len(), Ordering::Relaxed);
        // Some events are reserved for every kill to come.
        loop {
            let reserve = 2 * BATCH * (n_kills - progress.kills.load(Ordering::Relaxed));
            let pace = Duration::from_millis(progress.pace_ms.load(Ordering::Relaxed));
            if progress.is_over.load(Ordering::Relaxed) {
                break;
            }
            std::thread::sleep(pace);
            if plan.len() - (first + events.len()) > reserve {
                break;
            }
        }
    }
}

/// Kills and restarts the node. Returns how many kills fell within a second of a move of the
/// position.
fn kill_again_and_again(
    node: &mut Node,
    n_kills: usize,
    n_events: usize,
    mut random: StdRng,
    position: &impl Fn(&Node) -> Option<String>,
    progress: &Progress,
) -> usize {
    let mut n_in_flight = 0;
    for n_killed in 0..n_kills {
        // Spreads the remaining events, 10 per batch, over the remaining kills.
        let left = n_events.saturating_sub(progress.published.load(Ordering::Relaxed));
        let n_batches = (left / (n_kills - n_killed) / 10).max(1) as u64;
        progress
            .pace_ms
            .store(LIFE_MS / 2 / n_batches, Ordering::Relaxed);
        let born = Instant::now();
        let (mut last, mut moved) = (position(node), None);
        let mut moment = None;
        // A node that does not begin to commit is killed anyway, and does not count.
        while moment.unwrap_or(born + Duration::from_secs(10)) > Instant::now() {
            let now = position(node);
            if now.is_some() && now != last {
                let seen = Instant::now();
                // Measured from the first move, because the time before it is start-up and not the
                // flow of commits.
                moment.get_or_insert_with(|| {
                    seen + Duration::from_millis(random.random_range(0..LIFE_MS))
                });
                (last, moved) = (now, Some(seen));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        n_in_flight += usize::from(moved.is_some_and(|moved| moved.elapsed() <= IN_FLIGHT));
        node.kill();
        progress.kills.fetch_add(1, Ordering::Relaxed);
        node.restart();
    }
    n_in_flight
}

/// Each client has received exactly the events published to it, once; only events of higher
/// priority came early.
fn check_deliveries(plan: &[Published], followers: Vec<Follower>) {
    for (user, follower) in followers.into_iter().enumerate() {
        let expected: Vec<usize> = (0..plan.len())
            .filter(|number| plan[*number].reaches(user))
            .collect();
        let last = (plan.len() - 1).to_string();
        follower.wait(PATIENCE, &format!("last event for user {user}"), |record| {
            record.notifications.last().is_some_and(|n| n.id == last)
        });
        let record = follower.stop();
        assert_eq!(
            record.gaps,
            Vec::<String>::new(),
            "gaps announced to user {user}"
        );
        let arrived: Vec<usize> = record.notifications.iter().map(number).collect();
        let mut sorted = arrived.clone();
        sorted.sort_unstable();
        assert_eq!(
            sorted,
            expected,
            "user {user} did not receive exactly the events published to it: {}",
            story(&record.notifications, &expected)
        );
        let rank = |priority: &str| {
            ["low", "normal", "high", "urgent"]
                .iter()
                .position(|p| *p == priority)
                .expect("a priority")
        };
        // By rank: the latest published event that has arrived so far.
        let mut latest = [None; 4];
        for (notification, &number) in record.notifications.iter().zip(&arrived) {
            let own = rank(plan[number].priority);
            assert_eq!(
                notification.priority, plan[number].priority,
                "event {number}"
            );
            for other in &latest[..=own] {
                assert!(
                    other.is_none_or(|other| other < number),
                    "user {user} received event {number} after event {other:?}, which has no higher priority"
                );
            }
            latest[own] = latest[own].max(Some(number));
        }
    }
}

fn number(notification: &Notification) -> usize {
    assert_eq!(
        (notification.source.as_str(), notification.kind.as_str()),
        ("/tests", "durability")
    );
    assert_eq!(notification.data["number"].to_string(), notification.id);
    notification.id.parse().expect("ids are numbers")
}

/// The missing and the repeated events, for the message of a failing test.
fn story(notifications: &[Notification], expected: &[usize]) -> String {
    let mut counts: HashMap<usize, usize> = expected.iter().map(|number| (*number, 0)).collect();
    for notification in notifications {
        *counts.entry(number(notification)).or_default() += 1;
    }
    let select = |wish: &dyn Fn(usize) -> bool| {
        let mut numbers: Vec<usize> = counts
            .iter()
            .filter(|(_, count)| wish(**count))
            .map(|(number, _)| *number)
            .collect();
        numbers.sort_unstable();
        numbers
    };
    let missing = select(&|count| count == 0);
    let doubled = select(&|count| count > 1);
    format!(
        "{} of {}; missing {missing:?}; more than once {doubled:?}",
        notifications.len(),
        expected.len()
    )
}
