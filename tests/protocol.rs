//! The interleavings that shaped the delivery protocol, each carried over to the protocol as it is: a test that plays it and holds only
//! while the rule that mends it is kept.
//!
//! They are named after the lists in which they were found: `f..` were found by attacking the first drafts (a consumer group with
//! acknowledgements, a watermark for each shard of recipients), `h..` by simulating what came of that. A letter behind the number tells the
//! parts of one apart. What a broker must do by itself is asked in `conformance` and in its own unit tests, under the same names; here ingest
//! and delivery play along, over a broker on strings (`puppet`), and at last everything at once (`simulation`).
//!
//! Each of `f01` to `f26` and `h01` to `h18` has a test. Two of the lists can be met by nobody yet: `f15`, that a bridge from Pub/Sub delivers
//! a message twice while two nodes own it, or never in between (there is no bridge), and `f27`, the slots of a cluster (there is one Redis).
//! From `f28` on they are about words and bounds; where code keeps them, they have tests as well.

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

/// Makes a test of each interleaving on each broker, named as `protocol::<file>::<broker>::<interleaving>`.
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
