//! The handlers, one file for each resource. `http.rs` lists their routes.

pub(super) mod acks;
pub(super) mod candidates;
pub(super) mod dead_letters;
pub(super) mod decisions;
pub(super) mod dry_run;
pub(super) mod events;
pub(super) mod explain;
pub(super) mod export;
pub(super) mod health;
pub(super) mod members;
pub(super) mod notifications;
pub(super) mod page;
pub(super) mod plugins;
pub(super) mod rollouts;
pub(super) mod stream;
pub(super) mod tickets;
pub(super) mod users;
