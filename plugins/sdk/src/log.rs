//! Log lines for the operator. The host bounds them (by default 1 KiB per line and 100 lines per
//! second); tests capture them (see [`testing::logged`](crate::testing::logged)).

use std::fmt::Display;

#[doc(inline)]
pub use crate::bindings::lifecycle::pointsman::plugin::log::Level;

pub fn log(level: Level, message: impl Display) {
    let message = message.to_string();
    #[cfg(target_arch = "wasm32")]
    crate::bindings::lifecycle::pointsman::plugin::log::log(level, &message);
    #[cfg(not(target_arch = "wasm32"))]
    crate::test_host::log(level, message);
}

pub fn trace(message: impl Display) {
    log(Level::Trace, message);
}

pub fn debug(message: impl Display) {
    log(Level::Debug, message);
}

pub fn info(message: impl Display) {
    log(Level::Info, message);
}

pub fn warn(message: impl Display) {
    log(Level::Warn, message);
}

pub fn error(message: impl Display) {
    log(Level::Error, message);
}
