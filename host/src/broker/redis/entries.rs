//! Entries of a source and its dead letters. Whatever clients added, one call transfers a bounded
//! number of bytes: see "Large entries" in `redis.rs`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use redis::{FromRedisValue, ParsingError, Value};

use super::command_connection::{DEADLINE, unexpected};
use super::partition_keys::PartitionKeys;
use super::{Redis, parse_text, scripts};
use crate::broker::{
    DeadLetter, EXCERPT_BYTES, Entry, Error, MAX_COMMIT_BYTES, MAX_DEAD_LETTER_BYTES,
    MAX_ENTRY_FIELDS, Oversized, Result,
};
use crate::event::{DeadReason, EntryId};

/// The part of a dead letter that is read to list it: more than its reason and other own fields.
const HEADER_BYTES: usize = 16 * 1024;
/// Bytes of dead letters that one call examines. Redis is occupied for some milliseconds.
const EXAMINED_BYTES: usize = 16 * 1024 * 1024;

/// The limits of one call of the script.
struct Limits {
    /// Bytes of an entry that is returned as a whole.
    entry: usize,
    fields: usize,
    /// Bytes of the beginning of a larger entry.
    excerpt: usize,
    /// Bytes after which the call ends.
    examined: usize,
}

/// See [`crate::broker::Sources::read`].
pub(super) async fn read(
    redis: &Redis,
    keys: &PartitionKeys,
    after: EntryId,
    count: usize,
    wait: Duration,
) -> Result<Vec<Entry>> {
    let source = &keys.partition.source;
    let limits = Limits {
        entry: redis.retention.max_event_bytes,
        fields: MAX_ENTRY_FIELDS,
        excerpt: EXCERPT_BYTES,
        examined: MAX_COMMIT_BYTES,
    };
    if after == EntryId::MAX {
        // No id follows, and Redis rejects such a range. The next tick lowers the position, from
        // which the caller has to continue.
        tokio::time::sleep(wait).await;
        return Err(Error::Unavailable(format!(
            "the position in '{source}' is the largest id; it is being lowered"
        )));
    }
    // The script copies an entry three times to measure it. After it took too long, and for an
    // entry on which nodes crashed, the entry is read on its own and cut where it becomes too large.
    if count > 1 && !keys.readers.is_slow() {
        let began = Instant::now();
        let read = range(redis, source, after, count, &limits).await;
        if read.is_err() && began.elapsed() >= DEADLINE {
            keys.readers.note_timeout();
        }
        let read = read?;
        if !read.is_empty() || wait.is_zero() {
            return Ok(read);
        }
    }
    let next = keys
        .readers
        .next(redis, source, after, wait, limits.entry)
        .await?;
    let Some(entry) = next else {
        return Ok(Vec::new());
    };
    let may_fit = |size: Oversized| {
        Oversized {
            is_exact: true,
            ..size
        }
        .fits_dead_letter()
    };
    if entry.oversized.is_some_and(may_fit) && !keys.readers.is_slow() {
        // Its size is known only as a lower bound, and its dead letter may hold all of it.
        let began = Instant::now();
        let read = range(redis, source, after, 1, &limits).await;
        if read.is_err() && began.elapsed() >= DEADLINE {
            keys.readers.note_timeout();
        }
        return read;
    }
    Ok(vec![entry])
}

/// Reads one of the two streams of dead letters, `dead` or `retrying`; see
/// [`crate::broker::Operations::dead_letters`].
pub(super) async fn dead_letters(
    redis: &Redis,
    keys: &PartitionKeys,
    stream: &str,
    mut after: EntryId,
    limit: usize,
    with_fields: bool,
) -> Result<Vec<DeadLetter>> {
    let entry = if with_fields {
        MAX_DEAD_LETTER_BYTES + HEADER_BYTES
    } else {
        HEADER_BYTES
    };
    let limits = Limits {
        entry,
        // A dead letter of an earlier version has up to twice as many texts, and its own fields.
        fields: 2 * MAX_ENTRY_FIELDS,
        excerpt: HEADER_BYTES,
        examined: if with_fields {
            MAX_DEAD_LETTER_BYTES
        } else {
            EXAMINED_BYTES
        },
    };
    let key = format!("{}{stream}", keys.prefix);
    let mut letters = Vec::new();
    while letters.len() < limit && after < EntryId::MAX {
        let some = range(redis, &key, after, limit - letters.len(), &limits).await?;
        let Some(last) = some.last() else { break };
        after = last.id;
        for entry in some {
            let mut letter = dead_letter(entry)?;
            if !with_fields {
                letter.why.fields.clear();
            }
            letters.push(letter);
        }
    }
    Ok(letters)
}

async fn range(
    redis: &Redis,
    key: &str,
    after: EntryId,
    count: usize,
    limits: &Limits,
) -> Result<Vec<Entry>> {
    let entries: Vec<RangeEntry> = redis
        .connection
        .eval(&scripts::RANGE, |command| {
            command
                .arg(1)
                .arg(key)
                .arg(after.to_string())
                .arg(count)
                .arg(limits.entry)
                .arg(limits.fields)
                .arg(limits.excerpt)
                .arg(limits.examined);
        })
        .await?;
    entries
        .into_iter()
        .map(|RangeEntry { id, fields, size }| {
            Ok(Entry {
                id: parse_text(&id)?,
                fields,
                oversized: size.map(|(bytes, fields)| Oversized {
                    bytes,
                    fields,
                    is_exact: true,
                }),
            })
        })
        .collect()
}

/// One element of the answer of the script.
struct RangeEntry {
    id: String,
    fields: Vec<(Bytes, Bytes)>,
    size: Option<(u64, u64)>,
}

impl FromRedisValue for RangeEntry {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        let parts: Vec<Value> = redis::from_redis_value(value)?;
        let mut parts = parts.into_iter();
        let (Some(id), Some(texts)) = (parts.next(), parts.next()) else {
            return Err("an entry has no id or no fields".to_owned().into());
        };
        let texts: Vec<Vec<u8>> = redis::from_redis_value(texts)?;
        let mut fields = Vec::with_capacity(texts.len() / 2);
        let mut texts = texts.into_iter();
        while let (Some(name), Some(value)) = (texts.next(), texts.next()) {
            fields.push((Bytes::from(name), Bytes::from(value)));
        }
        let size = match (parts.next(), parts.next()) {
            (Some(bytes), Some(fields)) => {
                // Values and names that were cut to nothing hold nothing.
                Some((
                    redis::from_redis_value(bytes)?,
                    redis::from_redis_value(fields)?,
                ))
            }
            _ => None,
        };
        if size.is_some() {
            fields.retain(|(name, value)| !name.is_empty() || !value.is_empty());
        }
        Ok(Self {
            id: redis::from_redis_value(id)?,
            fields,
            size,
        })
    }
}

fn dead_letter(raw: Entry) -> Result<DeadLetter> {
    let Entry {
        id,
        fields,
        oversized: cut,
    } = raw;
    let text = |name: &str| {
        let found = fields
            .iter()
            .find(|(field, _)| field == name.as_bytes())
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned());
        found.unwrap_or_default()
    };
    let own = fields
        .iter()
        .filter(|(name, _)| name.starts_with(b"f:"))
        .map(|(name, value)| (name.slice(2..), value.clone()));
    let number = |name: &str| -> Result<Option<u64>> {
        Some(text(name))
            .filter(|text| !text.is_empty())
            .map(|text| text.parse().map_err(|error| unexpected(&error)))
            .transpose()
    };
    let oversized = match (number("entry_bytes")?, number("entry_fields")?) {
        (Some(bytes), fields) => Some(Oversized {
            bytes,
            fields: fields.unwrap_or_default(),
            is_exact: false,
        }),
        // A dead letter of an earlier version, which held entries of any size.
        (None, _) => cut.filter(|cut| cut.bytes > MAX_DEAD_LETTER_BYTES as u64),
    };
    let plugin = text("plugin");
    let why = DeadReason {
        reason: text("reason"),
        plugin: Some(plugin).filter(|name| !name.is_empty()),
        attempts: number("attempts")?
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or_default(),
        fields: own.collect(),
    };
    Ok(DeadLetter {
        id,
        entry: parse_text(&text("entry"))?,
        why,
        oversized,
        due_ms: number("due")?,
    })
}
