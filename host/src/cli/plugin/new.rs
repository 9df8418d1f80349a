//! `pointsman plugin new`: creates a plugin project that compiles anywhere without changes.
//!
//! Projects in languages other than Rust are in [`foreign`]. For Rust, the SDK is not published to a registry. This program embeds the SDK and the WIT contract and
//! writes both into the project, with a lock file that pins dependencies to the versions this
//! program was built with. The project's own files are in `host/templates/plugin`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use pointsman::plugin::inspect::contract::WIT;
use toml::{Table, Value};

use super::language::Language;
use super::toolchain;

mod foreign;

/// Folder of the SDK in a project. It is two levels deep, as in the repository, because the SDK
/// reads the contract from `../../wit`.
const SDK_FOLDER: &str = "vendor/pointsman-plugin";
/// Plugin name used in the templates.
const PLACEHOLDER: &str = "my-plugin";

macro_rules! files {
    ($folder:literal: $($path:literal),+ $(,)?) => {
        [$(($path, include_str!(concat!("../../../../", $folder, "/", $path)))),+]
    };
}

/// The SDK. A test checks that the list is complete.
const SDK: [(&str, &str); 20] = files!("plugins/sdk":
    "src/bindings.rs",
    "src/clock.rs",
    "src/condition.rs",
    "src/condition/wanted.rs",
    "src/configuration.rs",
    "src/configuration/tables.rs",
    "src/event.rs",
    "src/export.rs",
    "src/failure.rs",
    "src/heap.rs",
    "src/lib.rs",
    "src/log.rs",
    "src/one_or_more.rs",
    "src/pattern.rs",
    "src/plugin.rs",
    "src/selector.rs",
    "src/test_host.rs",
    "src/testing.rs",
    "src/value.rs",
    "Cargo.toml",
);

const SHARED: [(&str, &str); 3] =
    files!("host/templates/plugin": "Cargo.toml", "README.md", "gitignore");
const ROUTER: [(&str, &str); 4] = files!("host/templates/plugin/router": "src/lib.rs", "config.json", "events.jsonl", "golden.json");
const FILTER: [(&str, &str); 4] = files!("host/templates/plugin/filter": "src/lib.rs", "config.json", "events.jsonl", "golden.json");

/// The manifest from which the SDK inherits dependencies and package keys.
const WORKSPACE: &str = include_str!("../../../../Cargo.toml");
const LOCK: &str = include_str!("../../../../Cargo.lock");

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Name of the plugin, or path of the folder to create; its last component is the name
    name: PathBuf,
    /// Kind of plugin: a filter keeps, amends or drops events; a router selects the recipients
    #[arg(long)]
    kind: Kind,
    /// Programming language
    #[arg(long, default_value = "rust")]
    lang: Language,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    Filter,
    Router,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Router => "router",
        }
    }
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let folder = &options.name;
    let name = folder
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    check_name(name)?;
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) || folder.is_file() {
        bail!(
            "{} already exists; choose another folder, or remove it",
            folder.display()
        );
    }
    let kind = options.kind.name();
    match foreign::Scaffold::of(options.lang) {
        Some(scaffold) => {
            write(folder, scaffold.files(name, options.kind))?;
            println!(
                "created a {kind} in {}: start with {}\n",
                folder.display(),
                scaffold.source
            );
            println!("  cd {}", folder.display());
            println!("  {}", scaffold.install);
        }
        None => {
            write(folder, project(name, options.kind)?)?;
            println!(
                "created a {kind} in {}: start with src/lib.rs\n",
                folder.display()
            );
            match toolchain::add_wasm_target(folder) {
                Ok(true) => println!("  added the target {} through rustup\n", toolchain::WASM),
                Ok(false) => {}
                Err(fix) => println!("  first {fix}\n"),
            }
            println!("  cd {}", folder.display());
            println!(
                "  cargo test              # native tests; about a minute the first time, then a second"
            );
        }
    }
    println!(
        "  pointsman plugin test   # builds the plugin and runs it on events.jsonl as a node would"
    );
    if options.lang == Language::Rust {
        println!(
            "  pointsman dev           # runs a node with a web page; rebuilds and reloads the plugin on save"
        );
    }
    Ok(())
}

/// Writes files into a folder, with the folders that they need.
fn write(folder: &Path, files: Vec<(String, String)>) -> anyhow::Result<()> {
    for (path, text) in files {
        let path = folder.join(path);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&path, text))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Checks that a name is valid as a crate, a file and a configuration section.
fn check_name(name: &str) -> anyhow::Result<()> {
    let has_form = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.len() <= 64
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
    ensure!(
        has_form,
        "'{}' is not a valid plugin name; use 1 to 64 of a-z, 0-9 and -, starting with a letter, such as my-router",
        name.escape_debug()
    );
    // `dir` and `order` are keys of [plugins]; the others are reserved by Cargo or Rust.
    let taken = [
        "dir",
        "order",
        "test",
        "core",
        "std",
        "alloc",
        "proc-macro",
        "build",
        "deps",
        "examples",
        "incremental",
    ];
    let of_the_project = ["pointsman-plugin", "schemars", "serde", "serde-json"];
    let keywords = [
        "as", "async", "await", "break", "const", "continue", "crate", "dyn", "else", "enum",
        "extern", "false", "fn", "for", "if", "impl", "in", "let", "loop", "match", "mod", "move",
        "mut", "pub", "ref", "return", "self", "static", "struct", "super", "trait", "true",
        "type", "unsafe", "use", "where", "while", "abstract", "become", "box", "do", "final",
        "gen", "macro", "override", "priv", "try", "typeof", "unsized", "virtual", "yield",
    ];
    let hyphenated = name.replace('_', "-");
    let is_taken = taken
        .iter()
        .chain(&of_the_project)
        .chain(&keywords)
        .any(|taken| *taken == hyphenated);
    ensure!(
        !is_taken,
        "'{name}' is reserved by Cargo, Rust or the configuration; choose another name, such as {name}-router"
    );
    Ok(())
}

/// Path and text of every file of the project.
fn project(name: &str, kind: Kind) -> anyhow::Result<Vec<(String, String)>> {
    let own = match kind {
        Kind::Filter => FILTER,
        Kind::Router => ROUTER,
    };
    let named = |text: &str| {
        let text = text
            .replace("MyPlugin", &type_name(name))
            .replace("my_plugin", &name.replace('-', "_"));
        text.replace(PLACEHOLDER, name)
            .replace("KIND", kind.name())
            .replace("VERSION", env!("CARGO_PKG_VERSION"))
    };
    let mut files: Vec<(String, String)> = Vec::new();
    for (path, text) in SHARED.iter().chain(&own) {
        // Not stored as `.gitignore`, which would apply to this repository.
        let path = if *path == "gitignore" {
            ".gitignore"
        } else {
            path
        };
        files.push((path.to_owned(), named(text)));
    }
    for (path, text) in SDK {
        let text = if path == "Cargo.toml" {
            standalone(text, WORKSPACE)?
        } else {
            text.to_owned()
        };
        files.push((format!("{SDK_FOLDER}/{path}"), text));
    }
    files.extend(WIT.map(|(path, text)| (format!("wit/{path}"), text.to_owned())));
    let manifest = files
        .iter()
        .find(|(path, _)| path == "Cargo.toml")
        .map(|(_, text)| text.as_str())
        .unwrap_or_default();
    files.push(("Cargo.lock".to_owned(), lock(manifest)?));
    Ok(files)
}

/// `my-router` as `MyRouter`.
fn type_name(name: &str) -> String {
    let words = name.split(['-', '_']).filter(|word| !word.is_empty());
    let words = words.map(|word| {
        let (first, rest) = word.split_at(1);
        format!("{}{rest}", first.to_ascii_uppercase())
    });
    words.collect()
}

/// Resolves `workspace = true` in a manifest and removes its lints, which are meant for SDK
/// developers only.
fn standalone(manifest: &str, workspace: &str) -> anyhow::Result<String> {
    let mut manifest: Table = manifest.parse()?;
    let workspace: Table = workspace.parse()?;
    manifest.remove("lints");
    for (section, from) in [
        ("package", "package"),
        ("dependencies", "dependencies"),
        ("dev-dependencies", "dependencies"),
    ] {
        let Some(section) = manifest.get_mut(section).and_then(Value::as_table_mut) else {
            continue;
        };
        for (key, value) in section.iter_mut() {
            if value.get("workspace").and_then(Value::as_bool) == Some(true) {
                let shared = workspace
                    .get("workspace")
                    .and_then(|workspace| workspace.get(from)?.get(key));
                *value = shared
                    .with_context(|| format!("the workspace has no {key}"))?
                    .clone();
            }
        }
    }
    Ok(format!(
        "# Generated by pointsman {}.\n\n{}",
        env!("CARGO_PKG_VERSION"),
        toml::to_string(&manifest)?
    ))
}

/// The project's lock file: the part of this program's lock file that the plugin depends on. Cargo
/// removes entries that turn out unused.
fn lock(manifest: &str) -> anyhow::Result<String> {
    let manifest: Table = manifest.parse()?;
    let own = |key: &str| {
        manifest["package"]
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
            .context("a package has a name")
    };
    let sections = ["dependencies", "dev-dependencies"]
        .iter()
        .filter_map(|section| manifest.get(*section)?.as_table());
    let needs: BTreeSet<String> = sections
        .flat_map(|section| section.keys().cloned())
        .collect();

    let (head, packages) = LOCK
        .split_once("[[package]]\n")
        .context("a lock file has packages")?;
    let packages: Vec<&str> = packages.split("[[package]]\n").collect();
    // Dependencies are listed by name alone, or by name and version if there are several versions.
    let mut by_name: BTreeMap<String, usize> = BTreeMap::new();
    let mut tables = Vec::with_capacity(packages.len());
    for (at, package) in packages.iter().enumerate() {
        let table: Table = package.parse()?;
        let text = |key: &str| {
            table
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        by_name.insert(text("name"), at);
        by_name.insert(format!("{} {}", text("name"), text("version")), at);
        tables.push(table);
    }
    let mut needed = BTreeSet::new();
    let mut open: Vec<String> = needs.iter().cloned().collect();
    while let Some(name) = open.pop() {
        let at = *by_name
            .get(&name)
            .with_context(|| format!("the lock file has no {name}"))?;
        if needed.insert(at) {
            let dependencies = tables[at].get("dependencies").and_then(Value::as_array);
            open.extend(
                dependencies
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .map(str::to_owned),
            );
        }
    }
    let listed: String = needs.iter().map(|name| format!(" \"{name}\",\n")).collect();
    let own = format!(
        "name = \"{}\"\nversion = \"{}\"\ndependencies = [\n{listed}]\n",
        own("name")?,
        own("version")?
    );
    let blocks = needed
        .into_iter()
        .map(|at| packages[at].trim_end())
        .chain([own.trim_end()]);
    let mut blocks: Vec<String> = blocks
        .map(|block| format!("[[package]]\n{block}\n"))
        .collect();
    blocks.sort();
    Ok(format!("{head}{}", blocks.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_below(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries
            .flat_map(|path| {
                if path.is_dir() {
                    files_below(&path)
                } else {
                    vec![path]
                }
            })
            .collect()
    }

    #[test]
    fn the_program_embeds_the_whole_sdk_and_contract() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for (folder, known) in [
            ("plugins/sdk", SDK.map(|(path, _)| path).to_vec()),
            ("wit", WIT.map(|(path, _)| path).to_vec()),
        ] {
            let folder = repository.join(folder);
            let there: BTreeSet<PathBuf> = files_below(&folder)
                .iter()
                .map(|path| path.strip_prefix(&folder).unwrap().into())
                .collect();
            let known: BTreeSet<PathBuf> = known.into_iter().map(PathBuf::from).collect();
            assert_eq!(
                there,
                known,
                "update the list in this file to match {}",
                folder.display()
            );
        }
    }

    #[test]
    fn a_project_has_no_workspace_inheritance_and_no_placeholders() {
        for kind in [Kind::Filter, Kind::Router] {
            for (path, text) in project("parcel-router", kind).unwrap() {
                assert!(
                    !text.contains("workspace = true") || path.ends_with(".rs"),
                    "{path}"
                );
                let is_ours =
                    path.starts_with("vendor") || path.starts_with("wit") || path == "Cargo.lock";
                assert!(
                    is_ours
                        || !["my-plugin", "MyPlugin", "my_plugin", "KIND", "VERSION"]
                            .iter()
                            .any(|word| text.contains(word)),
                    "{path}"
                );
            }
        }
    }

    #[test]
    fn the_lock_file_has_the_dependencies_of_a_plugin_but_not_those_of_a_node() {
        let files = project("parcel-router", Kind::Router).unwrap();
        let (_, lock) = files.iter().find(|(path, _)| path == "Cargo.lock").unwrap();
        for (package, is_needed) in [
            ("parcel-router", true),
            ("pointsman-plugin", true),
            ("wit-bindgen", true),
            ("serde_json", true),
            ("wasmtime", false),
            ("tokio", false),
        ] {
            assert_eq!(
                lock.contains(&format!("name = \"{package}\"\n")),
                is_needed,
                "{package} in\n{lock}"
            );
        }
        assert_eq!(lock.parse::<Table>().unwrap()["version"], Value::Integer(4));
    }

    #[test]
    fn plugin_names_must_suit_a_crate_a_file_and_a_configuration_section() {
        for good in ["my-router", "a", "parcels2", "with_underscore"] {
            check_name(good).unwrap();
        }
        for bad in [
            "",
            "2fast",
            "My-Router",
            "a b",
            "../x",
            "dir",
            "order",
            "fn",
            "test",
            "serde_json",
            "é",
            &"x".repeat(65),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert_eq!(type_name("my-parcel_router2"), "MyParcelRouter2");
    }
}
