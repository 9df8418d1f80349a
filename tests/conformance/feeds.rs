//! What a feed promises: the order of commits, only what is followed, and a word when it was deaf.

use super::*;

pub(super) async fn notices_come_in_the_order_of_commits(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    ear.hear("g:ops", 2).await;
    let life = node.head().await.life;
    let entry = after(node.head().await.position.entry);
    let at = |k| EntryId {
        seq: entry.seq + k,
        ..entry
    };
    let items = (0..50)
        .map(|k| {
            commit(
                at(k),
                "R",
                if k % 2 == 0 {
                    &["u:1"]
                } else {
                    &["g:ops", "u:1"]
                },
            )
        })
        .collect();
    let ids: Vec<_> = node
        .commit(items)
        .await
        .into_iter()
        .map(|(_, id)| id.unwrap())
        .collect();
    let last = node.publish("R", &["g:ops"]).await;
    let mut heard = Vec::new();
    while heard.last() != Some(&("g:ops".to_owned(), last)) {
        match ear.next().await {
            Notice::Append {
                partition,
                target,
                life: of,
                id,
                ..
            } => {
                assert_eq!((partition, of), (node.p, life));
                heard.push((target.to_string(), id));
            }
            Notice::Tick { .. } | Notice::Alive { .. } => {}
            other => panic!("heard {other:?}"),
        }
    }
    assert!(heard.is_sorted_by_key(|(_, id)| *id), "{heard:?}");
    let of = |log: &str| {
        heard
            .iter()
            .filter(|(target, _)| target == log)
            .map(|(_, id)| *id)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("u:1"), ids);
    assert_eq!(of("g:ops").len(), 26);
}

pub(super) async fn only_followed_logs_are_heard(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    node.publish("R", &["u:2"]).await;
    node.publish("R", &["all"]).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(ear.append().await, ("u:1".into(), id));
}

pub(super) async fn a_small_record_comes_along_and_a_large_one_does_not(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    let small = r#"{"a b":"ü \r"}"#;
    node.publish(small, &["u:1"]).await;
    node.publish(&"x".repeat(200_000), &["u:1"]).await;
    let mut records = Vec::new();
    while records.len() < 2 {
        if let Notice::Append { record, .. } = ear.next().await {
            records.push(record);
        }
    }
    assert_eq!(
        records,
        [Some(Bytes::copy_from_slice(small.as_bytes())), None]
    );
}

/// An acknowledgement of the earlier request must not pass for one of the later: in between, the log was not followed.
pub(super) async fn following_the_same_log_again_is_acknowledged_again(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.follow("u:1", 1);
    ear.feed
        .follow
        .send(Follow::Stop {
            partition: ear.p,
            target: target("u:1"),
        })
        .unwrap();
    ear.follow("u:1", 2);
    ear.follow("u:1", 3);
    let mut tokens = Vec::new();
    while tokens.len() < 3 {
        if let Notice::Following { token } = ear.next().await {
            tokens.push(token);
        }
    }
    assert_eq!(tokens, [1, 2, 3]);
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(
        ear.append().await,
        ("u:1".into(), id),
        "once, although it was asked for twice"
    );
    let next = node.publish("R", &["u:1"]).await;
    assert_eq!(ear.append().await, ("u:1".into(), next));
}

pub(super) async fn a_log_that_is_no_longer_followed_is_silent(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    ear.feed
        .follow
        .send(Follow::Stop {
            partition: ear.p,
            target: target("u:1"),
        })
        .unwrap();
    // Requests are taken in order: when the second is in force, so is the first.
    ear.hear("u:2", 2).await;
    node.publish("R", &["u:1"]).await;
    let id = node.publish("R", &["u:2"]).await;
    assert_eq!(ear.append().await, ("u:2".into(), id));
}

pub(super) async fn an_append_after_the_acknowledgement_is_heard(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    for round in 0..50 {
        let log = format!("u:{round}");
        ear.hear(&log, round).await;
        let id = node.publish("R", &[&log]).await;
        assert_eq!(ear.append().await, (log, id));
    }
}

pub(super) async fn a_tick_names_the_last_id_after_all_its_notices(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(node.publish("R", &["u:1"]).await);
    }
    node.broker.tick(node.p).await.unwrap();
    let mut heard = Vec::new();
    loop {
        let (last, appended) = ear.tick().await;
        heard.extend(appended);
        // A broker may tick by itself, too: every tick must hold, and the last one names the last id.
        assert_eq!(heard.last().copied().unwrap_or_default(), last);
        if last == ids[19] {
            break;
        }
    }
    assert_eq!(heard, ids);
}

pub(super) async fn a_tick_during_a_plan_in_slices_names_the_id_before_it(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    let before = node.publish("R", &["u:1"]).await;
    let entry = after(node.head().await.position.entry);
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    node.broker.tick(node.p).await.unwrap();
    while ear.tick().await.0 != before {}
    node.slice(commit(entry, "R", &["u:2"]), 1, true).await;
    node.broker.tick(node.p).await.unwrap();
    let last = node.head().await.last;
    while ear.tick().await.0 != last {}
}

pub(super) async fn reconnecting_resets_and_a_new_follow_is_heard(bench: Bench) {
    let node = bench.open().await;
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    ear.feed
        .follow
        .send(Follow::Reconnect { partition: ear.p })
        .unwrap();
    loop {
        if let Notice::Reset { partitions } = ear.next().await {
            assert!(partitions.contains(&node.p));
            break;
        }
    }
    node.publish("R", &["u:1"]).await;
    ear.hear("u:1", 2).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(
        ear.append().await,
        ("u:1".into(), id),
        "what was published while nothing was followed is for the reader of history"
    );
}

pub(super) async fn two_feeds_hear_the_same(bench: Bench) {
    let node = bench.open().await;
    let (mut one, mut two) = (node.ear().await, node.ear().await);
    one.hear("all", 1).await;
    two.hear("all", 1).await;
    drop(node.ear().await);
    let id = node.publish("R", &["all"]).await;
    assert_eq!(one.append().await, two.append().await);
    assert!(id > NotificationId(0));
}
