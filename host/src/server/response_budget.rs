//! The memory of responses under way: a client that does not read its responses holds at most a
//! share of it.
//!
//! A response is in memory in full from its construction until its last byte is taken. Before it is
//! built, its handler reserves the first bytes from the shares of the user and of the connection and
//! from the budget of the node; a response that grows takes more if there is any. Streams are not
//! counted here: `delivery` bounds them.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Connection;
use crate::event::Name;

/// The bytes that most responses reserve before it is known how large they become.
pub const FIRST_BYTES: usize = 256 * 1024;
/// The share of one user or connection: this part of the budget, so that one of them cannot exhaust
/// it.
const SHARES: usize = 8;

/// A cheap handle: clones share one budget.
#[derive(Clone, Debug)]
pub struct ResponseBudget(Arc<BudgetInner>);

#[derive(Debug)]
struct BudgetInner {
    n_share: usize,
    node: Arc<Semaphore>,
    /// The shares of users with a response under way.
    of_users: Mutex<BTreeMap<Name, Weak<Semaphore>>>,
}

/// The holder whose bytes are all taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    User,
    Connection,
    Node,
}

impl ResponseBudget {
    /// `n_bytes`: the bytes of all responses under way together.
    pub fn new(n_bytes: usize) -> Self {
        Self(Arc::new(BudgetInner {
            n_share: (n_bytes / SHARES).max(FIRST_BYTES),
            node: Arc::new(Semaphore::new(n_bytes.min(Semaphore::MAX_PERMITS))),
            of_users: Mutex::default(),
        }))
    }

    /// Returns a permit without bytes for one response. `connection` is `None` if the connection has
    /// no share, because it is that of a proxy, and in tests without sockets.
    pub fn permit(&self, connection: Option<&Connection>) -> ResponsePermit {
        let of_connection = connection
            .map(|connection| connection.response_share(|| Semaphore::new(self.0.n_share)));
        ResponsePermit(Arc::new(Mutex::new(PermitState {
            budget: self.clone(),
            of_connection,
            user: None,
            held: Vec::new(),
        })))
    }

    fn share_of(&self, user: &Name) -> Arc<Semaphore> {
        let mut of_users = self.of_users();
        let known = of_users.get(user).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let share = Arc::new(Semaphore::new(self.0.n_share));
            of_users.insert(user.clone(), Arc::downgrade(&share));
            share
        })
    }

    fn of_users(&self) -> MutexGuard<'_, BTreeMap<Name, Weak<Semaphore>>> {
        self.0
            .of_users
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes that one response may hold. Clones share them; they are free again when the last clone
/// is dropped.
#[derive(Clone, Debug)]
pub struct ResponsePermit(Arc<Mutex<PermitState>>);

#[derive(Debug)]
struct PermitState {
    budget: ResponseBudget,
    of_connection: Option<Arc<Semaphore>>,
    user: Option<Name>,
    /// The same number of bytes of each holder; empty before the reservation.
    held: Vec<OwnedSemaphorePermit>,
}

impl Drop for PermitState {
    fn drop(&mut self) {
        // Before the look-up: each permit keeps its share alive.
        self.held.clear();
        if let Some(user) = &self.user {
            let mut of_users = self.budget.of_users();
            if of_users
                .get(user)
                .is_some_and(|share| share.strong_count() == 0)
            {
                of_users.remove(user);
            }
        }
    }
}

impl ResponsePermit {
    /// Reserves `n_bytes`, or the share of one holder if that is less, for a response to this user
    /// if it is one to a user. May be cancelled.
    ///
    /// # Errors
    /// The holder that had no room within `wait`.
    pub async fn reserve(
        &self,
        user: Option<&Name>,
        n_bytes: usize,
        wait: Duration,
    ) -> Result<(), Exhausted> {
        let (n_bytes, holders) = {
            let mut state = self.lock();
            state.user = user.cloned();
            let of_user = user.map(|user| (Exhausted::User, state.budget.share_of(user)));
            let of_connection = state
                .of_connection
                .clone()
                .map(|share| (Exhausted::Connection, share));
            let of_node = (Exhausted::Node, Arc::clone(&state.budget.0.node));
            // The narrowest first: a request that waits for a share must not hold bytes of the node
            // meanwhile.
            let holders = of_user.into_iter().chain(of_connection).chain([of_node]);
            (n_bytes.min(state.budget.0.n_share), holders)
        };
        let deadline = tokio::time::Instant::now() + wait;
        let mut held = Vec::new();
        for (holder, semaphore) in holders {
            let first = semaphore.acquire_many_owned(permits(n_bytes));
            match tokio::time::timeout_at(deadline, first).await {
                Ok(Ok(permit)) => held.push(permit),
                Ok(Err(_)) | Err(_) => return Err(holder),
            }
        }
        self.lock().held = held;
        Ok(())
    }

    /// Raises the bytes of the response to at least `n_bytes`. Returns `false`, and changes nothing,
    /// if a holder has not enough left; never waits.
    pub fn grow(&self, n_bytes: usize) -> bool {
        let mut state = self.lock();
        if state.held.is_empty() {
            let of_node = Arc::clone(&state.budget.0.node);
            let holders = state.of_connection.clone().into_iter().chain([of_node]);
            let first: Option<Vec<_>> = holders
                .map(|semaphore| semaphore.try_acquire_many_owned(0).ok())
                .collect();
            state.held = first.unwrap_or_default();
        }
        let more: Option<Vec<_>> = state
            .held
            .iter()
            .map(|permit| {
                let more = n_bytes.saturating_sub(permit.num_permits());
                Arc::clone(permit.semaphore())
                    .try_acquire_many_owned(permits(more))
                    .ok()
            })
            .collect();
        let Some(more) = more else { return false };
        for (permit, more) in state.held.iter_mut().zip(more) {
            permit.merge(more);
        }
        true
    }

    /// Sets the bytes of the response to `n_bytes`, its size. Returns `false` if it has become
    /// larger and a holder has not enough left.
    pub fn settle(&self, n_bytes: usize) -> bool {
        if !self.grow(n_bytes) {
            return false;
        }
        for permit in &mut self.lock().held {
            // Dropped at once, which frees them.
            drop(permit.split(permit.num_permits() - n_bytes.min(permit.num_permits())));
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, PermitState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Above four gigabytes no response is built, so that the number need not be exact.
fn permits(n_bytes: usize) -> u32 {
    u32::try_from(n_bytes).unwrap_or(u32::MAX)
}

/// Keeps `permit` until the body is dropped.
pub fn hold<P: Send + Unpin + 'static>(body: Body, permit: P) -> Body {
    Body::new(HeldBody {
        body,
        _permit: permit,
    })
}

#[derive(Debug)]
struct HeldBody<P> {
    body: Body,
    _permit: P,
}

impl<P: Unpin> http_body::Body for HeldBody<P> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Duration = Duration::ZERO;

    #[tokio::test]
    async fn one_user_holds_a_share_and_gets_it_back_when_its_responses_are_dropped() {
        let budget = ResponseBudget::new(4 * SHARES * FIRST_BYTES);
        let (ann, bob) = (Name::parse("ann").unwrap(), Name::parse("bob").unwrap());
        let mut held = Vec::new();
        for _ in 0..4 {
            let permit = budget.permit(None);
            permit.reserve(Some(&ann), FIRST_BYTES, NONE).await.unwrap();
            held.push(permit);
        }
        let further = budget.permit(None);
        let refused = further.reserve(Some(&ann), FIRST_BYTES, NONE).await;
        assert_eq!(refused, Err(Exhausted::User));
        assert!(!held[0].grow(2 * FIRST_BYTES));
        let other = budget.permit(None);
        other.reserve(Some(&bob), FIRST_BYTES, NONE).await.unwrap();
        assert!(other.grow(4 * FIRST_BYTES));
        assert!(!other.grow(5 * FIRST_BYTES));
        // A small response frees what it does not need.
        assert!(held[0].settle(10));
        further
            .reserve(Some(&ann), FIRST_BYTES, NONE)
            .await
            .unwrap_err();
        drop(held.pop());
        further
            .reserve(Some(&ann), FIRST_BYTES, NONE)
            .await
            .unwrap();
        drop((held, further, other));
        assert!(budget.of_users().is_empty());
        let n_all = 4 * SHARES * FIRST_BYTES;
        assert_eq!(budget.0.node.available_permits(), n_all);
    }

    #[tokio::test]
    async fn users_together_hold_no_more_than_the_budget() {
        let budget = ResponseBudget::new(2 * FIRST_BYTES);
        let names: Vec<Name> = ["a", "b", "c"]
            .iter()
            .map(|name| Name::parse(name).unwrap())
            .collect();
        let permits: Vec<_> = names.iter().map(|_| budget.permit(None)).collect();
        permits[0]
            .reserve(Some(&names[0]), FIRST_BYTES, NONE)
            .await
            .unwrap();
        permits[1]
            .reserve(Some(&names[1]), FIRST_BYTES, NONE)
            .await
            .unwrap();
        let refused = permits[2].reserve(Some(&names[2]), FIRST_BYTES, NONE).await;
        assert_eq!(refused, Err(Exhausted::Node));
        // Without a reservation, as for a response that is already complete.
        assert!(!permits[2].settle(1));
    }
}
