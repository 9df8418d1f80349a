//! Roll-outs of plugins and the reports of nodes.

use std::collections::BTreeMap;

use pointsman::broker::{PluginVersion, Rollout};

use super::*;

fn rollout(percent: u32) -> Rollout {
    let version = |hash: &str| PluginVersion {
        hash: hash.to_owned(),
        config_hash: "c0".to_owned(),
    };
    Rollout {
        from: version("a0"),
        to: version("a1"),
        percent,
        at_ms: 7,
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

pub(super) async fn a_rollout_is_the_last_one_written_on_every_node(bench: Bench) {
    let (one, two) = (bench.open().await, bench.open().await);
    assert_eq!(two.broker.rollouts().await.unwrap(), BTreeMap::new());
    let set = |plugin: &'static str, percent: Option<u32>| {
        let broker = Arc::clone(&one.broker);
        async move {
            let (plugin, rollout) = (name(plugin), percent.map(rollout));
            let set = broker.set_rollout(&plugin, rollout.as_ref());
            set.await.expect("a roll-out is written");
        }
    };
    set("rules", Some(5)).await;
    set("address", Some(50)).await;
    set("rules", Some(100)).await;
    let expected = [("address", 50), ("rules", 100)];
    let expected = expected.map(|(plugin, percent)| (plugin.to_owned(), rollout(percent)));
    assert_eq!(two.broker.rollouts().await.unwrap(), expected.into());
    set("rules", None).await;
    set("rules", None).await;
    let left = two.broker.rollouts().await.unwrap();
    assert_eq!(left.keys().collect::<Vec<_>>(), ["address"]);
}

pub(super) async fn a_node_reads_the_last_report_of_every_node(bench: Bench) {
    let (one, two) = (bench.open().await, bench.open().await);
    let report = |node: &'static str, report: &'static str| {
        let broker = Arc::clone(&one.broker);
        async move {
            let report = broker.report_node(node, report.into());
            report.await.expect("a report is written");
        }
    };
    report("b", "{}").await;
    report("a", "{\"x\": \" 1 \"}").await;
    report("b", "[1, 2]").await;
    let now_ms = one.broker.now_ms();
    let reports = two.broker.node_reports().await.unwrap();
    let texts: Vec<(&str, &[u8])> = reports
        .iter()
        .map(|stored| (stored.node.as_str(), &stored.report[..]))
        .collect();
    assert_eq!(texts, [("a", &b"{\"x\": \" 1 \"}"[..]), ("b", b"[1, 2]")]);
    for stored in &reports {
        assert!(stored.at_ms.abs_diff(now_ms) < 60_000, "{stored:?}");
    }
}

pub(super) async fn rollouts_survive_the_process(bench: Bench) {
    let node = bench.open().await;
    let (plugin, written) = (name("rules"), rollout(5));
    let set = node.broker.set_rollout(&plugin, Some(&written));
    set.await.unwrap();
    drop(node);
    let node = bench.reopen().await;
    let found = node.broker.rollouts().await.unwrap();
    assert_eq!(found, [("rules".to_owned(), rollout(5))].into());
}
