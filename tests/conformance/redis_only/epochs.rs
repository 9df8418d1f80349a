//! Failovers and restarts as the scripts see them: another replication id starts another epoch.

use super::*;

/// The owner reads, then Redis fails over, and the data rolls back and advances to the same
/// position: only the epoch distinguishes the two.
#[tokio::test]
async fn a_commit_of_an_older_epoch_is_rejected() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a", "b"]).await;
    let old = node.head().await;
    server.change_replid();
    let batch = Batch {
        epoch: old.epoch,
        prev: old.position,
        items: vec![commit(ids[0], "R", &["u:1"])],
    };
    assert_eq!(
        node.broker.commit(node.p, batch.clone()).await.unwrap(),
        CommitResult::Conflict
    );
    let new = node.head().await;
    assert_ne!(new.epoch, old.epoch);
    assert_eq!(
        node.broker.commit(node.p, batch.clone()).await.unwrap(),
        CommitResult::Conflict,
        "also after the new epoch has begun"
    );
    assert!(matches!(
        node.broker
            .commit(
                node.p,
                Batch {
                    epoch: new.epoch,
                    ..batch
                }
            )
            .await
            .unwrap(),
        CommitResult::Done(_)
    ));
}

/// A slice of a plan that was started in another epoch: `entry/1` refers to another plan there.
#[tokio::test]
async fn a_slice_of_an_older_epoch_is_rejected() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = after(EntryId::default());
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    let old = node.head().await;
    server.change_replid();
    let slice = Slice {
        epoch: old.epoch,
        prev: old.position,
        item: commit(entry, "R", &["u:2"]),
        index: 1,
        is_last: true,
    };
    assert_eq!(
        node.broker
            .commit_slice(node.p, slice.clone())
            .await
            .unwrap(),
        CommitResult::Conflict
    );
    let new = node.head().await;
    assert_eq!(
        (new.position, new.pending),
        (old.position, old.pending),
        "position and plan do not depend on the epoch"
    );
    assert!(matches!(
        node.broker
            .commit_slice(
                node.p,
                Slice {
                    epoch: new.epoch,
                    ..slice
                }
            )
            .await
            .unwrap(),
        CommitResult::Done(_)
    ));
}

/// A reader from any older epoch, not only from the previous one, finds the last id that is still
/// valid for it.
#[tokio::test]
async fn each_epoch_is_listed_with_its_last_valid_id() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut expect = node.head().await.epochs;
    for _ in 0..20 {
        let last = node.publish("R", &["u:1"]).await;
        server.change_replid();
        let head = node.head().await;
        expect.push((head.epoch, last));
        assert_eq!(head.epochs, expect[expect.len().saturating_sub(16)..]);
    }
    let mut names: Vec<_> = node
        .head()
        .await
        .epochs
        .iter()
        .map(|(epoch, _)| epoch.bits())
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(
        names.len(),
        16,
        "the names of the listed epochs are distinct"
    );
}

/// Epochs in which nothing was committed take no place of others, and are found themselves.
#[tokio::test]
async fn epochs_that_end_where_they_began_are_listed_in_addition() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut expect = node.head().await.epochs;
    for n in 0..20 {
        let last = node.publish("R", &["u:1"]).await;
        for _ in 0..=n % 3 {
            server.change_replid();
            expect.push((node.head().await.epoch, last));
        }
    }
    let epochs = node.head().await.epochs;
    assert!(epochs.len() > 30, "{epochs:?}");
    assert_eq!(epochs, expect[expect.len() - epochs.len()..]);
}

#[tokio::test]
async fn every_notice_carries_the_epoch_it_was_published_in() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let mut epochs = Vec::new();
    for _ in 0..2 {
        epochs.push(node.head().await.epoch);
        node.publish("R", &["u:1"]).await;
        node.broker.tick(node.p).await.unwrap();
        server.change_replid();
    }
    for expect in epochs {
        assert!(matches!(receiver.next().await, Notice::Append { epoch, .. } if epoch == expect));
        assert!(matches!(receiver.next().await, Notice::Tick { epoch, .. } if epoch == expect));
    }
}

/// All data is gone, and clients that had received something must learn that: the name of their
/// epoch is no longer in the list.
#[tokio::test]
async fn flushall_begins_an_epoch_with_a_new_name() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.publish("R", &["u:1"]).await;
    let old = node.head().await;
    let () = server.command("FLUSHALL");
    let new = node.head().await;
    assert!(
        new.epochs.iter().all(|(epoch, _)| *epoch != old.epoch),
        "{:?}",
        new.epochs
    );
    assert_eq!((new.last, new.position), (BEGIN, Position::default()));
    assert!(new.origin >= old.origin);
    let id = node.publish("R", &["u:1"]).await;
    assert!(id > old.last, "ids follow the clock");
}

/// After a crash, the append-only file restores the data, and the restart begins an epoch.
#[tokio::test]
async fn a_restart_begins_an_epoch_at_the_surviving_data() {
    let mut server = RedisServer::with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let node = node_on(&server).await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let last = node.publish("R", &["u:1"]).await;
    let old = node.head().await;
    server.kill();
    assert!(matches!(
        node.broker.head(node.p).await,
        Err(Error::Unavailable(_))
    ));
    server.restart();
    until(async || node.broker.head(node.p).await.is_ok()).await;
    let new = node.head().await;
    assert_eq!(new.epochs, [(old.epoch, BEGIN), (new.epoch, last)]);
    assert_eq!((new.last, new.position), (last, old.position));
    // The notice connection is re-established, sends a reset, and delivers again after a new follow
    // request.
    while !matches!(receiver.next().await, Notice::Reset { .. }) {}
    receiver.follow_and_wait("u:1", 2).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await, ("u:1".into(), id));
}

/// The node's connections outlive the demotion of their server, but the data of a replica may be
/// stale.
#[tokio::test]
async fn a_replica_counts_as_unavailable() {
    let (server, primary) = (RedisServer::start(), RedisServer::start());
    let node = node_on(&server).await;
    node.publish("R", &["u:1"]).await;
    let () = server.command(&format!("REPLICAOF 127.0.0.1 {}", primary.port()));
    assert!(matches!(
        node.broker.head(node.p).await,
        Err(Error::Unavailable(_))
    ));
    assert!(matches!(
        node.broker.page(node.p, &target("u:1"), BEGIN, 10).await,
        Err(Error::Unavailable(_))
    ));
    assert!(matches!(
        node.broker.tick(node.p).await,
        Err(Error::Unavailable(_))
    ));
    assert!(matches!(
        connect_to(&server.url(), &[SOURCE], Retention::default()).await,
        Err(Error::Unavailable(_))
    ));
}

/// A plan in slices is announced before `last` reaches it. A reader that received it must not be
/// told that it was lost.
#[tokio::test]
async fn an_epoch_that_begins_within_a_plan_keeps_the_id_of_the_plan_valid() {
    let mut server = RedisServer::with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let node = node_on(&server).await;
    node.publish("before", &["u:1"]).await;
    let entry = after(node.head().await.position.entry);
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    let old = node.head().await;
    let pending = old.pending.expect("a plan is pending");
    server.kill();
    server.restart();
    until(async || node.broker.head(node.p).await.is_ok()).await;
    let new = node.head().await;
    assert_eq!(new.epochs, [(old.epoch, BEGIN), (new.epoch, pending)]);
    assert_eq!(new.last_valid_id(old.epoch), pending);
    node.slice(commit(entry, "R", &["u:2"]), 1, true).await;
    let end = node.head().await;
    assert_eq!((end.last, end.pending), (pending, None));
    assert_eq!(end.last_valid_id(old.epoch), pending);
}
