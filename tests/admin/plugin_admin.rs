//! Operators swap plugins while events flow, and cannot be hurt by a bad one: what fails is taken back or spared by itself, what they order is
//! in force when it is answered, and what they configure takes effect without a restart.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::command::{self, said, told};
use crate::harness::eventually;
use crate::harness::guests::{FAULTY, core_module, versioned};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::plugins::{Plugins, Site, by, hash};
use crate::harness::publish::event;

/// What the admin API says of `versioned`.
fn shown(node: &Node) -> Value {
    let answer = node.admin("/v1/plugins/versioned");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn dead_letters(node: &Node) -> Vec<Value> {
    node.request("GET", "/v1/dead?limit=1000").json()["dead"]
        .as_array()
        .unwrap()
        .clone()
}

#[test]
fn a_version_that_fails_on_a_third_of_the_events_is_rolled_back_by_itself_and_those_events_are_redriven_through_the_good_one()
 {
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
    eventually(SOON, "it is rolled back", || {
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
        reason.contains("events within its probation; 10 % is the most"),
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

    // Every event is told or dead-lettered, none both; and those that failed come through the good one.
    let dead = dead_letters(node);
    assert!((5..EVENTS / 3).contains(&dead.len()), "{}", dead.len());
    for letter in &dead {
        assert!(
            letter["reason"]
                .as_str()
                .unwrap()
                .contains("as this version does"),
            "{letter}"
        );
    }
    let told = follower.wait(SOON, "all others", |record| {
        record.notifications.len() >= EVENTS - dead.len()
    });
    let told: BTreeSet<String> = told.notifications.into_iter().map(|told| told.id).collect();
    assert_eq!(told.len(), EVENTS - dead.len());
    for letter in &dead {
        let path = format!("/v1/dead/{}/redrive", letter["id"].as_str().unwrap());
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

    // The same file, touched or copied again, is not tried again; another is.
    plugins.replace("versioned.wasm", &faulty);
    site.await_loads("versioned", "failed", 1);
    site.await_ready(200, |page| {
        page.contains("was rolled back before and is not tried again")
    });
    plugins.replace("versioned.wasm", &versioned(3));
    site.await_loads("versioned", "loaded", 3);
    site.await_ready(200, |page| !page.contains("plugins"));
}

#[test]
fn a_plugin_that_fails_on_everything_is_asked_only_now_and_then_and_recovers_by_itself() {
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
    eventually(SOON, "its breaker opens", || {
        (node.metric("pointsman_plugin_breaker_open{plugin=\"unruly\"}") == 1.0).then_some(())
    });
    eventually(SOON, "all are settled", || {
        (node.metric("pointsman_events_total{outcome=\"dead-lettered\"}") == 100.0).then_some(())
    });
    let page = eventually(SOON, "readiness tells it", || {
        Some(node.admin("/readyz").body).filter(|page| page.contains("plugins.unruly"))
    });
    assert!(
        page.starts_with("ready\nwarning: plugins.unruly: generation 1 failed on "),
        "{page}"
    );
    // Two workers may be in a call as it opens, each event is tried twice, and one or two events are tried while it is open.
    let calls = node.metric("pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"deadline\"}");
    assert!((20.0..=30.0).contains(&calls), "{calls}");
    let dead = dead_letters(&node);
    let reasons: Vec<&str> = dead
        .iter()
        .map(|letter| letter["reason"].as_str().unwrap())
        .collect();
    let n_spared = reasons
        .iter()
        .filter(|reason| reason.contains("it was not asked: it failed on "))
        .count();
    assert!(
        reasons.len() == 100 && n_spared >= 85,
        "{n_spared} of {}: {reasons:?}",
        reasons.len()
    );

    // An event that it does not fail on closes it.
    let mut n = 0;
    eventually(SOON, "its breaker closes", || {
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

/// "Not now" is no failure: the source waits, so that order holds, and nobody waits for ever.
#[test]
fn an_event_that_a_plugin_asks_to_retry_holds_its_source_until_its_tries_are_used_up_and_is_a_dead_letter_then()
 {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    // Two more tries come after 100 and 200 ms; the second of them would be over 250 ms.
    for (config, n_tries, waited_ms) in [("retries = 2", 3, 300), ("retry_ms = 250", 2, 100)] {
        let node = Node::builder()
            .config(&format!("[ingest]\n{config}\n"))
            .plugins(plugins.dir())
            .start();
        let mut stream = node.stream("42");
        let began = Instant::now();
        node.publisher().publish(&[
            event("later", "retry", json!({})),
            event("next", "good", json!({})),
        ]);
        assert_eq!(stream.next_notification(SOON).id, "next");
        let waited = began.elapsed();
        assert!(
            waited >= Duration::from_millis(waited_ms),
            "{config}: the next one came after {waited:?}"
        );
        assert_eq!(
            node.metric("pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"retry\"}"),
            f64::from(n_tries),
            "{config}"
        );
        let dead = dead_letters(&node);
        assert_eq!(dead.len(), 1, "{dead:?}");
        let letter = &dead[0];
        assert_eq!(
            (&letter["plugin"], &letter["attempts"]),
            (&json!("unruly"), &json!(n_tries)),
            "{config}: {letter}"
        );
        assert!(
            letter["reason"].as_str().unwrap().contains("not now"),
            "{letter}"
        );
    }
}

#[test]
fn an_upload_decides_when_it_is_answered_and_after_a_restart() {
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
    // It lies where the file before it lay, and the watcher sees nothing new in it.
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
        .order("PUT", "/v1/plugins/third", &[], &versioned(4));
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
fn an_upload_that_is_no_good_is_refused_with_the_reason_and_changes_nothing() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let good = versioned(2);
    for (bytes, expect) in [
        (&good[..good.len() / 2], "is truncated or damaged"),
        (b"", "is empty"),
        (b"<html>404</html>", "is no WebAssembly"),
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
    // Nobody who merely has a page open in this machine's browser is its operator.
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
fn an_order_takes_the_key() {
    const KEY: &str = "a key of at least thirty-two bytes";
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let config = format!("[auth]\njwt_secret = '{KEY}'\nkey = '{KEY}'\n");
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
        ("POST", "/replay"),
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
    // By command as well, however large the file is that is not taken.
    let large = plugins.dir().join(".large");
    fs::write(&large, vec![0; 20_000_000]).unwrap();
    let refused = refusal(
        &node,
        &["upload", large.to_str().unwrap(), "--name", "versioned"],
    );
    assert!(
        refused.contains("this needs the key") && refused.contains("give --key or POINTSMAN_KEY"),
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
fn a_plugin_is_disabled_enabled_and_rolled_back_by_hand() {
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
        page.contains("warning: plugins.versioned: it is disabled by hand")
    });
    // What comes meanwhile waits for that, too.
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
            "was rolled back: it was taken back by an operator; the folder still holds it",
        )
    });
    // Asked for by name, it is tried again.
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
fn a_plugin_that_was_rolled_back_and_disabled_is_at_work_again_when_it_is_enabled() {
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
        "the file that is there is better than nothing"
    );
    assert_eq!(site.next_decision().1, [by("other", 1), by("versioned", 3)]);
    site.await_ready(200, |page| !page.contains("plugins"));
}

/// `pointsman plugin ...` at this node.
fn plugin(node: &Node, arguments: &[&str]) -> Command {
    let mut command = command::pointsman(&["plugin"]);
    command.args(arguments).args(["--url", &node.admin_url("")]);
    command
}

/// The one line that an order is answered with.
fn line(node: &Node, arguments: &[&str]) -> String {
    let said = told(&mut plugin(node, arguments));
    assert_eq!(said.lines().count(), 1, "{said}");
    said.trim_end().to_owned()
}

/// Why an order is refused, in one line without a word of HTTP.
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
fn orders_by_command_are_said_in_a_line_and_listed_in_a_table() {
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
        "uploaded versioned 0.1.0 (router): generation 2, on probation for 60 s, in place of generation 1"
    );
    assert_eq!(site.next_decision(), (2, vec![by("versioned", 2)]));
    assert_eq!(
        line(&site.node, &["upload", &second]),
        "versioned 0.1.0 (router) is what was at work already: generation 2, on probation for 60 s"
    );
    let rolled_back = line(&site.node, &["rollback", "versioned"]);
    assert!(
        rolled_back.starts_with(
            "rolled back versioned 0.1.0 (router): generation 1, active, in place of generation 2; "
        ),
        "{rolled_back}"
    );
    assert!(
        rolled_back.contains("; on this node only: the file is still the newer one"),
        "{rolled_back}"
    );
    assert_eq!(site.next_decision(), (1, vec![by("versioned", 1)]));
    assert_eq!(
        line(&site.node, &["disable", "versioned"]),
        "disabled versioned 0.1.0 (router): generation 1 is not at work any more; no plugin decides now, so events wait, unless the node was started with --allow-no-plugins"
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
        row(&told(&mut plugin(&site.node, &["list"])))[..4],
        ["versioned", "-", "disabled", "-"]
    );
    assert_eq!(
        line(&site.node, &["disable", "versioned"]),
        "disabled versioned: it was not at work"
    );
    let enabled = line(&site.node, &["enable", "versioned"]);
    assert!(enabled.starts_with("enabled versioned 0.1.0 (router): generation 3, active, from the file that was rolled back as generation 2; 1 plugin decides now: versioned"), "{enabled}");
    assert!(
        line(&site.node, &["enable", "versioned"])
            .starts_with("versioned 0.1.0 (router) is enabled already: generation 3")
    );

    assert!(line(&site.node, &["shadow", "versioned", &second]).starts_with("candidate 0.1.0 ("));
    let broken = refusal(
        &site.node,
        &["upload", &file("versioned.wasm", b"no plugin")],
    );
    assert!(
        broken.contains("versioned.wasm was not taken: it is no WebAssembly")
            && broken.contains("what ran before still runs"),
        "{broken}"
    );
    let listed = told(&mut plugin(&site.node, &["list"]));
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
            .starts_with("versioned: refused at ")
            && listed.contains(": what was uploaded is no WebAssembly"),
        "{listed}"
    );

    // What a program reads is the node's own answer.
    let shown: Value = serde_json::from_str(&told(&mut plugin(
        &site.node,
        &["disable", "versioned", "--json"],
    )))
    .unwrap();
    assert_eq!(
        (
            &shown["name"],
            &shown["state"],
            &shown["settings"]["probation_s"]
        ),
        (&json!("versioned"), &json!("disabled"), &json!(60))
    );
    // In its file's place, and at work only once it is enabled.
    assert_eq!(
        line(&site.node, &["promote", "versioned"]),
        "promoted versioned: disabled"
    );
    let shown: Value =
        serde_json::from_str(&told(&mut plugin(&site.node, &["list", "--json"]))).unwrap();
    assert_eq!(shown["plugins"][0]["name"], "versioned");

    let nobody = refusal(&site.node, &["rollback", "nobody"]);
    assert!(
        nobody.contains("there is no plugin 'nobody' there (there: versioned)"),
        "{nobody}"
    );
    assert!(refusal(&site.node, &["rollback", "no/such"]).contains("cannot be named"));
    let alone = refusal(&site.node, &["rollback", "versioned"]);
    assert!(
        alone.contains("no earlier generation to go back to; upload the file that you want"),
        "{alone}"
    );
    assert!(
        line(&site.node, &["remove", "versioned"])
            .starts_with("removed versioned, and its file; no plugin decides now")
    );
    assert_eq!(fs::read_dir(plugins.dir()).unwrap().count(), 0);
}

#[test]
fn an_upload_under_a_name_that_no_plugin_has_is_one_more_plugin_only_if_that_is_said() {
    let plugins = Plugins::new(&[("my_versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    let uploads = Folder::new();
    let slip = uploads.path().join("my_verisoned.wasm");
    fs::write(&slip, versioned(2)).unwrap();
    let slip = slip.to_str().unwrap();
    let refused = refusal(&site.node, &["upload", slip]);
    for word in [
        "no plugin is called 'my-verisoned'",
        "there: my-versioned",
        "--name",
        "--new",
    ] {
        assert!(refused.contains(word), "{word} is not in {refused}");
    }
    assert_eq!(site.next_decision(), (1, vec![by("my-versioned", 1)]));
    assert_eq!(
        line(&site.node, &["upload", slip, "--name", "my-versioned"]),
        "uploaded my-versioned 0.1.0 (router): generation 2, on probation for 60 s, in place of generation 1"
    );
    let told = line(&site.node, &["upload", slip, "--new"]);
    assert_eq!(
        told,
        "new plugin my-verisoned 0.1.0 (router): generation 1, active; 2 plugins decide now: my-verisoned, my-versioned"
    );
    assert_eq!(
        site.next_decision(),
        (2, vec![by("my-verisoned", 1), by("my-versioned", 2)])
    );
    // Whoever means a new one does not replace another.
    let refused = refusal(&site.node, &["upload", slip, "--new"]);
    assert!(
        refused
            .contains("there is a plugin 'my-verisoned 0.1.0 (router)' already; leave out --new"),
        "{refused}"
    );
    // Where there is none yet, nothing can be meant but a new one; and what is configured is expected.
    let empty = Plugins::new(&[]);
    let node = Node::builder()
        .plugins(empty.dir())
        .may_be_unready()
        .config("[plugins.late]\ndeadline_ms = 100\n")
        .start();
    eventually(SOON, "the node has looked for plugins", || {
        (node.admin("/v1/plugins").status == 200).then_some(())
    });
    assert!(
        line(&node, &["upload", slip, "--name", "late"])
            .contains("late 0.1.0 (router): generation 1, active")
    );
    line(&node, &["remove", "late"]);
    assert!(
        line(&node, &["upload", slip, "--name", "late", "--new"])
            .contains("late 0.1.0 (router): generation 2, active")
    );
}

#[test]
fn a_command_that_finds_no_node_names_the_address_and_the_option_that_changes_it() {
    for (arguments, variable) in [
        (&["plugin", "list"][..], "POINTSMAN_ADMIN_URL"),
        (&["events", "export"], "POINTSMAN_ADMIN_URL"),
        (&["dead", "list"], "POINTSMAN_URL"),
        (&["tail", "--user", "42"], "POINTSMAN_URL"),
    ] {
        let (is_well, said) =
            said(command::pointsman(arguments).args(["--url", "http://127.0.0.1:1"]));
        assert!(!is_well && said.lines().count() == 1, "{said}");
        for word in ["no node answers at http://127.0.0.1:1 (", "--url", variable] {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    }
    // Nor is the other listener of a node the one that is asked.
    let node = Node::builder().start();
    let (is_well, said) =
        said(command::pointsman(&["plugin", "list"]).args(["--url", &node.url("")]));
    assert!(
        !is_well
            && said
                .contains("one for applications and one for operators: give the other with --url"),
        "{said}"
    );
}

/// As where the disk of the log is full, or nobody reads the pipe any more.
#[test]
fn a_log_that_cannot_be_written_costs_its_lines_and_nothing_else() {
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
        node.order("PUT", "/v1/plugins/versioned", &[], b"none")
            .status,
        422
    );
    assert_eq!(
        node.order("PUT", "/v1/plugins/versioned", &[], &versioned(1))
            .status,
        200
    );
    assert_eq!(node.admin("/readyz").body, "ready\n");
}

#[test]
fn what_is_configured_for_a_plugin_takes_effect_while_events_flow() {
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
        eventually(SOON, "its generation", || {
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
        "nothing is configured for it"
    );

    let ready = |wish: &str| {
        eventually(SOON, wish, || {
            Some(node.admin("/readyz"))
                .filter(|answer| answer.status == 200 && answer.body.contains(wish))
        })
        .body
    };
    // Neither a file that is none, nor settings that a plugin does not take, change anything.
    node.reconfigure("[plugins.rules\n");
    ready("what was configured before is in force");
    node.reconfigure(&config("ann").replace("told", "told', nonsense = '"));
    ready("rules.wasm refuses its configuration: ");
    let id = tell();
    assert_eq!(bob.next_notification(SOON).id, id);

    node.reconfigure(&format!(
        "[stream]\nheartbeat_s = 5\n[plugins]\norder = ['versioned']\n{}",
        config("ann")
    ));
    generation(3);
    let page = ready(
        "warning: configuration: stream.heartbeat_s changed; that takes effect when the node starts again",
    );
    assert!(!page.contains("plugins"), "{page}");
    let names: Vec<_> = node.admin("/v1/plugins").json()["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].clone())
        .collect();
    assert_eq!(names, ["versioned", "rules"]);
    // A file that is gone is no wish to have everything as by default.
    node.unconfigure();
    ready("what it said is in force");
    let id = tell();
    assert_eq!(ann.next_notification(SOON).id, id);
    node.reconfigure(&format!(
        "[plugins.versioned]\nenabled = false\n{}",
        config("ann")
    ));
    eventually(SOON, "it is disabled", || {
        (shown(&node)["state"] == "disabled").then_some(())
    });
    let id = tell();
    assert_eq!(ann.next_notification(SOON).id, id);
    eventually(Duration::from_secs(20), "readiness is clear", || {
        (node.admin("/readyz").body == "ready\n").then_some(())
    });
}
