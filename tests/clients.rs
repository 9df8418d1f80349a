//! Third-party clients: npm libraries and a browser, each disconnected and reconnected. The tests
//! themselves are in `clients/*.test.js`.
//!
//! They need Node 20 or newer, npm and Chromium; `make test` installs them (`scripts/need.sh`).

use std::process::Command;
use std::sync::Once;

use crate::harness::node::Node;
use crate::harness::{demo_plugins, node_interpreter, repository};

/// Runs one `node:test` file against a node with the plugins of the demo.
fn run(file: &str) {
    let node = Node::builder()
        .plugins(demo_plugins())
        .config(include_str!("../examples/demo/pointsman.toml"))
        .start();
    run_with(file, &[("POINTSMAN_ADDRESS", &node.addr().to_string())]);
}

/// Runs one `node:test` file in `clients/` with these environment variables.
///
/// # Panics
/// With its output, if it fails.
pub(crate) fn run_with(file: &str, variables: &[(&str, &str)]) {
    static INSTALLED: Once = Once::new();
    let folder = repository().join("tests/clients");
    INSTALLED.call_once(|| {
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
    });
    let mut command = Command::new(node_interpreter());
    command
        .args(["--test", "--test-reporter=spec", file])
        .current_dir(&folder)
        .envs(variables.iter().copied());
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("node cannot be run ({error}); `make test` installs it"));
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
