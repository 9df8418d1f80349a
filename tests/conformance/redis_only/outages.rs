//! Redis is unavailable, slow, read-only or closes connections: callers wait, no event fails, and
//! no loss is silent.

use std::time::Instant;

use super::*;

#[tokio::test]
async fn an_unreachable_redis_is_unavailable() {
    let mut server = RedisServer::start();
    let url = server.url();
    server.stop();
    assert!(matches!(
        connect_to(&url, &[SOURCE], Retention::default()).await,
        Err(Error::Unavailable(_))
    ));
    server.restart();
    connect_to(&url, &[SOURCE], Retention::default())
        .await
        .expect("Redis is available again");
}

#[tokio::test]
async fn a_redis_that_does_not_answer_in_time_is_unavailable_and_recovers() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["a"]).await;
    server.pause();
    let began = Instant::now();
    assert!(matches!(
        node.broker.head(node.p).await,
        Err(Error::Unavailable(_))
    ));
    assert!(matches!(
        node.broker
            .read(node.p, EntryId::default(), 1, Duration::from_millis(50))
            .await,
        Err(Error::Unavailable(_))
    ));
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    server.resume();
    until(async || node.broker.head(node.p).await.is_ok()).await;
    assert_eq!(drain(&node).await, 1);
}

/// While Redis is unavailable, commands fail at once between attempts to connect, without waiting
/// for the deadline.
#[tokio::test]
async fn commands_fail_at_once_while_redis_is_known_to_be_unavailable() {
    let mut server = RedisServer::start();
    let node = node_on(&server).await;
    server.kill();
    let began = Instant::now();
    for _ in 0..200 {
        assert!(matches!(
            node.broker.head(node.p).await,
            Err(Error::Unavailable(_))
        ));
    }
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
}

/// The answer is lost but the commit is not: the retry is rejected, and the head shows the result.
#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_rejected_the_second_time() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a"]).await;
    let head = node.head().await;
    let batch = Batch {
        epoch: head.epoch,
        prev: head.position,
        items: vec![commit(ids[0], "R", &["u:1"])],
    };
    server.pause();
    assert!(matches!(
        node.broker.commit(node.p, batch.clone()).await,
        Err(Error::Unavailable(_))
    ));
    server.resume();
    // The paused commit may be executed before or after the commands that follow on another
    // connection. In both orders it takes effect once.
    until(async || match node.broker.head(node.p).await {
        Ok(head) if head.position == ids[0].into() => true,
        Ok(_) => node
            .broker
            .commit(node.p, batch.clone())
            .await
            .is_err_and(|error| panic!("{error}")),
        Err(_) => false,
    })
    .await;
    assert_eq!(node.ids("u:1", BEGIN).await.len(), 1);
    assert_eq!(node.count(Outcome::Committed).await, 1);
}

/// With too few replicas, scripts that write are rejected, but a plain PUBLISH works and history
/// stays readable.
#[tokio::test]
async fn a_redis_that_cannot_write_still_signals_that_it_is_alive() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    let id = node.publish("R", &["u:1"]).await;
    let () = server.command("CONFIG SET min-replicas-to-write 1");
    let head = node
        .broker
        .head(node.p)
        .await
        .expect("the head is readable");
    assert_eq!(node.ids("u:1", BEGIN).await, [id]);
    let batch = Batch {
        epoch: head.epoch,
        prev: head.position,
        items: vec![commit(after(head.position.entry), "R", &["u:1"])],
    };
    assert!(matches!(
        node.broker.commit(node.p, batch).await,
        Err(Error::Unavailable(_))
    ));
    assert!(matches!(
        node.broker.tick(node.p).await,
        Err(Error::Unavailable(_))
    ));
    assert!(matches!(receiver.next().await, Notice::Alive { partition } if partition == node.p));
}

/// Readiness follows the findings, so a Redis that accepts every read and no write is not ready.
#[tokio::test]
async fn a_redis_that_refuses_writes_is_a_finding_with_its_fix() {
    let server = RedisServer::with(&["--appendonly", "yes", "--enable-protected-configs", "local"]);
    let node = node_on(&server).await;
    let writes = async || {
        let findings = node.broker.check().await.expect("check");
        let found = findings.into_iter().find(|found| found.name == "writes");
        found.map(|found| (found.severity, found.text))
    };
    assert_eq!(writes().await, None);
    let () = server.command("CONFIG SET min-replicas-to-write 1");
    let (severity, text) = writes().await.expect("a finding");
    assert_eq!(severity, Severity::Refusal);
    assert!(
        text.contains("NOREPLICAS")
            && text.contains("; ")
            && text.contains("min-replicas-to-write"),
        "{text}"
    );
    let () = server.command("CONFIG SET min-replicas-to-write 0");
    assert_eq!(writes().await, None);
    // A snapshot that cannot be written.
    redis::cmd("CONFIG")
        .arg(&["SET", "save", "3600 1", "dir", "/proc"])
        .exec(&mut server.connection())
        .expect("a folder that takes no files");
    let _: redis::Value = server.command("BGSAVE");
    until(async || writes().await.is_some()).await;
    let (_, text) = writes().await.expect("a finding");
    assert!(text.contains("MISCONF") && text.contains("free"), "{text}");
}

/// After a restart or a promotion, an epoch would have to begin first, which is a write. Nothing is
/// written until it has begun, so the epoch before it still describes what is kept.
#[tokio::test]
async fn history_is_readable_after_a_restart_into_a_redis_that_refuses_writes() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let id = node.publish("R", &["u:1"]).await;
    let old = node.head().await;
    let () = server.command("CONFIG SET min-replicas-to-write 1");
    server.change_replid();
    let started = connect_to(&server.url(), &[SOURCE], Retention::default())
        .await
        .expect("a node starts");
    for node in [&node, &started] {
        let head = node.head().await;
        assert_eq!(
            (head.epoch, head.last, &head.epochs),
            (old.epoch, id, &old.epochs)
        );
        assert_eq!(node.ids("u:1", BEGIN).await, [id]);
        assert!(node.broker.records(node.p, &[id]).await.unwrap()[0].is_some());
    }
    let () = server.command("CONFIG SET min-replicas-to-write 0");
    let head = node.head().await;
    assert_eq!(head.epochs[1..], [(head.epoch, id)]);
    assert!(started.publish("R", &["u:1"]).await > id);
}

/// A changed max_age is applied at the start of a node, or as soon as Redis accepts writes again.
#[tokio::test]
async fn a_node_started_while_redis_refuses_writes_applies_max_age_later() {
    let server = RedisServer::start();
    node_on(&server).await;
    let () = server.command("CONFIG SET min-replicas-to-write 1");
    let retention = Retention {
        max_age: Duration::from_secs(1_000),
        ..Retention::default()
    };
    let node = connect_to(&server.url(), &[SOURCE], retention)
        .await
        .expect("a node starts");
    let () = server.command("CONFIG SET min-replicas-to-write 0");
    node.broker.tick(node.p).await.expect("a tick");
    let max_age: u64 = server.command(&format!("HGET {TAG}meta max_age"));
    assert_eq!(max_age, 1_000_000);
}

/// A proxy or a limit may close every notice connection as soon as it is made.
#[tokio::test]
async fn a_notice_connection_that_is_cut_at_once_is_not_reopened_without_pauses() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    let began = Instant::now();
    let mut n_cuts = 0;
    while began.elapsed() < Duration::from_secs(3) {
        n_cuts += server.command::<i64>("CLIENT KILL TYPE pubsub");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!((2..=15).contains(&n_cuts), "{n_cuts} connections in 3 s");
    // Repeated, because a reset voids the requests before it.
    let mut token = 0;
    until(async || {
        token += 1;
        let follow = receiver.follow_and_wait("u:1", token);
        tokio::time::timeout(Duration::from_secs(1), follow)
            .await
            .is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_closed_notice_connection_sends_a_reset_and_recovers() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    assert_eq!(server.command::<i64>("CLIENT KILL TYPE pubsub"), 1);
    match receiver.next().await {
        Notice::Reset { partitions } => assert_eq!(partitions, [node.p]),
        other => panic!("{other:?}"),
    }
    receiver.follow_and_wait("u:1", 2).await;
    node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await.0, "u:1");
}

/// While the receiver accepts no notices, the socket is not read. The waiting notices arrive later
/// in order, and none is missing.
#[tokio::test]
async fn a_slow_receiver_misses_nothing() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            log_entries: 100_000,
            ..Retention::default()
        },
    )
    .await
    .unwrap();
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let record = "x".repeat(1_000);
    let mut published = Vec::new();
    for _ in 0..100 {
        let entry = after(node.head().await.position.entry);
        let items = (0..64)
            .map(|k| {
                commit(
                    EntryId {
                        seq: entry.seq + k,
                        ..entry
                    },
                    &record,
                    &["u:1"],
                )
            })
            .collect();
        published.extend(
            node.commit(items)
                .await
                .into_iter()
                .map(|(_, id)| id.unwrap()),
        );
    }
    let mut received = Vec::new();
    while received.len() < published.len() {
        received.push(receiver.append().await.1);
    }
    assert_eq!(received, published);
}

/// Redis closes the connection of a subscriber that falls too far behind: its notices are lost, and
/// it is sent a reset.
#[tokio::test]
async fn a_receiver_too_slow_for_redis_gets_a_reset() {
    let server = RedisServer::start();
    // No grace period: the connection is closed once it is 64 KiB behind.
    redis::cmd("CONFIG")
        .arg("SET")
        .arg("client-output-buffer-limit")
        .arg("pubsub 65536 0 0")
        .exec(&mut server.connection())
        .unwrap();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let record = "x".repeat(1_000);
    // The test reads nothing until Redis has closed the connection.
    until(async || {
        let entry = after(node.head().await.position.entry);
        node.commit(
            (0..64)
                .map(|k| {
                    commit(
                        EntryId {
                            seq: entry.seq + k,
                            ..entry
                        },
                        &record,
                        &["u:1"],
                    )
                })
                .collect(),
        )
        .await;
        server
            .command::<String>("CLIENT LIST TYPE pubsub")
            .is_empty()
    })
    .await;
    let mut n_heard = 0;
    while !matches!(receiver.next().await, Notice::Reset { .. }) {
        n_heard += 1;
    }
    assert!(
        n_heard > 0,
        "notices received before the close are delivered first"
    );
    receiver.follow_and_wait("u:1", 2).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await.1, id);
}

#[tokio::test]
async fn a_dropped_feed_leaves_no_connection() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    for _ in 0..10 {
        let mut receiver = node.receiver().await;
        receiver.follow_and_wait("u:1", 1).await;
    }
    until(async || {
        server
            .command::<String>("CLIENT LIST TYPE pubsub")
            .is_empty()
    })
    .await;
}

/// The wait in Redis ends with the read: a cancelled read must not delay the next one, nor leave
/// connections behind.
#[tokio::test]
async fn a_cancelled_read_ends() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let before = server.command::<String>("CLIENT LIST").lines().count();
    for _ in 0..20 {
        let read = node
            .broker
            .read(node.p, EntryId::default(), 1, Duration::from_secs(600));
        tokio::time::timeout(Duration::from_millis(5), read)
            .await
            .expect_err("nothing to read");
    }
    until(async || server.command::<String>("CLIENT LIST").lines().count() <= before + 1).await;
    node.append(&["a"]).await;
    assert_eq!(
        node.broker
            .read(node.p, EntryId::default(), 1, Duration::from_secs(600))
            .await
            .unwrap()
            .len(),
        1
    );
}

/// After a restart or a `SCRIPT FLUSH`, Redis no longer knows the scripts.
#[tokio::test]
async fn forgotten_scripts_are_sent_again() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let () = server.command("SCRIPT FLUSH");
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(node.ids("u:1", BEGIN).await, [id]);
}

/// After a failover, a connection to the former primary may stay open for a long time. Entries read
/// there must not be committed to the new primary.
#[tokio::test]
async fn reads_do_not_use_an_older_connection_than_commits() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let read = async || {
        node.broker
            .read(node.p, EntryId::default(), 1, Duration::ZERO)
            .await
            .unwrap()
    };
    let with = |command: &str| -> Vec<String> {
        let list: String = server.command("CLIENT LIST TYPE normal");
        let found = list
            .lines()
            .filter(|line| line.contains(&format!("cmd={command} ")));
        found
            .filter_map(|line| {
                line.strip_prefix("id=")?
                    .split(' ')
                    .next()
                    .map(str::to_owned)
            })
            .collect()
    };
    read().await;
    read().await;
    let readers = with("xread");
    assert_eq!(readers.len(), 1, "the connection is reused");
    // The first call sends the whole script; the second one identifies the connection by EVALSHA.
    node.head().await;
    node.head().await;
    let commands = with("evalsha");
    assert_eq!(commands.len(), 1);
    for id in commands {
        let _: i64 = server.command(&format!("CLIENT KILL ID {id}"));
    }
    until(async || node.broker.head(node.p).await.is_ok()).await;
    read().await;
    until(async || with("xread").len() == 1).await;
    assert_ne!(with("xread"), readers);
}
