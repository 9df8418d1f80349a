//! Delivery: from the logs of the broker to open SSE streams.
//!
//! In the order in which a notification passes them: [`hub`] hands it to the streams that follow
//! its log (`follow` knows which), [`recipients`] chooses the route that wins for one recipient,
//! [`subscription`] is one open stream (replay, live, queue, cursor), and [`sse`] turns it into
//! bytes. [`device_cursors`] keeps positions of devices that have no open stream. Delivery never
//! reads a source and never runs a plugin.

pub mod device_cursors;
mod follow;
pub mod hub;
pub mod recipients;
pub mod sse;
pub mod subscription;
