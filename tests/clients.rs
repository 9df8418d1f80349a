//! Clients: the package `clients/js`, npm and PyPI libraries and two browsers. The tests themselves
//! are in `clients/*.test.js` and `clients/*_test.py`.
//!
//! They need Node 20 or newer, npm, Chromium, Firefox, Python 3 with venv, openssl and the proxies of
//! `docs/proxies.md`; `make test` installs them (`scripts/need.sh`).

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Once, OnceLock};

use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::harness::{
    bundled_plugins, compiled_plugins, demo_plugins, node_interpreter, ports, repository, seed,
};

/// The ports of the nodes and servers of one file: more than any file uses.
const PORTS: usize = 60;

/// Runs one `node:test` file against a node with the plugins of the demo.
fn run(file: &str) {
    let node = Node::builder()
        .plugins(demo_plugins())
        .config(include_str!("../examples/demo/pointsman.toml"))
        .start();
    run_with(file, &[("POINTSMAN_ADDRESS", &node.addr().to_string())]);
}

/// Runs one `node:test` file that starts and kills its nodes itself, by `installation.js`.
fn run_with_nodes(file: &str) {
    run_with_nodes_and(file, &[]);
}

/// Like [`run_with_nodes`], with further environment variables.
fn run_with_nodes_and(file: &str, more: &[(&str, &str)]) {
    let ports: Vec<String> = (0..PORTS)
        .map(|_| ports::free().port().to_string())
        .collect();
    let (plugins, cache, ports) = (bundled_plugins(), compiled_plugins(), ports.join(","));
    let (plugins, cache) = (plugins.to_string_lossy(), cache.to_string_lossy());
    let variables = [
        ("POINTSMAN_BINARY", env!("CARGO_BIN_EXE_pointsman")),
        ("POINTSMAN_PLUGINS", plugins.as_ref()),
        ("POINTSMAN_CACHE", cache.as_ref()),
        ("POINTSMAN_TMP", env!("CARGO_TARGET_TMPDIR")),
        ("POINTSMAN_PORTS", ports.as_str()),
    ];
    run_with(file, &[&variables, more].concat());
}

/// Runs one `node:test` file in `clients/` with these environment variables.
///
/// # Panics
/// With its output, if it fails.
pub(crate) fn run_with(file: &str, variables: &[(&str, &str)]) {
    static INSTALLED: Once = Once::new();
    let folder = repository().join("tests/clients");
    INSTALLED.call_once(|| {
        // Installing takes ten seconds, and what is there rarely changes.
        let lock =
            fs::read_to_string(folder.join("package-lock.json")).expect("read the lock file");
        let installed = folder.join("node_modules/.installed");
        if fs::read_to_string(&installed).is_ok_and(|installed| installed == lock) {
            return;
        }
        let mut npm = Command::new("npm");
        let status = npm
            .args(["ci", "--silent", "--no-audit", "--no-fund"])
            .current_dir(&folder)
            .status();
        assert!(
            status.as_ref().is_ok_and(|status| status.success()),
            "npm ci in {}: {status:?}; `make test` installs npm",
            folder.display()
        );
        fs::write(installed, lock).expect("write .installed");
    });
    let mut command = Command::new(node_interpreter());
    command
        .args(["--test", "--test-reporter=spec", file])
        .current_dir(&folder)
        .envs(variables.iter().copied());
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("node cannot be run ({error}); `make test` installs it"));
    assert_passed(file, &output);
}

/// A Python with the packages of `clients/requirements.txt`, which it installs if they have changed.
///
/// # Panics
/// If they cannot be installed.
fn python() -> &'static PathBuf {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let venv = repository().join("build/clients-venv");
        let python = venv.join("bin/python");
        let (wanted, installed) = (
            repository().join("tests/clients/requirements.txt"),
            venv.join(".installed"),
        );
        let text = fs::read_to_string(&wanted).expect("read requirements.txt");
        if fs::read_to_string(&installed).is_ok_and(|installed| installed == text) {
            return python;
        }
        let run = |command: &mut Command| {
            let output = command.output();
            let output = output.unwrap_or_else(|error| {
                panic!("{command:?}: {error}; `make test` installs Python")
            });
            assert_passed("installing the Python clients", &output);
        };
        run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv));
        let options = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--requirement",
        ];
        run(Command::new(&python).args(options).arg(&wanted));
        fs::write(installed, text).expect("write .installed");
        python
    })
}

/// Runs one `unittest` file against a node with the plugins of the demo and these settings.
fn run_python(file: &str, config: &str) {
    let node = Node::builder()
        .plugins(demo_plugins())
        .config(config)
        .start();
    let output = Command::new(python())
        .args(["-B", file])
        .current_dir(repository().join("tests/clients"))
        .env("POINTSMAN_ADDRESS", node.addr().to_string())
        .env("POINTSMAN_ADMIN", node.admin_addr().to_string())
        .output()
        .expect("run Python");
    assert_passed(file, &output);
}

fn assert_passed(file: &str, output: &Output) {
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{file}: {}\n{said}", output.status);
}

#[test]
fn npm_clients_cut_before_their_first_notification_miss_nothing() {
    run("libraries.test.js");
}

#[test]
fn the_demo_page_shows_each_notification_once_through_cuts_and_an_overtaking_alert() {
    run("browser.test.js");
}

#[test]
fn htmx_turbo_datastar_and_pages_that_parse_their_payload_show_it_once() {
    run("pages.test.js");
}

#[test]
fn a_reopened_page_shows_each_notification_it_missed_once() {
    run("device.test.js");
}

#[test]
fn requests_of_the_cloudevents_sdk_for_javascript_are_delivered_as_made() {
    run("cloudevents.test.js");
}

#[test]
fn requests_of_the_cloudevents_sdk_for_python_are_delivered_as_made() {
    run_python("cloudevents_test.py", "");
}

#[test]
fn python_clients_read_every_notification_with_the_text_that_was_published() {
    run_python(
        "readers_test.py",
        "[[plugins.rules.config.rules]]\nmatch.type = \"named\"\nto.user = \"named\"\nevent_name = \"first\\u2028second\\u2029third\"",
    );
}

#[test]
fn the_package_is_small_typed_and_ready_for_npm() {
    run_with_nodes("package.test.js");
}

#[test]
fn the_package_shows_each_notification_once_whatever_node_and_network_do() {
    run_with_nodes("client.test.js");
}

#[test]
fn the_tabs_of_a_browser_share_one_connection_that_each_of_them_can_take_over() {
    run_with_nodes("tabs.test.js");
}

#[test]
fn clients_generated_from_the_document_publish_and_read_and_a_linter_finds_no_fault() {
    run("generators.test.js");
}

#[test]
fn a_python_client_generated_from_the_document_publishes_and_reads() {
    run_python("generated_client_test.py", "");
}

#[test]
fn each_library_with_the_lines_of_its_document_shows_each_notification_once() {
    run_with_nodes("matrix.test.js");
}

#[test]
fn streams_pass_each_documented_proxy_through_kills_drains_and_absent_nodes() {
    let redis = RedisServer::start();
    run_with_nodes_and("proxies.test.js", &[("POINTSMAN_TEST_REDIS", &redis.url())]);
}

/// `LONG=1` makes it 200 interruptions.
#[test]
fn random_interruptions_of_three_tabs_lose_and_repeat_nothing() {
    let seed = seed::seed("three tabs").to_string();
    run_with_nodes_and("random.test.js", &[("POINTSMAN_TEST_SEED", &seed)]);
}
