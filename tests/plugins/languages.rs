//! One plugin in seven languages (`examples/plugins`), one of them with two engines: built and
//! configured as the READMEs describe, and required to make identical decisions. A new project in
//! each language builds with the same toolchains.
//!
//! Requires npm and Python with venv; `make test` installs them (`scripts/need.sh`).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use pointsman::event::{EntryId, Event, Verdict};
use pointsman::ingest::pipeline::{Evaluation, Pipeline, Resolution};
use pointsman::plugin::Engine;
use pointsman::plugin::registry::Registry;
use pointsman::telemetry::metrics::Metrics;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value as Json, json};
use wasmparser::Payload;
use wit_parser::{Resolve, SizeAlign, Type, TypeDefKind};

use crate::harness::command::output_of;
use crate::harness::node::Folder;
use crate::harness::{repository, seed};

/// The time that the plugins see, in milliseconds since the Unix epoch.
const NOW_MS: u64 = 1_767_225_600_000;
const N_EVENTS: usize = 200;

/// Each folder, and the files that its `build.sh` produces.
const LANGUAGES: [(&str, &[&str]); 8] = [
    ("rust", &["build/parcels.wasm", "build/wasi/parcels.wasm"]),
    ("c", &["build/parcels.wasm"]),
    ("javascript", &["build/parcels.wasm"]),
    ("quickjs", &["build/parcels.wasm"]),
    ("python", &["build/parcels.wasm"]),
    ("go", &["build/parcels.wasm"]),
    ("zig", &["build/parcels.wasm"]),
    ("assemblyscript", &["build/parcels.wasm"]),
];

/// The files that import WASI, because a standard library or an engine needs it.
const WITH_WASI: [&str; 4] = [
    "rust/build/wasi/parcels.wasm",
    "quickjs/build/parcels.wasm",
    "go/build/parcels.wasm",
    "python/build/parcels.wasm",
];

/// The plugin built from one language.
struct Build {
    /// The name, such as `c/build/parcels.wasm`.
    name: String,
    wasm: Vec<u8>,
    /// The section `[plugins.parcels]` of the folder's README.
    settings: Json,
}

/// Builds the plugin in each language with the real toolchain, which `build.sh` installs if
/// necessary.
fn builds() -> &'static [Build] {
    static BUILDS: OnceLock<Vec<Build>> = OnceLock::new();
    BUILDS.get_or_init(build_all)
}

fn build_all() -> Vec<Build> {
    let folder = |language: &str| repository().join("examples/plugins").join(language);
    thread::scope(|scope| {
        let scripts: Vec<_> = LANGUAGES
            .map(|(language, _)| scope.spawn(move || run_build(&folder(language))))
            .into_iter()
            .collect();
        for script in scripts {
            script
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let made = LANGUAGES
        .iter()
        .flat_map(|(language, files)| files.iter().map(move |file| (*language, *file)));
    let read = |(language, file): (&str, &str)| Build {
        name: format!("{language}/{file}"),
        wasm: fs::read(folder(language).join(file)).unwrap(),
        settings: settings(&folder(language).join("README.md")),
    };
    made.map(read).collect()
}

/// The variable `PATH` with folders before those of the machine.
fn path_with(folders: impl IntoIterator<Item = PathBuf>) -> OsString {
    let path = std::env::var_os("PATH").expect("PATH is set");
    let path = folders.into_iter().chain(std::env::split_paths(&path));
    std::env::join_paths(path).expect("no folder has a colon in its name")
}

fn run_build(folder: &Path) {
    // The folder in which scripts/need.sh installs a newer Node if that of the machine is too old.
    let path = path_with([repository().join("build/tools/node_modules/.bin")]);
    // The target folder in which this test was built, regardless of CARGO_TARGET_DIR.
    let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the temporary folder is inside the target folder");
    let output = Command::new("./build.sh")
        .current_dir(folder)
        .env("PATH", path)
        .env("CARGO_TARGET_DIR", target_dir)
        .env("POINTSMAN", env!("CARGO_BIN_EXE_pointsman"))
        .output()
        .unwrap_or_else(|error| panic!("{}/build.sh cannot be run: {error}", folder.display()));
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success(),
        "{}/build.sh: {}; `make test` installs its dependencies\n{said}",
        folder.display(),
        output.status
    );
}

/// Returns the settings that a README shows to operators.
fn settings(readme: &Path) -> Json {
    let text = fs::read_to_string(readme).unwrap();
    let block = text
        .split_once("```toml\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .map(|(block, _)| block);
    let block =
        block.unwrap_or_else(|| panic!("{} does not show the configuration", readme.display()));
    let parsed: toml::Table = toml::from_str(block).unwrap();
    let settings = serde_json::to_value(&parsed["plugins"]["parcels"]).unwrap();
    assert_eq!(
        settings["config"],
        json!({"urgent_fee": 250}),
        "{}",
        readme.display()
    );
    settings
}

/// Returns a registry that holds only this plugin, and its folder.
fn registry(engine: &Engine, build: &Build, settings: Json) -> (Registry, Folder) {
    // Two tests load every build. One load at a time, so that the second finds the compiled code in
    // the cache instead of compiling the same file at the same time.
    static LOADING: Mutex<()> = Mutex::new(());
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Folder::new();
    fs::write(folder.path().join("parcels.wasm"), &build.wasm).unwrap();
    let config =
        serde_json::from_value(json!({"dir": folder.path(), "parcels": settings})).unwrap();
    (
        Registry::load(engine.clone(), config, Metrics::default()).unwrap(),
        folder,
    )
}

/// Returns the imports of a core module or a component.
fn imports(wasm: &[u8]) -> BTreeSet<String> {
    let mut imports = BTreeSet::new();
    let mut depth = 0;
    for payload in wasmparser::Parser::new(0).parse_all(wasm) {
        match payload.unwrap() {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth -= 1,
            Payload::ImportSection(section) if depth == 0 => {
                imports.extend(
                    section
                        .into_imports()
                        .map(|import| import.unwrap().module.to_owned()),
                );
            }
            Payload::ComponentImportSection(section) if depth == 0 => {
                imports.extend(
                    section
                        .into_iter()
                        .map(|import| import.unwrap().name.name.to_owned()),
                );
            }
            _ => {}
        }
    }
    imports
}

fn event(document: &str) -> Event {
    Event::from_json(EntryId { ms: NOW_MS, seq: 0 }, "/test", document.as_bytes())
        .unwrap_or_else(|error| panic!("{error}: {document}"))
}

/// Whether a document has an integer that a double cannot hold. componentize-qjs passes integers as
/// doubles, so a plugin with QuickJS sees another number.
fn is_beyond_double(document: &str) -> bool {
    document
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse::<u64>().ok())
        .any(|integer| integer > 1 << 53)
}

/// Returns the whole decision in a form in which equal decisions compare equal: a body by its
/// parsed value, and without the hash of the plugin file.
fn decision(evaluation: &Evaluation) -> Json {
    let resolution = match &evaluation.resolution {
        Resolution::Planned(plan) => json!({ "routes": plan }),
        Resolution::Discarded { reason, .. } => json!({ "discarded": reason }),
        Resolution::Unrouted => json!("unrouted"),
        Resolution::Failed {
            reason,
            attempts,
            retry,
            ..
        } => json!({ "failed": reason, "attempts": attempts, "retry": retry }),
    };
    let verdicts: Vec<_> = evaluation
        .verdicts
        .iter()
        .map(|by| Verdict {
            hash: String::new(),
            ..by.clone()
        })
        .collect();
    json!({ "event": evaluation.event.to_json(), "verdicts": verdicts, "resolution": resolution })
}

/// Events that implementations tend to treat differently, with the expected resolution of some of
/// them.
fn odd_events() -> Vec<(&'static str, Option<Json>)> {
    let user = |to: &str| json!([format!("u:{to}")]);
    let failed =
        |reason: &str, retry: bool| Some(json!({"failed": reason, "attempts": 1, "retry": retry}));
    let no_customer = || {
        failed(
            "the event has no customer; set the attribute customer to a text or an integer",
            false,
        )
    };
    let no_number = || {
        failed(
            "the payload has no parcel number; set /number to a text or an integer",
            false,
        )
    };
    let no_place = || {
        failed(
            "the payload has no place; set place in the last element of /steps",
            false,
        )
    };
    let moved = |number: &str, place: &str, stops: u64| {
        Some(
            json!({"routes": [{"by": "parcels", "to": user("ann"), "priority": "low", "expires_ms": NOW_MS + 6 * 3_600_000,
            "collapse": format!("parcel-{number}"), "event_name": "parcel", "body": {"number": number, "place": place, "stops": stops}}]}),
        )
    };
    vec![
        // Integers that a double cannot represent exactly, and integers beyond 64 bits.
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":9007199254740993,"steps":[{"place":"Graz"}]}}"#,
            moved("9007199254740993", "Graz", 1),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":-9223372036854775808,"steps":[{},{"place":"Łódź 📦"}]}}"#,
            moved("-9223372036854775808", "Łódź 📦", 2),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":18446744073709551615,"steps":[{"place":"Graz"}]}}"#,
            moved("18446744073709551615", "Graz", 1),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":1.0,"steps":[{"place":"Graz"}]}}"#,
            no_number(),
        ),
        // Escapes in values and names. Of duplicate names, the last counts.
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","\u0073teps":[{"pl\u0061ce":"a\"\\\/\b\f\n\r\t\u0000\u001f\u007f\u20ac\ud83d\ude00</script>"}]}}"#,
            moved("7", "a\"\\/\u{8}\u{c}\n\r\t\0\u{1f}\u{7f}€😀</script>", 1),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"steps":[1],"number":6,"number":"7","steps":[{"place":"a","place":"b"}]}}"#,
            moved("7", "b", 1),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"x":{"steps":[],"}":"{[\"]"},"number":"7","steps":[[{"place":"x"}],{"place":" "}]}}"#,
            moved("7", " ", 2),
        ),
        // Invalid steps.
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7"}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":[]}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":{"0":{"place":"Graz"}}}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":"Graz"}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":[{"place":"Graz"},null]}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":[{"place":"Graz"},["place"]]}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":[{"place":""}]}}"#,
            no_place(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":{"number":"7","steps":[{"place":["Graz"]}]}}"#,
            no_place(),
        ),
        // Payloads other than a JSON object.
        (r#"{"type":"parcel.moved","customer":"ann"}"#, no_number()),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":"Graz"}"#,
            no_number(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","data":[{"place":"Graz"}]}"#,
            no_number(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","datacontenttype":"text/plain","data":"Graz"}"#,
            no_number(),
        ),
        (
            r#"{"type":"parcel.moved","customer":"ann","datacontenttype":"application/x","data_base64":"/wD+"}"#,
            no_number(),
        ),
        // Invalid customers, and the order of the checks.
        (r#"{"type":"parcel.moved"}"#, no_customer()),
        (
            r#"{"type":"parcel.moved","customer":"","data":{"number":"7","steps":[{"place":"Graz"}]}}"#,
            no_customer(),
        ),
        (r#"{"type":"parcel.held","customer":true}"#, no_customer()),
        (
            r#"{"type":"parcel.delivered","customer":4.0}"#,
            no_customer(),
        ),
        (
            r#"{"type":"parcel.held","customer":"ann","data":{"fee":"300"}}"#,
            failed("the fee is not known yet", true),
        ),
        (
            r#"{"type":"parcel.held","customer":"ann","data":{"fee":null}}"#,
            failed("the fee is not known yet", true),
        ),
        // Decisions that the host does not accept.
        (
            r#"{"type":"parcel.delivered","customer":"ann","data":{"number":"a\nb"}}"#,
            None,
        ),
        (
            r#"{"type":"parcel.delivered","customer":"ann","depot":"graz","data":{"number":""}}"#,
            no_number(),
        ),
        // Filters.
        (
            r#"{"type":"parcel.moved","test":true}"#,
            Some(json!({"discarded": "test event"})),
        ),
        (
            r#"{"type":"parcel.moved","test":"true"}"#,
            Some(json!({"discarded": "test event"})),
        ),
        (
            r#"{"type":"parcel.lost","test":1,"time":"2025-12-25T00:00:00Z"}"#,
            Some(json!("unrouted")),
        ),
        (
            r#"{"type":"parcel.lost","time":"2025-12-24T23:59:59.999Z"}"#,
            Some(json!({"discarded": "older than 7 days"})),
        ),
        (
            r#"{"type":"parcel.lost","time":"9999-12-31T23:59:59Z"}"#,
            Some(json!("unrouted")),
        ),
        (
            r#"{"type":"parcel.delivered","customer":42,"depot":"graz","data":{"number":7,"hours_late":24.0}}"#,
            Some(
                json!({"routes": [{"by": "parcels", "to": ["u:42", "g:depot-graz"], "priority": "high", "collapse": "parcel-7", "event_name": "parcel"}]}),
            ),
        ),
        (
            r#"{"type":"parcel.delivered","customer":42,"depot":7,"priority":"urgent","data":{"number":7,"hours_late":99}}"#,
            Some(
                json!({"routes": [{"by": "parcels", "to": ["u:42"], "priority": "urgent", "collapse": "parcel-7", "event_name": "parcel"}]}),
            ),
        ),
        // Conditions.
        (
            r#"{"type":"parcel.held","customer":"ann","data":{"fee":250}}"#,
            Some(json!({"routes": [
                {"by": "parcels", "to": user("ann"), "priority": "urgent", "event_name": "parcel"},
                {"by": "parcels", "to": ["g:customs"], "priority": "normal", "expires_ms": NOW_MS + 12 * 3_600_000, "slot": "customs", "when": [
                    [{"attribute": "shift", "operator": "equals", "values": ["day"]}],
                    [{"attribute": "role", "operator": "one-of", "values": ["lead", "stand-in"]},
                     {"attribute": "open", "operator": "less", "values": [50]}]]}]})),
        ),
        (
            r#"{"type":"parcel.held","customer":"ann","data":{"fee":249.99999999999997}}"#,
            None,
        ),
        (
            r#"{"type":"parcel.recalled","data":{"number":7,"heavier_than":9223372036854775807}}"#,
            Some(
                json!({"routes": [{"by": "parcels", "to": ["all"], "priority": "urgent", "expires_ms": NOW_MS + 24 * 3_600_000,
                "collapse": "recall-7", "event_name": "recall", "when": [
                    [{"attribute": "staff", "operator": "present"}],
                    [{"attribute": "weight", "operator": "greater", "values": [9_223_372_036_854_775_807_i64]}]]}]}),
            ),
        ),
        (
            r#"{"type":"parcel.recalled","data":{"number":7,"heavier_than":-0.0}}"#,
            None,
        ),
        (
            r#"{"type":"parcel.recalled","data":{"number":7,"heavier_than":"2"}}"#,
            None,
        ),
        (r#"{"type":"parcel.recalled"}"#, no_number()),
        // Types for which the plugin is not called or returns no route.
        (
            r#"{"type":"letter.moved","customer":"ann"}"#,
            Some(json!("unrouted")),
        ),
        (
            r#"{"type":"parcel.","customer":"ann"}"#,
            Some(json!("unrouted")),
        ),
    ]
}

/// Returns a random event, as JSON text.
fn any_event(random: &mut StdRng) -> String {
    const ATTRIBUTES: [(&str, &[&str]); 6] = [
        (
            "customer",
            &[
                r#""ann""#,
                r#""ann""#,
                r#""Zoë Ω 📦""#,
                "42",
                "-7",
                "9223372036854775807",
                "1.5",
                "false",
                r#""""#,
                r#"["a","b"]"#,
            ],
        ),
        ("depot", &[r#""graz""#, r#""łódź""#, r#""""#, "7", "true"]),
        ("late", &["true", "false", r#""true""#, "1"]),
        ("test", &["false", "false", "false", "0", r#""no""#, "true"]),
        (
            "priority",
            &[
                r#""low""#,
                r#""normal""#,
                r#""high""#,
                r#""urgent""#,
                r#""highest""#,
                "3",
            ],
        ),
        (
            "time",
            &[
                r#""2026-01-01T00:00:00Z""#,
                r#""2025-12-31T23:00:00.123Z""#,
                r#""2031-01-01T00:00:00Z""#,
                r#""2020-01-01T00:00:00Z""#,
            ],
        ),
    ];
    const FIELDS: [(&str, &[&str]); 6] = [
        (
            "number",
            &[
                "7",
                r#""P-7""#,
                "9007199254740993",
                "-1",
                "1e3",
                "true",
                "null",
                "[1,2]",
                r#"{"a":1}"#,
                r#""été\u0020""#,
            ],
        ),
        (
            "fee",
            &[
                "250",
                "249.99",
                "1e2",
                "-0.5",
                "9007199254740993",
                "null",
                r#""1""#,
            ],
        ),
        (
            "heavier_than",
            &["2", "2.5", "-9223372036854775808", "1e308", r#""2""#, "[]"],
        ),
        ("hours_late", &["24", "23.999", "1e9", r#""30""#, "false"]),
        (
            "steps",
            &[
                r#"[{"place":"Graz"}]"#,
                r#"[{"at":1,"place":"Graz"},{"place":"\u013b\"x\"\u2028","at":[{}]}]"#,
                "[]",
                "[0]",
                "null",
                r#"[{"place":1}]"#,
            ],
        ),
        (
            "note",
            &[
                r#""""#,
                r#""\\\"}]""#,
                "[[[[]]]]",
                "1.5e-3",
                r#"{"steps":{"place":"no"}}"#,
            ],
        ),
    ];
    let kind = [
        "moved",
        "moved",
        "moved",
        "delivered",
        "delivered",
        "held",
        "held",
        "recalled",
        "lost",
        "Moved",
    ][random.random_range(0..10)];
    let mut members = vec![format!(r#""type":"parcel.{kind}""#)];
    let mut pick = |from: &[(&str, &[&str])], chance: f64| -> Vec<String> {
        let chosen: Vec<_> = from.iter().filter(|_| random.random_bool(chance)).collect();
        chosen
            .into_iter()
            .map(|(name, values)| {
                format!(
                    r#""{name}":{}"#,
                    values[random.random_range(0..values.len())]
                )
            })
            .collect()
    };
    members.extend(pick(&ATTRIBUTES[..1], 0.9));
    members.extend(pick(&ATTRIBUTES[1..], 0.4));
    let fields = pick(&FIELDS, 0.8);
    members.push(format!(r#""data":{{{}}}"#, fields.join(",")));
    format!("{{{}}}", members.join(","))
}

#[tokio::test]
async fn the_plugin_makes_the_same_decisions_in_every_language() {
    let builds = builds();
    let (mut random, _) = seed::generator("languages");
    let odd = odd_events();
    let mut documents: Vec<String> = odd
        .iter()
        .map(|(document, _)| (*document).to_owned())
        .collect();
    documents.resize_with(N_EVENTS, || any_event(&mut random));
    let engine = crate::harness::engine();
    let mut first: Option<Vec<Json>> = None;
    for build in builds {
        // The limits of a production node, except for the deadline: this machine may be busy with
        // other tests.
        let mut settings = build.settings.clone();
        settings["deadline"] = json!("5s");
        let (registry, _folder) = registry(&engine, build, settings);
        let states = registry.states();
        assert!(
            states[0].failure.is_none(),
            "{}: {:?}",
            build.name,
            states[0].failure
        );
        let pipeline = Pipeline::start(Arc::new(registry), false, Metrics::default()).unwrap();
        let evaluations = pipeline
            .evaluate(
                documents.iter().map(|document| event(document)).collect(),
                NOW_MS,
            )
            .await
            .unwrap();
        let decisions: Vec<Json> = evaluations.iter().map(decision).collect();
        let is_passed =
            |document: &str| !(build.name.starts_with("quickjs") && is_beyond_double(document));
        for ((document, expect), decision) in odd.iter().zip(&decisions) {
            if let Some(expect) = expect.as_ref().filter(|_| is_passed(document)) {
                assert_eq!(
                    decision["resolution"], *expect,
                    "{} on {document}",
                    build.name
                );
            }
        }
        let compared: Vec<(usize, &String)> = documents
            .iter()
            .enumerate()
            .filter(|(_, document)| is_passed(document))
            .collect();
        assert!(compared.len() > N_EVENTS / 2, "{}", build.name);
        for (at, document) in compared {
            let same = first.as_ref().map_or(&decisions[at], |first| &first[at]);
            assert_eq!(
                decisions[at], *same,
                "{} and {} on {document}",
                build.name, builds[0].name
            );
        }
        first.get_or_insert(decisions);
    }
    // Rules out agreement by failing on every event: about a fifth of the random events are routed.
    let decisions = first.expect("there are builds");
    assert_eq!(decisions.len(), N_EVENTS);
    let words: BTreeSet<_> = decisions
        .iter()
        .flat_map(|decision| {
            decision["verdicts"]
                .as_array()
                .unwrap()
                .iter()
                .map(|verdict| verdict["verdict"].to_string())
        })
        .collect();
    assert_eq!(
        words.into_iter().collect::<Vec<_>>(),
        [
            "\"amend\"",
            "\"drop\"",
            "\"failed\"",
            "\"keep\"",
            "\"none\"",
            "\"rejected\"",
            "\"retry\"",
            "\"routes\""
        ]
    );
    assert!(decisions.iter().all(|decision| {
        !decision["resolution"]["failed"]
            .to_string()
            .contains("trapped")
    }));
    assert!(
        decisions
            .iter()
            .filter(|decision| decision["resolution"]["routes"].is_array())
            .count()
            > N_EVENTS / 10
    );
}

#[test]
fn the_plugin_imports_only_the_contract_unless_its_language_needs_wasi() {
    for build in builds() {
        let others: Vec<_> = imports(&build.wasm)
            .into_iter()
            .filter(|name| !name.starts_with("pointsman:plugin/"))
            .collect();
        assert_eq!(
            others.is_empty(),
            !WITH_WASI.contains(&build.name.as_str()),
            "{}: {others:?}",
            build.name
        );
    }
}

#[test]
fn an_invalid_configuration_is_rejected_with_the_same_text_in_every_language() {
    let engine = crate::harness::engine();
    for build in builds() {
        let mut settings = build.settings.clone();
        settings["config"] = json!({"urgent_fee": -1});
        let (registry, _folder) = registry(&engine, build, settings);
        let reason = registry.states()[0].failure.clone();
        let expected =
            "parcels.wasm rejects its configuration: urgent_fee: use a number of 0 or more";
        assert_eq!(reason.as_deref(), Some(expected), "{}", build.name);
    }
}

#[test]
fn a_new_project_in_every_language_builds_and_passes_its_golden_test() {
    // Their toolchains are those of the examples.
    builds();
    let examples = repository().join("examples/plugins");
    let tools = |folder: &str| examples.join(folder).join("build/venv/bin");
    let path = path_with([
        tools("go"),
        tools("c"),
        tools("python"),
        repository().join("build/tools/node_modules/.bin"),
    ]);
    let folder = Folder::new();
    let command = |program: &str, directory: &Path| {
        let mut command = Command::new(program);
        command
            .current_dir(directory)
            .env("PATH", &path)
            .env("GOTOOLCHAIN", "local")
            .env("GOCACHE", examples.join("go/build/cache"))
            .env("ZIG_GLOBAL_CACHE_DIR", examples.join("zig/build/cache"));
        command
    };
    let pointsman = env!("CARGO_BIN_EXE_pointsman");
    let is_long = std::env::var_os("LONG").is_some_and(|long| long != "0");
    for (language, kind, other, has_packages) in [
        ("go", "router", "filter", false),
        ("zig", "filter", "router", false),
        ("assemblyscript", "router", "filter", true),
        ("javascript", "filter", "router", true),
        ("typescript", "router", "filter", true),
        ("python", "filter", "router", false),
        ("c", "router", "filter", false),
    ] {
        for kind in [kind, other].into_iter().take(1 + usize::from(is_long)) {
            let name = format!("{language}-{kind}");
            let new = ["plugin", "new", &name, "--kind", kind, "--lang", language];
            let made = output_of(command(pointsman, folder.path()).args(new));
            assert!(made.contains("pointsman plugin test"), "{made}");
            let project = folder.path().join(&name);
            assert!(project.join("wit/plugin.wit").exists());
            if has_packages {
                output_of(command("npm", &project).args([
                    "install",
                    "--silent",
                    "--no-audit",
                    "--no-fund",
                    "--prefer-offline",
                ]));
            }
            // This machine may be busy with other tests, and Python needs more memory than the
            // default.
            let settings = project.join("pointsman.toml");
            let section = format!("[plugins.{name}]\ndeadline = '5s'\nmemory_mib = 64\n");
            fs::write(settings, section).unwrap();
            let test = ["plugin", "test", "--settings", "pointsman.toml"];
            let tested = output_of(command(pointsman, &project).args(test));
            let expected = "4 events, all decisions match ./golden.json";
            assert!(tested.contains(expected), "{name}: {tested}");
        }
    }
}

/// The rows of the tables of a page whose first cell names one type, without the name's backquotes.
fn rows(page: &str) -> Vec<Vec<&str>> {
    page.lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"))
        .map(|row| {
            row.split(" | ")
                .map(|cell| cell.trim_matches('`'))
                .collect()
        })
        .collect()
}

#[test]
fn the_page_without_bindings_has_the_layouts_of_the_contract() {
    let page = fs::read_to_string(repository().join("docs/plugins-without-bindings.md")).unwrap();
    let mut contract = Resolve::default();
    contract.push_path(repository().join("wit")).unwrap();
    let mut layout = SizeAlign::default();
    layout.fill(&contract);
    let rows = rows(&page);
    let mut n_checked = 0;
    for (id, definition) in contract.types.iter() {
        let Some(name) = &definition.name else {
            continue;
        };
        let ty = Type::Id(id);
        let size = layout.size(&ty).size_wasm32().to_string();
        let alignment = layout.align(&ty).align_wasm32().to_string();
        let last = match &definition.kind {
            // Never in memory as a whole.
            TypeDefKind::Record(_) if name == "event" => continue,
            TypeDefKind::Record(record) => layout
                .field_offsets(record.fields.iter().map(|field| &field.ty))
                .iter()
                .zip(&record.fields)
                .map(|((offset, _), field)| format!("{} {}", field.name, offset.size_wasm32()))
                .collect::<Vec<_>>()
                .join(", "),
            TypeDefKind::Variant(_) if name == "payload" => continue,
            TypeDefKind::Variant(variant) => layout
                .payload_offset(
                    variant.tag(),
                    variant.cases.iter().map(|case| case.ty.as_ref()),
                )
                .size_wasm32()
                .to_string(),
            _ => continue,
        };
        let row = rows.iter().find(|row| row[0] == name && row.len() == 4);
        let row = row.unwrap_or_else(|| panic!("{name} is not in the page"));
        assert_eq!(row[1..], [size, alignment, last], "{name}");
        n_checked += 1;
    }
    assert!(n_checked > 10, "{n_checked} layouts were compared");
}

/// Returns the words of a declaration: those between `begin` and `end`, in lower case and without
/// separators, because each language writes `not-one-of` in its own way.
fn words_between(source: &str, begin: &str, end: &str) -> Vec<String> {
    let words = source
        .split_once(begin)
        .and_then(|(_, rest)| rest.split_once(end))
        .map(|(words, _)| words);
    let words = words.unwrap_or_else(|| panic!("{begin} ... {end} is not in {source}"));
    words
        .split(|c: char| !(c.is_alphanumeric() || c == '-' || c == '_'))
        .map(|word| word.replace(['-', '_'], "").to_lowercase())
        .filter(|word| !word.is_empty())
        .collect()
}

#[test]
fn the_files_without_generated_bindings_have_the_cases_of_the_contract_in_order() {
    let contract = fs::read_to_string(repository().join("wit/types.wit")).unwrap();
    let contract: String = contract
        .lines()
        .filter(|line| !line.trim_start().starts_with("///"))
        .collect();
    for (name, go_first) in [("Priority", "Low"), ("Operator", "Equals")] {
        let begin = format!("enum {} {{", name.to_lowercase());
        let cases = words_between(&contract, &begin, "}");
        assert!(cases.len() > 3, "{cases:?}");
        for (file, begin, end) in [
            (
                "examples/plugins/go/pointsman/contract.go",
                format!("\t{go_first} {name} = iota"),
                ")",
            ),
            (
                "examples/plugins/zig/contract.zig",
                format!("pub const {name} = enum(u8) {{"),
                "}",
            ),
            (
                "examples/plugins/assemblyscript/pointsman/contract.ts",
                format!("export enum {name} {{"),
                "}",
            ),
            (
                "host/templates/plugin/typescript/contract.d.ts",
                format!("  type {name} ="),
                ";",
            ),
        ] {
            let source = fs::read_to_string(repository().join(file)).unwrap();
            let mut found = words_between(&source, &begin, end);
            if file.ends_with(".go") {
                // It is on the line of `iota`.
                found.insert(0, go_first.to_lowercase());
            }
            assert_eq!(found, cases, "{name} in {file}");
        }
    }
}
