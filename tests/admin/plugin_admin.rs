//! Operators replace plugins while events flow. A faulty version is rolled back or its breaker
//! opens automatically, an admin command is in effect when its response arrives, and a
//! configuration change takes effect without a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::command::{self, output_of, said};
use crate::harness::eventually;
use crate::harness::guests::{FAULTY, core_module, versioned};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::plugins::{Plugins, Site, by, hash};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;

/// The plugin `versioned` as the admin API reports it.
fn shown(node: &Node) -> Value {
    let answer = node.admin("/v1/plugins/versioned");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn dead_letters(node: &Node) -> Vec<Value> {
    node.request("GET", "/v1/dead-letters?limit=1000").json()["dead_letters"]
        .as_array()
        .unwrap()
        .clone()
}

#[test]
fn a_failing_version_is_rolled_back_automatically_and_its_dead_letters_can_be_redriven() {
    const EVENTS: usize = 200;
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let site = Site::new(&plugins);
    let node = &site.node;
    let follower = node.follower("7");
    let faulty = versioned(FAULTY);
    plugins.replace("versioned.wasm", &faulty);
    site.await_loads("versioned", "loaded", 2);
    assert_eq!(
        (&shown(node)["state"], &shown(node)["previous"]),
        (&json!("on-probation"), &json!(1))
    );

    let publisher = node.publisher();
    let ids: Vec<String> = (0..EVENTS).map(|n| format!("e{n}")).collect();
    for batch in ids.chunks(10) {
        publisher.publish(
            &batch
                .iter()
                .map(|id| event(id, "t", json!({"user": "7"})))
                .collect::<Vec<_>>(),
        );
    }
    eventually(SOON, "the version is rolled back", || {
        (node.metric("pointsman_plugin_rollbacks_total{plugin=\"versioned\"}") == 1.0).then_some(())
    });
    node.await_outcomes(EVENTS, SOON);

    let plugin = shown(node);
    assert_eq!(
        (&plugin["state"], &plugin["generation"], &plugin["hash"]),
        (&json!("active"), &json!(1), &json!(hash(&versioned(1))))
    );
    assert_eq!(
        (&plugin["failed_hash"], &plugin["refusal"]["hash"]),
        (&json!(hash(&faulty)), &json!(hash(&faulty)))
    );
    let reason = plugin["refusal"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("events during its probation; the limit is 10 %"),
        "{reason}"
    );
    assert_eq!(
        (
            &plugin["ended"][0]["generation"],
            &plugin["ended"][0]["state"]
        ),
        (&json!(2), &json!("rolled-back"))
    );
    let page = site.await_ready(200, |page| page.contains("was rolled back"));
    assert!(
        page.contains(
            "warning: plugins.versioned: versioned.wasm was rolled back: it failed on 5 of"
        ),
        "{page}"
    );

    // Every event is either delivered or a dead letter, never both. Redriven, the dead letters are
    // delivered by the good version.
    let dead = dead_letters(node);
    assert!((5..EVENTS / 3).contains(&dead.len()), "{}", dead.len());
    for letter in &dead {
        assert!(
            letter["reason"]
                .as_str()
                .unwrap()
                .contains("this version is faulty"),
            "{letter}"
        );
    }
    let told = follower.wait(SOON, "all other events", |record| {
        record.notifications.len() >= EVENTS - dead.len()
    });
    let told: BTreeSet<String> = told.notifications.into_iter().map(|told| told.id).collect();
    assert_eq!(told.len(), EVENTS - dead.len());
    for letter in &dead {
        let path = format!(
            "/v1/dead-letters/{}/redrive",
            letter["id"].as_str().unwrap()
        );
        assert_eq!(node.request("POST", &path).status, 204);
    }
    let all = follower.wait(SOON, "all events", |record| {
        record.notifications.len() >= EVENTS
    });
    let failed: Vec<_> = all
        .notifications
        .iter()
        .filter(|notification| !told.contains(&notification.id))
        .collect();
    assert!(
        failed.len() == dead.len()
            && failed
                .iter()
                .all(|notification| notification.data["version"] == 1),
        "{failed:?}"
    );
    let all: BTreeSet<String> = all
        .notifications
        .iter()
        .map(|notification| notification.id.clone())
        .collect();
    assert_eq!(all, ids.into_iter().collect());

    // The same file is not loaded again when it is touched or copied; a different file is.
    plugins.replace("versioned.wasm", &faulty);
    site.await_loads("versioned", "failed", 1);
    site.await_ready(200, |page| {
        page.contains("was rolled back before and is not loaded again")
    });
    plugins.replace("versioned.wasm", &versioned(3));
    site.await_loads("versioned", "loaded", 3);
    site.await_ready(200, |page| !page.contains("plugins"));
}

#[test]
fn an_open_breaker_limits_calls_to_a_failing_plugin_and_closes_after_a_success() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    let node = Node::builder().plugins(plugins.dir()).start();
    let publish = |kind: &str, n: usize| {
        node.publisher().publish(
            &(0..n)
                .map(|n| event(&format!("{kind}-{n}"), kind, json!({"user": "42"})))
                .collect::<Vec<_>>(),
        );
    };
    let mut stream = node.stream("42");
    publish("loop", 100);
    eventually(SOON, "the breaker opens", || {
        (node.metric("pointsman_plugin_breaker_open{plugin=\"unruly\"}") == 1.0).then_some(())
    });
    eventually(SOON, "all events are decided", || {
        (node.metric("pointsman_events_total{outcome=\"dead-lettered\"}") == 100.0).then_some(())
    });
    let page = eventually(SOON, "readiness reports the open breaker", || {
        Some(node.admin("/readyz").body).filter(|page| page.contains("plugins.unruly"))
    });
    assert!(
        page.starts_with("ready\nwarning: plugins.unruly: generation 1 failed on "),
        "{page}"
    );
    // Two workers may be in a call when the breaker opens, each event is attempted twice, and one
    // or two events probe the plugin while the breaker is open.
    let calls = node.metric("pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"deadline\"}");
    assert!((20.0..=30.0).contains(&calls), "{calls}");
    let dead = dead_letters(&node);
    let reasons: Vec<&str> = dead
        .iter()
        .map(|letter| letter["reason"].as_str().unwrap())
        .collect();
    let n_spared = reasons
        .iter()
        .filter(|reason| reason.contains("it was not called: it failed on "))
        .count();
    assert!(
        reasons.len() == 100 && n_spared >= 85,
        "{n_spared} of {}: {reasons:?}",
        reasons.len()
    );

    // A successful event closes the breaker.
    let mut n = 0;
    eventually(SOON, "the breaker closes", || {
        n += 1;
        node.publisher()
            .publish(&[event(&format!("good-{n}"), "good", json!({"user": "42"}))]);
        (node.metric("pointsman_plugin_breaker_open{plugin=\"unruly\"}") == 0.0).then_some(())
    });
    stream.next_notification(SOON);
    eventually(SOON, "readiness is clear", || {
        (node.admin("/readyz").body == "ready\n").then_some(())
    });
}

/// The decisions about an event, oldest first.
fn decisions_of(node: &Node, event_id: &str) -> Vec<Value> {
    let all = node.admin(&format!("/v1/decisions?event_id={event_id}"));
    let mut all = all.json().as_array().expect("a list").clone();
    all.reverse();
    all
}

/// A `retry` verdict is not a failure. The event waits by itself: the source goes on, each attempt
/// sees a new clock, and the event is delivered by the first attempt that succeeds.
#[test]
fn an_event_is_retried_with_a_new_clock_while_later_events_are_delivered() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    let redis = RedisServer::start();
    for node in [Node::builder(), Node::builder().redis(redis.url())] {
        let node = node.plugins(plugins.dir()).start();
        let mut stream = node.stream("42");
        let until_ms = pointsman::clock::now_ms() + 3_000;
        let waits = json!({ "until": until_ms.to_string() });
        let mut events: Vec<Value> = (0..5)
            .map(|n| event(&format!("waits-{n}"), "retry-until", waits.clone()))
            .collect();
        events.push(event("next", "good", json!({})));
        node.publisher().publish(&events);
        assert_eq!(stream.next_notification(SOON).id, "next");
        let mut delivered = BTreeSet::new();
        for _ in 0..5 {
            let notification = stream.next_notification(SOON);
            let clock = notification.data["clock"].as_u64().expect("a clock");
            assert!(clock >= until_ms, "{clock} is before {until_ms}");
            delivered.insert(notification.id);
            let readiness = node.admin("/readyz");
            assert_eq!(readiness.status, 200, "{readiness:?}");
        }
        assert_eq!(delivered.len(), 5, "{delivered:?}");
        for id in delivered {
            let attempts = decisions_of(&node, &id);
            let (last, before) = attempts.split_last().expect("a decision");
            assert!(!before.is_empty(), "{id}: {attempts:?}");
            let mut due_ms = 0;
            for (n, attempt) in before.iter().enumerate() {
                assert_eq!(attempt["outcome"], "retrying", "{attempt}");
                assert_eq!(attempt["retry"]["attempts"], json!(n + 1), "{attempt}");
                assert!(attempt["clock_ms"].as_u64().unwrap() >= due_ms, "{attempt}");
                due_ms = attempt["retry"]["due_ms"].as_u64().expect("a due time");
            }
            assert_eq!(last["outcome"], "committed", "{last}");
            assert_eq!(last["retry"], json!({ "attempts": attempts.len() }));
        }
        assert!(dead_letters(&node).is_empty());
    }
}

#[test]
fn events_that_wait_for_a_retry_are_listed_with_their_due_time() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    let node = Node::builder().plugins(plugins.dir()).start();
    node.publisher()
        .publish(&[event("later", "retry", json!({}))]);
    let list = |options: &[&str]| {
        let url = node.url("");
        let arguments = [&["dead-letters", "list", "--url", url.as_str()], options].concat();
        let listed = command::pointsman(&arguments).output().expect("run it");
        assert!(listed.status.success(), "{listed:?}");
        String::from_utf8(listed.stdout).expect("UTF-8")
    };
    // It is an entry between two waits, each twice as long as the one before.
    let table = eventually(SOON, "the event waits", || {
        Some(list(&["--retrying"])).filter(|table| !table.is_empty())
    });
    assert!(
        table.starts_with("ID  ") && table.contains("DUE") && table.contains("not now"),
        "{table}"
    );
    assert_eq!(list(&[]), "");
    let gauge = "pointsman_retrying_events{source=\"pointsman:events\"}";
    eventually(SOON, "the gauge counts it", || {
        (node.metric(gauge) == 1.0).then_some(())
    });
    assert_eq!(node.metric("pointsman_dead_letters"), 0.0);
}

#[test]
fn an_event_stays_a_dead_letter_with_its_attempts_once_its_retries_are_used_up() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    for (config, n_tries) in [("retries = 1", 2), ("retry_timeout = '999ms'", 1)] {
        let node = Node::builder()
            .config(&format!("[ingest]\n{config}\n"))
            .plugins(plugins.dir())
            .start();
        node.publisher()
            .publish(&[event("later", "retry", json!({}))]);
        if n_tries > 1 {
            let waiting = eventually(SOON, "the event waits", || {
                let list = node.request("GET", "/v1/dead-letters?retrying=true").json();
                list["dead_letters"].as_array().unwrap().first().cloned()
            });
            assert!(waiting["due_ms"].as_u64().is_some(), "{waiting}");
            let id = waiting["id"].as_str().unwrap();
            let explained = node.admin("/v1/explain?event_id=later").json();
            let conclusion = explained["conclusion"].as_str().unwrap();
            assert!(
                conclusion
                    .starts_with("Not delivered yet: at attempt 1, `unruly` requested a retry: ")
                    && conclusion.contains(id),
                "{explained}"
            );
        }
        let letter = eventually(SOON, "the event stays", || {
            dead_letters(&node).first().cloned()
        });
        assert_eq!(
            (&letter["plugin"], &letter["attempts"], &letter["due_ms"]),
            (&json!("unruly"), &json!(n_tries), &Value::Null),
            "{config}: {letter}"
        );
        assert!(
            letter["reason"].as_str().unwrap().contains("not now"),
            "{letter}"
        );
        assert_eq!(
            node.metric("pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"retry\"}"),
            f64::from(n_tries),
            "{config}"
        );
        assert_eq!(
            node.metric("pointsman_events_total{outcome=\"dead-lettered\"}"),
            1.0
        );
        assert_eq!(node.admin("/readyz").body, "ready\n");
    }
}

#[test]
fn an_upload_is_active_when_its_response_arrives_and_after_a_restart() {
    let plugins = Plugins::new(&[("20-versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    let answer = site.order("PUT", "", &versioned(2));
    assert_eq!(answer.status, 200, "{answer:?}");
    let told = answer.json();
    assert_eq!(
        (&told["generation"], &told["hash"], &told["file"]),
        (
            &json!(2),
            &json!(hash(&versioned(2))),
            &json!("20-versioned.wasm")
        )
    );
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    // The upload replaces the previous file, and the folder watcher does not load it a second time.
    assert_eq!(
        fs::read(plugins.path("20-versioned.wasm")).unwrap(),
        versioned(2)
    );
    plugins.replace("30-other.wasm", &versioned(3));
    site.await_loads("other", "loaded", 1);
    assert_eq!(
        site.next_decision(),
        (2, vec![by("versioned", 2), by("other", 1)])
    );

    let answer = site
        .node
        .order("PUT", "/v1/plugins/third?create=true", &[], &versioned(4));
    assert_eq!(
        (answer.status, &answer.json()["generation"]),
        (200, &json!(1))
    );
    assert_eq!(
        site.node
            .order("DELETE", "/v1/plugins/other", &[], b"")
            .status,
        204
    );
    assert!(!plugins.path("30-other.wasm").exists());
    assert_eq!(
        site.node
            .order("DELETE", "/v1/plugins/other", &[], b"")
            .status,
        404
    );
    site.restart();
    assert_eq!(
        site.next_decision(),
        (2, vec![by("versioned", 1), by("third", 1)])
    );
}

#[test]
fn an_invalid_upload_is_rejected_with_the_reason_and_changes_nothing() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let good = versioned(2);
    for (bytes, expect) in [
        (&good[..good.len() / 2], "is truncated or damaged"),
        (b"", "is empty"),
        (b"<html>404</html>", "is not WebAssembly"),
    ] {
        let answer = site.order("PUT", "", bytes);
        assert!(
            answer.status == 422 && answer.json()["error"].as_str().unwrap().contains(expect),
            "{answer:?}"
        );
        assert!(
            shown(&site.node)["refusal"]["reason"]
                .as_str()
                .unwrap()
                .contains(expect)
        );
        assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    }
    for name in [
        "..%2Fversioned",
        ".hidden",
        "a%2Fb",
        "my_router",
        "1-a",
        "%00",
        "a%0Ab",
    ] {
        let answer = site
            .node
            .order("PUT", &format!("/v1/plugins/{name}"), &[], &good);
        assert!([404, 409].contains(&answer.status), "{name}: {answer:?}");
    }
    // A page in a browser on this machine must not be able to send admin commands.
    let answer = site.node.order(
        "PUT",
        "/v1/plugins/versioned",
        &[("Origin", "http://127.0.0.1:8080")],
        &good,
    );
    assert_eq!(answer.status, 403, "{answer:?}");
    assert_eq!(
        site.node
            .order(
                "POST",
                "/v1/plugins/versioned/disable",
                &[("Origin", "null")],
                b""
            )
            .status,
        403
    );
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    let files: Vec<_> = fs::read_dir(plugins.dir())
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    assert_eq!(files, ["versioned.wasm"]);
    assert_eq!(
        fs::read(plugins.path("versioned.wasm")).unwrap(),
        versioned(1)
    );
}

#[test]
fn admin_commands_require_the_api_key() {
    const KEY: &str = "a key of at least thirty-two bytes";
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let config = format!("[auth]\njwt_secret = '{KEY}'\napi_key = '{KEY}'\n");
    let node = Node::builder()
        .production()
        .config(&config)
        .plugins(plugins.dir())
        .start();
    let own = [
        ("PUT", ""),
        ("DELETE", ""),
        ("POST", "/disable"),
        ("POST", "/enable"),
        ("POST", "/rollback"),
    ];
    let candidates = [
        ("PUT", "/shadow"),
        ("GET", "/shadow"),
        ("DELETE", "/shadow"),
        ("POST", "/promote"),
        ("POST", "/backtest"),
    ];
    for (method, path) in own.into_iter().chain(candidates) {
        let order = |headers: &[(&str, &str)]| {
            node.order(
                method,
                &format!("/v1/plugins/versioned{path}"),
                headers,
                b"",
            )
            .status
        };
        assert_eq!(order(&[]), 401, "{method} {path}");
        assert_eq!(
            order(&[("Authorization", "Bearer wrong")]),
            401,
            "{method} {path}"
        );
    }
    assert_eq!(shown(&node)["generation"], 1);
    // The same over the command line, even if the rejected file is large.
    let large = plugins.dir().join(".large");
    fs::write(&large, vec![0; 20_000_000]).unwrap();
    let refused = refusal(
        &node,
        &["upload", large.to_str().unwrap(), "--name", "versioned"],
    );
    assert!(
        refused.contains("the API key is required")
            && refused.contains("pass --api-key or set POINTSMAN_API_KEY"),
        "{refused}"
    );
    let bearer = format!("Bearer {KEY}");
    assert_eq!(
        node.order(
            "PUT",
            "/v1/plugins/versioned",
            &[("Authorization", &bearer)],
            &versioned(2)
        )
        .json()["generation"],
        2
    );
}

#[test]
fn a_plugin_can_be_disabled_enabled_and_rolled_back_by_admin_command() {
    let plugins = Plugins::new(&[
        ("other.wasm", versioned(9)),
        ("versioned.wasm", versioned(1)),
    ]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision().1, [by("other", 1), by("versioned", 1)]);
    let answer = site.order("POST", "/disable", b"");
    assert_eq!(
        (answer.status, &answer.json()["state"]),
        (200, &json!("disabled"))
    );
    assert_eq!(site.next_decision().1, [by("other", 1)]);
    site.await_ready(200, |page| {
        page.contains("warning: plugins.versioned: disabled by an admin command")
    });
    // Files that arrive meanwhile are not loaded either.
    plugins.replace("versioned.wasm", &versioned(2));
    assert_eq!(
        site.order("PUT", "", &versioned(3)).json()["state"],
        "disabled"
    );
    assert_eq!(site.next_decision().1, [by("other", 1)]);
    let answer = site.order("POST", "/enable", b"");
    assert_eq!(
        (answer.status, &answer.json()["generation"]),
        (200, &json!(2))
    );
    assert_eq!(shown(&site.node)["hash"], json!(hash(&versioned(3))));
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision().1, [by("other", 1), by("versioned", 2)]);

    let answer = site.order("POST", "/rollback", b"");
    assert!(
        answer.status == 409 && answer.body.contains("no earlier generation"),
        "{answer:?}"
    );
    assert_eq!(site.order("PUT", "", &versioned(4)).json()["generation"], 3);
    assert_eq!(site.order("POST", "/rollback", b"").json()["generation"], 2);
    assert_eq!(site.next_decision().1, [by("other", 1), by("versioned", 2)]);
    site.await_ready(200, |page| {
        page.contains(
            "was rolled back: it was withdrawn by an operator; the folder still contains it",
        )
    });
    // An explicit upload loads the rolled-back version again.
    assert_eq!(site.order("PUT", "", &versioned(4)).json()["generation"], 4);
    assert_eq!(
        site.node
            .order("POST", "/v1/plugins/nobody/disable", &[], b"")
            .status,
        404
    );
    let states: Vec<_> = shown(&site.node)["ended"]
        .as_array()
        .unwrap()
        .iter()
        .map(|ended| ended["state"].clone())
        .collect();
    assert_eq!(states, ["replaced", "rolled-back", "replaced", "disabled"]);
}

#[test]
fn enabling_a_plugin_that_was_rolled_back_and_disabled_loads_its_file_again() {
    let plugins = Plugins::new(&[
        ("other.wasm", versioned(9)),
        ("versioned.wasm", versioned(1)),
    ]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.order("PUT", "", &versioned(2)).json()["generation"], 2);
    assert_eq!(site.order("POST", "/rollback", b"").json()["generation"], 1);
    assert_eq!(site.order("POST", "/disable", b"").json()["generation"], 0);
    let answer = site.order("POST", "/enable", b"");
    assert_eq!(
        (answer.status, &answer.json()["generation"]),
        (200, &json!(3)),
        "the rolled-back file is better than no plugin"
    );
    assert_eq!(site.next_decision().1, [by("other", 1), by("versioned", 3)]);
    site.await_ready(200, |page| !page.contains("plugins"));
}

/// `pointsman plugin ...` against this node.
fn plugin(node: &Node, arguments: &[&str]) -> Command {
    let mut command = command::pointsman(&["plugin"]);
    command.args(arguments).args(["--url", &node.admin_url("")]);
    command
}

/// The output of an admin command, which must be one line.
fn line(node: &Node, arguments: &[&str]) -> String {
    let said = output_of(&mut plugin(node, arguments));
    assert_eq!(said.lines().count(), 1, "{said}");
    said.trim_end().to_owned()
}

/// The error of a rejected admin command, which must be one line without HTTP details.
fn refusal(node: &Node, arguments: &[&str]) -> String {
    let (is_well, said) = said(&mut plugin(node, arguments));
    assert!(!is_well && said.lines().count() == 1, "{said}");
    assert!(
        !["/v1/", "HTTP", "http:", "404", "409", "422"]
            .iter()
            .any(|word| said.contains(word)),
        "{said}"
    );
    said
}

#[test]
fn plugin_commands_print_one_line_and_list_prints_a_table() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let uploads = Folder::new();
    let file = |name: &str, bytes: &[u8]| {
        let file = uploads.path().join(name);
        fs::write(&file, bytes).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let second = file("versioned.wasm", &versioned(2));

    assert_eq!(
        line(&site.node, &["upload", &second]),
        "uploaded versioned 0.1.0 (router): generation 2, on probation for 1m, replacing generation 1"
    );
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    assert_eq!(
        line(&site.node, &["upload", &second]),
        "versioned 0.1.0 (router) is already active: generation 2, on probation for 1m"
    );
    let rolled_back = line(&site.node, &["rollback", "versioned"]);
    assert!(
        rolled_back.starts_with(
            "rolled back versioned 0.1.0 (router): generation 1, active, replacing generation 2; "
        ),
        "{rolled_back}"
    );
    assert!(
        rolled_back.contains("; on this node only: the plugin file is unchanged"),
        "{rolled_back}"
    );
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    assert_eq!(
        line(&site.node, &["disable", "versioned"]),
        "disabled versioned 0.1.0 (router): generation 1 is no longer active; no plugin is active; events wait unless the node runs with --allow-no-plugins"
    );
    let row = |table: &str| {
        table
            .lines()
            .nth(1)
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        row(&output_of(&mut plugin(&site.node, &["list"])))[..4],
        ["versioned", "-", "disabled", "-"]
    );
    assert_eq!(
        line(&site.node, &["disable", "versioned"]),
        "disabled versioned; it was not active"
    );
    let enabled = line(&site.node, &["enable", "versioned"]);
    assert!(enabled.starts_with("enabled versioned 0.1.0 (router): generation 3, active, from the file that was rolled back as generation 2; 1 active plugin: versioned"), "{enabled}");
    assert!(
        line(&site.node, &["enable", "versioned"])
            .starts_with("versioned 0.1.0 (router) is already enabled: generation 3")
    );

    assert!(line(&site.node, &["shadow", "versioned", &second]).starts_with("candidate 0.1.0 ("));
    let broken = refusal(
        &site.node,
        &["upload", &file("versioned.wasm", b"no plugin")],
    );
    assert!(
        broken.contains("versioned.wasm was not accepted: it is not WebAssembly")
            && broken.contains("the previous version keeps running"),
        "{broken}"
    );
    let listed = output_of(&mut plugin(&site.node, &["list"]));
    let hash = &hash(&versioned(2))[..12];
    assert!(listed.starts_with("NAME "), "{listed}");
    assert_eq!(
        row(&listed)[..6],
        ["versioned", "router", "active", "3", "0.1.0", hash]
    );
    assert!(
        listed
            .lines()
            .nth(2)
            .unwrap()
            .starts_with("versioned: rejected at ")
            && listed.contains(": the uploaded file is not WebAssembly"),
        "{listed}"
    );

    // With --json, the output is the node's response.
    let shown: Value = serde_json::from_str(&output_of(&mut plugin(
        &site.node,
        &["disable", "versioned", "--json"],
    )))
    .unwrap();
    assert_eq!(
        (
            &shown["name"],
            &shown["state"],
            &shown["settings"]["probation"]
        ),
        (&json!("versioned"), &json!("disabled"), &json!("1m"))
    );
    // The candidate replaces the file but stays inactive until the plugin is enabled.
    assert_eq!(
        line(&site.node, &["promote", "versioned"]),
        "promoted versioned: disabled"
    );
    let shown: Value =
        serde_json::from_str(&output_of(&mut plugin(&site.node, &["list", "--json"]))).unwrap();
    assert_eq!(shown["plugins"][0]["name"], "versioned");

    let nobody = refusal(&site.node, &["rollback", "nobody"]);
    assert!(
        nobody.contains("the node has no plugin 'nobody' (its plugins: versioned)"),
        "{nobody}"
    );
    assert!(refusal(&site.node, &["rollback", "no/such"]).contains("is not a valid plugin name"));
    let alone = refusal(&site.node, &["rollback", "versioned"]);
    assert!(
        alone.contains("no earlier generation to roll back to; upload the wanted version"),
        "{alone}"
    );
    assert!(
        line(&site.node, &["remove", "versioned"])
            .starts_with("removed versioned and its file; no plugin is active")
    );
    // Only the record of the removal is left, for other nodes with this folder.
    let left: Vec<_> = fs::read_dir(plugins.dir())
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    assert_eq!(left, [".versioned.removed"]);
}

#[test]
fn an_upload_under_an_unknown_name_adds_a_plugin_only_with_the_create_option() {
    let plugins = Plugins::new(&[("my_versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let uploads = Folder::new();
    let slip = uploads.path().join("my_verisoned.wasm");
    fs::write(&slip, versioned(2)).unwrap();
    let slip = slip.to_str().unwrap();
    let refused = refusal(&site.node, &["upload", slip]);
    for word in [
        "the node has no plugin 'my-verisoned'",
        "its plugins: my-versioned",
        "--name",
        "--create",
    ] {
        assert!(refused.contains(word), "{word} is not in {refused}");
    }
    assert_eq!(site.next_decision(), (1, vec![by("my-versioned", 1)]));
    assert_eq!(
        line(&site.node, &["upload", slip, "--name", "my-versioned"]),
        "uploaded my-versioned 0.1.0 (router): generation 2, on probation for 1m, replacing generation 1"
    );
    let told = line(&site.node, &["upload", slip, "--create"]);
    assert_eq!(
        told,
        "new plugin my-verisoned 0.1.0 (router): generation 1, active; 2 active plugins: my-verisoned, my-versioned"
    );
    assert_eq!(
        site.next_decision(),
        (2, vec![by("my-verisoned", 1), by("my-versioned", 2)])
    );
    // With the option, an existing plugin is not replaced.
    let refused = refusal(&site.node, &["upload", slip, "--create"]);
    assert!(
        refused.contains("plugin 'my-verisoned 0.1.0 (router)' already exists; omit --create"),
        "{refused}"
    );
    // The option is not needed on a node without plugins, and a configured plugin without a file
    // counts as new.
    let empty = Plugins::new(&[]);
    let node = Node::builder()
        .plugins(empty.dir())
        .may_be_unready()
        .config("[plugins.late]\ndeadline = '100ms'\n")
        .start();
    eventually(SOON, "the node has scanned its plugin folder", || {
        (node.admin("/v1/plugins").status == 200).then_some(())
    });
    assert!(
        line(&node, &["upload", slip, "--name", "late"])
            .contains("late 0.1.0 (router): generation 1, active")
    );
    line(&node, &["remove", "late"]);
    assert!(
        line(&node, &["upload", slip, "--name", "late", "--create"])
            .contains("late 0.1.0 (router): generation 2, active")
    );
}

#[test]
fn an_unreachable_node_is_reported_with_its_address_and_the_option_that_sets_it() {
    for (arguments, variable) in [
        (&["plugin", "list"][..], "POINTSMAN_ADMIN_URL"),
        (&["events", "export"], "POINTSMAN_ADMIN_URL"),
        (&["dead-letters", "list"], "POINTSMAN_URL"),
        (&["tail", "--user", "42"], "POINTSMAN_URL"),
    ] {
        let (is_well, said) =
            said(command::pointsman(arguments).args(["--url", "http://127.0.0.1:1"]));
        assert!(!is_well && said.lines().count() == 1, "{said}");
        for word in [
            "cannot reach a node at http://127.0.0.1:1 (",
            "--url",
            variable,
        ] {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    }
    // The same for the wrong listener of a node.
    let node = Node::builder().start();
    let (is_well, said) =
        said(command::pointsman(&["plugin", "list"]).args(["--url", &node.url("")]));
    assert!(
        !is_well
            && said
                .contains("an application listener and an admin listener: set the address of the other one with --url"),
        "{said}"
    );
}

/// For example if the disk is full or the pipe is closed.
#[test]
fn an_unwritable_log_loses_lines_but_does_not_disturb_the_node() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    let node = Node::builder()
        .plugins(plugins.dir())
        .log_to("/dev/full")
        .start();
    let mut stream = node.stream("42");
    for n in 0..3 {
        node.publisher().publish(&[
            event(&format!("bad{n}"), "panic", json!({})),
            event(&format!("good{n}"), "t", json!({"user": "42"})),
        ]);
        assert_eq!(stream.next_notification(SOON).id, format!("good{n}"));
    }
    assert_eq!(dead_letters(&node).len(), 3);
    assert_eq!(
        node.order("PUT", "/v1/plugins/versioned?create=true", &[], b"none")
            .status,
        422
    );
    assert_eq!(
        node.order(
            "PUT",
            "/v1/plugins/versioned?create=true",
            &[],
            &versioned(1)
        )
        .status,
        200
    );
    assert_eq!(node.admin("/readyz").body, "ready\n");
}

#[test]
fn plugin_configuration_changes_take_effect_while_events_flow() {
    let plugins = Plugins::new(&[
        ("rules.wasm", core_module("rules")),
        ("versioned.wasm", versioned(1)),
    ]);
    let config = |user: &str| {
        format!(
            "[[plugins.rules.config.rules]]\nmatch = {{ type = 'told' }}\nto.users = ['{user}']\n"
        )
    };
    let node = Node::builder()
        .config(&config("ann"))
        .plugins(plugins.dir())
        .start();
    let (mut ann, mut bob) = (node.stream("ann"), node.stream("bob"));
    let mut n = 0;
    let mut tell = || {
        n += 1;
        node.publisher()
            .publish(&[event(&format!("e{n}"), "told", json!({}))]);
        format!("e{n}")
    };
    let id = tell();
    assert_eq!(ann.next_notification(SOON).id, id);
    let generation = |n: u64| {
        eventually(SOON, "the generation changes", || {
            (node.admin("/v1/plugins/rules").json()["generation"] == n).then_some(())
        })
    };

    node.reconfigure(&config("bob"));
    generation(2);
    let id = tell();
    assert_eq!(bob.next_notification(SOON).id, id);
    assert_eq!(
        shown(&node)["generation"],
        1,
        "its configuration has not changed"
    );

    let ready = |wish: &str| {
        eventually(SOON, wish, || {
            Some(node.admin("/readyz"))
                .filter(|answer| answer.status == 200 && answer.body.contains(wish))
        })
        .body
    };
    // Neither an invalid file nor settings that a plugin rejects change anything.
    node.reconfigure("[plugins.rules\n");
    ready("the previous configuration stays active");
    node.reconfigure(&config("ann").replace("told", "told', nonsense = '"));
    ready("rules.wasm rejects its configuration: ");
    let id = tell();
    assert_eq!(bob.next_notification(SOON).id, id);

    node.reconfigure(&format!(
        "[stream]\nheartbeat_interval = '5s'\n[plugins]\norder = ['versioned']\n{}",
        config("ann")
    ));
    generation(3);
    let page = ready(
        "warning: configuration: stream.heartbeat_interval changed; restart the node to apply",
    );
    assert!(!page.contains("plugins"), "{page}");
    let names: Vec<_> = node.admin("/v1/plugins").json()["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].clone())
        .collect();
    assert_eq!(names, ["versioned", "rules"]);
    // Deleting the file does not reset the configuration to the defaults.
    node.unconfigure();
    ready("was removed; its last content stays active");
    let id = tell();
    assert_eq!(ann.next_notification(SOON).id, id);
    node.reconfigure(&format!(
        "[plugins.versioned]\nenabled = false\n{}",
        config("ann")
    ));
    eventually(SOON, "the plugin is disabled", || {
        (shown(&node)["state"] == "disabled").then_some(())
    });
    let id = tell();
    assert_eq!(ann.next_notification(SOON).id, id);
    eventually(Duration::from_secs(20), "readiness is clear", || {
        (node.admin("/readyz").body == "ready\n").then_some(())
    });
}

#[test]
fn a_verdict_names_the_configuration_and_a_rolled_back_one_is_named_as_what_to_change() {
    let plugins = Plugins::new(&[("rules.wasm", core_module("rules"))]);
    let config = |user: &str| {
        format!("[[plugins.rules.config.rules]]\nmatch.type = 't'\nto.user = '{user}'\n")
    };
    let node = Node::builder()
        .config(&config("ann"))
        .plugins(plugins.dir())
        .start();
    let decided = |id: &str| {
        node.publisher().publish(&[event(id, "t", json!({}))]);
        let decisions = eventually(SOON, "the event is decided", || {
            let found = node.admin(&format!("/v1/decisions?event_id={id}")).json();
            found.get(0).is_some().then_some(found)
        });
        let verdict = &decisions[0]["verdicts"][0];
        let hash = |key: &str| verdict[key].as_str().expect("a hash").to_owned();
        (hash("hash"), hash("config_hash"))
    };
    let state = || node.admin("/v1/plugins/rules").json();
    let before = decided("before");
    assert_eq!(before.1.len(), 12);
    assert_eq!(state()["config_hash"], json!(before.1));
    node.reconfigure(&config("bob"));
    eventually(SOON, "the configuration is active", || {
        (state()["generation"] == 2).then_some(())
    });
    let after = decided("after");
    assert_eq!(after.0, before.0, "the file is the same");
    assert_ne!(after.1, before.1, "the configuration is another");

    let answer = node.order("POST", "/v1/plugins/rules/rollback", &[], b"");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(decided("rolled-back"), before);
    assert_eq!(state()["ended"][0]["config_hash"], json!(after.1));
    let file = node.folder().join("pointsman.toml");
    let advice = format!(
        "rules was rolled back to its previous settings: it was withdrawn by an operator; [plugins.rules] in {} still contains the new ones, so change that section before the node restarts",
        file.display()
    );
    assert_eq!(state()["failure"], json!(advice));
    assert!(node.admin("/readyz").body.contains(&advice));
}

#[test]
fn an_upload_to_a_folder_that_cannot_be_written_is_a_conflict() {
    // No one can create a file there, not even root.
    let node = Node::builder().plugins("/sys").may_be_unready().start();
    let answer = eventually(SOON, "the plugins are loaded", || {
        let answer = node.order(
            "PUT",
            "/v1/plugins/versioned?create=true",
            &[],
            &versioned(1),
        );
        (answer.status != 503).then_some(answer)
    });
    assert!(
        answer.status == 409
            && answer
                .body
                .contains("/sys/versioned.wasm cannot be written: ")
            && answer
                .body
                .contains("make the folder writable for this node"),
        "{answer:?}"
    );
}

/// The series of a metric, by their labels.
fn series(node: &Node, metric: &str) -> BTreeMap<String, f64> {
    let page = node.admin("/metrics").body;
    let series = page.lines().filter_map(|line| {
        let (labels, value) = line.strip_prefix(metric)?.split_once(' ')?;
        let labels = labels.strip_prefix('{')?.strip_suffix('}')?;
        Some((labels.to_owned(), value.parse().ok()?))
    });
    series.collect()
}

#[test]
fn the_metrics_of_a_plugin_count_what_it_decided_holds_and_cost() {
    let cache = Folder::new();
    let plugins = Plugins::new(&[
        ("versioned.wasm", versioned(1)),
        ("discard.wasm", core_module("discard")),
    ]);
    let node = Node::builder()
        .plugins(plugins.dir())
        .environment(
            "POINTSMAN_PLUGINS_CACHE",
            cache.path().join("code").to_str().expect("UTF-8"),
        )
        .config("[plugins.versioned]\ndeadline = '1s'\n[[plugins.discard.config.rules]]\nmatch.type = 'noise'\n")
        .start();
    let mut stream = node.stream("7");
    let to = |id: &str, kind: &str| event(id, kind, json!({ "user": "7" }));
    node.publisher().publish(&[
        to("e1", "t"),
        to("e2", "noise"),
        to("e3", "noise"),
        to("e4", "t"),
    ]);
    for id in ["e1", "e4"] {
        assert_eq!(stream.next_notification(SOON).id, id);
    }
    let verdicts = |expected: &[(&str, f64)]| {
        let expected = expected
            .iter()
            .map(|(labels, n)| ((*labels).to_owned(), *n));
        let expected: BTreeMap<String, f64> = expected.collect();
        eventually(SOON, "the verdicts are counted", || {
            let found = series(&node, "pointsman_plugin_verdicts_total");
            (found == expected).then_some(())
        });
    };
    verdicts(&[
        ("plugin=\"discard\",verdict=\"drop\"", 2.0),
        ("plugin=\"versioned\",verdict=\"routes\"", 2.0),
    ]);
    // The cache was empty, so both were compiled, which took time.
    let compiled = series(&node, "pointsman_plugin_compile_seconds_total");
    for plugin in ["discard", "versioned"] {
        let labels = format!("plugin=\"{plugin}\"");
        assert!(compiled[&labels] > 0.0, "{compiled:?}");
    }
    // At least a page of each is kept for the next event.
    eventually(SOON, "instances hold memory", || {
        let memory = series(&node, "pointsman_plugin_memory_bytes");
        let bytes = memory.get("plugin=\"versioned\"")?;
        (*bytes >= 65_536.0).then_some(())
    });
    let info = |plugin: &str| -> Vec<String> {
        let all = series(&node, "pointsman_plugin_info").into_iter();
        let prefix = format!("plugin=\"{plugin}\",");
        let own = all.filter(|(labels, n)| *n == 1.0 && labels.starts_with(&prefix));
        own.map(|(labels, _)| labels).collect()
    };
    let [before] = &info("versioned")[..] else {
        panic!("not one version: {:?}", info("versioned"))
    };
    assert!(
        before.contains("version=\"0.1.0\"")
            && before.contains(&format!(",hash=\"{}\"", &hash(&versioned(1))[..12]))
            && before.contains("config_hash=\""),
        "{before}"
    );
    // One series for the active version, never of both.
    let answer = node.order("PUT", "/v1/plugins/versioned", &[], &versioned(2));
    assert_eq!(answer.status, 200, "{answer:?}");
    let after = info("versioned");
    assert!(
        after.len() == 1 && after[0].contains(&format!(",hash=\"{}\"", &hash(&versioned(2))[..12])),
        "{after:?}"
    );
    let discards = info("discard");
    node.reconfigure("[plugins.versioned]\ndeadline = '1s'\n[[plugins.discard.config.rules]]\nmatch.type = 'other'\n");
    eventually(SOON, "another configuration hash", || {
        let now = info("discard");
        (now.len() == 1 && now != discards).then_some(())
    });
    node.publisher().publish(&[to("e5", "noise")]);
    assert_eq!(stream.next_notification(SOON).id, "e5");
    verdicts(&[
        ("plugin=\"discard\",verdict=\"drop\"", 2.0),
        ("plugin=\"versioned\",verdict=\"routes\"", 3.0),
    ]);
}
