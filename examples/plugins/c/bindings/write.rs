//! `c-bindings FOLDER` writes the files that `generate.rs` generated into a folder.

use std::path::Path;
use std::{env, fs};

use anyhow::{Context, Result};

macro_rules! generated {
    ($($name:literal),+) => { [$(($name, include_bytes!(concat!(env!("OUT_DIR"), "/", $name)).as_slice())),+] };
}

const FILES: [(&str, &[u8]); 3] = generated![
    "full_plugin.h",
    "full_plugin.c",
    "full_plugin_component_type.o"
];

fn main() -> Result<()> {
    let folder = env::args_os()
        .nth(1)
        .context("missing argument; pass the output folder")?;
    fs::create_dir_all(&folder)?;
    for (name, content) in FILES {
        fs::write(Path::new(&folder).join(name), content)
            .with_context(|| format!("write {name}"))?;
    }
    Ok(())
}
