//! The recipients of a plan: which of its routes, if any, wins for one recipient.
//!
//! Evaluated just before sending, with the memberships and attributes of that moment. Notifications
//! that the cursor has passed are not evaluated again. A member of a group receives the
//! notifications committed from joining to leaving; both are ids, so that a commit cannot race with
//! a change. Knows nothing of streams: see `subscription`. The broker stores memberships; `explain`
//! describes why a route does not match a user.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use crate::event::criteria::{Attributes, Criteria};
use crate::event::{
    Name, NotificationId, PartitionNumber, Plan, Priority, Recipient, Route, Span, Target,
};

/// The claims that a token makes about its user, beyond identity. They apply to everything read
/// with this token, as long as the token is valid.
///
/// A claim carries no start time. Its groups therefore apply to the reader at any position: from
/// the cursor on, and to all kept history if that is requested. A reader whose token lacks the
/// claim was never a member by claim.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claims {
    pub groups: BTreeSet<Name>,
    pub attributes: Attributes,
}

/// A user with the claims of its token.
#[derive(Clone, Debug)]
pub struct Reader {
    pub user: Name,
    pub claims: Claims,
}

impl Reader {
    /// Returns the recipient that plans are evaluated for: the broker's data about the user
    /// combined with the claims. It is a member of the groups of both. If both name an attribute,
    /// the claim wins: it was issued for this reader, while stored attributes apply to the user
    /// everywhere.
    pub fn as_recipient(
        &self,
        mut known: Arc<Recipient>,
        partitions: impl Iterator<Item = PartitionNumber> + Clone,
    ) -> Arc<Recipient> {
        if self.claims == Claims::default() {
            return known;
        }
        let combined = Arc::make_mut(&mut known);
        for group in &self.claims.groups {
            combined.groups.insert(
                group.clone(),
                partitions
                    .clone()
                    .map(|partition| (partition, Span::default()))
                    .collect(),
            );
        }
        if !self.claims.attributes.is_empty() {
            let mut attributes = BTreeMap::from(combined.attributes.clone());
            attributes.extend(BTreeMap::from(self.claims.attributes.clone()));
            combined.attributes = attributes.into();
        }
        known
    }
}

impl From<Name> for Reader {
    fn from(user: Name) -> Self {
        Self {
            user,
            claims: Claims::default(),
        }
    }
}

/// The position of a plan in the history, and the time at which it is evaluated.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub partition: PartitionNumber,
    pub id: NotificationId,
    /// The broker's current time, in milliseconds since the Unix epoch.
    pub now_ms: u64,
}

/// How a plan reaches one recipient: the winning route and the first of its targets that names the
/// recipient, both as indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteMatch {
    pub route: usize,
    pub target: usize,
}

impl Recipient {
    /// Whether a notification committed to the group under `id` is for this recipient: the id is
    /// above that of joining and not above that of leaving.
    pub fn is_member(&self, group: &Name, partition: PartitionNumber, id: NotificationId) -> bool {
        let span = self
            .groups
            .get(group)
            .and_then(|spans| spans.get(&partition));
        span.is_some_and(|span| span.joined < id && span.left.is_none_or(|left| id <= left))
    }

    /// Whether a target of a notification committed under `id` names this recipient, who is `user`.
    pub fn is_named_by(
        &self,
        target: &Target,
        user: &Name,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> bool {
        match target {
            Target::User(name) => name == user,
            Target::Group(group) => self.is_member(group, partition, id),
            Target::Everyone => true,
        }
    }

    /// The logs that hold notifications for this recipient above `after`, each with the id after
    /// which to read.
    pub fn logs(
        &self,
        user: &Name,
        partition: PartitionNumber,
        after: NotificationId,
    ) -> Vec<(Target, NotificationId)> {
        let own = [
            (Target::User(user.clone()), after),
            (Target::Everyone, after),
        ];
        let groups = self.groups.iter().filter_map(|(group, spans)| {
            let span = spans.get(&partition)?;
            let ended = span.left.is_some_and(|left| left <= after);
            (!ended).then(|| (Target::Group(group.clone()), after.max(span.joined)))
        });
        own.into_iter().chain(groups).collect()
    }
}

/// Why a route does not reach a recipient. The first that applies is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MatchFailure {
    /// None of its targets names the recipient.
    Target,
    /// Its condition does not hold.
    Condition,
    /// It has expired.
    Expired,
}

/// Returns the index of the first target by which a route reaches this recipient.
///
/// `holds` evaluates the condition of the route.
///
/// # Errors
/// The [`MatchFailure`] that applies.
pub fn reaches(
    route: &Route,
    user: &Name,
    recipient: &Recipient,
    moment: Moment,
    holds: impl FnOnce(&Criteria) -> bool,
) -> Result<usize, MatchFailure> {
    let names = |target: &Target| recipient.is_named_by(target, user, moment.partition, moment.id);
    let target = route
        .to
        .iter()
        .position(names)
        .ok_or(MatchFailure::Target)?;
    if !route.when.as_ref().is_none_or(holds) {
        return Err(MatchFailure::Condition);
    }
    if route
        .expires_ms
        .is_some_and(|expires| expires <= moment.now_ms)
    {
        return Err(MatchFailure::Expired);
    }
    Ok(target)
}

/// Returns the route that wins for this recipient: among those that reach it, the one with the
/// highest priority, then the first.
///
/// `holds` evaluates the condition of the route with this index.
pub fn winning_route(
    plan: &Plan,
    user: &Name,
    recipient: &Recipient,
    moment: Moment,
    holds: impl Fn(usize, &Criteria) -> bool,
) -> Option<RouteMatch> {
    let mut winner: Option<(RouteMatch, Priority)> = None;
    for (index, route) in plan.routes.iter().enumerate() {
        if winner.is_some_and(|(_, priority)| priority >= route.priority) {
            continue;
        }
        if let Ok(target) = reaches(route, user, recipient, moment, |criteria| {
            holds(index, criteria)
        }) {
            winner = Some((
                RouteMatch {
                    route: index,
                    target,
                },
                route.priority,
            ));
        }
    }
    winner.map(|(route_match, _)| route_match)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Value;
    use crate::event::criteria::{Operator, Test};

    const P: PartitionNumber = PartitionNumber(0);

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn route(to: &str, priority: Priority) -> Route {
        let to = to
            .split(' ')
            .map(|target| target.parse().unwrap())
            .collect();
        Route {
            by: name("test"),
            to,
            when: None,
            priority,
            expires_ms: None,
            collapse: None,
            event_name: None,
            body: None,
            slot: None,
        }
    }

    fn wins(plan: &Plan, user: &Name, recipient: &Recipient, moment: Moment) -> Option<RouteMatch> {
        winning_route(plan, user, recipient, moment, |_, criteria| {
            criteria.hold(&recipient.attributes)
        })
    }

    fn at(id: u64) -> Moment {
        Moment {
            partition: P,
            id: NotificationId(id),
            now_ms: 1_000,
        }
    }

    fn member(joined: u64, left: Option<u64>) -> Recipient {
        let span = Span {
            joined: NotificationId(joined),
            left: left.map(NotificationId),
        };
        Recipient {
            groups: BTreeMap::from([(name("ops"), BTreeMap::from([(P, span)]))]),
            ..Recipient::default()
        }
    }

    #[test]
    fn the_highest_priority_wins_then_the_first_route() {
        let plan = Plan {
            routes: vec![
                route("u:a", Priority::Low),
                route("all", Priority::High),
                route("g:ops u:a", Priority::High),
            ],
        };
        let winner = |user: &str| wins(&plan, &name(user), &Recipient::default(), at(5));
        assert_eq!(
            winner("a"),
            Some(RouteMatch {
                route: 1,
                target: 0
            })
        );
        assert_eq!(
            winner("b"),
            Some(RouteMatch {
                route: 1,
                target: 0
            })
        );
    }

    #[test]
    fn the_first_target_of_the_route_that_names_the_recipient_is_reported() {
        let plan = Plan {
            routes: vec![route("u:b g:ops u:a all", Priority::Normal)],
        };
        let target = |user: &str, recipient: &Recipient| {
            wins(&plan, &name(user), recipient, at(15)).map(|winner| winner.target)
        };
        assert_eq!(target("a", &Recipient::default()), Some(2));
        assert_eq!(target("b", &member(10, None)), Some(0));
        assert_eq!(target("a", &member(10, None)), Some(1));
        assert_eq!(
            target("c", &member(20, None)),
            Some(3),
            "the user joins only later"
        );
    }

    #[test]
    fn a_member_sees_from_joining_to_leaving() {
        let plan = Plan {
            routes: vec![route("g:ops", Priority::Normal)],
        };
        let sees = |recipient: &Recipient, id| wins(&plan, &name("a"), recipient, at(id)).is_some();
        let left = member(10, Some(20));
        assert_eq!(
            [10, 11, 20, 21].map(|id| sees(&left, id)),
            [false, true, true, false]
        );
        assert!(sees(&member(10, None), 1_000));
        assert!(!sees(&Recipient::default(), 1_000));
    }

    #[test]
    fn a_claim_grants_membership_at_any_position_and_overrides_stored_attributes() {
        let claims = Claims {
            groups: BTreeSet::from([name("ops"), name("dev")]),
            attributes: Attributes::from([("plan".into(), Value::Text("pro".into()))]),
        };
        let mut known = member(10, Some(20));
        known.groups.insert(
            name("chat"),
            BTreeMap::from([(
                P,
                Span {
                    joined: NotificationId(15),
                    left: None,
                },
            )]),
        );
        known.attributes = Attributes::from([
            ("plan".into(), Value::Text("free".into())),
            ("age".into(), Value::Integer(30)),
        ]);
        let reader = Reader {
            user: name("a"),
            claims,
        };
        let known = Arc::new(known);
        let recipient = reader.as_recipient(Arc::clone(&known), [P].into_iter());
        let is_member = |group: &str, id| recipient.is_member(&name(group), P, NotificationId(id));
        assert!(
            [1, 15, 25]
                .into_iter()
                .all(|id| is_member("ops", id) && is_member("dev", id))
        );
        assert_eq!([15, 16].map(|id| is_member("chat", id)), [false, true]);
        assert_eq!(
            recipient.attributes.get("plan"),
            Some(&Value::Text("pro".into()).into())
        );
        assert_eq!(
            recipient.attributes.get("age"),
            Some(&Value::Integer(30).into())
        );
        assert_eq!(
            Reader::from(name("a")).as_recipient(Arc::clone(&known), [P].into_iter()),
            known
        );
    }

    #[test]
    fn conditions_and_expiry_are_evaluated_at_the_given_moment() {
        let test = Test {
            attribute: "plan".into(),
            operator: Operator::Equals,
            values: vec![Value::Text("pro".into())],
        };
        let when = Some(Criteria::new(vec![vec![test]]).unwrap());
        let plan = Plan {
            routes: vec![Route {
                when,
                expires_ms: Some(1_001),
                ..route("all", Priority::Normal)
            }],
        };
        let pro = Recipient {
            attributes: Attributes::from([("plan".into(), Value::Text("pro".into()))]),
            ..Recipient::default()
        };
        assert_eq!(
            wins(&plan, &name("a"), &pro, at(1)),
            Some(RouteMatch {
                route: 0,
                target: 0
            })
        );
        assert_eq!(wins(&plan, &name("a"), &Recipient::default(), at(1)), None);
        assert_eq!(
            wins(
                &plan,
                &name("a"),
                &pro,
                Moment {
                    now_ms: 1_001,
                    ..at(1)
                }
            ),
            None
        );
    }

    #[test]
    fn a_group_left_before_the_cursor_is_not_read_again() {
        let logs = |after| member(10, Some(20)).logs(&name("a"), P, NotificationId(after));
        assert_eq!(logs(5)[2], ("g:ops".parse().unwrap(), NotificationId(10)));
        assert_eq!(logs(15)[2].1, NotificationId(15));
        assert_eq!(logs(20).len(), 2);
    }
}
