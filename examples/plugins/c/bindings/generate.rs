//! Generates the bindings of the world `full-plugin` for C: a header, a source, and an object file that tells the host, from within the
//! finished module, what its functions mean. Does what `wit-bindgen c --world full-plugin wit` does, and needs nothing installed.

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
        reason = "it is how a build script speaks to Cargo"
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
