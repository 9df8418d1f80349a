//! Plugin files change under a running node: each event is decided by exactly one version, the
//! newest valid one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pointsman::event::{EntryId, Event};
use pointsman::ingest::pipeline::{Pipeline, Resolution};
use pointsman::plugin::registry::Registry;
use pointsman::plugin::registry::settings::Config;
use pointsman::plugin::registry::watcher::Watcher;
use pointsman::shutdown::Shutdown;
use pointsman::telemetry::metrics::Metrics;
use serde_json::json;

use crate::harness::guests::versioned;
use crate::harness::node::{Node, SOON};
use crate::harness::plugins::{Plugins, Site, by, generations, hash, n_loads};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::{engine, eventually};

#[test]
fn a_new_version_takes_over_between_two_events() {
    let plugins = Plugins::new(&[("20-versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    let n_instances = |node: &Node| node.metric("pointsman_plugin_instances");
    eventually(SOON, "an instance is kept", || {
        (n_instances(&site.node) > 0.0).then_some(())
    });

    plugins.replace("20-versioned.wasm", &versioned(2));
    site.await_loads("versioned", "loaded", 2);
    // Without any event, threads still release their instances of the old version.
    eventually(SOON, "no instance is kept", || {
        (n_instances(&site.node) == 0.0).then_some(())
    });
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));

    // Writing the same bytes again does not make a new version; new plugins take their place in the
    // order.
    plugins.replace("20-versioned.wasm", &versioned(2));
    plugins.replace("10-first.wasm", &versioned(3));
    plugins.replace("30-last.wasm", &versioned(4));
    site.await_loads("first", "loaded", 1);
    site.await_loads("last", "loaded", 1);
    site.await_loads("versioned", "loaded", 2);
    let (_, deciders) = site.next_decision();
    assert_eq!(
        deciders,
        [by("first", 1), by("versioned", 2), by("last", 1)]
    );
    assert_eq!(site.node.metric("pointsman_plugin_loads_total"), 4.0);
}

#[test]
fn an_invalid_file_never_replaces_an_active_plugin() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let next = versioned(2);
    let no_plugin = wat::parse_str("(module)").unwrap();
    let cases: [(&[u8], &str); 4] = [
        (&next[..next.len() / 2], "is truncated or damaged"),
        (b"", "is empty"),
        (b"<html>404</html>", "is not WebAssembly"),
        (
            &no_plugin,
            "exports neither pointsman:plugin/filter nor pointsman:plugin/router",
        ),
    ];
    for (n, (bytes, expect)) in (1..).zip(cases) {
        if n % 2 == 0 {
            plugins.replace("versioned.wasm", bytes)
        } else {
            fs::write(plugins.path("versioned.wasm"), bytes).unwrap()
        }
        site.await_loads("versioned", "failed", n);
        let told = format!("warning: plugins.versioned: versioned.wasm {expect}");
        let page = site.await_ready(200, |page| page.contains(&told));
        assert!(page.contains("; generation 1 stays active"), "{page}");
        assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
        let log = site.node.log();
        let line = log
            .lines()
            .find(|line| line.contains("plugin not replaced") && line.contains(&hash(bytes)));
        assert!(
            line.is_some_and(|line| line.contains(&hash(&versioned(1))) && line.contains(expect)),
            "{n}: {log}"
        );
    }
    // Restoring the good file changes nothing, because it is already active; then comes the next
    // version.
    plugins.replace("versioned.wasm", &versioned(1));
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    plugins.replace("versioned.wasm", &next);
    site.await_loads("versioned", "loaded", 2);
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
}

#[test]
fn a_file_written_in_pieces_is_loaded_when_it_is_complete() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    // Written in place, over a longer time than any settling delay.
    let whole = versioned(2);
    let mut file = File::create(plugins.path("versioned.wasm")).unwrap();
    for piece in whole.chunks(whole.len() / 60) {
        assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
        file.write_all(piece).unwrap();
    }
    drop(file);
    site.await_loads("versioned", "loaded", 2);
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    site.await_ready(200, |page| !page.contains("plugins"));

    // A new file that stays incomplete is reported, and loaded when the rest arrives.
    let whole = versioned(3);
    let (begin, end) = whole.split_at(whole.len() / 2);
    let mut file = File::create(plugins.path("slow.wasm")).unwrap();
    file.write_all(begin).unwrap();
    site.await_loads("slow", "failed", 1);
    site.await_ready(503, |page| {
        page.contains("plugins.slow: slow.wasm is truncated or damaged")
    });
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    file.write_all(end).unwrap();
    site.await_loads("slow", "loaded", 1);
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision().1, [by("slow", 1), by("versioned", 2)]);
    let log = site.node.log();
    assert!(log.contains("plugin not loaded yet: slow.wasm"), "{log}");
    assert!(
        !log.lines()
            .any(|line| line.contains("ERROR") && line.contains("slow.wasm")),
        "a file that is being copied is no error: {log}"
    );
}

#[test]
fn plugins_run_in_the_natural_order_of_their_files() {
    let plugins = Plugins::new(&[
        ("10-last.wasm", versioned(1)),
        ("9-middle.wasm", versioned(1)),
        ("1-first.wasm", versioned(1)),
    ]);
    let mut site = Site::new(&plugins);
    assert_eq!(
        site.next_decision().1,
        [by("first", 1), by("middle", 1), by("last", 1)]
    );
}

#[test]
fn removing_a_plugin_deletes_its_file_and_the_others_decide() {
    let plugins = Plugins::new(&[
        ("10-first.wasm", versioned(1)),
        ("20-second.wasm", versioned(2)),
    ]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision().1, [by("first", 1), by("second", 1)]);
    let remove = |site: &Site, name: &str| {
        let path = format!("/v1/plugins/{name}");
        let answer = site.node.order("DELETE", &path, &[], b"");
        assert_eq!(answer.status, 204, "{answer:?}");
    };
    remove(&site, "first");
    let log = site.node.log();
    let line = log
        .lines()
        .find(|line| line.contains("plugin deactivated: an admin command removed it"));
    assert!(
        line.is_some_and(|line| line.contains("first") && line.contains(&hash(&versioned(1)))),
        "{log}"
    );
    assert_eq!(site.next_decision(), (2, vec![by("second", 1)]));
    site.await_ready(200, |page| !page.contains("plugins"));

    // Without any plugin, events wait instead of being unrouted permanently, and dry runs are
    // refused.
    remove(&site, "second");
    site.await_ready(503, |page| {
        page.contains("plugins: no plugins loaded, so events wait")
    });
    let waiting = site.publish();
    let trial = serde_json::to_vec(&event("trial", "t", json!({"user": "7"}))).unwrap();
    let trial = site.node.send(
        "POST",
        "/v1/events?dry_run=true",
        &[("Content-Type", "application/cloudevents+json")],
        &trial,
    );
    assert_eq!(trial.status, 503, "{trial:?}");
    eventually(SOON, "the event is reported as waiting", || {
        (site.node.metric("pointsman_source_lag_entries") == 1.0).then_some(())
    });

    // Generation numbers are never reused, even if the plugin was removed in between.
    plugins.replace("20-second.wasm", &versioned(3));
    assert_eq!(site.decision(&waiting), (3, vec![by("second", 2)]));
    site.await_ready(200, |page| !page.contains("plugins"));
}

/// A missing folder (unmounted, or between two builds) does not mean that its plugins are to be
/// removed.
#[test]
fn a_missing_folder_removes_no_plugins_and_its_replacement_is_watched() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    fs::rename(plugins.dir(), plugins.dir().with_extension("old")).unwrap();
    site.await_ready(200, |page| {
        page.contains("warning: plugin-folder: the plugin folder")
    });
    // Longer than it takes to remove a plugin whose file is gone.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(1) {
        assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    }
    let build = plugins.dir().with_extension("new");
    fs::create_dir(&build).unwrap();
    fs::write(build.join("versioned.wasm"), versioned(2)).unwrap();
    fs::rename(build, plugins.dir()).unwrap();
    site.await_loads("versioned", "loaded", 2);
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    site.await_ready(200, |page| !page.contains("plugin"));
    plugins.replace("versioned.wasm", &versioned(3));
    site.await_loads("versioned", "loaded", 3);
    assert_eq!(site.next_decision(), (3, vec![by("versioned", 3)]));
}

#[test]
fn a_node_without_plugins_leaves_the_source_to_a_node_with_plugins() {
    let server = RedisServer::start();
    let (empty, full) = (
        Plugins::new(&[]),
        Plugins::new(&[("versioned.wasm", versioned(1))]),
    );
    let start = |plugins: &Path| {
        Node::builder()
            .redis(server.url())
            .plugins(plugins)
            .may_be_unready()
            .start()
    };
    // Started first, so it could have taken the lease.
    let without = start(&empty.dir());
    eventually(SOON, "it reports only that it has no plugins", || {
        let page = without.admin("/readyz").body;
        (page.contains("plugins: no plugins loaded") && !page.contains("broker: ")).then_some(())
    });
    let mut stream = without.stream("7");
    let mut publish = |id: &str| {
        without
            .publisher()
            .publish(&[event(id, "t", json!({"user": "7"}))]);
        stream.next_notification(SOON).data["version"].clone()
    };
    let with = start(&full.dir());
    assert_eq!(publish("e1"), 1);

    // They swap roles. For a moment neither has a plugin, so that one cannot decide while the other
    // releases the lease.
    let removed = with.order("DELETE", "/v1/plugins/versioned", &[], b"");
    assert_eq!(removed.status, 204, "{removed:?}");
    eventually(SOON, "it reports that it has no plugins", || {
        with.admin("/readyz")
            .body
            .contains("plugins: no plugins loaded")
            .then_some(())
    });
    empty.replace("versioned.wasm", &versioned(2));
    assert_eq!(publish("e2"), 2);
}

/// Runs in this process, because the memory of another cannot be observed: neither a thread nor a
/// snapshot keeps the code of a version that no longer decides. The registry keeps only the
/// previous version, for a rollback.
#[tokio::test]
async fn a_replaced_version_is_released() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let config = Config {
        dir: Some(plugins.dir()),
        ..serde_json::from_value(json!({"versioned": {"probation": "0s"}})).unwrap()
    };
    let registry = Arc::new(Registry::load(engine(), config, Metrics::default()).unwrap());
    let pipeline = Pipeline::start(Arc::clone(&registry), false, Metrics::default()).unwrap();
    let _watcher =
        Watcher::start(Arc::clone(&registry), Shutdown::new().alarm("the watcher")).unwrap();
    let published = json!({"id": "e", "source": "/tests", "type": "t", "user": "7"}).to_string();
    let batch = vec![
        Event::from_json(EntryId { ms: 1, seq: 0 }, "/tests", published.as_bytes())
            .unwrap();
        100
    ];
    let evaluations = pipeline.evaluate(batch, 1).await.unwrap();
    assert!(
        evaluations
            .iter()
            .all(|evaluation| matches!(evaluation.resolution, Resolution::Planned(_)))
    );
    let replaced = Arc::downgrade(&registry.chain().routers[0]);
    for version in 2..=3 {
        assert!(replaced.upgrade().is_some());
        plugins.replace("versioned.wasm", &versioned(version));
        pipeline
            .changes()
            .wait_for(|now| now.chain.routers[0].number == u64::from(version))
            .await
            .unwrap();
    }
    pipeline.release_retired_instances();
    eventually(SOON, "the first version is dropped", || {
        replaced.upgrade().is_none().then_some(())
    });
}

#[test]
fn reloads_under_load_neither_lose_nor_duplicate_events() {
    const RELOADS: u32 = 30;
    const BATCH: usize = 10;
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let node = Node::builder().plugins(plugins.dir()).start();
    let follower = node.follower("7");
    let is_over = AtomicBool::new(false);
    // The n-th file is the n-th generation: the generation in a decision is compared with the
    // version delivered to the user.
    let mut decided: BTreeMap<String, u64> = BTreeMap::new();
    let mut note_decisions = || {
        for decision in node
            .admin("/v1/decisions?limit=100")
            .json()
            .as_array()
            .unwrap()
        {
            let id = decision["event_id"].as_str().unwrap().to_owned();
            let [(_, generation)] = generations(decision)[..] else {
                panic!("more than one generation decided: {decision}")
            };
            assert_eq!(
                *decided.entry(id).or_insert(generation),
                generation,
                "{decision}"
            );
        }
    };
    let n_events = std::thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            let (publisher, mut n) = (node.publisher(), 0);
            while !is_over.load(Ordering::SeqCst) {
                let batch: Vec<_> = (n..n + BATCH)
                    .map(|n| event(&format!("e{n}"), "t", json!({"user": "7"})))
                    .collect();
                publisher.publish(&batch);
                n += BATCH;
                // The pace of the load.
                std::thread::sleep(Duration::from_millis(30));
            }
            n
        });
        let reload = || {
            let mut fastest = Duration::MAX;
            for version in 2..=RELOADS + 1 {
                let began = Instant::now();
                plugins.replace("versioned.wasm", &versioned(version));
                follower.look(SOON, "an event of the new version", |record| {
                    record
                        .notifications
                        .last()
                        .is_some_and(|told| told.data["version"] == version)
                });
                fastest = fastest.min(began.elapsed());
                note_decisions();
            }
            // Changes arrive as notifications and are not only found by the scan every two seconds.
            assert!(
                fastest < Duration::from_millis(1_500),
                "the fastest reload took {fastest:?}"
            );
        };
        // Caught, so that the publisher stops even if this fails.
        let reloaded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(reload));
        is_over.store(true, Ordering::SeqCst);
        let n_events = publishing.join().unwrap();
        reloaded.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        n_events
    });
    let record = follower.wait(SOON, "all events", |record| {
        record.notifications.len() >= n_events
    });
    node.await_outcomes(n_events, SOON);
    note_decisions();
    let ids: Vec<_> = record
        .notifications
        .iter()
        .map(|told| told.id.clone())
        .collect();
    assert_eq!(
        ids,
        (0..n_events).map(|n| format!("e{n}")).collect::<Vec<_>>()
    );
    let versions: Vec<_> = record
        .notifications
        .iter()
        .map(|told| told.data["version"].as_u64().unwrap())
        .collect();
    assert!(
        versions.is_sorted(),
        "an old version decided after a new one: {versions:?}"
    );
    assert!(
        decided.len() > 1_000,
        "{} decisions were seen",
        decided.len()
    );
    for (id, version) in ids.iter().zip(versions) {
        assert!(
            decided
                .get(id)
                .is_none_or(|generation| *generation == version),
            "{id} was decided by {} as {version}",
            decided[id]
        );
    }
    assert_eq!(
        node.metric("pointsman_events_total{outcome=\"committed\"}"),
        n_events as f64
    );
    assert_eq!(node.metric("pointsman_events_total"), n_events as f64);
    assert_eq!(
        (
            n_loads(&node, "versioned", "loaded"),
            n_loads(&node, "versioned", "failed")
        ),
        (f64::from(RELOADS + 1), 0.0)
    );
}

/// Two versions alternate, uploaded as fast as they are accepted, under the maximum load for one
/// user's stream.
#[test]
fn a_thousand_reloads_neither_lose_nor_duplicate_events_nor_leak_memory() {
    const RELOADS: u64 = 1_000;
    const EVENTS: usize = 50_000;
    /// Events per reload: events and reloads keep pace with each other.
    const BATCH: usize = EVENTS / RELOADS as usize;
    const RECORDS: usize = 17_000;

    // Redis holds the events, so that they do not count towards the memory of the node.
    let server = RedisServer::start();
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let node = Node::builder()
        .redis(server.url())
        .plugins(plugins.dir())
        .start();
    let follower = node.follower("7");
    // A node caches a few thousand records for streams that replay. This cache is bounded and not
    // what is measured, so it is filled first.
    for first in (0..RECORDS).step_by(500) {
        let batch: Vec<_> = (first..first + 500)
            .map(|n| event(&format!("before{n}"), "t", json!({"user": "7"})))
            .collect();
        node.publisher().publish(&batch);
        follower.look(SOON, "they are delivered", |record| {
            record.notifications.len() >= first + 500
        });
    }
    drop(follower.take_notifications());
    // Odd generations are of version 1, even ones of version 2.
    let files = [versioned(2), versioned(1)];
    let n_told = || {
        let mut n = 0;
        follower.look(SOON, "the record", |record| {
            n = record.notifications.len();
            true
        });
        n
    };
    let mut decided: BTreeMap<String, u64> = BTreeMap::new();
    let mut note_decisions = |node: &Node| {
        for decision in node
            .admin("/v1/decisions?limit=500")
            .json()
            .as_array()
            .unwrap()
        {
            let [(ref plugin, generation)] = generations(decision)[..] else {
                panic!("not exactly one generation decided: {decision}")
            };
            assert!(
                plugin == "versioned" && decision["outcome"] == "committed",
                "{decision}"
            );
            if decision["event_id"]
                .as_str()
                .is_some_and(|id| id.starts_with("before"))
            {
                continue;
            }
            let id = decision["event_id"].as_str().unwrap().to_owned();
            assert_eq!(
                *decided.entry(id).or_insert(generation),
                generation,
                "{decision}"
            );
        }
    };
    let n_reloads = AtomicU64::new(0);
    let (after_50, at_the_end) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let publisher = node.publisher();
            for first in (0..EVENTS).step_by(BATCH) {
                let batch: Vec<_> = (first..first + BATCH)
                    .map(|n| event(&format!("e{n}"), "t", json!({"user": "7"})))
                    .collect();
                publisher.publish(&batch);
                // A few batches ahead of the reloads, so that each reload happens while events are
                // in flight.
                eventually(Duration::from_secs(60), "reloads keep pace", || {
                    (n_reloads.load(Ordering::SeqCst) + 3 >= (first / BATCH) as u64).then_some(())
                });
            }
        });
        let reload = || {
            let mut after_50 = 0;
            for n in 0..RELOADS {
                follower.look(Duration::from_secs(60), "events flow", |record| {
                    record.notifications.len() + BATCH >= n as usize * BATCH
                });
                let answer =
                    node.order("PUT", "/v1/plugins/versioned", &[], &files[n as usize % 2]);
                assert_eq!(
                    (answer.status, &answer.json()["generation"]),
                    (200, &json!(n + 2))
                );
                note_decisions(&node);
                n_reloads.store(n + 1, Ordering::SeqCst);
                if n % 100 == 50 {
                    eprintln!("RSS {n} {}", node.memory_kib());
                }
                if n == 50 {
                    after_50 = node.memory_kib();
                }
            }
            (after_50, node.memory_kib())
        };
        // Caught, so that the publisher stops even if this fails.
        let reloaded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(reload));
        n_reloads.store(RELOADS, Ordering::SeqCst);
        reloaded.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    eventually(Duration::from_secs(60), "all events are delivered", || {
        (n_told() >= EVENTS).then_some(())
    });
    note_decisions(&node);
    let told = follower.stop().notifications;
    assert!(
        told.iter()
            .map(|told| told.id.clone())
            .eq((0..EVENTS).map(|n| format!("e{n}"))),
        "events were lost, duplicated or reordered"
    );
    let mut before = 0;
    for told in &told {
        let version = told.data["version"].as_u64().unwrap();
        if let Some(generation) = decided.get(&told.id) {
            assert_eq!(
                version,
                2 - generation % 2,
                "{} was decided by generation {generation}",
                told.id
            );
            assert!(
                *generation >= before,
                "{}: generation {generation} after {before}",
                told.id
            );
            before = *generation;
        }
    }
    let n_generations = decided.values().collect::<BTreeSet<_>>().len();
    assert!(
        decided.len() > EVENTS / 2 && n_generations > RELOADS as usize / 2,
        "{} decisions of {n_generations} generations",
        decided.len()
    );
    assert_eq!(
        node.metric("pointsman_events_total{outcome=\"committed\"}"),
        (RECORDS + EVENTS) as f64
    );
    assert_eq!(
        node.metric("pointsman_events_total"),
        (RECORDS + EVENTS) as f64
    );
    assert!(
        at_the_end * 10 <= after_50 * 11,
        "{after_50} KiB after 50 reloads, {at_the_end} KiB at the end"
    );
}
