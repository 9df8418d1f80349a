//! `pointsman plugin build`: builds the file that a node loads and prints its size, imports and
//! hash.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use pointsman::plugin::inspect;

use super::language;
use super::toolchain::Profile;
use crate::cli::render::format;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Folder of the plugin project
    #[arg(default_value = ".")]
    dir: PathBuf,
    #[command(flatten)]
    profile: Profile,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    for file in language::build(&options.dir, &options.profile)? {
        show(&file)?;
    }
    Ok(())
}

fn show(file: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let inspection = inspect::scan(&bytes);
    println!("{}", file.display());
    println!("  size      {}", format::size(bytes.len()));
    println!(
        "  imports   {}",
        format::imports(&inspection.imports).join("\n            ")
    );
    println!("  sha256    {}", inspection.hash);
    Ok(())
}
