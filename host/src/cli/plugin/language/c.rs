//! Plugins in C: the bindings of the contract, generated as by `wit-bindgen c`, and zig as the
//! compiler, which brings a C library for WebAssembly.

use std::fs;

use anyhow::Context as _;
use wit_bindgen_c::Opts;
use wit_bindgen_core::Files;
use wit_bindgen_core::wit_parser::Resolve;

use super::{Project, run};

/// The folder of the generated bindings in a project.
const BINDINGS: &str = "build/bindings";

impl Project {
    /// Writes a core module, which names its world because the bindings have its component type.
    pub(super) fn c(&self, module: &str) -> anyhow::Result<()> {
        let bindings = self.write_bindings()?;
        let mut zig = self.zig_command()?;
        // A reactor has no main. The linker drops what nothing uses of the C library, including its
        // imports.
        zig.args([
            "cc",
            "--target=wasm32-wasi",
            "-mexec-model=reactor",
            "-std=c17",
            "-Wall",
            "-Wextra",
            "-Os",
            "-s",
            "-Wl,-z,stack-size=65536",
            "-I",
            BINDINGS,
            "-o",
            module,
        ]);
        zig.args(self.sources()?);
        zig.args(bindings.iter().map(|name| format!("{BINDINGS}/{name}")));
        zig.env("ZIG_LOCAL_CACHE_DIR", "build/cache");
        run(&mut zig)
    }

    /// The names of the C files in the project's folder.
    fn sources(&self) -> anyhow::Result<Vec<String>> {
        let entries = fs::read_dir(&self.folder)
            .with_context(|| format!("cannot read {}", self.folder.display()))?;
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".c"))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Writes the bindings of the world. Returns the names of the source and the object file.
    fn write_bindings(&self) -> anyhow::Result<Vec<String>> {
        let mut contract = Resolve::default();
        let wit = self.folder.join(&self.wit);
        let (package, _) = contract
            .push_path(&wit)
            .with_context(|| format!("cannot read the contract in {}", wit.display()))?;
        let world = contract.select_world(&[package], Some(&self.world))?;
        let mut files = Files::default();
        Opts::default()
            .build()
            .generate(&mut contract, world, &mut files)?;
        let folder = self.folder.join(BINDINGS);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let mut compiled = Vec::new();
        for (name, text) in files.iter() {
            fs::write(folder.join(name), text).with_context(|| format!("cannot write {name}"))?;
            if !name.ends_with(".h") {
                compiled.push(name.to_owned());
            }
        }
        Ok(compiled)
    }
}
