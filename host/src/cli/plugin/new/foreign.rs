//! The projects of `pointsman plugin new` in languages other than Rust.
//!
//! The files that pass values across the boundary are those of `examples/plugins`, which a test
//! compares with Rust. A project has the sample events, the configuration and the expected decisions
//! of the one in Rust, because it decides the same.

use pointsman::plugin::inspect::contract::WIT;

use super::{FILTER, Kind, PLACEHOLDER, ROUTER};
use crate::cli::plugin::language::Language;

macro_rules! template {
    ($path:literal) => {
        include_str!(concat!("../../../../templates/plugin/", $path))
    };
}

macro_rules! example {
    ($path:literal) => {
        include_str!(concat!("../../../../../examples/plugins/", $path))
    };
}

/// A file of a project: its path and its text.
type File = (&'static str, &'static str);

const README: &str = template!("README.foreign.md");

const NPM: &str = "npm install             # the compiler, into node_modules";

/// How a project in one language is made.
pub(super) struct Scaffold {
    language: &'static str,
    /// The file with the plugin.
    pub(super) source: &'static str,
    router: &'static [File],
    filter: &'static [File],
    shared: &'static [File],
    /// The command that installs the toolchain.
    pub(super) install: &'static str,
    /// For the README.
    requires: &'static str,
}

impl Scaffold {
    /// `None` for Rust.
    pub(super) fn of(language: Language) -> Option<Self> {
        Some(match language {
            Language::Rust => return None,
            Language::Javascript => JAVASCRIPT,
            Language::Typescript => TYPESCRIPT,
            Language::Python => PYTHON,
            Language::Go => GO,
            Language::Zig => ZIG,
            Language::Assemblyscript => ASSEMBLYSCRIPT,
            Language::C => C,
        })
    }

    /// Path and text of every file of a project.
    pub(super) fn files(&self, name: &str, kind: Kind) -> Vec<(String, String)> {
        let (own, samples) = match kind {
            Kind::Filter => (self.filter, FILTER),
            Kind::Router => (self.router, ROUTER),
        };
        let named = |text: &str| {
            text.replace("REQUIRES", self.requires)
                .replace("LANGUAGE", self.language)
                .replace("SOURCE", self.source)
                .replace("KIND", kind.name())
                .replace(PLACEHOLDER, name)
                .replace("VERSION", env!("CARGO_PKG_VERSION"))
        };
        let samples = samples.iter().filter(|(path, _)| !path.ends_with(".rs"));
        let files = own
            .iter()
            .chain(self.shared)
            .chain(samples)
            .map(|(path, text)| ((*path).to_owned(), named(text)));
        let contract = WIT
            .iter()
            .map(|(path, text)| (format!("wit/{path}"), (*text).to_owned()));
        files
            .chain(contract)
            .chain([
                ("README.md".to_owned(), named(README)),
                (
                    ".gitignore".to_owned(),
                    "/build\n/node_modules\n".to_owned(),
                ),
                ("plugin.toml".to_owned(), named(MANIFEST)),
            ])
            .collect()
    }
}

const MANIFEST: &str = "# Read by `pointsman plugin build` and `pointsman plugin test`.
name = \"my-plugin\"
language = \"LANGUAGE\"
# The world of the contract in wit/ that the plugin implements.
world = \"KIND-plugin\"
";

const JAVASCRIPT: Scaffold = Scaffold {
    language: "javascript",
    source: "plugin.js",
    router: &[("plugin.js", template!("javascript/router.js"))],
    filter: &[("plugin.js", template!("javascript/filter.js"))],
    shared: &[("package.json", template!("javascript/package.json"))],
    install: NPM,
    requires: "Node.js 20 or newer; `npm install` installs componentize-qjs, which adds the engine QuickJS",
};

const TYPESCRIPT: Scaffold = Scaffold {
    language: "typescript",
    source: "plugin.ts",
    router: &[("plugin.ts", template!("typescript/router.ts"))],
    filter: &[("plugin.ts", template!("typescript/filter.ts"))],
    shared: &[
        ("package.json", template!("typescript/package.json")),
        ("tsconfig.json", template!("typescript/tsconfig.json")),
        ("contract.d.ts", template!("typescript/contract.d.ts")),
    ],
    install: NPM,
    requires: "Node.js 20 or newer; `npm install` installs TypeScript and componentize-qjs, which adds the engine QuickJS. `contract.d.ts` has the types of the contract",
};

const PYTHON: Scaffold = Scaffold {
    language: "python",
    source: "plugin.py",
    router: &[("plugin.py", template!("python/router.py"))],
    filter: &[("plugin.py", template!("python/filter.py"))],
    shared: &[("requirements.txt", template!("python/requirements.txt"))],
    install: "python3 -m venv build/venv && build/venv/bin/pip install -r requirements.txt",
    requires: "Python 3.10 or newer, and componentize-py: `python3 -m venv build/venv && build/venv/bin/pip install -r requirements.txt`. The interpreter needs more memory than the default: `memory_mib = 64` in `[plugins.my-plugin]`",
};

const GO: Scaffold = Scaffold {
    language: "go",
    source: "main.go",
    router: &[
        ("main.go", template!("go/router.go")),
        ("pointsman/router.go", example!("go/pointsman/router.go")),
    ],
    filter: &[
        ("main.go", template!("go/filter.go")),
        ("pointsman/filter.go", example!("go/pointsman/filter.go")),
    ],
    shared: &[
        ("go.mod", template!("go/go.mod")),
        (
            "pointsman/contract.go",
            example!("go/pointsman/contract.go"),
        ),
        ("pointsman/abi.go", example!("go/pointsman/abi.go")),
    ],
    install: "go version              # 1.24 or newer",
    requires: "Go 1.24 or newer. The package `pointsman` has the types of the contract",
};

const ZIG: Scaffold = Scaffold {
    language: "zig",
    source: "plugin.zig",
    router: &[("plugin.zig", template!("zig/router.zig"))],
    filter: &[("plugin.zig", template!("zig/filter.zig"))],
    shared: &[("contract.zig", example!("zig/contract.zig"))],
    install: "zig version             # 0.17, for example: pip install ziglang==0.17.1",
    requires: "Zig 0.17 as `zig`, or as `python-zig` from the package `ziglang` of PyPI. `contract.zig` has the types of the contract",
};

const ASSEMBLYSCRIPT: Scaffold = Scaffold {
    language: "assemblyscript",
    source: "plugin.ts",
    router: &[
        ("plugin.ts", template!("assemblyscript/router.ts")),
        ("exports.ts", template!("assemblyscript/exports.router.ts")),
        (
            "pointsman/router.ts",
            example!("assemblyscript/pointsman/router.ts"),
        ),
    ],
    filter: &[
        ("plugin.ts", template!("assemblyscript/filter.ts")),
        ("exports.ts", template!("assemblyscript/exports.filter.ts")),
        (
            "pointsman/filter.ts",
            example!("assemblyscript/pointsman/filter.ts"),
        ),
    ],
    shared: &[
        ("package.json", template!("assemblyscript/package.json")),
        ("json.ts", example!("assemblyscript/json.ts")),
        (
            "pointsman/contract.ts",
            example!("assemblyscript/pointsman/contract.ts"),
        ),
        (
            "pointsman/event.ts",
            example!("assemblyscript/pointsman/event.ts"),
        ),
        (
            "pointsman/lifecycle.ts",
            example!("assemblyscript/pointsman/lifecycle.ts"),
        ),
        (
            "pointsman/exports.mjs",
            example!("assemblyscript/pointsman/exports.mjs"),
        ),
    ],
    install: NPM,
    requires: "Node.js 20 or newer; `npm install` installs the compiler. `pointsman/contract.ts` has the types of the contract",
};

const C: Scaffold = Scaffold {
    language: "c",
    source: "plugin.c",
    router: &[("plugin.c", template!("c/router.c"))],
    filter: &[("plugin.c", template!("c/filter.c"))],
    shared: &[
        ("json.c", example!("c/json.c")),
        ("json.h", example!("c/json.h")),
        ("memory.h", example!("c/memory.h")),
    ],
    install: "zig version             # the compiler, 0.17; for example: pip install ziglang==0.17.1",
    requires: "Zig 0.17, whose `zig cc` is a C compiler with a C library for WebAssembly: as `zig`, or as `python-zig` from the package `ziglang` of PyPI. `pointsman plugin build` writes the bindings of the contract into `build/bindings`, as `wit-bindgen c` does",
};

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn a_project_in_any_language_has_the_contract_and_no_placeholders() {
        for language in Language::value_variants() {
            let Some(scaffold) = Scaffold::of(*language) else {
                continue;
            };
            for kind in [Kind::Filter, Kind::Router] {
                let files = scaffold.files("parcel-router", kind);
                for path in [
                    scaffold.source,
                    "wit/types.wit",
                    "golden.json",
                    "plugin.toml",
                ] {
                    assert!(files.iter().any(|(file, _)| file == path), "{path}");
                }
                for (path, text) in &files {
                    let words = ["my-plugin", "KIND", "LANGUAGE", "SOURCE", "REQUIRES"];
                    let is_left = |word: &&str| text.contains(*word);
                    assert_eq!(words.iter().find(|word| is_left(word)), None, "{path}");
                }
            }
        }
    }
}
