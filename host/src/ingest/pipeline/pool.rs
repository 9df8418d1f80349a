//! The threads that evaluate events: dedicated OS threads, because plugins must not run on an async
//! executor.
//!
//! Any free thread takes the next job, so no job waits behind a plugin that loops. Every thread,
//! busy or idle, releases its instances of generations that were swapped out.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::evaluate::{Evaluator, Share};
use crate::event::Event;
use crate::plugin::Engine;
use crate::plugin::registry::Registry;
use crate::plugin::registry::generation::Chain;
use crate::telemetry::metrics::Metrics;

/// The maximum number of jobs that wait for a thread; further callers wait their turn.
const MAX_WAITING: usize = 256;

/// The threads and their queue. The threads end when this value is dropped.
#[derive(Debug)]
pub(super) struct Pool {
    queue: Arc<Queue>,
    /// Bounds the queue.
    waiting: Arc<Semaphore>,
    n_threads: usize,
}

/// A share of a batch.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) chain: Arc<Chain>,
    pub(super) events: Vec<Event>,
    pub(super) clock_ms: u64,
    /// `None` for live events. A dry run holds its turn until it is done, so that the next one
    /// waits.
    pub(super) dry_run: Option<OwnedSemaphorePermit>,
}

/// A job in the queue.
#[derive(Debug)]
struct QueuedJob {
    job: Job,
    answer: oneshot::Sender<Share>,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    /// # Errors
    /// The system cannot start a thread.
    pub(super) fn start(registry: &Arc<Registry>, metrics: &Metrics) -> std::io::Result<Self> {
        // Created before the threads, so that those already started end if another one fails.
        let pool = Self {
            queue: Arc::new(Queue::default()),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            n_threads: Engine::n_workers(),
        };
        for n in 0..pool.n_threads {
            let mut evaluator = Evaluator::new(Arc::clone(registry), metrics.clone());
            let queue = Arc::clone(&pool.queue);
            thread::Builder::new()
                .name(format!("plugins-{n}"))
                .spawn(move || work(&queue, &mut evaluator))?;
        }
        Ok(pool)
    }

    pub(super) fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Queues a job, after waiting for room.
    pub(super) async fn submit(&self, job: Job) -> oneshot::Receiver<Share> {
        let (answer, answered) = oneshot::channel();
        let permit = Arc::clone(&self.waiting)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        self.queue.push(QueuedJob {
            job,
            answer,
            _permit: permit,
        });
        answered
    }

    /// See [`Pipeline::release_retired_instances`](super::Pipeline::release_retired_instances).
    pub(super) fn release_retired_instances(&self) {
        self.release(false);
    }

    /// Makes every thread release all of its instances before its next job, because there is no
    /// memory for another one.
    pub(super) fn release_all_instances(&self) {
        self.release(true);
    }

    fn release(&self, is_all: bool) {
        {
            let mut jobs = self.queue.jobs.lock().expect("no panic under this lock");
            jobs.n_releases += 1;
            if is_all {
                jobs.n_releases_of_all = jobs.n_releases;
            }
        }
        self.queue.is_ready.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue
            .jobs
            .lock()
            .expect("no panic under this lock")
            .is_closed = true;
        self.queue.is_ready.notify_all();
    }
}

/// Runs one thread until the queue is closed and empty.
fn work(queue: &Queue, evaluator: &mut Evaluator) {
    let mut n_releases_seen = 0;
    while let Some(task) = queue.pop(&mut n_releases_seen) {
        match task {
            Task::Evaluate(QueuedJob {
                job,
                answer,
                _permit,
            }) => {
                let Job {
                    chain,
                    events,
                    clock_ms,
                    dry_run,
                } = job;
                let share = evaluator.evaluate_batch(&chain, events, clock_ms, dry_run.is_none());
                // The receiver is gone if the caller was cancelled.
                drop(answer.send(share));
            }
            Task::ReleaseInstances { is_all: true } => evaluator.release_instances(),
            Task::ReleaseInstances { is_all: false } => {}
        }
        // The chain may have been swapped during the job, and the next job may be far off.
        evaluator.release_retired_instances();
    }
}

/// The queue that all threads share.
#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    is_ready: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<QueuedJob>,
    is_closed: bool,
    /// The requests to release instances: a counter and not a flag, because every thread must see
    /// each request.
    n_releases: u64,
    /// The last of these requests that concerns all instances.
    n_releases_of_all: u64,
}

/// The next task of a thread.
enum Task {
    Evaluate(QueuedJob),
    ReleaseInstances {
        /// Whether also those of active plugins.
        is_all: bool,
    },
}

impl Queue {
    fn push(&self, job: QueuedJob) {
        self.jobs
            .lock()
            .expect("no panic under this lock")
            .waiting
            .push_back(job);
        self.is_ready.notify_one();
    }

    /// `n_seen`: the requests to release instances that this thread has seen. `None`: the queue is
    /// closed and empty.
    fn pop(&self, n_seen: &mut u64) -> Option<Task> {
        let mut jobs = self.jobs.lock().expect("no panic under this lock");
        loop {
            // Before the next job, which may be the one that lacks memory.
            let is_all = *n_seen < jobs.n_releases_of_all;
            if !is_all && let Some(job) = jobs.waiting.pop_front() {
                return Some(Task::Evaluate(job));
            }
            if *n_seen != jobs.n_releases {
                *n_seen = jobs.n_releases;
                return Some(Task::ReleaseInstances { is_all });
            }
            if jobs.is_closed {
                return None;
            }
            jobs = self.is_ready.wait(jobs).expect("no panic under this lock");
        }
    }
}
