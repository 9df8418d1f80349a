//! Regression tests for the interleavings that shaped the delivery protocol.
//!
//! `docs/protocol.md` describes the protocol and lists the interleavings by number: F1 to F27 broke
//! the first drafts (a consumer group with acknowledgements, a watermark per recipient shard), and
//! H1 to H18 were found by simulating the protocol that replaced them. Each test here carries one
//! interleaving over to the present protocol and fails if the rule that resolves it is removed.
//!
//! Ingest and delivery run together, on a broker whose operations and notices a test can stop, fail
//! and hold back ([`puppet`]). [`simulation`] combines all faults at random. Interleavings that
//! concern the broker alone are tested in `conformance` and in the unit tests of each broker.
//!
//! Two interleavings have no test because their subject does not exist: F15 concerns a bridge from
//! Pub/Sub, F27 the slots of a Redis Cluster.

mod cursors;
mod devices;
mod epochs;
mod faulty_broker;
mod fixture;
mod gaps;
mod ingest;
mod members;
mod priorities;
mod replay;
mod simulation;

/// Generates one test per interleaving and broker, named
/// `protocol::<file>::<broker>::<interleaving>`.
macro_rules! on_each_broker {
    ($($interleaving:ident,)+) => {
        on_each_broker!(@on redis, $($interleaving,)+);
        on_each_broker!(@on embedded, $($interleaving,)+);
    };
    (@on $broker:ident, $($interleaving:ident,)+) => {
        mod $broker {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $interleaving() {
                    super::$interleaving($crate::protocol::fixture::Stage::$broker().await).await;
                }
            )+
        }
    };
}
use on_each_broker;
