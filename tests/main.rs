//! The integration tests: one file a promise.

mod harness {
    pub(crate) mod guests;
}
mod plugins;
