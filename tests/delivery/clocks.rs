//! Clocks that are wrong: an event expires by the broker's clock, however far the clock of a node is
//! off and whenever it is set. The clocks of the nodes are shifted; that of Redis is right.

use std::time::Duration;

use serde_json::json;

use crate::harness::clock::ShiftedClock;
use crate::harness::eventually;
use crate::harness::node::{Builder, Node, SOON};
use crate::harness::publish::{event, xadd};
use crate::harness::redis::RedisServer;
use crate::harness::sse::Stream;

const HOUR: Duration = Duration::from_secs(3_600);
/// Much less than an hour.
const TTL: &str = "10m";

fn shifted(clock: &ShiftedClock) -> Builder {
    Node::builder()
        .config("[stream]\nheartbeat_interval = \"1s\"\n[plugins.discard]\nenabled = false")
        .clock(clock)
}

/// The ids on the page of all stored notifications of a user.
fn stored(node: &Node, user: &str) -> Vec<String> {
    let page = node.request("GET", &format!("/v1/notifications?user={user}"));
    assert_eq!(page.status, 200, "{page:?}");
    let page = page.json();
    let items = page["notifications"].as_array().expect("notifications");
    let id = |item: &serde_json::Value| item["data"]["id"].as_str().expect("an id").to_owned();
    items.iter().map(id).collect()
}

/// Waits for a line of readiness that contains each of these words; the node stays ready.
fn warned(node: &Node, words: &[&str]) {
    eventually(SOON, &format!("readiness warns of {words:?}"), || {
        let report = node.admin("/readyz");
        assert_eq!(report.status, 200, "{report:?}");
        let is_it = |line: &str| words.iter().all(|word| line.contains(word));
        report.body.lines().any(is_it).then_some(())
    });
}

/// Waits until readiness has no warning about the clock.
fn not_warned(node: &Node) {
    eventually(SOON, "readiness has no warning about the clock", || {
        let report = node.admin("/readyz");
        (!report.body.contains("broker.clock")).then_some(())
    });
}

/// Waits for the next two heartbeats: the first may have been requested earlier.
fn heartbeats(stream: &mut Stream) {
    let n_before = stream.text().matches(":\n").count();
    eventually(SOON, "heartbeats arrive", || {
        // A heartbeat is a comment, and completes no frame.
        stream
            .next_frame(Duration::from_millis(50))
            .expect_err("nothing is published");
        (stream.text().matches(":\n").count() >= n_before + 2).then_some(())
    });
}

#[test]
fn a_ttl_counts_by_the_clock_of_redis_on_nodes_whose_clocks_are_an_hour_off() {
    for is_behind in [true, false] {
        let server = RedisServer::start();
        let clock = ShiftedClock::new();
        let direction = if is_behind {
            clock.set_behind(HOUR);
            "behind"
        } else {
            clock.set_ahead(HOUR);
            "ahead of"
        };
        // Started first, it owns the source.
        let wrong = shifted(&clock).redis(server.url()).start();
        let right = Node::builder().redis(server.url()).start();
        let mut streams = [wrong.stream("42"), right.stream("42")];
        let add = |id: &str, ttl: &str| {
            let fields = [("type", "t"), ("user", "42"), ("id", id), ("ttl", ttl)];
            let fields = fields.map(|(name, value)| (name, value.to_owned()));
            xadd(
                &mut server.connection(),
                "pointsman:events",
                &[fields.to_vec()],
            );
        };
        add("long", TTL);
        for stream in &mut streams {
            assert_eq!(stream.next_notification(SOON).id, "long");
        }
        add("short", "1s");
        let committed = "pointsman_events_total{outcome=\"committed\"}";
        eventually(SOON, "both events are committed", || {
            (wrong.metric(committed) + right.metric(committed) == 2.0).then_some(())
        });
        for node in [&wrong, &right] {
            eventually(SOON, "the short one has expired, and only that", || {
                (stored(node, "42") == ["long"]).then_some(())
            });
        }
        warned(&wrong, &["broker.clock: ", "3600 s", direction, "NTP"]);
        not_warned(&right);
    }
}

/// On Redis, which has a clock of its own, and on the embedded broker, which took the node's.
#[test]
fn setting_the_clock_of_a_running_node_neither_loses_nor_revives_an_event() {
    let server = RedisServer::start();
    for is_embedded in [false, true] {
        let clock = ShiftedClock::new();
        let node = if is_embedded {
            shifted(&clock).data().start()
        } else {
            shifted(&clock).redis(server.url()).start()
        };
        let publish = |id: &str, ttl: &str| {
            let attributes = json!({ "user": "42", "ttl": ttl });
            node.publisher().publish(&[event(id, "t", attributes)]);
        };
        let mut stream = node.stream("42");
        publish("expired", "200ms");
        eventually(SOON, "it has expired", || {
            stored(&node, "42").is_empty().then_some(())
        });
        publish("before", TTL);

        let first = eventually(SOON, "a notification that lives long enough", || {
            let id = stream.next_notification(SOON).id;
            (id != "expired").then_some(id)
        });
        assert_eq!(first, "before");

        let (ahead, behind) = if is_embedded {
            ("forward", "back")
        } else {
            ("ahead of", "behind")
        };
        for (step, direction) in [("ahead", ahead), ("behind", behind)] {
            if step == "ahead" {
                clock.set_ahead(HOUR);
            } else {
                clock.set_behind(HOUR);
            }
            warned(&node, &["broker.clock: ", "3600 s", direction]);
            publish(step, TTL);
            assert_eq!(stream.next_notification(SOON).id, step);
            heartbeats(&mut stream);
        }
        let expected = ["before", "ahead", "behind"];
        assert_eq!(stored(&node, "42"), expected);
        let resumed = node.request("GET", "/v1/notifications?user=42&after=10m");
        assert_eq!(
            resumed.json()["notifications"].as_array().map(Vec::len),
            Some(expected.len()),
            "{resumed:?}"
        );
        clock.set_right();
        not_warned(&node);
    }
}
