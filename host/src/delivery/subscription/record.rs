//! A record as a node holds it: read once for all streams of the node that follow one of its logs.

use std::sync::OnceLock;

use bytes::Bytes;

use crate::event::criteria::{Answers, Attributes, Criteria};
use crate::event::{Notification, Route};

/// What is written of a record by one route, but for the target that reached the recipient: it goes between the two.
#[derive(Debug)]
pub struct Rendered {
    pub before_target: Bytes,
    pub after_target: Bytes,
}

/// A record as a node holds it: parsed once, rendered once for each route that wins, its conditions decided once for streams with equal
/// attributes; shared by all.
#[derive(Debug)]
pub struct Record {
    notification: Notification,
    frames: Box<[OnceLock<Rendered>]>,
    /// What each route's condition said.
    answers: Box<[Answers]>,
    n_bytes: usize,
}

impl Record {
    /// Reads a stored record.
    ///
    /// # Errors
    /// If it is none: written by a newer version, or by somebody else.
    pub fn parse(stored: &[u8]) -> serde_json::Result<Self> {
        let notification: Notification = serde_json::from_slice(stored)?;
        let frames = notification
            .plan
            .routes
            .iter()
            .map(|_| OnceLock::new())
            .collect();
        let answers = notification
            .plan
            .routes
            .iter()
            .map(|_| Answers::default())
            .collect();
        Ok(Self {
            notification,
            frames,
            answers,
            n_bytes: stored.len(),
        })
    }

    pub fn notification(&self) -> &Notification {
        &self.notification
    }

    /// The size of the stored record.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// # Panics
    /// If the plan has no such route.
    pub fn route(&self, index: usize) -> &Route {
        &self.notification.plan.routes[index]
    }

    /// Whether the condition of this route holds for these attributes, as it was decided for the first stream that has them.
    pub(super) fn holds(&self, route: usize, criteria: &Criteria, attributes: &Attributes) -> bool {
        self.answers[route].of(attributes, || criteria.hold(attributes))
    }

    /// What `render` made of this route the first time.
    pub fn rendered(&self, route: usize, render: impl FnOnce(&Self) -> Rendered) -> &Rendered {
        self.frames[route].get_or_init(|| render(self))
    }
}
