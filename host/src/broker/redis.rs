//! The Redis broker: many nodes share one Redis 7 or newer. Every operation that must be atomic is
//! a Lua script.
//!
//! # Keys, channels and records
//!
//! The key layout is an API boundary, because operators' tools read it. `P` is the prefix of the
//! installation (`broker.prefix`), with which every key, channel and consumer group begins. `T` is
//! the prefix of a partition with its hash tag: `P:{<source key>}:`, or `P:<source key>:` if the
//! source key has a hash tag of its own. All keys of a partition therefore share the slot of its
//! source, and two installations that read the same source share nothing else. Ids are written in
//! decimal.
//!
//! | Key | Type | Contents |
//! |---|---|---|
//! | the source | stream | Events. Trimmed by Pointsman as far as no other consumer group needs them, unless `retention.untrimmed_sources` names it. Its consumer group `P` stands at the position and shows the lag; no entry is ever delivered through it. |
//! | `T` `meta` | hash | `pos`, the position: `entry` or `entry/k`; `pending`, the id of a plan being committed in slices, the last one if it has several; `last`; `n`, the number of entries counted; `epoch`, `epoch_no`, `replid`; `number`, the partition number; `max_age` in ms; `floor0`, `floor_at`, `age0`, `id0`, `origin` (see `floor()` in the prelude); `b`, the newest dedupe bucket; `takeovers` and `attempts`: `subject count`; `trim_at`, `look_at` and `probe_at` in ms; `mark` and `next_mark`, positions of which the later one was stored at `mark_at`; `retry_timeout` in ms, the longest that an event has waited for retries; counters: one per outcome, `trimmed_unread`, `foreign_entries`, `dead_trimmed`, `dedupe_overflows`, `wrong_type_logs` |
//! | `T` `epochs` | list | `epochs last`: each run of up to 64 epochs (two characters each, oldest first) with the last id that was valid when each of them began; the newest 16 |
//! | `T` `e:<id>` | string | The record: [`crate::event::Notification`] as JSON. Expires 2 % after max_age; the record of a pending plan does not expire |
//! | `T` `l:<log>` | zset | Score: id; member: `id predecessor`; log: `u:<user>`, `g:<group>` or `all`. Each write removes entries older than max_age. The first write in each hundredth of max_age sets the expiry of the key to 2 % after max_age, so that at least 1 % is left for its newest entry |
//! | `T` `seen:<b>` | set | 16-byte hashes of publishers' event ids; `b` = ms of the entry / window, or of the clock if the entry's id is not a time of day |
//! | `T` `dead` | stream | Dead letters: `entry`, `reason`, `plugin`, `attempts`, `entry_bytes` and `entry_fields` if only the beginning of the entry is kept, then the entry's own fields, each name prefixed with `f:` |
//! | `T` `retrying` | stream | Dead letters of events that wait for a retry: as in `dead`, with `retries`, the number of the next one; `first`, the time of the first failure, and `due`, both in ms. No id is also in `dead` |
//! | `T` `due` | zset | Score: `due`; member: the id in `retrying` |
//! | `T` `retried` | hash | The entry of a retry -> `attempts retries first`, until it has an outcome |
//! | `T` `decisions` | stream | Decision records: `entry`, `outcome`, `decision` ([`crate::event::Decision`] as JSON), `id` if the event was committed; `attempts` if it was retried, `due` if it will be |
//! | `T` `owner` | string | The lease: the name of the node |
//! | `T` `bridge:<name>` | hash | The listener of a bridge: `session` and `node`, which hold the lease until `until`, and its `ttl`; `seq`, the number of messages that the session appended; `heard`, when a listener was last subscribed. Times in ms |
//! | `P:partitions` | hash | source -> partition number; entries are only ever added |
//! | `P:nodes` | hash | The nodes: name -> `ms address`, the time of the last registration and the address of the public listener. An entry counts for 10 s |
//! | `P:rollouts` | hash | The roll-outs: plugin -> [`crate::broker::Rollout`] as JSON; the empty name -> the revision, which grows with every write |
//! | `P:report:<node>` | string | The report of a node as JSON. Expires after 10 s |
//! | `P:user:<user>` | hash | `attributes` as JSON; `g:<group>`: `number:joined ...`, after leaving `number:joined-left ... @ms`; `joined` and `left`, the numbers of both; `pruned`, when expired ones were last removed, in ms. Without attributes and current memberships, expires max_age after the last change |
//! | `P:ticket:<id>` | string | A one-time ticket under a hash of it: the credentials behind it, encrypted with it. Expires after 30 s |
//! | `P:device-cursors:{P:user:<user>}` | hash | `d:<device>` and `read`: `ms a cursor` if acknowledged, `ms b cursor` if a stream began there; `ms` is the time of the last move. In the slot of the user's other key, unless the name contains braces. Expires with its newest entry |
//!
//! | Channel | Message |
//! |---|---|
//! | `C` `l:<log>` | `epoch id`, followed by a space and the record if it has at most 1,024 bytes |
//! | `C` `tick` | `epoch last`, or `alive` if Redis cannot write |
//! | `C` `recipients` | The user whose memberships or attributes changed |
//!
//! `C` is `T` with the number of the database after `P:`, as in `P:0:{<source key>}:`, because all
//! databases share their channels.
//!
//! # Memberships
//!
//! A user has one span per group and partition, the newest: joining again after leaving begins a
//! new span, and notifications from the earlier span are no longer delivered to a client that
//! resumes from before it (documented in docs/groups.md). A partition that was added after the user
//! joined counts from its beginning.
//!
//! # Connections
//!
//! One connection for commands (`redis/command_connection.rs`), up to two idle connections per
//! partition that wait for new entries (`redis/readers.rs`; more are opened while more reads run
//! concurrently), one for notices (`redis/feed.rs`) and one for each bridge to which this node listens
//! (`redis/channels.rs`). A command that is not answered within 2 s
//! counts as the broker being unavailable; a wait for an entry has these 2 s in addition.
//!
//! # Large entries
//!
//! A client with the right to `XADD` may add an entry of up to 1 GiB, and Redis offers no command
//! that returns the size of an entry. `redis/entries.rs` therefore reads in a script that measures
//! each entry and returns only the beginning of a large one. No script that runs regularly calls
//! `XINFO STREAM` on a source, because it copies the first and the last entry.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ::redis as client;
use async_trait::async_trait;
use bytes::Bytes;

use super::{
    Advertised, Batch, BridgeAccess, CommitResult, CursorOwner, DeadLetter, DecisionSearch, Entry,
    Error, Feed, Finding, Head, Item, Lease, Logs, MAX_ENTRY_FIELDS, NewNotification, Operations,
    Page, Partition, PartitionState, Partitions, Peer, Proposal, RecipientChange, Result,
    Retention, Rollout, Rollouts, Slice, Sources, StoredCursor, StoredDecision, StoredReport,
    Users, WantedVersions,
};
use crate::event::{
    ChainMembers, EntryId, Name, NotificationId, Outcome, PartitionNumber, Position, Recipient,
    Target,
};

mod channels;
mod check;
mod command_connection;
mod decisions;
mod device_cursors;
mod entries;
mod feed;
mod partition_keys;
mod peers;
mod prefix;
mod pubsub_connection;
mod readers;
mod recipients;
pub mod resp;
mod rollouts;
mod scripts;
mod tickets;

use super::clock::{BrokerClock, Sent};
pub(crate) use command_connection::DEADLINE;
use command_connection::{CommandConnection, unexpected, write_refusal};
use partition_keys::PartitionKeys;
pub use prefix::Prefix;
use scripts::Script;

/// Records up to this size, in bytes, are sent with their notice, which saves the node a read.
const INLINE_BYTES: usize = 1024;
/// Maximum number of entries in one call of the append script, which occupies Redis for about half
/// a millisecond.
const APPEND_ENTRIES: usize = 256;
/// Maximum number of keys in one call of the script that reads records.
const RECORDS: usize = 64;
/// Size at which one call for records ends, in bytes; the next call continues.
const RECORDS_BYTES: usize = 4 * 1024 * 1024;
/// Maximum number of logs in one call of the script that reads pages, which occupies Redis for
/// about half a millisecond.
const LOGS: usize = 64;

/// See the head of this file.
pub struct Redis {
    client: client::Client,
    connection: CommandConnection,
    prefix: Prefix,
    partitions: Vec<Partition>,
    /// In the order of `partitions`.
    keys: Vec<PartitionKeys>,
    retention: Retention,
    clock: BrokerClock,
    /// The access that the bridges need, for the check of rights.
    bridges: Vec<BridgeAccess>,
    /// The address from which this machine reaches Redis.
    local_ip: std::net::IpAddr,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis")
            .field("address", &address(&self.client))
            .field("prefix", &self.prefix)
            .field("partitions", &self.partitions)
            .finish()
    }
}

/// Checks that a URL is one that [`Redis::connect`] can use, with the same parser.
///
/// # Errors
/// The reason, without the URL: it may hold a password.
pub fn check_url(url: &str) -> std::result::Result<(), String> {
    client::Client::open(url)
        .map(drop)
        .map_err(|error| error.to_string())
}

impl Redis {
    /// Connects, creates the partitions of new sources and assigns each its number. Brokers with
    /// the same `prefix` in one database are nodes of one installation.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if Redis is unreachable; retry later. [`Error::Permanent`] if the
    /// URL, the version or a source is not usable; retrying does not help.
    pub async fn connect(
        url: &str,
        prefix: &Prefix,
        sources: &[String],
        retention: Retention,
    ) -> Result<Self> {
        let client = client::Client::open(url).map_err(|error| {
            Error::Permanent(format!("invalid URL: {error}; write redis://host:port"))
        })?;
        let address = address(&client);
        Self::connect_to(client, prefix, sources, retention)
            .await
            .map_err(|error| located(error, &address))
    }

    async fn connect_to(
        client: client::Client,
        prefix: &Prefix,
        sources: &[String],
        retention: Retention,
    ) -> Result<Self> {
        let connection = CommandConnection::new(client.clone());
        let prefixes = prefix.partitions(sources).map_err(Error::Permanent)?;
        check::version(&connection).await?;
        let clock = read_clock(&connection).await?;
        let local_ip = peers::local_ip(client.get_connection_info().addr()).await?;
        let database = client.get_connection_info().redis_settings().db();
        let mut keys = Vec::with_capacity(sources.len());
        for (source, of_keys) in sources.iter().zip(prefixes) {
            let of_channels = prefix.channels(database, &of_keys);
            let prefixes = (of_keys, of_channels);
            keys.push(
                PartitionKeys::find(&connection, prefix, source, prefixes, &retention).await?,
            );
        }
        keys.sort_by_key(|keys| keys.partition.number);
        let partitions = keys.iter().map(|keys| keys.partition.clone()).collect();
        let redis = Self {
            client,
            connection,
            prefix: prefix.clone(),
            partitions,
            keys,
            retention,
            clock,
            bridges: Vec::new(),
            local_ip,
        };
        for keys in &redis.keys {
            match redis.begin(keys).await {
                // History can be read; a tick begins later.
                Err(error) if write_refusal(&error).is_some() => {}
                begun => begun?,
            }
        }
        Ok(redis)
    }

    /// Also checks that the user has the rights that these bridges need.
    #[must_use]
    pub fn with_bridges(mut self, bridges: Vec<BridgeAccess>) -> Self {
        self.bridges = bridges;
        self
    }

    fn keys(&self, partition: PartitionNumber) -> Result<&PartitionKeys> {
        let found = self
            .keys
            .iter()
            .find(|keys| keys.partition.number == partition);
        found.ok_or_else(|| Error::Permanent(format!("partition {} does not exist", partition.0)))
    }

    fn max_age_ms(&self) -> u64 {
        crate::duration::millis(self.retention.max_age)
    }

    /// Runs a script on a partition.
    async fn run<T: client::FromRedisValue>(
        &self,
        keys: &PartitionKeys,
        script: &Script,
        own: impl Fn(&mut client::Cmd),
    ) -> Result<T> {
        let call = self.connection.eval(script, |command| {
            command
                .arg(2)
                .arg(&keys.partition.source)
                .arg(&keys.meta)
                .arg(&keys.arguments);
            own(command);
        });
        call.await
    }

    async fn begin(&self, keys: &PartitionKeys) -> Result<()> {
        let repairs = self.run(keys, &scripts::BEGIN, |_| {}).await?;
        keys.report_repairs(repairs);
        keys.has_begun.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn begin_and_tick(&self, keys: &PartitionKeys) -> Result<(u64, u64)> {
        if !keys.has_begun.load(Ordering::Relaxed) {
            self.begin(keys).await?;
        }
        let sent = Sent::now();
        let (trimmed_unread, foreign_entries, now_ms) =
            self.run(keys, &scripts::TICK, |_| {}).await?;
        self.clock.observe(now_ms, sent);
        Ok((trimmed_unread, foreign_entries))
    }

    async fn commit_items(
        &self,
        keys: &PartitionKeys,
        epoch: crate::event::Epoch,
        prev: Position,
        slice: Option<(u32, bool)>,
        items: &[Item],
    ) -> Result<CommitResult> {
        let decisions = items
            .iter()
            .map(|item| serde_json::to_string(&item.decision).map_err(|error| unexpected(&error)))
            .collect::<Result<Vec<_>>>()?;
        let answer: Vec<String> = self
            .run(keys, &scripts::COMMIT, |command| {
                let (index, is_last) =
                    slice.map_or((-1, false), |(index, is_last)| (i64::from(index), is_last));
                command
                    .arg(INLINE_BYTES)
                    .arg(epoch.to_string())
                    .arg(prev.to_string())
                    .arg(index)
                    .arg(u8::from(is_last))
                    .arg(items.len());
                for (item, decision) in items.iter().zip(&decisions) {
                    add_item(command, item, decision, index > 0);
                }
            })
            .await?;
        match answer.split_first() {
            Some((word, [])) if word == "conflict" => Ok(CommitResult::Conflict),
            Some((word, outcomes)) if word == "done" && outcomes.len() == 2 * items.len() => {
                let outcomes = outcomes
                    .chunks(2)
                    .map(|pair| Ok((parse_text(&pair[0])?, optional_id(&pair[1])?)));
                Ok(CommitResult::Done(outcomes.collect::<Result<_>>()?))
            }
            _ => Err(unexpected(&"malformed commit outcomes")),
        }
    }
}

/// Reads the clock of Redis.
async fn read_clock(connection: &CommandConnection) -> Result<BrokerClock> {
    let sent = Sent::now();
    let (seconds, microseconds): (u64, u64) = connection.query(&client::cmd("TIME")).await?;
    Ok(BrokerClock::from_answer(
        seconds * 1_000 + microseconds / 1_000,
        sent,
    ))
}

fn add_item(command: &mut client::Cmd, item: &Item, decision: &str, is_later_slice: bool) {
    let kind = match &item.proposal {
        Proposal::Commit(_) => "c",
        Proposal::Discard => "d",
        Proposal::Unrouted => "u",
        Proposal::DeadLetter(_) => "x",
        Proposal::OversizedEntry { .. } => "o",
        Proposal::Retry(..) => "r",
    };
    command
        .arg(kind)
        .arg(item.entry.to_string())
        .arg(item.dedupe.as_ref().map_or(&[][..], |hash| hash))
        .arg(decision);
    if let Proposal::Retry(_, policy) = &item.proposal {
        command
            .arg(policy.retries)
            .arg(crate::duration::millis(policy.timeout));
    }
    match &item.proposal {
        Proposal::Commit(notifications) => {
            command.arg(notifications.len());
            for NewNotification { record, targets } in notifications {
                // The first slice stored it: a later one needs it for its notices, if at all.
                let is_sent = !is_later_slice || record.len() <= INLINE_BYTES;
                let record = if is_sent { &record[..] } else { &[] };
                command.arg(record).arg(targets.len());
                for target in targets {
                    command.arg(target.to_string());
                }
            }
        }
        Proposal::DeadLetter(why) | Proposal::Retry(why, _) => {
            command
                .arg(&why.reason)
                .arg(why.plugin.as_deref().unwrap_or_default())
                .arg(why.attempts);
            add_fields(command.arg(why.fields.len()), &why.fields);
        }
        Proposal::OversizedEntry { why, size } => {
            command
                .arg(&why.reason)
                .arg(why.plugin.as_deref().unwrap_or_default())
                .arg(why.attempts)
                .arg(u8::from(size.fits_dead_letter()))
                .arg(size.bytes)
                .arg(size.fields);
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

/// Parses a text that one of our own scripts or keys returned.
fn parse_text<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T> {
    text.parse().map_err(|error| unexpected(&error))
}

fn id(text: &str) -> Result<NotificationId> {
    parse_text(text).map(NotificationId)
}

fn optional_id(text: &str) -> Result<Option<NotificationId>> {
    Ok(optional_number(text)?.map(NotificationId))
}

fn optional_number(text: &str) -> Result<Option<u64>> {
    if text.is_empty() {
        Ok(None)
    } else {
        parse_text(text).map(Some)
    }
}

/// A page of a log from its members, of which one beyond `limit` shows that more follow.
fn page(floor: NotificationId, is_present: bool, members: &[String], limit: usize) -> Result<Page> {
    let entries = members.iter().take(limit).map(|member| {
        let (own, before) = member
            .split_once(' ')
            .ok_or_else(|| unexpected(&"a malformed log entry"))?;
        Ok((id(own)?, id(before)?))
    });
    Ok(Page {
        entries: entries.collect::<Result<_>>()?,
        is_present,
        is_last: members.len() <= limit,
        floor,
    })
}

#[async_trait]
impl Partitions for Redis {
    fn partitions(&self) -> &[Partition] {
        &self.partitions
    }

    fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    async fn head(&self, partition: PartitionNumber) -> Result<Head> {
        let keys = self.keys(partition)?;
        let mut is_of_epoch_before = false;
        // A second attempt if an epoch has to begin first, a third if it ends in between.
        for _ in 0..3 {
            let sent = Sent::now();
            let answer: Vec<String> = self
                .run(keys, &scripts::HEAD, |command| {
                    command.arg(u8::from(is_of_epoch_before));
                })
                .await?;
            if let [
                epoch,
                last,
                pending,
                position,
                floor,
                origin,
                now_ms,
                epochs @ ..,
            ] = answer.as_slice()
            {
                let now_ms = parse_text(now_ms)?;
                self.clock.observe(now_ms, sent);
                return Ok(Head {
                    epoch: parse_text(epoch)?,
                    epochs: epochs
                        .chunks_exact(2)
                        .map(|pair| Ok((parse_text(&pair[0])?, id(&pair[1])?)))
                        .collect::<Result<_>>()?,
                    last: id(last)?,
                    pending: optional_id(pending)?,
                    position: parse_text(position)?,
                    floor: id(floor)?,
                    origin: id(origin)?,
                    now_ms,
                });
            }
            match self.begin(keys).await {
                // The next epoch begins before the next write, so no id of this one can be issued
                // again until then.
                Err(error) if !is_of_epoch_before && write_refusal(&error).is_some() => {
                    is_of_epoch_before = true;
                }
                begun => begun?,
            }
        }
        Err(Error::Unavailable(
            "its replication id keeps changing".into(),
        ))
    }

    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>> {
        let keys = self.keys(partition)?;
        let mut records = Vec::with_capacity(ids.len());
        while let Some(missing) = ids.get(records.len()..).filter(|ids| !ids.is_empty()) {
            // The script returns the first of the requested records, and at least one.
            let found: Vec<Option<Vec<u8>>> = self
                .connection
                .eval(&scripts::RECORDS, |command| {
                    let some = &missing[..missing.len().min(RECORDS)];
                    command.arg(some.len());
                    for id in some {
                        command.arg(format!("{}e:{id}", keys.prefix));
                    }
                    command.arg(RECORDS_BYTES);
                })
                .await?;
            if found.is_empty() {
                return Err(unexpected(&"no records"));
            }
            records.extend(found.into_iter().map(|record| record.map(Bytes::from)));
        }
        Ok(records)
    }
}

#[async_trait]
impl Sources for Redis {
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>> {
        let keys = self.keys(partition)?;
        if let Some(fields) = entries
            .iter()
            .find(|fields| fields.is_empty() || fields.len() > MAX_ENTRY_FIELDS)
        {
            return Err(Error::Permanent(format!(
                "an entry has {} fields; 1 to {MAX_ENTRY_FIELDS} are allowed",
                fields.len()
            )));
        }
        let mut ids = Vec::with_capacity(entries.len());
        for chunk in chunks(&entries) {
            let answer: Vec<String> = self
                .run(keys, &scripts::APPEND, |command| {
                    // Only the first call checks the backlog, so that either all entries are
                    // accepted or none.
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
                    "{waiting} entries are waiting in '{}'; try again later",
                    keys.partition.source
                )));
            }
            for id in answer {
                ids.push(parse_text(&id)?);
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
        entries::read(self, self.keys(partition)?, after, count, wait).await
    }

    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease> {
        let held_ms: u64 = self
            .run(self.keys(partition)?, &scripts::LEASE, |command| {
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
        self.run(self.keys(partition)?, &scripts::RELEASE, |command| {
            command.arg(node);
        })
        .await
    }

    async fn take_over(&self, partition: PartitionNumber) -> Result<u32> {
        let keys = self.keys(partition)?;
        let (times, trimmed_unread, foreign_entries) = self
            .run(keys, &scripts::ATTEMPT, |command| {
                command.arg("takeovers").arg("");
            })
            .await?;
        keys.report_repairs((trimmed_unread, foreign_entries));
        Ok(times)
    }

    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32> {
        let (times, ..): (u32, u64, u64) = self
            .run(self.keys(partition)?, &scripts::ATTEMPT, |command| {
                command.arg("attempts").arg(entry.to_string());
            })
            .await?;
        Ok(times)
    }

    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<CommitResult> {
        if batch.items.is_empty() {
            return Ok(CommitResult::Done(Vec::new()));
        }
        self.commit_items(
            self.keys(partition)?,
            batch.epoch,
            batch.prev,
            None,
            &batch.items,
        )
        .await
    }

    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<CommitResult> {
        let at = Some((slice.index, slice.is_last));
        self.commit_items(
            self.keys(partition)?,
            slice.epoch,
            slice.prev,
            at,
            std::slice::from_ref(&slice.item),
        )
        .await
    }
}

#[async_trait]
impl Logs for Redis {
    async fn pages(
        &self,
        partition: PartitionNumber,
        logs: &[(Target, NotificationId)],
        limit: usize,
    ) -> Result<Vec<Page>> {
        let keys = self.keys(partition)?;
        let mut pages = Vec::with_capacity(logs.len());
        for some in logs.chunks(LOGS) {
            let (floor, found): (u64, Vec<(bool, Vec<String>)>) = self
                .run(keys, &scripts::PAGES, |command| {
                    command.arg(limit);
                    for (target, after) in some {
                        command.arg(target.to_string()).arg(after.0);
                    }
                })
                .await?;
            if found.len() != some.len() {
                return Err(unexpected(&"a malformed list of pages"));
            }
            for (is_present, members) in found {
                pages.push(page(NotificationId(floor), is_present, &members, limit)?);
            }
        }
        Ok(pages)
    }

    async fn feed(&self) -> Result<Feed> {
        let channels = self
            .keys
            .iter()
            .map(|keys| (keys.channels.clone(), keys.partition.number))
            .collect();
        feed::open(self.client.get_connection_info(), channels).await
    }

    async fn tick(&self, partition: PartitionNumber) -> Result<()> {
        let keys = self.keys(partition)?;
        match self.begin_and_tick(keys).await {
            Ok(repairs) => keys.report_repairs(repairs),
            // Redis rejects scripts that write but accepts a plain PUBLISH.
            Err(error) if write_refusal(&error).is_some() => {
                let _n_receivers: i64 = self
                    .connection
                    .query(
                        client::cmd("PUBLISH")
                            .arg(format!("{}tick", keys.channels))
                            .arg("alive"),
                    )
                    .await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn recipient(&self, user: &Name) -> Result<Recipient> {
        recipients::read(self, user).await
    }
}

#[async_trait]
impl Users for Redis {
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()> {
        recipients::change(self, user, change).await
    }

    async fn device_cursors(&self, user: &Name) -> Result<BTreeMap<CursorOwner, StoredCursor>> {
        device_cursors::read(self, user).await
    }

    async fn move_device_cursor(
        &self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> Result<bool> {
        device_cursors::change(self, user, which, seen, to).await
    }

    async fn store_ticket(&self, id: &str, ticket: Bytes, ttl: Duration) -> Result<()> {
        tickets::store(self, id, &ticket, ttl).await
    }

    async fn take_ticket(&self, id: &str) -> Result<Option<Bytes>> {
        tickets::take(self, id).await
    }
}

#[async_trait]
impl Operations for Redis {
    async fn check(&self) -> Result<Vec<Finding>> {
        check::findings(self)
            .await
            .map_err(|error| located(error, &address(&self.client)))
    }

    async fn register_node(&self, name: &str, at: &Advertised) -> Result<Vec<Peer>> {
        peers::register(self, name, at).await
    }

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState> {
        type Answer = (u64, u64, u64, u64, bool, u64, BTreeMap<String, String>);
        let (lag, dead_letters, retrying, ids_ahead_ms, is_timed, unneeded, meta): Answer = self
            .run(self.keys(partition)?, &scripts::STATE, |_| {})
            .await?;
        let position = meta
            .get("pos")
            .map_or(Ok(Position::default()), |text| parse_text(text))?;
        let number = |field: &str| meta.get(field).map_or(Ok(0), |text| parse_text(text));
        let outcomes = Outcome::ALL
            .into_iter()
            .map(|outcome| Ok((outcome, number(outcome.as_str())?)));
        Ok(PartitionState {
            outcomes: outcomes.collect::<Result<_>>()?,
            position,
            lag,
            trimmed_unread: number("trimmed_unread")?,
            dead_letters,
            retrying,
            dead_trimmed: number("dead_trimmed")?,
            dedupe_overflows: number("dedupe_overflows")?,
            ids_ahead_ms,
            has_foreign_ids: !is_timed,
            unneeded,
        })
    }

    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        entries::dead_letters(self, self.keys(partition)?, "dead", after, limit, true).await
    }

    async fn dead_letter_headers(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        entries::dead_letters(self, self.keys(partition)?, "dead", after, limit, false).await
    }

    async fn retrying(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        entries::dead_letters(self, self.keys(partition)?, "retrying", after, limit, true).await
    }

    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        self.run(self.keys(partition)?, &scripts::REDRIVE, |command| {
            command.arg(id.to_string());
        })
        .await
    }

    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        self.run(self.keys(partition)?, &scripts::DROP, |command| {
            command.arg(id.to_string());
        })
        .await
    }

    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<StoredDecision>> {
        decisions::newest(self, self.keys(partition)?, limit).await
    }

    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<DecisionSearch> {
        decisions::find(self, self.keys(partition)?, event_id, limit).await
    }

    async fn find_chain(
        &self,
        partition: PartitionNumber,
        id: &str,
    ) -> Result<Option<ChainMembers>> {
        decisions::find_chain(self, self.keys(partition)?, id).await
    }
}

#[async_trait]
impl Rollouts for Redis {
    async fn rollouts(&self, plugins: &[Name]) -> Result<WantedVersions> {
        rollouts::read(self, plugins).await
    }

    async fn set_rollout(&self, plugin: &Name, rollout: Option<&Rollout>) -> Result<u64> {
        let written = rollouts::write(self, plugin, None, rollout).await?;
        written.ok_or_else(|| Error::Permanent("the roll-out was not written".to_owned()))
    }

    async fn replace_rollout(
        &self,
        plugin: &Name,
        before: &Rollout,
        rollout: Option<&Rollout>,
    ) -> Result<Option<u64>> {
        rollouts::write(self, plugin, Some(before), rollout).await
    }

    async fn report_node(&self, node: &str, report: Bytes) -> Result<bool> {
        rollouts::report(self, node, &report).await
    }

    async fn node_reports(&self) -> Result<Vec<StoredReport>> {
        rollouts::reports(self).await
    }
}

/// The address of Redis without the rest of its URL, which may contain a password.
fn address(client: &client::Client) -> String {
    client.get_connection_info().addr().to_string()
}

/// Adds the address for operators, who see it in readiness. Responses to clients do not contain it.
fn located(error: Error, address: &str) -> Error {
    match error {
        Error::Unavailable(why) => Error::Unavailable(format!("{address}: {why}")),
        other => other,
    }
}

/// Splits the entries into calls of at most [`APPEND_ENTRIES`] entries and one MiB each. A single
/// larger entry gets its own call.
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
