//! Attributes and memberships of users: one hash per user, independent of partitions. A change is
//! published in every partition.
//!
//! A membership has a span of ids in each partition. See the head of [`super`] for the stored
//! format and the effect of joining again.

use std::collections::BTreeMap;

use super::command_connection::unexpected;
use super::{Redis, id, parse_text, scripts};
use crate::broker::{Error, GroupLimit, Partition, RecipientChange, Result};
use crate::event::{Name, PartitionNumber, Recipient, Span};

/// Reads a user's attributes and memberships.
pub(super) async fn read(redis: &Redis, user: &Name) -> Result<Recipient> {
    let mut commands = redis::pipe();
    commands
        .cmd("HGETALL")
        .arg(redis.prefix.user(user))
        .cmd("TIME");
    let (fields, (seconds, _)): (BTreeMap<String, String>, (u64, u64)) =
        redis.connection.pipeline(&commands).await?;
    let mut recipient = Recipient::default();
    for (field, text) in fields {
        if field == "attributes" {
            recipient.attributes =
                serde_json::from_str(&text).map_err(|error| unexpected(&error))?;
        } else if let Some(group) = field.strip_prefix("g:")
            && let Some(spans) =
                spans(&text, &redis.partitions, seconds * 1000, redis.max_age_ms())?
        {
            recipient.groups.insert(
                Name::parse(group).map_err(|error| unexpected(&error))?,
                spans,
            );
        }
    }
    Ok(recipient)
}

/// Changes a user's attributes or memberships and notifies every node in every partition.
pub(super) async fn change(redis: &Redis, user: &Name, change: RecipientChange) -> Result<()> {
    // Read the ids before writing: events committed in between count as concurrent with the change.
    let tops = tops(redis).await?;
    let (what, argument) = match change {
        RecipientChange::Join { group } => ("join", group.to_string()),
        RecipientChange::Leave { group } => ("leave", group.to_string()),
        RecipientChange::Attributes(attributes) => (
            "attributes",
            serde_json::to_string(&attributes).map_err(|error| unexpected(&error))?,
        ),
    };
    let most = redis.retention.max_groups_per_user;
    let answer: String = redis
        .connection
        .eval(&scripts::RECIPIENT, |command| {
            command
                .arg(1)
                .arg(redis.prefix.user(user))
                .arg(redis.max_age_ms())
                .arg(what)
                .arg(&argument)
                .arg(most);
            for (number, top) in &tops {
                command.arg(number.0).arg(top);
            }
        })
        .await?;
    let limit = match answer.as_str() {
        "ok" => None,
        "joined" => Some(GroupLimit::Joined),
        "left" => Some(GroupLimit::Left),
        _ => return Err(unexpected(&"a malformed answer about a membership")),
    };
    if let Some(limit) = limit {
        return Err(Error::TooManyGroups { limit, most });
    }
    // Publish even if nothing changed: a first attempt may have written the change and failed to
    // publish it.
    let mut commands = redis::pipe();
    for keys in &redis.keys {
        commands
            .cmd("PUBLISH")
            .arg(format!("{}recipients", keys.channels))
            .arg(user.as_str());
    }
    let _n_receivers: Vec<i64> = redis.connection.pipeline(&commands).await?;
    Ok(())
}

/// The newest id of each partition, at which a membership starts or ends.
async fn tops(redis: &Redis) -> Result<Vec<(PartitionNumber, u64)>> {
    let mut commands = redis::pipe();
    for keys in &redis.keys {
        commands
            .cmd("HMGET")
            .arg(&keys.meta)
            .arg("last")
            .arg("pending");
    }
    let tops: Vec<(Option<u64>, Option<u64>)> = redis.connection.pipeline(&commands).await?;
    Ok(redis
        .keys
        .iter()
        .zip(tops)
        .map(|(keys, (last, pending))| (keys.partition.number, last.max(pending).unwrap_or(0)))
        .collect())
}

/// Parses a membership into its spans by partition. `None`: the user left more than `max_age_ms`
/// ago, so nothing visible remains.
fn spans(
    text: &str,
    partitions: &[Partition],
    now_ms: u64,
    max_age_ms: u64,
) -> Result<Option<BTreeMap<PartitionNumber, Span>>> {
    let mut spans = BTreeMap::new();
    let mut is_member = true;
    for word in text.split(' ') {
        if let Some(left_ms) = word.strip_prefix('@') {
            is_member = false;
            if parse_text::<u64>(left_ms)? < now_ms.saturating_sub(max_age_ms) {
                return Ok(None);
            }
            continue;
        }
        let (number, ids) = word
            .split_once(':')
            .ok_or_else(|| unexpected(&"a malformed membership"))?;
        let (joined, left) = ids
            .split_once('-')
            .map_or((ids, None), |(joined, left)| (joined, Some(left)));
        spans.insert(
            PartitionNumber(parse_text(number)?),
            Span {
                joined: id(joined)?,
                left: left.map(id).transpose()?,
            },
        );
    }
    if is_member {
        for partition in partitions {
            spans.entry(partition.number).or_default();
        }
    }
    spans.retain(|number, _| {
        partitions
            .iter()
            .any(|partition| partition.number == *number)
    });
    Ok(Some(spans))
}
