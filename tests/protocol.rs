//! The interleavings that shaped the delivery protocol, each carried over to the protocol as it is: a test that plays it and holds only
//! while the rule that mends it is kept.
//!
//! They are named after the lists in which they were found: `f..` were found by attacking the first drafts (a consumer group with
//! acknowledgements, a watermark for each shard of recipients), `h..` by simulating what came of that. What a broker must do by itself is
//! asked in `conformance`; here ingest and delivery play along, over a broker on strings (`puppet`).

mod cursors;
mod devices;
mod gaps;
mod ingest;
mod lives;
mod members;
mod priorities;
mod puppet;
mod replay;
mod stage;

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
                    super::$interleaving($crate::protocol::stage::Stage::$broker().await).await;
                }
            )+
        }
    };
}
use on_each_broker;
