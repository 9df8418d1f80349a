//! The node's record cache: records are parsed and rendered once for all streams. Bounded by bytes;
//! the least recently used are evicted first.
//!
//! Keyed by partition, *epoch* and id: after a fail-over the same ids are issued again for other
//! events.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lru::LruCache;

use crate::broker::{Partitions, Result};
use crate::event::{Epoch, NotificationId, PartitionNumber};

use super::Record;

/// Bound on the stored bytes of all cached records. Their parsed form takes about three times as
/// much.
const MAX_BYTES: usize = 16 * 1024 * 1024;
const MAX_RECORDS: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();

type Key = (PartitionNumber, Epoch, NotificationId);

/// See the module documentation.
#[derive(Debug)]
pub struct RecordCache(Mutex<CacheState>);

#[derive(Debug)]
struct CacheState {
    by_key: LruCache<Key, Arc<Record>>,
    n_bytes: usize,
}

impl Default for RecordCache {
    fn default() -> Self {
        Self(Mutex::new(CacheState {
            by_key: LruCache::new(MAX_RECORDS),
            n_bytes: 0,
        }))
    }
}

impl RecordCache {
    pub fn get(&self, key: Key) -> Option<Arc<Record>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .by_key
            .get(&key)
            .cloned()
    }

    /// Parses and caches a stored record unless it is cached already. Returns `None` and logs an
    /// error if it is not a valid record.
    pub fn insert(&self, key: Key, stored: &Bytes) -> Option<Arc<Record>> {
        if let Some(held) = self.get(key) {
            return Some(held);
        }
        let record = match Record::parse(stored) {
            Ok(record) => Arc::new(record),
            Err(error) => {
                tracing::error!(partition = key.0.0, notification.id = key.2.0, %error, "cannot parse a stored record; check whether a newer version wrote it");
                return None;
            }
        };
        // Parsed without the lock. If another task has cached the same record meanwhile, `push`
        // returns that one and its bytes are subtracted.
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.n_bytes += record.n_bytes();
        if let Some((_, old)) = held.by_key.push(key, Arc::clone(&record)) {
            held.n_bytes -= old.n_bytes();
        }
        while held.n_bytes > MAX_BYTES
            && let Some((_, old)) = held.by_key.pop_lru()
        {
            held.n_bytes -= old.n_bytes();
        }
        Some(record)
    }

    /// Returns these records from the cache or the broker, `None` for each that is gone.
    ///
    /// # Errors
    /// Returns the broker's error.
    pub async fn read(
        &self,
        broker: &dyn Partitions,
        partition: PartitionNumber,
        epoch: Epoch,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Arc<Record>>>> {
        let mut found: Vec<_> = ids
            .iter()
            .map(|&id| self.get((partition, epoch, id)))
            .collect();
        let absent: Vec<usize> = (0..ids.len()).filter(|&at| found[at].is_none()).collect();
        if !absent.is_empty() {
            let wanted: Vec<_> = absent.iter().map(|&at| ids[at]).collect();
            let stored = broker.records(partition, &wanted).await?;
            for (at, stored) in absent.into_iter().zip(stored) {
                found[at] =
                    stored.and_then(|stored| self.insert((partition, epoch, ids[at]), &stored));
            }
        }
        Ok(found)
    }
}
