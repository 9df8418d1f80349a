//! Write Pointsman plugins in Rust.
//!
//! A plugin decides once per event: a [`Filter`] keeps, amends or drops it, a [`Router`] answers who hears of it. The crate is
//! plain values and traits, so `cargo test` runs a plugin natively ([`testing`]); [`export!`] turns it into a WebAssembly plugin with
//! `cargo build --target wasm32-unknown-unknown`, and supplies the manifest, the schema and the parsing of the configuration, and a
//! panic hook that tells the operator where.
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
//! On WebAssembly the crate also brings an allocator that suits such calls (the feature `allocator`, on by default). A plugin with a
//! `#[global_allocator]` of its own takes the crate with `default-features = false`.
//!
//! A configuration may use what the bundled plugins use: [`Condition`]s on events, [`Selector`]s of their values, [`OneOrMore`], [`Ttl`].
//! Their mistakes are found as the configuration is parsed, and told with their place.
//!
//! What crosses to the host, and how, is `wit/`; what the host allows a plugin is the host's business. There is no state between
//! events: an instance sees some of them and may be replaced after any, which is why [`Filter`] and [`Router`] take `&self`.

mod bindings;
pub mod clock;
mod condition;
mod event;
mod export;
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
pub mod testing;
mod value;

#[doc(inline)]
pub use bindings::lifecycle::exports::pointsman::plugin::lifecycle::Issue;
#[doc(inline)]
pub use bindings::lifecycle::pointsman::plugin::types::{
    Attribute, Criteria, Failure, Operator, Payload, Priority, Target, Test, Value,
};
pub use condition::{Condition, Regex, Wanted};
pub use event::Event;
pub use one_or_more::OneOrMore;
pub use plugin::{Amendment, Filter, Interest, NoConfig, Plugin, Route, Router, Verdict};
pub use selector::{AttributeName, Pointer, Selector};
pub use value::Ttl;

/// For the expansion of [`export!`] alone.
#[doc(hidden)]
pub mod rt {
    pub use crate::bindings::{filter, lifecycle, router};
    pub use crate::export::{Component, Exported};
}
