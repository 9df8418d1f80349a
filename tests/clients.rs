//! Clients that are not ours: npm libraries and a browser, each cut and back again. The tests themselves are in `clients/*.test.js`.
//!
//! Node 20 or newer, npm and Chromium must be there; `make test` sees to it (`scripts/need.sh`).

use std::process::Command;
use std::sync::Once;

use crate::harness::node::Node;
use crate::harness::{node_interpreter, repository};

/// Runs one file of `node:test` against a node.
fn run(file: &str) {
    static INSTALLED: Once = Once::new();
    let folder = repository().join("tests/clients");
    INSTALLED.call_once(|| {
        let mut npm = Command::new("npm");
        let status = npm.args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&folder).status();
        assert!(
            status.as_ref().is_ok_and(|status| status.success()),
            "npm ci in {}: {status:?}; `make test` installs npm",
            folder.display()
        );
    });
    let node = Node::builder().start();
    let mut command = Command::new(node_interpreter());
    command.args(["--test", "--test-reporter=spec", file]).current_dir(&folder).env("POINTSMAN_ADDRESS", node.addr().to_string());
    let output = command.output().unwrap_or_else(|error| panic!("node cannot be run ({error}); `make test` installs it"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{file}: {}\n{said}", output.status);
}

#[test]
fn npm_clients_that_never_received_anything_miss_nothing_when_cut() {
    run("libraries.test.js");
}

#[test]
fn the_demo_page_in_a_browser_shows_each_notification_once_through_cuts() {
    run("browser.test.js");
}
