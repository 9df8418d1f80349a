//! Decision records, newest first: reads the stream `decisions` of a partition backwards.

use std::collections::BTreeMap;

use super::command_connection::unexpected;
use super::partition_keys::PartitionKeys;
use super::{Redis, client, optional_id, understand};
use crate::broker::{Found, Result};
use crate::event::{Decision, EntryId, NotificationId, Outcome};

/// Records per read of a search, which occupies Redis for about a millisecond.
const PAGE: usize = 1_000;

type Decided = (EntryId, Outcome, Option<NotificationId>, Decision);
/// The id in the stream, from which the next read continues, and the fields.
type Raw = (String, BTreeMap<String, String>);

/// See [`crate::broker::Operations::decisions`].
pub(super) async fn newest(
    redis: &Redis,
    place: &PartitionKeys,
    limit: usize,
) -> Result<Vec<Decided>> {
    read(redis, place, "+", limit)
        .await?
        .iter()
        .map(decided)
        .collect()
}

/// See [`crate::broker::Operations::find_decisions`].
pub(super) async fn find(
    redis: &Redis,
    place: &PartitionKeys,
    event_id: &str,
    limit: usize,
) -> Result<Found> {
    let (mut found, mut from) = (Found::default(), "+".to_owned());
    loop {
        let page = read(redis, place, &from, PAGE).await?;
        let Some((last, _)) = page.last() else {
            return Ok(found);
        };
        from = format!("({last}");
        for raw in &page {
            let decided = decided(raw)?;
            let (entry, .., decision) = &decided;
            found.reaches_to = Some(*entry);
            if decision.is_about(*entry, event_id) {
                found.decisions.push(decided);
                if found.decisions.len() == limit {
                    return Ok(found);
                }
            }
        }
    }
}

async fn read(redis: &Redis, place: &PartitionKeys, from: &str, count: usize) -> Result<Vec<Raw>> {
    redis
        .link
        .query(
            client::cmd("XREVRANGE")
                .arg(format!("{}decisions", place.prefix))
                .arg(from)
                .arg("-")
                .arg("COUNT")
                .arg(count),
        )
        .await
}

fn decided((_, fields): &Raw) -> Result<Decided> {
    let text = |name: &str| fields.get(name).map(String::as_str).unwrap_or_default();
    let decision = serde_json::from_str(text("decision")).map_err(|error| unexpected(&error))?;
    Ok((
        understand(text("entry"))?,
        understand(text("outcome"))?,
        optional_id(text("id"))?,
        decision,
    ))
}
