//! Tickets, in memory: they are valid for seconds, and only in this process.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::broker::{Error, Result};

/// The maximum number of valid tickets.
const MAX: usize = 100_000;

#[derive(Debug, Default)]
pub(super) struct Tickets(HashMap<String, (Bytes, Instant)>);

impl Tickets {
    /// # Errors
    /// [`Error::Full`] if [`MAX`] tickets are valid.
    pub(super) fn store(&mut self, id: &str, ticket: Bytes, ttl: Duration) -> Result<()> {
        let now = Instant::now();
        // Not each time: it looks at all of them.
        if self.0.len() >= MAX {
            self.0.retain(|_, (_, until)| *until > now);
        }
        if self.0.len() >= MAX {
            return Err(Error::Full("too many tickets are valid".to_owned()));
        }
        self.0.insert(id.to_owned(), (ticket, now + ttl));
        Ok(())
    }

    pub(super) fn take(&mut self, id: &str) -> Option<Bytes> {
        let (ticket, until) = self.0.remove(id)?;
        (until > Instant::now()).then_some(ticket)
    }
}
