//! Why somebody was told of an event, or not: what was decided, whom the plan names, why each of its routes does or does not reach one user,
//! and how far that user is. For operators, who are asked so at night.
//!
//! It promises to say what the rest of the node would: a route wins here by the function that delivers (`recipients`), and a bookmark stands
//! where a stream would begin (`bookmarks`). It reads and changes nothing. It is bounded: decisions are looked through as far back as they are
//! kept, waiting entries, dead letters and later notifications up to a number each. What nobody can know, it lists as such.
//!
//! `search` finds the decision, `reasons` says why a route misses a user, `conclusion` puts the whole into one sentence. Whom an event would reach
//! if it came now, a dry run says (`http/dry_run.rs`).

use std::collections::BTreeSet;

use serde::Serialize;

use crate::broker::{self, BookmarkOf, Broker, Decision, PartitionNumber, Recipient};
use crate::delivery::device_cursors::{Beside, Bookmarks};
use crate::delivery::hub::Hub;
use crate::delivery::recipients::{Miss, Moment, Way, reaches, winning_route};
use crate::event::criteria::Criteria;
use crate::event::{EntryId, Name, Notification, NotificationId, Outcome, Plan, Target};

mod conclusion;
mod reasons;
mod search;

pub use search::Unexplained;

use reasons::{Proviso, Why};

/// Other decisions of the same event that are told.
const MAX_OTHERS: usize = 10;
/// The most later notifications that are looked through for one that took the place of this one.
const MAX_LATER: usize = 1_000;
/// Records read at once: each may be large.
const READ: usize = 16;
/// Dead letters that are looked through, and how many of them at once: each holds the entry's fields.
const MAX_DEAD_LETTERS: usize = 1_000;
/// How far the clock of a node may be off that of the broker, by which dead letters are numbered.
const CLOCKS_DIFFER_MS: u64 = 60_000;

const AS_THEY_ARE_NOW: &str = "Attributes are judged as they are now, and of a membership that ended and began again only the newest stretch is known.";
const CLAIMS: &str = "Groups and attributes that a token claims are known only while a stream shows it; here they are not.";
const FRAMES: &str = "Streams on other nodes are not seen here, nor what a stream leaves out by types or min_priority; and a frame that was written is not one that arrived.";
const ACKNOWLEDGED: &str = "A device that acknowledged what came later may have begun after this one, have left it out, or have come by before it was for the user.";
const LATER: &str = "Of the notifications after it only the next 1,000 were looked through for one with its collapse key.";

/// A decision, as operators see it.
#[derive(Debug, Serialize)]
pub struct Decided {
    pub partition: PartitionNumber,
    pub entry: EntryId,
    pub outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notification: Option<NotificationId>,
    #[serde(flatten)]
    pub decision: Decision,
}

/// See the head of this file.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// A sentence or two.
    pub conclusion: String,
    pub decision: Decided,
    /// Of other events with the same id, and of what was tried or published more than once; newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_decisions: Vec<Decided>,
    /// By which `pointsman dead` knows it, if it is still there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<String>,
    /// Whether all dead letters that it can be were looked at.
    #[serde(skip)]
    is_sought_to_the_end: bool,
    /// As it is in the record; absent where nothing was committed, or the record is gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// What it is to the user who was asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<Standing>,
}

/// How one user stands to a plan.
#[derive(Debug, Serialize)]
pub struct Standing {
    pub user: Name,
    /// For each route of the plan, in its order.
    pub routes: Vec<RouteToUser>,
    /// The route that won as it was committed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub won: Option<usize>,
    /// The route that wins for a stream that comes by now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wins: Option<usize>,
    /// Whether a stream still finds it in a log; absent where no target names the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_log: Option<bool>,
    /// The next one that takes its place for whoever does not have it yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub superseded_by: Option<Successor>,
    pub devices: Vec<Device>,
    /// Whether the read mark is past it.
    pub read: bool,
    /// On this node.
    pub streams: Streams,
    pub not_known: Vec<&'static str>,
    #[serde(skip)]
    ways: Ways,
}

/// How the plan reached, and reaches.
#[derive(Debug, Default)]
struct Ways {
    then: Option<Way>,
    now: Option<Way>,
    /// The route that lacks least of those that do not reach.
    nearest: Option<(usize, Why)>,
    /// What must have been so for that to be true of all of them.
    provided: BTreeSet<Proviso>,
}

/// A route of the plan, for one user, as things are now.
#[derive(Debug, Serialize)]
pub struct RouteToUser {
    /// The first of its targets that names the user, if it reaches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub miss: Option<Miss>,
    /// In words, of which the route is the subject.
    pub reason: String,
}

/// A later notification with the same collapse key.
#[derive(Debug, Serialize)]
pub struct Successor {
    pub event_id: Name,
    pub notification: NotificationId,
    /// It has expired: whoever did not have it before gets this one after all.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub expired: bool,
}

/// Where the bookmark of a device stands.
#[derive(Debug, Serialize)]
pub struct Device {
    pub device: Name,
    pub at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum At {
    /// The device acknowledged it, or what came after it.
    Acknowledged,
    /// It is still to come for the device.
    Before,
    /// The device's first stream began after it, and it acknowledged nothing.
    BeganAfter,
}

#[derive(Debug, Serialize)]
pub struct Streams {
    pub open: usize,
    /// Those that are past it: it was written, was not for them, or lies before their beginning.
    pub past: usize,
}

/// What an explanation is made from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    pub broker: &'a dyn Broker,
    pub bookmarks: &'a Bookmarks,
    pub hub: &'a Hub,
}

impl Sources<'_> {
    /// Explains the event with this id, or the entry with it: of several decisions the newest that is no retry, unless the same event was
    /// committed before. Then somebody was reached, whatever became of a retry; dead letters are no duplicates to the broker.
    ///
    /// # Errors
    /// [`Unexplained`]: there is no decision of it, or the broker says no.
    pub async fn explain(
        &self,
        event_id: &Name,
        user: Option<&Name>,
    ) -> Result<Explanation, Unexplained> {
        let mut found = search::decisions(self.broker, event_id).await?;
        let newest = found
            .iter()
            .position(|decided| decided.outcome != Outcome::Duplicate)
            .unwrap_or(0);
        let is_same = |decided: &Decided| {
            decided.partition == found[newest].partition
                && decided.decision.event_source == found[newest].decision.event_source
        };
        let committed = found
            .iter()
            .position(|decided| decided.outcome == Outcome::Committed && is_same(decided));
        let decision = found.remove(committed.unwrap_or(newest));
        found.truncate(MAX_OTHERS);
        let (dead_letter, is_sought_to_the_end) = self.dead_letter(&decision).await?;
        let mut explanation = Explanation {
            conclusion: String::new(),
            dead_letter,
            is_sought_to_the_end,
            decision,
            other_decisions: found,
            plan: None,
            recipient: None,
        };
        if let Some(id) = explanation.decision.notification
            && let Some(record) = self.record(&explanation.decision, id).await?
        {
            if let Some(user) = user {
                explanation.recipient = Some(
                    self.standing(&explanation.decision, id, &record.plan, user)
                        .await?,
                );
            }
            explanation.plan = Some(record.plan);
        }
        explanation.conclusion = conclusion::of(&explanation);
        Ok(explanation)
    }

    /// The record of a decision, if it is still there and still its own: after a fail-over ids are issued again.
    async fn record(
        &self,
        decided: &Decided,
        id: NotificationId,
    ) -> broker::Result<Option<Notification>> {
        let stored = self
            .broker
            .records(decided.partition, &[id])
            .await?
            .pop()
            .flatten();
        let record = stored.and_then(|stored| serde_json::from_slice::<Notification>(&stored).ok());
        Ok(record.filter(|record| record.entry == decided.entry))
    }

    /// The dead letter that it is, if it is found, and whether all that it can be were looked at.
    async fn dead_letter(&self, decided: &Decided) -> broker::Result<(Option<String>, bool)> {
        if decided.outcome != Outcome::DeadLettered {
            return Ok((None, true));
        }
        // It was set aside after it was decided about, and after it came; of when it came, a publisher that numbers its entries may say anything.
        let (came_ms, clock_ms) = (decided.entry.ms, decided.decision.clock_ms);
        let decided_ms = clock_ms.saturating_sub(CLOCKS_DIFFER_MS);
        let from_ms = match clock_ms {
            // No plugin was asked.
            0 => came_ms.saturating_sub(CLOCKS_DIFFER_MS),
            _ if came_ms <= clock_ms => came_ms.max(decided_ms),
            _ => decided_ms,
        };
        let mut after = EntryId {
            ms: from_ms,
            seq: 0,
        }
        .before()
        .unwrap_or_default();
        for _ in 0..MAX_DEAD_LETTERS / READ {
            let letters = self
                .broker
                .dead_letters(decided.partition, after, READ)
                .await?;
            let Some(last) = letters.last() else {
                return Ok((None, true));
            };
            after = last.id;
            if let Some(letter) = letters.iter().find(|letter| letter.entry == decided.entry) {
                return Ok((Some(format!("{}/{}", decided.partition.0, letter.id)), true));
            }
        }
        Ok((None, false))
    }

    async fn standing(
        &self,
        decided: &Decided,
        id: NotificationId,
        plan: &Plan,
        user: &Name,
    ) -> broker::Result<Standing> {
        let partition = decided.partition;
        let recipient = self.broker.recipient(user).await?;
        let now = Moment {
            partition,
            id,
            now_ms: self.broker.head(partition).await?.now_ms,
        };
        // An id runs ahead of the clock after that was set back.
        let then = Moment {
            now_ms: id.ms().min(decided.decision.clock_ms),
            ..now
        };
        let holds = |_, criteria: &Criteria| criteria.hold(&recipient.attributes);
        let way_at = |moment| winning_route(plan, user, &recipient, moment, holds);
        let mut ways = Ways {
            then: way_at(then),
            now: way_at(now),
            ..Ways::default()
        };
        let mut routes = Vec::with_capacity(plan.routes.len());
        for (index, route) in plan.routes.iter().enumerate() {
            routes.push(
                match reaches(route, user, &recipient, now, |criteria| {
                    criteria.hold(&recipient.attributes)
                }) {
                    Ok(target) => {
                        let target = route.to[target].clone();
                        RouteToUser {
                            reason: reasons::reaching(&target, user),
                            target: Some(target),
                            miss: None,
                        }
                    }
                    Err(miss) => {
                        let why = reasons::missing(route, miss, user, &recipient, now);
                        let reason = why.whole();
                        ways.provided.extend(why.provided.iter());
                        if ways
                            .nearest
                            .as_ref()
                            .is_none_or(|(_, other)| why.nearness > other.nearness)
                        {
                            ways.nearest = Some((index, why));
                        }
                        RouteToUser {
                            target: None,
                            miss: Some(miss),
                            reason,
                        }
                    }
                },
            );
        }
        let mut not_known = vec![AS_THEY_ARE_NOW, CLAIMS, FRAMES];
        let mut superseded_by = None;
        if let Some(key) = ways
            .now
            .or(ways.then)
            .and_then(|way| plan.routes[way.route].collapse.as_ref())
        {
            let (successor, is_all) = self.successor(user, &recipient, now, key).await?;
            superseded_by = successor;
            not_known.extend((superseded_by.is_none() && !is_all).then_some(LATER));
        }
        let (mut devices, mut read) = (Vec::new(), false);
        for Beside {
            which,
            is_acknowledged,
            is_past,
        } in self.bookmarks.beside(user, partition, id).await?
        {
            let at = match (is_past, is_acknowledged) {
                (false, _) => At::Before,
                (true, true) => At::Acknowledged,
                (true, false) => At::BeganAfter,
            };
            match which {
                BookmarkOf::Device(device) => devices.push(Device { device, at }),
                BookmarkOf::ReadMark => read = is_past,
            }
        }
        not_known.extend(
            devices
                .iter()
                .any(|device| device.at == At::Acknowledged)
                .then_some(ACKNOWLEDGED),
        );
        let (open, past) = self.hub.streams_beside(user, partition, id);
        Ok(Standing {
            user: user.clone(),
            routes,
            won: ways.then.map(|way| way.route),
            wins: ways.now.map(|way| way.route),
            in_log: self.is_in_log(user, &recipient, plan, now).await?,
            superseded_by,
            devices,
            read,
            streams: Streams { open, past },
            not_known,
            ways,
        })
    }

    /// Whether one of the user's logs still has it. `None`: it was never in one.
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

    /// The next notification that reached the user with this collapse key, one that is still there before one that has expired; and whether
    /// all were looked through.
    async fn successor(
        &self,
        user: &Name,
        recipient: &Recipient,
        at: Moment,
        key: &Name,
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
        let mut gone = None;
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
                    let way =
                        winning_route(&record.plan, user, recipient, moment, |_, criteria| {
                            criteria.hold(&recipient.attributes)
                        });
                    way.is_some_and(|way| {
                        record.plan.routes[way.route].collapse.as_ref() == Some(key)
                    })
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
                // As it was committed: whoever had it then does not get what it took the place of.
                if gone.is_none() && is_state_at(id.ms().min(at.now_ms)) {
                    gone = Some(Successor {
                        event_id: record.event.id,
                        notification: id,
                        expired: true,
                    });
                }
            }
        }
        Ok((gone, is_all))
    }
}
