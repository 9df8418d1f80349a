//! Clients that are not ours: npm libraries and a browser, each cut and back again. The tests themselves are in `clients/*.test.js`.
//!
//! Node 20 or newer, npm and Chromium must be there; `make test` sees to it (`scripts/need.sh`).

use std::process::Command;
use std::sync::Once;

use crate::harness::node::Node;
use crate::harness::{demo_plugins, node_interpreter, repository};

/// Runs one file of `node:test` against a node with the demo's plugins.
fn run(file: &str) {
    let node = Node::builder()
        .plugins(demo_plugins())
        .config(include_str!("../examples/demo/pointsman.toml"))
        .start();
    run_with(file, &[("POINTSMAN_ADDRESS", &node.addr().to_string())]);
}

/// Runs one file of `node:test` in `clients/`, with these variables.
///
/// # Panics
/// With what it said, if it fails.
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
fn npm_clients_that_never_received_anything_miss_nothing_when_cut() {
    run("libraries.test.js");
}

#[test]
fn the_demo_page_in_a_browser_shows_two_devices_each_notification_once_through_cuts_and_an_alert_that_overtakes()
 {
    run("browser.test.js");
}

#[test]
fn a_page_closed_at_night_and_opened_in_the_morning_shows_what_came_in_between_once_each() {
    run("device.test.js");
}
