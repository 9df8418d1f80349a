//! Device cursors and read markers: one hash per user, independent of partitions, moved by
//! compare-and-set.
//!
//! See the head of [`super`] for the stored format. Redis cannot compare two cursors, so a move
//! that lost a race is rejected and its caller reads again.

use std::collections::BTreeMap;

use super::command_connection::unexpected;
use super::{Redis, parse_text, scripts};
use crate::broker::{CursorOwner, Result, StoredCursor};
use crate::event::Name;

pub(super) async fn read(
    redis: &Redis,
    user: &Name,
) -> Result<BTreeMap<CursorOwner, StoredCursor>> {
    let mut commands = redis::pipe();
    commands
        .cmd("HGETALL")
        .arg(redis.prefix.device_cursors(user))
        .cmd("TIME");
    let (fields, (seconds, _)): (BTreeMap<String, String>, (u64, u64)) =
        redis.connection.pipeline(&commands).await?;
    let mut device_cursors = BTreeMap::new();
    for (field, text) in fields {
        let which = which(&field)?;
        let (moved_ms, stored) = text
            .split_once(' ')
            .ok_or_else(|| unexpected(&"a malformed device cursor"))?;
        // The next move removes it. Running a script on every read would make every read a write.
        if parse_text::<u64>(moved_ms)?
            >= (seconds * 1000).saturating_sub(redis.retention.cursor_ttl_ms(&which))
        {
            device_cursors.insert(which, parse_cursor(stored)?);
        }
    }
    Ok(device_cursors)
}

pub(super) async fn change(
    redis: &Redis,
    user: &Name,
    which: &CursorOwner,
    seen: Option<&StoredCursor>,
    to: &StoredCursor,
) -> Result<bool> {
    redis
        .connection
        .eval(&scripts::DEVICE_CURSOR, |command| {
            command.arg(1).arg(redis.prefix.device_cursors(user));
            command
                .arg(crate::duration::millis(redis.retention.device_cursor_ttl))
                .arg(redis.retention.cursor_ttl_ms(&CursorOwner::ReadMarker));
            command
                .arg(redis.retention.max_devices_per_user)
                .arg(field(which))
                .arg(seen.map(format_cursor).unwrap_or_default())
                .arg(format_cursor(to));
        })
        .await
}

fn field(which: &CursorOwner) -> String {
    match which {
        CursorOwner::Device(device) => format!("d:{device}"),
        CursorOwner::ReadMarker => "read".to_owned(),
    }
}

fn which(field: &str) -> Result<CursorOwner> {
    match field.strip_prefix("d:") {
        Some(device) => Ok(CursorOwner::Device(
            Name::parse(device).map_err(|error| unexpected(&error))?,
        )),
        None if field == "read" => Ok(CursorOwner::ReadMarker),
        None => Err(unexpected(&"an unknown field of device cursors")),
    }
}

fn format_cursor(stored: &StoredCursor) -> String {
    format!(
        "{} {}",
        if stored.is_acknowledged { 'a' } else { 'b' },
        stored.cursor
    )
}

fn parse_cursor(text: &str) -> Result<StoredCursor> {
    let (kind, cursor) = text
        .split_once(' ')
        .ok_or_else(|| unexpected(&"a malformed device cursor"))?;
    Ok(StoredCursor {
        cursor: cursor.to_owned(),
        is_acknowledged: kind == "a",
    })
}
