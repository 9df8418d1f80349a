//! The logs that the streams of this node follow, and the requests to the feed that follow from it:
//! one per log, however many streams share it.
//!
//! A log is followed as long as it has a follower. A request counts as confirmed only by its own
//! token: a confirmation of an earlier one, from a former feed or before a reset, is ignored.
//! Without an open feed the follows are remembered and requested from the next one. The hub holds
//! its lock around every call; `hub` decides what a notice means for the followers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::broker::Follow;
use crate::delivery::subscription::OpenStream;
use crate::event::{PartitionNumber, Target};

type LogKey = (PartitionNumber, Target);

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct FollowedLogs {
    logs: HashMap<LogKey, FollowedLog>,
    by_stream: HashMap<(u64, PartitionNumber), Vec<Target>>,
    requests: FollowRequests,
}

#[derive(Debug)]
struct FollowedLog {
    followers: HashMap<u64, Arc<OpenStream>>,
    /// Token of the latest request; confirmations of earlier ones are ignored.
    token: u64,
    is_confirmed: bool,
    waiting: Vec<oneshot::Sender<()>>,
}

/// The requests sent to the feed.
#[derive(Debug, Default)]
struct FollowRequests {
    /// `None` while no feed is open.
    feed: Option<mpsc::UnboundedSender<Follow>>,
    last_token: u64,
    /// Requests not yet confirmed, by token.
    pending_follows: HashMap<u64, LogKey>,
}

impl FollowedLogs {
    /// Makes these logs the ones that a stream follows in a partition. Returns a confirmation to
    /// await for each log whose request is not confirmed yet. A confirmation fails if its log has
    /// no followers left.
    pub(super) fn set(
        &mut self,
        stream: &Arc<OpenStream>,
        partition: PartitionNumber,
        targets: Vec<Target>,
    ) -> Vec<oneshot::Receiver<()>> {
        let before = self
            .by_stream
            .insert((stream.id, partition), targets.clone())
            .unwrap_or_default();
        let kept: HashSet<&Target> = targets.iter().collect();
        for target in before.into_iter().filter(|target| !kept.contains(target)) {
            self.remove(stream.id, partition, target);
        }
        let mut confirmations = Vec::new();
        for target in targets {
            let log = self.log(partition, target);
            log.followers.insert(stream.id, Arc::clone(stream));
            if !log.is_confirmed {
                let (sender, confirmation) = oneshot::channel();
                log.waiting.push(sender);
                confirmations.push(confirmation);
            }
        }
        confirmations
    }

    /// Removes a closed stream from every log of a partition.
    pub(super) fn remove_stream(&mut self, stream: u64, partition: PartitionNumber) {
        for target in self
            .by_stream
            .remove(&(stream, partition))
            .unwrap_or_default()
        {
            self.remove(stream, partition, target);
        }
    }

    /// Requests every log of these partitions from a feed that has just been opened.
    pub(super) fn open_feed(
        &mut self,
        feed: mpsc::UnboundedSender<Follow>,
        partitions: &[PartitionNumber],
    ) {
        self.requests.feed = Some(feed);
        self.request_again(partitions);
    }

    pub(super) fn close_feed(&mut self) {
        self.requests.feed = None;
    }

    /// Sends new requests for every log of these partitions.
    pub(super) fn request_again(&mut self, partitions: &[PartitionNumber]) {
        if self.requests.feed.is_none() {
            return;
        }
        self.requests
            .pending_follows
            .retain(|_, (partition, _)| !partitions.contains(partition));
        for ((partition, target), log) in self
            .logs
            .iter_mut()
            .filter(|((partition, _), _)| partitions.contains(partition))
        {
            log.is_confirmed = false;
            log.token = self.requests.start(*partition, target);
        }
    }

    /// Handles the confirmation of a request.
    pub(super) fn confirm(&mut self, token: u64) {
        let Some(key) = self.requests.pending_follows.remove(&token) else {
            return;
        };
        // The log may have been dropped and followed again since: only its latest request counts.
        if let Some(log) = self.logs.get_mut(&key).filter(|log| log.token == token) {
            log.is_confirmed = true;
            for waiting in log.waiting.drain(..) {
                // The waiting replay may have been cancelled.
                waiting.send(()).ok();
            }
        }
    }

    /// The streams that follow a log; none if it is not followed.
    pub(super) fn followers(
        &self,
        partition: PartitionNumber,
        target: &Target,
    ) -> impl Iterator<Item = &Arc<OpenStream>> {
        self.logs
            .get(&(partition, target.clone()))
            .into_iter()
            .flat_map(|log| log.followers.values())
    }

    pub(super) fn is_followed(&self, partition: PartitionNumber, target: &Target) -> bool {
        self.logs.contains_key(&(partition, target.clone()))
    }

    /// The number of followed logs.
    pub(super) fn len(&self) -> usize {
        self.logs.len()
    }

    fn log(&mut self, partition: PartitionNumber, target: Target) -> &mut FollowedLog {
        let Self { logs, requests, .. } = self;
        logs.entry((partition, target))
            .or_insert_with_key(|(_, target)| FollowedLog {
                followers: HashMap::new(),
                token: requests.start(partition, target),
                is_confirmed: false,
                waiting: Vec::new(),
            })
    }

    fn remove(&mut self, stream: u64, partition: PartitionNumber, target: Target) {
        let key = (partition, target);
        let Some(log) = self.logs.get_mut(&key) else {
            return;
        };
        log.followers.remove(&stream);
        if log.followers.is_empty() {
            // Dropping the log drops the senders in `waiting`, which ends the replays that wait.
            self.logs.remove(&key);
            self.requests.stop(partition, key.1);
        }
    }
}

impl FollowRequests {
    /// Requests a log under a new token. Without a feed only the token is issued: the next feed is
    /// sent a request for every log.
    fn start(&mut self, partition: PartitionNumber, target: &Target) -> u64 {
        self.last_token += 1;
        let token = self.last_token;
        if let Some(feed) = &self.feed {
            // Recorded before it is sent, so that a confirmation always finds it.
            self.pending_follows
                .insert(token, (partition, target.clone()));
            // A feed that has ended answers nothing; all requests are repeated on the next feed.
            feed.send(Follow::Start {
                partition,
                target: target.clone(),
                token,
            })
            .ok();
        }
        token
    }

    fn stop(&self, partition: PartitionNumber, target: Target) {
        if let Some(feed) = &self.feed {
            feed.send(Follow::Stop { partition, target }).ok();
        }
    }
}
