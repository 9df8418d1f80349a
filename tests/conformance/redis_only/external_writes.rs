//! What others do to our keys: foreign types, trimming, deleting, filling the memory, reading along.

use super::*;

/// Publishes until Redis has no more room: `n` entries of `bytes`, and a bound a little below what is used then.
fn fill(server: &RedisServer, n: usize, bytes: usize) {
    let payload = "x".repeat(bytes);
    let mut commands = redis::pipe();
    for _ in 0..n {
        commands
            .cmd("XADD")
            .arg(SOURCE)
            .arg("*")
            .arg("v")
            .arg(&payload);
    }
    let _: redis::Value = commands
        .query(&mut server.connection())
        .expect("there is room yet");
    let memory: String = server.command("INFO memory");
    let used: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("used_memory:"))
        .and_then(|used| used.parse().ok())
        .expect("a number");
    let () = server.command(&format!("CONFIG SET maxmemory {}", used - 500_000));
    let refused = redis::cmd("XADD")
        .arg(SOURCE)
        .arg("*")
        .arg("v")
        .arg("f")
        .exec(&mut server.connection())
        .expect_err("it is full");
    assert_eq!(refused.code(), Some("OOM"));
}

/// The third write of a batch fails on a key of another type: what the first two wrote would stay and be written again.
#[tokio::test]
async fn f06_a_log_of_a_foreign_type_costs_one_event_and_no_half_batch() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let () = server.command(&format!("SET {TAG}l:u:2 foreign"));
    let () = server.command(&format!("SET {TAG}seen:5666666 foreign"));
    let ids = node.append(&["a", "b", "c", "d"]).await;
    let mut items: Vec<Item> = ids.iter().map(|id| commit(*id, "R", &["u:1"])).collect();
    items[1] = commit(ids[1], "R", &["u:1", "u:2", "u:3"]);
    let done = node.commit(items).await;
    let outcomes: Vec<Outcome> = done.iter().map(|(outcome, _)| *outcome).collect();
    assert_eq!(
        outcomes,
        [
            Outcome::Committed,
            Outcome::DeadLettered,
            Outcome::Committed,
            Outcome::Committed
        ]
    );
    assert_eq!(node.ids("u:1", BEGIN).await.len(), 3);
    assert!(node.ids("u:3", BEGIN).await.is_empty());
    let letters = node
        .broker
        .dead_letters(node.p, EntryId::default(), 10)
        .await
        .unwrap();
    assert!(
        letters[0]
            .why
            .reason
            .contains("l:u:2 holds something foreign"),
        "{}",
        letters[0].why.reason
    );
    assert_eq!(
        letters[0].why.fields,
        [field("v", "b")],
        "the fields come from the source, as nobody sent them along"
    );
    // A reader takes the key for an absent log, and is not stopped by it.
    assert!(
        !node
            .broker
            .page(node.p, &target("u:2"), BEGIN, 10)
            .await
            .unwrap()
            .is_present
    );
    // The key that remembers publishers' ids: bucket 5,666,666 holds the moment 1,700,000,000,000 at 300 s.
    let marked = with_id(
        commit(
            EntryId {
                ms: 1_700_000_000_000 + 60_000,
                seq: 9,
            },
            "R",
            &["u:1"],
        ),
        1,
    );
    let head = node.head().await;
    assert_eq!(
        node.commit_from(&head, vec![marked]).await[0].0,
        Outcome::DeadLettered
    );
}

/// Met in a later slice, when the plan cannot be taken back any more: that log is left out, and counted.
#[tokio::test]
async fn f06_a_foreign_type_in_a_later_slice_leaves_that_log_out() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = after(EntryId::default());
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    let () = server.command(&format!("SET {TAG}l:u:2 foreign"));
    let last = node
        .slice(commit(entry, "R", &["u:2", "u:3"]), 1, true)
        .await;
    assert!(matches!(last, Committed::Done(outcomes) if outcomes[0].0 == Outcome::Committed));
    assert_eq!(node.ids("u:3", BEGIN).await.len(), 1);
    assert_eq!(
        server.command::<u64>(&format!("HGET {TAG}meta foreign_logs")),
        1
    );
}

/// A key that the commit of any event writes to: none can be dead-lettered there, so nothing is written, and the operator is told what to do.
#[tokio::test]
async fn f06_a_foreign_type_where_every_commit_writes_is_refused_by_name() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let () = server.command(&format!("SET {TAG}dead foreign"));
    let head = node.head().await;
    let batch = Batch {
        life: head.life,
        prev: head.position,
        items: vec![commit(after(EntryId::default()), "R", &["u:1"])],
    };
    match node.broker.commit(node.p, batch).await {
        Err(Error::Refused(why)) => assert!(
            why.contains(&format!("{TAG}dead")) && why.contains("rename or delete"),
            "{why}"
        ),
        other => panic!("{other:?}"),
    }
    assert!(node.ids("u:1", BEGIN).await.is_empty());
}

/// Publishers fill the memory; were commits refused, too, nothing would be trimmed, for ever.
#[tokio::test]
async fn f07_a_full_redis_drains() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    fill(&server, 4_000, 1_000);
    let append = || node.broker.append(node.p, vec![vec![field("v", "1")]]);
    match append().await {
        Err(Error::Full(why)) => assert!(why.contains("maxmemory"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(drain(&node).await, 4_000);
    until(async || {
        node.broker.tick(node.p).await.unwrap();
        append().await.is_ok()
    })
    .await;
    assert_eq!(node.count(Outcome::Committed).await, 4_000);
}

/// What the last commit handled is trimmed by none after it: nobody can publish, so no commit would ever come.
#[tokio::test]
async fn f07_a_tick_makes_room_after_the_last_commit() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    fill(&server, 60, 50_000);
    assert_eq!(drain(&node).await, 60);
    let append = || node.broker.append(node.p, vec![vec![field("v", "1")]]);
    assert!(matches!(append().await, Err(Error::Full(_))));
    until(async || {
        node.broker.tick(node.p).await.unwrap();
        append().await.is_ok()
    })
    .await;
}

/// A tick writes as well: refused, every node would lose its ear every 3 s. Even a new life begins in a full Redis.
#[tokio::test]
async fn h16_a_full_redis_ticks() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut ear = node.ear().await;
    let life = node.head().await.life;
    fill(&server, 2_000, 1_000);
    node.broker.tick(node.p).await.unwrap();
    ear.tick().await;
    server.change_replid();
    node.broker.tick(node.p).await.unwrap();
    loop {
        match ear.next().await {
            Notice::Tick { life: of, .. } if of != life => break,
            Notice::Tick { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        node.broker
            .lease(node.p, "a", Duration::from_secs(9))
            .await
            .unwrap(),
        pointsman::broker::Lease::Mine
    );
}

/// Entries are kept for operators who look back, but not by a Redis that has no room.
#[tokio::test]
async fn h18_what_was_read_is_kept_for_a_while_but_not_in_a_full_redis() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["v"; 500]).await;
    drain(&node).await;
    let () = server.command(&format!("HDEL {TAG}meta trim_at"));
    node.publish("R", &["u:1"]).await;
    assert_eq!(server.command::<u64>(&format!("XLEN {SOURCE}")), 500);
    fill(&server, 4_000, 1_000);
    drain(&node).await;
    until(async || {
        node.broker.tick(node.p).await.unwrap();
        server.command::<u64>(&format!("XLEN {SOURCE}")) < 500
    })
    .await;
}

/// A publisher's own `XADD MAXLEN` removes what nobody has read.
#[tokio::test]
async fn f12_what_others_trim_is_counted_as_lost() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a", "b", "c", "d", "e"]).await;
    node.commit(vec![commit(ids[0], "R", &["u:1"])]).await;
    let _: String = server.command(&format!("XADD {SOURCE} MAXLEN = 2 * v f"));
    let lost = async || node.broker.state(node.p).await.unwrap().lost_upstream;
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(lost().await, 0, "it cannot be told while entries wait");
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 2);
    assert_eq!(drain(&node).await, 2);
    for _ in 0..2 {
        node.broker.tick(node.p).await.unwrap();
        assert_eq!(lost().await, 3, "b, c and d, once");
    }
}

/// What had left the source before Pointsman came was never ours to lose.
#[tokio::test]
async fn f12_an_old_source_is_no_loss() {
    let server = RedisServer::start();
    for k in 0..10 {
        let _: String = server.command(&format!("XADD {SOURCE} MAXLEN = 3 * v {k}"));
    }
    let node = node_on(&server).await;
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 3);
    assert_eq!(drain(&node).await, 3);
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(node.broker.state(node.p).await.unwrap().lost_upstream, 0);
}

/// Deleted and made again with lower ids: below the position, nothing of it would ever be read.
#[tokio::test]
async fn f25_a_source_made_again_with_lower_ids_is_read_once() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["old", "old"]).await;
    drain(&node).await;
    let position = node.head().await.position;
    let () = server.command(&format!("DEL {SOURCE}"));
    for k in 5..8 {
        let _: String = server.command(&format!("XADD {SOURCE} {k}-1 v new{k}"));
    }
    let waiting = async || {
        node.broker
            .read(node.p, position.entry, 10, Duration::ZERO)
            .await
            .unwrap()
    };
    assert!(waiting().await.is_empty());
    for _ in 0..2 {
        node.broker.tick(node.p).await.unwrap();
        let values: Vec<_> = waiting()
            .await
            .into_iter()
            .map(|entry| entry.fields)
            .collect();
        assert_eq!(
            values,
            [
                [field("v", "new5")],
                [field("v", "new6")],
                [field("v", "new7")]
            ]
        );
    }
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 3);
    assert_eq!(drain(&node).await, 3);
    node.broker.tick(node.p).await.unwrap();
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.lag, state.lost_upstream), (0, 0));
    assert_eq!(
        server.command::<u64>(&format!("XLEN {SOURCE}")),
        3,
        "the strays themselves are gone"
    );
}

/// The group's position cannot be set on a source that is gone; by then the commit has written everything.
#[tokio::test]
async fn h17_a_deleted_source_does_not_fail_a_commit() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a"]).await;
    let () = server.command(&format!("DEL {SOURCE}"));
    assert_eq!(
        node.commit(vec![commit(ids[0], "R", &["u:1"])]).await[0].0,
        Outcome::Committed
    );
    assert_eq!(node.head().await.position, ids[0].into());
}

/// Nothing is ever pending or acknowledged, and operators' tools show the lag all the same.
#[tokio::test]
async fn f30_the_lag_is_readable_in_a_group_with_nothing_pending() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a", "b", "c"]).await;
    node.commit(vec![commit(ids[0], "R", &["u:1"])]).await;
    node.commit(vec![item(ids[1], Proposal::Discard)]).await;
    let groups: Vec<std::collections::BTreeMap<String, redis::Value>> =
        server.command(&format!("XINFO GROUPS {SOURCE}"));
    let text = |name: &str| redis::from_redis_value::<String>(groups[0][name].clone()).unwrap();
    assert_eq!(
        (text("name"), text("lag"), text("pending")),
        ("pointsman".into(), "1".into(), "0".into())
    );
    assert_eq!(text("last-delivered-id"), ids[1].to_string());
}

/// Who else reads the source loses nothing to our trimming.
#[tokio::test]
async fn f12_what_another_group_has_not_read_is_not_trimmed() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            keep_s: 0,
            ..Retention::default()
        },
    )
    .await
    .unwrap();
    let ids = node.append(&["v"; 1_000]).await;
    let () = server.command(&format!("XGROUP CREATE {SOURCE} audit {}", ids[499]));
    let _: redis::Value = server.command(&format!(
        "XREADGROUP GROUP audit me COUNT 150 STREAMS {SOURCE} >"
    ));
    drain(&node).await;
    let left = async || {
        let () = server.command(&format!("HDEL {TAG}meta trim_at"));
        node.publish("R", &["u:1"]).await;
        server.command::<u64>(&format!("XLEN {SOURCE}"))
    };
    // Whole nodes of 100 entries are trimmed, so up to 100 more are left.
    let n_left = left().await;
    assert!(
        (500..=600).contains(&n_left),
        "{n_left}: delivered up to 650, but 501 to 650 are pending"
    );
    for id in &ids[500..650] {
        let () = server.command(&format!("XACK {SOURCE} audit {id}"));
    }
    let n_left = left().await;
    assert!(
        (350..=450).contains(&n_left),
        "{n_left}: 651 and on are not delivered"
    );
    let () = server.command(&format!("XGROUP DESTROY {SOURCE} audit"));
    let n_left = left().await;
    assert!(n_left <= 100, "{n_left}");
}

/// Buckets of publishers' ids that a quiet time skipped would stay for ever: they have no expiry, as their time is the stream's.
#[tokio::test]
async fn h13_at_most_two_buckets_stand() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            dedupe_window_s: 1,
            ..Retention::default()
        },
    )
    .await
    .unwrap();
    for (publisher_id, second) in [0, 1, 2, 50, 51, 90, 91, 93].into_iter().enumerate() {
        let entry = EntryId {
            ms: 1_700_000_000_000 + second * 1_000,
            seq: 1,
        };
        node.commit(vec![with_id(
            commit(entry, "R", &["u:1"]),
            publisher_id as u8,
        )])
        .await;
        let buckets: Vec<String> = server.command(&format!("KEYS {TAG}seen:*"));
        assert!(buckets.len() <= 2, "after {second} s: {buckets:?}");
    }
    // One batch that spans them all, as after a stall.
    let at = |second: u64| EntryId {
        ms: 1_700_000_100_000 + second * 1_000,
        seq: 1,
    };
    let items = [0, 1, 5, 9, 10]
        .into_iter()
        .map(|second| with_id(commit(at(second), "R", &["u:1"]), 100 + second as u8))
        .collect();
    node.commit(items).await;
    let mut buckets: Vec<String> = server.command(&format!("KEYS {TAG}seen:*"));
    buckets.sort_unstable();
    assert_eq!(
        buckets,
        [
            format!("{TAG}seen:1700000109"),
            format!("{TAG}seen:1700000110")
        ]
    );
}

/// Who reads a source without a group cannot be known; only what is named as ours is ours to trim.
#[tokio::test]
async fn f12_a_source_that_is_not_ours_by_name_is_not_touched() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &["shop:orders"],
        Retention {
            keep_s: 0,
            ..Retention::default()
        },
    )
    .await
    .unwrap();
    node.append(&["v"; 500]).await;
    drain(&node).await;
    let () = server.command("HDEL {shop:orders}:meta trim_at");
    node.publish("R", &["u:1"]).await;
    assert_eq!(server.command::<u64>("XLEN shop:orders"), 500);
    assert!(
        server
            .command::<Vec<redis::Value>>("XINFO GROUPS shop:orders")
            .is_empty()
    );
}

/// Lua gives a command no more than some 8,000 arguments, and the limit must not strike after the first write.
#[tokio::test]
async fn a_dead_letter_with_more_fields_than_a_script_can_write_keeps_the_first_and_says_so() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let fields: Vec<_> = (0..20_000).map(|k| field(&format!("f{k}"), "")).collect();
    let why = DeadReason {
        reason: "too many fields".into(),
        plugin: None,
        attempts: 1,
        fields: fields.clone(),
    };
    node.commit(vec![item(
        after(EntryId::default()),
        Proposal::DeadLetter(why),
    )])
    .await;
    let letter = &node
        .broker
        .dead_letters(node.p, EntryId::default(), 1)
        .await
        .unwrap()[0];
    assert_eq!(letter.why.fields, fields[..3_900]);
    assert!(
        letter.why.reason.contains("of 20000 fields the first 3900"),
        "{}",
        letter.why.reason
    );
    assert!(node.broker.redrive(node.p, letter.id).await.unwrap());
}

/// Whoever may publish in Redis may publish on our channels.
#[tokio::test]
async fn what_strangers_publish_on_our_channels_is_no_notice() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    let mut connection = server.connection();
    let mut publish = |channel: &str, message: &[u8]| {
        let heard: i64 = redis::cmd("PUBLISH")
            .arg(format!("{TAG}{channel}"))
            .arg(message)
            .query(&mut connection)
            .unwrap();
        assert_eq!(heard, 1);
    };
    for message in [
        &b""[..],
        b"\xff\0",
        b"AA",
        b"AA x",
        b"AAA 1",
        b"AA -1",
        &vec![b'x'; 3_000_000],
    ] {
        publish("l:u:1", message);
        publish("tick", message);
    }
    publish("recipients", b"a\nb");
    publish("recipients", b"\xff");
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(ear.append().await, ("u:1".into(), id));
}
