//! A plugin's description of itself. The text is made printable but otherwise untrusted.

use super::selection::Selection;

/// The part of the description for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub description: String,
    /// A JSON Schema of the configuration, for tools. The host does not validate against it; the
    /// plugin checks its configuration when it parses it.
    pub config_schema: Option<String>,
}

/// The whole description, not yet checked.
pub(in crate::plugin) struct Description {
    pub(in crate::plugin) manifest: Manifest,
    pub(in crate::plugin) selection: Selection,
}
