//! Roll-outs of plugins, a hash of the installation, and the reports of nodes, a key each.

use bytes::Bytes;
use redis::{Value, from_redis_value};

use super::{Redis, client, scripts};
use crate::broker::{
    MAX_REPORT_BYTES, MAX_REPORTS, MAX_ROLLOUT_BYTES, REGISTERED_FOR, REPORTED_FOR, Result,
    Rollout, StoredReport, WantedVersions,
};
use crate::duration::millis;
use crate::event::Name;

/// The most reports that are read in one round trip.
const REPORTS_AT_ONCE: usize = 16;

/// See [`crate::broker::Rollouts::rollouts`].
pub(super) async fn read(redis: &Redis, plugins: &[Name]) -> Result<WantedVersions> {
    type Found = Vec<(String, Option<Vec<u8>>)>;
    let call = redis.connection.eval(&scripts::ROLLOUTS, |command| {
        command
            .arg(1)
            .arg(redis.prefix.rollouts())
            .arg(MAX_ROLLOUT_BYTES);
        for plugin in plugins {
            command.arg(plugin.as_str());
        }
    });
    let (revision, found): (u64, Found) = call.await?;
    let mut wanted = WantedVersions {
        revision,
        ..WantedVersions::default()
    };
    for (plugin, rollout) in found {
        match rollout.and_then(|json| serde_json::from_slice(&json).ok()) {
            Some(rollout) => {
                wanted.rollouts.insert(plugin, rollout);
            }
            None => wanted.foreign.push(plugin),
        }
    }
    Ok(wanted)
}

/// See [`crate::broker::Rollouts::replace_rollout`]. `before`: `None` for any.
pub(super) async fn write(
    redis: &Redis,
    plugin: &Name,
    before: Option<&Rollout>,
    rollout: Option<&Rollout>,
) -> Result<Option<u64>> {
    let json = |rollout: &Rollout| serde_json::to_vec(rollout).expect("texts and numbers");
    let (before, rollout) = (before.map(json), rollout.map(json));
    let call = redis.connection.eval(&scripts::SET_ROLLOUT, |command| {
        command
            .arg(1)
            .arg(redis.prefix.rollouts())
            .arg(plugin.as_str())
            .arg(rollout.as_deref().unwrap_or_default())
            .arg(before.as_deref().unwrap_or_default());
    });
    call.await
}

/// See [`crate::broker::Rollouts::report_node`].
pub(super) async fn report(redis: &Redis, node: &str, report: &[u8]) -> Result<bool> {
    let call = redis.connection.eval(&scripts::REPORT, |command| {
        command
            .arg(1)
            .arg(redis.prefix.report(node))
            .arg(report)
            .arg(millis(REPORTED_FOR));
    });
    let () = call.await?;
    let is_registered = client::cmd("HEXISTS")
        .arg(redis.prefix.nodes())
        .arg(node)
        .take();
    redis.connection.query(&is_registered).await
}

/// See [`crate::broker::Rollouts::node_reports`].
pub(super) async fn reports(redis: &Redis) -> Result<Vec<StoredReport>> {
    let call = redis.connection.eval(&scripts::LIVE_NODES, |command| {
        command
            .arg(1)
            .arg(redis.prefix.nodes())
            .arg(millis(REGISTERED_FOR))
            .arg(MAX_REPORTS);
    });
    let mut nodes: Vec<String> = call.await?;
    nodes.sort_unstable();
    let mut reports = Vec::with_capacity(nodes.len());
    for nodes in nodes.chunks(REPORTS_AT_ONCE) {
        let mut commands = client::pipe();
        // The value of a key of another type is an answer like any other.
        commands.ignore_errors();
        for node in nodes {
            commands
                .cmd("GETRANGE")
                .arg(redis.prefix.report(node))
                .arg(0)
                // One more than allowed: a report is never read in part.
                .arg(MAX_REPORT_BYTES);
        }
        let found: Vec<Value> = redis.connection.pipeline(&commands).await?;
        reports.extend(nodes.iter().zip(found).map(|(node, found)| {
            let found = from_redis_value::<Vec<u8>>(found).ok();
            let is_report = |json: &Vec<u8>| !json.is_empty() && json.len() <= MAX_REPORT_BYTES;
            StoredReport {
                node: node.clone(),
                report: found.filter(is_report).map(Bytes::from),
            }
        }));
    }
    Ok(reports)
}
