//! Bridges: each message of a Redis Pub/Sub channel becomes an event, for publishers that know only
//! `PUBLISH`.
//!
//! `settings` is the `[[bridge]]` table, `template` its texts with values of a `message`,
//! `conversion` turns a message into the fields of an entry, `queue` holds messages until they are
//! appended, and `listener` receives and appends them. A bridge only appends to a source: like
//! publishers over HTTP, it knows neither ingest nor delivery, and they do not know it.
//!
//! A message is appended at most once, whatever fails: see [`crate::broker::Channels`]. Messages
//! that are published while no node listens are missed. Every received message is counted by
//! outcome, and the time in which no node listened is counted as well.

mod conversion;
mod listener;
mod message;
mod queue;
mod settings;
mod template;

pub use listener::Listener;
pub use settings::{Bridge, Settings};
