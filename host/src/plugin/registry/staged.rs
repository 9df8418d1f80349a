//! A roll-out as this node follows it: the wanted version, and what has become of this node's copy
//! of it. Pure bookkeeping, as in `slot`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::generation::Generation;
use crate::event::PartitionNumber;

/// A version: the hashes of its file and of its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionHashes {
    /// SHA-256 of the file, in hexadecimal.
    pub file: String,
    /// The first 12 hex digits of the SHA-256 of the configuration, as in decision records.
    pub config: String,
}

/// The version that should decide in some partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutWish {
    /// The own version of the nodes that take part.
    pub from: VersionHashes,
    pub to: VersionHashes,
    pub partitions: BTreeSet<PartitionNumber>,
    /// When it was written, in milliseconds since the Unix epoch: identifies it in reports.
    pub at_ms: u64,
}

/// A node's part in a roll-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutStatus {
    /// It has not reported that it follows the last change.
    Pending,
    /// It is loading the version; its own decides. After a start, events of the chosen partitions
    /// wait instead.
    Loading,
    /// It has the version, which decides in the chosen partitions.
    Ready,
    /// The version is the node's own and decides in all partitions.
    Own,
    /// It does not have the version; its own decides.
    Missing,
    /// Its own version is neither the old nor the new one and decides.
    OtherVersion,
    /// The version cannot be loaded, or failed on too many events; its own decides.
    Failed,
}

/// A node's part in a roll-out, as reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutState {
    pub state: RolloutStatus,
    /// Which write of the roll-out the node has followed, as the time of that write.
    pub at_ms: u64,
    /// The node's own version.
    pub hash: String,
    pub config_hash: String,
    /// Why its own version decides; empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// A roll-out that this node follows.
#[derive(Clone, Debug)]
pub(super) struct ActiveRollout {
    pub(super) wish: RolloutWish,
    pub(super) version: StagedVersion,
    /// Whether events of its partitions wait while the version is being loaded.
    pub(super) is_awaited: bool,
}

/// The modification time and size of each staged file.
pub(super) type Stamps = [Option<(SystemTime, u64)>; 2];

/// This node's copy of the version of a roll-out.
#[derive(Clone, Debug)]
pub(super) enum StagedVersion {
    Loading {
        /// Why it was not loaded yet, for want of something in the host; empty otherwise.
        reason: String,
        /// When it is tried again.
        due: Instant,
    },
    Loaded(Arc<Generation>),
    /// Tried again when a staged file changes, as in the next case.
    Missing(Stamps),
    Refused {
        reason: String,
        stamps: Stamps,
    },
    /// It failed on too many events.
    Withdrawn {
        reason: String,
    },
}

impl ActiveRollout {
    pub(super) fn new(wish: &RolloutWish, is_awaited: bool) -> Self {
        Self {
            wish: wish.clone(),
            version: StagedVersion::Loading {
                reason: String::new(),
                due: Instant::now(),
            },
            is_awaited,
        }
    }

    /// Whether the wish is for the same version, possibly in other partitions.
    pub(super) fn is_for(&self, wish: &RolloutWish) -> bool {
        (&self.wish.from, &self.wish.to) == (&wish.from, &wish.to)
    }

    /// The version, if this node has loaded it.
    pub(super) fn generation(&self) -> Option<&Arc<Generation>> {
        match &self.version {
            StagedVersion::Loaded(generation) => Some(generation),
            _ => None,
        }
    }

    /// This node's part. `own`: its own version, if the plugin is active.
    pub(super) fn state(&self, name: &str, own: Option<&VersionHashes>) -> RolloutState {
        let (state, reason) = match (own, &self.version) {
            (None, _) => (
                RolloutStatus::Missing,
                "the plugin is not active".to_owned(),
            ),
            (Some(own), _) if *own == self.wish.to => (RolloutStatus::Own, String::new()),
            (Some(own), _) if *own != self.wish.from => (
                RolloutStatus::OtherVersion,
                "its own version has changed since the roll-out began".to_owned(),
            ),
            (_, StagedVersion::Loading { reason, .. }) => (RolloutStatus::Loading, reason.clone()),
            (_, StagedVersion::Loaded(_)) => (RolloutStatus::Ready, String::new()),
            (_, StagedVersion::Missing(_)) => (
                RolloutStatus::Missing,
                format!(
                    "it does not have this version; copy .{name}.next.wasm and .{name}.next.toml of a node that has it to its plugin folder"
                ),
            ),
            (_, StagedVersion::Refused { reason, .. } | StagedVersion::Withdrawn { reason }) => {
                (RolloutStatus::Failed, reason.clone())
            }
        };
        let own = own.cloned().unwrap_or(VersionHashes {
            file: String::new(),
            config: String::new(),
        });
        RolloutState {
            state,
            at_ms: self.wish.at_ms,
            hash: own.file,
            config_hash: own.config,
            reason,
        }
    }
}
