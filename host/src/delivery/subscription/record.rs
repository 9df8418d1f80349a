//! A record in a node's memory: read once for all streams of the node that follow one of its logs.

use std::sync::OnceLock;

use bytes::Bytes;

use crate::event::criteria::{Answers, Attributes, Criteria};
use crate::event::{Notification, Route};

/// A record rendered for one route, in two parts: the target that reached the recipient goes
/// between them.
#[derive(Debug)]
pub struct Rendered {
    pub before_target: Bytes,
    pub after_target: Bytes,
}

/// A record in a node's memory, shared by all streams: parsed once, rendered once for each route
/// that wins, with conditions evaluated once for streams with equal attributes.
#[derive(Debug)]
pub struct Record {
    notification: Notification,
    frames: Box<[OnceLock<Rendered>]>,
    /// The same for streams that receive the event's data alone; empty until the first of them.
    payloads: OnceLock<Box<[OnceLock<Bytes>]>>,
    /// The results of each route's condition.
    answers: Box<[Answers]>,
    n_bytes: usize,
}

impl Record {
    /// Parses a stored record.
    ///
    /// # Errors
    /// If `stored` is not a valid record: it was written by a newer version or by another program.
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
            payloads: OnceLock::new(),
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

    /// Whether this route's condition holds for these attributes. Evaluated once for equal
    /// attributes.
    pub(super) fn holds(&self, route: usize, criteria: &Criteria, attributes: &Attributes) -> bool {
        self.answers[route].of(attributes, || criteria.hold(attributes))
    }

    /// Returns the rendering of this route. `render` runs only the first time.
    pub fn rendered(&self, route: usize, render: impl FnOnce(&Self) -> Rendered) -> &Rendered {
        self.frames[route].get_or_init(|| render(self))
    }

    /// Returns the event's data as this route sends it. `render` runs only the first time.
    pub fn payload(&self, route: usize, render: impl FnOnce(&Self) -> Bytes) -> &Bytes {
        let payloads = self
            .payloads
            .get_or_init(|| self.frames.iter().map(|_| OnceLock::new()).collect());
        payloads[route].get_or_init(|| render(self))
    }
}
