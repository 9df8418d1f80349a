//! The plugin platform: isolation, composed components, reload, shadowing, the compile cache, and
//! the decisions of plugins.

mod compilation;
mod compile_cache;
mod composition;
mod contract;
mod decisions;
mod docs_samples;
mod hostile_plugins;
mod isolation;
mod languages;
mod missing_plugins;
mod reload;
mod rollout;
mod rollout_faults;
mod shadow;
