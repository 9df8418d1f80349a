//! Write Pointsman plugins in Rust.
//!
//! A plugin decides once per event: a [`Filter`] keeps, amends or drops it; a [`Router`] returns
//! the routes that address its recipients. The crate consists of plain values and traits, so a
//! plugin runs natively in tests ([`testing`]). [`export!`] turns it into a WebAssembly plugin with
//! `cargo build --target wasm32-unknown-unknown`: the macro supplies the manifest, the JSON Schema
//! and the parsing of the configuration, and a panic hook that logs the location of a panic.
//!
//! ```
//! use pointsman_plugin::{Event, Failure, Issue, Plugin, Route, Router, export};
//!
//! #[derive(serde::Deserialize, schemars::JsonSchema)]
//! struct Config {
//!     attribute: String,
//! }
//!
//! struct Owner(Config);
//!
//! impl Plugin for Owner {
//!     type Config = Config;
//!     fn new(config: Config) -> Result<Self, Issue> {
//!         Ok(Self(config))
//!     }
//! }
//!
//! impl Router for Owner {
//!     fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
//!         Ok(event.text(&self.0.attribute).map(Route::to_user).into_iter().collect())
//!     }
//! }
//!
//! export!(Owner as router);
//! ```
//!
//! On WebAssembly the crate also provides an allocator suited to short calls (the feature
//! `allocator`, on by default). A plugin that defines its own `#[global_allocator]` depends on the
//! crate with `default-features = false`.
//!
//! A configuration may use the same building blocks as the bundled plugins: [`Condition`]s on
//! events, [`Selector`]s of their values, [`OneOrMore`] and [`Ttl`]. Mistakes in them are found
//! while the configuration is parsed and are reported with their location.
//!
//! `wit/` defines the interface to the host; the host sets and enforces the limits. There is no
//! state between events: an instance sees only some of the events and may be replaced after any of
//! them, which is why [`Filter`] and [`Router`] take `&self`.

mod bindings;
pub mod clock;
mod condition;
mod configuration;
mod event;
mod export;
mod failure;
#[cfg(any(
    test,
    all(
        target_arch = "wasm32",
        not(target_feature = "atomics"),
        feature = "allocator"
    )
))]
mod heap;
pub mod log;
mod one_or_more;
mod pattern;
mod plugin;
mod selector;
mod test_host;
pub mod testing;
mod value;

#[doc(inline)]
pub use bindings::lifecycle::exports::pointsman::plugin::lifecycle::Issue;
#[doc(inline)]
pub use bindings::lifecycle::pointsman::plugin::types::{
    Attribute, Criteria, Operator, Payload, Priority, Target, Test, Value,
};
pub use condition::{Condition, Regex, Wanted};
pub use event::Event;
pub use failure::Failure;
pub use one_or_more::OneOrMore;
pub use plugin::{
    Amendment, Filter, Interest, NoConfig, Plugin, RESERVED_EVENT_NAMES, Route, Router, Verdict,
    is_reserved_event_name,
};
pub use selector::{AttributeName, Pointer, Selector};
pub use value::Ttl;

/// Used only by the expansion of [`export!`].
#[doc(hidden)]
pub mod rt {
    pub use crate::bindings::{filter, lifecycle, router};
    pub use crate::export::{Component, Exported};
}
