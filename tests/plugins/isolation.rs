//! A plugin that traps, loops, exhausts memory, floods its output or returns invalid data costs one
//! event its route and nothing else. An invalid file is refused with the reason. The bundled
//! plugins decide through the real engine as they do natively.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pointsman::event::{EntryId, Event, Plan, Priority, Target, Value, Verdict, VerdictKind};
use pointsman::ingest::pipeline::{Evaluation, MissingPlugins, Pipeline, Resolution, Unevaluated};
use pointsman::plugin::Engine;
use pointsman::plugin::registry::Registry;
use pointsman::plugin::registry::settings::Config;
use pointsman::telemetry::metrics::Metrics;
use serde_json::{Value as Json, json};

use crate::harness::guests::{core_module, wasi_component};

/// The clock shown to plugins, in milliseconds since the Unix epoch.
const NOW_MS: u64 = 1_767_225_600_000;

/// One engine for all tests, as in a node.
fn engine() -> Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(crate::harness::engine).clone()
}

/// Creates a folder with these files.
fn folder(files: &[(&str, &[u8])]) -> PathBuf {
    static N: AtomicUsize = AtomicUsize::new(0);
    let n = N.fetch_add(1, Ordering::Relaxed);
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("plugins-{}-{n}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    dir
}

/// Creates a registry of these files, with the rest of the `[plugins]` section. Tests that do not
/// set a deadline are not about one and get several seconds, so that a busy machine fails none of
/// them.
fn registry(files: &[(&str, &[u8])], mut section: Json) -> Registry {
    for (file, _) in files.iter().filter(|(file, bytes)| {
        file.ends_with(".wasm") && !file.starts_with('.') && !bytes.is_empty()
    }) {
        let name = file
            .trim_end_matches(".wasm")
            .trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
        let settings = &mut section[name];
        if settings["deadline"].is_null() {
            settings["deadline"] = json!("5s");
        }
    }
    let mut config: Config = serde_json::from_value(section).unwrap();
    config.dir = Some(folder(files));
    Registry::load(engine(), config, Metrics::default()).unwrap()
}

struct Bench {
    pipeline: Pipeline,
    metrics: Metrics,
}

impl Bench {
    fn new(files: &[(&str, &[u8])], section: Json) -> Self {
        let registry = registry(files, section);
        let broken: Vec<_> = registry
            .states()
            .into_iter()
            .filter_map(|state| state.failure)
            .collect();
        assert!(broken.is_empty(), "{broken:?}");
        let metrics = Metrics::default();
        Self {
            pipeline: Pipeline::start(Arc::new(registry), false, metrics.clone()).unwrap(),
            metrics,
        }
    }

    /// Only `unruly`, with these settings.
    fn unruly(settings: Json) -> Self {
        Self::new(
            &[("unruly.wasm", &core_module("unruly"))],
            json!({ "unruly": settings }),
        )
    }

    async fn one(&self, event: Event) -> Evaluation {
        self.pipeline
            .evaluate(vec![event], NOW_MS)
            .await
            .unwrap()
            .remove(0)
    }

    async fn of_type(&self, kind: &str) -> Evaluation {
        self.one(event(json!({ "type": kind }))).await
    }
}

fn event(document: Json) -> Event {
    Event::from_json(
        EntryId { ms: NOW_MS, seq: 0 },
        "/test",
        document.to_string().as_bytes(),
    )
    .unwrap()
}

fn plan(evaluation: &Evaluation) -> &Plan {
    match &evaluation.resolution {
        Resolution::Planned(plan) => plan,
        other => panic!("{other:?}"),
    }
}

fn targets(evaluation: &Evaluation) -> Vec<String> {
    plan(evaluation)
        .targets()
        .iter()
        .map(Target::to_string)
        .collect()
}

/// The reason, the attempts, and whether the plugin requested a retry.
fn failure(evaluation: &Evaluation) -> (&str, u32, bool) {
    match &evaluation.resolution {
        Resolution::Failed {
            plugin,
            reason,
            attempts,
            retry,
        } => {
            assert_eq!(plugin, "unruly");
            (reason, *attempts, *retry)
        }
        other => panic!("{other:?}"),
    }
}

fn words(verdicts: &[Verdict]) -> Vec<(&str, &str)> {
    verdicts
        .iter()
        .map(|verdict| (verdict.plugin.as_str(), verdict.verdict.as_str()))
        .collect()
}

/// The event as `unruly` saw it, from the body of the first route.
fn seen(evaluation: &Evaluation) -> Json {
    serde_json::from_str(plan(evaluation).routes[0].body.as_ref().unwrap().get()).unwrap()
}

#[tokio::test]
async fn the_bundled_plugins_route_and_discard() {
    let config = json!({"discard": {"config": {"rules": [
        {"match": {"type": "debug.*"}}, {"match": {"payload": {"/order/total": 0}}, "reason": "free orders"}, {"match": {"older_than_s": 60}}
    ]}}});
    let bench = Bench::new(
        &[
            ("10-discard.wasm", &core_module("discard")),
            ("20-address.wasm", &core_module("address")),
        ],
        config,
    );

    let shipped =
        bench.one(event(json!({"type": "order.shipped", "user": "42", "groups": ["ops", "eu"], "ttl": "30s", "collapse": "o7"}))).await;
    assert_eq!(targets(&shipped), ["u:42", "g:eu", "g:ops"]);
    let route = &plan(&shipped).routes[0];
    assert_eq!(
        (route.by.as_str(), route.priority, route.expires_ms),
        ("address", Priority::Normal, Some(NOW_MS + 30_000))
    );
    assert_eq!(route.collapse.as_ref().unwrap().as_str(), "o7");
    assert_eq!(
        words(&shipped.verdicts),
        [("discard", "keep"), ("address", "routes")]
    );

    let urgent = bench
        .one(event(
            json!({"type": "t", "everyone": true, "priority": "urgent"}),
        ))
        .await;
    assert_eq!(
        (targets(&urgent), plan(&urgent).routes[0].priority),
        (vec!["all".to_owned()], Priority::Urgent)
    );

    let debug = bench
        .one(event(json!({"type": "debug.x", "user": "42"})))
        .await;
    assert!(
        matches!(&debug.resolution, Resolution::Discarded { plugin, reason } if plugin == "discard" && reason == "type is debug.*"),
        "{debug:?}"
    );
    assert_eq!(words(&debug.verdicts), [("discard", "drop")]);
    let free = bench
        .one(event(
            json!({"type": "t", "user": "42", "data": {"order": {"total": 0}}}),
        ))
        .await;
    assert!(
        matches!(&free.resolution, Resolution::Discarded { reason, .. } if reason == "free orders"),
        "{free:?}"
    );
    let old = bench
        .one(event(
            json!({"type": "t", "user": "42", "time": "2020-01-01T00:00:00Z"}),
        ))
        .await;
    assert!(
        matches!(&old.resolution, Resolution::Discarded { reason, .. } if reason == "older than 60 s"),
        "{old:?}"
    );

    let nobody = bench.one(event(json!({"type": "t"}))).await;
    assert!(
        matches!(nobody.resolution, Resolution::Unrouted),
        "{nobody:?}"
    );
    let bad = bench
        .one(event(json!({"type": "t", "user": "42", "ttl": "soon"})))
        .await;
    let Resolution::Failed {
        plugin,
        reason,
        attempts: 1,
        retry: false,
    } = &bad.resolution
    else {
        panic!("{bad:?}")
    };
    assert!(
        plugin == "address" && reason.contains("the attribute ttl is 'soon'"),
        "{reason}"
    );
}

#[tokio::test]
async fn every_misbehaviour_is_reported_and_the_next_event_is_decided() {
    let bench = Bench::unruly(json!({"deadline": "1s", "memory_mib": 8}));
    for (kind, expect, attempts) in [
        ("loop", "it ran longer than 1000 ms (deadline)", 2),
        ("grow", "MiB of memory; the limit is 8 (memory_mib)", 2),
        (
            "panic",
            "it trapped: panicked at tests/harness/guests/unruly/src/lib.rs:",
            2,
        ),
        ("panic", ": requested by the event type", 2),
        ("recurse", "it trapped: ", 2),
        ("reject", "no such order\\u{7}", 1),
        ("filter-rejects", "never", 1),
        (
            "many-targets",
            "10001 targets or routes; the limit is 10000 (max_targets)",
            2,
        ),
        (
            "many-routes",
            "10001 targets or routes; the limit is 10000 (max_targets)",
            2,
        ),
        (
            "large-answer",
            "larger than the limit of 256 KiB (result_kib)",
            2,
        ),
        ("huge-answer", "exceeds its limits", 2),
        (
            "user-with-a-line-feed",
            "the user contains the control character U+000A",
            2,
        ),
        ("empty-group", "the group is empty", 2),
        ("reserved-name", "the event name 'cursor' is reserved", 2),
        (
            "name-with-a-line-feed",
            "the event name contains the control character U+000A",
            2,
        ),
        ("body-of-no-json", "the body is not valid JSON", 2),
        ("ttl-of-nothing", "the ttl is 0", 2),
        ("test-without-a-value", "'plan' takes one value", 2),
        ("amend-the-id", "id is not an extension attribute", 2),
        (
            "amend-with-a-line-feed",
            "seen contains the control character U+000A",
            2,
        ),
        (
            "amend-with-an-option",
            "its amendment is invalid: the option 'colour' is unknown to this host; none is known here; remove it",
            2,
        ),
        (
            "unknown-option",
            "the option 'colour' is unknown to this host; use slot",
            2,
        ),
        ("slot-without-text", "the option 'slot' is not a text", 2),
        ("many-slots", "its routes have 9 slots; the limit is 8", 2),
        ("sleep", "it trapped: ", 2),
    ] {
        let began = Instant::now();
        let bad = bench.of_type(kind).await;
        let (reason, tried, retry) = failure(&bad);
        assert!(reason.contains(expect), "{kind} gave: {reason}");
        assert!(
            reason.chars().all(|c| !c.is_control()),
            "{kind} gave: {reason:?}"
        );
        assert_eq!((tried, retry), (attempts, false), "{kind}");
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{kind} took {:?}",
            began.elapsed()
        );
        // A plugin's verdict on an event does not count as a failure of the plugin.
        let verdict = if tried == 1 {
            VerdictKind::Rejected
        } else {
            VerdictKind::Failed
        };
        assert_eq!(bad.verdicts.last().unwrap().verdict, verdict, "{kind}");
        let next = bench.one(event(json!({"type": "next", "user": "7"}))).await;
        assert_eq!(targets(&next), ["u:7"], "after {kind}");
    }
    assert_eq!(failure(&bench.of_type("retry").await), ("not now", 1, true));
    let page = bench.metrics.render();
    for line in [
        "{plugin=\"unruly\",outcome=\"deadline\"} 2",
        "{plugin=\"unruly\",outcome=\"memory\"} 2",
        "{plugin=\"unruly\",outcome=\"rejected\"} 2",
        "{plugin=\"unruly\",outcome=\"retry\"} 1",
    ] {
        assert!(
            page.contains(&format!("pointsman_plugin_calls_total{line}")),
            "{line} is not in:\n{page}"
        );
    }
}

#[tokio::test]
async fn one_failing_event_does_not_affect_the_rest_of_its_batch() {
    let bench = Bench::unruly(json!({}));
    let kind = |n: usize| match n {
        50 => "panic",
        51 => "user-with-a-line-feed",
        120 => "grow",
        _ => "fine",
    };
    let events = (0..200)
        .map(|n| event(json!({"type": kind(n), "user": format!("user-{n}")})))
        .collect();
    let evaluations = bench.pipeline.evaluate(events, NOW_MS).await.unwrap();
    assert_eq!(evaluations.len(), 200);
    for (n, evaluation) in evaluations.iter().enumerate() {
        assert_eq!(
            evaluation.event.attribute("user"),
            Some(&Value::Text(format!("user-{n}")))
        );
        if kind(n) == "fine" {
            assert_eq!(targets(evaluation), [format!("u:user-{n}")]);
        } else {
            failure(evaluation);
        }
    }
}

#[tokio::test]
async fn cancelled_and_concurrent_callers_do_not_affect_each_other() {
    let bench = Bench::unruly(json!({}));
    let mut given_up = Box::pin(bench.pipeline.evaluate(
        (0..8).map(|_| event(json!({"type": "panic"}))).collect(),
        NOW_MS,
    ));
    // The first poll hands the events over, so they are queued or being evaluated.
    assert!(
        futures_util::poll!(given_up.as_mut()).is_pending(),
        "two panicking calls take longer than the first poll"
    );
    drop(given_up);
    let batch = |from: usize| {
        bench.pipeline.evaluate(
            (from..from + 30)
                .map(|n| event(json!({"type": "t", "user": format!("{n}")})))
                .collect(),
            NOW_MS,
        )
    };
    let (a, b, c) = tokio::join!(batch(0), batch(30), batch(60));
    let users: Vec<_> = [a, b, c]
        .into_iter()
        .flat_map(Result::unwrap)
        .flat_map(|evaluation| targets(&evaluation))
        .collect();
    assert_eq!(users, (0..90).map(|n| format!("u:{n}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_plugin_that_fails_is_called_once_more_on_a_fresh_instance() {
    let bench = Bench::unruly(json!({}));
    // So few events are one share, so both are evaluated by the same thread.
    let batch = ["t", "fresh-instances-only"].map(|kind| event(json!({ "type": kind })));
    let mut evaluations = bench.pipeline.evaluate(batch.into(), NOW_MS).await.unwrap();
    let evaluation = evaluations.remove(1);
    assert_eq!(seen(&evaluations[0])["call"], 1);
    assert_eq!(
        (targets(&evaluation), words(&evaluation.verdicts)),
        (
            vec!["u:42".to_owned()],
            vec![("unruly", "keep"), ("unruly", "routes")]
        )
    );
    let page = bench.metrics.render();
    assert!(
        page.contains("pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"trap\"} 1"),
        "{page}"
    );
}

#[tokio::test]
async fn an_instance_is_reused_and_replaced_after_its_number_of_calls() {
    // The filter and the router each take one call.
    let bench = Bench::unruly(json!({"calls_per_instance": 6}));
    let mut calls = Vec::new();
    // One at a time: any free thread may take it, and each counts by itself.
    for _ in 0..24 {
        calls.push(seen(&bench.of_type("t").await)["call"].as_u64().unwrap());
    }
    assert!(
        calls.iter().any(|&n| n > 1),
        "no instance was used again: {calls:?}"
    );
    assert!(
        calls.iter().all(|&n| n <= 3),
        "an instance outlived its calls: {calls:?}"
    );
}

#[tokio::test]
async fn only_data_that_a_plugin_selects_is_passed_to_it() {
    let document = json!({"type": "t", "a": 1, "flag": true, "data": {"order": {"region": "eu", "total": 2.5}}});
    let narrow = Bench::unruly(json!({"config": {"fields": ["/order/region", "/order", "/gone"]}}));
    let seen_narrow = seen(&narrow.one(event(document.clone())).await);
    assert_eq!(
        seen_narrow["attributes"],
        json!({"a": "1", "flag": "true", "/order/region": "eu", "/order": r#"{"region":"eu","total":2.5}"#})
    );
    assert_eq!(
        (&seen_narrow["data"], &seen_narrow["clock"]),
        (&json!("Payload::None"), &json!(NOW_MS))
    );
    let whole = Bench::unruly(json!({"config": {"payload": true}}));
    let data = seen(&whole.one(event(document)).await)["data"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(data.contains(r#"\"region\":\"eu\""#), "{data}");

    let some_types = Bench::unruly(json!({"config": {"types": ["order.*"]}}));
    assert_eq!(
        words(&some_types.of_type("order.shipped").await.verdicts),
        [("unruly", "keep"), ("unruly", "routes")]
    );
    let other = some_types.of_type("bill.paid").await;
    assert_eq!(words(&other.verdicts), [] as [(&str, &str); 0]);
    assert!(matches!(other.resolution, Resolution::Unrouted));
}

#[tokio::test]
async fn an_amendment_is_seen_by_later_plugins_and_its_priority_overrides_the_publishers() {
    let bench = Bench::new(
        &[
            ("unruly.wasm", &core_module("unruly")),
            ("z.wasm", &core_module("address")),
        ],
        json!({}),
    );
    let evaluation = bench
        .one(event(
            json!({"type": "amend", "user": "7", "priority": "low"}),
        ))
        .await;
    assert_eq!(
        evaluation.event.attribute("seen"),
        Some(&Value::Text("yes".into()))
    );
    let saw = seen(&evaluation);
    assert_eq!(
        (&saw["priority"], &saw["attributes"]["seen"]),
        (&json!("Priority::Urgent"), &json!("yes"))
    );
    let priorities: Vec<_> = plan(&evaluation)
        .routes
        .iter()
        .map(|route| (route.by.as_str(), route.priority))
        .collect();
    assert_eq!(
        priorities,
        [("unruly", Priority::Urgent), ("z", Priority::Urgent)]
    );
    // A route's own priority overrides the event's.
    let loud = bench
        .one(event(json!({"type": "loud", "priority": "low"})))
        .await;
    let route = &plan(&loud).routes[0];
    assert_eq!(
        (route.priority, route.expires_ms),
        (Priority::High, Some(NOW_MS + 5_000))
    );
    assert_eq!(
        (
            route.collapse.as_ref().unwrap().as_str(),
            route.event_name.as_ref().unwrap().as_str()
        ),
        ("k", "ping")
    );
}

#[tokio::test]
async fn a_failed_event_is_returned_as_published() {
    let bench = Bench::new(
        &[
            ("unruly.wasm", &core_module("unruly")),
            ("z.wasm", &core_module("address")),
        ],
        json!({}),
    );
    let published = event(json!({"type": "amend", "user": "7", "ttl": "soon"}));
    let evaluation = bench.one(published.clone()).await;
    assert!(
        matches!(evaluation.resolution, Resolution::Failed { .. }),
        "{evaluation:?}"
    );
    assert_eq!(evaluation.event, published);
}

#[tokio::test]
async fn unusual_but_valid_answers_are_normalised() {
    let bench = Bench::unruly(json!({}));
    let body = bench.of_type("body-of-two-lines").await;
    assert_eq!(
        plan(&body).routes[0].body.as_ref().unwrap().get(),
        r#"{"a":"b c"}"#
    );
    let for_ever = bench.of_type("ttl-for-ever").await;
    assert_eq!(
        plan(&for_ever).routes[0].expires_ms,
        Some(253_402_300_799_999)
    );
    assert!(
        plan(&bench.of_type("test-of-a-plan").await).routes[0]
            .when
            .is_some()
    );
    assert!(matches!(
        bench.of_type("nobody").await.resolution,
        Resolution::Unrouted
    ));
    let dropped = bench.of_type("drop").await;
    assert!(
        matches!(&dropped.resolution, Resolution::Discarded { reason, .. } if reason == "two\\nlines\\u{1b}[2J"),
        "{dropped:?}"
    );
    assert_eq!(targets(&bench.of_type("chatty").await), ["u:42"]);
}

#[tokio::test]
async fn the_failure_policy_applies_to_failures_and_not_to_verdicts() {
    let files: [(&str, &[u8]); 2] = [
        ("unruly.wasm", &core_module("unruly")),
        ("z.wasm", &core_module("address")),
    ];
    let skip = Bench::new(&files, json!({"unruly": {"on_failure": "skip"}}));
    let evaluation = skip.one(event(json!({"type": "panic", "user": "7"}))).await;
    assert_eq!(targets(&evaluation), ["u:7"]);
    assert_eq!(
        words(&evaluation.verdicts),
        [("unruly", "keep"), ("unruly", "failed"), ("z", "routes")]
    );
    failure(&skip.of_type("reject").await);

    let drop = Bench::new(&files, json!({"unruly": {"on_failure": "drop"}}));
    let evaluation = drop.one(event(json!({"type": "panic", "user": "7"}))).await;
    assert!(
        matches!(&evaluation.resolution, Resolution::Discarded { plugin, reason } if plugin == "unruly" && reason.contains("requested by the event type")),
        "{evaluation:?}"
    );
    assert!(failure(&drop.of_type("retry").await).2);
}

#[tokio::test]
async fn plugins_are_called_in_the_configured_order_then_by_file_name() {
    let files: [(&str, &[u8]); 2] = [
        ("20-unruly.wasm", &core_module("unruly")),
        ("10-address.wasm", &core_module("address")),
    ];
    let shipped = || event(json!({"type": "t", "user": "7"}));
    let by_file = Bench::new(&files, json!({}));
    assert_eq!(
        words(&by_file.one(shipped()).await.verdicts),
        [
            ("unruly", "keep"),
            ("address", "routes"),
            ("unruly", "routes")
        ]
    );
    let configured = Bench::new(&files, json!({"order": ["unruly"]}));
    assert_eq!(
        words(&configured.one(shipped()).await.verdicts),
        [
            ("unruly", "keep"),
            ("unruly", "routes"),
            ("address", "routes")
        ]
    );
    let without = Bench::new(&files, json!({"unruly": {"enabled": false}}));
    assert_eq!(
        words(&without.one(shipped()).await.verdicts),
        [("address", "routes")]
    );
}

/// WASI is available for guests whose standard library requires it, but gives access to nothing: no
/// environment, no waiting, no clock except the call's.
#[tokio::test]
async fn a_wasi_component_decides_as_the_core_module_does() {
    // One instance per call, because `unruly` reports the number of its calls.
    let section = || json!({"unruly": {"calls_per_instance": 1}});
    let wasi = Bench::new(
        &[
            ("address.wasm", &wasi_component("address")),
            ("unruly.wasm", &wasi_component("unruly")),
        ],
        section(),
    );
    let core = Bench::new(
        &[
            ("address.wasm", &core_module("address")),
            ("unruly.wasm", &core_module("unruly")),
        ],
        section(),
    );
    for document in [
        json!({"type": "loud", "users": "a,b", "ttl": 5}),
        json!({"type": "t", "group": "ops", "priority": "high"}),
        json!({"type": "amend", "everyone": "true"}),
        json!({"type": "drop", "user": "42"}),
        json!({"type": "reserved-name", "user": "42"}),
    ] {
        let (a, b) = (
            wasi.one(event(document.clone())).await,
            core.one(event(document)).await,
        );
        let said = |verdicts: Vec<Verdict>| {
            verdicts
                .into_iter()
                .map(|by| Verdict {
                    hash: String::new(),
                    ..by
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(said(a.verdicts), said(b.verdicts));
        assert_eq!(format!("{:?}", a.resolution), format!("{:?}", b.resolution));
    }
    // Time stands still during a call, so a sleep of an hour ends at once.
    assert_eq!(targets(&wasi.of_type("sleep").await), ["u:42"]);
    assert_eq!(targets(&wasi.of_type("chatty").await), ["u:42"]);
}

#[test]
fn an_invalid_file_is_refused_with_the_reason_and_does_not_block_other_plugins() {
    let address = core_module("address");
    let wat = |text: &str| wat::parse_str(text).unwrap();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", Vec::new(), "is empty"),
        ("text", b"hello".to_vec(), "is not WebAssembly"),
        (
            "cut",
            address[..address.len() / 2].to_vec(),
            "is truncated or damaged",
        ),
        (
            "cut-short",
            address[..6].to_vec(),
            "is truncated or damaged",
        ),
        (
            "damaged",
            {
                let mut bytes = address.clone();
                bytes[40..200].fill(0xff);
                bytes
            },
            "is truncated or damaged",
        ),
        (
            "no-plugin",
            wat("(module)"),
            "exports neither pointsman:plugin/filter nor pointsman:plugin/router",
        ),
        (
            "no-component",
            wat("(component)"),
            "exports neither pointsman:plugin/filter nor",
        ),
        (
            "core-import",
            wat(r#"(module (import "env" "system" (func)))"#),
            "is a core module that cannot be converted to a component",
        ),
        (
            "import",
            wat(r#"(component (import "wasi:http/outgoing-handler@0.2.0" (instance)))"#),
            "imports wasi:http/outgoing-handler@0.2.0, which plugins are not granted",
        ),
        (
            "own-import",
            wat(r#"(component (import "pointsman:plugin/keys@0.1.0" (instance)))"#),
            "imports pointsman:plugin/keys@0.1.0, which plugins are not granted",
        ),
        (
            "next",
            wat(r#"(component (import "pointsman:plugin/log@0.2.0" (instance)))"#),
            "was built for pointsman:plugin 0.2; this host supports 0.1",
        ),
        (
            "wide",
            wat(
                r#"(component (instance $i) (export "pointsman:plugin/router@0.1.0" (instance $i)) (export "pointsman:plugin/lifecycle@0.1.0" (instance $i)))"#,
            ),
            "violates the plugin contract",
        ),
        (
            "memory64",
            wat("(module (memory i64 1))"),
            "memory64 must be enabled",
        ),
    ];
    let mut files: Vec<(String, &[u8])> = cases
        .iter()
        .map(|(name, bytes, _)| (format!("{name}.wasm"), bytes.as_slice()))
        .collect();
    files.push(("zz-address.wasm".into(), &address));
    files.push((".half-written.wasm".into(), b""));
    files.push(("README.md".into(), b""));
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), *bytes))
        .collect();
    let registry = registry(&files, json!({}));
    let states = registry.states();
    for (name, _, expect) in &cases {
        let state = states.iter().find(|state| state.name == *name).unwrap();
        let reason = state
            .failure
            .as_deref()
            .unwrap_or_else(|| panic!("{name} was loaded"));
        assert!(
            reason.starts_with(&format!("{name}.wasm ")) && reason.contains(expect),
            "{name} gave: {reason}"
        );
    }
    let at_work: Vec<_> = states
        .iter()
        .filter(|state| state.failure.is_none())
        .collect();
    assert_eq!(at_work.len(), 1);
    assert_eq!(
        (
            at_work[0].name.as_str(),
            at_work[0].kind.as_str(),
            at_work[0].generation,
            at_work[0].hash.len()
        ),
        ("zz-address", "router", 1, 64)
    );
    assert_eq!(states.len(), cases.len() + 1);
}

#[test]
fn a_rejected_configuration_is_reported_with_its_location() {
    let discard = core_module("discard");
    let unruly = core_module("unruly");
    for (file, bytes, settings, expect) in [
        (
            "discard",
            &discard,
            json!({"config": {"rules": [{"match": {"typ": "x"}}]}}),
            "discard.wasm rejects its configuration: rules[0].match.typ: unknown field `typ`",
        ),
        (
            "discard",
            &discard,
            json!({"config": {"rules": [{}]}}),
            "rules[0]: would drop every event",
        ),
        (
            "unruly",
            &unruly,
            json!({"config": {"hang": true}}),
            "fails in configure: it ran longer than 1000 ms",
        ),
        (
            "unruly",
            &unruly,
            json!({"config": {"fields": ["order"]}}),
            "'order', which is not a JSON pointer",
        ),
        (
            "unruly",
            &unruly,
            json!({"memory_mib": 1}),
            "the limit is 1 (memory_mib)",
        ),
        (
            "unruly",
            &unruly,
            json!({"sha256": "0".repeat(64)}),
            "which is not the configured one",
        ),
    ] {
        let registry = registry(
            &[(&format!("{file}.wasm"), bytes)],
            json!({ file: settings }),
        );
        let reason = registry.states()[0]
            .failure
            .clone()
            .unwrap_or_else(|| panic!("{file} was loaded"));
        assert!(reason.contains(expect), "{reason}");
        assert!(registry.chain().is_empty());
    }
}

#[test]
fn duplicate_and_missing_plugin_files_are_reported() {
    let address = core_module("address");
    let registry = registry(
        &[("1-address.wasm", &address), ("2-address.wasm", &address)],
        json!({"order": ["gone"], "adress": {}}),
    );
    let failures: Vec<_> = registry
        .states()
        .into_iter()
        .filter_map(|state| state.failure)
        .collect();
    assert_eq!(failures.len(), 3);
    assert!(
        failures[0].contains("2-address.wasm is a second file for the plugin 'address'"),
        "{failures:?}"
    );
    assert!(
        failures[1].contains("'adress' is configured, but no file"),
        "{failures:?}"
    );
    assert!(
        failures[2].contains("'gone' is configured, but no file"),
        "{failures:?}"
    );
    let no_folder = Config {
        dir: Some("/nowhere/plugins".into()),
        ..Config::default()
    };
    assert!(
        Registry::load(engine(), no_folder, Metrics::default())
            .unwrap_err()
            .to_string()
            .contains("/nowhere/plugins cannot be read")
    );
}

#[tokio::test]
async fn without_plugins_nothing_is_evaluated_unless_allowed() {
    let pipeline = |allow_none| {
        let registry = Registry::load(engine(), Config::default(), Metrics::default()).unwrap();
        Pipeline::start(Arc::new(registry), allow_none, Metrics::default()).unwrap()
    };
    let batch = || vec![event(json!({"type": "t", "user": "7"}))];
    assert_eq!(
        pipeline(false).evaluate(batch(), NOW_MS).await.unwrap_err(),
        Unevaluated::Missing(MissingPlugins::All)
    );
    let evaluations = pipeline(true).evaluate(batch(), NOW_MS).await.unwrap();
    assert!(matches!(evaluations[0].resolution, Resolution::Unrouted));
}
