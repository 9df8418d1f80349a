//! Tickets: one key each, which expires.

use std::time::Duration;

use bytes::Bytes;

use super::{Redis, client};
use crate::broker::Result;
use crate::duration::millis;

/// See [`crate::broker::Users::store_ticket`].
pub(super) async fn store(redis: &Redis, id: &str, ticket: &[u8], ttl: Duration) -> Result<()> {
    let set = client::cmd("SET")
        .arg(redis.prefix.ticket(id))
        .arg(ticket)
        .arg("PX")
        .arg(millis(ttl).max(1))
        .take();
    let _ok: String = redis.connection.query(&set).await?;
    Ok(())
}

/// See [`crate::broker::Users::take_ticket`].
pub(super) async fn take(redis: &Redis, id: &str) -> Result<Option<Bytes>> {
    let take = client::cmd("GETDEL").arg(redis.prefix.ticket(id)).take();
    let found: Option<Vec<u8>> = redis.connection.query(&take).await?;
    Ok(found.map(Bytes::from))
}
