//! The representation of a partition in Redis: its keys, channels and number, and the arguments
//! shared by all calls for it.

use std::sync::atomic::AtomicBool;

use crate::event::PartitionNumber;
use redis::Value;

use super::command_connection::{CommandConnection, parse};
use super::prefix::Prefix;
use super::readers::Readers;
use super::scripts;
use crate::broker::{Error, Partition, Result, Retention};
use crate::duration::millis;

/// A partition as it is stored in Redis.
pub(super) struct PartitionKeys {
    pub(super) partition: Partition,
    /// The prefix of its keys.
    pub(super) prefix: String,
    /// The prefix of its channels.
    pub(super) channels: String,
    pub(super) meta: String,
    /// The first arguments of every script; see `scripts/prelude.lua`.
    pub(super) arguments: [String; 13],
    pub(super) readers: Readers,
    /// Whether this node has applied its configuration to the partition, which is a write.
    pub(super) has_begun: AtomicBool,
}

impl PartitionKeys {
    /// Finds the partition number of a source, or assigns one.
    pub(super) async fn find(
        connection: &CommandConnection,
        installation: &Prefix,
        source: &str,
        (prefix, channels): (String, String),
        retention: &Retention,
    ) -> Result<Self> {
        let meta = format!("{prefix}meta");
        let number = give_number(connection, &installation.numbers(), source, &meta).await?;
        let arguments = [
            prefix.clone(),
            channels.clone(),
            number.0.to_string(),
            millis(retention.max_age).to_string(),
            retention.log_entries.to_string(),
            retention.everyone_entries.to_string(),
            millis(retention.processed_entries_ttl).to_string(),
            millis(retention.dedupe_window).to_string(),
            retention.dedupe_entries.to_string(),
            retention.dead_letter_entries.to_string(),
            retention.decision_entries.to_string(),
            retention.backlog_entries.to_string(),
            u8::from(retention.trims(source)).to_string(),
        ];
        let partition = Partition {
            number,
            source: source.to_owned(),
        };
        Ok(Self {
            partition,
            prefix,
            channels,
            meta,
            arguments,
            readers: Readers::default(),
            has_begun: AtomicBool::new(false),
        })
    }

    /// Logs the repairs that a script made to the source.
    pub(super) fn report_repairs(&self, (trimmed_unread, foreign_entries): (u64, u64)) {
        let source = &self.partition.source;
        if trimmed_unread > 0 {
            tracing::error!(source.key = %source, trimmed_unread, "another client removed entries from the source before they were read; do not trim it (XADD MAXLEN, XTRIM, XDEL)");
        }
        if foreign_entries > 0 {
            tracing::error!(source.key = %source, foreign_entries, "the source was recreated with lower ids or held ids that are too large; entries were appended again under new ids");
        }
    }
}

/// Assigns a number to a source permanently. The partition stores it as well, so that the list of
/// all numbers can be rebuilt.
async fn give_number(
    connection: &CommandConnection,
    numbers: &str,
    source: &str,
    meta: &str,
) -> Result<PartitionNumber> {
    // Read first: the script is refused while Redis refuses writes, and a node that starts then
    // must still serve history.
    let known: Option<u8> = connection
        .query(redis::cmd("HGET").arg(numbers).arg(source))
        .await?;
    if let Some(number) = known.filter(|number| *number < PartitionNumber::MAX) {
        return Ok(PartitionNumber(number));
    }
    let claimed: Option<String> = connection
        .query(redis::cmd("HGET").arg(meta).arg("number"))
        .await?;
    let answer: Value = connection
        .eval(&scripts::NUMBER, |command| {
            command
                .arg(1)
                .arg(numbers)
                .arg(source)
                .arg(claimed.as_deref().unwrap_or_default())
                .arg(PartitionNumber::MAX);
        })
        .await?;
    match answer {
        Value::Int(number) if (0..i64::from(PartitionNumber::MAX)).contains(&number) => {
            Ok(PartitionNumber(number as u8))
        }
        Value::Int(_) => Err(Error::Permanent(format!(
            "source '{source}' would be partition {}, but an installation can have at most {} over its lifetime; use fewer sources",
            u32::from(PartitionNumber::MAX) + 1,
            PartitionNumber::MAX
        ))),
        other => {
            let other: String = parse(other)?;
            Err(Error::Permanent(format!(
                "sources '{source}' and '{other}' have the same number in {numbers}; remove the wrong one of the two there"
            )))
        }
    }
}
