//! What only Redis can be asked: what others do to its keys, full memory, another life, a source made again. And how the suite opens it.

use std::sync::Mutex;

use super::*;
use crate::harness::redis::RedisServer;
use pointsman::broker::redis::Redis;

/// A Redis of its own with some partitions.
pub(super) struct RedisStore {
    server: Mutex<RedisServer>,
    sources: Vec<String>,
}

impl RedisStore {
    pub(super) fn new(n_partitions: usize) -> Self {
        // One of the keys has a tag of its own.
        let names = ["pointsman:events", "pointsman:b", "pointsman:{c}:d", "pointsman:e"];
        Self { server: Mutex::new(RedisServer::start()), sources: names[..n_partitions].iter().map(ToString::to_string).collect() }
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn open(&self, retention: &Retention) -> Arc<dyn Broker> {
        let url = self.server.lock().expect("no test panicked").url();
        Arc::new(Redis::connect(&url, &self.sources, retention.clone()).await.expect("connect"))
    }

    async fn reopen(&self, retention: &Retention) -> Arc<dyn Broker> {
        self.open(retention).await
    }
}
