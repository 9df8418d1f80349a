//! Explains to operators why an event did or did not reach a user: the decision, the targets of the
//! plan, why each route does or does not match the user, and how far the user has read.
//!
//! An explanation agrees with delivery, because it uses the same code: `recipients` selects the
//! winning route, and `device_cursors` determines where a device would resume. It reads only and
//! changes nothing. The work is bounded: decisions are searched as far back as they are kept;
//! waiting entries, dead letters and later notifications up to a fixed number each. Facts that
//! cannot be known are listed as such.
//!
//! `search` finds the decision, `reasons` explains why a route does not match a user, `conclusion`
//! summarises all of it. A dry run (`preview::dry_run`) answers a different question: whom an event
//! would reach if it were published now.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::broker::{self, Broker, CursorOwner};
use crate::delivery::device_cursors::{CursorComparison, DeviceCursors};
use crate::delivery::hub::Hub;
use crate::delivery::recipients::{MatchFailure, Moment, RouteMatch, reaches, winning_route};
use crate::event::{
    Decision, EntryId, Name, Notification, NotificationId, Outcome, PartitionNumber, Plan,
    Recipient, StateKey, Target,
};

mod conclusion;
mod reasons;
mod search;

pub use search::ExplainError;

use reasons::{Assumption, MismatchReason};

/// Maximum number of other decisions reported for the same event id.
const MAX_OTHERS: usize = 10;
/// Maximum number of later notifications searched for one that supersedes this one.
const MAX_LATER: usize = 1_000;
/// Number of records or dead letters read at once; each may be large.
const READ: usize = 16;
/// Maximum number of dead letters searched.
const MAX_DEAD_LETTERS: usize = 1_000;
/// Assumed maximum difference, in milliseconds, between the clock of a decision and that of the
/// broker when it numbers the dead letter. Nodes once recorded their own clock.
const CLOCKS_DIFFER_MS: u64 = 60_000;
/// How far a node's view of the broker's clock may be behind it: an entry that has just been added may
/// seem to come after its decision.
const CLOCK_LAG_MS: u64 = 100;

const AS_THEY_ARE_NOW: &str = "Attributes are evaluated as they are now. If a membership ended and began again, only the latest period is known.";
const CLAIMS: &str = "Groups and attributes claimed by a token are known only to an open stream with that token; they are not considered here.";
const FRAMES: &str = "Streams on other nodes and the filters of a stream (types, min_priority) are not visible here. A frame that was written may not have arrived.";
const ACKNOWLEDGED: &str = "A device that acknowledged a later notification may have started after this one, filtered it out, or passed it before it was addressed to the user.";
const LATER: &str =
    "Only the next 1,000 notifications were searched for one with the same collapse key.";

/// A decision in the form that operators see.
#[derive(Debug, Serialize)]
pub struct DecidedEvent {
    pub partition: PartitionNumber,
    pub entry: EntryId,
    pub outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notification: Option<NotificationId>,
    #[serde(flatten)]
    pub decision: Decision,
}

/// The explanation of one event, optionally for one user.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// A summary in one to three sentences.
    pub conclusion: String,
    pub decision: DecidedEvent,
    /// Decisions about other events with the same id, retries and redriven entries; newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_decisions: Vec<DecidedEvent>,
    /// Id of the dead letter for `pointsman dead-letters`, if it still exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<String>,
    /// Whether every dead letter that could belong to this decision was checked.
    #[serde(skip)]
    is_search_complete: bool,
    /// The plan in the record; absent if nothing was committed or the record is no longer kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// How the plan applies to the requested user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<RecipientExplanation>,
    /// If the routes of the event have several slots, its notifications after the first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_notifications: Vec<NotificationExplanation>,
}

/// A notification of an event that has several.
#[derive(Debug, Serialize)]
pub struct NotificationExplanation {
    /// The slot of its routes; empty for those without one.
    pub slot: String,
    pub notification: NotificationId,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<RecipientExplanation>,
}

/// How a plan applies to one user.
#[derive(Debug, Serialize)]
pub struct RecipientExplanation {
    pub user: Name,
    /// One entry per route of the plan, in plan order.
    pub routes: Vec<RouteToUser>,
    /// Index of the route that won at the time of the commit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub won: Option<usize>,
    /// Index of the route that wins for a stream that reaches the event now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wins: Option<usize>,
    /// Whether the event is still in one of the user's logs; absent if no target names the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_log: Option<bool>,
    /// The next notification that replaces this one for clients that have not received it yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub superseded_by: Option<Successor>,
    pub devices: Vec<DeviceProgress>,
    /// Whether the read marker is past the event.
    pub read: bool,
    /// The user's streams on this node.
    pub streams: StreamCounts,
    pub not_known: Vec<&'static str>,
    #[serde(skip)]
    matches: RouteMatches,
}

/// The winning routes, or why there are none.
#[derive(Debug, Default)]
struct RouteMatches {
    at_commit: Option<RouteMatch>,
    now: Option<RouteMatch>,
    /// The route that came closest to matching, of those that do not match.
    nearest: Option<(usize, MismatchReason)>,
    /// Assumptions under which none of the routes matched.
    assumptions: BTreeSet<Assumption>,
}

impl RouteMatches {
    /// The route that a stream would use now; if there is none any more, the one at the commit.
    fn latest(&self) -> Option<RouteMatch> {
        self.now.or(self.at_commit)
    }

    fn note_mismatch(&mut self, index: usize, reason: MismatchReason) {
        self.assumptions.extend(reason.assumptions.iter());
        if self
            .nearest
            .as_ref()
            .is_none_or(|(_, other)| reason.nearness > other.nearness)
        {
            self.nearest = Some((index, reason));
        }
    }
}

/// How a route of the plan applies to one user now.
#[derive(Debug, Serialize)]
pub struct RouteToUser {
    /// The first target that names the user, if the route matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Why the route does not match.
    #[serde(rename = "miss", skip_serializing_if = "Option::is_none")]
    pub failure: Option<MatchFailure>,
    /// The reason as a predicate; its subject is the route.
    pub reason: String,
}

/// A later notification with the same collapse key.
#[derive(Debug, Serialize)]
pub struct Successor {
    pub event_id: Name,
    pub notification: NotificationId,
    /// The later notification has expired: clients that never received it get this one after all.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub expired: bool,
}

/// Position of a device cursor relative to the event.
#[derive(Debug, Serialize)]
pub struct DeviceProgress {
    pub device: Name,
    pub at: DevicePosition,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DevicePosition {
    /// The device acknowledged the event or a later one.
    Acknowledged,
    /// The device has not reached the event yet.
    Before,
    /// The device's first stream started after the event, and it has acknowledged nothing.
    BeganAfter,
}

#[derive(Debug, Serialize)]
pub struct StreamCounts {
    pub open: usize,
    /// Streams that are past the event: it was written, not addressed to them, or before their
    /// start.
    pub past: usize,
}

/// The data sources of an explanation.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    pub broker: &'a dyn Broker,
    pub device_cursors: &'a DeviceCursors,
    pub hub: &'a Hub,
}

impl Sources<'_> {
    /// Explains the event with this event id or entry id. If there are several decisions, the
    /// newest that is not a duplicate is explained, unless the same event was committed at some
    /// time: then it was delivered, regardless of its retries. (The broker does not count a retry
    /// that became a dead letter as a duplicate.)
    ///
    /// # Errors
    /// [`ExplainError`]: no decision was found, or the broker failed.
    pub async fn explain(
        &self,
        event_id: &Name,
        user: Option<&Name>,
    ) -> Result<Explanation, ExplainError> {
        let mut found = search::decisions(self.broker, event_id).await?;
        let newest = found
            .iter()
            .position(|event| event.outcome != Outcome::Duplicate)
            .unwrap_or(0);
        let is_same = |event: &DecidedEvent| {
            event.partition == found[newest].partition
                && event.decision.event_source == found[newest].decision.event_source
        };
        let committed = found
            .iter()
            .position(|event| event.outcome == Outcome::Committed && is_same(event));
        let mut decision = found.remove(committed.unwrap_or(newest));
        self.add_skipped(&mut decision).await?;
        found.truncate(MAX_OTHERS);
        let (dead_letter, is_search_complete) = self.dead_letter(&decision).await?;
        let mut explanation = Explanation {
            conclusion: String::new(),
            dead_letter,
            is_search_complete,
            decision,
            other_decisions: found,
            plan: None,
            recipient: None,
            other_notifications: Vec::new(),
        };
        if let Some(first) = explanation.decision.notification {
            let decision = &explanation.decision;
            (explanation.plan, explanation.recipient) =
                self.notification(decision, first, user).await?;
            let slots = decision.decision.slots.iter();
            for (notification, slot) in decision.decision.notifications(first).zip(slots).skip(1) {
                let (plan, recipient) = self.notification(decision, notification, user).await?;
                explanation
                    .other_notifications
                    .push(NotificationExplanation {
                        slot: slot.clone(),
                        notification,
                        plan,
                        recipient,
                    });
            }
        }
        explanation.conclusion = conclusion::of(&explanation);
        Ok(explanation)
    }

    /// Adds the plugins to a decision that were in its chain and whose types did not match.
    async fn add_skipped(&self, event: &mut DecidedEvent) -> broker::Result<()> {
        let (outcome, decision) = (event.outcome, &mut event.decision);
        if decision.members.is_none() && !decision.chain.is_empty() {
            decision.members = self
                .broker
                .find_chain(event.partition, &decision.chain)
                .await?;
        }
        if let Some(members) = decision.members.clone() {
            decision.add_skipped(outcome, &members);
        }
        Ok(())
    }

    /// The plan of one notification of an event, if its record still exists, and how it applies to
    /// the user.
    async fn notification(
        &self,
        decision: &DecidedEvent,
        id: NotificationId,
        user: Option<&Name>,
    ) -> broker::Result<(Option<Plan>, Option<RecipientExplanation>)> {
        let Some(record) = self.record(decision, id).await? else {
            return Ok((None, None));
        };
        let recipient = match user {
            Some(user) => Some(self.recipient(decision, id, &record.plan, user).await?),
            None => None,
        };
        Ok((Some(record.plan), recipient))
    }

    /// The record of a decision, if it still exists. The entry is compared as well, because ids may
    /// be reissued after a fail-over.
    async fn record(
        &self,
        event: &DecidedEvent,
        id: NotificationId,
    ) -> broker::Result<Option<Notification>> {
        let stored = self
            .broker
            .records(event.partition, &[id])
            .await?
            .pop()
            .flatten();
        let record = stored.and_then(|stored| serde_json::from_slice::<Notification>(&stored).ok());
        Ok(record.filter(|record| record.entry == event.entry))
    }

    /// The id of the decision's dead letter if it was found, and whether every candidate was
    /// checked.
    async fn dead_letter(&self, event: &DecidedEvent) -> broker::Result<(Option<String>, bool)> {
        let is_retrying = match event.outcome {
            Outcome::DeadLettered => false,
            Outcome::Retrying => true,
            _ => return Ok((None, true)),
        };
        // The dead letter was created after the entry arrived and after the decision, so the search
        // starts at the later of the two times. An entry time after the decision is ignored: a
        // publisher that chooses entry ids may use any time.
        let (entry_ms, clock_ms) = (event.entry.ms, event.decision.clock_ms);
        let decided_ms = clock_ms.saturating_sub(CLOCKS_DIFFER_MS);
        let from_ms = match clock_ms {
            // No plugin was called, so the time of the decision is unknown.
            0 if !event.entry.is_time(crate::clock::now_ms()) => 0,
            0 => entry_ms.saturating_sub(CLOCKS_DIFFER_MS),
            _ if entry_ms <= clock_ms.saturating_add(CLOCK_LAG_MS) => {
                entry_ms.min(clock_ms).max(decided_ms)
            }
            _ => decided_ms,
        };
        let mut after = EntryId {
            ms: from_ms,
            seq: 0,
        }
        .before()
        .unwrap_or_default();
        for _ in 0..MAX_DEAD_LETTERS / READ {
            let letters = if is_retrying {
                self.broker.retrying(event.partition, after, READ).await?
            } else {
                self.broker
                    .dead_letter_headers(event.partition, after, READ)
                    .await?
            };
            let Some(last) = letters.last() else {
                return Ok((None, true));
            };
            after = last.id;
            if let Some(letter) = letters.iter().find(|letter| letter.entry == event.entry) {
                return Ok((Some(format!("{}/{}", event.partition.0, letter.id)), true));
            }
        }
        Ok((None, false))
    }

    /// How a plan applies to one user.
    async fn recipient(
        &self,
        event: &DecidedEvent,
        id: NotificationId,
        plan: &Plan,
        user: &Name,
    ) -> broker::Result<RecipientExplanation> {
        let partition = event.partition;
        let recipient = self.broker.recipient(user).await?;
        let now = Moment {
            partition,
            id,
            now_ms: self.broker.head(partition).await?.now_ms,
        };
        // After the clock was set back, ids run ahead of it; the earlier of the two times counts.
        let at_commit = Moment {
            now_ms: id.ms().min(event.decision.clock_ms),
            ..now
        };
        let (matches, routes) = apply_routes(plan, user, &recipient, at_commit, now);
        let mut not_known = vec![AS_THEY_ARE_NOW, CLAIMS, FRAMES];
        let mut superseded_by = None;
        if let Some(key) = matches
            .latest()
            .and_then(|route_match| plan.routes[route_match.route].state())
        {
            let (successor, is_all) = self.successor(user, &recipient, now, key).await?;
            superseded_by = successor;
            not_known.extend((superseded_by.is_none() && !is_all).then_some(LATER));
        }
        let (devices, read) = self.devices(user, partition, id).await?;
        not_known.extend(
            devices
                .iter()
                .any(|device| device.at == DevicePosition::Acknowledged)
                .then_some(ACKNOWLEDGED),
        );
        let (open, past) = self.hub.streams_past(user, partition, id);
        Ok(RecipientExplanation {
            user: user.clone(),
            routes,
            won: matches.at_commit.map(|route_match| route_match.route),
            wins: matches.now.map(|route_match| route_match.route),
            in_log: self.is_in_log(user, &recipient, plan, now).await?,
            superseded_by,
            devices,
            read,
            streams: StreamCounts { open, past },
            not_known,
            matches,
        })
    }

    /// The positions of the user's devices, and whether the read marker is past the event.
    async fn devices(
        &self,
        user: &Name,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> broker::Result<(Vec<DeviceProgress>, bool)> {
        let (mut devices, mut read) = (Vec::new(), false);
        for CursorComparison {
            owner,
            is_acknowledged,
            is_past,
        } in self.device_cursors.compare(user, partition, id).await?
        {
            let at = match (is_past, is_acknowledged) {
                (false, _) => DevicePosition::Before,
                (true, true) => DevicePosition::Acknowledged,
                (true, false) => DevicePosition::BeganAfter,
            };
            match owner {
                CursorOwner::Device(device) => devices.push(DeviceProgress { device, at }),
                CursorOwner::ReadMarker => read = is_past,
            }
        }
        Ok((devices, read))
    }

    /// Whether one of the user's logs still has the event; `None` if it was never in one.
    async fn is_in_log(
        &self,
        user: &Name,
        recipient: &Recipient,
        plan: &Plan,
        at: Moment,
    ) -> broker::Result<Option<bool>> {
        let before = NotificationId(at.id.0.saturating_sub(1));
        let mut is_named = false;
        for target in plan
            .targets()
            .iter()
            .filter(|target| recipient.is_named_by(target, user, at.partition, at.id))
        {
            is_named = true;
            let page = self.broker.page(at.partition, target, before, 1).await?;
            if page.entries.first().is_some_and(|&(id, _)| id == at.id) && at.id >= page.floor {
                return Ok(Some(true));
            }
        }
        Ok(is_named.then_some(false))
    }

    /// The next notification to the user with this collapse key, and whether all later
    /// notifications were searched. One that has not expired is preferred to an earlier one that
    /// has.
    async fn successor(
        &self,
        user: &Name,
        recipient: &Recipient,
        at: Moment,
        key: StateKey<'_>,
    ) -> broker::Result<(Option<Successor>, bool)> {
        let (mut ids, mut is_all) = (BTreeSet::new(), true);
        for (target, after) in recipient.logs(user, at.partition, at.id) {
            let page = self
                .broker
                .page(at.partition, &target, after, MAX_LATER)
                .await?;
            is_all &= page.is_last;
            ids.extend(page.entries.into_iter().map(|(id, _)| id));
        }
        is_all &= ids.len() <= MAX_LATER;
        let ids: Vec<NotificationId> = ids.into_iter().take(MAX_LATER).collect();
        let mut expired = None;
        for ids in ids.chunks(READ) {
            let records = self.broker.records(at.partition, ids).await?;
            for (&id, record) in ids.iter().zip(records) {
                let Some(record) =
                    record.and_then(|record| serde_json::from_slice::<Notification>(&record).ok())
                else {
                    continue;
                };
                let is_state_at = |now_ms| {
                    let moment = Moment { id, now_ms, ..at };
                    let winner =
                        winning_route(&record.plan, user, recipient, moment, |_, criteria| {
                            criteria.hold(&recipient.attributes)
                        });
                    winner
                        .is_some_and(|winner| record.plan.routes[winner.route].state() == Some(key))
                };
                if is_state_at(at.now_ms) {
                    return Ok((
                        Some(Successor {
                            event_id: record.event.id,
                            notification: id,
                            expired: false,
                        }),
                        is_all,
                    ));
                }
                // Expired now, but it applied when it was committed: a client that received it then
                // does not get the notification that it replaced.
                if expired.is_none() && is_state_at(id.ms().min(at.now_ms)) {
                    expired = Some(Successor {
                        event_id: record.event.id,
                        notification: id,
                        expired: true,
                    });
                }
            }
        }
        Ok((expired, is_all))
    }
}

/// Evaluates every route of the plan for the user, at the commit and now.
fn apply_routes(
    plan: &Plan,
    user: &Name,
    recipient: &Recipient,
    at_commit: Moment,
    now: Moment,
) -> (RouteMatches, Vec<RouteToUser>) {
    let winner_at = |moment| {
        winning_route(plan, user, recipient, moment, |_, criteria| {
            criteria.hold(&recipient.attributes)
        })
    };
    let mut matches = RouteMatches {
        at_commit: winner_at(at_commit),
        now: winner_at(now),
        ..RouteMatches::default()
    };
    let mut routes = Vec::with_capacity(plan.routes.len());
    for (index, route) in plan.routes.iter().enumerate() {
        let result = reaches(route, user, recipient, now, |criteria| {
            criteria.hold(&recipient.attributes)
        });
        routes.push(match result {
            Ok(target) => {
                let target = route.to[target].clone();
                RouteToUser {
                    reason: reasons::match_reason(&target, user),
                    target: Some(target),
                    failure: None,
                }
            }
            Err(failure) => {
                let reason = reasons::mismatch_reason(route, failure, user, recipient, now);
                let text = reason.whole();
                matches.note_mismatch(index, reason);
                RouteToUser {
                    target: None,
                    failure: Some(failure),
                    reason: text,
                }
            }
        });
    }
    (matches, routes)
}
