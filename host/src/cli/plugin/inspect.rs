//! `pointsman plugin inspect`: prints everything that a plugin file reveals without a node. The
//! plugin may be written in any language.

use anyhow::bail;
use pointsman::escape::printable;
use pointsman::plugin::inspect::{Form, Inspection, inspect};

use super::Subject;
use crate::cli::render::format;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    subject: Subject,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let loaded = options.subject.load()?;
    let inspection = inspect(
        &loaded.engine()?,
        loaded.name.clone(),
        &loaded.bytes,
        &loaded.config,
        loaded.limits.clone(),
    );
    println!("{}", printable(&loaded.file.display().to_string()));
    for (what, text) in lines(&inspection) {
        println!("  {what:<10}  {}", text.replace('\n', "\n              "));
    }
    println!("  limits      {}", format::limits(&loaded.limits));
    println!("  name        {}", printable(loaded.name.as_str()));
    match inspection.failure {
        Some(failure) => bail!("{} {failure}", loaded.file.display()),
        None => Ok(()),
    }
}

fn lines(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let form = match inspection.form {
        Some(Form::CoreModule) => "a core module",
        Some(Form::Component) => "a component",
        None => "not WebAssembly",
    };
    lines.push((
        "file",
        format!("{form}, {}", format::size(inspection.bytes)),
    ));
    lines.push(("sha256", inspection.hash.clone()));
    let kind = match (inspection.is_filter, inspection.is_router) {
        (true, true) => "filter and router",
        (true, false) => "filter",
        (false, true) => "router",
        (false, false) => {
            "none: it exports neither pointsman:plugin/filter nor pointsman:plugin/router"
        }
    };
    lines.push(("kind", kind.to_owned()));
    if !inspection.contracts.is_empty() {
        let contracts: Vec<&str> = inspection.contracts.iter().map(String::as_str).collect();
        lines.push((
            "contract",
            format!("pointsman:plugin {}", contracts.join(", ")),
        ));
    }
    lines.push(("imports", format::imports(&inspection.imports).join("\n")));
    if let Some(manifest) = &inspection.manifest {
        lines.push((
            "manifest",
            format!(
                "{} {}: {}",
                manifest.name, manifest.version, manifest.description
            ),
        ));
    }
    if let Some(selection) = &inspection.selection {
        let or = |names: &[String], none: &str| {
            if names.is_empty() {
                none.to_owned()
            } else {
                names.join(", ").escape_debug().to_string()
            }
        };
        lines.push(("types", or(&selection.types, "all")));
        let payload = if selection.payload {
            "the whole payload"
        } else {
            "not the payload"
        };
        let reads = format!(
            "attributes {}; fields {}; {payload}",
            or(&selection.attributes, "none"),
            or(&selection.fields, "none")
        );
        lines.push(("reads", reads));
    }
    if let Some(bytes) = inspection.memory_bytes {
        lines.push((
            "memory",
            format!("{} per instance at start", format::size(bytes)),
        ));
    }
    if let Some(schema) = inspection
        .manifest
        .as_ref()
        .and_then(|manifest| manifest.config_schema.as_ref())
    {
        let pretty =
            serde_json::from_str::<serde_json::Value>(schema).map(|schema| format!("{schema:#}"));
        lines.push((
            "schema",
            pretty.unwrap_or_else(|_| "is not JSON".to_owned()),
        ));
    }
    lines
}
