//! The stream timer: heartbeats, stream ends, cursors without a notification, stalled sockets. One
//! timer wheel with slots of one second serves all streams; a stream costs one entry and no timer
//! of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock;
use crate::duration::millis;
use crate::event::Name;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, ReasonLabel};

use super::{Config, Socket, StreamControl, StreamEnd, TokenExpiry, UserLimit, spread_retry};

/// How long before its token expires a stream is asked to reconnect with a new one, +-20 %, so that
/// clients whose tokens were issued together do not all renew them at the same moment.
const REAUTH_BEFORE: Duration = Duration::from_secs(60);
/// The time over which the streams of a node that alone has lost the broker are closed: their
/// clients arrive at the other nodes one by one.
const OUTAGE_SPREAD: Duration = Duration::from_secs(10);
/// Slots of the wheel, one second each. A stream is checked at least this often.
const SLOTS: usize = 64;

/// A cheap handle: clones share one timer.
#[derive(Clone)]
pub struct StreamTimer(Arc<TimerInner>);

struct TimerInner {
    config: Config,
    started: Instant,
    metrics: Metrics,
    wheel: Mutex<TimerWheel>,
    permits: Arc<Semaphore>,
    /// The open streams by user; a user without a stream has no entry.
    open_by_user: Mutex<BTreeMap<Name, UserStreams>>,
}

/// The open streams of a user.
#[derive(Debug, Default)]
struct UserStreams {
    /// Of permits, whose streams may still be opening, or have ended and not left yet.
    n: usize,
    /// Oldest first; only where the oldest is closed.
    streams: VecDeque<Weak<StreamControl>>,
}

impl UserStreams {
    /// Removes and returns the oldest stream if as many as `max` are open and not ending.
    fn take_oldest(&mut self, max: usize) -> Option<Arc<StreamControl>> {
        let is_open = |control: &Arc<StreamControl>| control.end().is_none();
        self.streams
            .retain(|stream| stream.upgrade().as_ref().is_some_and(is_open));
        let is_full = self.streams.len() >= max;
        let oldest = is_full.then(|| self.streams.pop_front()).flatten();
        oldest.and_then(|stream| stream.upgrade())
    }
}

/// A stream permit: one of the `max_open` streams a node may serve, and of the `max_open_per_user`
/// streams of its user.
#[derive(Debug)]
pub struct StreamPermit {
    user: Name,
    stream_timer: StreamTimer,
    _of_node: OwnedSemaphorePermit,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut open = self.stream_timer.0.open_by_user();
        if let Some(of_user) = open.get_mut(&self.user) {
            of_user.n -= 1;
            if of_user.n == 0 {
                open.remove(&self.user);
            }
        }
    }
}

impl StreamPermit {
    /// Names the stream that has the permit, so that it can be closed for a newer one.
    pub(super) fn belongs_to(&self, control: &Arc<StreamControl>) {
        if self.stream_timer.0.config.at_user_limit == UserLimit::RefuseNewest {
            return;
        }
        let mut open = self.stream_timer.0.open_by_user();
        if let Some(of_user) = open.get_mut(&self.user) {
            of_user.streams.push_back(Arc::downgrade(control));
        }
    }
}

/// Which maximum of open streams is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooManyStreams {
    OfNode,
    OfUser,
}

struct TimerWheel {
    now: usize,
    slots: Vec<Vec<TimerEntry>>,
    closing: Option<Closing>,
}

/// Every stream ends, for one reason and each at a random moment.
#[derive(Clone, Copy)]
struct Closing {
    end: StreamEnd,
    /// The moment by which all have ended, in milliseconds since the timer started.
    by_ms: u64,
}

/// The present. Everything but the expiry of a token is due by the first clock, which cannot be
/// set: otherwise a node whose clock steps would end or starve all of its streams.
#[derive(Clone, Copy, Debug)]
struct Now {
    /// Milliseconds since the timer started.
    ms: u64,
    /// Milliseconds since the Unix epoch by the node's clock, by which `auth` accepts tokens.
    unix_ms: u64,
}

struct TimerEntry {
    control: Weak<StreamControl>,
    /// When it reaches its maximum age.
    age_ms: Option<u64>,
    /// When and why it ends because all streams do.
    closing: Option<(u64, StreamEnd)>,
    /// When it ends with its token, in milliseconds since the Unix epoch.
    token_ends_ms: Option<u64>,
    /// When the client is asked for a new token, in milliseconds since the Unix epoch; `None`: it
    /// was, or the token does not expire.
    reauth_ms: Option<u64>,
    /// Whether its end was signalled.
    is_ended: bool,
    next_heartbeat_ms: u64,
    next_cursor_ms: u64,
    /// Bytes the socket had taken when it last made progress or had nothing to take, and the time
    /// of that.
    taken: u64,
    moved_ms: u64,
}

impl std::fmt::Debug for StreamTimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamTimer")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

impl StreamTimer {
    /// Starts the timer. It ends with the runtime. Without it no stream would end with its token,
    /// so a panic in it ends the node.
    pub fn start(config: Config, metrics: Metrics, shutdown: &Shutdown) -> Self {
        let slots = (0..SLOTS).map(|_| Vec::new()).collect();
        let wheel = Mutex::new(TimerWheel {
            now: 0,
            slots,
            closing: None,
        });
        let permits = Arc::new(Semaphore::new(config.max_open.min(Semaphore::MAX_PERMITS)));
        let stream_timer = Self(Arc::new(TimerInner {
            config,
            started: Instant::now(),
            metrics,
            wheel,
            permits,
            open_by_user: Mutex::default(),
        }));
        let weak = Arc::downgrade(&stream_timer.0);
        shutdown.spawn_lasting("the stream timer", async move {
            let mut seconds = tokio::time::interval(Duration::from_secs(1));
            seconds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                seconds.tick().await;
                let Some(shared) = weak.upgrade() else { return };
                shared.turn();
            }
        });
        stream_timer
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Returns a permit for one more stream of this user.
    ///
    /// # Errors
    /// The node or the user has the maximum open.
    pub fn permit(&self, user: &Name) -> Result<StreamPermit, TooManyStreams> {
        let of_node = Arc::clone(&self.0.permits)
            .try_acquire_owned()
            .map_err(|_| TooManyStreams::OfNode)?;
        let max = self.0.config.max_open_per_user;
        let mut open = self.0.open_by_user();
        let of_user = open.entry(user.clone()).or_default();
        // Streams that were closed stay until their clients have taken the end. As many again may
        // do so, or a client that reads nothing could hold any number of them.
        let (n_max, oldest) = match self.0.config.at_user_limit {
            UserLimit::RefuseNewest => (max, None),
            UserLimit::CloseOldest => (max.saturating_mul(2), of_user.take_oldest(max)),
        };
        let is_permitted = of_user.n < n_max;
        of_user.n += usize::from(is_permitted);
        drop(open);
        if let Some(oldest) = oldest {
            self.0.end(&oldest, StreamEnd::TooManyStreams);
        }
        if !is_permitted {
            return Err(TooManyStreams::OfUser);
        }
        Ok(StreamPermit {
            user: user.clone(),
            stream_timer: self.clone(),
            _of_node: of_node,
        })
    }

    /// The reconnect delay for one client, in milliseconds; randomised for each.
    pub(super) fn retry_ms(&self) -> u64 {
        spread_retry(self.0.config.retry)
    }

    pub(super) fn watch(&self, control: &Arc<StreamControl>) {
        let config = &self.0.config;
        let now = self.0.now();
        let age_ms =
            (!config.max_age.is_zero()).then(|| now.ms + spread(millis(config.max_age), 0.8, 1.0));
        let entry = TimerEntry {
            control: Arc::downgrade(control),
            age_ms,
            closing: None,
            token_ends_ms: control.token_expiry.map(|expiry| expiry.ends_ms),
            reauth_ms: control
                .token_expiry
                .map(|expiry| reauth_ms(expiry, now.unix_ms)),
            is_ended: false,
            next_heartbeat_ms: now.ms + self.0.heartbeat_ms(),
            next_cursor_ms: now.ms + millis(config.cursor_interval),
            taken: 0,
            moved_ms: now.ms,
        };
        self.0.lock().put(entry, now);
    }

    /// Ends every stream at a random moment within `grace`, including streams opened from now on.
    pub fn drain(&self, grace: Duration) {
        let now = self.0.now();
        self.0.lock().close(now, StreamEnd::Drain, millis(grace));
    }

    /// Ends the streams until [`StreamTimer::end_outage`], spread over [`OUTAGE_SPREAD`], because
    /// this node alone has lost the broker. Repeating it changes nothing.
    pub fn begin_outage(&self) {
        let now = self.0.now();
        let mut wheel = self.0.lock();
        if wheel.closing.is_none() {
            wheel.close(now, StreamEnd::Unavailable, millis(OUTAGE_SPREAD));
        }
    }

    /// Keeps the streams that [`StreamTimer::begin_outage`] has not ended yet.
    pub fn end_outage(&self) {
        let now = self.0.now();
        self.0.lock().end_outage(now);
    }

    /// Whether new streams are refused because this node alone has lost the broker.
    pub fn is_in_outage(&self) -> bool {
        let closing = self.0.lock().closing;
        closing.is_some_and(|closing| closing.end == StreamEnd::Unavailable)
    }
}

impl TimerEntry {
    /// The reason for which the stream ends now, if any.
    fn due_end(&self, now: Now) -> Option<StreamEnd> {
        if self.token_ends_ms.is_some_and(|at| at <= now.unix_ms) {
            return Some(StreamEnd::TokenExpired);
        }
        let age = self.age_ms.map(|at| (at, StreamEnd::Age));
        let first = age
            .into_iter()
            .chain(self.closing)
            .min_by_key(|&(at, _)| at);
        first.filter(|&(at, _)| at <= now.ms).map(|(_, end)| end)
    }

    /// When the entry is due, in milliseconds since the timer started.
    fn due_ms(&self, now: Now) -> u64 {
        let closing = self.closing.map(|(at, _)| at);
        let token = self.token_ends_ms.into_iter().chain(self.reauth_ms);
        let token = token.map(|at| now.ms + at.saturating_sub(now.unix_ms));
        self.age_ms
            .into_iter()
            .chain(closing)
            .chain(token)
            .fold(self.next_heartbeat_ms, u64::min)
    }

    /// Whether the socket has taken nothing for `stall_ms` although data is pending: at least the
    /// last heartbeat that was requested.
    fn is_stalled(
        &mut self,
        socket: &dyn Socket,
        has_waiting: bool,
        now_ms: u64,
        stall_ms: u64,
    ) -> bool {
        let taken = socket.taken();
        if !has_waiting || taken != self.taken {
            (self.taken, self.moved_ms) = (taken, now_ms);
        }
        now_ms.saturating_sub(self.moved_ms) >= stall_ms
    }
}

impl TimerWheel {
    fn close(&mut self, now: Now, end: StreamEnd, within_ms: u64) {
        let by_ms = now.ms + within_ms;
        self.closing = Some(Closing { end, by_ms });
        self.put_all_again(now);
    }

    /// A shutdown continues.
    fn end_outage(&mut self, now: Now) {
        if self
            .closing
            .take_if(|closing| closing.end == StreamEnd::Unavailable)
            .is_some()
        {
            self.put_all_again(now);
        }
    }

    fn put_all_again(&mut self, now: Now) {
        let all: Vec<TimerEntry> = self.slots.iter_mut().flat_map(std::mem::take).collect();
        for entry in all {
            self.put(entry, now);
        }
    }

    /// Inserts an entry into the slot of its next deadline. While all streams are closing, each
    /// entry inserted is given its moment: its stream may have been opening, or its entry may have
    /// been held by the timer, when that began. It keeps the moment until the reason changes.
    fn put(&mut self, mut entry: TimerEntry, now: Now) {
        entry.closing = self.closing.filter(|_| !entry.is_ended).map(|closing| {
            let Closing { end, by_ms } = closing;
            let kept = entry.closing.filter(|&(_, of)| of == end);
            kept.unwrap_or_else(|| {
                let at = now.ms + spread(by_ms.saturating_sub(now.ms), 0.0, 1.0);
                (at, end)
            })
        });
        let seconds = entry.due_ms(now).saturating_sub(now.ms).div_ceil(1000);
        let seconds = (seconds as usize).clamp(1, SLOTS - 1);
        let slot = (self.now + seconds) % SLOTS;
        self.slots[slot].push(entry);
    }
}

impl TimerInner {
    fn lock(&self) -> std::sync::MutexGuard<'_, TimerWheel> {
        self.wheel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_by_user(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, UserStreams>> {
        self.open_by_user
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Now {
        Now {
            ms: millis(self.started.elapsed()),
            unix_ms: clock::now_ms(),
        }
    }

    fn heartbeat_ms(&self) -> u64 {
        spread(millis(self.config.heartbeat_interval), 0.8, 1.2)
    }

    fn turn(&self) {
        let now = self.now();
        let due = {
            let mut wheel = self.lock();
            wheel.now = (wheel.now + 1) % SLOTS;
            let at = wheel.now;
            std::mem::take(&mut wheel.slots[at])
        };
        // Without the wheel's lock, so that a stream can be opened meanwhile. A shutdown that
        // begins now reaches these entries in `put`.
        let kept: Vec<TimerEntry> = due
            .into_iter()
            .filter_map(|entry| self.check(entry, now))
            .collect();
        let mut wheel = self.lock();
        for entry in kept {
            wheel.put(entry, now);
        }
    }

    /// Handles everything due for an entry. Returns `None` when the stream is gone.
    fn check(&self, mut entry: TimerEntry, now: Now) -> Option<TimerEntry> {
        let control = entry.control.upgrade()?;
        if let Some(socket) = &control.socket
            && entry.is_stalled(
                socket.as_ref(),
                control.heartbeat.load(Ordering::Acquire),
                now.ms,
                millis(self.config.stall_timeout),
            )
        {
            self.closed("stalled");
            let user = control.guard.stream().lock().user().clone();
            tracing::warn!(user.id = %user, stream.id = control.guard.stream().id, stall_timeout = ?self.config.stall_timeout, "cutting a stalled stream");
            socket.kill();
            return None;
        }
        if let Some(end) = entry.due_end(now) {
            self.end(&control, end);
            // Kept in the wheel in case the socket does not take the end either.
            (entry.age_ms, entry.closing) = (None, None);
            (entry.token_ends_ms, entry.reauth_ms) = (None, None);
            entry.is_ended = true;
        }
        if entry.reauth_ms.take_if(|at| *at <= now.unix_ms).is_some() {
            control.reauth.store(true, Ordering::Release);
            control.wake();
        }
        if entry.next_heartbeat_ms <= now.ms {
            control.heartbeat.store(true, Ordering::Release);
            entry.next_heartbeat_ms = now.ms + self.heartbeat_ms();
            control.wake();
        }
        if entry.next_cursor_ms <= now.ms {
            control.cursor.store(true, Ordering::Release);
            entry.next_cursor_ms = now.ms + millis(self.config.cursor_interval);
            control.wake();
        }
        Some(entry)
    }

    fn end(&self, control: &StreamControl, end: StreamEnd) {
        // Set before the wake, as are the flags of a stream: the socket's task reads them when it
        // runs.
        *control.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.closed(end.as_str());
        control.wake();
    }

    fn closed(&self, reason: &'static str) {
        self.metrics
            .streams_closed
            .get_or_create(&ReasonLabel { reason })
            .inc();
    }
}

/// When a stream is asked for a new token, in milliseconds since the Unix epoch. With less than
/// twice [`REAUTH_BEFORE`] left, around the middle of what is left.
fn reauth_ms(expiry: TokenExpiry, now_unix_ms: u64) -> u64 {
    let left = expiry.expires_ms.saturating_sub(now_unix_ms);
    let before = millis(REAUTH_BEFORE).min(left / 2);
    expiry.expires_ms - spread(before, 0.8, 1.2).min(left)
}

/// Returns a random number between `low` and `high` times `of`.
fn spread(of: u64, low: f64, high: f64) -> u64 {
    (of as f64 * rand::random_range(low..=high)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;
    const GRACE: u64 = 10_000;
    const UNIX: u64 = 1_750_000_000_000;

    fn at(ms: u64) -> Now {
        Now {
            ms,
            unix_ms: UNIX + ms - NOW,
        }
    }

    fn entry(age_ms: Option<u64>) -> TimerEntry {
        let (next_heartbeat_ms, next_cursor_ms) = (NOW + 15_000, NOW + 10_000);
        TimerEntry {
            control: Weak::new(),
            age_ms,
            closing: None,
            token_ends_ms: None,
            reauth_ms: None,
            is_ended: false,
            next_heartbeat_ms,
            next_cursor_ms,
            taken: 0,
            moved_ms: NOW,
        }
    }

    fn wheel() -> TimerWheel {
        TimerWheel {
            now: 0,
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            closing: None,
        }
    }

    fn entries(wheel: &TimerWheel) -> Vec<&TimerEntry> {
        wheel.slots.iter().flatten().collect()
    }

    fn moments(wheel: &TimerWheel) -> Vec<Option<(u64, StreamEnd)>> {
        let mut moments: Vec<_> = entries(wheel).iter().map(|entry| entry.closing).collect();
        moments.sort_by_key(|closing| closing.map(|(at, _)| at));
        moments
    }

    #[tokio::test]
    async fn streams_that_were_closed_for_newer_ones_and_do_not_leave_are_bounded() {
        let config = Config {
            max_open_per_user: 2,
            at_user_limit: UserLimit::CloseOldest,
            ..Config::default()
        };
        let timer = StreamTimer::start(config, Metrics::default(), &Shutdown::new());
        let user = Name::parse("42").unwrap();
        let held: Vec<_> = (0..4).map(|_| timer.permit(&user).unwrap()).collect();
        assert_eq!(timer.permit(&user).unwrap_err(), TooManyStreams::OfUser);
        drop(held);
        assert!(timer.permit(&user).is_ok());
    }

    #[test]
    fn a_stream_opened_or_checked_during_shutdown_ends_with_the_node() {
        let mut wheel = wheel();
        for age_ms in [None, Some(NOW + 3_600_000), Some(NOW + 1)] {
            wheel.put(entry(age_ms), at(NOW));
        }
        wheel.close(at(NOW), StreamEnd::Drain, GRACE);
        wheel.put(entry(None), at(NOW + GRACE - 1));
        let drained = moments(&wheel);
        assert_eq!(drained.len(), 4);
        assert!(
            drained.iter().all(|closing| closing
                .is_some_and(|(at, why)| at <= NOW + GRACE && why == StreamEnd::Drain)),
            "{drained:?}"
        );
        let aged = |entry: &&TimerEntry| entry.age_ms == Some(NOW + 1);
        let aged = *entries(&wheel).iter().find(|entry| aged(entry)).unwrap();
        assert!(
            aged.due_ms(at(NOW)) <= NOW + 1 && aged.due_end(at(NOW + 1)).is_some(),
            "no stream may end later than its own deadline"
        );
        // Each keeps its end while the timer checks it, and is signalled once.
        wheel.close(at(NOW + 1), StreamEnd::Drain, GRACE);
        assert_eq!(moments(&wheel), drained);
        let mut signalled = TimerWheel {
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            ..wheel
        };
        signalled.put(
            TimerEntry {
                is_ended: true,
                ..entry(None)
            },
            at(NOW),
        );
        assert_eq!(moments(&signalled), [None]);
    }

    #[test]
    fn streams_close_spread_out_in_an_outage_and_the_rest_stay_when_it_ends() {
        let mut wheel = wheel();
        for _ in 0..100 {
            wheel.put(entry(None), at(NOW));
        }
        wheel.close(at(NOW), StreamEnd::Unavailable, 10_000);
        let closing = moments(&wheel);
        let (first, last) = (closing[0].unwrap(), closing[99].unwrap());
        assert!(
            first.0 < NOW + 2_000 && last.0 > NOW + 8_000 && last.0 <= NOW + 10_000,
            "{first:?} {last:?}"
        );
        assert_eq!(first.1, StreamEnd::Unavailable);
        wheel.end_outage(at(NOW + 5_000));
        assert_eq!(moments(&wheel), [None; 100]);
        // A shutdown replaces the outage, and does not end with it.
        wheel.close(at(NOW), StreamEnd::Unavailable, 10_000);
        wheel.close(at(NOW), StreamEnd::Drain, GRACE);
        wheel.end_outage(at(NOW));
        let drained = moments(&wheel);
        assert!(
            drained
                .iter()
                .all(|closing| closing.is_some_and(|(_, why)| why == StreamEnd::Drain)),
            "{drained:?}"
        );
    }

    #[test]
    fn setting_the_clock_ends_only_streams_whose_token_has_expired_by_it() {
        let hour = 3_600_000;
        let aged = entry(Some(NOW + hour));
        let with_token = TimerEntry {
            token_ends_ms: Some(UNIX + hour),
            ..entry(None)
        };
        for (unix_ms, token_end) in [
            (UNIX - 2 * hour, None),
            (UNIX + 2 * hour, Some(StreamEnd::TokenExpired)),
        ] {
            let now = Now { ms: NOW, unix_ms };
            assert_eq!(aged.due_end(now), None);
            assert_eq!(aged.due_ms(now), aged.next_heartbeat_ms);
            assert_eq!(with_token.due_end(now), token_end);
        }
        assert_eq!(aged.due_end(at(NOW + hour)), Some(StreamEnd::Age));
        assert_eq!(with_token.due_ms(at(NOW + hour)), aged.next_heartbeat_ms);
        let soon = TimerEntry {
            token_ends_ms: Some(UNIX + 1_000),
            ..entry(None)
        };
        assert_eq!(soon.due_ms(at(NOW)), NOW + 1_000);
    }

    #[test]
    fn a_new_token_is_asked_for_a_minute_before_the_present_one_expires_or_sooner() {
        let moment = |left_ms: u64| {
            let expiry = TokenExpiry {
                expires_ms: UNIX + left_ms,
                ends_ms: UNIX + left_ms + 30_000,
            };
            reauth_ms(expiry, UNIX) - UNIX
        };
        let hour = 3_600_000;
        let moments: Vec<u64> = (0..100).map(|_| moment(hour)).collect();
        let (first, last) = (moments.iter().min().unwrap(), moments.iter().max().unwrap());
        assert!(
            *first >= hour - 72_000 && *last <= hour - 48_000 && last - first > 10_000,
            "{first} {last}"
        );
        for _ in 0..100 {
            assert!((40_000..=60_000).contains(&moment(100_000)));
        }
        assert_eq!(moment(0), 0);
        let asked = TimerEntry {
            reauth_ms: Some(UNIX + 1_000),
            token_ends_ms: Some(UNIX + hour),
            ..entry(None)
        };
        assert_eq!(asked.due_ms(at(NOW)), NOW + 1_000);
    }
}
