//! The only thread that writes. It uses **group commit**: it takes the waiting requests from a
//! bounded queue, executes them in one transaction, makes it durable, and only then publishes the
//! notices and answers. Nothing that a crash could undo is ever published, so there is never a
//! rewind and a durable partition has one epoch. Under load, many requests share one fsync.
//!
//! A group succeeds or fails as a whole, so a request must find its reasons to be rejected before
//! it writes anything. After a disk failure the result of the group is unknown: the store is
//! reopened, its state is read back, and every feed is reset.
//!
//! `work` runs a group in a transaction. The requests are implemented in `commit`, `source`,
//! `recipients` and `device_cursors`; periodic cleanup is in `sweep`.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use tokio::sync::{mpsc, oneshot};

use super::SharedState;
use super::layout::Meta;
use super::store::Failure;
use super::sweep::Sweep;
use super::work::{Work, transact};
use crate::broker::{Error, Finding, Notice, Result, Severity};
use crate::event::PartitionNumber;
use crate::shutdown::Alarm;

/// Capacity of the queue. When it is full, callers wait.
const QUEUE: usize = 1024;
/// Maximum number of requests in a group. Limits how many requests a crash forces to be repeated,
/// and how long the first one waits.
const GROUP: usize = 256;
/// A group is closed once its requests exceed this size, so that a transaction takes milliseconds.
const GROUP_BYTES: usize = 8 * 1024 * 1024;

const DEAD: &str =
    "the thread that writes the store has stopped; see the log for the cause and restart the node";

/// A request of a group, with the channel for its answer.
trait Job: Send {
    /// # Errors
    /// Only if the store failed, and the whole group with it.
    fn apply(&mut self, work: &mut Work<'_>) -> Result<(), redb::Error>;
    /// Sends the answer. `error`: why the group failed.
    fn answer(self: Box<Self>, error: Option<Error>);
}

struct Task<F, T> {
    run: Option<F>,
    result: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<F, T> Job for Task<F, T>
where
    F: FnOnce(&mut Work<'_>) -> Result<T, Failure> + Send,
    T: Send,
{
    fn apply(&mut self, work: &mut Work<'_>) -> Result<(), redb::Error> {
        let Some(run) = self.run.take() else {
            return Ok(());
        };
        self.result = Some(match run(work) {
            Ok(value) => Ok(value),
            Err(Failure::Answer(error)) => Err(error),
            Err(Failure::Store(error)) => return Err(error),
        });
        Ok(())
    }

    fn answer(self: Box<Self>, error: Option<Error>) {
        let result = match (error, self.result) {
            (None, Some(result)) => result,
            (Some(error), _) => Err(error),
            (None, None) => Err(Error::Unavailable(
                "the request was not executed".to_owned(),
            )),
        };
        // The caller may have been cancelled; the request takes effect anyway, as
        // [`crate::broker::Broker`] documents.
        drop(self.reply.send(result));
    }
}

enum Request {
    Write {
        job: Box<dyn Job>,
        bytes: usize,
    },
    /// Writes nothing, but needs its place in the order of notices.
    Tick {
        slot: usize,
        reply: oneshot::Sender<Result<()>>,
    },
}

/// The queue and its thread. Dropping it closes it.
#[derive(Debug)]
pub(super) struct Writer {
    /// `None` once it is closed. Std locks, held for a clone and for joining the thread.
    queue: Mutex<Option<mpsc::Sender<Request>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// `alarm` is raised when the thread can no longer write.
    pub(super) fn start(shared: Arc<SharedState>, alarm: Alarm) -> std::io::Result<Self> {
        let (queue, requests) = mpsc::channel(QUEUE);
        let thread = thread::Builder::new()
            .name("embedded-writer".to_owned())
            .spawn(move || {
                let _alarm = alarm;
                run(&shared, requests);
            })?;
        Ok(Self {
            queue: Mutex::new(Some(queue)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Runs `run` within a group and returns once the group is durable and its notices are
    /// published. `bytes`: the approximate size of the request.
    pub(super) async fn write<T, F>(&self, bytes: usize, run: F) -> Result<T>
    where
        F: FnOnce(&mut Work<'_>) -> Result<T, Failure> + Send + 'static,
        T: Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(Task {
            run: Some(run),
            result: None,
            reply,
        });
        self.send(Request::Write { job, bytes }, answer).await
    }

    pub(super) async fn tick(&self, slot: usize) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Tick { slot, reply }, answer).await
    }

    async fn send<T>(&self, request: Request, answer: oneshot::Receiver<Result<T>>) -> Result<T> {
        let queue = self
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let queue = queue.ok_or_else(|| Error::Unavailable("the store is closed".to_owned()))?;
        let dead = || Error::Unavailable(DEAD.to_owned());
        queue.send(request).await.map_err(|_| dead())?;
        answer.await.map_err(|_| dead())?
    }

    /// The number of requests in the queue.
    #[cfg(test)]
    pub(super) fn n_waiting(&self) -> usize {
        let queue = self.queue.lock().unwrap();
        queue
            .as_ref()
            .map_or(0, |queue| queue.max_capacity() - queue.capacity())
    }

    /// Lets the thread complete the requests made so far and close the store, and waits for it.
    pub(super) fn close(&self) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            // If the thread panicked, the panic hook has already logged it.
            drop(thread.join());
        }
    }

    pub(super) fn findings(&self) -> Option<Finding> {
        let is_dead = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_some_and(JoinHandle::is_finished);
        is_dead.then(|| Finding {
            name: "writer",
            severity: Severity::Refusal,
            text: DEAD.to_owned(),
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

fn run(shared: &SharedState, mut requests: mpsc::Receiver<Request>) {
    let mut sweep = Sweep::default();
    while let Some(first) = requests.blocking_recv() {
        let mut group = vec![first];
        let mut bytes = 0;
        while group.len() < GROUP
            && bytes < GROUP_BYTES
            && let Ok(next) = requests.try_recv()
        {
            if let Request::Write { bytes: more, .. } = &next {
                bytes += more;
            }
            group.push(next);
        }
        serve(shared, group);
        sweep.run_if_due(shared);
    }
    shared.store.close();
}

fn serve(shared: &SharedState, mut group: Vec<Request>) {
    let error = match recover(shared)
        .and_then(|()| write(shared, &mut group).map_err(|failure| shared.failed(failure)))
    {
        Ok(notices) => {
            // Publish before answering: an answer implies that the notices of its request are out.
            shared.feeds.publish(&notices);
            None
        }
        Err(error) => {
            let alive = |request: &Request| match request {
                Request::Tick { slot, .. } => Some(Notice::Alive {
                    partition: shared.partitions[*slot].number,
                }),
                Request::Write { .. } => None,
            };
            shared
                .feeds
                .publish(&group.iter().filter_map(alive).collect::<Vec<_>>());
            Some(error)
        }
    };
    for request in group {
        match request {
            Request::Write { job, .. } => job.answer(error.clone()),
            // Answered with success even if the group failed: an `Alive` notice was published
            // instead.
            Request::Tick { reply, .. } => drop(reply.send(Ok(()))),
        }
    }
}

/// Reopens the store if it has failed. The result of the last group is unknown, so the state is
/// read back and every feed is reset.
fn recover(shared: &SharedState) -> Result<()> {
    if !shared.store.is_failed() {
        return Ok(());
    }
    shared.store.reopen(shared.clock.now_ms())?;
    let read = || -> Result<Vec<Meta>, Failure> {
        let transaction = shared.store.begin_read()?;
        shared
            .partitions
            .iter()
            .map(|partition| Meta::read(partition.number.0, &transaction))
            .collect()
    };
    let metas = read().map_err(|failure| shared.failed(failure))?;
    *shared.metas.write().unwrap_or_else(PoisonError::into_inner) = metas;
    shared.feeds.reset_all();
    for arrivals in &shared.arrivals {
        arrivals.notify_waiters();
    }
    Ok(())
}

/// Executes the group in one transaction and returns its notices once it is durable.
fn write(shared: &SharedState, group: &mut [Request]) -> Result<Vec<Notice>, Failure> {
    let before = shared
        .metas
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    if group
        .iter()
        .all(|request| matches!(request, Request::Tick { .. }))
    {
        let ticks = group.iter().filter_map(|request| match request {
            Request::Tick { slot, .. } => {
                Some(tick(shared.partitions[*slot].number, &before[*slot]))
            }
            Request::Write { .. } => None,
        });
        return Ok(ticks.collect());
    }
    let (metas, notices) = transact(shared, before, |work| {
        for request in group.iter_mut() {
            match request {
                Request::Write { job, .. } => job.apply(work).map_err(Failure::Store)?,
                Request::Tick { slot, .. } => work
                    .notices
                    .push(tick(work.partitions[*slot].number, &work.metas[*slot])),
            }
        }
        Ok(())
    })?;
    let mut current = shared.metas.write().unwrap_or_else(PoisonError::into_inner);
    for ((meta, current), arrivals) in metas
        .into_iter()
        .zip(current.iter_mut())
        .zip(&shared.arrivals)
    {
        let has_arrivals = meta.appended != current.appended;
        *current = meta;
        if has_arrivals {
            arrivals.notify_waiters();
        }
    }
    Ok(notices)
}

fn tick(partition: PartitionNumber, meta: &Meta) -> Notice {
    Notice::Tick {
        partition,
        epoch: meta.epoch(),
        last: meta.last,
    }
}
