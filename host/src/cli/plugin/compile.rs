//! `pointsman plugin compile`: fills the cache of compiled plugins when an image is built, so that
//! the first start of a node compiles nothing.

use std::path::PathBuf;

use anyhow::{Context as _, anyhow, bail, ensure};
use pointsman::escape::printable;
use pointsman::plugin::registry::settings::user_cache_folder;
use pointsman::plugin::runtime::cache::Cache;
use pointsman::plugin::{Limits, Plugin};
use pointsman::telemetry::metrics::Metrics;

use super::{CACHE_VARIABLE, engine, plugins, read};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Plugin folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Folder of the cache, as plugins.cache of the node [default: that of a node without
    /// broker.data and plugins.cache]
    #[arg(long, value_name = "DIR", env = CACHE_VARIABLE)]
    cache: Option<PathBuf>,
    /// Read the budget for compiling from [plugins] in this pointsman.toml
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let plugins = match &options.settings {
        Some(path) => plugins(path)?,
        None => pointsman::plugin::registry::settings::Config::default(),
    };
    let folder = options.cache.clone().or_else(|| plugins.cache.clone());
    let folder = folder
        .or_else(user_cache_folder)
        .filter(|folder| !folder.as_os_str().is_empty())
        .context("no cache folder; pass --cache DIR")?;
    let cache = Cache::open(&folder, Metrics::default())
        .map_err(|reason| anyhow!("the plugin cache {} {reason}", folder.display()))?;
    let engine = engine(Some(cache), &plugins)?;
    let listed = std::fs::read_dir(&options.folder)
        .with_context(|| format!("cannot read {}", options.folder.display()))?;
    let mut files = Vec::new();
    for file in listed {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".wasm") && !name.starts_with('.') {
            files.push(path);
        }
    }
    files.sort();
    ensure!(
        !files.is_empty(),
        "{} has no .wasm files; pass the folder of the plugins",
        options.folder.display()
    );
    let limits = Limits::default();
    let mut refused = Vec::new();
    for file in files {
        let path = printable(&file.display().to_string());
        match Plugin::compile(&engine, &read(&file, limits.file_bytes)?, &limits) {
            Ok(Some(time)) => println!("{path}: compiled in {:.1} s", time.as_secs_f64()),
            Ok(None) => println!("{path}: in the cache"),
            Err(reason) => refused.push(format!("{path} {reason}")),
        }
    }
    if !refused.is_empty() {
        bail!("{}", refused.join("\n"));
    }
    println!("cache: {}", printable(&folder.display().to_string()));
    Ok(())
}
