//! Hostile plugins: for every invalid file and every misbehaviour, the error is the documented one,
//! the node keeps serving, the next event is decided correctly, and memory stays bounded.

use serde_json::{Value, json};

use crate::harness::eventually;
use crate::harness::guests::{component_of, contract, core_module, versioned, wasi_component};
use crate::harness::node::{Node, SOON};
use crate::harness::plugins::{Plugins, Site};
use crate::harness::publish::event;

/// The permitted growth of a node's memory, in KiB: the pool keeps some memory of instances for
/// reuse.
const MORE_KIB: u64 = 160 * 1024;

/// Files that are refused when they are loaded: the name, the file, and part of the reason.
fn files() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let contract = contract();
    let changed = |from: &str, to: &str| {
        assert!(contract.contains(from), "{from}");
        component_of(&contract.replace(from, to), "full-plugin")
    };
    let good = versioned(2);
    let compiled = wasmtime::Engine::default()
        .precompile_module(&good)
        .expect("it compiles");
    let forger = || core_module("forger");
    vec![
        (
            "cut",
            good[..good.len() / 2].to_vec(),
            "is truncated or damaged",
        ),
        ("empty", Vec::new(), "is empty"),
        ("page", b"<html>404</html>".to_vec(), "is not WebAssembly"),
        // A node only runs code that it compiled itself.
        ("compiled", compiled, "is not WebAssembly"),
        (
            "hang",
            core_module("unruly"),
            "fails in configure: it ran longer than 1000 ms",
        ),
        (
            "hungry",
            core_module("unruly"),
            "the limit is 1 (memory_mib)",
        ),
        // Every function of this component traps.
        (
            "traps-in-describe",
            component_of(&contract, "full-plugin"),
            "fails in describe: it trapped: ",
        ),
        (
            "traps-in-second-describe",
            forger(),
            "fails in describe: it trapped: ",
        ),
        (
            "traps-in-configure",
            forger(),
            "fails in configure: it trapped: ",
        ),
        (
            "refuses",
            forger(),
            "rejects its configuration: x\\r\\ndata: forged\\u{1b}[2J\\u{0}: x\\r\\n",
        ),
        // Only its schema excludes these.
        (
            "list-for-a-table",
            forger(),
            "rejects its configuration: quota: is a list; write a table",
        ),
        (
            "above-a-bound",
            forger(),
            "rejects its configuration: quota.limit: is 10; give at most 9",
        ),
        (
            "no-text",
            forger(),
            "fails in configure: violates the plugin contract: ",
        ),
        (
            "other-world",
            component_of(
                "package acme:thing@1.0.0; interface it { go: func(); } world things { export it; }",
                "things",
            ),
            "exports neither pointsman:plugin/filter nor pointsman:plugin/router",
        ),
        (
            "more-fields",
            changed("version: string,", "version: string, licence: string,"),
            "violates the plugin contract: ",
        ),
        (
            "more-cases",
            changed("drop(string),", "drop(string), delay(u64),"),
            "violates the plugin contract: ",
        ),
        (
            "next-version",
            changed("plugin@0.1.0", "plugin@0.2.0"),
            "was built for pointsman:plugin 0.2; this host supports 0.1",
        ),
        (
            "greedy",
            wat::parse_str(r#"(component (import "wasi:http/outgoing-handler@0.2.0" (instance)))"#)
                .expect("a component"),
            "imports wasi:http/outgoing-handler@0.2.0, which plugins are not granted",
        ),
    ]
}

/// Events pass without these plugins, none of which ever becomes active.
const CONFIG: &str = "
[plugins.list-for-a-table]
on_missing = 'skip'
config.quota = [1]
[plugins.above-a-bound]
on_missing = 'skip'
config.quota.limit = 10
[plugins.hang]
on_missing = 'skip'
config.hang = true
[plugins.hungry]
on_missing = 'skip'
memory_mib = 1
[plugins.traps-in-second-describe]
on_missing = 'skip'
[plugins.traps-in-second-describe.config]
trap-in-describe = true
[plugins.traps-in-configure]
on_missing = 'skip'
[plugins.traps-in-configure.config]
trap-in-configure = true
[plugins.refuses]
on_missing = 'skip'
[plugins.refuses.config]
refuse = true
[plugins.no-text]
on_missing = 'skip'
[plugins.no-text.config]
no-text = true
";

#[test]
fn every_invalid_file_is_refused_with_the_reason_and_the_next_event_is_decided() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::of(Node::builder().config("[plugins]\n"), &plugins);
    assert_eq!(site.next_decision().0, 1);
    site.node.reconfigure(CONFIG);
    site.await_ready(200, |page| {
        page.contains("warning: plugins.hang: the plugin 'hang' is configured")
    });
    let before = site.node.memory_kib();
    for (name, bytes, expect) in files() {
        let upload = site.node.order(
            "PUT",
            &format!("/v1/plugins/{name}?create=true"),
            &[],
            &bytes,
        );
        let error = upload.json()["error"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert!(
            upload.status == 422 && error.contains(expect),
            "{name} uploaded: {upload:?}"
        );
        assert!(!plugins.path(&format!("{name}.wasm")).exists());

        plugins.replace(&format!("{name}.wasm"), &bytes);
        let told = eventually(SOON, &format!("{name} is refused"), || {
            let plugin = site.node.admin(&format!("/v1/plugins/{name}")).json();
            plugin["failure"]
                .as_str()
                .filter(|why| why.starts_with(&format!("{name}.wasm ")))
                .map(str::to_owned)
        });
        assert!(told.contains(expect), "{name}: {told}");
        assert_eq!(site.next_decision().0, 1, "after {name}");
        plugins.remove(&format!("{name}.wasm"));
    }
    let after = site.node.memory_kib();
    assert!(
        after < before + MORE_KIB,
        "{before} KiB before, {after} after"
    );
    nothing_forged(&site.node);
}

/// Answers that are refused: the type of the event, and part of the reason.
const ANSWERS: [(&str, &str); 25] = [
    ("loop", "it ran longer than 1000 ms (deadline)"),
    ("recurse", "it trapped: "),
    ("grow", "MiB of memory; the limit is 32 (memory_mib)"),
    (
        "panic",
        "it trapped: panicked at tests/harness/guests/unruly/src/lib.rs",
    ),
    (
        "forge.100-mb",
        "its answer exceeds its limits (result_kib, max_targets)",
    ),
    (
        "forge.a-million-targets",
        "its answer exceeds its limits (result_kib, max_targets)",
    ),
    (
        "many-targets",
        "10001 targets or routes; the limit is 10000 (max_targets)",
    ),
    ("forge.no-text", "violates the plugin contract: "),
    ("forge.attribute-name", "its amendment is invalid: "),
    (
        "forge.attribute-value",
        "its amendment is invalid: seen contains the control character U+000D",
    ),
    (
        "forge.user",
        "the user contains the control character U+000D",
    ),
    (
        "forge.group",
        "the group contains the control character U+000D",
    ),
    (
        "forge.collapse-key",
        "the collapse key contains the control character U+000D",
    ),
    (
        "forge.event-name",
        "the event name contains the control character U+000D",
    ),
    ("forge.body", "the body is not valid JSON"),
    ("forge.reject", "x\\r\\ndata: forged\\u{1b}[2J\\u{0}"),
    (
        "forge.log",
        "it trapped: x\\r\\ndata: forged\\u{1b}[2J\\u{0}",
    ),
    (
        "forge.reserved.cursor",
        "the event name 'cursor' is reserved",
    ),
    ("forge.reserved.gap", "the event name 'gap' is reserved"),
    (
        "forge.reserved.reauth",
        "the event name 'reauth' is reserved",
    ),
    ("forge.reserved.close", "the event name 'close' is reserved"),
    ("forge.reserved.open", "the event name 'open' is reserved"),
    ("forge.reserved.error", "the event name 'error' is reserved"),
    (
        "forge.reserved.message",
        "the event name 'message' is reserved",
    ),
    (
        "forge.reserved.heartbeat",
        "the event name 'heartbeat' is reserved",
    ),
];

#[test]
fn every_invalid_answer_dead_letters_its_event_and_the_next_event_is_decided() {
    let plugins = Plugins::new(&[
        ("forger.wasm", core_module("forger")),
        ("unruly.wasm", core_module("unruly")),
        ("versioned.wasm", versioned(1)),
    ]);
    // The route of `versioned` comes first. The memory limit is high enough that the size of the
    // answer is refused and not the allocation.
    let node = Node::builder()
        .config("[plugins]\norder = ['versioned']\n[plugins.unruly]\ndeadline = '1s'\n[plugins.forger]\nmemory_mib = 512\ndeadline = '5s'\n")
        .plugins(plugins.dir())
        .start();
    let mut stream = node.stream("7");
    let publish = |id: &str, kind: &str| {
        node.publisher()
            .publish(&[event(id, kind, json!({"user": "7"}))])
    };
    let mut next_is_right = |id: &str| {
        publish(id, "forge.good");
        let told = stream.next_notification(SOON);
        assert_eq!((told.id.as_str(), &told.data["version"]), (id, &json!(1)));
    };
    next_is_right("first");
    let before = node.memory_kib();
    for (n, (kind, expect)) in ANSWERS.into_iter().enumerate() {
        publish(kind, kind);
        let letter = eventually(SOON, &format!("{kind} is a dead letter"), || {
            node.request("GET", "/v1/dead-letters?limit=1000").json()["dead_letters"]
                .as_array()?
                .get(n)
                .cloned()
        });
        assert!(
            letter["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains(expect)),
            "{kind}: {letter}"
        );
        next_is_right(&format!("after {kind}"));
    }
    // These are accepted: text for people is made printable, and text that is only compared is
    // harmless.
    for kind in [
        "forge.drop",
        "forge.criteria-attribute",
        "forge.criteria-value",
        "chatty",
    ] {
        publish(kind, kind);
        eventually(SOON, "it is decided", || {
            let decisions = node.admin(&format!("/v1/decisions?event_id={kind}")).json();
            let verdicts = decisions[0]["verdicts"].as_array()?.clone();
            assert!(
                verdicts
                    .iter()
                    .all(|verdict| verdict["verdict"] != "failed"),
                "{decisions}"
            );
            Some(())
        });
    }
    let after = node.memory_kib();
    assert!(
        after < before + MORE_KIB,
        "{before} KiB before, {after} after"
    );
    let plugin: Value = node.admin("/v1/plugins/forger").json();
    assert_eq!(plugin["version"], "x\\r\\ndata: forged\\u{1b}[2J\\u{0}");
    assert_eq!(node.admin("/readyz").body, "ready\n");
    nothing_forged(&node);
}

/// No plugin forged a log line or injected a terminal escape sequence.
fn nothing_forged(node: &Node) {
    let log = node.log();
    assert!(log.contains("forged"), "no forgery was attempted");
    assert!(
        !log.contains(['\u{1b}', '\0', '\r'])
            && !log.lines().any(|line| line.starts_with("data: forged")),
        "{log}"
    );
    assert!(log.len() < 2_000_000, "{} bytes of log", log.len());
}

#[test]
fn a_trap_names_functions_the_end_of_standard_error_and_the_event_wherever_it_is_reported() {
    let plugins = Plugins::new(&[("unruly.wasm", wasi_component("unruly"))]);
    let node = Node::builder()
        .config("[plugins.unruly]\ndeadline = '10s'\nmemory_mib = 64\n")
        .plugins(plugins.dir())
        .start();
    node.publisher()
        .publish(&[event("parcel-7", "traceback", json!({}))]);
    let letter = eventually(SOON, "the event is a dead letter", || {
        node.request("GET", "/v1/dead-letters").json()["dead_letters"]
            .get(0)
            .cloned()
    });
    let reason = letter["reason"].as_str().expect("a reason");
    // The guest has its names in the file; an index stands for a function without one.
    let frames = reason
        .split("; ")
        .find_map(|part| part.strip_prefix("in "))
        .unwrap_or_else(|| panic!("no functions in {reason}"));
    assert!(
        (1..=5).contains(&frames.split(" < ").count()) && frames.contains("abort"),
        "{frames}"
    );
    let end = "; stderr: line 3\\u{1b}[2J | line 4\\u{1b}[2J | line 5\\u{1b}[2J | line 6\\u{1b}[2J | KeyError: 'fee'; event parcel-7";
    assert!(
        reason.starts_with("it trapped: wasm `unreachable`") && reason.ends_with(end),
        "{reason}"
    );
    let decisions = node.admin("/v1/decisions?event_id=parcel-7").json();
    assert_eq!(decisions[0]["reason"], letter["reason"]);
    let log = node.log();
    for words in [
        &["plugin failed: it trapped", end][..],
        // Its own lines name the event as well.
        &["line 1\\u{1b}[2J", "parcel-7"],
    ] {
        assert!(
            log.lines()
                .any(|line| words.iter().all(|word| line.contains(word))),
            "{words:?} in one line of {log}"
        );
    }
}

#[test]
fn a_slow_plugin_and_a_pattern_that_matches_only_itself_are_warned_of() {
    let plugins = Plugins::new(&[
        ("odd.wasm", core_module("unruly")),
        ("unruly.wasm", core_module("unruly")),
        ("discard.wasm", core_module("discard")),
    ]);
    let node = Node::builder()
        .config(
            "[plugins.unruly]\ndeadline = '10s'\n[plugins.odd]\nconfig.types = ['order.{a,b}']\nconfig.fields = ['/lines/*/id']\n
[[plugins.discard.config.rules]]\nmatch = { type = '^order' }\n[[plugins.discard.config.rules]]\nmatch.attributes = { site = 'eu-*' }\n",
        )
        .plugins(plugins.dir())
        .start();
    for warning in [
        "the type pattern 'order.{a,b}' of the plugin contains '{', which matches only itself",
        "the field '/lines/*/id' that the plugin reads contains '*', which is the name of one field",
        // One rule without a type makes the plugin ask for all, so the host cannot see this one.
        "the type pattern '^order' contains '^', which matches only itself",
        "the text 'eu-*' for site contains '*', which matches only itself",
    ] {
        let log = node.log();
        assert_eq!(log.matches(warning).count(), 1, "{warning} in {log}");
    }
    node.publisher().publish(&[event("e", "slow", json!({}))]);
    node.await_outcomes(1, SOON);
    let log = node.log();
    let warning = log.lines().find(|line| line.contains("plugin is slow"));
    let warning = warning.unwrap_or_else(|| panic!("no warning in {log}"));
    for word in [
        "WARN",
        "unruly",
        "1 of its calls in a batch of 1 events took 10 ms or more",
        "% of the time of the batch",
    ] {
        assert!(warning.contains(word), "{word} in {warning}");
    }
}
