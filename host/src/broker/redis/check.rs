//! Checks what Pointsman requires of a Redis: version, role, eviction policy, permissions and
//! durability. Each finding is one line with its fix.

use super::command_connection::{CommandConnection, write_refusal};
use super::partition_keys::PartitionKeys;
use super::prefix::Prefix;
use super::{Redis, scripts};
use crate::broker::{BridgeAccess, Channel, Error, Finding, Result, Severity};

/// Rejects a Redis that does not support flags in scripts.
pub(super) async fn version(connection: &CommandConnection) -> Result<()> {
    let info: String = connection.query(redis::cmd("INFO").arg("server")).await?;
    match too_old(&info) {
        Some(text) => Err(Error::Permanent(text)),
        None => Ok(()),
    }
}

pub(super) async fn findings(redis: &Redis) -> Result<Vec<Finding>> {
    let info: String = match redis.connection.query(&redis::cmd("INFO")).await {
        Ok(info) => info,
        Err(Error::Permanent(why)) => {
            return Ok(vec![refusal(
                "info",
                format!(
                    "INFO is not permitted ({why}); grant +info, because every commit reads the replication id"
                ),
            )]);
        }
        Err(error) => return Err(error),
    };
    let mut findings: Vec<Finding> = too_old(&info)
        .map(|text| refusal("version", text))
        .into_iter()
        .collect();
    match value(&info, "role").filter(|role| *role != "master") {
        Some(role) => findings.push(refusal(
            "role",
            format!("this Redis is a {role}; the URL must name the primary"),
        )),
        None => findings.extend(writes(redis).await?),
    }
    if let Some(policy) = value(&info, "maxmemory_policy").filter(|policy| *policy != "noeviction")
    {
        let text = format!(
            "maxmemory-policy is {policy}, which may evict positions and logs; run CONFIG SET maxmemory-policy noeviction"
        );
        findings.push(refusal("eviction", text));
    }
    if value(&info, "aof_enabled") == Some("0") {
        let text = "the append-only file is off, so a crash of Redis may lose accepted events; run CONFIG SET appendonly yes";
        findings.push(Finding {
            name: "append-only-file",
            severity: Severity::Warning,
            text: text.into(),
        });
    }
    findings.extend(clock(redis));
    findings.extend(rights(redis).await?);
    Ok(findings)
}

/// Compares the clocks of this node and of Redis.
fn clock(redis: &Redis) -> Option<Finding> {
    let ahead_s = redis.clock.node_ahead_s()?;
    let direction = if ahead_s < 0 { "behind" } else { "ahead of" };
    let text = format!(
        "this node's clock is {} s {direction} that of Redis; events expire by the clock of Redis and tokens by this node's; synchronise both with NTP",
        ahead_s.unsigned_abs()
    );
    Some(Finding {
        name: "clock",
        severity: Severity::Warning,
        text,
    })
}

/// Checks whether Redis refuses writes that the user may make.
async fn writes(redis: &Redis) -> Result<Option<Finding>> {
    let call = redis.connection.eval(&scripts::WRITABLE, |command| {
        command.arg(0);
    });
    match call.await {
        // `rights` reports a user who may not run scripts.
        Ok(()) | Err(Error::Permanent(_)) => Ok(None),
        Err(error) => match write_refusal(&error) {
            Some(text) => Ok(Some(refusal("writes", text.into()))),
            None => Err(error),
        },
    }
}

/// Checks which of the commands that Pointsman runs are not permitted.
async fn rights(redis: &Redis) -> Result<Vec<Finding>> {
    let user = redis
        .client
        .get_connection_info()
        .redis_settings()
        .username()
        .unwrap_or("default")
        .to_owned();
    for keys in &redis.keys {
        let needed = [
            partition_commands(&redis.prefix, keys),
            shared_commands(&redis.prefix),
            bridge_commands(&redis.bridges, keys),
        ]
        .concat();
        let call = redis.connection.eval(&scripts::RIGHTS, |command| {
            command.arg(0).arg(&needed);
        });
        let denied: Vec<String> = match call.await {
            Ok(denied) => denied,
            Err(Error::Permanent(why)) => {
                let text = format!(
                    "user '{user}' may not run scripts ({why}); run ACL SETUSER {user} +eval +evalsha"
                );
                return Ok(vec![refusal("rights", text)]);
            }
            Err(error) => return Err(error),
        };
        if !denied.is_empty() {
            return Ok(vec![refusal(
                "rights",
                grant_advice(&user, &redis.prefix, keys, &denied),
            )]);
        }
    }
    Ok(Vec::new())
}

/// The commands that Pointsman runs on a partition, one word per line.
fn partition_commands(prefix: &Prefix, keys: &PartitionKeys) -> Vec<String> {
    let (s, t, c) = (&keys.partition.source, &keys.prefix, &keys.channels);
    let group = prefix.as_str();
    [
        &["EVALSHA", "x", "2", s, &format!("{t}meta")][..],
        &["EVAL", "x", "2", s, &format!("{t}meta")],
        &["TIME"],
        &["INFO", "replication"],
        &["XADD", s, "*", "f", "v"],
        &["XREAD", "COUNT", "1", "STREAMS", s, "0-0"],
        &["XRANGE", s, "-", "+"],
        &["XREVRANGE", s, "+", "-"],
        &["XTRIM", s, "MAXLEN", "1"],
        &["XDEL", s, "0-1"],
        &["XLEN", s],
        &["XINFO", "STREAM", s],
        &["XSETID", s, "0-1"],
        &["XGROUP", "SETID", s, group, "0-1"],
        &["XGROUP", "CREATE", s, group, "0-1"],
        &["XINFO", "GROUPS", s],
        &["XPENDING", s, group],
        &["TYPE", &format!("{t}dead")],
        &["XADD", &format!("{t}dead"), "*", "f", "v"],
        &["XRANGE", &format!("{t}dead"), "-", "+"],
        &["XDEL", &format!("{t}dead"), "0-1"],
        &["XLEN", &format!("{t}dead")],
        &["XINFO", "STREAM", &format!("{t}dead")],
        &["TYPE", &format!("{t}retrying")],
        &["XADD", &format!("{t}retrying"), "*", "f", "v"],
        &["XRANGE", &format!("{t}retrying"), "-", "+"],
        &["XDEL", &format!("{t}retrying"), "0-1"],
        &["XLEN", &format!("{t}retrying")],
        &["XINFO", "STREAM", &format!("{t}retrying")],
        &["ZADD", &format!("{t}due"), "1", "v"],
        &["ZREM", &format!("{t}due"), "v"],
        &["ZRANGEBYSCORE", &format!("{t}due"), "0", "1"],
        &["HMGET", &format!("{t}retried"), "f"],
        &["HSET", &format!("{t}retried"), "f", "v"],
        &["HDEL", &format!("{t}retried"), "f"],
        &["UNLINK", &format!("{t}retried")],
        &["TYPE", &format!("{t}decisions")],
        &["XADD", &format!("{t}decisions"), "*", "f", "v"],
        &["XTRIM", &format!("{t}decisions"), "MAXLEN", "1"],
        &["XREVRANGE", &format!("{t}decisions"), "+", "-"],
        &["GET", &format!("{t}owner")],
        &["SET", &format!("{t}owner"), "v"],
        &["DEL", &format!("{t}owner")],
        &["PTTL", &format!("{t}owner")],
        &["UNLINK", &format!("{t}seen:1")],
        &["MGET", &format!("{t}e:1")],
        &["STRLEN", &format!("{t}e:1")],
        &["SET", &format!("{t}e:1"), "v"],
        &["PEXPIRE", &format!("{t}e:1"), "1"],
        &["SADD", &format!("{t}seen:1"), "v"],
        &["SCARD", &format!("{t}seen:1")],
        &["SMISMEMBER", &format!("{t}seen:1"), "v"],
        &["HGET", &format!("{t}meta"), "f"],
        &["HSET", &format!("{t}meta"), "f", "v"],
        &["HDEL", &format!("{t}meta"), "f"],
        &["HINCRBY", &format!("{t}meta"), "f", "1"],
        &["HMGET", &format!("{t}meta"), "f"],
        &["HGETALL", &format!("{t}meta")],
        &["RPUSH", &format!("{t}epochs"), "v"],
        &["LTRIM", &format!("{t}epochs"), "0", "1"],
        &["LRANGE", &format!("{t}epochs"), "0", "1"],
        &["ZADD", &format!("{t}l:all"), "1", "v"],
        &["ZREVRANGE", &format!("{t}l:all"), "0", "0"],
        &["ZRANGEBYSCORE", &format!("{t}l:all"), "0", "1"],
        &["ZREMRANGEBYSCORE", &format!("{t}l:all"), "-inf", "(1"],
        &["ZREMRANGEBYRANK", &format!("{t}l:all"), "0", "1"],
        &["PEXPIRE", &format!("{t}l:all"), "1"],
        &["PUBLISH", &format!("{c}tick"), "v"],
        &["PUBLISH", &format!("{c}l:all"), "v"],
        &["PUBLISH", &format!("{c}recipients"), "v"],
        &["SUBSCRIBE", &format!("{c}tick")],
        &["SUBSCRIBE", &format!("{c}l:all")],
        &["SUBSCRIBE", &format!("{c}recipients")],
        &["UNSUBSCRIBE", &format!("{c}tick")],
    ]
    .map(|words| words.join("\n"))
    .into()
}

/// The commands on the data of users and of the installation, one word per line.
fn shared_commands(prefix: &Prefix) -> Vec<String> {
    let (numbers, nodes) = (&prefix.numbers()[..], &prefix.nodes()[..]);
    let (rollouts, report) = (&prefix.rollouts()[..], &prefix.report("x")[..]);
    let ticket = &prefix.ticket("x")[..];
    let (user, cursors) = (
        &format!("{prefix}:user:x")[..],
        &format!("{prefix}:device-cursors:x")[..],
    );
    [
        &["HGET", user, "f"][..],
        &["HMGET", user, "f"],
        &["HEXISTS", user, "f"],
        &["HGETALL", user],
        &["HSET", user, "f", "v"],
        &["HDEL", user, "f"],
        &["PERSIST", user],
        &["PEXPIRE", user, "1"],
        &["HGETALL", cursors],
        &["HSET", cursors, "f", "v"],
        &["HDEL", cursors, "f"],
        &["PEXPIRE", cursors, "1"],
        &["HGET", numbers, "f"],
        &["HGETALL", numbers],
        &["HSET", numbers, "f", "v"],
        &["HGETALL", nodes],
        &["HSET", nodes, "f", "v"],
        &["HDEL", nodes, "f"],
        &["HSCAN", nodes, "0"],
        &["HEXISTS", nodes, "f"],
        &["HGET", rollouts, "f"],
        &["HSTRLEN", rollouts, "f"],
        &["HSET", rollouts, "f", "v"],
        &["HDEL", rollouts, "f"],
        &["SET", report, "v", "PX", "1"],
        &["GETRANGE", report, "0", "1"],
        &["SET", ticket, "v", "PX", "1"],
        &["GETDEL", ticket],
    ]
    .map(|words| words.join("\n"))
    .into()
}

/// The commands that the bridges into this source need, one word per line.
fn bridge_commands(bridges: &[BridgeAccess], keys: &PartitionKeys) -> Vec<String> {
    let own = bridges
        .iter()
        .filter(|access| access.source == keys.partition.source);
    own.flat_map(|access| {
        let key = &format!("{}bridge:{}", keys.prefix, access.bridge)[..];
        let subscribe = match &access.channel {
            Channel::Exact(_) => "SUBSCRIBE",
            Channel::Pattern(_) => "PSUBSCRIBE",
            Channel::Sharded(_) => "SSUBSCRIBE",
        };
        [
            &["HGET", key, "f"][..],
            &["HMGET", key, "f"],
            &["HSET", key, "f", "v"],
            &[subscribe, access.channel.as_str()],
            &["PING"],
        ]
        .map(|words| words.join("\n"))
    })
    .collect()
}

/// Names the denied commands and the command that grants them.
fn grant_advice(user: &str, prefix: &Prefix, keys: &PartitionKeys, denied: &[String]) -> String {
    let source = &keys.partition.source;
    let source = if prefix.owns(source) {
        String::new()
    } else {
        format!(" ~{source}")
    };
    let commands: Vec<String> = denied
        .iter()
        .map(|words| words.replace('\n', " "))
        .collect();
    let mut grant: Vec<String> = denied
        .iter()
        .filter_map(|words| words.lines().next())
        .map(|word| format!("+{}", word.to_lowercase()))
        .collect();
    let channels: Vec<String> = denied
        .iter()
        .filter_map(|words| words.split_once("SUBSCRIBE\n"))
        .filter(|(_, channel)| !prefix.owns(channel))
        .map(|(_, channel)| format!(" &{channel}"))
        .collect();
    // Commands on several keys.
    let mut named = std::collections::HashSet::new();
    grant.retain(|word| named.insert(word.clone()));
    format!(
        "user '{user}' may not run {}; run ACL SETUSER {user} {}{source} ~{prefix}:* &{prefix}:*{}",
        commands.join(", "),
        grant.join(" "),
        channels.concat()
    )
}

fn refusal(name: &'static str, text: String) -> Finding {
    Finding {
        name,
        severity: Severity::Refusal,
        text,
    }
}

fn too_old(info: &str) -> Option<String> {
    let version = value(info, "redis_version")?;
    let major: u32 = version.split('.').next()?.parse().ok()?;
    (major < 7).then(|| format!("Redis {version} is too old; Pointsman needs 7.0 or newer"))
}

/// The value of a field of `INFO`.
fn value<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_before_version_7_is_too_old() {
        assert!(
            too_old("# Server\r\nredis_version:6.2.14\r\n")
                .is_some_and(|text| text.contains("6.2.14"))
        );
        assert_eq!(too_old("# Server\r\nredis_version:7.0.15\r\n"), None);
        assert_eq!(too_old("# Server\r\nredis_version:10.1.0\r\n"), None);
    }
}
