//! Roll-outs: the version of a plugin that all nodes of an installation should use, and the share of
//! the partitions in which they should.
//!
//! The broker holds them for all nodes, so that a node behind a firewall takes part, and a node that
//! starts later finds them. It also passes on what each node reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Partition;
use crate::event::PartitionNumber;

/// How long the report of a node counts without a repetition, by the broker's clock.
pub const REPORTED_FOR: Duration = Duration::from_secs(10);
/// The maximum size of the report of a node, in bytes.
pub const MAX_REPORT_BYTES: usize = 256 * 1024;
/// The maximum size of a roll-out as JSON, in bytes. Something larger was not written by Pointsman.
pub const MAX_ROLLOUT_BYTES: usize = 4 * 1024;
/// The maximum number of nodes whose reports are read.
pub const MAX_REPORTS: usize = 1_000;

/// A version of a plugin: its file and its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginVersion {
    /// SHA-256 of the file, in hexadecimal.
    pub hash: String,
    /// The first 12 hex digits of the SHA-256 of the configuration, as in decision records.
    pub config_hash: String,
}

/// The roll-out of one plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// The version that the nodes have as their own. A node with another one takes no part, so that
    /// a later change of its files is not undone.
    pub from: PluginVersion,
    /// The wanted version.
    pub to: PluginVersion,
    /// The share of the partitions that the wanted version decides, in percent, 0 to 100.
    pub percent: u32,
    /// When it was written, by the broker's clock, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// The roll-outs at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedVersions {
    /// Grows with every write of any roll-out, so that a node can state which write it has followed.
    pub revision: u64,
    /// By plugin.
    pub rollouts: BTreeMap<String, Rollout>,
    /// The plugins in whose place the broker holds something else, which is ignored.
    pub foreign: Vec<String>,
}

/// A live node and its report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredReport {
    pub node: String,
    /// JSON. `None`: the node is registered and has not reported within [`REPORTED_FOR`].
    pub report: Option<Bytes>,
}

impl Rollout {
    /// The partitions that the wanted version decides: the same on every node, and those of a
    /// smaller share are among those of a larger one. At least one unless the share is 0.
    pub fn partitions(&self, plugin: &str, all: &[Partition]) -> BTreeSet<PartitionNumber> {
        let n = all.len();
        let share = (n * self.percent.min(100) as usize).div_ceil(100);
        // Begins at another partition for each plugin, so that new versions of several plugins are
        // not all tried on the first.
        let first: usize = plugin.bytes().map(usize::from).sum();
        let at = (0..share).map(|offset| all[(first + offset) % n].number);
        at.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_fixed_part_of_the_partitions_and_grows_with_the_percentage() {
        let all: Vec<Partition> = (0..4)
            .map(|n| Partition {
                number: PartitionNumber(n),
                source: format!("s{n}"),
            })
            .collect();
        let version = PluginVersion {
            hash: String::new(),
            config_hash: String::new(),
        };
        let mut before = BTreeSet::new();
        for (percent, n) in [(0, 0), (1, 1), (25, 1), (26, 2), (50, 2), (75, 3), (100, 4)] {
            let rollout = Rollout {
                from: version.clone(),
                to: version.clone(),
                percent,
                at_ms: 0,
            };
            let partitions = rollout.partitions("rules", &all);
            assert_eq!(partitions.len(), n, "{percent}");
            assert!(partitions.is_superset(&before), "{percent}");
            before = partitions;
        }
    }
}
