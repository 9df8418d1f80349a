//! The fleet: roll-outs of plugins over all nodes of an installation, and the sum of what their
//! candidates in shadow report.
//!
//! The broker passes everything on: the wanted versions to each node, and a report of each node to
//! the one that an operator asks. A node follows both every [`SYNC_EVERY`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::broker::{
    Broker, Error, MAX_REPORT_BYTES, PluginVersion, Result, Rollout, StoredReport,
};
use crate::event::{Name, PartitionNumber};
use crate::plugin::registry::Registry;
use crate::plugin::registry::rollout::{RolloutState, RolloutStatus, RolloutWish, VersionHashes};
use crate::plugin::shadow::groups::{DifferenceGroup, Groups};
use crate::shutdown::Shutdown;

/// The interval between two looks at the wanted versions.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// How long a command waits for the other nodes: longer than the report of a node counts that has
/// stopped ([`crate::broker::REPORTED_FOR`]), so that only a busy node is left behind.
const MAX_WAIT: Duration = Duration::from_secs(15);
/// The interval between two looks at their reports meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The maximum number of differences in a sum.
const MAX_DIFFERENCES: usize = 100;

/// A node as a member of the fleet.
#[derive(Clone, Debug)]
pub struct Fleet {
    pub broker: Arc<dyn Broker>,
    pub registry: Arc<Registry>,
    /// The name of this node.
    pub node: String,
}

/// The report of a node to the others.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct NodeReport {
    /// Its part in each roll-out, by plugin.
    rollouts: BTreeMap<String, RolloutState>,
    /// Its candidates in shadow, by plugin, as in the admin API.
    shadows: BTreeMap<String, Value>,
}

/// A roll-out with the part of every node.
#[derive(Debug, Serialize)]
pub struct RolloutReport {
    pub plugin: String,
    #[serde(flatten)]
    pub rollout: Rollout,
    /// The partitions that the wanted version decides.
    pub partitions: Vec<PartitionNumber>,
    /// The number of all partitions.
    pub n_partitions: usize,
    pub nodes: Vec<NodeRollout>,
}

/// The nodes that have followed a change.
#[derive(Debug, Serialize)]
pub struct RollbackReport {
    pub nodes: Vec<String>,
    /// Nodes that have not followed it yet.
    pub pending: Vec<String>,
}

/// The part of a node in a roll-out.
#[derive(Debug, Serialize)]
pub struct NodeRollout {
    pub node: String,
    #[serde(flatten)]
    pub state: RolloutState,
}

/// The sum of the candidates of a plugin in shadow on all nodes.
#[derive(Debug, Default, Serialize)]
pub struct FleetShadowReport {
    pub hash: String,
    pub config_hash: String,
    pub version: String,
    #[serde(flatten)]
    pub counts: Counts,
    /// The nodes with this candidate.
    pub nodes: Vec<NodeShadow>,
    /// Nodes with another candidate, which are not in the sum.
    pub other_nodes: Vec<String>,
    pub groups: Groups,
    /// The first differences of each node.
    pub differences: Vec<Value>,
}

/// The counts of a node.
#[derive(Debug, Serialize)]
pub struct NodeShadow {
    pub node: String,
    #[serde(flatten)]
    pub counts: Counts,
}

/// As in the report on one candidate.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    pub compared: u64,
    pub different: u64,
    pub failed: u64,
    pub skipped: u64,
    pub waiting: u64,
}

impl Fleet {
    /// Takes part in the present roll-outs, and waits for the broker and for plugins that are being
    /// loaded.
    pub(crate) async fn begin_following(&self) {
        loop {
            match self.sync_with(true).await {
                Ok(()) => return,
                Err(error @ Error::Unavailable(_)) => {
                    tracing::debug!(%error, "waiting for the roll-outs of plugins");
                    tokio::time::sleep(SYNC_EVERY).await;
                }
                // Without these rights, every node decides by its own versions.
                Err(error) => {
                    tracing::warn!(%error, "the roll-outs of plugins cannot be followed");
                    return;
                }
            }
        }
    }

    /// Runs until the shutdown begins.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        loop {
            if let Err(error) = self.sync().await {
                // The broker monitor reports an outage; the versions stay as they are meanwhile.
                tracing::debug!(%error, "cannot follow the roll-outs of plugins");
            }
            tokio::select! {
                () = tokio::time::sleep(SYNC_EVERY) => {}
                () = shutdown.begun() => return,
            }
        }
    }

    /// Takes part in the present roll-outs, withdraws those that failed here, and reports.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn sync(&self) -> Result<()> {
        self.sync_with(false).await
    }

    /// `is_waiting`: also while other plugins are being loaded.
    async fn sync_with(&self, is_waiting: bool) -> Result<()> {
        let mut rollouts = self.broker.rollouts().await?;
        for (plugin, to, reason) in self.registry.failed_rollouts() {
            // By now the operator may have written another one.
            let is_it = |rollout: &Rollout| hashes(&rollout.to) == to;
            if rollouts.get(&plugin).is_some_and(is_it)
                && let Ok(name) = Name::parse(&plugin)
            {
                self.broker.set_rollout(&name, None).await?;
                rollouts.remove(&plugin);
                tracing::error!(
                    plugin.name = plugin,
                    "plugin rolled back on all nodes: the version of the roll-out {reason}"
                );
            }
        }
        let all = self.broker.partitions();
        let wishes = rollouts.iter().map(|(plugin, rollout)| {
            let wish = RolloutWish {
                from: hashes(&rollout.from),
                to: hashes(&rollout.to),
                partitions: rollout.partitions(plugin, all),
                at_ms: rollout.at_ms,
            };
            (plugin.clone(), wish)
        });
        let wishes: BTreeMap<String, RolloutWish> = wishes.collect();
        let registry = Arc::clone(&self.registry);
        let report = tokio::task::spawn_blocking(move || {
            let rollouts = registry.apply_rollouts(&wishes, is_waiting);
            let shadows = registry.shadow_reports().into_iter();
            let shadows = shadows
                .map(|(plugin, report)| (plugin, serde_json::to_value(report).unwrap_or_default()));
            NodeReport {
                rollouts,
                shadows: shadows.collect(),
            }
        });
        let report = report
            .await
            .map_err(|panic| Error::Permanent(format!("loading a version panicked: {panic}")))?;
        self.broker.report_node(&self.node, report.bounded()).await
    }

    /// Writes a roll-out and applies it on this node.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn begin(
        &self,
        plugin: &Name,
        from: VersionHashes,
        to: VersionHashes,
        percent: u32,
    ) -> Result<()> {
        let rollout = Rollout {
            from: version(from),
            to: version(to),
            percent,
            at_ms: self.broker.now_ms(),
        };
        self.broker.set_rollout(plugin, Some(&rollout)).await?;
        self.await_nodes(plugin, Some(rollout.at_ms))
            .await
            .map(drop)
    }

    /// Changes the share of a roll-out and applies it on this node. Returns `false` if there is
    /// none.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn set_share(&self, plugin: &Name, percent: u32) -> Result<bool> {
        let Some(rollout) = self.broker.rollouts().await?.remove(plugin.as_str()) else {
            return Ok(false);
        };
        let rollout = Rollout {
            percent,
            at_ms: self.broker.now_ms(),
            ..rollout
        };
        self.broker.set_rollout(plugin, Some(&rollout)).await?;
        self.await_nodes(plugin, Some(rollout.at_ms)).await?;
        Ok(true)
    }

    /// Removes a roll-out: every node decides by its own version again. `None`: there is none.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn roll_back(&self, plugin: &Name) -> Result<Option<RollbackReport>> {
        if !self.broker.rollouts().await?.contains_key(plugin.as_str()) {
            return Ok(None);
        }
        self.broker.set_rollout(plugin, None).await?;
        self.await_nodes(plugin, None).await.map(Some)
    }

    /// Applies a change on this node and waits until the others have, at most [`MAX_WAIT`].
    /// `at_ms`: the write that they should have followed; `None`: the roll-out is removed.
    async fn await_nodes(&self, plugin: &Name, at_ms: Option<u64>) -> Result<RollbackReport> {
        let deadline = Instant::now() + MAX_WAIT;
        self.sync().await?;
        loop {
            let (mut nodes, mut pending) = (Vec::new(), Vec::new());
            for (node, report) in self.reports().await? {
                let followed = report
                    .rollouts
                    .get(plugin.as_str())
                    .map(|state| state.at_ms);
                if followed == at_ms {
                    nodes.push(node);
                } else {
                    pending.push(node);
                }
            }
            if pending.is_empty() || Instant::now() > deadline {
                return Ok(RollbackReport { nodes, pending });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// A roll-out with the part of every node that reported. `None`: there is none.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn rollout(&self, plugin: &str) -> Result<Option<RolloutReport>> {
        let Some(rollout) = self.broker.rollouts().await?.remove(plugin) else {
            return Ok(None);
        };
        let reports = self.reports().await?;
        let nodes = reports.into_iter().map(|(node, mut report)| {
            // A node that has not seen the roll-out yet.
            let state = report.rollouts.remove(plugin).unwrap_or(RolloutState {
                state: RolloutStatus::Missing,
                at_ms: 0,
                hash: String::new(),
                config_hash: String::new(),
                reason: "it has not seen the roll-out yet".to_owned(),
            });
            NodeRollout { node, state }
        });
        let all = self.broker.partitions();
        Ok(Some(RolloutReport {
            plugin: plugin.to_owned(),
            partitions: rollout.partitions(plugin, all).into_iter().collect(),
            n_partitions: all.len(),
            rollout,
            nodes: nodes.collect(),
        }))
    }

    /// The sum of a plugin's candidates in shadow on all nodes. `None`: no node has one.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn shadows(&self, plugin: &str) -> Result<Option<FleetShadowReport>> {
        // So that what this node has counted is complete.
        self.sync().await?;
        let mut sum: Option<FleetShadowReport> = None;
        let mut reports = self.reports().await?;
        // The candidate of this node is the one that is asked for, if it has one.
        reports.sort_by_key(|(node, _)| *node != self.node);
        for (node, mut report) in reports {
            let Some(shadow) = report.shadows.remove(plugin) else {
                continue;
            };
            let text = |key: &str| shadow[key].as_str().unwrap_or_default().to_owned();
            let sum = sum.get_or_insert_with(|| FleetShadowReport {
                hash: text("hash"),
                config_hash: text("config_hash"),
                version: text("version"),
                ..FleetShadowReport::default()
            });
            if (&sum.hash, &sum.config_hash) == (&text("hash"), &text("config_hash")) {
                sum.add(node, &shadow);
            } else {
                sum.other_nodes.push(node);
            }
        }
        Ok(sum)
    }

    async fn reports(&self) -> Result<Vec<(String, NodeReport)>> {
        let reports = self.broker.node_reports().await?.into_iter();
        // A report of another version is read as far as it can be.
        let parsed = reports.map(|StoredReport { node, report, .. }| {
            (node, serde_json::from_slice(&report).unwrap_or_default())
        });
        Ok(parsed.collect())
    }
}

impl NodeReport {
    /// As JSON within [`MAX_REPORT_BYTES`]. Differences go first, because groups and counts say more.
    fn bounded(mut self) -> Bytes {
        for share in [MAX_DIFFERENCES, 10, 0] {
            for shadow in self.shadows.values_mut() {
                if let Some(differences) = shadow["differences"].as_array_mut() {
                    differences.truncate(share);
                }
            }
            let json = serde_json::to_vec(&self).expect("texts and numbers are JSON");
            if json.len() <= MAX_REPORT_BYTES {
                return json.into();
            }
        }
        self.shadows.clear();
        serde_json::to_vec(&self)
            .expect("texts and numbers are JSON")
            .into()
    }
}

impl FleetShadowReport {
    fn add(&mut self, node: String, shadow: &Value) {
        let counts = Counts::deserialize(shadow).unwrap_or_default();
        self.counts.compared += counts.compared;
        self.counts.different += counts.different;
        self.counts.failed += counts.failed;
        self.counts.skipped += counts.skipped;
        self.counts.waiting += counts.waiting;
        for group in shadow["groups"].as_array().into_iter().flatten() {
            if let Ok(group) = DifferenceGroup::deserialize(group) {
                self.groups.merge(group);
            }
        }
        let differences = shadow["differences"].as_array().into_iter().flatten();
        let room = MAX_DIFFERENCES - self.differences.len();
        self.differences.extend(differences.take(room).cloned());
        self.nodes.push(NodeShadow { node, counts });
    }
}

fn hashes(version: &PluginVersion) -> VersionHashes {
    VersionHashes {
        file: version.hash.clone(),
        config: version.config_hash.clone(),
    }
}

fn version(hashes: VersionHashes) -> PluginVersion {
    PluginVersion {
        hash: hashes.file,
        config_hash: hashes.config,
    }
}
