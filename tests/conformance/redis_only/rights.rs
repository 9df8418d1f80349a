//! Missing permissions (ACL): a script that lacks a right writes nothing, because it has no
//! rollback and its caller repeats it.

use super::*;
use pointsman::broker::{CursorOwner, RecipientChange, StoredCursor};

const ALL: &str = "ACL SETUSER app on >secret resetkeys ~* resetchannels &* +@all";

/// A node whose user has all rights, until a test takes one away.
pub(super) async fn node_of_app(server: &RedisServer) -> Node {
    let () = server.command(ALL);
    connect_to(
        &format!("redis://app:secret@127.0.0.1:{}/", server.port()),
        &[SOURCE],
        Retention::default(),
    )
    .await
    .expect("connect")
}

fn digest(server: &RedisServer) -> String {
    server.command("DEBUG DIGEST")
}

/// Runs `write` without each of these rights and asserts that it is refused by the right's name and
/// writes nothing.
pub(super) async fn refused_without<T: std::fmt::Debug>(
    server: &RedisServer,
    rules: &[&str],
    mut write: impl AsyncFnMut() -> Result<T, Error>,
) {
    for rule in rules {
        let () = server.command(&format!("ACL SETUSER app {rule}"));
        let before = digest(server);
        for _ in 0..2 {
            match write().await {
                Err(Error::Permanent(why)) => assert!(
                    why.contains("NOPERM") && why.contains("ACL SETUSER"),
                    "{rule}: {why}"
                ),
                other => panic!("{rule}: {other:?}"),
            }
        }
        assert_eq!(digest(server), before, "{rule}: something was written");
        let () = server.command(ALL);
    }
}

/// `ACL SETUSER node on >pw ~* +@all` permits no channel: the notice would fail after the log and
/// the record are written, and each retry would write the event again under another id.
#[tokio::test]
async fn a_commit_without_a_right_writes_nothing_and_later_everything_once() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let ids = node.append(&["a", "b", "c"]).await;
    let head = node.head().await;
    let items = vec![
        with_id(commit(ids[0], "R", &["u:1", "all"]), 1),
        dead(ids[1], "broken"),
        item(ids[2], Proposal::Discard),
    ];
    let batch = Batch {
        epoch: head.epoch,
        prev: head.position,
        items,
    };
    let rules = [
        "resetchannels",
        "resetchannels &pointsman:0:{pointsman:events}:tick &pointsman:0:{pointsman:events}:l:all",
        "-publish",
        "-zadd",
        "-zremrangebyscore",
        "-zremrangebyrank",
        "-pexpire",
        "-set",
        "-sadd",
        "-scard",
        "-smismember",
        "-unlink",
        "-xadd",
        "-xlen",
        "-hset",
        "-hincrby",
        "resetkeys ~pointsman:events ~pointsman:{pointsman:events}:[^l]*",
        "resetkeys ~pointsman:events ~pointsman:{pointsman:events}:[^l]* ~pointsman:{pointsman:events}:l:all",
    ];
    refused_without(&server, &rules, async || {
        node.broker.commit(node.p, batch.clone()).await
    })
    .await;
    assert!(node.ids("u:1", BEGIN).await.is_empty());
    let outcomes = node.commit_from(&head, batch.items.clone()).await;
    assert_eq!(node.ids("u:1", BEGIN).await, [outcomes[0].1.unwrap()]);
    assert_eq!(node.ids("all", BEGIN).await, [outcomes[0].1.unwrap()]);
}

/// Otherwise plugins would decide each event again for every refused commit.
#[tokio::test]
async fn a_source_is_not_leased_while_a_right_to_commit_is_missing() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let lease = async || node.broker.lease(node.p, "a", Duration::from_secs(9)).await;
    refused_without(&server, &["resetchannels", "-zadd", "-xadd"], lease).await;
    assert_eq!(lease().await.unwrap(), pointsman::broker::Lease::Mine);
    let () = server.command("ACL SETUSER app resetchannels");
    let findings = node.broker.check().await.expect("check");
    assert!(
        findings.iter().any(|finding| finding.name == "rights"
            && finding.severity == Severity::Refusal
            && finding
                .text
                .contains("PUBLISH pointsman:0:{pointsman:events}:l:")
            && finding.text.contains("&pointsman:*")),
        "{findings:?}"
    );
}

/// A redriven dead letter that is not removed would be redriven again.
#[tokio::test]
async fn a_redrive_without_a_right_writes_nothing() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let ids = node.append(&["a"]).await;
    node.commit(vec![dead(ids[0], "broken")]).await;
    let letters = node
        .broker
        .dead_letters(node.p, EntryId::default(), 1)
        .await
        .unwrap();
    let redrive = async || node.broker.redrive(node.p, letters[0].id).await;
    refused_without(&server, &["-xdel", "-xadd"], redrive).await;
    assert!(redrive().await.unwrap());
}

/// The list of epochs holds 16: repeated beginnings of one epoch would push out those that clients
/// name.
#[tokio::test]
async fn an_epoch_without_a_right_does_not_begin() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    node.publish("R", &["u:1"]).await;
    server.change_replid();
    let begin = async || node.broker.head(node.p).await;
    refused_without(&server, &["-ltrim", "-rpush", "-lrange", "-hset"], begin).await;
    assert_eq!(node.head().await.epochs.len(), 2);
    // A key of the wrong type must not use up epoch numbers either.
    let () = server.command(&format!("DEL {TAG}epochs"));
    let () = server.command(&format!("SET {TAG}epochs foreign"));
    server.change_replid();
    let before = digest(&server);
    assert!(matches!(
        node.broker.take_over(node.p).await,
        Err(Error::Permanent(_))
    ));
    assert_eq!(digest(&server), before);
}

/// The entries of a recreated source are appended again and removed. Without the second right they
/// would be appended again at every tick.
#[tokio::test]
async fn a_recreated_source_is_not_repaired_without_a_right() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    node.append(&["old"]).await;
    drain(&node).await;
    // A tick trims, which is not part of this test.
    node.broker.tick(node.p).await.unwrap();
    let () = server.command(&format!("DEL {SOURCE}"));
    let _: String = server.command(&format!("XADD {SOURCE} 5-1 v new"));
    let begin = async || node.broker.take_over(node.p).await;
    refused_without(&server, &["-xdel", "-xadd", "-xsetid", "-hincrby"], begin).await;
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(drain(&node).await, 1);
}

#[tokio::test]
async fn changes_of_users_without_a_right_write_nothing() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let join = async || {
        node.broker
            .change_recipient(&name("ann"), RecipientChange::Join { group: name("ops") })
            .await
    };
    let rules = ["-persist", "-pexpire", "-hdel", "-hset", "-hgetall"];
    refused_without(&server, &rules, join).await;
    join().await.unwrap();
    let cursor = StoredCursor {
        cursor: "c".into(),
        is_acknowledged: true,
    };
    let which = CursorOwner::Device(name("phone"));
    let acknowledge = async || {
        node.broker
            .move_device_cursor(&name("ann"), &which, None, &cursor)
            .await
    };
    refused_without(&server, &["-pexpire", "-hdel", "-hset"], acknowledge).await;
    assert!(acknowledge().await.unwrap());
}

/// Found before the first write: a counter that is not a number fails when it is counted, which is
/// after the logs are written.
#[tokio::test]
async fn a_counter_that_is_not_a_number_refuses_a_commit_before_it_writes() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.publish("R", &["u:1"]).await;
    for counter in ["committed", "n"] {
        let () = server.command(&format!("HSET {TAG}meta {counter} foreign"));
        let before = digest(&server);
        let head = node.head().await;
        let batch = Batch {
            epoch: head.epoch,
            prev: head.position,
            items: vec![commit(after(head.position.entry), "R", &["u:1"])],
        };
        match node.broker.commit(node.p, batch).await {
            Err(Error::Permanent(why)) => assert!(why.contains(counter), "{why}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(digest(&server), before);
        let () = server.command(&format!("HSET {TAG}meta {counter} 1"));
    }
    node.publish("R", &["u:1"]).await;
}

#[tokio::test]
async fn a_registration_without_a_right_writes_nothing() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let here = pointsman::broker::Advertised::Port(1);
    let register = async || node.broker.register_node("a", &here).await;
    let rules = [
        "-hset",
        "-hgetall",
        "-hdel",
        "resetkeys ~pointsman:{pointsman:events}:*",
    ];
    refused_without(&server, &rules, register).await;
    assert_eq!(register().await.unwrap(), []);
}
