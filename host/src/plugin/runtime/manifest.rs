//! A plugin's description of itself. The text is made printable but otherwise untrusted.

use super::selection::Selection;

/// The part of the description for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub description: String,
    /// A JSON Schema of the configuration, which is checked before the plugin becomes active.
    pub config_schema: Option<String>,
}

/// The whole description, not yet checked.
pub(in crate::plugin) struct Description {
    pub(in crate::plugin) manifest: Manifest,
    /// Why the options of the manifest are not all known, if so.
    pub(in crate::plugin) unknown_option: Option<String>,
    pub(in crate::plugin) selection: Selection,
}
