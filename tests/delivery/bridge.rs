//! Bridges: messages of Redis Pub/Sub reach users at most once, whatever happens to the node that
//! listens, and whatever the messages contain. The publishers of applications are in
//! `tests/publishers.rs`.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::command::{pointsman, said};
use crate::harness::eventually;
use crate::harness::node::{Builder, Folder, Node};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Request, Stream};

/// Time limit of whatever should happen at once, on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// A short lease, and few plugins to keep compilation at the start short.
const LEAN: &str = "[plugins.discard]\nenabled = false\n[ingest]\nlease_ttl = '1s'\n";
const BY_USER: &str = "[[bridge]]\nchannel = 'user:*'\nuser = '{1}'\n";

fn node_with(server: &RedisServer, bridges: &str) -> Builder {
    Node::builder()
        .redis(server.url())
        .config(&format!("{LEAN}{bridges}"))
}

fn is_listening(node: &Node) -> bool {
    node.metric_if_up("pointsman_bridge_listening") >= Some(1.0)
}

fn await_listening(node: &Node) {
    eventually(SOON, "the node listens", || {
        is_listening(node).then_some(())
    });
}

/// Publishes a message and returns the number of its receivers.
fn publish(server: &RedisServer, channel: impl AsRef<[u8]>, message: impl AsRef<[u8]>) -> usize {
    redis::cmd("PUBLISH")
        .arg(channel.as_ref())
        .arg(message.as_ref())
        .query(&mut server.connection())
        .expect("PUBLISH")
}

fn next_number(stream: &mut Stream) -> u64 {
    let data = stream.next_notification(SOON).data;
    data.as_u64().unwrap_or_else(|| panic!("{data}"))
}

/// The messages of a bridge with this outcome.
fn outcome(node: &Node, outcome: &str) -> usize {
    let page = node.admin("/metrics").body;
    let label = format!("outcome=\"{outcome}\"}}");
    let mut lines = page.lines().filter(|line| {
        line.starts_with("pointsman_bridge_messages_total{") && line.contains(&label)
    });
    let value = lines.next().and_then(|line| line.rsplit_once(' '));
    value.map_or(0, |(_, value)| value.parse().expect("a number"))
}

#[test]
fn a_take_over_after_kill_9_doubles_nothing_and_counts_the_time_that_it_missed() {
    let server = RedisServer::start();
    let mut one = node_with(&server, BY_USER).start();
    await_listening(&one);
    let two = node_with(&server, BY_USER).start();
    let note = "note: bridges.user:*: this node listens\n";
    assert!(one.admin("/readyz").body.contains(note));
    eventually(SOON, "the other node names the one that listens", || {
        let ready = two.admin("/readyz").body;
        ready
            .contains("note: bridges.user:*: node test-")
            .then_some(())
    });
    let mut stream = two.stream("42");
    let publish = |n: u64| publish(&server, "user:42", n.to_string());
    for n in 1..=20 {
        assert_eq!(publish(n), 1);
        assert_eq!(next_number(&mut stream), n);
    }
    one.kill();
    // Messages without a receiver, and when the first and the last of them were published.
    let (mut n, mut missed) = (20, Vec::new());
    let (mut first, mut last) = (None, Instant::now());
    while !is_listening(&two) {
        n += 1;
        if publish(n) == 0 {
            missed.push(n);
            last = Instant::now();
            first.get_or_insert(last);
        }
    }
    let heard_again = n + 1;
    for n in heard_again..=heard_again + 20 {
        assert_eq!(publish(n), 1);
    }
    let mut received = vec![20];
    while *received.last().expect("not empty") < heard_again + 20 {
        received.push(next_number(&mut stream));
    }
    assert!(
        received.is_sorted_by(|a, b| a < b),
        "a message was doubled or overtaken: {received:?}"
    );
    assert!((heard_again..=heard_again + 20).all(|n| received.contains(&n)));
    assert!(!missed.is_empty() && missed.iter().all(|n| !received.contains(n)));
    eventually(SOON, "the take-over and its time are counted", || {
        let unheard = two.metric("pointsman_bridge_unheard_seconds_total");
        let missed = last.duration_since(first.expect("one was missed"));
        (two.metric("pointsman_bridge_takeovers_total") == 1.0 && unheard >= missed.as_secs_f64())
            .then_some(())
    });
    assert!(
        two.log()
            .contains("messages published meanwhile are missed")
    );
}

/// The node stops with messages in its socket, another one takes over, and the first one continues.
#[test]
fn a_node_that_was_stopped_appends_nothing_after_another_one_has_taken_over() {
    let server = RedisServer::start();
    let one = node_with(&server, BY_USER).start();
    await_listening(&one);
    let two = node_with(&server, BY_USER).start();
    let mut stream = two.stream("42");
    one.signal("STOP");
    for n in 1..=5 {
        assert_eq!(publish(&server, "user:42", n.to_string()), 1);
    }
    await_listening(&two);
    for n in 6..=10 {
        assert_eq!(publish(&server, "user:42", n.to_string()), 2);
    }
    for n in 6..=10 {
        assert_eq!(next_number(&mut stream), n);
    }
    one.signal("CONT");
    eventually(SOON, "the first node notices", || {
        (!is_listening(&one)).then_some(())
    });
    publish(&server, "user:42", "11");
    assert_eq!(next_number(&mut stream), 11);
    assert_eq!(outcome(&one, "appended"), 0);
}

#[test]
fn a_shutdown_appends_what_was_published_and_hands_over() {
    let server = RedisServer::start();
    let mut one = node_with(&server, BY_USER).start();
    await_listening(&one);
    let two = node_with(&server, BY_USER).start();
    let mut stream = two.stream("42");
    for n in 1..=500 {
        assert_eq!(publish(&server, "user:42", n.to_string()), 1);
    }
    assert!(one.terminate(SOON).success());
    await_listening(&two);
    assert_eq!(publish(&server, "user:42", "501"), 1);
    for n in 1..=501 {
        assert_eq!(next_number(&mut stream), n);
    }
    assert_eq!(two.metric("pointsman_bridge_takeovers_total"), 0.0);
}

/// The node is suspended while messages are published, so that its first step afterwards finds both
/// them and the signal.
#[test]
fn a_shutdown_appends_the_messages_that_wait_in_the_connection() {
    let server = RedisServer::start();
    let mut node = node_with(&server, BY_USER).start();
    await_listening(&node);
    node.signal("STOP");
    let pad = "x".repeat(4_000);
    for n in 1..=500 {
        let message = json!({ "n": n, "pad": pad }).to_string();
        assert_eq!(publish(&server, "user:42", message), 1);
    }
    // Continues it when `terminate` has sent its signal. If that is late, the test still holds.
    let script = format!("sleep 0.3; kill -s CONT {}", node.pid());
    let mut waker = Command::new("sh")
        .args(["-c", &script])
        .spawn()
        .expect("run sh");
    assert!(node.terminate(SOON).success());
    waker.wait().expect("wait for sh");
    node.restart();
    let request = Request::new(node.addr(), "user=42&last_event_id=earliest");
    let mut stream = request.open(SOON).expect("open a stream");
    for n in 1..=500 {
        assert_eq!(stream.next_notification(SOON).data["n"], n);
    }
}

#[test]
fn hostile_messages_are_counted_and_the_next_message_is_delivered() {
    let server = RedisServer::start();
    let limit = LEAN.replace("lease_ttl", "max_event_bytes = 4096\nlease_ttl");
    let node = Node::builder()
        .redis(server.url())
        .config(&format!("{limit}{BY_USER}"))
        .start();
    await_listening(&node);
    let mut stream = node.stream("42");
    let huge = vec![b'x'; 5_000_000];
    for message in [&huge[..], &huge[..4_097], &huge[..4_090]] {
        publish(&server, "user:42", message);
    }
    let long = format!("user:{}", "x".repeat(300));
    for channel in [&b"user:\xff"[..], b"user:a\nb", b"user:\0", long.as_bytes()] {
        publish(&server, channel, "1");
    }
    publish(&server, "user:", "1");
    publish(&server, "user:42", b"\xff\xfe");
    let deep = "[".repeat(2_000);
    publish(&server, "user:42", &deep);
    publish(&server, "user:42", "\u{2028}\r\n\0");
    publish(&server, "user:42", "7");
    let text = |stream: &mut Stream| stream.next_notification(SOON).data;
    // Bytes, which this client does not decode; then two texts.
    text(&mut stream);
    assert_eq!(text(&mut stream), json!(deep));
    assert_eq!(text(&mut stream), json!("\u{2028}\r\n\0"));
    assert_eq!(next_number(&mut stream), 7);
    assert_eq!(outcome(&node, "too_large"), 3);
    assert_eq!(outcome(&node, "invalid"), 4);
    assert_eq!(outcome(&node, "unresolved"), 1);
    assert_eq!(outcome(&node, "appended"), 4);
    // One line for each kind of reason.
    let complaints = node.log().matches("did not become an event").count();
    assert_eq!(complaints, 3, "{}", node.log());
}

#[test]
fn a_flood_that_cannot_be_appended_is_bounded_and_counted() {
    let server = RedisServer::start();
    // Events wait for a plugin that is missing, so the source is full after one of them.
    let full = format!("[limits]\nbacklog_entries = 1\n[plugins.missing]\n{BY_USER}");
    let mut node = node_with(&server, &full).may_be_unready().start();
    await_listening(&node);
    publish(&server, "user:42", "1");
    eventually(SOON, "the source is full", || {
        (outcome(&node, "appended") == 1).then_some(())
    });
    let message = "x".repeat(100_000);
    let mut n_published = 0;
    eventually(SOON, "messages are dropped", || {
        for _ in 0..20 {
            publish(&server, "user:42", &message);
        }
        n_published += 20;
        (outcome(&node, "overflow") > 0).then_some(())
    });
    // 8 MiB wait in the node, and what Redis buffers besides.
    assert!(n_published > 80, "{n_published}");
    eventually(SOON, "readiness shows why", || {
        let ready = node.admin("/readyz").body;
        let reason = "warning: bridges.user:*: the broker is full: 1 entries are waiting";
        ready.contains(reason).then_some(())
    });
    assert_eq!(outcome(&node, "appended"), 1);
    // Its source is not empty.
    node.kill();
}

#[test]
fn a_connection_that_redis_cuts_is_counted_and_made_again() {
    let server = RedisServer::start();
    let node = node_with(&server, BY_USER).start();
    await_listening(&node);
    let mut stream = node.stream("42");
    for n in 1..=2 {
        server.cut("pubsub");
        eventually(SOON, "the loss is counted", || {
            let lost = node.metric("pointsman_bridge_connections_lost_total");
            (lost == f64::from(n)).then_some(())
        });
        await_listening(&node);
        publish(&server, "user:42", n.to_string());
        assert_eq!(next_number(&mut stream), u64::from(n as u32));
    }
    assert_eq!(node.metric("pointsman_bridge_takeovers_total"), 0.0);
}

#[test]
fn a_missing_right_makes_the_node_unready_with_the_command_that_grants_it() {
    let server = RedisServer::start();
    let () = server.command("ACL SETUSER app on >secret ~pointsman:* &pointsman:* +@all");
    let url = format!("redis://app:secret@127.0.0.1:{}/", server.port());
    let node = Node::builder()
        .redis(url)
        .config(&format!("{LEAN}{BY_USER}"))
        .may_be_unready()
        .start();
    let grant = "ACL SETUSER app +psubscribe ~pointsman:* &pointsman:* &user:*";
    eventually(SOON, "readiness names the right", || {
        let ready = node.admin("/readyz");
        let line = format!("broker.rights: user 'app' may not run PSUBSCRIBE user:*; run {grant}");
        (ready.status == 503 && ready.body.contains(&line)).then_some(())
    });
    let () = server.command(grant);
    eventually(SOON, "the node is ready", || {
        (node.admin("/readyz").status == 200).then_some(())
    });
    await_listening(&node);
    let mut stream = node.stream("42");
    publish(&server, "user:42", "1");
    assert_eq!(next_number(&mut stream), 1);
}

/// The first node gets the lease, and its user may not subscribe.
#[test]
fn a_node_that_cannot_subscribe_leaves_the_bridge_to_another_one() {
    let server = RedisServer::start();
    let () = server.command("ACL SETUSER app on >secret ~pointsman:* &pointsman:* +@all");
    let config = format!("{LEAN}{BY_USER}");
    let one = Node::builder()
        .redis(format!("redis://app:secret@127.0.0.1:{}/", server.port()))
        .config(&config)
        .may_be_unready()
        .start();
    eventually(SOON, "it has the lease", || {
        let ready = one.admin("/readyz").body;
        ready
            .contains("note: bridges.user:*: this node")
            .then_some(())
    });
    let two = Node::builder().redis(server.url()).config(&config).start();
    await_listening(&two);
    let mut stream = two.stream("42");
    publish(&server, "user:42", "1");
    assert_eq!(next_number(&mut stream), 1);
    assert!(!is_listening(&one));
}

#[test]
fn each_bridge_that_matches_a_channel_appends_an_event_but_none_a_notice_of_pointsman() {
    let server = RedisServer::start();
    let more = "[[bridge]]\nchannel = 'user:42'\nuser = '42'\ntype = 'one'\n[[bridge]]\nchannel = 'p*'\nuser = 'pat'\n";
    let node = node_with(&server, &format!("{BY_USER}{more}")).start();
    eventually(SOON, "the node listens to all", || {
        (node.metric("pointsman_bridge_listening") == 3.0).then_some(())
    });
    let (mut stream, mut pat) = (node.stream("42"), node.stream("pat"));
    assert_eq!(publish(&server, "user:42", "1"), 2);
    let mut kinds = [(); 2].map(|()| stream.next_notification(SOON).kind);
    kinds.sort();
    assert_eq!(kinds, ["message", "one"]);
    // The notices of these events are on channels that begin with `p`.
    node.publisher()
        .publish(&[event("e", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "e");
    publish(&server, "ping", "2");
    assert_eq!(next_number(&mut pat), 2);
    assert_eq!(outcome(&node, "appended"), 1);
    assert_eq!(node.metric("pointsman_bridge_messages_total"), 3.0);
}

/// The lease lies in the slot of the source, and a sharded channel in its own.
#[test]
fn bridges_work_on_a_cluster_with_their_own_prefix() {
    let server = RedisServer::cluster();
    let config = "[broker]\nprefix = 'shop'\nsources = ['orders', 'shop:events']\n[[bridge]]\nchannel = 'orders:{7}'\nsharded = true\nuser = '{/user}'\nappend_to = 'shop:events'\n";
    let node = node_with(&server, &format!("{config}{BY_USER}")).start();
    eventually(SOON, "the node listens to both", || {
        (node.metric("pointsman_bridge_listening") == 2.0).then_some(())
    });
    let mut stream = node.stream("42");
    publish(&server, "user:42", "1");
    assert_eq!(next_number(&mut stream), 1);
    let n_receivers: usize = redis::cmd("SPUBLISH")
        .arg("orders:{7}")
        .arg(r#"{"user":42}"#)
        .query(&mut server.connection())
        .expect("SPUBLISH");
    assert_eq!(n_receivers, 1);
    assert_eq!(stream.next_notification(SOON).data, json!({ "user": 42 }));
    let keys: Vec<String> = server.command("KEYS *bridge:*");
    assert_eq!(keys.len(), 2);
    assert!(
        keys.contains(&"shop:{orders}:bridge:user:*".to_owned()),
        "{keys:?}"
    );
    assert!(keys.iter().all(|key| key.starts_with("shop:")), "{keys:?}");
}

#[test]
fn an_invalid_bridge_is_refused_with_the_same_text_by_check_config_and_serve() {
    let folder = Folder::new();
    let file = folder.path().join("pointsman.toml");
    for (config, options, expect) in [
        (
            BY_USER,
            ["--dev", "--ephemeral", ""],
            "bridge: needs Redis, because the embedded broker has no Pub/Sub; set broker.redis or remove [[bridge]]",
        ),
        (
            "[[bridge]]\nchannel = 'user:*'\nuser = '{2}'\n",
            ["--dev", "--redis", "redis://127.0.0.1:1"],
            "bridge[0].user: in '{2}', {2} has no '*' in the channel, which has 1; count them from 1",
        ),
        (
            "[[bridge]]\nchannel = 'a'\n[[bridge]]\nchannel = 'a'\n",
            ["--dev", "--redis", "redis://127.0.0.1:1"],
            "bridge[1].name: 'a' is the name of another bridge, too; give one of them a name of its own",
        ),
        (
            "[[bridge]]\nchannel = 'pointsman:user:*'\n",
            ["--dev", "--redis", "redis://127.0.0.1:1"],
            "bridge[0].channel: 'pointsman:user:*' is a channel of Pointsman itself",
        ),
        (
            "[[bridge]]\nchanel = 'a'\n",
            ["--dev", "--redis", "redis://127.0.0.1:1"],
            "unknown field `chanel`",
        ),
    ] {
        fs::write(&file, config).expect("write the configuration");
        let options = options.into_iter().filter(|option| !option.is_empty());
        let path = file.to_str().expect("UTF-8");
        for command in ["check-config", "serve"] {
            let options: Vec<&str> = [command, "--config", path]
                .into_iter()
                .chain(options.clone())
                .collect();
            let (is_well, said) = said(&mut pointsman(&options));
            assert!(!is_well && said.contains(expect), "{command}: {said}");
        }
    }
}
