//! The smallest possible plugin, a baseline for measurements: the cost of a call that does nothing.

use anyhow::Context as _;
use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::{Resolve, SourceMap};

use super::contract::WIT;

/// A core module that is a filter and a router, keeps every event and names no recipient. It is
/// built from its source on each call.
///
/// # Errors
/// The source does not match the contract, which is a bug in this program.
pub fn noop() -> anyhow::Result<Vec<u8>> {
    let mut files = SourceMap::default();
    for (name, text) in WIT {
        files.push_str(name, text);
    }
    let mut contract = Resolve::default();
    let package = files
        .parse()
        .map_err(|(_, error)| error)
        .context("cannot parse the contract")?;
    let package = contract
        .push_group(package)
        .context("the contract is inconsistent")?;
    let world = contract.select_world(&[package], Some("full-plugin"))?;
    let mut module = wat::parse_str(include_str!("noop.wat"))?;
    embed_component_metadata(&mut module, &contract, world, StringEncoding::UTF8)?;
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EntryId, Event, Name};
    use crate::plugin::shadow::outcome::PluginDecision;
    use crate::plugin::{Engine, Limits, Plugin, Role};
    use crate::preview::runner::PluginRunner;

    #[test]
    fn the_noop_plugin_keeps_every_event_and_names_no_recipient() {
        let engine = Engine::new().unwrap();
        let plugin = Plugin::load(
            &engine,
            Name::parse("nothing").unwrap(),
            &noop().unwrap(),
            "{}",
            Limits::default(),
        )
        .unwrap();
        assert!(plugin.has_role(Role::Filter) && plugin.has_role(Role::Router));
        let mut runner = PluginRunner::new(&engine, plugin);
        let event = Event::from_json(
            EntryId::default(),
            "-",
            br#"{"type":"t","id":"a","user":"42","data":{"a":1}}"#,
        )
        .unwrap();
        // Enough calls to run out of memory if the texts of an event were not freed.
        for _ in 0..10_000 {
            let report = runner.run(&event, 0);
            assert!(
                matches!(
                    report.decided[..],
                    [PluginDecision::Keep, PluginDecision::None]
                ),
                "{report:?}"
            );
        }
    }
}
