//! The files of plugins change under a running node: each event is decided by one version, and that is the newest one that is any good.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pointsman::event::{EntryId, Event};
use pointsman::metrics::Metrics;
use pointsman::pipeline::{Pipeline, Resolution};
use pointsman::plugin::registry::Registry;
use pointsman::plugin::settings::Config;
use pointsman::plugin::watcher::Watcher;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::guests::versioned;
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Stream;
use crate::harness::{engine, eventually};

/// A folder of plugins that a test changes.
struct Plugins(Folder);

impl Plugins {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let plugins = Self(Folder::new());
        fs::create_dir(plugins.dir()).unwrap();
        for (file, bytes) in files {
            plugins.replace(file, bytes);
        }
        plugins
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("plugins")
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    /// In one step, as a careful deployment does.
    fn replace(&self, file: &str, bytes: &[u8]) {
        let draft = self.path(&format!(".{file}"));
        fs::write(&draft, bytes).unwrap();
        fs::rename(draft, self.path(file)).unwrap();
    }

    fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).unwrap();
    }
}

/// A node with a stream of user 7, to whom `versioned` says who decided.
struct Site {
    node: Node,
    stream: Stream,
    n_events: u32,
}

impl Site {
    fn new(plugins: &Plugins) -> Self {
        let node = Node::builder().plugins(plugins.dir()).start();
        Self { stream: node.stream("7"), node, n_events: 0 }
    }

    /// Publishes an event, and answers its id.
    fn publish(&mut self) -> String {
        self.n_events += 1;
        let id = format!("e{}", self.n_events);
        self.node.publisher().publish(&[event(&id, "t", json!({"user": "7"}))]);
        id
    }

    /// Which version tells user 7 of the next event, and which plugins had a say in which generation.
    fn next_decision(&mut self) -> (u64, Vec<(String, u64)>) {
        let id = self.publish();
        self.decision(&id)
    }

    /// As [`Site::next_decision`], of an event that was published before.
    fn decision(&mut self, id: &str) -> (u64, Vec<(String, u64)>) {
        let notification = self.stream.next_notification(SOON);
        assert_eq!(notification.id, id);
        (notification.data["version"].as_u64().unwrap(), deciders(&self.node, id))
    }

    fn await_loads(&self, plugin: &str, outcome: &str, n: u32) {
        await_loads(&self.node, plugin, outcome, n);
    }

    /// Waits until the page on readiness is as wished, and answers it.
    fn await_ready(&self, status: u16, wish: impl Fn(&str) -> bool) -> String {
        eventually(SOON, "readiness as wished", || {
            let answer = self.node.admin("/readyz");
            (answer.status == status && wish(&answer.body)).then_some(answer.body)
        })
    }
}

fn n_loads(node: &Node, plugin: &str, outcome: &str) -> f64 {
    node.metric(&format!("pointsman_plugin_loads_total{{plugin=\"{plugin}\",outcome=\"{outcome}\"}}"))
}

fn await_loads(node: &Node, plugin: &str, outcome: &str, n: u32) {
    eventually(SOON, &format!("{plugin} {outcome} {n} times"), || (n_loads(node, plugin, outcome) >= f64::from(n)).then_some(()));
    assert_eq!(n_loads(node, plugin, outcome), f64::from(n));
}

/// Which plugins had a say in an event that was decided, in their order and generation.
fn deciders(node: &Node, event_id: &str) -> Vec<(String, u64)> {
    let decisions = node.admin(&format!("/v1/decisions?event_id={event_id}")).json();
    let [decision] = decisions.as_array().unwrap().as_slice() else { panic!("{event_id} has {decisions}") };
    generations(decision)
}

fn generations(decision: &Value) -> Vec<(String, u64)> {
    let verdicts = decision["verdicts"].as_array().unwrap().iter();
    verdicts.map(|verdict| (verdict["plugin"].as_str().unwrap().to_owned(), verdict["generation"].as_u64().unwrap())).collect()
}

fn by(plugin: &str, generation: u64) -> (String, u64) {
    (plugin.to_owned(), generation)
}

fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[test]
fn a_new_version_takes_over_between_two_events() {
    let plugins = Plugins::new(&[("20-versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    let n_instances = |node: &Node| node.metric("pointsman_plugin_instances");
    eventually(SOON, "an instance is kept", || (n_instances(&site.node) > 0.0).then_some(()));

    plugins.replace("20-versioned.wasm", &versioned(2));
    site.await_loads("versioned", "loaded", 2);
    // No event comes by: threads give back what they keep of the old version all the same.
    eventually(SOON, "no instance is kept", || (n_instances(&site.node) == 0.0).then_some(()));
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));

    // The same bytes again are no new version; and what comes anew has its place in the order.
    plugins.replace("20-versioned.wasm", &versioned(2));
    plugins.replace("10-first.wasm", &versioned(3));
    plugins.replace("30-last.wasm", &versioned(4));
    site.await_loads("first", "loaded", 1);
    site.await_loads("last", "loaded", 1);
    site.await_loads("versioned", "loaded", 2);
    let (_, deciders) = site.next_decision();
    assert_eq!(deciders, [by("first", 1), by("versioned", 2), by("last", 1)]);
    assert_eq!(site.node.metric("pointsman_plugin_loads_total"), 4.0);
}

#[test]
fn a_bad_file_never_replaces_a_good_plugin() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let next = versioned(2);
    let no_plugin = wat::parse_str("(module)").unwrap();
    let cases: [(&[u8], &str); 4] = [
        (&next[..next.len() / 2], "is truncated or damaged"),
        (b"", "is empty"),
        (b"<html>404</html>", "is no WebAssembly"),
        (&no_plugin, "exports neither pointsman:plugin/filter nor pointsman:plugin/router"),
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
        assert!(page.contains("; generation 1 stays at work"), "{page}");
        assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
        let log = site.node.log();
        let line = log.lines().find(|line| line.contains("plugin not replaced") && line.contains(&hash(bytes)));
        assert!(line.is_some_and(|line| line.contains(&hash(&versioned(1))) && line.contains(expect)), "{n}: {log}");
    }
    // The good one comes back, and is what runs already; then the next.
    plugins.replace("versioned.wasm", &versioned(1));
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    plugins.replace("versioned.wasm", &next);
    site.await_loads("versioned", "loaded", 2);
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
}

#[test]
fn a_file_written_in_pieces_is_loaded_once_it_is_whole() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    // In place, and slower than any pause that a file is waited for.
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

    // A new file that stops half-way is told, and loaded when the rest has come.
    let whole = versioned(3);
    let (begin, end) = whole.split_at(whole.len() / 2);
    let mut file = File::create(plugins.path("slow.wasm")).unwrap();
    file.write_all(begin).unwrap();
    site.await_loads("slow", "failed", 1);
    site.await_ready(503, |page| page.contains("plugins.slow: slow.wasm is truncated or damaged"));
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    file.write_all(end).unwrap();
    site.await_loads("slow", "loaded", 1);
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision().1, [by("slow", 1), by("versioned", 2)]);
}

#[test]
fn deleting_the_file_removes_the_plugin() {
    let plugins = Plugins::new(&[("10-first.wasm", versioned(1)), ("20-second.wasm", versioned(2))]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision().1, [by("first", 1), by("second", 1)]);
    plugins.remove("10-first.wasm");
    eventually(SOON, "the log tells of the removal", || {
        let log = site.node.log();
        let line = log.lines().find(|line| line.contains("plugin removed: its file is gone"))?;
        assert!(line.contains("first") && line.contains(&hash(&versioned(1))), "{line}");
        Some(())
    });
    eventually(SOON, "the second alone decides", || (site.next_decision() == (2, vec![by("second", 1)])).then_some(()));
    site.await_ready(200, |page| !page.contains("plugins"));

    // Without any plugin, events wait instead of being unrouted for good; nor is one tried out.
    plugins.remove("20-second.wasm");
    site.await_ready(503, |page| page.contains("plugins: none is loaded, so events wait"));
    let waiting = site.publish();
    let trial = serde_json::to_vec(&event("trial", "t", json!({"user": "7"}))).unwrap();
    let trial = site.node.send("POST", "/v1/events?dry_run=true", &[("Content-Type", "application/cloudevents+json")], &trial);
    assert_eq!(trial.status, 503, "{trial:?}");
    eventually(SOON, "the event is seen to wait", || (site.node.metric("pointsman_source_lag_entries") == 1.0).then_some(()));

    // No generation has the number of another, though it is a plugin anew.
    plugins.replace("20-second.wasm", &versioned(3));
    assert_eq!(site.decision(&waiting), (3, vec![by("second", 2)]));
    site.await_ready(200, |page| !page.contains("plugins"));
}

/// A folder that is away (unmounted, or between two builds) is no wish to be without plugins.
#[test]
fn a_folder_that_is_gone_removes_nothing_and_its_successor_is_watched() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    fs::rename(plugins.dir(), plugins.dir().with_extension("old")).unwrap();
    site.await_ready(200, |page| page.contains("warning: plugin-folder: the folder of plugins"));
    // For longer than it takes to remove a plugin whose file is gone.
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
fn a_node_without_plugins_leaves_the_source_to_one_that_has_some() {
    let server = RedisServer::start();
    let (empty, full) = (Plugins::new(&[]), Plugins::new(&[("versioned.wasm", versioned(1))]));
    let start = |plugins: &Path| Node::builder().redis(server.url()).plugins(plugins).may_be_unready().start();
    // The first to come: it could have taken the lease.
    let without = start(&empty.dir());
    eventually(SOON, "it says that it has none, and nothing else", || {
        let page = without.admin("/readyz").body;
        (page.contains("plugins: none is loaded") && !page.contains("broker: ")).then_some(())
    });
    let mut stream = without.stream("7");
    let mut publish = |id: &str| {
        without.publisher().publish(&[event(id, "t", json!({"user": "7"}))]);
        stream.next_notification(SOON).data["version"].clone()
    };
    let with = start(&full.dir());
    assert_eq!(publish("e1"), 1);

    // They change places. None is left for a moment, so that the one cannot decide while the other gives way.
    full.remove("versioned.wasm");
    eventually(SOON, "it says that it has none", || with.admin("/readyz").body.contains("plugins: none is loaded").then_some(()));
    empty.replace("versioned.wasm", &versioned(2));
    assert_eq!(publish("e2"), 2);
}

/// In this process, as no other can see it: no thread, and no snapshot, keeps the code of a version that no longer decides.
#[tokio::test]
async fn nothing_keeps_a_version_that_was_replaced() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let config = Config { dir: Some(plugins.dir()), ..Config::default() };
    let registry = Arc::new(Registry::load(engine(), config, Metrics::default()).unwrap());
    let pipeline = Pipeline::start(Arc::clone(&registry), false, Metrics::default()).unwrap();
    let _watcher = Watcher::start(Arc::clone(&registry)).unwrap();
    let published = json!({"id": "e", "source": "/tests", "type": "t", "user": "7"}).to_string();
    let batch = vec![Event::from_json(EntryId { ms: 1, seq: 0 }, "/tests", published.as_bytes()).unwrap(); 100];
    let evaluations = pipeline.evaluate(batch, 1).await.unwrap();
    assert!(evaluations.iter().all(|evaluation| matches!(evaluation.resolution, Resolution::Planned(_))));
    let replaced = Arc::downgrade(&registry.chain().routers[0]);
    plugins.replace("versioned.wasm", &versioned(2));
    pipeline.changes().wait_for(|now| now.chain.routers[0].number == 2).await.unwrap();
    pipeline.give_back_retired();
    eventually(SOON, "the first version is dropped", || replaced.upgrade().is_none().then_some(()));
}

#[test]
fn many_reloads_under_load_lose_and_double_nothing() {
    const RELOADS: u32 = 30;
    const BATCH: usize = 10;
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let node = Node::builder().plugins(plugins.dir()).start();
    let follower = node.follower("7");
    let is_over = AtomicBool::new(false);
    // The n-th file is the n-th generation: what an event's decision says is compared with what its user was told.
    let mut decided: BTreeMap<String, u64> = BTreeMap::new();
    let mut note_decisions = || {
        for decision in node.admin("/v1/decisions?limit=100").json().as_array().unwrap() {
            let id = decision["event_id"].as_str().unwrap().to_owned();
            let [(_, generation)] = generations(decision)[..] else { panic!("more than one generation decided: {decision}") };
            assert_eq!(*decided.entry(id).or_insert(generation), generation, "{decision}");
        }
    };
    let n_events = std::thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            let (publisher, mut n) = (node.publisher(), 0);
            while !is_over.load(Ordering::SeqCst) {
                let batch: Vec<_> = (n..n + BATCH).map(|n| event(&format!("e{n}"), "t", json!({"user": "7"}))).collect();
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
                    record.notifications.last().is_some_and(|told| told.data["version"] == version)
                });
                fastest = fastest.min(began.elapsed());
                note_decisions();
            }
            // Changes are heard, and not only found by the look every two seconds.
            assert!(fastest < Duration::from_millis(1_500), "the fastest of all took {fastest:?}");
        };
        // The publisher ends even if this fails.
        let reloaded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(reload));
        is_over.store(true, Ordering::SeqCst);
        let n_events = publishing.join().unwrap();
        reloaded.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        n_events
    });
    let record = follower.wait(SOON, "all events", |record| record.notifications.len() >= n_events);
    node.settle(SOON);
    note_decisions();
    let ids: Vec<_> = record.notifications.iter().map(|told| told.id.clone()).collect();
    assert_eq!(ids, (0..n_events).map(|n| format!("e{n}")).collect::<Vec<_>>());
    let versions: Vec<_> = record.notifications.iter().map(|told| told.data["version"].as_u64().unwrap()).collect();
    assert!(versions.is_sorted(), "an old version decided after a new one: {versions:?}");
    assert!(decided.len() > 1_000, "{} decisions were seen", decided.len());
    for (id, version) in ids.iter().zip(versions) {
        assert!(decided.get(id).is_none_or(|generation| *generation == version), "{id} was decided by {} as {version}", decided[id]);
    }
    assert_eq!(node.metric("pointsman_events_total{outcome=\"committed\"}"), n_events as f64);
    assert_eq!(node.metric("pointsman_events_total"), n_events as f64);
    assert_eq!((n_loads(&node, "versioned", "loaded"), n_loads(&node, "versioned", "failed")), (f64::from(RELOADS + 1), 0.0));
}
