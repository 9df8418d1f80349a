//! The walls hold: imports point one way, outside formats have one room each, files say what they are, the table of promises in
//! ARCHITECTURE.md names files and tests that exist, and no interleaving that shaped the protocol has lost its test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::repository;

/// Which modules of the host may be imported by those of higher levels. `lib`, `main` and `cli` may import everything.
const LEVELS: [&[&str]; 9] = [
    // The vocabulary imports nothing but itself.
    &[
        "event",
        "criteria",
        "metrics",
        "readiness",
        "shutdown",
        "clock",
    ],
    &["broker", "plugin"],
    &["recipients", "pipeline"],
    // Ingest and delivery: they meet only in the log, which is the broker's.
    &["ingest", "subscription", "auth", "rehearsal"],
    &["hub", "bookmarks"],
    &["sse", "watch", "explain"],
    &["server"],
    &["http"],
    &["config"],
];

/// A word of an outside format, and the only places that may speak it.
const ROOMS: [(&str, &[&str]); 9] = [
    ("wasmtime::", &["plugin.rs", "plugin/"]),
    ("redb::", &["broker/embedded"]),
    ("::redis as client", &["broker/redis"]),
    (" redis::", &["broker/redis"]),
    ("StatusCode", &["http.rs", "http/", "cli"]),
    ("text/event-stream", &["http/stream.rs", "cli/tail"]),
    ("wit_component", &["plugin/", "plugin.rs"]),
    ("unsafe {", &["plugin/cache.rs"]),
    ("wit_parser", &["plugin/noop.rs"]),
];

/// Every Rust file below a folder.
fn rust_files(root: &Path) -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(root, &mut found);
    found.sort();
    found
}

/// Every Rust file of the host with its path below `host/src` and its text without tests.
fn sources() -> Vec<(String, String)> {
    let root = repository().join("host/src");
    let found = rust_files(&root);
    let name = |path: &PathBuf| {
        path.strip_prefix(&root)
            .expect("found below it")
            .to_string_lossy()
            .into_owned()
    };
    let text = |path: &PathBuf| {
        fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let is_test = |name: &String| {
        name.ends_with("tests.rs") || name.ends_with("fake.rs") || name.contains("/tests/")
    };
    found
        .iter()
        .map(|path| (name(path), text(path)))
        .filter(|(name, _)| !is_test(name))
        .map(|(name, text)| (name, without_tests(&text)))
        .collect()
}

/// Unit tests stand at the end of a file.
fn without_tests(text: &str) -> String {
    text.split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The module that a file belongs to: the first part of its path.
fn module(name: &str) -> &str {
    name.split('/')
        .next()
        .unwrap_or(name)
        .trim_end_matches(".rs")
}

/// The modules of the host that a text names in `crate::...` paths, outside comments.
fn imports(text: &str) -> Vec<String> {
    let code = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut found = Vec::new();
    for after in code.split("crate::").skip(1) {
        let named: Vec<&str> = match after.strip_prefix('{') {
            // `use crate::{a, b::C}`: the first part of each.
            Some(list) => list
                .split('}')
                .next()
                .unwrap_or_default()
                .split(',')
                .map(str::trim)
                .collect(),
            None => vec![after],
        };
        for name in named {
            let name: String = name
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect();
            if !name.is_empty() {
                found.push(name);
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

#[test]
fn imports_point_one_way() {
    let level: BTreeMap<&str, usize> = LEVELS
        .iter()
        .enumerate()
        .flat_map(|(level, names)| names.iter().map(move |name| (*name, level)))
        .collect();
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        let from = module(&name);
        if ["lib", "main", "cli"].contains(&from) {
            continue;
        }
        let own = level
            .get(from)
            .unwrap_or_else(|| panic!("{name}: give the new module '{from}' a level in tests/architecture.rs and ARCHITECTURE.md"));
        for to in imports(&text).iter().filter(|to| *to != from) {
            let is_vocabulary = *own == 0 && ["event", "criteria"].contains(&to.as_str());
            if !is_vocabulary && level.get(to.as_str()).is_none_or(|to| to >= own) {
                wrong.push(format!("{name} imports {to}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports point to lower levels only:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn an_outside_format_is_spoken_in_one_room() {
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for (word, rooms) in ROOMS {
            if !rooms.iter().any(|room| name.starts_with(room))
                && code.clone().any(|line| line.contains(word))
            {
                wrong.push(format!("{name} says {word}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(name, _)| name)
        .collect();
    assert!(
        silent.is_empty(),
        "these files begin without `//!`: {silent:?}"
    );
}

#[test]
fn every_promise_names_its_file_and_a_test_that_exists() {
    let page = fs::read_to_string(repository().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let table = page
        .split("## Promises")
        .nth(1)
        .and_then(|rest| rest.split("\n## ").next())
        .expect("a section on promises");
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter(|line| line.starts_with("| **"))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    assert!(
        rows.len() >= 8,
        "the table has only {} promises",
        rows.len()
    );
    for row in rows {
        let [_, promise, files, tests, ..] = row.as_slice() else {
            panic!("a row without three columns: {row:?}")
        };
        for file in quoted(files) {
            assert!(
                repository().join("host/src").join(&file).exists(),
                "{promise}: there is no host/src/{file}"
            );
        }
        let tests = quoted(tests);
        assert!(!tests.is_empty(), "{promise} is shown by nothing");
        for test in tests {
            let (file, name) = test
                .split_once("::")
                .unwrap_or_else(|| panic!("{promise}: '{test}' is no file::test"));
            let text = fs::read_to_string(repository().join(file))
                .unwrap_or_else(|e| panic!("{promise}: {file}: {e}"));
            assert!(
                text.contains(&format!("fn {name}(")),
                "{promise}: {file} has no test {name}"
            );
        }
    }
}

/// The interleavings that shaped the protocol are numbered; `tests/protocol.rs` says what the numbers are, and which of them are not met here.
#[test]
fn every_interleaving_has_a_test_that_tells_it() {
    let mut found = BTreeSet::new();
    let mut silent = Vec::new();
    for root in ["tests", "host/src"] {
        for path in rust_files(&repository().join(root)) {
            let text =
                fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let mut is_told = false;
            for line in text.lines().map(str::trim) {
                if let Some(interleaving) = line
                    .split_once("fn ")
                    .and_then(|(_, name)| interleaving(name))
                {
                    if !is_told {
                        silent.push(format!("{}: {line}", path.display()));
                    }
                    found.insert(interleaving);
                }
                is_told = line.starts_with("///") || is_told && line.starts_with("#[");
            }
        }
    }
    assert!(
        silent.is_empty(),
        "whoever reads these does not know what they play: a `///` line is missing\n{}",
        silent.join("\n")
    );
    let drafts = (1..=26).filter(|n| *n != 15).map(|n| ('f', n));
    let missing: Vec<(char, u32)> = drafts
        .chain((1..=18).map(|n| ('h', n)))
        .filter(|one| !found.contains(one))
        .collect();
    assert!(missing.is_empty(), "no test plays {missing:?}");
}

/// The number that a test's name begins with, as in `f06_` or `f14b_`.
fn interleaving(name: &str) -> Option<(char, u32)> {
    let (prefix, _) = name.split_once('_')?;
    let list = prefix
        .chars()
        .next()
        .filter(|list| ['f', 'h'].contains(list))?;
    let number = prefix[1..].trim_end_matches(char::is_alphabetic);
    (number.len() == 2)
        .then(|| number.parse().ok())
        .flatten()
        .map(|number| (list, number))
}

/// What stands between back-quotes.
fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}
