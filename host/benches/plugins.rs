//! Measures a plugin call against the same decision in native code, and loading a new version
//! against compiling it. All bounds are ratios within one run.
//!
//! The guest is `tests/harness/guests/costs`, compiled like a plugin; the native version calls it
//! as a library. The contenders take turns and the median of the turns is shown, so that other load
//! on the machine affects all of them alike.

#![expect(
    clippy::print_stdout,
    reason = "the output is the purpose of this program"
)]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use costs::{ATTRIBUTES, Config as Costs, FIELDS, From};
use pointsman::event::{EntryId, Event, Name, Priority};
use pointsman::ingest::pipeline::Pipeline;
use pointsman::plugin::registry::Registry;
use pointsman::plugin::registry::settings::Config;
use pointsman::plugin::registry::watcher::Watcher;
use pointsman::plugin::{Call, Engine, Instance, Limits, ParsedPayload, Plugin, Role};
use pointsman::shutdown::Shutdown;
use pointsman::telemetry::metrics::Metrics;
use pointsman_plugin::{Plugin as _, Router as _, testing};
use serde_json::{Value, json};

const TURNS: usize = 41;
const CALLS: u32 = 2_000;

fn main() {
    let file = build();
    let bytes = std::fs::read(file.join("costs.wasm")).expect("the guest was just built");
    calls(&bytes);
    idle(&file);
    loads(&file);
}

/// Builds the guests like plugins and returns the folder of the files.
fn build() -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("host/ is in the repository");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the folder for temporary files is in the target folder");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(repository).args([
        "build",
        "--quiet",
        "--profile",
        "plugin",
        "--target",
        "wasm32-unknown-unknown",
        "--target-dir",
    ]);
    let status = cargo
        .arg(target)
        .args(["-p", "costs", "-p", "address", "-p", "rules"])
        .status()
        .expect("run cargo");
    assert!(
        status.success(),
        "the guests do not build; if the target is missing, run: rustup target add wasm32-unknown-unknown"
    );
    target.join("wasm32-unknown-unknown/plugin")
}

/// A typical order of about 300 bytes.
fn payload() -> Value {
    json!({
        "customer": { "id": "c-4711", "name": "Ada Lovelace", "tier": "gold" },
        "order": { "id": 1742, "region": "eu-central", "total": 129.95, "express": false,
            "lines": [{ "sku": "A-100", "n": 2, "price": 19.95 }, { "sku": "B-7", "n": 1, "price": 90.05 }] },
        "seller": "s-12", "placed": "2026-01-01T12:00:00Z", "note": "leave it with the neighbours",
    })
}

/// The same order, with its fields as attributes if the contender reads those.
fn event(from: From) -> Event {
    let mut document = json!({ "id": "e", "source": "/shop", "type": "order.placed" });
    let data = payload();
    for (attribute, field) in ATTRIBUTES
        .iter()
        .zip(FIELDS)
        .filter(|_| from == From::Attributes)
    {
        // CloudEvents attributes cannot hold fractional numbers.
        let value = data.pointer(field).expect("a field");
        document[attribute] = if value.is_f64() {
            json!(129)
        } else {
            value.clone()
        };
    }
    if from != From::Attributes {
        document["data"] = data;
    }
    Event::from_json(
        EntryId { ms: 1, seq: 0 },
        "/shop",
        document.to_string().as_bytes(),
    )
    .expect("a valid event")
}

/// One implementation of the decision; `run` returns the time of the given number of calls.
struct Contender {
    name: &'static str,
    run: Box<dyn FnMut(u32) -> Duration>,
    turns: Vec<f64>,
}

impl Contender {
    fn plugin(engine: &Engine, bytes: &[u8], name: &'static str, from: From) -> Self {
        let word = match from {
            From::Nothing => "nothing",
            From::Attributes => "attributes",
            From::Fields => "fields",
            From::Payload => "payload",
        };
        let config = json!({ "from": word }).to_string();
        let plugin = Plugin::load(
            engine,
            Name::parse("costs").expect("a name"),
            bytes,
            &config,
            Limits::default(),
        )
        .expect("a valid plugin");
        let (engine, event) = (engine.clone(), event(from));
        let mut slot: Option<Instance> = None;
        let run = move |n: u32| {
            let ticking = engine.ticking();
            let began = Instant::now();
            for _ in 0..n {
                let payload = ParsedPayload::default();
                let call = Call {
                    event: black_box(&event),
                    priority: Priority::Normal,
                    clock_ms: 1,
                    payload: &payload,
                };
                black_box(
                    plugin
                        .call(&mut slot, &ticking, Role::Router, &call)
                        .expect("an answer"),
                );
            }
            began.elapsed()
        };
        Self {
            name,
            run: Box::new(run),
            turns: Vec::new(),
        }
    }

    fn native(name: &'static str, from: From) -> Self {
        let plugin = costs::Costs::new(Costs { from }).expect("a valid configuration");
        let data = payload();
        let mut event = testing::event("order.placed");
        for (n, field) in FIELDS.iter().enumerate() {
            let value = match data.pointer(field).expect("a field") {
                Value::String(text) => pointsman_plugin::Value::Text(text.clone()),
                Value::Bool(flag) => pointsman_plugin::Value::Flag(*flag),
                number => pointsman_plugin::Value::Decimal(number.as_f64().expect("a number")),
            };
            event = event.attribute(
                if from == From::Attributes {
                    ATTRIBUTES[n]
                } else {
                    field
                },
                value,
            );
        }
        let event = event
            .json(&data)
            .seen_by(&plugin)
            .expect("it selects every event");
        let run = move |n: u32| {
            let began = Instant::now();
            for _ in 0..n {
                black_box(plugin.resolve(black_box(&event)).expect("an answer"));
            }
            began.elapsed()
        };
        Self {
            name,
            run: Box::new(run),
            turns: Vec::new(),
        }
    }

    fn nanoseconds(&self) -> f64 {
        let mut turns = self.turns.clone();
        turns.sort_by(f64::total_cmp);
        turns[turns.len() / 2]
    }
}

fn calls(bytes: &[u8]) {
    let engine = Engine::new().expect("an engine");
    let mut contenders = [
        Contender::plugin(&engine, bytes, "plugin: no-op", From::Nothing),
        Contender::plugin(
            &engine,
            bytes,
            "plugin: six declared attributes",
            From::Attributes,
        ),
        Contender::plugin(
            &engine,
            bytes,
            "plugin: six declared fields, found by the host",
            From::Fields,
        ),
        Contender::plugin(&engine, bytes, "plugin: parses the payload", From::Payload),
        Contender::native("native: no-op", From::Nothing),
        Contender::native("native: six attributes", From::Attributes),
        Contender::native("native: parses the payload", From::Payload),
    ];
    for _ in 0..TURNS {
        for contender in &mut contenders {
            let took = (contender.run)(CALLS);
            contender
                .turns
                .push(took.as_secs_f64() * 1e9 / f64::from(CALLS));
        }
    }
    let [
        no_op,
        attributes,
        fields,
        parses,
        _,
        native_attributes,
        native_parses,
    ] = &contenders;
    println!("\nA call about one event (median of {TURNS} turns of {CALLS} calls)\n");
    println!(
        "{:<50} {:>9} {:>14} {:>14}",
        "", "ns", "to a no-op", "to native"
    );
    for contender in &contenders {
        let to_native = match contender.name {
            name if name == attributes.name || name == fields.name => Some(native_attributes),
            name if name == parses.name => Some(native_parses),
            _ => None,
        };
        let to_native = to_native
            .map(|native| format!("{:.2}", contender.nanoseconds() / native.nanoseconds()))
            .unwrap_or_default();
        let to_no_op = contender.nanoseconds() / no_op.nanoseconds();
        println!(
            "{:<50} {:>9.0} {to_no_op:>14.2} {to_native:>14}",
            contender.name,
            contender.nanoseconds()
        );
    }
    let bounds = [
        (
            "declared attributes, relative to a no-op",
            attributes.nanoseconds() / no_op.nanoseconds(),
            10.0,
        ),
        (
            "declared fields, relative to a no-op",
            fields.nanoseconds() / no_op.nanoseconds(),
            10.0,
        ),
        (
            "a parsed payload, relative to native",
            parses.nanoseconds() / native_parses.nanoseconds(),
            2.5,
        ),
    ];
    judge(&bounds);
}

/// Measures the evaluation of an event and the text of its decision record, alone and among 31
/// plugins that do not handle its type.
fn idle(file: &Path) {
    const EVENTS: usize = 64;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let engine = Engine::new().expect("an engine");
    let folders: Vec<PathBuf> = [0, 31]
        .into_iter()
        .map(|n| {
            let dir = std::env::temp_dir()
                .join(format!("pointsman-bench-idle-{n}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).expect("a folder");
            let copy = |from: &str, to: String| {
                std::fs::copy(file.join(from), dir.join(to)).expect("a copy");
            };
            copy("address.wasm", "address.wasm".to_owned());
            (0..n).for_each(|n| copy("rules.wasm", format!("idle-{n}.wasm")));
            dir
        })
        .collect();
    let pipelines: Vec<Pipeline> = folders
        .iter()
        .map(|dir| {
            let rule =
                json!({ "rules": [{ "match": { "type": "never" }, "to": { "user": "1" } }] });
            let config = json!({ "dir": dir });
            let mut config: Config = serde_json::from_value(config).expect("a configuration");
            for n in 0..31 {
                let settings = json!({ "config": rule });
                let settings = serde_json::from_value(settings).expect("settings");
                config.plugins.insert(format!("idle-{n}"), settings);
            }
            let registry =
                Registry::load(engine.clone(), config, Metrics::default()).expect("plugins");
            Pipeline::start(Arc::new(registry), false, Metrics::default()).expect("threads")
        })
        .collect();
    let event = Event::from_json(
        EntryId { ms: 1, seq: 0 },
        "/shop",
        json!({ "id": "e", "source": "/shop", "type": "order.placed", "user": "42" })
            .to_string()
            .as_bytes(),
    )
    .expect("a valid event");
    let mut turns = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        for (pipeline, turns) in pipelines.iter().zip(&mut turns) {
            let began = Instant::now();
            for _ in 0..CALLS / EVENTS as u32 {
                let events = vec![event.clone(); EVENTS];
                let evaluations = runtime
                    .block_on(pipeline.evaluate(events, 1))
                    .expect("plugins are active");
                for evaluation in evaluations {
                    black_box(serde_json::to_vec(&evaluation.verdicts).expect("JSON"));
                }
            }
            turns.push(began.elapsed());
        }
    }
    let [alone, among] = turns.map(|turns| median(turns).as_secs_f64());
    println!("\nAn event among 31 plugins that do not handle its type\n");
    judge(&[("relative to none of them", among / alone, 1.1)]);
    for dir in folders {
        // Best effort, as in `loads`.
        drop(std::fs::remove_dir_all(dir));
    }
}

fn judge(bounds: &[(&str, f64, f64)]) {
    println!();
    for (what, ratio, most) in bounds {
        println!(
            "{} {what}: {ratio:.2}, bound {most}",
            if ratio <= most {
                "ok:      "
            } else {
                "EXCEEDED:"
            }
        );
    }
}

/// Measures the time from the last byte of a new version to its first decision, against compiling
/// alone.
fn loads(file: &Path) {
    let dir = std::env::temp_dir().join(format!("pointsman-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    println!(
        "\nFrom the last byte to active (median of {} uploads)\n",
        TURNS / 4
    );
    println!(
        "{:<20} {:>9} {:>16} {:>14} {:>9}",
        "", "KB", "compiled alone", "upload", "ratio"
    );
    let mut bounds = Vec::new();
    for name in ["address", "costs", "rules"] {
        let bytes =
            std::fs::read(file.join(format!("{name}.wasm"))).expect("the guest was just built");
        let (mut alone, mut uploaded) = (Vec::new(), Vec::new());
        let config = Config {
            dir: Some(dir.clone()),
            ..uncached()
        };
        let registry = Registry::load(
            Engine::new().expect("an engine"),
            config,
            Metrics::default(),
        )
        .expect("an empty folder");
        for n in 0..TURNS / 4 {
            // An extra custom section makes it a different file that has not been compiled before.
            let version = with_section(&bytes, n as u32);
            let component = component(&version);
            let engine = wasmtime::Engine::new(wasmtime::Config::new().epoch_interruption(true))
                .expect("an engine");
            let began = Instant::now();
            black_box(
                wasmtime::component::Component::from_binary(&engine, &component)
                    .expect("it compiles"),
            );
            alone.push(began.elapsed());
            let began = Instant::now();
            registry
                .upload(name, &version, false)
                .expect("a valid plugin");
            uploaded.push(began.elapsed());
        }
        let (alone, uploaded) = (median(alone), median(uploaded));
        let ratio = uploaded.as_secs_f64() / alone.as_secs_f64();
        println!(
            "{name:<20} {:>9} {alone:>16.1?} {uploaded:>14.1?} {ratio:>9.2}",
            bytes.len() / 1000
        );
        if name == "costs" {
            bounds.push(("a new version, relative to compiling alone", ratio, 1.5));
        }
    }
    bounds.push((
        "seconds until a written file counts as settled",
        settling(file, &dir).as_secs_f64(),
        0.25,
    ));
    judge(&bounds);
    // Best effort: leftovers in the folder for temporary files are harmless.
    drop(std::fs::remove_dir_all(dir));
}

/// The time from a file in place to its first decision, minus the time of its upload: the delay of
/// the watcher.
fn settling(file: &Path, dir: &Path) -> Duration {
    let bytes = std::fs::read(file.join("costs.wasm")).expect("the guest was just built");
    let dir = dir.join("watched");
    std::fs::create_dir_all(&dir).expect("a folder");
    let config = Config {
        dir: Some(dir.clone()),
        ..uncached()
    };
    let registry = Arc::new(
        Registry::load(
            Engine::new().expect("an engine"),
            config,
            Metrics::default(),
        )
        .expect("an empty folder"),
    );
    let _watcher = Watcher::start(Arc::clone(&registry), Shutdown::new().alarm("the watcher"))
        .expect("a thread");
    let mut waits = Vec::new();
    for n in 0..TURNS as u32 / 4 {
        let generation = || {
            registry
                .states()
                .first()
                .map_or(0, |plugin| plugin.generation)
        };
        let before = generation();
        let draft = dir.join(".draft");
        std::fs::write(&draft, with_section(&bytes, 1000 + 2 * n)).expect("a file");
        let began = Instant::now();
        std::fs::rename(&draft, dir.join("costs.wasm")).expect("the same folder");
        while generation() == before {
            std::thread::sleep(Duration::from_micros(200));
        }
        let watched = began.elapsed();
        let began = Instant::now();
        registry
            .upload("costs", &with_section(&bytes, 1001 + 2 * n), false)
            .expect("a valid plugin");
        waits.push(watched.saturating_sub(began.elapsed()));
    }
    median(waits)
}

/// Without a cache, because a new version is measured.
fn uncached() -> Config {
    Config::default()
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort();
    of[of.len() / 2]
}

fn with_section(bytes: &[u8], number: u32) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    // Section 0, of 6 bytes: a name of one byte, and the number.
    bytes.extend([0, 6, 1, b'n']);
    bytes.extend(number.to_le_bytes());
    bytes
}

fn component(bytes: &[u8]) -> Vec<u8> {
    let encoder = wit_component::ComponentEncoder::default().module(bytes);
    encoder
        .and_then(|mut encoder| encoder.encode())
        .expect("a component")
}
