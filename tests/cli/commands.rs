//! `publish`, `tail`, `dead-letters`, `check-config` and `config`, run as processes, where needed
//! against a running node.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::command;
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::{bundled_plugins, eventually};

/// Runs `pointsman` with these arguments.
fn pointsman(arguments: &[&str]) -> Output {
    command::pointsman(arguments)
        .output()
        .expect("run pointsman")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[test]
fn tail_prints_each_published_event_once_even_across_a_reconnect() {
    let mut node = Node::builder().data().start();
    let url = node.url("");
    let tail = ["tail", "--user", "42", "--url", &url];
    let mut tail = Command::new(env!("CARGO_BIN_EXE_pointsman"))
        .args(tail)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("tail");
    let (send, lines) = mpsc::channel();
    let out = BufReader::new(tail.stdout.take().expect("piped"));
    std::thread::spawn(move || {
        out.lines()
            .map_while(Result::ok)
            .try_for_each(|line| send.send(line))
    });
    // Waits until the stream is open.
    eventually(SOON, "tail opens its stream", || {
        (node.metric("pointsman_streams_open") >= 1.0).then_some(())
    });
    // Publishes repeatedly, because the stream starts at the latest event: an event published
    // before its first cursor may be skipped.
    eventually(SOON, "tail receives the first event", || {
        stdout(&pointsman(&[
            "publish",
            "--url",
            &url,
            "--type",
            "t",
            "--user",
            "42",
            "--data",
            "{\"n\":1}",
        ]));
        lines.recv_timeout(Duration::from_millis(200)).ok()
    });
    node.kill();
    node.restart();
    stdout(&pointsman(&[
        "publish",
        "--url",
        &url,
        "--type",
        "t",
        "--id",
        "after",
        "--user",
        "42",
        "--data",
        "{\"n\":2}",
    ]));
    let second = eventually(SOON, "tail reconnects", || {
        lines
            .recv_timeout(SOON)
            .ok()
            .filter(|line| line.contains("\"after\""))
    });
    let data: Value = serde_json::from_str(&second).expect("a line is the data object");
    assert_eq!(data["data"], json!({ "n": 2 }));
    tail.kill().expect("end tail");
    tail.wait().expect("end tail");
}

#[test]
fn a_dry_run_prints_plan_and_recipients_and_publishes_nothing() {
    let node = Node::builder().start();
    let url = node.url("");
    let options = [
        "--type",
        "t",
        "--id",
        "e1",
        "--user",
        "42",
        "--group",
        "ops",
        "--priority",
        "high",
    ];
    let dry_run = |more: &[&str]| {
        stdout(&pointsman(
            &[&["publish", "--dry-run", "--url", &url], &options[..], more].concat(),
        ))
    };
    let printed = dry_run(&[]);
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines[0], "\"e1\" of type \"t\" would be committed");
    for line in [
        "plugin     address (generation 1, ",
        "route 1    by address to u:42 g:ops, high",
        "reaches    user 42, by address, high",
        "reaches    the members of group ops, subject to the route's condition",
    ] {
        assert!(
            lines.iter().any(|printed| printed.starts_with(line)),
            "{line} is not in {printed}"
        );
    }
    let whole: Value = serde_json::from_str(&dry_run(&["--json"])).expect("JSON");
    assert_eq!(
        (&whole["outcome"], &whole["plan"][0]["to"]),
        (&json!("committed"), &json!(["u:42", "g:ops"]))
    );
    let failing = stdout(&pointsman(&[
        "publish",
        "--dry-run",
        "--url",
        &url,
        "--type",
        "t",
        "--id",
        "e2",
        "--attribute",
        "ttl=soon",
    ]));
    assert!(
        failing.starts_with("\"e2\" of type \"t\" would be dead-lettered by address: "),
        "{failing}"
    );
    node.publisher()
        .publish(&[event("after", "t", json!({ "user": "42" }))]);
    eventually(SOON, "the event after it is committed", || {
        (node.metric("pointsman_events_total{outcome=\"committed\"}") >= 1.0).then_some(())
    });
    assert_eq!(node.metric("pointsman_events_read_total"), 1.0);
}

#[test]
fn dead_letters_are_listed_shown_redriven_and_dropped() {
    let node = Node::builder().start();
    let url = node.url("");
    node.publisher()
        .publish(&[event("bad", "t", json!({ "user": "42", "ttl": "soon" }))]);
    let listed = || stdout(&pointsman(&["dead-letters", "list", "--url", &url]));
    let listed_id = |table: &str| {
        let line = table.lines().nth(1).expect("a line below the header");
        line.split_whitespace().next().expect("an id").to_owned()
    };
    let table = eventually(SOON, "the dead letter", || {
        Some(listed()).filter(|table| !table.is_empty())
    });
    let id = listed_id(&table);
    assert!(
        table.starts_with("ID  ")
            && table.contains("REASON")
            && table.contains("address")
            && table.contains("ttl"),
        "{table}"
    );
    for order in ["redrive", "drop"] {
        let refused = pointsman(&["dead-letters", order, "--url", &url]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(64) && said.contains("<ID|--all>"),
            "{said}"
        );
    }
    let shown = stdout(&pointsman(&["dead-letters", "--url", &url, "show", &id]));
    assert!(
        shown.contains("soon"),
        "the original fields are not in {shown}"
    );
    stdout(&pointsman(&["dead-letters", "--url", &url, "redrive", &id]));
    // The event fails again and becomes a new dead letter.
    let again = eventually(SOON, "the redriven dead letter", || {
        Some(listed()).filter(|table| !table.is_empty() && !table.contains(&id))
    });
    let id = listed_id(&again);
    stdout(&pointsman(&["dead-letters", "--url", &url, "drop", &id]));
    assert_eq!(listed(), "");
}

#[test]
fn a_configuration_error_is_one_line_with_file_key_and_fix_and_exits_with_64() {
    let file = std::env::temp_dir().join(format!("pointsman-bad-{}.toml", std::process::id()));
    let check = |text: &str, words: &[&str]| {
        std::fs::write(&file, text).expect("write a configuration");
        let output = pointsman(&["check-config", "--config", file.to_str().expect("UTF-8")]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{text}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        for word in words {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    };
    check(
        "[listen]\nadress = \"127.0.0.1:1\"",
        &["pointsman-bad", "adress", "config --defaults"],
    );
    check("[listen]\naddress = 7", &["pointsman-bad", "address"]);
    check(
        "[retention]\nmax_age = \"5s\"",
        &["retention.max_age", "at least \"10m\""],
    );
    check(
        "[broker]\nephemeral = true\n[auth]\ndev = true\n[listen]\naddress = \"0.0.0.0:8080\"",
        &["dev", "loopback"],
    );
    std::fs::remove_file(&file).expect("remove it");
}

#[test]
fn check_config_validates_plugins_and_folders() {
    let folder = Folder::new();
    let file = |text: &str| {
        let file = folder.path().join("pointsman.toml");
        std::fs::write(&file, text).expect("write a configuration");
        file.to_str().expect("UTF-8").to_owned()
    };
    let plugins = bundled_plugins();
    let plugins = plugins.to_str().expect("UTF-8");
    let check = |config: &str, more: &[&str]| {
        pointsman(&[&["check-config", "--dev", "--config", &file(config)], more].concat())
    };
    let well = stdout(&check("", &["--ephemeral", "--plugins", plugins]));
    for line in ["plugin address: router", "plugin discard: filter", "ok: "] {
        assert!(well.contains(line), "{well}");
    }
    let not_a_folder = format!("{}/data", file(""));
    let bad_rules = "[plugins.discard.config]\nrule = []";
    for (config, more, expect) in [
        (
            bad_rules,
            &["--ephemeral", "--plugins", plugins][..],
            "plugin discard: discard.wasm rejects its configuration",
        ),
        // Not a table for `match` whose first keys are set by position.
        (
            "[[plugins.discard.config.rules]]\nmatch = [\"debug.*\", \"/ci\"]",
            &["--ephemeral", "--plugins", plugins],
            "rejects its configuration: rules[0].match: is a list; write a table with keys from type,",
        ),
        (
            "",
            &["--ephemeral", "--plugins", "/nowhere"],
            "the plugin folder /nowhere cannot be read",
        ),
        ("", &["--data", &not_a_folder], "is not writable"),
    ] {
        let checked = check(config, more);
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert_eq!(checked.status.code(), Some(1), "{checked:?}");
        assert!(said.contains(expect), "{expect} is not in {said}");
        if config.is_empty() {
            // `serve` reports the same error before it listens.
            let serve = [
                &[
                    "serve",
                    "--dev",
                    "--listen",
                    "127.0.0.1:0",
                    "--admin",
                    "127.0.0.1:0",
                ],
                more,
            ]
            .concat();
            let ended = pointsman(&serve);
            let said = String::from_utf8_lossy(&ended.stderr).into_owned();
            assert!(
                ended.status.code() == Some(1)
                    && said.contains(expect)
                    && !said.contains("listening"),
                "{said}"
            );
        }
    }
    assert_eq!(
        std::fs::read_dir(folder.path())
            .expect("the folder")
            .count(),
        1,
        "check-config must not leave files behind"
    );
}

#[test]
fn check_config_uses_an_existing_compile_cache_but_does_not_create_one() {
    let folder = Folder::new();
    let (cache, plugins) = (folder.path().join("cache"), bundled_plugins());
    let n_compiled = || std::fs::read_dir(&cache).map_or(0, |files| files.count());
    let check = || {
        let arguments = [
            "check-config",
            "--dev",
            "--ephemeral",
            "--plugins",
            plugins.to_str().expect("UTF-8"),
        ];
        stdout(
            &command::pointsman(&arguments)
                .env("POINTSMAN_PLUGINS_CACHE", &cache)
                .output()
                .expect("run it"),
        )
    };
    assert!(check().contains("plugin address: router"));
    assert!(!cache.exists(), "only a node creates the cache");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&cache)
        .expect("make it");
    check();
    assert_eq!(
        n_compiled(),
        2,
        "the compiled plugins must be in the cache for the next start"
    );
    // The cache is read: a corrupt file is detected and replaced.
    let code = std::fs::read_dir(&cache)
        .expect("the cache")
        .next()
        .expect("a file")
        .expect("a file")
        .path();
    let whole = std::fs::read(&code).expect("read it");
    std::fs::write(&code, &whole[..whole.len() / 2]).expect("write it");
    check();
    assert_eq!(std::fs::read(&code).expect("read it").len(), whole.len());
    // A cache with the wrong mode is not used.
    std::fs::set_permissions(&cache, std::fs::Permissions::from_mode(0o755))
        .expect("open it to others");
    let said = check();
    assert!(
        said.contains("warning: a node would compile its plugins at each start")
            && said.contains("has mode 755"),
        "{said}"
    );
}

#[test]
fn publish_rejects_invalid_options_without_sending_a_request() {
    // No node listens here, so a request would fail with another error.
    let url = "http://127.0.0.1:1";
    for wrong in [&["--priority", "hi"][..], &["--user", ""], &["--group", ""]] {
        let refused = pointsman(&[&["publish", "--url", url, "--type", "t"], wrong].concat());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(64) && said.contains(wrong[0]),
            "{said}"
        );
    }
}

#[test]
fn tail_prints_on_exit_how_to_continue() {
    let node = Node::builder().start();
    let url = node.url("");
    let mut witness = node.stream("42");
    node.publisher()
        .publish(&["a", "b"].map(|id| event(id, "t", json!({ "user": "42" }))));
    witness.next_notification(SOON);
    witness.next_notification(SOON);
    let tail = |after: &str| {
        let output = pointsman(&[
            "tail", "--url", &url, "--user", "42", "--count", "1", "--after", after,
        ]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let after = said
            .trim_end()
            .rsplit_once("--after ")
            .map(|(_, id)| id.to_owned());
        (stdout(&output), after.unwrap_or_else(|| panic!("{said}")))
    };
    let (first, after) = tail("earliest");
    let (second, _) = tail(&after);
    for wrong in ["ealiest", "10min", ""] {
        let refused = pointsman(&["tail", "--url", &url, "--user", "42", "--after", wrong]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(64)
                && said.contains("earliest, latest, a duration such as 90s"),
            "{said}"
        );
    }
    assert!(
        first.contains("\"id\":\"a\"") && second.contains("\"id\":\"b\""),
        "{first} {second}"
    );
}

#[test]
fn a_closed_output_pipe_ends_a_command_without_a_panic_message() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command::pointsman(&["config", "--defaults"])
        .stdout(writer)
        .output()
        .expect("run pointsman");
    assert_eq!(
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).as_ref()
        ),
        (Some(1), "")
    );
}

#[test]
fn the_printed_defaults_are_a_valid_configuration() {
    let defaults = stdout(&pointsman(&["config", "--defaults"]));
    let file = std::env::temp_dir().join(format!("pointsman-defaults-{}.toml", std::process::id()));
    std::fs::write(&file, format!("{defaults}\n")).expect("write it");
    // The defaults alone have no broker and neither a secret nor dev mode.
    let output = pointsman(&[
        "check-config",
        "--config",
        file.to_str().expect("UTF-8"),
        "--dev",
        "--ephemeral",
    ]);
    std::fs::remove_file(&file).expect("remove it");
    assert!(output.status.success(), "{output:?}");
}
