//! Reads request bodies: in full, within their size, their time and the bytes that all bodies under
//! way may hold.
//!
//! A body is charged as it arrives, so that a head without a body holds nothing. The first bytes of
//! each body have a part of the budget for themselves: large bodies that come slowly do not keep
//! small ones out. Handlers take every other place, such as a publish permit, after the body.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::coding::{Coding, Inflate};
use super::{ApiError, Limits, State};
use crate::duration;
use crate::server::Connection;

/// How many bytes of an oversized body are read and discarded before it is refused.
const MAX_DISCARDED_BYTES: usize = 16 * 1024 * 1024;
/// The first bytes of a body, which have a part of the budget for themselves.
const FIRST_BYTES: usize = 16 * 1024;
/// That part, and the share of one connection.
const SHARES: usize = 8;

/// The bytes that request bodies may hold.
#[derive(Debug)]
pub(super) struct BodyBudget {
    first: Arc<Semaphore>,
    rest: Arc<Semaphore>,
    n_share: usize,
}

impl BodyBudget {
    pub(super) fn new(limits: &Limits) -> Self {
        let n_share = limits.body_bytes / SHARES;
        let n_rest = (limits.body_bytes - n_share).min(Semaphore::MAX_PERMITS);
        Self {
            first: Arc::new(Semaphore::new(n_share)),
            rest: Arc::new(Semaphore::new(n_rest)),
            // Every valid body must fit.
            n_share: n_share.max(limits.batch_bytes),
        }
    }
}

/// A body with the bytes that it holds of the budget.
#[derive(Debug)]
pub(super) struct HeldBody {
    pub(super) bytes: Bytes,
    _charge: Charge,
}

/// Reads the body of a request on the public listener.
pub(super) struct BodyReader {
    state: Arc<State>,
    /// The bytes that the bodies on the connection may hold; `None` if it is that of a proxy, and in
    /// tests without sockets.
    share: Option<Arc<Semaphore>>,
}

impl FromRequestParts<Arc<State>> for BodyReader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<State>) -> Result<Self, ApiError> {
        // On a connection of a proxy, one client would use up the share of the others.
        let connection = parts.extensions.get::<Arc<Connection>>();
        let connection = connection.filter(|at| !state.addresses.is_trusted_proxy(at.peer().ip()));
        let n_share = state.bodies.n_share;
        Ok(Self {
            state: Arc::clone(state),
            share: connection.map(|connection| connection.body_share(|| Semaphore::new(n_share))),
        })
    }
}

impl BodyReader {
    /// Reads a whole body.
    ///
    /// # Errors
    /// Those of [`BodyReader::read_coded`].
    pub(super) async fn read(self, body: Body, max: usize) -> Result<HeldBody, ApiError> {
        self.read_coded(body, Coding::Identity, max).await
    }

    /// Reads a whole body, and inflates it if it is compressed.
    ///
    /// # Errors
    /// 413 above `max` bytes, also of what it inflates to, 400 if it cannot be inflated, 408 if it takes longer than `limits.body_timeout` or pauses for
    /// `limits.body_stall_timeout`, 400 if it ends early, 503 if the bodies under way leave no room
    /// for it within `limits.publish_wait`.
    pub(super) async fn read_coded(
        self,
        body: Body,
        coding: Coding,
        max: usize,
    ) -> Result<HeldBody, ApiError> {
        let limits = &self.state.limits;
        let timeouts = Timeouts {
            total: limits.body_timeout,
            stall: limits.body_stall_timeout,
        };
        let mut charge = Charge::default();
        // The bound of what a compressed body inflates to; otherwise what its head announces.
        let announced = body
            .size_hint()
            .upper()
            .filter(|_| coding == Coding::Identity);
        let n_expected = announced.map_or(max, |n| usize::try_from(n).unwrap_or(max).min(max));
        let mut room = Room {
            budget: &self.state.bodies,
            share: self.share.as_ref(),
            wait: limits.publish_wait,
            n_expected,
            charge: &mut charge,
        };
        let mut bytes = read(body, max, timeouts, Some(&mut room)).await?;
        if let Some(compressed) = coding.inflate(&bytes) {
            let n_charged = bytes.len();
            bytes = inflate(compressed, coding, n_charged, max, &mut room).await?;
        }
        charge.release_rest();
        Ok(HeldBody {
            bytes,
            _charge: charge,
        })
    }
}

/// The budget that a body is charged to.
#[derive(Debug)]
pub(super) struct Room<'a> {
    budget: &'a BodyBudget,
    share: Option<&'a Arc<Semaphore>>,
    wait: Duration,
    /// The most bytes that the body will have.
    n_expected: usize,
    charge: &'a mut Charge,
}

impl Room<'_> {
    async fn add(&mut self, n_bytes: usize) -> Result<(), ApiError> {
        let added = self
            .charge
            .add(n_bytes, self.n_expected, self.budget, self.share);
        let added = tokio::time::timeout(self.wait, added).await;
        added.map_err(|_| {
            let error =
                "this connection or this node has too many bytes of request bodies under way";
            ApiError::overloaded(error).fix("try again later, and send fewer large bodies at once")
        })
    }
}

/// The bytes charged for one body.
///
/// Beyond its first bytes, a body takes the room for all of it at once and in its turn: bodies that
/// held a part of their room while they wait for the rest could all wait for one another.
#[derive(Debug, Default)]
struct Charge {
    n_bytes: usize,
    /// The bytes that `held` has room for.
    n_room: usize,
    /// Of the connection's share, of the first bytes and of the rest.
    held: [Option<OwnedSemaphorePermit>; 3],
}

impl Charge {
    async fn add(
        &mut self,
        n_bytes: usize,
        n_expected: usize,
        budget: &BodyBudget,
        share: Option<&Arc<Semaphore>>,
    ) {
        self.n_bytes += n_bytes;
        if self.n_bytes <= self.n_room {
            return;
        }
        let n_total = if self.n_bytes <= FIRST_BYTES {
            self.n_bytes
        } else {
            self.n_bytes.max(n_expected)
        };
        let n = n_total - self.n_room;
        let n_first = FIRST_BYTES.saturating_sub(self.n_room).min(n);
        // The share first: a body that waits for it must not hold bytes of the node meanwhile.
        let of = [
            (share, n),
            (Some(&budget.first), n_first),
            (Some(&budget.rest), n - n_first),
        ];
        for (held, (semaphore, n)) in self.held.iter_mut().zip(of) {
            let Some(semaphore) = semaphore.filter(|_| n > 0) else {
                continue;
            };
            let permits = u32::try_from(n).unwrap_or(u32::MAX);
            // The semaphores are never closed.
            if let Ok(permit) = Arc::clone(semaphore).acquire_many_owned(permits).await {
                match held {
                    Some(held) => held.merge(permit),
                    None => *held = Some(permit),
                }
            }
        }
        self.n_room = n_total;
    }

    /// Gives back the room that the body did not need.
    fn release_rest(&mut self) {
        let mut n_surplus = self.n_room - self.n_bytes;
        self.n_room = self.n_bytes;
        let [share, first, rest] = &mut self.held;
        drop(share.as_mut().and_then(|held| held.split(n_surplus)));
        for held in [rest, first].into_iter().flatten() {
            let n = held.num_permits().min(n_surplus);
            drop(held.split(n));
            n_surplus -= n;
        }
    }
}

/// The time that a body may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    pub(super) total: Duration,
    /// From one byte to the next.
    pub(super) stall: Duration,
}

/// Reads a whole body, and charges its bytes as they arrive.
///
/// # Errors
/// 413 above `max` bytes, 408 if it takes too long, 400 if it ends early, 503 if it finds no room.
pub(super) async fn read(
    mut body: Body,
    max: usize,
    timeouts: Timeouts,
    mut room: Option<&mut Room<'_>>,
) -> Result<Bytes, ApiError> {
    let too_large = || ApiError::too_large(format!("the body is larger than {max} bytes"));
    let mut is_too_large = body.size_hint().lower() > max as u64;
    let (mut bytes, mut n_discarded) = (BytesMut::new(), 0);
    let mut deadline = Instant::now() + timeouts.total;
    let mut stall_deadline = Instant::now() + timeouts.stall;
    // An oversized body is drained: a client that is still sending when the connection closes sees a
    // broken pipe instead of the response.
    while n_discarded <= MAX_DISCARDED_BYTES {
        let next = tokio::time::timeout_at(deadline.min(stall_deadline), body.frame()).await;
        let data = match next {
            Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
            Ok(None) => break,
            Ok(Some(Err(_))) | Err(_) if is_too_large => break,
            Ok(Some(Err(error))) => {
                return Err(ApiError::bad_request("the body ended early").cause(error));
            }
            Err(_) if Instant::now() < deadline => {
                let pause = duration::format(timeouts.stall);
                let error = format!("no byte of the body arrived for {pause}");
                return Err(ApiError::timeout(error).fix("send the body without a pause"));
            }
            Err(_) => {
                let total = duration::format(timeouts.total);
                let error = format!("the body did not arrive within {total}");
                return Err(ApiError::timeout(error));
            }
        };
        // Not for an empty frame, which any client can send for ever.
        if !data.is_empty() {
            stall_deadline = Instant::now() + timeouts.stall;
        }
        is_too_large |= bytes.len() + data.len() > max;
        if is_too_large {
            bytes = BytesMut::new();
            n_discarded += data.len();
        } else {
            let arrived = Instant::now();
            if let Some(room) = &mut room {
                room.add(data.len()).await?;
            }
            bytes.extend_from_slice(&data);
            // The time spent waiting for room is not the client's.
            deadline += arrived.elapsed();
            stall_deadline = Instant::now() + timeouts.stall;
        }
    }
    if is_too_large {
        return Err(too_large());
    }
    Ok(bytes.freeze())
}

/// Inflates a body piece by piece, and charges each piece before it is held, so that a body that
/// inflates to a thousand times its size takes no more memory and time than any other. The
/// `n_charged` bytes of the compressed body count for what they inflate to: otherwise a body within
/// `max` would not fit into a share that has room for one. For the moment, it holds twice its charge
/// at most.
///
/// # Errors
/// 413 above `max` bytes, 400 if it is damaged, 503 if it finds no room.
async fn inflate(
    mut compressed: Inflate,
    coding: Coding,
    mut n_charged: usize,
    max: usize,
    room: &mut Room<'_>,
) -> Result<Bytes, ApiError> {
    let (mut bytes, mut piece) = (BytesMut::new(), vec![0; FIRST_BYTES]);
    loop {
        let n = compressed.next(&mut piece).map_err(|error| {
            let reason = format!("the body is not valid {}: {error}", coding.as_str());
            ApiError::bad_request(reason)
                .fix("compress the whole body once, or send it uncompressed")
        })?;
        if n == 0 {
            return Ok(bytes.freeze());
        }
        if bytes.len() + n > max {
            let reason = format!("the body inflates to more than {max} bytes");
            return Err(ApiError::too_large(reason).fix("send fewer or smaller events at once"));
        }
        let n_covered = n.min(n_charged);
        n_charged -= n_covered;
        room.add(n - n_covered).await?;
        // Inflating takes processor time, and other requests need the thread.
        tokio::task::yield_now().await;
        bytes.extend_from_slice(&piece[..n]);
    }
}
