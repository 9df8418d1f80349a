//! Tests that only Redis allows: external writes to its keys, full memory, a new epoch and outages.
//! Also opens Redis for the suite.

use std::sync::Mutex;

use super::*;
use crate::harness::redis::RedisServer;
use pointsman::broker::redis::{Prefix, Redis};
use pointsman::broker::{Error, Severity};

mod bridges;
mod costs;
mod epochs;
mod external_writes;
mod foreign_ids;
mod installations;
mod large_entries;
mod outages;
mod peers;
mod retries;
mod rights;
mod rollouts;
mod set_up;

/// A Redis server of its own, with some partitions.
pub(super) struct RedisStore {
    server: Mutex<RedisServer>,
    sources: Vec<String>,
}

impl RedisStore {
    pub(super) fn new(n_partitions: usize) -> Self {
        // One of the keys has a hash tag of its own.
        let names = [
            "pointsman:events",
            "pointsman:b",
            "pointsman:{c}:d",
            "pointsman:e",
        ];
        Self {
            server: Mutex::new(RedisServer::start()),
            sources: names[..n_partitions]
                .iter()
                .map(ToString::to_string)
                .collect(),
        }
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn open(&self, retention: &Retention) -> Arc<dyn Broker> {
        let url = self.server.lock().expect("no test panicked").url();
        Arc::new(
            Redis::connect(&url, &Prefix::default(), &self.sources, retention.clone())
                .await
                .expect("connect"),
        )
    }

    async fn reopen(&self, retention: &Retention) -> Arc<dyn Broker> {
        self.open(retention).await
    }
}

const SOURCE: &str = "pointsman:events";
const TAG: &str = "pointsman:{pointsman:events}:";
const CHANNELS: &str = "pointsman:0:{pointsman:events}:";
const BEGIN: NotificationId = NotificationId(0);

async fn connect_to(url: &str, sources: &[&str], retention: Retention) -> Result<Node, Error> {
    let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
    Ok(Node::new(Arc::new(
        Redis::connect(url, &Prefix::default(), &sources, retention).await?,
    )))
}

/// A node with one partition, [`SOURCE`].
async fn node_on(server: &RedisServer) -> Node {
    connect_to(&server.url(), &[SOURCE], Retention::default())
        .await
        .expect("connect")
}

/// Commits all waiting entries, as an owner does, and returns their number.
async fn drain(node: &Node) -> usize {
    let mut n_drained = 0;
    loop {
        let head = node.head().await;
        let entries = node
            .broker
            .read(node.p, head.position.entry, 64, Duration::ZERO)
            .await
            .expect("read");
        if entries.is_empty() {
            return n_drained;
        }
        n_drained += entries.len();
        node.commit_from(
            &head,
            entries
                .iter()
                .map(|entry| commit(entry.id, "R", &["u:1"]))
                .collect(),
        )
        .await;
    }
}
