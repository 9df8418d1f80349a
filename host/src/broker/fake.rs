//! A broker of a few vectors that fails on demand, for tests of its callers. `tests/conformance.rs`
//! tests the behaviour of real brokers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::broker::{
    Advertised, Batch, CommitResult, CursorOwner, DeadLetter, DecisionSearch, Entry, Error, Feed,
    Finding, Head, Lease, Logs, Operations, Page, Partition, PartitionState, Partitions, Peer,
    RecipientChange, Result, Rollout, Rollouts, Slice, Sources, StoredCursor, StoredDecision,
    StoredReport, Users, WantedVersions,
};
use crate::event::{
    ChainMembers, DeadReason, EntryId, Name, NotificationId, PartitionNumber, Recipient, Span,
    Target,
};

type Fields = Vec<(Bytes, Bytes)>;

#[derive(Clone, Debug)]
pub(crate) struct FakeBroker {
    partitions: Vec<Partition>,
    failure: Option<fn() -> Error>,
    lag: u64,
    findings: Vec<Finding>,
    shared: Arc<Mutex<FakeState>>,
}

#[derive(Debug, Default)]
struct FakeState {
    appended: Vec<(PartitionNumber, Fields)>,
    recipients: BTreeMap<Name, Recipient>,
    device_cursors: BTreeMap<Name, BTreeMap<CursorOwner, StoredCursor>>,
    dead: Vec<(PartitionNumber, DeadLetter)>,
    most_dead_read: usize,
}

impl Default for FakeBroker {
    fn default() -> Self {
        Self::with_partitions(1)
    }
}

impl FakeBroker {
    pub(crate) fn with_partitions(n: u8) -> Self {
        let partitions = (0..n)
            .map(|n| Partition {
                number: PartitionNumber(n),
                source: format!("pointsman:events:{n}"),
            })
            .collect();
        Self {
            partitions,
            failure: None,
            lag: 0,
            findings: Vec::new(),
            shared: Arc::default(),
        }
    }

    pub(crate) fn failing(failure: fn() -> Error) -> Self {
        Self {
            failure: Some(failure),
            ..Self::default()
        }
    }

    pub(crate) fn with_lag(self, lag: u64) -> Self {
        Self { lag, ..self }
    }

    pub(crate) fn with_findings(self, findings: Vec<Finding>) -> Self {
        Self { findings, ..self }
    }

    pub(crate) fn appended(&self) -> Vec<(PartitionNumber, Fields)> {
        self.shared.lock().unwrap().appended.clone()
    }

    pub(crate) fn bury(&self, partition: PartitionNumber, id: EntryId, fields: Fields) {
        let why = DeadReason {
            reason: "type is not UTF-8".into(),
            plugin: None,
            attempts: 1,
            fields,
        };
        self.shared.lock().unwrap().dead.push((
            partition,
            DeadLetter {
                id,
                entry: id,
                why,
                oversized: None,
                due_ms: None,
            },
        ));
    }

    /// The largest number of dead letters requested at once.
    pub(crate) fn most_dead_read(&self) -> usize {
        self.shared.lock().unwrap().most_dead_read
    }

    fn unbury(&self, partition: PartitionNumber, id: EntryId) -> bool {
        let dead = &mut self.shared.lock().unwrap().dead;
        let n_before = dead.len();
        dead.retain(|(p, letter)| (*p, letter.id) != (partition, id));
        dead.len() < n_before
    }
}

fn unused<T>() -> Result<T> {
    Err(Error::Permanent("no route calls this method".into()))
}

#[async_trait]
impl Partitions for FakeBroker {
    fn partitions(&self) -> &[Partition] {
        &self.partitions
    }

    fn now_ms(&self) -> u64 {
        crate::clock::now_ms()
    }

    async fn head(&self, _: PartitionNumber) -> Result<Head> {
        unused()
    }

    async fn records(
        &self,
        _: PartitionNumber,
        _: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>> {
        unused()
    }
}

#[async_trait]
impl Sources for FakeBroker {
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Fields>,
    ) -> Result<Vec<EntryId>> {
        if let Some(failure) = self.failure {
            return Err(failure());
        }
        let appended = &mut self.shared.lock().unwrap().appended;
        let ids = entries.into_iter().map(|fields| {
            appended.push((partition, fields));
            EntryId {
                ms: 1_700_000_000_000,
                seq: appended.len() as u64,
            }
        });
        Ok(ids.collect())
    }

    async fn read(
        &self,
        _: PartitionNumber,
        _: EntryId,
        _: usize,
        _: Duration,
    ) -> Result<Vec<Entry>> {
        unused()
    }

    async fn lease(&self, _: PartitionNumber, _: &str, _: Duration) -> Result<Lease> {
        unused()
    }

    async fn release(&self, _: PartitionNumber, _: &str) -> Result<()> {
        unused()
    }

    async fn take_over(&self, _: PartitionNumber) -> Result<u32> {
        unused()
    }

    async fn note_attempt(&self, _: PartitionNumber, _: EntryId) -> Result<u32> {
        unused()
    }

    async fn commit(&self, _: PartitionNumber, _: Batch) -> Result<CommitResult> {
        unused()
    }

    async fn commit_slice(&self, _: PartitionNumber, _: Slice) -> Result<CommitResult> {
        unused()
    }
}

#[async_trait]
impl Logs for FakeBroker {
    async fn pages(
        &self,
        _: PartitionNumber,
        _: &[(Target, NotificationId)],
        _: usize,
    ) -> Result<Vec<Page>> {
        unused()
    }

    async fn feed(&self) -> Result<Feed> {
        unused()
    }

    async fn tick(&self, _: PartitionNumber) -> Result<()> {
        self.failure.map_or_else(unused, |failure| Err(failure()))
    }

    async fn recipient(&self, user: &Name) -> Result<Recipient> {
        Ok(self
            .shared
            .lock()
            .unwrap()
            .recipients
            .get(user)
            .cloned()
            .unwrap_or_default())
    }
}

#[async_trait]
impl Users for FakeBroker {
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()> {
        let mut shared = self.shared.lock().unwrap();
        let recipient = shared.recipients.entry(user.clone()).or_default();
        match change {
            RecipientChange::Join { group } => {
                recipient.groups.insert(
                    group,
                    BTreeMap::from([(PartitionNumber(0), Span::default())]),
                );
            }
            RecipientChange::Leave { group } => {
                let left = Span {
                    joined: NotificationId(0),
                    left: Some(NotificationId(1)),
                };
                recipient
                    .groups
                    .insert(group, BTreeMap::from([(PartitionNumber(0), left)]));
            }
            RecipientChange::Attributes(attributes) => recipient.attributes = attributes,
        }
        Ok(())
    }

    async fn device_cursors(&self, user: &Name) -> Result<BTreeMap<CursorOwner, StoredCursor>> {
        Ok(self
            .shared
            .lock()
            .unwrap()
            .device_cursors
            .get(user)
            .cloned()
            .unwrap_or_default())
    }

    async fn move_device_cursor(
        &self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> Result<bool> {
        let mut shared = self.shared.lock().unwrap();
        let device_cursors = shared.device_cursors.entry(user.clone()).or_default();
        let is_seen = device_cursors.get(which) == seen;
        if is_seen {
            device_cursors.insert(which.clone(), to.clone());
        }
        Ok(is_seen)
    }

    async fn store_ticket(&self, _: &str, _: Bytes, _: Duration) -> Result<()> {
        unused()
    }

    async fn take_ticket(&self, _: &str) -> Result<Option<Bytes>> {
        unused()
    }
}

#[async_trait]
impl Rollouts for FakeBroker {
    async fn rollouts(&self, _: &[Name]) -> Result<WantedVersions> {
        Ok(WantedVersions::default())
    }

    async fn set_rollout(&self, _: &Name, _: Option<&Rollout>) -> Result<u64> {
        unused()
    }

    async fn replace_rollout(
        &self,
        _: &Name,
        _: &Rollout,
        _: Option<&Rollout>,
    ) -> Result<Option<u64>> {
        unused()
    }

    async fn report_node(&self, _: &str, _: Bytes) -> Result<bool> {
        Ok(true)
    }

    async fn node_reports(&self) -> Result<Vec<StoredReport>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl Operations for FakeBroker {
    async fn check(&self) -> Result<Vec<Finding>> {
        self.failure
            .map_or_else(|| Ok(self.findings.clone()), |failure| Err(failure()))
    }

    async fn register_node(&self, _: &str, _: &Advertised) -> Result<Vec<Peer>> {
        Ok(Vec::new())
    }

    async fn state(&self, _: PartitionNumber) -> Result<PartitionState> {
        Ok(PartitionState {
            lag: self.lag,
            ..PartitionState::default()
        })
    }

    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        let mut shared = self.shared.lock().unwrap();
        shared.most_dead_read = shared.most_dead_read.max(limit);
        let here = shared
            .dead
            .iter()
            .filter(|(p, letter)| *p == partition && letter.id > after);
        Ok(here.map(|(_, letter)| letter.clone()).take(limit).collect())
    }

    async fn dead_letter_headers(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        let mut letters = self.dead_letters(partition, after, limit).await?;
        for letter in &mut letters {
            letter.why.fields.clear();
        }
        Ok(letters)
    }

    async fn retrying(&self, _: PartitionNumber, _: EntryId, _: usize) -> Result<Vec<DeadLetter>> {
        Ok(Vec::new())
    }

    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        Ok(self.unbury(partition, id))
    }

    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        Ok(self.unbury(partition, id))
    }

    async fn decisions(&self, _: PartitionNumber, _: usize) -> Result<Vec<StoredDecision>> {
        unused()
    }

    async fn find_decisions(
        &self,
        _: PartitionNumber,
        _: &str,
        _: usize,
    ) -> Result<DecisionSearch> {
        unused()
    }

    async fn find_chain(&self, _: PartitionNumber, _: &str) -> Result<Option<ChainMembers>> {
        unused()
    }
}
