//! Roll-outs of plugins and the reports of nodes.

use pointsman::broker::{Advertised, PluginVersion, Rollout, WantedVersions};

use super::*;

pub(super) fn rollout(percent: u32) -> Rollout {
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
    let plugins = ["address", "discard", "rules"].map(name);
    let read = async || two.broker.rollouts(&plugins).await.unwrap();
    assert_eq!(read().await, WantedVersions::default());
    let set = |plugin: &'static str, percent: Option<u32>| {
        let broker = Arc::clone(&one.broker);
        async move {
            let (plugin, rollout) = (name(plugin), percent.map(rollout));
            let set = broker.set_rollout(&plugin, rollout.as_ref());
            set.await.expect("a roll-out is written")
        }
    };
    let first = set("rules", Some(5)).await;
    set("address", Some(50)).await;
    let last = set("rules", Some(100)).await;
    let expected = [("address", 50), ("rules", 100)];
    let expected = expected.map(|(plugin, percent)| (plugin.to_owned(), rollout(percent)));
    let found = read().await;
    assert_eq!(found.rollouts, expected.into());
    // Every write has a revision of its own, and the last one is that of all.
    assert!(first < last, "{first} {last}");
    assert_eq!(found.revision, last);
    let removed = set("rules", None).await;
    assert!(set("rules", None).await > removed && removed > last);
    let left = read().await.rollouts;
    assert_eq!(left.keys().collect::<Vec<_>>(), ["address"]);
    // Only what is asked for is read.
    let none = two.broker.rollouts(&[name("rules")]).await.unwrap();
    assert!(none.rollouts.is_empty(), "{none:?}");
}

/// A change of the share must not bring back a roll-out that was ended since it was read.
pub(super) async fn a_rollout_is_replaced_only_while_it_is_the_one_that_was_read(bench: Bench) {
    let (one, two) = (bench.open().await, bench.open().await);
    let plugin = name("rules");
    let (read, wider, other) = (rollout(5), rollout(50), rollout(7));
    let replace = async |before: &Rollout, rollout: Option<&Rollout>| {
        let replaced = one.broker.replace_rollout(&plugin, before, rollout);
        replaced.await.expect("an answer")
    };
    let present = async || {
        let wanted = two.broker.rollouts(std::slice::from_ref(&plugin)).await;
        wanted.expect("roll-outs").rollouts.remove("rules")
    };
    two.broker.set_rollout(&plugin, Some(&read)).await.unwrap();
    let revision = replace(&read, Some(&wider)).await;
    assert!(revision.is_some());
    assert_eq!(present().await.as_ref(), Some(&wider));
    two.broker.set_rollout(&plugin, Some(&other)).await.unwrap();
    assert_eq!(replace(&wider, None).await, None);
    assert_eq!(present().await.as_ref(), Some(&other));
    two.broker.set_rollout(&plugin, None).await.unwrap();
    assert_eq!(replace(&other, Some(&wider)).await, None);
    assert_eq!(present().await, None);
}

pub(super) async fn a_node_reads_the_last_report_of_every_node(bench: Bench) {
    let (one, two) = (bench.open().await, bench.open().await);
    let report = |node: &'static str, report: &'static str| {
        let broker = Arc::clone(&one.broker);
        async move {
            let at = Advertised::Address("127.0.0.1:1".parse().expect("an address"));
            broker.register_node(node, &at).await.expect("registered");
            let report = broker.report_node(node, report.into());
            assert!(report.await.expect("a report is written"), "it is live");
        }
    };
    report("b", "{}").await;
    report("a", "{\"x\": \" 1 \"}").await;
    report("b", "[1, 2]").await;
    let reports = two.broker.node_reports().await.unwrap();
    let texts: Vec<(&str, Option<&[u8]>)> = reports
        .iter()
        .map(|stored| (stored.node.as_str(), stored.report.as_deref()))
        .collect();
    let expected = [("a", &b"{\"x\": \" 1 \"}"[..]), ("b", b"[1, 2]")];
    assert_eq!(texts, expected.map(|(node, report)| (node, Some(report))));
}

pub(super) async fn rollouts_survive_the_process(bench: Bench) {
    let node = bench.open().await;
    let (plugin, written) = (name("rules"), rollout(5));
    let set = node.broker.set_rollout(&plugin, Some(&written));
    set.await.unwrap();
    drop(node);
    let node = bench.reopen().await;
    let found = node.broker.rollouts(&[plugin]).await.unwrap();
    assert_eq!(found.rollouts, [("rules".to_owned(), rollout(5))].into());
}
