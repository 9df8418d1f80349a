//! Installations with different prefixes on one server: they share nothing, and in a Redis Cluster
//! every call stays within one slot.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use pointsman::broker::{CursorOwner, Lease, Partitions as _, RecipientChange, StoredCursor};
use pointsman::event::Value;

/// A source that both installations read.
const SHARED: &str = "orders";

/// The broker of an installation. Its last partition is that of [`SHARED`].
async fn installation(url: &str, prefix: &str, sources: &[&str]) -> Node {
    let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
    let prefix = Prefix::parse(prefix).expect("a valid prefix");
    let redis = Redis::connect(url, &prefix, &sources, Retention::default())
        .await
        .expect("connect");
    let shared = redis.partitions().iter().find(|p| p.source == SHARED);
    let p = shared.expect("every test names it").number;
    Node {
        broker: Arc::new(redis),
        p,
    }
}

fn join(group: &str) -> RecipientChange {
    RecipientChange::Join { group: name(group) }
}

/// Writes a key of every kind in each partition and for the user `ann`.
async fn use_everything(node: &Node) {
    for partition in node.broker.partitions() {
        let node = Node {
            p: partition.number,
            ..node.clone()
        };
        let lease = node.broker.lease(node.p, "node", Duration::from_secs(60));
        assert_eq!(lease.await.unwrap(), Lease::Mine);
        node.broker.take_over(node.p).await.unwrap();
        let ids = node.append(&["a", "b", "c"]).await;
        node.broker.note_attempt(node.p, ids[0]).await.unwrap();
        node.commit(vec![
            with_id(commit(ids[0], "R", &["u:ann", "g:ops", "all"]), 1),
            dead(ids[1], "broken"),
        ])
        .await;
        node.slice(commit(ids[2], "R", &["u:ann"]), 0, false).await;
        node.slice(commit(ids[2], "R", &["u:bob"]), 1, true).await;
        node.broker.tick(node.p).await.unwrap();
        assert_eq!(node.ids("u:ann", BEGIN).await.len(), 2);
        let letters = node.broker.dead_letters(node.p, EntryId::default(), 9);
        let letters = letters.await.unwrap();
        assert!(node.broker.redrive(node.p, letters[0].id).await.unwrap());
        assert!(node.broker.decisions(node.p, 9).await.unwrap().len() >= 3);
        assert_eq!(node.broker.state(node.p).await.unwrap().lag, 1);
    }
    let attributes = RecipientChange::Attributes([("plan".into(), Value::Flag(true))].into());
    for change in [join("ops"), attributes] {
        let changed = node.broker.change_recipient(&name("ann"), change).await;
        changed.unwrap();
    }
    let cursor = StoredCursor {
        cursor: "c".into(),
        is_acknowledged: true,
    };
    let (ann, phone) = (name("ann"), CursorOwner::Device(name("phone")));
    let moved = node
        .broker
        .move_device_cursor(&ann, &phone, None, &cursor)
        .await;
    assert!(moved.unwrap());
    let ttl = Duration::from_secs(600);
    let stored = node.broker.store_ticket("t", "v".into(), ttl).await;
    stored.unwrap();
}

/// The node itself refuses a script that accesses keys of two slots, if it is one of a cluster.
async fn share_nothing(server: &RedisServer) {
    let one = installation(&server.url(), "one", &["one:events", SHARED]).await;
    let two = installation(&server.url(), "two", &[SHARED]).await;
    assert_ne!(one.p, two.p, "each counts its partitions");
    let (mut of_one, mut of_two) = (one.receiver().await, two.receiver().await);
    of_one.follow_and_wait("u:1", 1).await;
    of_two.follow_and_wait("u:1", 1).await;
    let change = one.broker.change_recipient(&name("1"), join("ops")).await;
    change.unwrap();
    // In each of its partitions. A notice to the other would be its first one and no append.
    for _ in one.broker.partitions() {
        while !matches!(of_one.next().await, Notice::RecipientChanged { .. }) {}
    }
    let lease = async |node: &Node| {
        let lease = node.broker.lease(node.p, "node", Duration::from_secs(60));
        lease.await.unwrap()
    };
    assert_eq!(
        (lease(&one).await, lease(&two).await),
        (Lease::Mine, Lease::Mine)
    );

    // Each commits all entries of the source, regardless of the other.
    one.append(&["a", "b"]).await;
    assert_eq!(drain(&one).await, 2);
    assert_eq!(two.broker.state(two.p).await.unwrap().lag, 2);
    assert_eq!(two.ids("u:1", BEGIN).await, []);
    assert_eq!(drain(&two).await, 2);
    let (first, second) = (one.ids("u:1", BEGIN).await, two.ids("u:1", BEGIN).await);
    assert_eq!((first.len(), second.len()), (2, 2));
    assert_eq!(of_one.append().await, ("u:1".into(), first[0]));
    assert_eq!(of_two.append().await, ("u:1".into(), second[0]));

    use_everything(&one).await;
    for user in ["1", "ann"] {
        let recipient = two.broker.recipient(&name(user)).await.unwrap();
        assert_eq!(recipient, pointsman::event::Recipient::default());
        let cursors = two.broker.device_cursors(&name(user)).await.unwrap();
        assert_eq!(cursors, BTreeMap::new());
    }
    assert_eq!(two.broker.decisions(two.p, 9).await.unwrap().len(), 2);
}

#[tokio::test]
async fn installations_on_one_database_share_nothing_but_their_sources() {
    share_nothing(&RedisServer::start()).await;
}

#[tokio::test]
async fn installations_on_one_cluster_share_nothing_but_their_sources() {
    share_nothing(&RedisServer::cluster()).await;
}

/// The keys of a partition lie in the slot of its source, and those of a user in one slot. Not yet
/// used: a node opens one connection and follows no redirection.
#[tokio::test]
async fn every_key_and_channel_begins_with_the_prefix_and_lies_in_the_slot_of_its_source_or_user() {
    let server = RedisServer::cluster();
    let slot = |key: &str| {
        let mut command = redis::cmd("CLUSTER");
        command.arg("KEYSLOT").arg(key);
        let slot: u16 = command.query(&mut server.connection()).expect("KEYSLOT");
        slot
    };
    let mut sources: BTreeSet<String> = BTreeSet::new();
    for prefix in ["one", "two"] {
        let own = format!("{prefix}:events");
        let of_node = [&own, "shop:{eu}:carts", SHARED];
        let node = installation(&server.url(), prefix, &of_node).await;
        let mut receiver = node.receiver().await;
        receiver.follow_and_wait("u:ann", 1).await;
        use_everything(&node).await;
        sources.extend(of_node.map(str::to_owned));

        let keys: Vec<String> = server.command("KEYS *");
        let keys: BTreeSet<_> = keys
            .into_iter()
            .filter(|key| key.starts_with(&format!("{prefix}:")))
            .collect();
        let channels: Vec<String> = server.command("PUBSUB CHANNELS *");
        let mut users = BTreeSet::new();
        let mut n_kinds: BTreeMap<String, usize> = BTreeMap::new();
        for name in keys.iter().chain(&channels) {
            let rest = name.strip_prefix(&format!("{prefix}:"));
            let rest = rest.unwrap_or_else(|| panic!("{name} has another prefix"));
            let rest = rest.strip_prefix("0:").unwrap_or(rest);
            let of_partition = of_node.iter().find_map(|source| {
                let tagged = [format!("{{{source}}}:"), format!("{source}:")];
                let kind = tagged.iter().find_map(|tag| rest.strip_prefix(tag))?;
                Some((source, kind))
            });
            if let Some((source, kind)) = of_partition {
                assert_eq!(slot(name), slot(source), "{name}");
                let kind = kind.split(':').next().expect("split yields one");
                *n_kinds.entry(kind.to_owned()).or_default() += 1;
            } else if rest.starts_with("user:") || rest.starts_with("device-cursors:") {
                users.insert(slot(name));
            } else {
                // A ticket is one key, which no command names together with another one.
                let is_alone = ["events", "partitions", "ticket:t"].contains(&rest);
                assert!(is_alone, "{name}");
            }
        }
        let kinds: Vec<&str> = n_kinds.keys().map(String::as_str).collect();
        assert_eq!(
            kinds,
            [
                "dead",
                "decisions",
                "e",
                "epochs",
                "l",
                "meta",
                "owner",
                "recipients",
                "seen",
                "tick"
            ]
        );
        assert_eq!(users.len(), 1, "the user's keys share a slot");
        let groups: Vec<BTreeMap<String, redis::Value>> =
            server.command(&format!("XINFO GROUPS {own}"));
        let group: String = redis::from_redis_value(groups[0]["name"].clone()).unwrap();
        assert_eq!(group, prefix);
    }
    // Nothing was written that belongs to neither.
    let all: Vec<String> = server.command("KEYS *");
    for key in all {
        let is_ours = key.starts_with("one:") || key.starts_with("two:");
        assert!(is_ours || sources.contains(&key), "{key}");
    }
}

/// The rights of an installation end at its prefix and its sources.
#[tokio::test]
async fn an_installation_needs_rights_for_its_prefix_and_its_sources_only() {
    let server = RedisServer::with(&["--appendonly", "yes"]);
    let rules = "ACL SETUSER app on >secret resetkeys resetchannels +@all -@dangerous +info";
    let () = server.command(&format!("{rules} ~{SHARED} ~one:* &one:*"));
    let url = format!("redis://app:secret@127.0.0.1:{}/", server.port());
    let node = installation(&url, "one", &["one:events", SHARED]).await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:ann", 1).await;
    use_everything(&node).await;
    assert_eq!(node.broker.check().await.unwrap(), []);
    let sources = [SHARED.to_owned()];
    let prefix = Prefix::parse("two").expect("a valid prefix");
    let refused = Redis::connect(&url, &prefix, &sources, Retention::default()).await;
    assert!(matches!(refused, Err(Error::Permanent(why)) if why.contains("NOPERM")));
}

/// An installation does not know who else reads its source: the consumer group of the other one,
/// once created, tells it.
#[tokio::test]
async fn the_owner_of_a_source_keeps_entries_that_the_group_of_another_installation_has_not_read() {
    let server = RedisServer::start();
    let retention = Retention {
        processed_entries_ttl: Duration::ZERO,
        ..Retention::default()
    };
    let connect = async |prefix: &str| {
        let prefix = Prefix::parse(prefix).expect("a valid prefix");
        let sources = ["one:events".to_owned()];
        let redis = Redis::connect(&server.url(), &prefix, &sources, retention.clone()).await;
        Node::new(Arc::new(redis.expect("connect")))
    };
    let (one, two) = (connect("one").await, connect("two").await);
    let () = server.command("XGROUP CREATE one:events two 0 MKSTREAM");
    one.append(&["v"; 1_000]).await;
    let n_left = async || {
        let () = server.command("HDEL one:{one:events}:meta trim_at");
        one.broker.tick(one.p).await.unwrap();
        server.command::<u64>("XLEN one:events")
    };
    assert_eq!(drain(&one).await, 1_000);
    assert_eq!(n_left().await, 1_000, "two has read none");
    assert_eq!(drain(&two).await, 1_000);
    assert!(n_left().await <= 100, "both have read all");
}
