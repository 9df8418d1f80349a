//! Guarantees of the cursors stored for users: device cursors and read markers.

use std::collections::BTreeMap;

use super::*;
use pointsman::broker::{CursorOwner, StoredCursor};

fn device(text: &str) -> CursorOwner {
    CursorOwner::Device(name(text))
}

fn acknowledged(cursor: &str) -> StoredCursor {
    StoredCursor {
        cursor: cursor.to_owned(),
        is_acknowledged: true,
    }
}

fn begun(cursor: &str) -> StoredCursor {
    StoredCursor {
        cursor: cursor.to_owned(),
        is_acknowledged: false,
    }
}

impl Node {
    async fn device_cursors(&self, user: &str) -> BTreeMap<CursorOwner, StoredCursor> {
        self.broker
            .device_cursors(&name(user))
            .await
            .expect("device_cursors")
    }

    async fn move_device_cursor(
        &self,
        user: &str,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> bool {
        self.broker
            .move_device_cursor(&name(user), which, seen, to)
            .await
            .expect("move_device_cursor")
    }

    /// Moves a cursor, wherever it was.
    async fn put(&self, user: &str, which: &CursorOwner, to: &StoredCursor) {
        let seen = self.device_cursors(user).await.remove(which);
        assert!(
            self.move_device_cursor(user, which, seen.as_ref(), to)
                .await
        );
    }
}

pub(super) async fn a_device_cursor_moves_only_from_its_expected_value(bench: Bench) {
    let node = bench.open().await;
    let phone = device("phone");
    assert_eq!(node.device_cursors("1").await, BTreeMap::new());
    assert!(
        !node
            .move_device_cursor("1", &phone, Some(&begun("A")), &acknowledged("B"))
            .await,
        "there is no cursor yet"
    );
    assert!(
        node.move_device_cursor("1", &phone, None, &begun("A"))
            .await
    );
    assert!(
        !node
            .move_device_cursor("1", &phone, None, &begun("B"))
            .await,
        "there is already a cursor"
    );
    assert!(
        !node
            .move_device_cursor("1", &phone, Some(&acknowledged("A")), &acknowledged("B"))
            .await,
        "the cursor was not acknowledged"
    );
    assert!(
        !node
            .move_device_cursor("1", &phone, Some(&begun("B")), &acknowledged("B"))
            .await,
        "the cursor has another value"
    );
    assert!(
        node.move_device_cursor("1", &phone, Some(&begun("A")), &acknowledged("B"))
            .await
    );
    assert!(
        node.move_device_cursor("1", &phone, Some(&acknowledged("B")), &acknowledged("B"))
            .await,
        "moving it to the same value succeeds"
    );
    assert_eq!(
        node.device_cursors("1").await,
        BTreeMap::from([(phone, acknowledged("B"))])
    );
}

/// For unusual names of users and devices.
pub(super) async fn cursors_of_users_devices_and_read_markers_are_independent(bench: Bench) {
    let node = bench.open().await;
    let long = "x".repeat(256);
    let names = [
        "1",
        "ü 1",
        "a}b",
        "{a}",
        "a}:device_cursors",
        "read",
        "d:read",
        "{",
        long.as_str(),
    ];
    let mut expect: BTreeMap<&str, BTreeMap<CursorOwner, StoredCursor>> = BTreeMap::new();
    for user in names {
        for which in names
            .map(device)
            .into_iter()
            .chain([CursorOwner::ReadMarker])
        {
            let place = acknowledged(&format!("{user}/{which:?}"));
            node.put(user, &which, &place).await;
            expect.entry(user).or_default().insert(which, place);
        }
    }
    for user in names {
        assert_eq!(node.device_cursors(user).await, expect[user], "{user}");
    }
}

/// Each node increments the value it read, and retries until it succeeds.
pub(super) async fn no_concurrent_move_of_a_device_cursor_is_lost(bench: Bench) {
    const EACH: usize = 25;
    let nodes = [
        bench.open().await,
        bench.open().await,
        bench.open().await,
        bench.open().await,
    ];
    let racing = nodes.map(|node| {
        tokio::spawn(async move {
            let phone = device("phone");
            for _ in 0..EACH {
                loop {
                    let seen = node.device_cursors("1").await.remove(&phone);
                    let n: usize = seen
                        .as_ref()
                        .map_or(0, |seen| seen.cursor.parse().expect("a number"));
                    if node
                        .move_device_cursor(
                            "1",
                            &phone,
                            seen.as_ref(),
                            &acknowledged(&(n + 1).to_string()),
                        )
                        .await
                    {
                        break;
                    }
                }
            }
            node
        })
    });
    let mut end = BTreeMap::new();
    for racer in racing {
        end = racer
            .await
            .expect("the task does not panic")
            .device_cursors("1")
            .await;
    }
    assert_eq!(
        end,
        BTreeMap::from([(device("phone"), acknowledged(&(4 * EACH).to_string()))])
    );
}

pub(super) async fn a_new_device_evicts_the_least_recently_moved_one(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            max_devices_per_user: 2,
            ..Retention::default()
        })
        .await;
    node.put("1", &CursorOwner::ReadMarker, &acknowledged("R"))
        .await;
    for (of, place) in [("a", "A"), ("b", "B"), ("a", "A2"), ("c", "C")] {
        node.put("1", &device(of), &acknowledged(place)).await;
        // The broker's clock has a resolution of one millisecond.
        let moved_ms = node.head().await.now_ms;
        until(async || node.head().await.now_ms > moved_ms).await;
    }
    let expect = [
        (device("a"), acknowledged("A2")),
        (device("c"), acknowledged("C")),
        (CursorOwner::ReadMarker, acknowledged("R")),
    ];
    assert_eq!(node.device_cursors("1").await, BTreeMap::from(expect));
}

/// An unacknowledged cursor only requires opening a stream under an invented device name.
pub(super) async fn unacknowledged_devices_evict_no_acknowledged_ones(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            max_devices_per_user: 2,
            ..Retention::default()
        })
        .await;
    node.put("1", &device("phone"), &acknowledged("A")).await;
    for made_up in ["x", "y", "z"] {
        node.put("1", &device(made_up), &begun("B")).await;
        let moved_ms = node.head().await.now_ms;
        until(async || node.head().await.now_ms > moved_ms).await;
    }
    let left = |devices: &[(&str, StoredCursor)]| {
        devices
            .iter()
            .map(|(of, place)| (device(of), place.clone()))
            .collect::<BTreeMap<_, _>>()
    };
    assert_eq!(
        node.device_cursors("1").await,
        left(&[
            ("phone", acknowledged("A")),
            ("y", begun("B")),
            ("z", begun("B"))
        ])
    );
    // The first acknowledgement turns an unacknowledged device into an acknowledged one.
    node.put("1", &device("z"), &acknowledged("C")).await;
    node.put("1", &device("x"), &begun("B")).await;
    let expect = [
        ("phone", acknowledged("A")),
        ("x", begun("B")),
        ("y", begun("B")),
        ("z", acknowledged("C")),
    ];
    assert_eq!(node.device_cursors("1").await, left(&expect));
}

/// A read marker is kept as long as the notifications it refers to.
pub(super) async fn an_unused_device_cursor_expires(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            device_cursor_ttl: Duration::from_secs(1),
            ..Retention::default()
        })
        .await;
    for which in [device("phone"), device("tablet"), CursorOwner::ReadMarker] {
        node.put("1", &which, &acknowledged("A")).await;
    }
    let phone = device("phone");
    let left = BTreeMap::from([
        (phone.clone(), acknowledged("A")),
        (CursorOwner::ReadMarker, acknowledged("A")),
    ]);
    until(async || {
        // The phone's cursor is refreshed all the time. If the machine stalls for a second, it is
        // created again.
        let seen = node.device_cursors("1").await.remove(&phone);
        node.move_device_cursor("1", &phone, seen.as_ref(), &acknowledged("A"))
            .await;
        node.device_cursors("1").await == left
    })
    .await;
    // An expired cursor counts as absent.
    assert!(
        !node
            .move_device_cursor(
                "1",
                &device("tablet"),
                Some(&acknowledged("A")),
                &acknowledged("B")
            )
            .await
    );
    assert!(
        node.move_device_cursor("1", &device("tablet"), None, &acknowledged("B"))
            .await
    );
}

pub(super) async fn device_cursors_survive_the_process(bench: Bench) {
    let node = bench.open().await;
    node.put("1", &device("phone"), &begun("A")).await;
    node.put("1", &CursorOwner::ReadMarker, &acknowledged("B"))
        .await;
    let before = node.device_cursors("1").await;
    drop(node);
    let node = bench.reopen().await;
    assert_eq!(node.device_cursors("1").await, before);
}
