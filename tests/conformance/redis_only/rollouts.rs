//! The keys of roll-outs and reports under the hands of other clients: what Pointsman did not write
//! is neither transferred nor followed, and is reported.

use super::super::rollouts::rollout;
use super::rights::{node_of_app, refused_without};
use super::*;
use pointsman::broker::Advertised;

const KEY: &str = "pointsman:rollouts";

fn rules() -> [Name; 2] {
    ["address", "rules"].map(name)
}

#[tokio::test]
async fn values_that_are_not_rollouts_are_named_and_fields_of_others_are_not_read() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let (plugins, wanted) = (rules(), rollout(5));
    let written = node.broker.set_rollout(&plugins[0], Some(&wanted));
    let revision = written.await.expect("it is written");
    let mut connection = server.connection();
    for n in 0..1_000 {
        let mut add = redis::cmd("HSET");
        add.arg(KEY).arg(format!("other{n}")).arg("x".repeat(1_000));
        add.exec(&mut connection).expect("HSET");
    }
    for value in ["no json".to_owned(), "x".repeat(1 << 20)] {
        let mut set = redis::cmd("HSET");
        set.arg(KEY).arg("rules").arg(&value);
        set.exec(&mut connection).expect("HSET");
        let () = server.command("CONFIG RESETSTAT");
        let found = node.broker.rollouts(&plugins).await.expect("the others");
        assert_eq!(found.foreign, ["rules"]);
        assert_eq!(found.rollouts.keys().collect::<Vec<_>>(), ["address"]);
        assert_eq!(found.revision, revision);
        let info: String = server.command("INFO stats");
        let sent = info
            .lines()
            .find_map(|line| line.strip_prefix("total_net_output_bytes:"));
        let sent: u64 = sent.expect("a counter").trim().parse().expect("a number");
        assert!(sent < 100_000, "{sent} bytes were sent");
    }
    for revision in ["inf", "nan", "-1", "x", &"9".repeat(100)] {
        let () = server.command(&format!("HSET {KEY} rules {{}}"));
        let mut set = redis::cmd("HSET");
        set.arg(KEY).arg("").arg(revision);
        set.exec(&mut connection).expect("HSET");
        let found = node.broker.rollouts(&plugins).await;
        assert_eq!(found.expect(revision).revision, 0, "{revision}");
        let written = node.broker.set_rollout(&plugins[1], Some(&wanted));
        let written = written.await.expect(revision);
        let now_ms = node.broker.now_ms();
        assert!(written.abs_diff(now_ms) < 60_000, "{revision}: {written}");
    }
}

#[tokio::test]
async fn a_live_node_without_a_report_is_listed_and_a_key_of_another_type_is_replaced() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let report = || node.broker.report_node("b", "{}".into());
    assert!(!report().await.expect("it is written"), "not registered");
    for name in ["a", "b", "c"] {
        let at = Advertised::Address("127.0.0.1:1".parse().expect("an address"));
        let registered = node.broker.register_node(name, &at).await;
        registered.expect("it is registered");
    }
    let () = server.command("DEL pointsman:report:b");
    let _: u64 = server.command("RPUSH pointsman:report:b x");
    let _: u64 = server.command("SETRANGE pointsman:report:c 1000000 x");
    let read = async || {
        let reports = node.broker.node_reports().await.expect("they are read");
        let reports = reports.into_iter();
        let parts = reports.map(|stored| (stored.node, stored.report.is_some()));
        parts.collect::<Vec<_>>()
    };
    let expected = |is_reported: bool| {
        [("a", false), ("b", is_reported), ("c", false)].map(|(node, is)| (node.to_owned(), is))
    };
    assert_eq!(read().await, expected(false));
    assert!(report().await.expect("it replaces the list"));
    assert_eq!(read().await, expected(true));
    let ttl_ms: i64 = server.command("PTTL pointsman:report:b");
    assert!((1..=10_000).contains(&ttl_ms), "{ttl_ms}");
}

#[tokio::test]
async fn a_key_of_another_type_is_a_permanent_error_that_names_it() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let () = server.command(&format!("SET {KEY} x"));
    let ([_, plugin], wanted) = (rules(), rollout(5));
    let read = node.broker.rollouts(std::slice::from_ref(&plugin)).await;
    let written = node.broker.set_rollout(&plugin, Some(&wanted)).await;
    for refused in [read.map(drop), written.map(drop)] {
        assert!(
            matches!(&refused, Err(Error::Permanent(why)) if why.contains("WRONGTYPE")),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn a_rollout_without_a_right_is_not_written() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let [_, plugin] = rules();
    let wanted = rollout(5);
    refused_without(&server, &["-hset", "-hget"], async || {
        node.broker.set_rollout(&plugin, Some(&wanted)).await
    })
    .await;
}
