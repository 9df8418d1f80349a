//! Groups and attributes changed by applications: the guarantee that a 2xx response gives for
//! events published before and after it.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::json;

use crate::harness::node::{Folder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Request, Stream};
use crate::harness::{eventually, guests};

/// Retains everything that a test publishes, because trimming is not tested here, and compiles as
/// few plugins at startup as possible.
const CONFIG: &str = "[retention]\nlog_entries = 100000\n[plugins.discard]\nenabled = false";

fn open_after(node: &Node, user: &str, cursor: &str) -> Stream {
    Request::new(node.addr(), &format!("user={user}"))
        .last_event_id(cursor)
        .open(SOON)
        .expect("open a stream")
}

fn leave(node: &Node, group: &str, user: &str) {
    let answer = node.request("DELETE", &format!("/v1/groups/{group}/members/{user}"));
    assert_eq!(answer.status, 204, "{answer:?}");
}

/// The ids received before `last`.
fn up_to(stream: &mut Stream, last: &str) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        let id = stream.next_notification(SOON).id;
        if id == last {
            return ids;
        }
        ids.push(id);
    }
}

#[test]
fn an_attribute_change_applies_to_an_open_stream_before_later_events() {
    let plugins = Folder::new();
    for name in ["address", "unruly"] {
        fs::write(
            plugins.path().join(format!("{name}.wasm")),
            guests::core_module(name),
        )
        .expect("write a plugin");
    }
    // For an event of this type the plugin routes to user 42 on condition that the plan is `pro`.
    let config = "[plugins.unruly.config]\ntypes = [\"test-of-a-plan\"]\n";
    let server = RedisServer::start();
    for node in [Node::builder(), Node::builder().redis(server.url())]
        .map(|node| node.plugins(plugins.path()).config(config).start())
    {
        let set = |attributes: &str| {
            let answer = node.send(
                "PUT",
                "/v1/users/42/attributes",
                &[("content-type", "application/json")],
                attributes.as_bytes(),
            );
            assert_eq!(answer.status, 204, "{answer:?}");
        };
        let promote = |id: &str| {
            node.publisher()
                .publish(&[event(id, "test-of-a-plan", json!({}))])
        };
        let witness = |id: &str| {
            node.publisher()
                .publish(&[event(id, "t", json!({ "user": "42" }))])
        };
        let mut stream = node.stream("42");
        promote("no plan");
        witness("w1");
        assert_eq!(up_to(&mut stream, "w1"), Vec::<String>::new());
        set(r#"{"plan":"pro"}"#);
        promote("pro");
        witness("w2");
        assert_eq!(up_to(&mut stream, "w2"), ["pro"]);
        set(r#"{"plan":"free"}"#);
        promote("free");
        witness("w3");
        assert_eq!(up_to(&mut stream, "w3"), Vec::<String>::new());
        // Conditions are evaluated just before sending, with the current attributes, in history
        // too.
        let mut history = Request::new(node.addr(), "user=42&last_event_id=earliest")
            .open(SOON)
            .expect("open a stream");
        assert_eq!(up_to(&mut history, "w3"), ["w1", "w2"]);
    }
}

/// Events are published continuously. Those decided before the request do not reach a new member,
/// and those published after the response do; the reverse holds for a member that leaves. Events
/// decided during the request may fall on either side, but every replay agrees on it, and so does
/// the open stream if the broker serialises membership changes and commits.
#[test]
fn a_member_joining_and_leaving_during_commits_receives_one_contiguous_range_live_and_in_replay() {
    const ROUNDS: usize = 3;
    const EACH: u64 = 20;
    let server = RedisServer::start();
    for (builder, is_one_after_the_other) in [
        (Node::builder(), true),
        (Node::builder().redis(server.url()), false),
    ] {
        let node = builder.config(CONFIG).start();
        node.join("ops", "bob");
        let mut live = node.stream("ann");
        let mut witness = node.stream("bob");
        let (next, decided, is_over) =
            (AtomicU64::new(1), AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) {
                    let id = next.fetch_add(1, Ordering::SeqCst);
                    node.publisher().publish(&[event(
                        &id.to_string(),
                        "t",
                        json!({ "group": "ops" }),
                    )]);
                }
                node.publisher()
                    .publish(&[event("0", "t", json!({ "user": "bob" }))]);
            });
            scope.spawn(|| {
                loop {
                    match witness
                        .next_notification(SOON)
                        .id
                        .parse::<u64>()
                        .expect("a number")
                    {
                        0 => return,
                        id => decided.store(id, Ordering::SeqCst),
                    }
                }
            });
            // Also stops the threads if an assertion below fails.
            let _over = SetOnDrop(&is_over);
            let more = |since: u64| {
                eventually(SOON, "events are decided", || {
                    (decided.load(Ordering::SeqCst) > since + EACH).then_some(())
                })
            };
            for round in 1..=ROUNDS {
                more(decided.load(Ordering::SeqCst));
                let cursor = live.last_event_id().to_owned();
                let not_before = decided.load(Ordering::SeqCst);
                node.join("ops", "ann");
                let from_here = next.load(Ordering::SeqCst);
                more(from_here);
                let up_to_here = decided.load(Ordering::SeqCst);
                leave(&node, "ops", "ann");
                let not_after = next.load(Ordering::SeqCst);
                more(not_after);

                let end = format!("end of {round}");
                node.publisher()
                    .publish(&[event(&end, "t", json!({ "user": "ann" }))]);
                let check = |seen: &[String], who: &str| {
                    let numbers: Vec<u64> = seen
                        .iter()
                        .map(|id| id.parse().expect("a number"))
                        .collect();
                    let (first, last) = (
                        *numbers.first().expect("some"),
                        *numbers.last().expect("some"),
                    );
                    assert!(
                        numbers.iter().copied().eq(first..=last),
                        "{who}, not contiguous: {numbers:?}"
                    );
                    assert!(
                        (not_before + 1..=from_here).contains(&first),
                        "{who}: {not_before} < {first} <= {from_here}"
                    );
                    assert!(
                        (up_to_here..not_after).contains(&last),
                        "{who}: {up_to_here} <= {last} < {not_after}"
                    );
                };
                let seen = up_to(&mut live, &end);
                check(&seen, "the open stream");
                let back = up_to(&mut open_after(&node, "ann", &cursor), &end);
                check(&back, "a resumed stream");
                // Of several memberships the latest counts.
                let mut all = up_to(&mut open_after(&node, "ann", "earliest"), &end);
                all.retain(|id| !id.starts_with("end of "));
                assert_eq!(all, back, "full history and a resumed stream differ");
                if is_one_after_the_other {
                    assert_eq!(seen, back, "the open stream and a resumed stream differ");
                }
            }
        });
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Each group is a log that every stream of the user follows.
#[test]
fn a_user_joins_a_bounded_number_of_groups_and_the_refusal_names_the_fix() {
    let server = RedisServer::start();
    let config = format!("[recipients]\nmax_groups_per_user = 3\n{CONFIG}");
    for node in [Node::builder(), Node::builder().redis(server.url())]
        .map(|node| node.config(&config).start())
    {
        let mut stream = node.stream("42");
        for group in ["a", "b", "c", "a"] {
            node.join(group, "42");
        }
        for _ in 0..2 {
            let refused = node.request("PUT", "/v1/groups/d/members/42");
            assert_eq!(refused.status, 409, "{refused:?}");
            assert_eq!(
                refused.json(),
                json!({
                    "code": "too_many_groups",
                    "error": "the user is a member of 3 groups, which is the limit",
                    "fix": "remove a membership, or raise recipients.max_groups_per_user",
                })
            );
        }
        assert_eq!(node.request("GET", "/v1/groups/d/members/42").status, 404);
        node.join("d", "another%20user");
        leave(&node, "a", "42");
        node.join("d", "42");
        for group in ["a", "b", "d"] {
            let to_group = event(group, "t", json!({ "group": group }));
            node.publisher().publish(&[to_group]);
        }
        assert_eq!(stream.next_notification(SOON).id, "b");
        assert_eq!(stream.next_notification(SOON).id, "d");
    }
}
