//! Ingest: from an entry of a source to its outcome.
//!
//! [`worker`] reads one source after its position, has each batch evaluated and commits the
//! outcomes. [`pipeline`] runs the plugins, and `proposal` turns their result into what is
//! committed. `quotes` warns of a common mistake of publishers. None knows streams or subscribers:
//! ingest and delivery meet only in the log, which belongs to the broker.

pub mod pipeline;
pub(crate) mod proposal;
mod quotes;
pub mod worker;

pub use pipeline::Pipeline;
pub use worker::{Config, Ingest};
