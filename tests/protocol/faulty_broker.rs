//! A broker under the control of a test. It wraps a real broker: a test can stop every operation
//! before or after it runs, lose its request or its reply, and drop or hold back notices. A test
//! thus fixes the order of two steps and never waits for time to pass.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pointsman::broker::{
    Advertised, Batch, Broker, CommitResult, CursorOwner, DeadLetter, DecisionSearch, Entry, Error,
    Feed, Finding, Follow, Head, Lease, Logs, Notice, Operations, Page, Partition, PartitionState,
    Partitions, Peer, RecipientChange, Result, Rollout, Rollouts, Slice, Sources, StoredCursor,
    StoredDecision, StoredReport, Users, WantedVersions,
};
use pointsman::event::{
    ChainMembers, EntryId, Name, NotificationId, PartitionNumber, Recipient, Target,
};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

use super::fixture::SOON;

/// The broker operations that a test can stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Head,
    Commit,
    Slice,
    Lease,
    Pages,
    Records,
    Recipient,
    DeviceCursors,
    MoveDeviceCursor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// Requested, but not run yet.
    Before(Op),
    /// Run, but not answered yet.
    After(Op),
}

/// The treatment of a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Pass,
    Drop,
    /// Hold it back until [`Puppet::release`]. For a tick, the node gets an "alive" notice
    /// meanwhile.
    Keep,
}

/// A point at which the next operation of a kind stops.
#[derive(Debug)]
pub(super) struct Stop {
    reached: oneshot::Receiver<()>,
    verdict: oneshot::Sender<bool>,
}

impl Stop {
    /// Waits until an operation has stopped here.
    pub(super) async fn reached(&mut self) {
        tokio::time::timeout(SOON, &mut self.reached)
            .await
            .expect("an operation reaches this point")
            .expect("the broker is not dropped");
    }

    pub(super) fn go(self) {
        self.end(true);
    }

    /// Fails the stopped operation: before it runs, as if the request was lost; after it ran, as if
    /// the reply was.
    pub(super) fn fail(self) {
        self.end(false);
    }

    fn end(self, goes: bool) {
        // The stopped task may have been killed.
        self.verdict.send(goes).ok();
    }
}

type Rule = Box<dyn FnMut(At) -> bool + Send>;
type Sieve = Box<dyn FnMut(&Notice, Option<&Target>) -> Fate + Send>;

struct Stopper {
    at: At,
    reached: oneshot::Sender<()>,
    verdict: oneshot::Receiver<bool>,
}

/// The state between the feed of the broker and the feed of the node.
#[derive(Default)]
struct Ear {
    sieve: Option<Sieve>,
    kept: Vec<Notice>,
    out: Option<mpsc::Sender<Vec<Notice>>>,
    /// The log of each subscription request, by its token.
    asked: HashMap<u64, Target>,
}

/// A broker under the control of a test; see the head of this file.
pub(super) struct Puppet {
    pub(super) broker: Arc<dyn Broker>,
    stops: Mutex<Vec<Stopper>>,
    rule: Mutex<Option<Rule>>,
    ear: Arc<AsyncMutex<Ear>>,
    old_head: Mutex<Option<Head>>,
    /// Answers every lease request with [`Lease::Mine`].
    everyone_owns: AtomicBool,
}

impl std::fmt::Debug for Puppet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Puppet").finish_non_exhaustive()
    }
}

impl Puppet {
    pub(super) fn over(broker: Arc<dyn Broker>) -> Arc<Self> {
        Arc::new(Self {
            broker,
            stops: Mutex::default(),
            rule: Mutex::default(),
            ear: Arc::default(),
            old_head: Mutex::default(),
            everyone_owns: AtomicBool::new(false),
        })
    }

    /// Stops the next operation that reaches this point.
    pub(super) fn stop(&self, at: At) -> Stop {
        let (reached_in, reached) = oneshot::channel();
        let (verdict, verdict_out) = oneshot::channel();
        self.stops
            .lock()
            .expect("no panic under the lock")
            .push(Stopper {
                at,
                reached: reached_in,
                verdict: verdict_out,
            });
        Stop { reached, verdict }
    }

    /// From now on, loses each request or reply for which `rule` returns `true`.
    pub(super) fn lose(&self, rule: impl FnMut(At) -> bool + Send + 'static) {
        *self.rule.lock().expect("no panic under the lock") = Some(Box::new(rule));
    }

    /// From now on, `sieve` decides about each notice. For the acknowledgement of a subscription it
    /// also gets the log.
    pub(super) async fn sift(
        &self,
        sieve: impl FnMut(&Notice, Option<&Target>) -> Fate + Send + 'static,
    ) {
        self.ear.lock().await.sieve = Some(Box::new(sieve));
    }

    /// Delivers the notices held back, in their order, and lets all later ones pass.
    pub(super) async fn release(&self) {
        let mut ear = self.ear.lock().await;
        ear.sieve = None;
        let kept = std::mem::take(&mut ear.kept);
        self.hand_over(&ear, kept).await;
    }

    /// The number of notices held back.
    pub(super) async fn n_kept(&self) -> usize {
        self.ear.lock().await.kept.len()
    }

    /// Delivers a notice that the broker did not send.
    pub(super) async fn say(&self, notice: Notice) {
        let ear = self.ear.lock().await;
        self.hand_over(&ear, vec![notice]).await;
    }

    async fn hand_over(&self, ear: &Ear, notices: Vec<Notice>) {
        if let Some(out) = ear.out.as_ref().filter(|_| !notices.is_empty()) {
            out.send(notices).await.expect("the node reads its feed");
        }
    }

    pub(super) fn everyone_owns(&self) {
        self.everyone_owns.store(true, Ordering::Relaxed);
    }

    /// Answers the next head request with this head, like a former primary that has not noticed its
    /// demotion.
    pub(super) fn answer_once(&self, head: Head) {
        *self.old_head.lock().expect("no panic under the lock") = Some(head);
    }

    async fn pass(&self, at: At) -> Result<()> {
        let stopper = {
            let mut stops = self.stops.lock().expect("no panic under the lock");
            stops
                .iter()
                .position(|stop| stop.at == at)
                .map(|place| stops.remove(place))
        };
        if let Some(stopper) = stopper {
            stopper.reached.send(()).ok();
            // A dropped stop lets the operation go on.
            if !stopper.verdict.await.unwrap_or(true) {
                return Err(Error::Unavailable(format!("lost {at:?}")));
            }
        }
        let is_lost = self
            .rule
            .lock()
            .expect("no panic under the lock")
            .as_mut()
            .is_some_and(|rule| rule(at));
        if is_lost {
            Err(Error::Unavailable(format!("lost {at:?}")))
        } else {
            Ok(())
        }
    }

    async fn around<T>(&self, op: Op, does: impl Future<Output = Result<T>>) -> Result<T> {
        self.pass(At::Before(op)).await?;
        let answer = does.await;
        self.pass(At::After(op)).await?;
        answer
    }
}

#[async_trait]
impl Partitions for Puppet {
    fn partitions(&self) -> &[Partition] {
        self.broker.partitions()
    }

    fn now_ms(&self) -> u64 {
        self.broker.now_ms()
    }

    async fn head(&self, partition: PartitionNumber) -> Result<Head> {
        let old = self
            .old_head
            .lock()
            .expect("no panic under the lock")
            .take();
        self.around(Op::Head, async {
            if let Some(old) = old {
                Ok(old)
            } else {
                self.broker.head(partition).await
            }
        })
        .await
    }

    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>> {
        self.around(Op::Records, self.broker.records(partition, ids))
            .await
    }
}

#[async_trait]
impl Sources for Puppet {
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>> {
        self.broker.append(partition, entries).await
    }

    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>> {
        self.around(Op::Read, self.broker.read(partition, after, count, wait))
            .await
    }

    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease> {
        if self.everyone_owns.load(Ordering::Relaxed) {
            return Ok(Lease::Mine);
        }
        self.around(Op::Lease, self.broker.lease(partition, node, ttl))
            .await
    }

    async fn release(&self, partition: PartitionNumber, node: &str) -> Result<()> {
        self.broker.release(partition, node).await
    }

    async fn take_over(&self, partition: PartitionNumber) -> Result<u32> {
        self.broker.take_over(partition).await
    }

    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32> {
        self.broker.note_attempt(partition, entry).await
    }

    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<CommitResult> {
        self.around(Op::Commit, self.broker.commit(partition, batch))
            .await
    }

    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<CommitResult> {
        self.around(Op::Slice, self.broker.commit_slice(partition, slice))
            .await
    }
}

#[async_trait]
impl Logs for Puppet {
    async fn pages(
        &self,
        partition: PartitionNumber,
        logs: &[(Target, NotificationId)],
        limit: usize,
    ) -> Result<Vec<Page>> {
        self.around(Op::Pages, self.broker.pages(partition, logs, limit))
            .await
    }

    async fn feed(&self) -> Result<Feed> {
        let Feed {
            follow: inner_follow,
            notices: mut inner_notices,
        } = self.broker.feed().await?;
        let (follow, mut requests) = mpsc::unbounded_channel();
        let (out, notices) = mpsc::channel(64);
        let ear = Arc::clone(&self.ear);
        {
            let mut ear = ear.lock().await;
            ear.out = Some(out.clone());
            ear.kept.clear();
            ear.asked.clear();
        }
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    request = requests.recv() => {
                        let Some(request) = request else { return };
                        if let Follow::Start { token, target, .. } = &request {
                            ear.lock().await.asked.insert(*token, target.clone());
                        }
                        drop(inner_follow.send(request));
                    }
                    batch = inner_notices.recv() => {
                        let Some(batch) = batch else { return };
                        let mut ear = ear.lock().await;
                        let Ear { sieve, kept, asked, .. } = &mut *ear;
                        let mut passed = Vec::new();
                        for notice in batch {
                            let log = if let Notice::Following { token } = &notice { asked.get(token) } else { None };
                            match sieve.as_mut().map_or(Fate::Pass, |sieve| sieve(&notice, log)) {
                                Fate::Pass => passed.push(notice),
                                Fate::Drop => {}
                                Fate::Keep => {
                                    // However long the tick is held back on a busy machine, the
                                    // node must not take the connection for dead.
                                    if let Notice::Tick { partition, .. } = notice {
                                        passed.push(Notice::Alive { partition });
                                    }
                                    kept.push(notice);
                                }
                            }
                        }
                        // Sent under the lock, so that notices released earlier arrive before later
                        // ones.
                        if !passed.is_empty() && out.send(passed).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Feed { follow, notices })
    }

    async fn tick(&self, partition: PartitionNumber) -> Result<()> {
        self.broker.tick(partition).await
    }

    async fn recipient(&self, user: &Name) -> Result<Recipient> {
        self.around(Op::Recipient, self.broker.recipient(user))
            .await
    }
}

#[async_trait]
impl Users for Puppet {
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()> {
        self.broker.change_recipient(user, change).await
    }

    async fn device_cursors(&self, user: &Name) -> Result<BTreeMap<CursorOwner, StoredCursor>> {
        self.around(Op::DeviceCursors, self.broker.device_cursors(user))
            .await
    }

    async fn move_device_cursor(
        &self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> Result<bool> {
        self.around(
            Op::MoveDeviceCursor,
            self.broker.move_device_cursor(user, which, seen, to),
        )
        .await
    }

    async fn store_ticket(&self, id: &str, ticket: Bytes, ttl: Duration) -> Result<()> {
        self.broker.store_ticket(id, ticket, ttl).await
    }

    async fn take_ticket(&self, id: &str) -> Result<Option<Bytes>> {
        self.broker.take_ticket(id).await
    }
}

#[async_trait]
impl Rollouts for Puppet {
    async fn rollouts(&self, plugins: &[Name]) -> Result<WantedVersions> {
        self.broker.rollouts(plugins).await
    }

    async fn set_rollout(&self, plugin: &Name, rollout: Option<&Rollout>) -> Result<u64> {
        self.broker.set_rollout(plugin, rollout).await
    }

    async fn replace_rollout(
        &self,
        plugin: &Name,
        before: &Rollout,
        rollout: Option<&Rollout>,
    ) -> Result<Option<u64>> {
        self.broker.replace_rollout(plugin, before, rollout).await
    }

    async fn report_node(&self, node: &str, report: Bytes) -> Result<bool> {
        self.broker.report_node(node, report).await
    }

    async fn node_reports(&self) -> Result<Vec<StoredReport>> {
        self.broker.node_reports().await
    }
}

#[async_trait]
impl Operations for Puppet {
    async fn check(&self) -> Result<Vec<Finding>> {
        self.broker.check().await
    }

    async fn register_node(&self, name: &str, at: &Advertised) -> Result<Vec<Peer>> {
        self.broker.register_node(name, at).await
    }

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState> {
        self.broker.state(partition).await
    }

    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.broker.dead_letters(partition, after, limit).await
    }

    async fn dead_letter_headers(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.broker
            .dead_letter_headers(partition, after, limit)
            .await
    }

    async fn retrying(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.broker.retrying(partition, after, limit).await
    }

    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        self.broker.redrive(partition, id).await
    }

    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        self.broker.drop_dead_letter(partition, id).await
    }

    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<StoredDecision>> {
        self.broker.decisions(partition, limit).await
    }

    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<DecisionSearch> {
        self.broker.find_decisions(partition, event_id, limit).await
    }

    async fn find_chain(
        &self,
        partition: PartitionNumber,
        id: &str,
    ) -> Result<Option<ChainMembers>> {
        self.broker.find_chain(partition, id).await
    }
}
