//! Installations with different prefixes on one Redis: their nodes share neither members and
//! attributes nor positions and bookmarks, even if they read the same source.

use serde_json::json;

use crate::harness::node::{Node, SOON};
use crate::harness::publish::xadd;
use crate::harness::redis::RedisServer;

/// A source that both installations read.
const SHARED: &str = "orders";

fn node_of(server: &RedisServer, prefix: &str) -> Node {
    let config =
        format!("[broker]\nprefix = \"{prefix}\"\nsources = [\"{prefix}:events\", \"{SHARED}\"]");
    Node::builder().redis(server.url()).config(&config).start()
}

fn share_nothing(server: &RedisServer) {
    let (one, two) = (node_of(server, "one"), node_of(server, "two"));
    let add = |source: &str, id: &str, target: &str, name: &str| {
        let fields = [("type", "t"), ("id", id), (target, name)];
        let fields = fields.map(|(field, value)| (field, value.to_owned()));
        xadd(&mut server.connection(), source, &[fields.into()]);
    };
    one.join("ops", "ann");
    let headers = [("content-type", "application/json")];
    let path = "/v1/users/ann/attributes";
    assert_eq!(
        one.send("PUT", path, &headers, br#"{"plan":"pro"}"#).status,
        204
    );
    assert_eq!(one.request("GET", path).json(), json!({ "plan": "pro" }));
    assert_eq!(two.request("GET", path).json(), json!({}));
    let member = "/v1/groups/ops/members/ann";
    assert_eq!(one.request("GET", member).status, 200);
    assert_eq!(two.request("GET", member).status, 404);

    let (mut of_one, mut of_two) = (one.stream("ann"), two.stream("ann"));
    add(SHARED, "to the group", "group", "ops");
    add(SHARED, "to both", "user", "ann");
    assert_eq!(of_one.next_notification(SOON).id, "to the group");
    assert_eq!(of_one.next_notification(SOON).id, "to both");
    assert_eq!(of_two.next_notification(SOON).id, "to both");
    add("one:events", "to one", "user", "ann");
    add("two:events", "to two", "user", "ann");
    assert_eq!(of_one.next_notification(SOON).id, "to one");
    assert_eq!(of_two.next_notification(SOON).id, "to two");
    for (node, n) in [(&one, 3), (&two, 3)] {
        node.await_outcomes(n, SOON);
    }
}

#[test]
fn two_installations_on_one_database_share_nothing() {
    share_nothing(&RedisServer::start());
}

#[test]
fn two_installations_on_one_cluster_share_nothing() {
    share_nothing(&RedisServer::cluster());
}
