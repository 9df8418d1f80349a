//! Decision records, newest first: reads the stream `decisions` of a partition backwards.

use std::collections::BTreeMap;

use super::command_connection::unexpected;
use super::partition_keys::PartitionKeys;
use super::{Redis, client, optional_id, optional_number, parse_text};
use crate::broker::{DecisionSearch, Result, StoredDecision};
use crate::event::{ChainMembers, Decision, Retry};

/// Records per read, each of up to some kilobytes: a plugin may give a long reason.
const PAGE: usize = 250;

/// The id in the stream, from which the next read continues, and the fields.
type RawRecord = (String, BTreeMap<String, String>);

/// See [`crate::broker::Operations::decisions`].
pub(super) async fn newest(
    redis: &Redis,
    keys: &PartitionKeys,
    limit: usize,
) -> Result<Vec<StoredDecision>> {
    let (mut found, mut from) = (Vec::new(), "+".to_owned());
    while found.len() < limit {
        let page = read(redis, keys, &from, PAGE.min(limit - found.len())).await?;
        let Some((last, _)) = page.last() else { break };
        from = format!("({last}");
        for raw in &page {
            found.push(stored(raw)?);
        }
    }
    Ok(found)
}

/// See [`crate::broker::Operations::find_decisions`].
pub(super) async fn find(
    redis: &Redis,
    keys: &PartitionKeys,
    event_id: &str,
    limit: usize,
) -> Result<DecisionSearch> {
    let (mut found, mut from) = (DecisionSearch::default(), "+".to_owned());
    loop {
        let page = read(redis, keys, &from, PAGE).await?;
        let Some((last, _)) = page.last() else {
            return Ok(found);
        };
        from = format!("({last}");
        for raw in &page {
            let stored = stored(raw)?;
            let (entry, .., decision) = &stored;
            found.reaches_to = Some(*entry);
            if decision.is_about(*entry, event_id) {
                found.decisions.push(stored);
                if found.decisions.len() == limit {
                    return Ok(found);
                }
            }
        }
    }
}

/// See [`crate::broker::Operations::find_chain`].
pub(super) async fn find_chain(
    redis: &Redis,
    keys: &PartitionKeys,
    id: &str,
) -> Result<Option<ChainMembers>> {
    let mut from = "+".to_owned();
    loop {
        let page = read(redis, keys, &from, PAGE).await?;
        let Some((last, _)) = page.last() else {
            return Ok(None);
        };
        from = format!("({last}");
        for raw in &page {
            let (.., decision) = stored(raw)?;
            if decision.chain == id && decision.members.is_some() {
                return Ok(decision.members);
            }
        }
    }
}

async fn read(
    redis: &Redis,
    keys: &PartitionKeys,
    from: &str,
    count: usize,
) -> Result<Vec<RawRecord>> {
    redis
        .connection
        .query(
            client::cmd("XREVRANGE")
                .arg(format!("{}decisions", keys.prefix))
                .arg(from)
                .arg("-")
                .arg("COUNT")
                .arg(count),
        )
        .await
}

fn stored((_, fields): &RawRecord) -> Result<StoredDecision> {
    let text = |name: &str| fields.get(name).map(String::as_str).unwrap_or_default();
    let mut decision: Decision =
        serde_json::from_str(text("decision")).map_err(|error| unexpected(&error))?;
    decision.retry = match text("attempts") {
        "" => None,
        attempts => Some(Retry {
            attempts: parse_text(attempts)?,
            due_ms: optional_number(text("due"))?,
        }),
    };
    Ok((
        parse_text(text("entry"))?,
        parse_text(text("outcome"))?,
        optional_id(text("id"))?,
        decision,
    ))
}
