//! The rules of ARCHITECTURE.md that a compiler does not enforce: imports point one way, files of
//! the host do not import each other in a circle, each outside format has one module, every file
//! states what it is, and the documents name tests and files that exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::Visit;

use crate::harness::repository;

/// For each folder of `host/src` (`""` is the top), its modules from the lowest level up. A module
/// imports only from levels below its own. `main`, `lib` and `cli` may import everything.
const LEVELS: &[(&str, &[&[&str]])] = &[
    (
        "",
        &[
            &["escape"],
            &[
                "backoff",
                "clock",
                "duration",
                "event",
                "rate",
                "regular_file",
                "shutdown",
                "table",
                "telemetry",
            ],
            &["broker", "plugin"],
            // They meet only in the log, which belongs to the broker: none imports another.
            &["ingest", "delivery", "bridge"],
            &["auth", "preview", "explain", "rollout", "server"],
            &["http"],
            &["config"],
            &["node"],
        ],
    ),
    (
        "plugin",
        &[&["runtime"], &["inspect", "shadow"], &["registry"]],
    ),
    (
        "ingest",
        &[&["pipeline", "proposal", "quotes"], &["worker"]],
    ),
    (
        "bridge",
        &[
            &["message", "queue"],
            &["template"],
            &["settings"],
            &["conversion"],
            &["listener"],
        ],
    ),
    (
        "delivery",
        &[
            &["recipients"],
            &["subscription"],
            &["follow", "device_cursors"],
            &["hub"],
            &["sse"],
        ],
    ),
    ("preview", &[&["runner", "backtest", "dry_run"]]),
];

/// A path prefix of an outside format, and the only modules that may name it.
const OUTSIDE_FORMATS: &[(&str, &[&str])] = &[
    ("wasmtime", &["plugin"]),
    ("wasmtime_wasi", &["plugin"]),
    ("wit_component", &["plugin"]),
    ("wit_parser", &["plugin/inspect"]),
    ("redb", &["broker/embedded"]),
    ("redis", &["broker/redis"]),
    ("axum", &["http", "server", "auth"]),
    ("axum::http::StatusCode", &["http"]),
];

/// A text that belongs to one format, and the only modules whose code may contain it.
const OUTSIDE_TEXTS: &[(&str, &[&str])] = &[
    ("text/event-stream", &["http/handlers/stream", "cli/tail"]),
    ("unsafe {", &["plugin/runtime/cache"]),
];

/// A file of the host.
struct Source {
    /// Its module below the crate, such as `delivery/sse/timer`.
    module: String,
    text: String,
    /// Every path that its code names, outside tests: segments, absolute within the crate where it
    /// begins with `crate`.
    paths: BTreeSet<Vec<String>>,
}

/// Collects the paths of a file, with nested `use` groups taken apart.
struct Paths {
    module: Vec<String>,
    found: BTreeSet<Vec<String>>,
}

impl Paths {
    fn add(&mut self, path: &[String]) {
        let up = path
            .iter()
            .take_while(|segment| *segment == "super")
            .count();
        let absolute = match path.first().map(String::as_str) {
            Some("super") if up <= self.module.len() => {
                let parent = &self.module[..self.module.len() - up];
                [&["crate".to_owned()], parent, &path[up..]].concat()
            }
            Some("self") => [&["crate".to_owned()], &self.module[..], &path[1..]].concat(),
            _ => path.to_vec(),
        };
        self.found.insert(absolute);
    }

    fn tree(&mut self, prefix: &[String], tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => {
                let prefix = [prefix, &[path.ident.to_string()]].concat();
                self.tree(&prefix, &path.tree);
            }
            syn::UseTree::Name(name) if name.ident == "self" => self.add(prefix),
            syn::UseTree::Name(name) => {
                self.add(&[prefix, &[name.ident.to_string()]].concat());
            }
            syn::UseTree::Rename(rename) => {
                self.add(&[prefix, &[rename.ident.to_string()]].concat());
            }
            syn::UseTree::Glob(_) => self.add(prefix),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.tree(prefix, tree));
            }
        }
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_test(item) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if segments.len() > 1 {
            self.add(&segments);
        }
        syn::visit::visit_path(self, path);
    }
}

/// Whether an item is compiled for tests only.
fn is_test(item: &syn::Item) -> bool {
    let attributes = match item {
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        _ => return false,
    };
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Path>()
                .is_ok_and(|path| path.is_ident("test"))
    })
}

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

/// The files of the host without those that are compiled for tests only.
fn sources() -> Vec<Source> {
    let root = repository().join("host/src");
    let module = |path: &PathBuf| {
        let path = path.strip_prefix(&root).expect("found below it");
        path.with_extension("").to_string_lossy().into_owned()
    };
    let is_test = |module: &String| {
        module.split('/').any(|part| part == "tests")
            || ["broker/fake", "http/site"].contains(&module.as_str())
    };
    let found = rust_files(&root);
    let sources = found.iter().map(|path| (module(path), path));
    sources
        .filter(|(module, _)| !is_test(module))
        .map(|(module, path)| {
            let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{module}: {e}"));
            let file = syn::parse_file(&text).unwrap_or_else(|e| panic!("{module}: {e}"));
            let mut paths = Paths {
                module: match module.as_str() {
                    "lib" | "main" => Vec::new(),
                    module => module.split('/').map(str::to_owned).collect(),
                },
                found: BTreeSet::new(),
            };
            paths.visit_file(&file);
            Source {
                module,
                text,
                paths: paths.found,
            }
        })
        .collect()
}

/// The modules of the host that a file imports from: for each path, the longest that is a file.
fn imports(source: &Source, modules: &BTreeSet<String>) -> BTreeSet<String> {
    let within = source.paths.iter().filter(|path| path[0] == "crate");
    within
        .filter_map(|path| {
            (1..path.len())
                .rev()
                .map(|n| path[1..=n].join("/"))
                .find(|module| modules.contains(module))
        })
        .filter(|module| *module != source.module)
        .collect()
}

/// Whether one of two modules contains the other, or both are the same.
fn is_kin(one: &str, other: &str) -> bool {
    let contains = |outer: &str, inner: &str| {
        inner
            .strip_prefix(outer)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    contains(one, other) || contains(other, one)
}

fn is_free(module: &str) -> bool {
    ["lib", "main"].contains(&module) || module == "cli" || module.starts_with("cli/")
}

#[test]
fn imports_point_to_lower_levels_only() {
    let sources = sources();
    let modules: BTreeSet<String> = sources.iter().map(|s| s.module.clone()).collect();
    let mut wrong = Vec::new();
    for (folder, levels) in LEVELS {
        let level: BTreeMap<&str, usize> = levels
            .iter()
            .enumerate()
            .flat_map(|(level, names)| names.iter().map(move |name| (*name, level)))
            .collect();
        // The part of a module below this folder, if it lies there.
        let part = |module: &'_ str| -> Option<String> {
            let inside = match *folder {
                "" => module,
                folder => module.strip_prefix(folder)?.strip_prefix('/')?,
            };
            inside.split('/').next().map(str::to_owned)
        };
        for source in sources.iter().filter(|source| !is_free(&source.module)) {
            let Some(from) = part(&source.module) else {
                continue;
            };
            let own = level.get(from.as_str()).unwrap_or_else(|| {
                panic!(
                    "{}: '{from}' has no level; give it one in LEVELS of tests/architecture.rs \
                     and a row in the code map of ARCHITECTURE.md",
                    source.module
                )
            });
            for import in imports(source, &modules) {
                let Some(to) = part(&import) else { continue };
                if to != from && level.get(to.as_str()).is_none_or(|to| to >= own) {
                    wrong.push(format!("{} imports {import}", source.module));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports that do not point to a lower level:\n{}",
        wrong.join("\n")
    );
}

/// A module and its children are one unit here: a child may name its parent's items.
#[test]
fn no_files_import_each_other_in_a_circle() {
    let sources = sources();
    let modules: BTreeSet<String> = sources.iter().map(|s| s.module.clone()).collect();
    let mut left: BTreeMap<String, BTreeSet<String>> = sources
        .iter()
        .filter(|source| !["lib", "main"].contains(&source.module.as_str()))
        .map(|source| {
            let imports = imports(source, &modules);
            let others = imports.into_iter().filter(|to| !is_kin(&source.module, to));
            (source.module.clone(), others.collect())
        })
        .collect();
    // Whatever imports nothing that is left cannot be part of a circle.
    loop {
        let present: BTreeSet<String> = left.keys().cloned().collect();
        let before = left.len();
        left.retain(|_, imports| {
            imports.retain(|to| present.contains(to));
            !imports.is_empty()
        });
        if left.len() == before {
            break;
        }
    }
    // What is left lies on a circle or leads to one; those that nothing left imports only lead
    // there.
    loop {
        let imported: BTreeSet<String> = left.values().flatten().cloned().collect();
        let before = left.len();
        left.retain(|module, _| imported.contains(module));
        if left.len() == before {
            break;
        }
    }
    assert!(
        left.is_empty(),
        "files that import each other in a circle:\n{left:#?}"
    );
}

#[test]
fn ingest_and_delivery_meet_only_in_the_log() {
    let sources = sources();
    for source in &sources {
        for (one, other) in [("ingest", "delivery"), ("delivery", "ingest")] {
            let names_other =
                |path: &Vec<String>| path.len() > 1 && path[0] == "crate" && path[1] == other;
            let is_wrong = source.module.split('/').next() == Some(one)
                && source.paths.iter().any(names_other);
            assert!(!is_wrong, "{} names {other}", source.module);
        }
    }
}

#[test]
fn each_outside_format_has_one_module() {
    let mut wrong = Vec::new();
    for source in sources() {
        let module = &source.module;
        let may = |modules: &[&str]| modules.iter().any(|one| module.starts_with(one));
        for (prefix, modules) in OUTSIDE_FORMATS {
            let prefix: Vec<&str> = prefix.split("::").collect();
            let names = |path: &Vec<String>| {
                path.len() > prefix.len() && prefix.iter().zip(path).all(|(a, b)| a == b)
                    || path.len() == prefix.len() && path.iter().zip(&prefix).all(|(a, b)| a == b)
            };
            if !may(modules) && !is_free(module) && source.paths.iter().any(names) {
                wrong.push(format!("{module} names {}", prefix.join("::")));
            }
        }
        let tests = source.text.find("#[cfg(test)]\nmod tests {");
        let code = &source.text[..tests.unwrap_or(source.text.len())];
        let mut lines = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for (text, modules) in OUTSIDE_TEXTS {
            if !may(modules) && lines.any(|line| line.contains(text)) {
                wrong.push(format!("{module} contains {text}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_states_what_it_is() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|source| !source.text.starts_with("//! "))
        .map(|source| source.module)
        .collect();
    assert!(
        silent.is_empty(),
        "these files do not begin with `//!`: {silent:?}"
    );
}

#[test]
fn no_module_is_a_drawer_for_code_without_a_home() {
    for source in sources() {
        for part in source.module.split('/') {
            let is_drawer =
                ["util", "utils", "helpers", "common", "manager", "misc"].contains(&part);
            assert!(!is_drawer, "{}: name it after its concept", source.module);
        }
    }
}

/// The rows of a table in a document whose first cell begins in bold or is an id.
fn rows(page: &str) -> Vec<Vec<String>> {
    let rows = page.lines().filter(|line| line.starts_with("| "));
    rows.map(|line| {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    })
    .collect()
}

/// Checks that each `path::name` names a test function that exists.
fn assert_tests_exist(row: &str, tests: &[String]) {
    assert!(!tests.is_empty(), "{row}: no test shows it");
    for test in tests {
        let (file, name) = test
            .split_once("::")
            .unwrap_or_else(|| panic!("{row}: '{test}' is not of the form file::test"));
        let text = fs::read_to_string(repository().join(file))
            .unwrap_or_else(|e| panic!("{row}: {file}: {e}"));
        assert!(
            text.contains(&format!("fn {name}(")),
            "{row}: {file} has no test {name}"
        );
    }
}

#[test]
fn every_promise_names_its_files_and_tests_that_exist() {
    let page = fs::read_to_string(repository().join("tests/README.md")).expect("tests/README.md");
    let rows: Vec<Vec<String>> = rows(&page)
        .into_iter()
        .filter(|row| row[0].starts_with("**"))
        .collect();
    assert!(
        rows.len() >= 8,
        "the table has only {} promises",
        rows.len()
    );
    for row in rows {
        let [promise, files, tests, ..] = row.as_slice() else {
            panic!("a row without three columns: {row:?}")
        };
        for file in quoted(files) {
            let path = repository().join("host/src").join(&file);
            assert!(path.exists(), "{promise}: host/src/{file} does not exist");
        }
        assert_tests_exist(promise, &quoted(tests));
    }
}

/// `docs/protocol.md` lists the schedules that the delivery protocol must survive, each with its
/// test.
#[test]
fn every_interleaving_of_the_protocol_has_a_test() {
    let page = fs::read_to_string(repository().join("docs/protocol.md")).expect("docs/protocol.md");
    let listed: BTreeMap<String, Vec<String>> = rows(&page)
        .into_iter()
        .filter(|row| row.len() >= 3 && is_interleaving(&row[0]))
        .map(|row| (row[0].clone(), quoted(&row[2])))
        .collect();
    let fs = (1..=26).filter(|n| *n != 15).map(|n| format!("F{n}"));
    for id in fs.chain((1..=18).map(|n| format!("H{n}"))) {
        let tests: Vec<String> = listed
            .iter()
            .filter(|(listed, _)| listed.trim_end_matches(char::is_lowercase) == id)
            .flat_map(|(_, tests)| tests.clone())
            .collect();
        assert_tests_exist(&id, &tests);
    }
}

/// Whether a cell is an id such as `F6`, `F14b` or `H3`.
fn is_interleaving(cell: &str) -> bool {
    let digits = cell.trim_end_matches(char::is_lowercase);
    digits.len() > 1
        && digits.starts_with(['F', 'H'])
        && digits[1..].chars().all(|c| c.is_ascii_digit())
}

/// The texts between back-quotes.
fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}
