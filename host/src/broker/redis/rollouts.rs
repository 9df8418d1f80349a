//! Roll-outs of plugins and the reports of nodes: two hashes of the installation.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Redis, client};
use crate::broker::{Partitions as _, REPORTED_FOR, Result, Rollout, StoredReport};
use crate::duration::millis;
use crate::event::Name;

/// See [`crate::broker::Rollouts::rollouts`].
pub(super) async fn read(redis: &Redis) -> Result<BTreeMap<String, Rollout>> {
    let found = all(redis, &redis.prefix.rollouts()).await?;
    // What Pointsman did not write is skipped.
    let parsed = found.into_iter().filter_map(|(plugin, rollout)| {
        Some((
            String::from_utf8(plugin).ok()?,
            serde_json::from_slice(&rollout).ok()?,
        ))
    });
    Ok(parsed.collect())
}

/// See [`crate::broker::Rollouts::set_rollout`].
pub(super) async fn write(redis: &Redis, plugin: &Name, rollout: Option<&Rollout>) -> Result<()> {
    let key = redis.prefix.rollouts();
    let _changed: i64 = match rollout {
        Some(rollout) => {
            let json = serde_json::to_vec(rollout).expect("texts and numbers are JSON");
            let set = client::cmd("HSET")
                .arg(key)
                .arg(plugin.as_str())
                .arg(json)
                .take();
            redis.connection.query(&set).await?
        }
        None => remove(redis, &key, &[plugin.as_str()]).await?,
    };
    Ok(())
}

/// See [`crate::broker::Rollouts::report_node`].
pub(super) async fn report(redis: &Redis, node: &str, report: &[u8]) -> Result<()> {
    let value = [format!("{} ", redis.now_ms()).as_bytes(), report].concat();
    let set = client::cmd("HSET")
        .arg(redis.prefix.reports())
        .arg(node)
        .arg(value)
        .take();
    let _added: i64 = redis.connection.query(&set).await?;
    Ok(())
}

/// See [`crate::broker::Rollouts::node_reports`]. Removes outdated reports: names of nodes may never
/// return.
pub(super) async fn reports(redis: &Redis) -> Result<Vec<StoredReport>> {
    let key = redis.prefix.reports();
    let (now_ms, ttl_ms) = (redis.now_ms(), millis(REPORTED_FOR));
    let (mut reports, mut outdated) = (Vec::new(), Vec::new());
    for (node, value) in all(redis, &key).await? {
        let node = String::from_utf8_lossy(&node).into_owned();
        let split = value.iter().position(|byte| *byte == b' ');
        let found = split.and_then(|at| {
            let at_ms: u64 = std::str::from_utf8(&value[..at]).ok()?.parse().ok()?;
            Some((at_ms, Bytes::copy_from_slice(&value[at + 1..])))
        });
        // A report of the future was written before the clock was set back.
        match found {
            Some((at_ms, report)) if now_ms.abs_diff(at_ms) <= ttl_ms => {
                reports.push(StoredReport {
                    node,
                    at_ms,
                    report,
                });
            }
            _ => outdated.push(node),
        }
    }
    if !outdated.is_empty() {
        let names: Vec<&str> = outdated.iter().map(String::as_str).collect();
        let _removed: i64 = remove(redis, &key, &names).await?;
    }
    reports.sort_by(|one, other| one.node.cmp(&other.node));
    Ok(reports)
}

async fn all(redis: &Redis, key: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let get = client::cmd("HGETALL").arg(key).take();
    redis.connection.query(&get).await
}

async fn remove(redis: &Redis, key: &str, fields: &[&str]) -> Result<i64> {
    let delete = client::cmd("HDEL").arg(key).arg(fields).take();
    redis.connection.query(&delete).await
}
