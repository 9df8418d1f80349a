//! Runs the properties of the fuzz targets on their corpora; `scripts/fuzz.sh` searches for inputs
//! that violate them. An input that did is kept in the corpus.

use std::path::Path;

mod properties;

fn run(target: &str, property: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fuzz/corpus")
        .join(target);
    let mut n_inputs = 0;
    for file in std::fs::read_dir(&folder).expect("a corpus") {
        let path = file.expect("a file").path();
        // Shown if the property panics.
        eprintln!("{}", path.display());
        property(&std::fs::read(&path).expect("an input"));
        n_inputs += 1;
    }
    assert!(n_inputs > 2, "{} has {n_inputs} inputs", folder.display());
}

#[test]
fn an_accepted_cursor_is_exactly_as_the_node_writes_it() {
    run("cursor", properties::cursor);
}

#[test]
fn an_accepted_request_is_read_as_the_same_events_by_ingest() {
    run("cloudevents", properties::cloudevents);
}

#[test]
fn an_accepted_entry_survives_its_way_through_the_log() {
    run("entry", properties::entry);
}

#[test]
fn frames_of_redis_do_not_depend_on_how_their_bytes_arrive() {
    run("resp", properties::resp);
}

#[test]
fn rules_are_refused_or_decide_every_event() {
    run("rules", properties::rules);
}

#[test]
fn a_configuration_is_accepted_or_refused_with_one_line() {
    run("configuration", properties::configuration);
}
