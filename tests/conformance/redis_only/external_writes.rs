//! External writes to Pointsman's keys: wrong types, trimming, deletion, full memory and other
//! readers.

use super::*;

/// Fills the memory of Redis: appends `n` entries of `bytes` bytes each, then sets the limit
/// slightly below the memory in use.
fn fill(server: &RedisServer, n: usize, bytes: usize) {
    fill_source(server, SOURCE, n, bytes);
}

fn fill_source(server: &RedisServer, source: &str, n: usize, bytes: usize) {
    let payload = "x".repeat(bytes);
    let mut commands = redis::pipe();
    for _ in 0..n {
        commands
            .cmd("XADD")
            .arg(source)
            .arg("*")
            .arg("v")
            .arg(&payload);
    }
    let _: redis::Value = commands
        .query(&mut server.connection())
        .expect("Redis is not full yet");
    limit_memory(server);
    let refused = redis::cmd("XADD")
        .arg(source)
        .arg("*")
        .arg("v")
        .arg("f")
        .exec(&mut server.connection())
        .expect_err("Redis is full");
    assert_eq!(refused.code(), Some("OOM"));
}

/// Sets the limit of the memory slightly below the memory in use.
fn limit_memory(server: &RedisServer) {
    let memory: String = server.command("INFO memory");
    let used: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("used_memory:"))
        .and_then(|used| used.parse().ok())
        .expect("a number");
    let () = server.command(&format!("CONFIG SET maxmemory {}", used - 500_000));
}

/// The third write of a batch would fail on a key of the wrong type, and the first two would remain
/// and be repeated.
#[tokio::test]
async fn a_log_of_the_wrong_type_costs_one_event_and_leaves_no_partial_batch() {
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
        letters[0].why.reason.contains("l:u:2 has the wrong type"),
        "{}",
        letters[0].why.reason
    );
    assert_eq!(
        letters[0].why.fields,
        [field("v", "b")],
        "the fields come from the source because the proposal had none"
    );
    // A reader treats the key as an absent log and is not blocked by it.
    assert!(
        !node
            .broker
            .page(node.p, &target("u:2"), BEGIN, 10)
            .await
            .unwrap()
            .is_present
    );
    // The key that remembers publishers' ids: with a window of 300 s, bucket 5,666,666 contains the
    // time 1,700,000,000,000.
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

/// Found in a later slice, when the plan can no longer be undone: that log is skipped and counted.
#[tokio::test]
async fn a_wrong_type_in_a_later_slice_skips_that_log() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = after(EntryId::default());
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    let () = server.command(&format!("SET {TAG}l:u:2 foreign"));
    let last = node
        .slice(commit(entry, "R", &["u:2", "u:3"]), 1, true)
        .await;
    assert!(matches!(last, CommitResult::Done(outcomes) if outcomes[0].0 == Outcome::Committed));
    assert_eq!(node.ids("u:3", BEGIN).await.len(), 1);
    assert_eq!(
        server.command::<u64>(&format!("HGET {TAG}meta wrong_type_logs")),
        1
    );
}

/// Every commit writes to this key, so not even a dead letter can be written. Nothing is written,
/// and the error names the fix.
#[tokio::test]
async fn a_wrong_type_where_every_commit_writes_is_an_error_that_names_the_key() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let () = server.command(&format!("SET {TAG}dead foreign"));
    let head = node.head().await;
    let batch = Batch {
        epoch: head.epoch,
        prev: head.position,
        items: vec![commit(after(EntryId::default()), "R", &["u:1"])],
    };
    match node.broker.commit(node.p, batch).await {
        Err(Error::Permanent(why)) => assert!(
            why.contains(&format!("{TAG}dead")) && why.contains("rename or delete"),
            "{why}"
        ),
        other => panic!("{other:?}"),
    }
    assert!(node.ids("u:1", BEGIN).await.is_empty());
}

/// Publishers fill the memory. If commits were rejected as well, nothing would ever be trimmed.
#[tokio::test]
async fn a_full_redis_drains() {
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

/// No commit follows that could trim the entries of the last one, because publishers are rejected.
#[tokio::test]
async fn a_tick_frees_memory_after_the_last_commit() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    // At most what one read returns, so that no second commit trims the entries of the first.
    fill(&server, 20, 50_000);
    assert_eq!(drain(&node).await, 20);
    let append = || node.broker.append(node.p, vec![vec![field("v", "1")]]);
    assert!(matches!(append().await, Err(Error::Full(_))));
    until(async || {
        node.broker.tick(node.p).await.unwrap();
        append().await.is_ok()
    })
    .await;
}

/// A tick writes as well. If it were rejected, every node would reconnect its feed every 3 s. Even
/// a new epoch begins in a full Redis.
#[tokio::test]
async fn a_full_redis_ticks() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    let epoch = node.head().await.epoch;
    fill(&server, 2_000, 1_000);
    node.broker.tick(node.p).await.unwrap();
    receiver.tick().await;
    server.change_replid();
    node.broker.tick(node.p).await.unwrap();
    loop {
        match receiver.next().await {
            Notice::Tick { epoch: of, .. } if of != epoch => break,
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

/// Processed entries are kept for operators, but not in a full Redis.
#[tokio::test]
async fn processed_entries_are_kept_for_a_while_but_not_in_a_full_redis() {
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
        // Entries that left the source while it was drained may have freed just enough memory.
        limit_memory(&server);
        node.broker.tick(node.p).await.unwrap();
        server.command::<u64>(&format!("XLEN {SOURCE}")) < 500
    })
    .await;
}

/// A publisher's own `XADD MAXLEN` removes entries that were not read yet.
#[tokio::test]
async fn entries_trimmed_by_others_are_counted() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a", "b", "c", "d", "e"]).await;
    node.commit(vec![commit(ids[0], "R", &["u:1"])]).await;
    let _: String = server.command(&format!("XADD {SOURCE} MAXLEN = 2 * v f"));
    let lost = async || node.broker.state(node.p).await.unwrap().trimmed_unread;
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(
        lost().await,
        0,
        "the loss is not detectable while entries are waiting"
    );
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 2);
    assert_eq!(drain(&node).await, 2);
    for _ in 0..2 {
        node.broker.tick(node.p).await.unwrap();
        assert_eq!(lost().await, 3, "b, c and d, once");
    }
}

/// Entries that left the source before Pointsman used it do not count.
#[tokio::test]
async fn entries_trimmed_before_the_first_start_are_not_counted() {
    let server = RedisServer::start();
    for k in 0..10 {
        let _: String = server.command(&format!("XADD {SOURCE} MAXLEN = 3 * v {k}"));
    }
    let node = node_on(&server).await;
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 3);
    assert_eq!(drain(&node).await, 3);
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(node.broker.state(node.p).await.unwrap().trimmed_unread, 0);
}

/// The source is deleted and recreated with lower ids: its entries are below the position and would
/// never be read.
#[tokio::test]
async fn a_source_recreated_with_lower_ids_is_read_once() {
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
    assert_eq!((state.lag, state.trimmed_unread), (0, 0));
    assert_eq!(
        server.command::<u64>(&format!("XLEN {SOURCE}")),
        3,
        "the entries with the lower ids are removed"
    );
}

/// The position of the consumer group cannot be set on a deleted source. By then, the commit has
/// written everything else.
#[tokio::test]
async fn a_deleted_source_does_not_fail_a_commit() {
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

/// No entry is ever pending or acknowledged, and operators' tools still show the lag.
#[tokio::test]
async fn the_lag_is_readable_in_a_group_with_nothing_pending() {
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

/// Trimming removes no entries that another consumer group has not read.
#[tokio::test]
async fn entries_unread_by_another_group_are_not_trimmed() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            processed_entries_ttl: Duration::ZERO,
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
    // Redis trims whole nodes of 100 entries, so up to 100 more remain.
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

/// Dedupe buckets that a quiet period skipped would stay forever: they have no expiry, because they
/// follow the time of the entries.
#[tokio::test]
async fn at_most_two_dedupe_buckets_exist() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            dedupe_window: Duration::from_secs(1),
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
    // One batch that spans all of them, as after a stall.
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

/// Whatever its key: a source that is never trimmed fills Redis for good.
#[tokio::test]
async fn a_source_of_any_key_is_trimmed_as_far_as_no_group_needs_it() {
    let server = RedisServer::start();
    let retention = Retention {
        processed_entries_ttl: Duration::ZERO,
        ..Retention::default()
    };
    let node = connect_to(&server.url(), &["shop:orders"], retention)
        .await
        .unwrap();
    let ids = node.append(&["v"; 500]).await;
    let () = server.command(&format!("XGROUP CREATE shop:orders audit {}", ids[299]));
    drain(&node).await;
    let left = async || {
        let () = server.command("HDEL pointsman:{shop:orders}:meta trim_at");
        node.broker.tick(node.p).await.unwrap();
        server.command::<u64>("XLEN shop:orders")
    };
    // Redis trims whole nodes of 100 entries.
    let n_left = left().await;
    assert!((200..=300).contains(&n_left), "{n_left}");
    let () = server.command("XGROUP DESTROY shop:orders audit");
    let n_left = left().await;
    assert!(n_left <= 100, "{n_left}");
}

/// Nothing is waiting, so that only trimming can make room for publishers.
#[tokio::test]
async fn a_full_redis_drains_whatever_the_key_of_the_source() {
    let server = RedisServer::start();
    let node = connect_to(&server.url(), &["shop:orders"], Retention::default())
        .await
        .unwrap();
    fill_source(&server, "shop:orders", 2_000, 1_000);
    assert_eq!(drain(&node).await, 2_000);
    until(async || {
        node.broker.tick(node.p).await.unwrap();
        let append = node.broker.append(node.p, vec![vec![field("v", "1")]]);
        append.await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn an_untrimmed_source_keeps_its_entries_and_reports_them() {
    let server = RedisServer::start();
    let retention = Retention {
        processed_entries_ttl: Duration::ZERO,
        untrimmed_sources: vec!["shop:orders".into()],
        ..Retention::default()
    };
    let node = connect_to(&server.url(), &["shop:orders"], retention)
        .await
        .unwrap();
    let ids = node.append(&["v"; 500]).await;
    drain(&node).await;
    node.append(&["v"; 7]).await;
    let unneeded = async || {
        let () = server.command("HDEL pointsman:{shop:orders}:meta trim_at");
        node.broker.tick(node.p).await.unwrap();
        node.broker.state(node.p).await.unwrap().unneeded
    };
    assert_eq!(unneeded().await, 500);
    // 200 entries are delivered to another group, 50 of them are not acknowledged.
    let () = server.command(&format!("XGROUP CREATE shop:orders audit {}", ids[99]));
    let () = server.command(&format!(
        "XGROUP SETID shop:orders audit {} ENTRIESREAD 100",
        ids[99]
    ));
    let _: redis::Value =
        server.command("XREADGROUP GROUP audit me COUNT 200 STREAMS shop:orders >");
    for id in &ids[100..250] {
        let () = server.command(&format!("XACK shop:orders audit {id}"));
    }
    assert_eq!(unneeded().await, 250);
    assert_eq!(server.command::<u64>("XLEN shop:orders"), 507);
}

/// Lua passes at most about 8,000 arguments to a command, and exceeding the limit must not fail
/// after the first write.
#[tokio::test]
async fn a_dead_letter_with_too_many_fields_keeps_the_first_ones_and_notes_it() {
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
        letter
            .why
            .reason
            .contains("only the first 3900 of 20000 fields"),
        "{}",
        letter.why.reason
    );
    assert!(node.broker.redrive(node.p, letter.id).await.unwrap());
}

/// Any client that may publish in Redis may publish on our channels.
#[tokio::test]
async fn messages_from_other_publishers_on_our_channels_are_ignored() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let mut connection = server.connection();
    let mut publish = |channel: &str, message: &[u8]| {
        let received: i64 = redis::cmd("PUBLISH")
            .arg(format!("{CHANNELS}{channel}"))
            .arg(message)
            .query(&mut connection)
            .unwrap();
        assert_eq!(received, 1);
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
    assert_eq!(receiver.append().await, ("u:1".into(), id));
}
