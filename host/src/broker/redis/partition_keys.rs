//! Where a partition lies in Redis: its keys, its channels, its number, and what all calls about it have in common.

use redis::Value;

use super::command_connection::{Link, Readers, parse};
use super::scripts;
use crate::broker::{Error, Partition, PartitionNumber, Result, Retention};

pub(super) const PARTITIONS_KEY: &str = "pointsman:partitions";

/// A partition as Redis has it.
pub(super) struct Place {
    pub(super) partition: Partition,
    /// What its keys begin with.
    pub(super) prefix: String,
    /// What its channels begin with.
    pub(super) channels: String,
    pub(super) meta: String,
    /// The arguments that every script begins with; see `scripts/prelude.lua`.
    pub(super) arguments: [String; 12],
    pub(super) readers: Readers,
}

impl Place {
    /// Finds the number of a source's partition, or gives it one.
    pub(super) async fn find(
        link: &Link,
        database: i64,
        source: &str,
        prefix: String,
        retention: &Retention,
    ) -> Result<Self> {
        let meta = format!("{prefix}meta");
        let number = give_number(link, source, &meta).await?;
        let channels = if database == 0 {
            prefix.clone()
        } else {
            format!("{database}:{prefix}")
        };
        let arguments = [
            prefix.clone(),
            channels.clone(),
            number.0.to_string(),
            (retention.max_age_s * 1000).to_string(),
            retention.log_entries.to_string(),
            retention.everyone_entries.to_string(),
            (retention.keep_s * 1000).to_string(),
            (retention.dedupe_window_s * 1000).to_string(),
            retention.dedupe_entries.to_string(),
            retention.dead_entries.to_string(),
            retention.decision_entries.to_string(),
            retention.backlog_entries.to_string(),
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
        })
    }

    /// Says what a script mended in the source.
    pub(super) fn alarm(&self, (lost, strays): (u64, u64)) {
        let source = &self.partition.source;
        if lost > 0 {
            tracing::error!(source.key = %source, lost, "somebody else removed entries from the source before they were read: do not trim it (XADD MAXLEN, XTRIM, XDEL)");
        }
        if strays > 0 {
            tracing::error!(source.key = %source, strays, "the source was deleted and made again with lower ids: its entries were appended again");
        }
    }
}

/// Checks the keys of the sources and makes the prefix of each. A source whose keys would be another's is refused.
pub(super) fn prefixes(sources: &[String]) -> Result<Vec<String>> {
    let mut prefixes: Vec<String> = Vec::with_capacity(sources.len());
    for source in sources {
        let refuse = |why: &str| {
            Err(Error::Refused(format!(
                "source '{}' {why}; give it another key",
                source.escape_debug()
            )))
        };
        if source.is_empty() || source.chars().any(char::is_control) {
            return refuse("is empty or has a control character");
        }
        // What Redis hashes: between the first `{` and the first `}` after it, if anything is there.
        let tag = source
            .split_once('{')
            .and_then(|(_, rest)| rest.split_once('}'))
            .is_some_and(|(tag, _)| !tag.is_empty());
        if !tag && source.contains('}') {
            return refuse("has a } but no {tag}, so its keys cannot share its slot");
        }
        prefixes.push(if tag {
            format!("{source}:")
        } else {
            format!("{{{source}}}:")
        });
    }
    for (at, prefix) in prefixes.iter().enumerate() {
        for (other, source) in sources.iter().enumerate() {
            if source.starts_with(prefix) || (other != at && prefixes[other].starts_with(prefix)) {
                return Err(Error::Refused(format!(
                    "sources '{}' and '{source}' would share keys; give one another key",
                    sources[at]
                )));
            }
        }
    }
    Ok(prefixes)
}

/// A number once given is the source's for good. The partition remembers it, too, so that the list of all can be made again.
async fn give_number(link: &Link, source: &str, meta: &str) -> Result<PartitionNumber> {
    let claimed: Option<String> = link
        .query(redis::cmd("HGET").arg(meta).arg("number"))
        .await?;
    let answer: Value = link
        .eval(&scripts::NUMBER, |command| {
            command
                .arg(1)
                .arg(PARTITIONS_KEY)
                .arg(source)
                .arg(claimed.as_deref().unwrap_or_default())
                .arg(PartitionNumber::MAX);
        })
        .await?;
    match answer {
        Value::Int(number) if (0..i64::from(PartitionNumber::MAX)).contains(&number) => {
            Ok(PartitionNumber(number as u8))
        }
        Value::Int(_) => Err(Error::Refused(format!(
            "source '{source}' would be partition {}, and {} is the most that an installation can ever have: use fewer sources",
            u32::from(PartitionNumber::MAX) + 1,
            PartitionNumber::MAX
        ))),
        other => {
            let other: String = parse(other)?;
            Err(Error::Refused(format!(
                "sources '{source}' and '{other}' have the same number in {PARTITIONS_KEY}: remove the wrong one of the two there"
            )))
        }
    }
}
