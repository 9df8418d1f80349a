//! Plugins: WebAssembly files that filter and route events.
//!
//! [`runtime`] turns a file into a [`Plugin`] and calls it, within its limits. [`registry`] decides
//! which plugins are active, in which version and order. [`shadow`] compares candidates with active
//! plugins on live events. [`inspect`] explains a file to its author.
//!
//! `ingest::pipeline` calls the active plugins for each event and handles their failures.

pub mod inspect;
pub mod registry;
pub mod runtime;
pub mod shadow;

pub use self::inspect::embed::embed;
pub use self::inspect::noop::noop;
pub use self::registry::folder::{check_folder, name_of_file};
pub use self::runtime::call::{Amended, Answer, Call, CallError, ParsedPayload, Role};
pub use self::runtime::compiler::{CompileBudget, CompileIn, compile_as_child};
pub use self::runtime::deadline::Ticking;
pub use self::runtime::engine::{Engine, EngineOptions};
pub use self::runtime::error::LoadError;
pub use self::runtime::layout::MemoryLayout;
pub use self::runtime::limits::{Limits, MAX_FILE_BYTES};
pub use self::runtime::manifest::Manifest;
pub use self::runtime::plugin::{Instance, Plugin};
pub use self::runtime::selection::Selection;
pub use self::runtime::thread::thread_cpu_time;

pub(crate) use self::runtime::call::ATTEMPTS;
pub(crate) use self::runtime::thread::lower_thread_priority;
