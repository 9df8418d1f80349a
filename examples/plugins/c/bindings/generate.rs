//! Generates the C bindings of the world `full-plugin`: a header, a source file and an object file.
//! The object file carries the component type into the finished module, where the host reads it.
//! Equivalent to `wit-bindgen c --world full-plugin wit`, but without an installation of that tool.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::Result;
use wit_bindgen_c::Opts;
use wit_bindgen_core::Files;
use wit_bindgen_core::wit_parser::Resolve;

const WIT: &str = "../../../../wit";

fn main() -> Result<()> {
    #[expect(
        clippy::print_stdout,
        reason = "a build script passes instructions to Cargo on standard output"
    )]
    {
        println!("cargo::rerun-if-changed={WIT}");
    }
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(WIT)?;
    let world = resolve.select_world(&[package], Some("full-plugin"))?;
    let mut files = Files::default();
    Opts::default()
        .build()
        .generate(&mut resolve, world, &mut files)?;
    let folder = PathBuf::from(env::var("OUT_DIR")?);
    for (name, content) in files.iter() {
        fs::write(folder.join(Path::new(name)), content)?;
    }
    Ok(())
}
