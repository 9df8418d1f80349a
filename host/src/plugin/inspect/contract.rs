//! The contract as text, for those who build against it without this repository: its files travel in the program.
//!
//! What the host makes of it is in `plugin::bindings`.

/// The files of `wit/`, by their names.
pub const WIT: [(&str, &str); 3] = [
    ("host.wit", include_str!("../../../../wit/host.wit")),
    ("plugin.wit", include_str!("../../../../wit/plugin.wit")),
    ("types.wit", include_str!("../../../../wit/types.wit")),
];
