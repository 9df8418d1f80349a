//! The demo runs, reports no lost or duplicated deliveries, and ends on its own. Its counting is
//! tested in `examples/demo/tests`, and its page in `clients`.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

#[test]
fn the_demo_ends_on_its_own_and_reports_no_lost_or_doubled_deliveries() {
    let folder = crate::harness::node::Folder::new();
    // Reproduces the layout of the repository root, where `make demo` runs the demo.
    let repository = crate::harness::repository();
    std::fs::create_dir(folder.path().join("build")).expect("make a folder");
    std::os::unix::fs::symlink(
        crate::harness::demo_plugins(),
        folder.path().join("build/plugins"),
    )
    .expect("make a link");
    std::os::unix::fs::symlink(repository.join("examples"), folder.path().join("examples"))
        .expect("make a link");
    // A package of its own, which `cargo test --workspace` builds; `cargo build -p demo` does so
    // alone.
    let demo = Path::new(env!("CARGO_BIN_EXE_pointsman")).with_file_name("demo");
    let begun = Instant::now();
    let mut command = Command::new(&demo);
    command
        .current_dir(folder.path())
        .env("DEMO_SECONDS", "8")
        .env(
            "POINTSMAN_PLUGINS_CACHE",
            crate::harness::compiled_plugins(),
        );
    let output = command.output().expect("run the demo");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{:?} after {:?}: {said}\n{}",
        output.status,
        begun.elapsed(),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("The demo page: http://127.0.0.1:"), "{said}");
    assert!(said.contains(" 0 lost, 0 duplicated\n"), "{said}");
    assert!(
        said.contains("rules -> "),
        "the output names the router of a notification: {said}"
    );
}
