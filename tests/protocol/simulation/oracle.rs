//! The expected result of a run, computed from the final source, decisions and memberships: each
//! entry has one outcome, and each client received each of its events once and in order, or a gap
//! that covers it.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use pointsman::delivery::subscription::{Gap, GapReason, Record};
use pointsman::event::{EntryId, Name, NotificationId, Outcome, PartitionNumber, Priority, Target};

use super::{Client, Kind, MEMBERS, Play, Received, Stay};
use crate::protocol::fixture::{answered, event_id, name};

impl Play {
    pub(super) async fn check(&self) {
        for &partition in &self.partitions {
            let history = self.check_ingest(partition).await;
            for client in &self.clients {
                self.check_delivery(client, partition, &history);
            }
        }
    }

    /// Each entry in the source has one outcome. Each committed event has one id, ids follow the
    /// order of the source, and every log of its targets holds it.
    async fn check_ingest(&self, partition: PartitionNumber) -> Vec<(NotificationId, Record)> {
        let broker = &self.stage.puppet.broker;
        let entries = answered("read", async || {
            broker
                .read(partition, EntryId::default(), 1_000_000, Duration::ZERO)
                .await
        })
        .await;
        let mut decisions = answered("decisions", async || {
            broker.decisions(partition, 1_000_000).await
        })
        .await;
        decisions.reverse();
        let decided: Vec<EntryId> = decisions.iter().map(|decision| decision.0).collect();
        assert_eq!(
            decided,
            entries.iter().map(|entry| entry.id).collect::<Vec<_>>(),
            "one outcome per entry, in order"
        );
        let state = answered("state", async || broker.state(partition).await).await;
        assert_eq!((state.lag, state.trimmed_unread), (0, 0));
        for outcome in Outcome::ALL {
            let n_decided = decisions
                .iter()
                .filter(|decision| decision.1 == outcome)
                .count() as u64;
            assert_eq!(
                state.outcomes.get(&outcome).copied().unwrap_or(0),
                n_decided,
                "{outcome:?}"
            );
        }
        let ids: Vec<NotificationId> = decisions.iter().filter_map(|decision| decision.2).collect();
        assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
        let records = answered("records", async || broker.records(partition, &ids).await).await;
        let history: Vec<_> = ids
            .into_iter()
            .zip(records)
            .map(|(id, record)| (id, Record::parse(&record.expect("a record")).expect("JSON")))
            .collect();
        let mut uids = HashSet::new();
        let mut logs: HashMap<Target, Vec<NotificationId>> = HashMap::new();
        for (id, record) in &history {
            assert!(
                uids.insert(event_id(record)),
                "{id} is a second commit of {}",
                event_id(record)
            );
            for target in record.notification().plan.targets() {
                logs.entry(target).or_default().push(*id);
            }
        }
        for (target, ids) in logs {
            let page = answered("page", async || {
                broker
                    .page(partition, &target, NotificationId(0), 1_000_000)
                    .await
            })
            .await;
            let kept: Vec<NotificationId> = page.entries.iter().map(|entry| entry.0).collect();
            assert!(
                !kept.is_empty() && ids.ends_with(&kept),
                "the log of {target} has {kept:?} of {ids:?}"
            );
            assert!(
                kept.len() == ids.len() || matches!(self.kind, Kind::ShortLogs),
                "the log of {target} has only {kept:?} of {ids:?}"
            );
        }
        history
    }

    /// Whether the event must or must not have reached this user; `None` if that depends on timing.
    fn reaches(
        &self,
        user: &str,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Record,
    ) -> Option<bool> {
        let route = record.route(0);
        let mut is_crew = false;
        let mut is_named = false;
        for one in &route.to {
            match one {
                Target::User(of) => is_named |= of.as_str() == user,
                Target::Group(group) if *group == name("crew") => is_crew = user == "ann",
                Target::Group(group) => is_named |= MEMBERS.contains(&(user, group.as_str())),
                Target::Everyone => is_named = true,
            }
        }
        let reaches = if is_named {
            Some(true)
        } else if is_crew {
            self.was_crew(partition, id)
        } else {
            Some(false)
        };
        // It may have expired before it was sent.
        if route.expires_ms.is_some() && reaches == Some(true) {
            None
        } else {
            reaches
        }
    }

    /// Only the newest membership counts, but events that an earlier one allowed may have been sent
    /// while it lasted.
    fn was_crew(&self, partition: PartitionNumber, id: NotificationId) -> Option<bool> {
        let mut answer = Some(false);
        for (at, stays) in self.stays.iter().enumerate() {
            let Stay {
                span,
                joined_by,
                left_by,
            } = stays[&partition];
            let is_newest = at + 1 == self.stays.len();
            if is_newest && joined_by < id && span.left.is_none_or(|left| id <= left) {
                return Some(true);
            }
            if span.joined < id && left_by.is_none_or(|left| id <= left) {
                answer = None;
            }
        }
        answer
    }

    fn check_delivery(
        &self,
        client: &Client,
        partition: PartitionNumber,
        history: &[(NotificationId, Record)],
    ) {
        let nothing = Vec::new();
        let received = client.received.get(&partition).unwrap_or(&nothing);
        let who = format!("{} in {}", client.user, partition.0);
        let (ever, trimmed, begin) = self.check_order(&who, received, client.begin[&partition]);
        for (at, (id, record)) in history.iter().enumerate() {
            let uid = event_id(record);
            let has = ever.contains(uid.as_str());
            match self.reaches(client.user, partition, *id, record) {
                Some(true) if *id > begin && !has => {
                    let is_covered = trimmed.iter().any(|gap| gap.from < *id && *id <= gap.to);
                    let key = &record.route(0).collapse;
                    // A later event with the same key superseded it; a fail-over may have lost that
                    // one as well.
                    let later = &history[at + 1..];
                    let takes_its_place = |(id, record): &(NotificationId, Record)| {
                        record.route(0).collapse == *key
                            && self.reaches(client.user, partition, *id, record) != Some(false)
                    };
                    let is_superseded = key.is_some()
                        && (matches!(self.kind, Kind::FailOvers)
                            || later.iter().any(takes_its_place));
                    assert!(
                        is_covered || is_superseded,
                        "{who}: {uid} ({id}) is missing after {begin}: {received:?}"
                    );
                }
                Some(false) => assert!(
                    !has,
                    "{who}: received {uid} ({id}) of other recipients: {:?}",
                    self.stays
                ),
                _ => {}
            }
        }
    }

    /// Checks that no event was received twice or out of order. Returns all events received, the
    /// trimmed gaps, and the id after which every event must have been received.
    fn check_order<'a>(
        &self,
        who: &str,
        received: &'a [Received],
        mut begin: NotificationId,
    ) -> (HashSet<&'a str>, Vec<Gap>, NotificationId) {
        let mut had: HashMap<&str, NotificationId> = HashMap::new();
        let mut ever = HashSet::new();
        let mut before: Vec<(NotificationId, Priority, &Option<Name>)> = Vec::new();
        let mut trimmed = Vec::new();
        for one in received {
            match one {
                Received::Gap(gap) if gap.reason == GapReason::Rewound => {
                    assert!(
                        matches!(self.kind, Kind::FailOvers),
                        "{who}: {gap:?} without a fail-over"
                    );
                    had.retain(|_, id| *id <= gap.from);
                    before.clear();
                    begin = begin.min(gap.from);
                }
                Received::Gap(gap) => {
                    // After a rewind to an unknown epoch the whole history is read, and something
                    // was trimmed before it.
                    let is_possible =
                        matches!(self.kind, Kind::ShortLogs) || begin == NotificationId(0);
                    assert!(is_possible, "{who}: {gap:?}, but nothing was trimmed");
                    trimmed.push(*gap);
                }
                Received::Event {
                    uid,
                    id,
                    priority,
                    key,
                } => {
                    assert!(
                        had.insert(uid, *id).is_none(),
                        "{who}: received {uid} ({id}) twice: {received:?}"
                    );
                    ever.insert(uid.as_str());
                    for (earlier, early, early_key) in
                        before.iter().filter(|(earlier, ..)| earlier > id)
                    {
                        // Only an event of higher priority may come first. A keyed event may be
                        // repeated late, but never after its successor.
                        assert!(
                            early > priority || key.is_some(),
                            "{who}: {earlier} came before {id}: {received:?}"
                        );
                        assert!(
                            key.is_none() || key != *early_key,
                            "{who}: the older state {id} came after {earlier}: {received:?}"
                        );
                    }
                    before.push((*id, *priority, key));
                }
            }
        }
        (ever, trimmed, begin)
    }
}
