//! Rendering: how commands print answers of a node, as lines or tables.

pub(super) mod decision;
pub(super) mod format;
pub(super) mod plugins;
pub(super) mod table;
