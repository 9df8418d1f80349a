//! The text of the contract, embedded in the binary for plugin authors who build without this
//! repository.
//!
//! The host's implementation is in `plugin::bindings`.

/// The files of `wit/`, by name.
pub const WIT: [(&str, &str); 3] = [
    ("host.wit", include_str!("../../../../wit/host.wit")),
    ("plugin.wit", include_str!("../../../../wit/plugin.wit")),
    ("types.wit", include_str!("../../../../wit/types.wit")),
];
