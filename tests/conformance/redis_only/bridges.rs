//! The lease of a bridge's listener: an append checks it in the same step, and a repeated append
//! appends nothing again.

use super::rights::refused_without;
use super::*;
use pointsman::broker::{Channel, Channels, HeardAppend, ListenerLease, ListenerSession};

const TTL: Duration = Duration::from_secs(60);

async fn redis_at(url: &str) -> Redis {
    let sources = [SOURCE.to_owned()];
    Redis::connect(url, &Prefix::default(), &sources, Retention::default())
        .await
        .expect("connect")
}

fn session(node: &str, session: &str) -> ListenerSession {
    ListenerSession {
        partition: PartitionNumber(0),
        bridge: "user:*".into(),
        node: node.into(),
        session: session.into(),
    }
}

fn entries(range: std::ops::RangeInclusive<u64>) -> Vec<Vec<(Bytes, Bytes)>> {
    let field = |n: u64| (Bytes::from_static(b"n"), Bytes::from(n.to_string()));
    range.map(|n| vec![field(n)]).collect()
}

fn n_entries(server: &RedisServer) -> u64 {
    server.command(&format!("XLEN {SOURCE}"))
}

fn is_mine(lease: &ListenerLease) -> bool {
    matches!(lease, ListenerLease::Mine { .. })
}

#[tokio::test]
async fn a_session_that_lost_its_lease_appends_nothing() {
    let server = RedisServer::start();
    let redis = redis_at(&server.url()).await;
    let (one, two) = (session("one", "s1"), session("two", "s2"));
    let take = async |session, ttl| redis.lease_listener(session, None, ttl).await.unwrap();
    assert!(is_mine(&take(&one, TTL).await));
    match take(&two, TTL).await {
        ListenerLease::Others { node, left } => {
            assert_eq!(node, "one");
            assert!(left <= TTL);
        }
        lease => panic!("{lease:?}"),
    }
    let append = async |session, first, entries: &[Vec<(Bytes, Bytes)>]| {
        redis.append_heard(session, first, entries).await.unwrap()
    };
    assert_eq!(
        append(&two, 1, &entries(1..=1)).await,
        HeardAppend::LeaseLost
    );
    assert_eq!(append(&one, 1, &entries(1..=3)).await, HeardAppend::Done);
    // The lease ends by itself, and its holder may continue until another session takes it.
    assert!(is_mine(&take(&one, Duration::from_millis(1)).await));
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(append(&one, 4, &entries(4..=4)).await, HeardAppend::Done);
    let taken = take(&two, TTL).await;
    assert!(
        matches!(
            taken,
            ListenerLease::Mine {
                is_taken_over: true,
                ..
            }
        ),
        "{taken:?}"
    );
    assert_eq!(
        append(&one, 5, &entries(5..=5)).await,
        HeardAppend::LeaseLost
    );
    assert_eq!(n_entries(&server), 4);
    // A released lease is not taken over, and its session is over.
    redis.release_listener(&one, None).await.unwrap();
    assert!(is_mine(&take(&two, TTL).await));
    redis.release_listener(&two, None).await.unwrap();
    assert_eq!(
        append(&two, 1, &entries(1..=1)).await,
        HeardAppend::LeaseLost
    );
    let taken = take(&one, TTL).await;
    assert!(
        matches!(
            taken,
            ListenerLease::Mine {
                is_taken_over: false,
                ..
            }
        ),
        "{taken:?}"
    );
    // The node before ended without a release and was started again under its name.
    assert!(is_mine(&take(&session("one", "s3"), TTL).await));
    assert_eq!(
        append(&one, 1, &entries(1..=1)).await,
        HeardAppend::LeaseLost
    );
    assert_eq!(n_entries(&server), 4);
}

/// The answer to the first attempt may be lost.
#[tokio::test]
async fn a_repeated_append_appends_only_what_is_missing() {
    let server = RedisServer::start();
    let redis = redis_at(&server.url()).await;
    let one = session("one", "s1");
    redis.lease_listener(&one, None, TTL).await.unwrap();
    for (first, range, expect) in [(1, 1..=3, 3), (1, 1..=3, 3), (2, 2..=5, 5), (6, 6..=6, 6)] {
        let entries = entries(range);
        let done = redis.append_heard(&one, first, &entries).await.unwrap();
        assert_eq!(done, HeardAppend::Done);
        assert_eq!(n_entries(&server), expect);
    }
    let read: Vec<(String, Vec<String>)> = redis::cmd("XRANGE")
        .arg(SOURCE)
        .arg("-")
        .arg("+")
        .query(&mut server.connection())
        .unwrap();
    let numbers: Vec<&str> = read.iter().map(|(_, fields)| fields[1].as_str()).collect();
    assert_eq!(numbers, ["1", "2", "3", "4", "5", "6"]);
}

#[tokio::test]
async fn the_time_without_a_subscribed_listener_is_measured_across_sessions() {
    let server = RedisServer::start();
    let redis = redis_at(&server.url()).await;
    let (one, two) = (session("one", "s1"), session("two", "s2"));
    let unheard = async |session, silent| {
        let silent = Some(Duration::from_secs(silent));
        match redis.lease_listener(session, silent, TTL).await.unwrap() {
            ListenerLease::Mine { unheard, .. } => unheard,
            lease => panic!("{lease:?}"),
        }
    };
    assert_eq!(unheard(&one, 30).await, Duration::ZERO);
    let first = unheard(&one, 10).await;
    assert!(first >= Duration::from_secs(30), "{first:?}");
    let silent = Some(Duration::from_secs(20));
    redis.release_listener(&one, silent).await.unwrap();
    let second = unheard(&two, 0).await;
    assert!(second >= Duration::from_secs(20), "{second:?}");
    let third = unheard(&two, 0).await;
    assert!(third < Duration::from_secs(20), "{third:?}");
}

#[tokio::test]
async fn a_bridge_without_a_right_writes_nothing() {
    let server = RedisServer::start();
    let () = server.command("ACL SETUSER app on >secret resetkeys ~* resetchannels &* +@all");
    let url = format!("redis://app:secret@127.0.0.1:{}/", server.port());
    let redis = redis_at(&url).await;
    let one = session("one", "s1");
    let lease = async || redis.lease_listener(&one, None, TTL).await;
    refused_without(&server, &["-hmget", "-hset"], lease).await;
    lease().await.unwrap();
    let append = async || redis.append_heard(&one, 1, &entries(1..=2)).await;
    refused_without(&server, &["-xadd", "-hset", "-hmget"], append).await;
    assert_eq!(append().await.unwrap(), HeardAppend::Done);
    let () = server.command("ACL SETUSER app resetchannels &pointsman:*");
    let channel = Channel::Pattern("user:*".into());
    match redis.subscribe(&channel, 1024).await.map(drop) {
        Err(Error::Permanent(why)) => assert!(why.contains("ACL SETUSER"), "{why}"),
        other => panic!("{other:?}"),
    }
}
