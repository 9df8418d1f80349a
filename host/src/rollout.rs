//! The fleet: roll-outs of plugins over all nodes of an installation, and the sum of what their
//! candidates in shadow report.
//!
//! The broker passes everything on: the wanted versions to each node, and a report of each node to
//! the one that an operator asks. A node follows both every [`SYNC_EVERY`].
//!
//! A command has taken effect on a node when the node reports the revision of its write. A live node
//! without such a report is pending. A node that is not listed as live any more decides nothing
//! until it has read the roll-outs again ([`crate::plugin::registry::rollout::CONFIRMED_FOR`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::broker::{
    Broker, Error, MAX_REPORT_BYTES, PluginVersion, REGISTERED_FOR, REPORTED_FOR, Result, Rollout,
    StoredReport,
};
use crate::event::{Name, PartitionNumber};
use crate::plugin::registry::Registry;
use crate::plugin::registry::rollout::{
    CONFIRMED_FOR, RolloutState, RolloutStatus, RolloutWish, VersionHashes,
};
use crate::plugin::shadow::groups::{DifferenceGroup, Groups};
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

/// The attempts to change a roll-out that others change meanwhile.
const REPLACE_ATTEMPTS: usize = 5;
/// The interval between two looks at the wanted versions.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// How long a command waits for the other nodes: longer than a node that has stopped is listed
/// ([`crate::broker::REGISTERED_FOR`]), so that only a busy node is left behind.
const MAX_WAIT: Duration = Duration::from_secs(15);
/// The interval between two looks at their reports meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The line of readiness about the roll-outs as a whole.
const READINESS_LINE: &str = "rollouts";
/// The maximum number of differences in a sum.
const MAX_DIFFERENCES: usize = 100;

// A node that is not listed any more does not decide any more, and one command outlasts its listing.
const _: () = assert!(
    CONFIRMED_FOR.as_secs() < REPORTED_FOR.as_secs()
        && CONFIRMED_FOR.as_secs() < REGISTERED_FOR.as_secs()
        && REGISTERED_FOR.as_secs() < MAX_WAIT.as_secs()
);

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
    /// The write of roll-outs that it has followed.
    revision: u64,
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
    /// Why the nodes are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The nodes that have followed a change.
#[derive(Debug, Default, Serialize)]
pub struct RollbackReport {
    pub nodes: Vec<String>,
    /// Live nodes that have not followed it yet, or have not reported it.
    pub pending: Vec<String>,
    /// Why the nodes are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A live node and its report, if it has reported.
struct NodeStatus {
    node: String,
    report: Option<NodeReport>,
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
    /// Starts the two tasks of the fleet: one follows the wanted versions and reports, the other one
    /// loads versions meanwhile. Until the first one has read them, no event is decided.
    pub(crate) fn start(&self, readiness: &Readiness, shutdown: &Shutdown) {
        self.registry.require_rollouts();
        let follow = self.clone().follow(readiness.clone(), shutdown.clone());
        shutdown.spawn("the roll-out monitor", follow);
        let load = self.clone().load(shutdown.clone());
        shutdown.spawn("the loader of roll-outs", load);
    }

    async fn follow(self, readiness: Readiness, shutdown: Shutdown) {
        loop {
            match self.sync().await {
                Ok(foreign) if foreign.is_empty() => readiness.clear(READINESS_LINE),
                Ok(foreign) => readiness.warn(
                    READINESS_LINE,
                    format!(
                        "the broker holds something else than a roll-out for {}, which is ignored; end it (pointsman plugin rollback NAME)",
                        foreign.join(", ")
                    ),
                ),
                // The broker monitor reports an outage.
                Err(error @ (Error::Unavailable(_) | Error::Full(_))) => {
                    tracing::debug!(%error, "cannot follow the roll-outs of plugins");
                }
                Err(error) => readiness.warn(
                    READINESS_LINE,
                    format!(
                        "the roll-outs of plugins cannot be followed, so this node keeps the versions that it has: {error}; grant the rights, or delete a key of another type"
                    ),
                ),
            }
            tokio::select! {
                () = tokio::time::sleep(SYNC_EVERY) => {}
                () = shutdown.begun() => return,
            }
        }
    }

    /// Loads the versions that are due, several at the same time.
    async fn load(self, shutdown: Shutdown) {
        let mut loads: JoinSet<(String, RolloutWish)> = JoinSet::new();
        let mut under_way: Vec<(String, RolloutWish)> = Vec::new();
        loop {
            let registry = Arc::clone(&self.registry);
            let due = tokio::task::spawn_blocking(move || registry.due_rollouts()).await;
            for (name, wish) in due.unwrap_or_default() {
                // The same version may have got another share meanwhile; an earlier version may take
                // until it notices that it is not wanted any more.
                if under_way.iter().any(|(other, _)| *other == name) {
                    continue;
                }
                under_way.push((name.clone(), wish.clone()));
                let (registry, token) = (Arc::clone(&self.registry), shutdown.token());
                loads.spawn_blocking(move || {
                    registry.load_rollout(&name, &wish, || token.is_cancelled());
                    (name, wish)
                });
            }
            tokio::select! {
                Some(ended) = loads.join_next() => {
                    // After a panic, it is not known which one ended.
                    let ended = ended.ok();
                    under_way.retain(|load| ended.as_ref().is_some_and(|ended| load != ended));
                    if let Err(error) = self.sync().await {
                        tracing::debug!(%error, "cannot report the loaded version of a roll-out");
                    }
                }
                () = self.registry.rollouts_changed() => {}
                () = tokio::time::sleep(SYNC_EVERY) => {}
                () = shutdown.begun() => return,
            }
        }
    }

    /// Takes part in the present roll-outs, withdraws those that failed here, and reports. Never
    /// waits for a compilation. Returns the plugins for which the broker holds something else than a
    /// roll-out.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn sync(&self) -> Result<Vec<String>> {
        let _turn = self.registry.rollouts_turn.lock().await;
        let began = Instant::now();
        let synced = self.sync_in_turn().await;
        match &synced {
            Ok((_, true)) => self.registry.confirm_rollouts(began),
            // Its first registration is under way.
            Ok((_, false)) => {}
            // This node cannot tell, so it must not decide for long.
            Err(Error::Unavailable(_) | Error::Full(_)) => {}
            // It cannot follow any change, which commands report: they do not see a report of it.
            Err(_) => self.registry.confirm_rollouts(began),
        }
        synced.map(|(foreign, _)| foreign)
    }

    async fn sync_in_turn(&self) -> Result<(Vec<String>, bool)> {
        let mut wanted = self.broker.rollouts(&self.registry.names()).await?;
        for (plugin, to, reason) in self.registry.failed_rollouts() {
            // By now the operator may have written another one.
            let is_it = |rollout: &Rollout| hashes(&rollout.to) == to;
            if let Some(rollout) = wanted.rollouts.get(&plugin).filter(|found| is_it(found))
                && let Ok(name) = Name::parse(&plugin)
                && let Some(revision) = self.broker.replace_rollout(&name, rollout, None).await?
            {
                wanted.revision = revision;
                wanted.rollouts.remove(&plugin);
                tracing::error!(
                    plugin.name = plugin,
                    "plugin rolled back on all nodes: the version of the roll-out {reason}"
                );
            }
        }
        let all = self.broker.partitions();
        let wishes = wanted.rollouts.iter().map(|(plugin, rollout)| {
            let wish = RolloutWish {
                from: hashes(&rollout.from),
                to: hashes(&rollout.to),
                partitions: rollout.partitions(plugin, all),
                at_ms: rollout.at_ms,
            };
            (plugin.clone(), wish)
        });
        let rollouts = self.registry.follow_rollouts(&wishes.collect());
        let shadows = self.registry.shadow_reports().into_iter();
        let shadows = shadows
            .map(|(plugin, report)| (plugin, serde_json::to_value(report).unwrap_or_default()));
        let report = NodeReport {
            revision: wanted.revision,
            rollouts,
            shadows: shadows.collect(),
        };
        let is_registered = self.broker.report_node(&self.node, report.bounded());
        Ok((wanted.foreign, is_registered.await?))
    }

    /// Writes a roll-out and waits for the nodes to follow it, at most [`MAX_WAIT`].
    ///
    /// # Errors
    /// The roll-out was not written.
    pub async fn begin(
        &self,
        plugin: &Name,
        from: VersionHashes,
        to: VersionHashes,
        percent: u32,
    ) -> Result<RolloutReport> {
        let rollout = Rollout {
            from: version(from),
            to: version(to),
            percent,
            at_ms: self.broker.now_ms(),
        };
        let revision = self.broker.set_rollout(plugin, Some(&rollout)).await?;
        Ok(self.written(plugin, rollout, revision).await)
    }

    /// Changes the share of a roll-out, as [`Fleet::begin`]. `None`: there is none.
    ///
    /// # Errors
    /// As for [`Fleet::begin`].
    pub async fn set_share(&self, plugin: &Name, percent: u32) -> Result<Option<RolloutReport>> {
        // Another command may have ended it since it was read, which a change of the share must not
        // undo.
        for _ in 0..REPLACE_ATTEMPTS {
            let Some((before, _)) = self.read(plugin).await? else {
                return Ok(None);
            };
            let rollout = Rollout {
                percent,
                at_ms: self.broker.now_ms(),
                ..before.clone()
            };
            let replaced = self.broker.replace_rollout(plugin, &before, Some(&rollout));
            if let Some(revision) = replaced.await? {
                return Ok(Some(self.written(plugin, rollout, revision).await));
            }
        }
        Err(Error::Unavailable(
            "other commands change this roll-out at the same time, or another version of Pointsman wrote it; repeat the command, or roll back and begin again"
                .to_owned(),
        ))
    }

    /// The report on a roll-out that was just written.
    async fn written(&self, plugin: &Name, rollout: Rollout, revision: u64) -> RolloutReport {
        let nodes = self.await_nodes(plugin, revision).await;
        self.report(plugin, rollout, revision, nodes)
    }

    /// Removes a roll-out: every node decides by its own version again. `None`: there is none.
    ///
    /// # Errors
    /// The roll-out was not removed.
    pub async fn roll_back(&self, plugin: &Name) -> Result<Option<RollbackReport>> {
        let wanted = self.broker.rollouts(std::slice::from_ref(plugin)).await?;
        if wanted.rollouts.is_empty() && wanted.foreign.is_empty() {
            return Ok(None);
        }
        let revision = self.broker.set_rollout(plugin, None).await?;
        let mut rollback = RollbackReport::default();
        match self.await_nodes(plugin, revision).await {
            Ok(reports) => {
                for NodeStatus { node, report } in reports {
                    // A roll-out that began meanwhile is not followed away.
                    let has_followed = report.is_some_and(|report| {
                        report.revision >= revision
                            && !report.rollouts.contains_key(plugin.as_str())
                    });
                    if has_followed {
                        rollback.nodes.push(node);
                    } else {
                        rollback.pending.push(node);
                    }
                }
            }
            Err(error) => {
                rollback.pending.push(self.node.clone());
                rollback.problem = unread(&error);
            }
        }
        Ok(Some(rollback))
    }

    /// Waits until all live nodes have followed a write and have nothing left to load for it, at
    /// most [`MAX_WAIT`], and returns what they report.
    async fn await_nodes(&self, plugin: &Name, revision: u64) -> Result<Vec<NodeStatus>> {
        let deadline = Instant::now() + MAX_WAIT;
        // The write has taken effect: what this node reports tells whether it has followed.
        if let Err(error) = self.sync().await {
            tracing::debug!(%error, "cannot follow the roll-outs of plugins");
        }
        loop {
            let reports = self.reports().await;
            let is_settled = |NodeStatus { report, .. }: &NodeStatus| {
                report.as_ref().is_some_and(|report| {
                    let state = report.rollouts.get(plugin.as_str());
                    report.revision >= revision
                        && state.is_none_or(|state| state.state != RolloutStatus::Loading)
                })
            };
            let is_over = Instant::now() > deadline;
            match reports {
                // Without this node, the list has just been deleted and is being written again.
                Ok(reports)
                    if is_over
                        || reports.iter().all(is_settled)
                            && reports.iter().any(|status| status.node == self.node) =>
                {
                    return Ok(reports);
                }
                Err(error) if is_over || !matches!(error, Error::Unavailable(_)) => {
                    return Err(error);
                }
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// A roll-out with the part of every live node. `None`: there is none.
    ///
    /// # Errors
    /// Errors of the broker.
    pub async fn rollout(&self, plugin: &Name) -> Result<Option<RolloutReport>> {
        let Some((rollout, revision)) = self.read(plugin).await? else {
            return Ok(None);
        };
        let nodes = self.reports().await;
        Ok(Some(self.report(plugin, rollout, revision, nodes)))
    }

    /// A roll-out and the revision of all.
    async fn read(&self, plugin: &Name) -> Result<Option<(Rollout, u64)>> {
        let mut wanted = self.broker.rollouts(std::slice::from_ref(plugin)).await?;
        let rollout = wanted.rollouts.remove(plugin.as_str());
        Ok(rollout.map(|rollout| (rollout, wanted.revision)))
    }

    fn report(
        &self,
        plugin: &Name,
        rollout: Rollout,
        revision: u64,
        nodes: Result<Vec<NodeStatus>>,
    ) -> RolloutReport {
        let problem = nodes.as_ref().err().and_then(unread);
        let nodes = nodes.unwrap_or_default().into_iter();
        let nodes = nodes.map(|NodeStatus { node, report }| {
            let part = |state, reason: &str| RolloutState {
                state,
                at_ms: 0,
                hash: String::new(),
                config_hash: String::new(),
                reason: reason.to_owned(),
            };
            let state = match report {
                None => part(RolloutStatus::Pending, "it has not reported"),
                Some(mut report) => match report.rollouts.remove(plugin.as_str()) {
                    Some(state) if report.revision >= revision => state,
                    Some(state) => RolloutState {
                        state: RolloutStatus::Pending,
                        reason: "it still follows an earlier change".to_owned(),
                        ..state
                    },
                    None if report.revision >= revision => part(
                        RolloutStatus::Missing,
                        "the plugin is not active, or the roll-out was ended meanwhile",
                    ),
                    None => part(RolloutStatus::Pending, "it has not seen the roll-out yet"),
                },
            };
            NodeRollout { node, state }
        });
        let all = self.broker.partitions();
        RolloutReport {
            plugin: plugin.to_string(),
            partitions: rollout
                .partitions(plugin.as_str(), all)
                .into_iter()
                .collect(),
            n_partitions: all.len(),
            rollout,
            nodes: nodes.collect(),
            problem,
        }
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
        reports.sort_by_key(|status| status.node != self.node);
        for NodeStatus { node, report } in reports {
            let Some(shadow) = report.and_then(|mut report| report.shadows.remove(plugin)) else {
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

    /// The live nodes with their reports.
    async fn reports(&self) -> Result<Vec<NodeStatus>> {
        let reports = self.broker.node_reports().await?.into_iter();
        let parsed = reports.map(|StoredReport { node, report }| NodeStatus {
            node,
            // A report of another version is read as far as it can be.
            report: report.map(|json| serde_json::from_slice(&json).unwrap_or_default()),
        });
        Ok(parsed.collect())
    }
}

/// Why a command, which has taken effect, cannot tell which nodes have followed it.
fn unread(error: &Error) -> Option<String> {
    Some(format!(
        "the change is written, and the reports of the nodes cannot be read: {error}; look again with pointsman plugin rollout NAME"
    ))
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
