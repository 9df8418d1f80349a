//! The nodes that register with one Redis.

use pointsman::broker::{Advertised, Peer};

use super::*;

const NODES: &str = "pointsman:nodes";

async fn register(node: &Node, name: &str, at: &Advertised) -> Vec<Peer> {
    node.broker.register_node(name, at).await.expect("register")
}

fn peer(name: &str, address: &str) -> Peer {
    Peer {
        name: name.to_owned(),
        address: address.parse().expect("an address"),
    }
}

#[tokio::test]
async fn nodes_that_register_learn_the_addresses_of_the_others() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let address = Advertised::Address("notify-1.internal:8080".parse().unwrap());
    let (one, two) = ("host/127.0.0.1:8080", "two");
    assert_eq!(register(&node, one, &address).await, []);
    assert_eq!(register(&node, one, &address).await, []);
    // A node that listens everywhere is reached where it reaches Redis from.
    let others = register(&node, two, &Advertised::Port(81)).await;
    assert_eq!(others, [peer(one, "notify-1.internal:8080")]);
    let others = register(&node, one, &address).await;
    assert_eq!(others, [peer(two, "127.0.0.1:81")]);
}

/// A node that is gone would be asked in each outage.
#[tokio::test]
async fn a_registration_expires_by_the_clock_of_redis_and_foreign_ones_are_ignored() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let here = Advertised::Address("here:1".parse().unwrap());
    let now = node.broker.now_ms();
    let entries = [
        ("fresh", format!("{} a:1", now - 5_000)),
        ("gone", format!("{} b:1", now - 11_000)),
        ("of-the-future", format!("{} c:1", now + 60_000)),
        ("a-path", format!("{now} evil:80/admin?x=")),
    ];
    for (name, entry) in &entries {
        let mut command = redis::cmd("HSET");
        command.arg(NODES).arg(name).arg(entry);
        command.exec(&mut server.connection()).expect("HSET");
    }
    let () = server.command(&format!("HSET {NODES} malformed x"));
    assert_eq!(register(&node, "me", &here).await, [peer("fresh", "a:1")]);
    let mut left: Vec<String> = server.command(&format!("HKEYS {NODES}"));
    left.sort();
    assert_eq!(left, ["a-path", "fresh", "me"]);
}
