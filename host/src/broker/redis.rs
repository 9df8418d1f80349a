//! The Redis broker: many nodes, one Redis 7 or newer, everything that must happen in one step in a Lua script.
//!
//! # Keys, channels and records
//!
//! An API boundary: operators' tools read them. `T` is the tag prefix of a partition, `{<key of the source>}:`, or `<key of the source>:` where that key
//! carries a tag of its own; so everything of a partition lies in the slot of its source. Ids are written in decimal.
//!
//! | Key | Type | What |
//! |---|---|---|
//! | the source | stream | Events. Trimmed by us only if the key begins with `pointsman:`. A group `pointsman` shows the lag, and nothing depends on it. |
//! | `T` `meta` | hash | `pos` `entry` or `entry/k`; `pending`, id of a plan being written in slices; `last`; `n`, entries counted; `life`, `life_no`, `replid`; `number`, the partition's own; `max_age` ms; `floor0`, `floor_at`, `age0`, `id0`, `origin` (see `floor()` in the prelude); `b`, newest dedupe bucket; `takeovers` and `attempts`, `what count`; `trim_at` ms; counters: the five outcome words, `lost_upstream`, `strays`, `dead_trimmed`, `dedupe_overflows`, `foreign_logs` |
//! | `T` `lives` | list | `life last`: each life with the last id that survived when it began; 16 newest |
//! | `T` `e:<id>` | string | The record: [`crate::event::Notification`] as JSON. Expires 2 % after max_age, a pending plan's never |
//! | `T` `l:<log>` | zset | score id, member `id pred`; log `u:<user>`, `g:<group>` or `all`. What is older than max_age goes as the log is written to, and the rest of it 2 % after the age of the newest |
//! | `T` `seen:<b>` | set | 16-byte hashes of publishers' ids, `b` = entry's ms / window |
//! | `T` `dead` | stream | `entry`, `reason`, `plugin`, `attempts`, then the entry's own fields, each name behind `f:` |
//! | `T` `what` | stream | Decision records: `entry`, `outcome`, `decision` ([`Decision`] as JSON), `id` if it was committed |
//! | `T` `owner` | string | The lease: the node's name |
//! | `pointsman:partitions` | hash | source -> number of its partition; only ever added to |
//! | `pointsman:user:<user>` | hash | `attributes` as JSON; `g:<group>`: `number:joined ...`, after leaving `number:joined-left ... @ms`. Expires max_age after the last leaving if nothing else is in it |
//! | `pointsman:bookmarks:{pointsman:user:<user>}` | hash | `d:<device>` and `read`: `ms a cursor` if it was acknowledged, `ms b cursor` if a stream began there, with the time of its last move. In the slot of the user's other key, but for a name with braces. Expires with its newest |
//!
//! | Channel | Message |
//! |---|---|
//! | `C` `l:<log>` | `life id`, then a space and the record if that has at most 1,024 bytes |
//! | `C` `tick` | `life last`, or `alive` from a Redis that cannot write |
//! | `C` `recipients` | the user whose memberships or attributes changed |
//!
//! `C` is `T`; in a database other than 0 it is `<number of the database>:T`, because Pub/Sub does not know databases.
//!
//! # Memberships
//!
//! A user has one span a group and partition, the newest: joining again after leaving begins a new one, and what the earlier one had let in is no longer
//! shown to who comes back from before it (README.md says so). A partition that was added after joining is the member's from its beginning.
//!
//! # Connections
//!
//! One for commands (`redis/link.rs`), two a partition kept for reads that wait (more while more read at once), one for notices (`redis/feed.rs`). A command is answered within 2 s or the
//! broker is away; a read that waits has these 2 s on top.

use std::collections::BTreeMap;
use std::time::Duration;

use ::redis as client;
use async_trait::async_trait;
use bytes::Bytes;

use super::{
    Batch, Bookmark, BookmarkOf, Broker, Committed, DeadLetter, DeadReason, Decision, Entry, Error,
    Feed, Finding, Found, Head, Item, Lease, Page, Partition, PartitionNumber, PartitionState,
    Proposal, Recipient, RecipientChange, Result, Retention, Slice,
};
use crate::event::{EntryId, Name, NotificationId, Outcome, Position, Target};

mod check;
mod command_connection;
mod decisions;
mod device_cursors;
mod feed;
mod partition_keys;
mod recipients;
mod resp;
mod scripts;

use command_connection::{Link, unexpected};
use partition_keys::Place;
use scripts::Script;

/// Records up to this many bytes go along with their notice, which saves the node a read.
const INLINE_BYTES: usize = 1024;
/// Entries in one call of the append script: about half a millisecond of Redis.
const APPEND_ENTRIES: usize = 256;
/// Fields of an entry that a script can hand to a command: what Lua's `unpack` takes.
const MOST_FIELDS: usize = 3_900;
/// Keys in one MGET.
const RECORDS: usize = 64;

/// See the head of this file.
pub struct Redis {
    client: client::Client,
    link: Link,
    partitions: Vec<Partition>,
    /// Beside `partitions`.
    places: Vec<Place>,
    retention: Retention,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis")
            .field("address", &address(&self.client))
            .field("partitions", &self.partitions)
            .finish()
    }
}

impl Redis {
    /// Opens the sources, which are made where they are new, and gives each the number of its partition.
    ///
    /// # Errors
    /// [`Error::Away`] if Redis is not there; try again later. [`Error::Refused`] for a URL, a version or a source that will never do.
    pub async fn connect(url: &str, sources: &[String], retention: Retention) -> Result<Self> {
        let client = client::Client::open(url).map_err(|error| {
            Error::Refused(format!(
                "its URL is wrong: {error}; write redis://host:port"
            ))
        })?;
        let address = address(&client);
        Self::connect_to(client, sources, retention)
            .await
            .map_err(|error| located(error, &address))
    }

    async fn connect_to(
        client: client::Client,
        sources: &[String],
        retention: Retention,
    ) -> Result<Self> {
        let link = Link::new(client.clone());
        let prefixes = partition_keys::prefixes(sources)?;
        check::version(&link).await?;
        let database = client.get_connection_info().redis_settings().db();
        let mut places = Vec::with_capacity(sources.len());
        for (source, prefix) in sources.iter().zip(prefixes) {
            places.push(Place::find(&link, database, source, prefix, &retention).await?);
        }
        places.sort_by_key(|place| place.partition.number);
        let partitions = places.iter().map(|place| place.partition.clone()).collect();
        let redis = Self {
            client,
            link,
            partitions,
            places,
            retention,
        };
        for place in &redis.places {
            redis.begin(place).await?;
        }
        Ok(redis)
    }

    fn place(&self, partition: PartitionNumber) -> Result<&Place> {
        let found = self
            .places
            .iter()
            .find(|place| place.partition.number == partition);
        found.ok_or_else(|| Error::Refused(format!("there is no partition {}", partition.0)))
    }

    fn max_age_ms(&self) -> u64 {
        self.retention.max_age_s * 1000
    }

    /// Runs a script about a partition.
    async fn run<T: client::FromRedisValue>(
        &self,
        place: &Place,
        script: &Script,
        own: impl Fn(&mut client::Cmd),
    ) -> Result<T> {
        let call = self.link.eval(script, |command| {
            command
                .arg(2)
                .arg(&place.partition.source)
                .arg(&place.meta)
                .arg(&place.arguments);
            own(command);
        });
        call.await
    }

    async fn begin(&self, place: &Place) -> Result<()> {
        let healed = self.run(place, &scripts::BEGIN, |_| {}).await?;
        place.alarm(healed);
        Ok(())
    }

    async fn commit_items(
        &self,
        place: &Place,
        life: crate::event::Life,
        prev: Position,
        slice: Option<(u32, bool)>,
        items: &[Item],
    ) -> Result<Committed> {
        let decisions = items
            .iter()
            .map(|item| serde_json::to_string(&item.decision).map_err(|error| unexpected(&error)))
            .collect::<Result<Vec<_>>>()?;
        let answer: Vec<String> = self
            .run(place, &scripts::COMMIT, |command| {
                let (index, is_last) =
                    slice.map_or((-1, false), |(index, is_last)| (i64::from(index), is_last));
                command
                    .arg(INLINE_BYTES)
                    .arg(life.to_string())
                    .arg(prev.to_string())
                    .arg(index)
                    .arg(u8::from(is_last))
                    .arg(items.len());
                for (item, decision) in items.iter().zip(&decisions) {
                    add_item(command, item, decision);
                }
            })
            .await?;
        match answer.split_first() {
            Some((word, [])) if word == "refused" => Ok(Committed::Refused),
            Some((word, outcomes)) if word == "done" && outcomes.len() == 2 * items.len() => {
                let outcomes = outcomes
                    .chunks(2)
                    .map(|pair| Ok((understand(&pair[0])?, optional_id(&pair[1])?)));
                Ok(Committed::Done(outcomes.collect::<Result<_>>()?))
            }
            _ => Err(unexpected(&"a commit's outcomes")),
        }
    }
}

fn add_item(command: &mut client::Cmd, item: &Item, decision: &str) {
    let kind = match &item.proposal {
        Proposal::Commit { .. } => "c",
        Proposal::Discard => "d",
        Proposal::Unrouted => "u",
        Proposal::DeadLetter(_) => "x",
    };
    command
        .arg(kind)
        .arg(item.entry.to_string())
        .arg(item.dedupe.as_ref().map_or(&[][..], |hash| hash))
        .arg(decision);
    match &item.proposal {
        Proposal::Commit { record, targets } => {
            command.arg(&record[..]).arg(targets.len());
            for target in targets {
                command.arg(target.to_string());
            }
        }
        Proposal::DeadLetter(why) => {
            command
                .arg(&why.reason)
                .arg(why.plugin.as_deref().unwrap_or_default())
                .arg(why.attempts);
            add_fields(command.arg(why.fields.len()), &why.fields);
        }
        Proposal::Discard | Proposal::Unrouted => {}
    }
}

fn add_fields(command: &mut client::Cmd, fields: &[(Bytes, Bytes)]) {
    for (name, value) in fields {
        command.arg(&name[..]).arg(&value[..]);
    }
}

/// Reads what one of our own scripts or keys says.
fn understand<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T> {
    text.parse().map_err(|error| unexpected(&error))
}

fn id(text: &str) -> Result<NotificationId> {
    understand(text).map(NotificationId)
}

fn optional_id(text: &str) -> Result<Option<NotificationId>> {
    if text.is_empty() {
        Ok(None)
    } else {
        id(text).map(Some)
    }
}

/// A stream entry as Redis answers it.
type RawEntry = (String, Vec<(Vec<u8>, Vec<u8>)>);

fn entry((id, fields): RawEntry) -> Result<Entry> {
    Ok(Entry {
        id: understand(&id)?,
        fields: fields
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
    })
}

fn dead_letter(raw: RawEntry) -> Result<DeadLetter> {
    let Entry { id, fields } = entry(raw)?;
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
    let (plugin, attempts) = (text("plugin"), understand(&text("attempts"))?);
    let why = DeadReason {
        reason: text("reason"),
        plugin: Some(plugin).filter(|name| !name.is_empty()),
        attempts,
        fields: own.collect(),
    };
    Ok(DeadLetter {
        id,
        entry: understand(&text("entry"))?,
        why,
    })
}

#[async_trait]
impl Broker for Redis {
    fn partitions(&self) -> &[Partition] {
        &self.partitions
    }

    async fn check(&self) -> Result<Vec<Finding>> {
        check::findings(self)
            .await
            .map_err(|error| located(error, &address(&self.client)))
    }

    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>> {
        let place = self.place(partition)?;
        if let Some(fields) = entries
            .iter()
            .find(|fields| fields.is_empty() || fields.len() > MOST_FIELDS)
        {
            return Err(Error::Refused(format!(
                "an entry has {} fields; 1 to {MOST_FIELDS} are allowed",
                fields.len()
            )));
        }
        let mut ids = Vec::with_capacity(entries.len());
        for chunk in chunks(&entries) {
            let answer: Vec<String> = self
                .run(place, &scripts::APPEND, |command| {
                    // Only the first call looks at the backlog: all are taken, or none.
                    command.arg(u8::from(ids.is_empty())).arg(chunk.len());
                    for fields in chunk {
                        add_fields(command.arg(2 * fields.len()), fields);
                    }
                })
                .await?;
            if let [word, waiting] = answer.as_slice()
                && word == "full"
            {
                return Err(Error::Full(format!(
                    "{waiting} entries wait in '{}'; try again later",
                    place.partition.source
                )));
            }
            for id in answer {
                ids.push(understand(&id)?);
            }
        }
        Ok(ids)
    }

    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>> {
        let place = self.place(partition)?;
        let mut command = client::cmd("XREAD");
        command.arg("COUNT").arg(count);
        if !wait.is_zero() {
            // 0 would wait for ever.
            command.arg("BLOCK").arg(wait.as_millis().max(1) as u64);
        }
        command
            .arg("STREAMS")
            .arg(&place.partition.source)
            .arg(after.to_string());
        let answer: Option<Vec<(Vec<u8>, Vec<RawEntry>)>> =
            place.readers.query(&self.link, &command, wait).await?;
        answer
            .into_iter()
            .flatten()
            .flat_map(|(_, entries)| entries)
            .map(entry)
            .collect()
    }

    async fn head(&self, partition: PartitionNumber) -> Result<Head> {
        let place = self.place(partition)?;
        // A second time if a life has to begin first; a third time if it ends just then.
        for _ in 0..3 {
            let answer: Vec<String> = self.run(place, &scripts::HEAD, |_| {}).await?;
            if let [
                life,
                last,
                pending,
                position,
                floor,
                origin,
                now_ms,
                lives @ ..,
            ] = answer.as_slice()
            {
                return Ok(Head {
                    life: understand(life)?,
                    lives: lives
                        .chunks_exact(2)
                        .map(|pair| Ok((understand(&pair[0])?, id(&pair[1])?)))
                        .collect::<Result<_>>()?,
                    last: id(last)?,
                    pending: optional_id(pending)?,
                    position: understand(position)?,
                    floor: id(floor)?,
                    origin: id(origin)?,
                    now_ms: understand(now_ms)?,
                });
            }
            self.begin(place).await?;
        }
        Err(Error::Away(
            "its replication id changes again and again".into(),
        ))
    }

    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<Committed> {
        if batch.items.is_empty() {
            return Ok(Committed::Done(Vec::new()));
        }
        self.commit_items(
            self.place(partition)?,
            batch.life,
            batch.prev,
            None,
            &batch.items,
        )
        .await
    }

    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<Committed> {
        let at = Some((slice.index, slice.is_last));
        self.commit_items(
            self.place(partition)?,
            slice.life,
            slice.prev,
            at,
            std::slice::from_ref(&slice.item),
        )
        .await
    }

    async fn tick(&self, partition: PartitionNumber) -> Result<()> {
        let place = self.place(partition)?;
        match self.run(place, &scripts::TICK, |_| {}).await {
            Ok(healed) => place.alarm(healed),
            // Too few replicas, or a disk that does not take its snapshot: scripts that write are refused, a plain PUBLISH is not.
            Err(Error::Away(why)) if why.contains("NOREPLICAS") || why.contains("MISCONF") => {
                let _heard: i64 = self
                    .link
                    .query(
                        client::cmd("PUBLISH")
                            .arg(format!("{}tick", place.channels))
                            .arg("alive"),
                    )
                    .await?;
                return Err(Error::Away(why));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease> {
        let held_ms: u64 = self
            .run(self.place(partition)?, &scripts::LEASE, |command| {
                command.arg(node).arg(ttl.as_millis().max(1) as u64);
            })
            .await?;
        Ok(if held_ms == 0 {
            Lease::Mine
        } else {
            Lease::Others(Duration::from_millis(held_ms))
        })
    }

    async fn release(&self, partition: PartitionNumber, node: &str) -> Result<()> {
        self.run(self.place(partition)?, &scripts::RELEASE, |command| {
            command.arg(node);
        })
        .await
    }

    async fn take_over(&self, partition: PartitionNumber) -> Result<u32> {
        let place = self.place(partition)?;
        let (times, lost, strays) = self
            .run(place, &scripts::ATTEMPT, |command| {
                command.arg("takeovers").arg("");
            })
            .await?;
        place.alarm((lost, strays));
        Ok(times)
    }

    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32> {
        let (times, ..): (u32, u64, u64) = self
            .run(self.place(partition)?, &scripts::ATTEMPT, |command| {
                command.arg("attempts").arg(entry.to_string());
            })
            .await?;
        Ok(times)
    }

    async fn page(
        &self,
        partition: PartitionNumber,
        target: &Target,
        after: NotificationId,
        limit: usize,
    ) -> Result<Page> {
        let (floor, is_present, mut members): (u64, bool, Vec<String>) = self
            .run(self.place(partition)?, &scripts::PAGE, |command| {
                command.arg(target.to_string()).arg(after.0).arg(limit);
            })
            .await?;
        let is_last = members.len() <= limit;
        members.truncate(limit);
        let entries = members.iter().map(|member| {
            let (own, before) = member
                .split_once(' ')
                .ok_or_else(|| unexpected(&"a log's entry"))?;
            Ok((id(own)?, id(before)?))
        });
        Ok(Page {
            entries: entries.collect::<Result<_>>()?,
            is_present,
            is_last,
            floor: NotificationId(floor),
        })
    }

    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>> {
        let place = self.place(partition)?;
        let mut records = Vec::with_capacity(ids.len());
        for some in ids.chunks(RECORDS) {
            let mut command = client::cmd("MGET");
            for id in some {
                command.arg(format!("{}e:{id}", place.prefix));
            }
            let found: Vec<Option<Vec<u8>>> = self.link.query(&command).await?;
            records.extend(found.into_iter().map(|record| record.map(Bytes::from)));
        }
        Ok(records)
    }

    async fn feed(&self) -> Result<Feed> {
        let places = self
            .places
            .iter()
            .map(|place| (place.channels.clone(), place.partition.number))
            .collect();
        feed::open(self.client.get_connection_info(), places).await
    }

    async fn recipient(&self, user: &Name) -> Result<Recipient> {
        recipients::read(self, user).await
    }

    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()> {
        recipients::change(self, user, change).await
    }

    async fn bookmarks(&self, user: &Name) -> Result<BTreeMap<BookmarkOf, Bookmark>> {
        device_cursors::read(self, user).await
    }

    async fn move_bookmark(
        &self,
        user: &Name,
        which: &BookmarkOf,
        seen: Option<&Bookmark>,
        to: &Bookmark,
    ) -> Result<bool> {
        device_cursors::change(self, user, which, seen, to).await
    }

    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        let place = self.place(partition)?;
        let mut command = client::cmd("XRANGE");
        command
            .arg(format!("{}dead", place.prefix))
            .arg(format!("({after}"))
            .arg("+")
            .arg("COUNT")
            .arg(limit);
        let letters: Vec<RawEntry> = self.link.query(&command).await?;
        letters.into_iter().map(dead_letter).collect()
    }

    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        self.run(self.place(partition)?, &scripts::REDRIVE, |command| {
            command.arg(id.to_string());
        })
        .await
    }

    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        let place = self.place(partition)?;
        self.link
            .query(
                client::cmd("XDEL")
                    .arg(format!("{}dead", place.prefix))
                    .arg(id.to_string()),
            )
            .await
    }

    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<(EntryId, Outcome, Option<NotificationId>, Decision)>> {
        decisions::newest(self, self.place(partition)?, limit).await
    }

    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<Found> {
        decisions::find(self, self.place(partition)?, event_id, limit).await
    }

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState> {
        let (lag, dead_letters, ids_ahead_ms, meta): (u64, u64, u64, BTreeMap<String, String>) =
            self.run(self.place(partition)?, &scripts::STATE, |_| {})
                .await?;
        let number = |field: &str| meta.get(field).map_or(Ok(0), |text| understand(text));
        let outcomes = Outcome::ALL
            .into_iter()
            .map(|outcome| Ok((outcome.as_str().to_owned(), number(outcome.as_str())?)));
        Ok(PartitionState {
            outcomes: outcomes.collect::<Result<_>>()?,
            lag,
            lost_upstream: number("lost_upstream")?,
            dead_letters,
            dead_trimmed: number("dead_trimmed")?,
            dedupe_overflows: number("dedupe_overflows")?,
            ids_ahead_ms,
        })
    }
}

/// Where Redis is; the URL may hold a password.
fn address(client: &client::Client) -> String {
    client.get_connection_info().addr().to_string()
}

/// For operators, who see it in readiness: clients need not know where Redis is.
fn located(error: Error, address: &str) -> Error {
    match error {
        Error::Away(why) => Error::Away(format!("{address}: {why}")),
        other => other,
    }
}

/// Splits a batch so that no call has more than [`APPEND_ENTRIES`] entries or, but for a single one, a MiB.
fn chunks(entries: &[Vec<(Bytes, Bytes)>]) -> Vec<&[Vec<(Bytes, Bytes)>]> {
    let mut chunks = Vec::new();
    let (mut begin, mut bytes) = (0, 0);
    for (at, fields) in entries.iter().enumerate() {
        let own: usize = fields
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if at > begin && (at - begin == APPEND_ENTRIES || bytes + own > super::MAX_COMMIT_BYTES) {
            chunks.push(&entries[begin..at]);
            (begin, bytes) = (at, 0);
        }
        bytes += own;
    }
    if begin < entries.len() {
        chunks.push(&entries[begin..]);
    }
    chunks
}
