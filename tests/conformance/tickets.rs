//! One-time tickets.

use super::*;

pub(super) async fn a_ticket_is_taken_once_by_any_node_or_expires(bench: Bench) {
    let (one, two) = (bench.open().await, bench.open().await);
    let store = async |id: &str, ticket: &'static [u8], ttl: Duration| {
        let stored = one.broker.store_ticket(id, ticket.into(), ttl).await;
        stored.expect("a ticket is stored");
    };
    let (long, short) = (Duration::from_secs(600), Duration::from_millis(1));
    store("a", b"\0credentials\xff", long).await;
    store("b", b"others", long).await;
    store("c", b"", short).await;
    assert_eq!(two.broker.take_ticket("unknown").await.unwrap(), None);
    // Of many that race for it, one gets it.
    let takes = (0..8).map(|n| {
        let broker = Arc::clone(if n % 2 == 0 { &one.broker } else { &two.broker });
        tokio::spawn(async move { broker.take_ticket("a").await.unwrap() })
    });
    let mut taken = Vec::new();
    for take in takes.collect::<Vec<_>>() {
        taken.extend(take.await.unwrap());
    }
    assert_eq!(taken, [&b"\0credentials\xff"[..]]);
    // The passing of time is what is tested.
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(two.broker.take_ticket("c").await.unwrap(), None);
    let others = two.broker.take_ticket("b").await.unwrap();
    assert_eq!(others.as_deref(), Some(&b"others"[..]));
}
