//! Guarantees of the state that nodes share besides events: leases, take-overs, attempts and
//! partition numbers, across restarts.

use super::*;
use pointsman::broker::Lease;

const LONG: Duration = Duration::from_secs(60);

pub(super) async fn a_lease_belongs_to_one_node_until_it_releases_it(bench: Bench) {
    let node = bench.open().await;
    let lease = |who| node.broker.lease(node.p, who, LONG);
    assert_eq!(lease("a").await.unwrap(), Lease::Mine);
    assert_eq!(lease("a").await.unwrap(), Lease::Mine);
    match lease("b").await.unwrap() {
        Lease::Others(rest) => assert!(rest <= LONG && rest > LONG / 2, "{rest:?}"),
        Lease::Mine => panic!("two nodes hold the lease"),
    }
    node.broker.release(node.p, "b").await.unwrap();
    assert!(
        matches!(lease("b").await.unwrap(), Lease::Others(_)),
        "only its holder can release it"
    );
    node.broker.release(node.p, "a").await.unwrap();
    assert_eq!(lease("b").await.unwrap(), Lease::Mine);
}

pub(super) async fn a_lease_expires(bench: Bench) {
    let node = bench.open().await;
    assert_eq!(
        node.broker
            .lease(node.p, "a", Duration::from_millis(100))
            .await
            .unwrap(),
        Lease::Mine
    );
    until(async || node.broker.lease(node.p, "b", LONG).await.unwrap() == Lease::Mine).await;
    assert!(matches!(
        node.broker.lease(node.p, "a", LONG).await.unwrap(),
        Lease::Others(_)
    ));
}

pub(super) async fn a_node_of_the_same_name_gets_the_lease_at_once(bench: Bench) {
    let node = bench.open().await;
    assert_eq!(
        node.broker.lease(node.p, "a", LONG).await.unwrap(),
        Lease::Mine
    );
    drop(node);
    let node = bench.reopen().await;
    assert_eq!(
        node.broker.lease(node.p, "a", LONG).await.unwrap(),
        Lease::Mine
    );
}

pub(super) async fn take_overs_are_counted_until_the_position_moves(bench: Bench) {
    let node = bench.open().await;
    let take_over = || node.broker.take_over(node.p);
    assert_eq!(
        [
            take_over().await.unwrap(),
            take_over().await.unwrap(),
            take_over().await.unwrap()
        ],
        [1, 2, 3]
    );
    node.publish("R", &["u:1"]).await;
    assert_eq!(
        [take_over().await.unwrap(), take_over().await.unwrap()],
        [1, 2]
    );
    // A slice moves the position as well.
    node.slice(
        commit(after(node.head().await.position.entry), "R", &["u:1"]),
        0,
        false,
    )
    .await;
    assert_eq!(take_over().await.unwrap(), 1);
}

pub(super) async fn attempts_are_counted_for_each_entry(bench: Bench) {
    let node = bench.open().await;
    let (one, two) = (after(EntryId::default()), after(after(EntryId::default())));
    let mut counts = Vec::new();
    for entry in [one, one, one, two, two] {
        counts.push(node.broker.note_attempt(node.p, entry).await.unwrap());
    }
    assert_eq!(counts, [1, 2, 3, 1, 2]);
    // The counts must outlive the node, because they detect events that crash it.
    drop(node);
    let node = bench.reopen().await;
    assert_eq!(node.broker.note_attempt(node.p, two).await.unwrap(), 3);
}

pub(super) async fn lag_counts_the_entries_after_the_position(bench: Bench) {
    let node = bench.open().await;
    let lag = async || node.broker.state(node.p).await.unwrap().lag;
    assert_eq!(lag().await, 0);
    let ids = node.append(&["a", "b", "c"]).await;
    assert_eq!(lag().await, 3);
    node.commit(vec![
        commit(ids[0], "A", &["u:1"]),
        item(ids[1], Proposal::Discard),
    ])
    .await;
    assert_eq!(lag().await, 1);
    node.commit(vec![item(ids[2], Proposal::Discard)]).await;
    assert_eq!(lag().await, 0);
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(node.broker.state(node.p).await.unwrap().trimmed_unread, 0);
}

pub(super) async fn the_broker_clock_is_the_one_of_its_heads_and_ids(bench: Bench) {
    let node = bench.open().await;
    for _ in 0..3 {
        let before = node.broker.now_ms();
        let head = node.head().await;
        let id = node.publish("R", &["all"]).await;
        let after = node.broker.now_ms();
        // The node learns the time from answers, to a millisecond or two.
        let within = before.saturating_sub(2)..=after + 2;
        assert!(within.contains(&head.now_ms), "{within:?} {}", head.now_ms);
        assert!(within.contains(&id.ms()), "{within:?} {}", id.ms());
    }
}

pub(super) async fn partitions_have_distinct_numbers(bench: Bench) {
    let node = bench.open().await;
    let numbers: Vec<_> = node
        .broker
        .partitions()
        .iter()
        .map(|partition| partition.number)
        .collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    let sources: Vec<_> = node
        .broker
        .partitions()
        .iter()
        .map(|partition| partition.source.clone())
        .collect();
    drop(node);
    let node = bench.reopen().await;
    assert_eq!(
        node.broker
            .partitions()
            .iter()
            .map(|partition| partition.number)
            .collect::<Vec<_>>(),
        numbers
    );
    assert_eq!(
        node.broker
            .partitions()
            .iter()
            .map(|partition| partition.source.clone())
            .collect::<Vec<_>>(),
        sources
    );
    // Events of one partition are not visible in the others.
    node.publish("R", &["all"]).await;
    for other in numbers.into_iter().filter(|number| *number != node.p) {
        assert!(
            Node {
                p: other,
                ..node.clone()
            }
            .ids("all", NotificationId(0))
            .await
            .is_empty()
        );
    }
}

pub(super) async fn committed_data_survives_the_process(bench: Bench) {
    let node = bench.open().await;
    let ids = node.append(&["a", "b"]).await;
    let done = node
        .commit(vec![commit(ids[0], "A", &["u:1", "all"])])
        .await;
    let before = node.head().await;
    drop(node);
    let node = bench.reopen().await;
    let head = node.head().await;
    assert_eq!(
        (head.position, head.last, head.origin),
        (before.position, before.last, before.origin)
    );
    assert_eq!(
        node.ids("all", NotificationId(0)).await,
        [done[0].1.unwrap()]
    );
    let rest = node
        .broker
        .read(node.p, head.position.entry, 10, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(rest.len(), 1);
    assert!(node.publish("B", &["u:1"]).await > before.last);
}
