//! Requirements for Redis, valid source names, the assignment of partition numbers, and expiry.

use super::*;
use pointsman::broker::RecipientChange;
use pointsman::event::criteria::Attributes;
use pointsman::event::{Span, Value};

async fn findings(node: &Node) -> Vec<(Severity, String)> {
    node.broker
        .check()
        .await
        .expect("check")
        .into_iter()
        .map(|finding| (finding.severity, finding.text))
        .collect()
}

#[tokio::test]
async fn a_well_configured_redis_has_no_findings() {
    let server = RedisServer::with(&["--appendonly", "yes"]);
    assert_eq!(findings(&node_on(&server).await).await, []);
}

#[tokio::test]
async fn each_finding_names_its_fix() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let found = findings(&node).await;
    assert_eq!(found.len(), 1);
    assert!(
        found[0].0 == Severity::Warning && found[0].1.contains("CONFIG SET appendonly yes"),
        "{found:?}"
    );
}

/// When memory is short, such a Redis evicts the keys that record progress: the position,
/// publishers' ids and logs.
#[tokio::test]
async fn a_redis_that_may_evict_is_rejected_with_the_fix() {
    let server = RedisServer::with(&["--appendonly", "yes"]);
    let node = node_on(&server).await;
    let () = server.command("CONFIG SET maxmemory-policy allkeys-lru");
    let found = findings(&node).await;
    assert!(
        found[0].0 == Severity::Refusal
            && found[0]
                .1
                .contains("CONFIG SET maxmemory-policy noeviction"),
        "{found:?}"
    );
}

/// Each permission is checked separately, without running the command.
#[tokio::test]
async fn missing_permissions_are_reported_with_the_grant() {
    let server = RedisServer::with(&["--appendonly", "yes"]);
    let () = server.command("ACL SETUSER app on >secret ~* &* +@all");
    let node = connect_to(
        &format!("redis://app:secret@127.0.0.1:{}/", server.port()),
        &[SOURCE],
        Retention::default(),
    )
    .await
    .unwrap();
    assert_eq!(findings(&node).await, []);
    for (rule, expect) in [
        ("-xtrim", "+xtrim"),
        ("-subscribe", "+subscribe"),
        ("-config resetchannels &other", "&pointsman:*"),
        (
            "allchannels resetkeys ~pointsman:events",
            " ~pointsman:* &pointsman:*",
        ),
    ] {
        let () = server.command(&format!("ACL SETUSER app {rule}"));
        let found = findings(&node).await;
        assert!(
            found.len() == 1 && found[0].0 == Severity::Refusal && found[0].1.contains(expect),
            "{rule}: {found:?}"
        );
        let () = server.command("ACL SETUSER app +@all ~* &*");
    }
    let () = server.command("ACL SETUSER app -info");
    let found = findings(&node).await;
    assert!(
        found.len() == 1 && found[0].1.contains("grant +info"),
        "{found:?}"
    );
}

/// Includes the notice connection.
#[tokio::test]
async fn every_connection_authenticates() {
    let server = RedisServer::start();
    let () = server.command("ACL SETUSER app on >secret ~* &* +@all");
    let () = server.command("ACL SETUSER default off");
    let at = |who: &str| format!("redis://{who}127.0.0.1:{}/", server.port());
    let node = connect_to(&at("app:secret@"), &[SOURCE], Retention::default())
        .await
        .unwrap();
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await, ("u:1".into(), id));
    node.append(&["a"]).await;
    assert_eq!(drain(&node).await, 1);
    for who in ["app:wrong@", ""] {
        match connect_to(&at(who), &[SOURCE], Retention::default()).await {
            Err(Error::Permanent(why)) => assert!(
                why.contains("correct user and password in the URL"),
                "{why}"
            ),
            other => panic!("{who}: {:?}", other.map(|node| node.broker)),
        }
    }
}

#[tokio::test]
async fn sources_whose_keys_would_collide_are_rejected() {
    let server = RedisServer::start();
    for sources in [
        &["a}b"][..],
        &["{}a"],
        &["a\nb"],
        &[""],
        &["{a}", "{a}:meta"],
        &["a", "{a}:b"],
        &["a", "a"],
    ] {
        match connect_to(&server.url(), sources, Retention::default()).await {
            Err(Error::Permanent(why)) => assert!(why.contains("another key"), "{why}"),
            other => panic!("{sources:?}: {:?}", other.map(|node| node.broker)),
        }
    }
    assert!(matches!(
        connect_to("http://127.0.0.1/", &[SOURCE], Retention::default()).await,
        Err(Error::Permanent(_))
    ));
    connect_to(
        &server.url(),
        &["a{b", "{t}x", "{t}y", "a"],
        Retention::default(),
    )
    .await
    .expect("the sources are valid");
}

/// A cursor identifies partitions by number: a source removed from the configuration keeps its
/// number, and a new source gets another one.
#[tokio::test]
async fn partition_numbers_are_never_reused() {
    let server = RedisServer::start();
    let numbers = async |sources: &[&str]| {
        let node = connect_to(&server.url(), sources, Retention::default()).await?;
        Ok::<_, Error>(
            node.broker
                .partitions()
                .iter()
                .map(|partition| (partition.source.clone(), partition.number.0))
                .collect::<Vec<_>>(),
        )
    };
    let of = |pairs: &[(&str, u8)]| {
        pairs
            .iter()
            .map(|(source, number)| (source.to_string(), *number))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        numbers(&["b", "a"]).await.unwrap(),
        of(&[("b", 0), ("a", 1)])
    );
    assert_eq!(
        numbers(&["c", "a"]).await.unwrap(),
        of(&[("a", 1), ("c", 2)])
    );
    // The list of numbers is lost, but the partitions store their own.
    let () = server.command("DEL pointsman:partitions");
    assert_eq!(
        numbers(&["c", "b"]).await.unwrap(),
        of(&[("b", 0), ("c", 2)])
    );
    for k in 3..12 {
        assert_eq!(numbers(&[&format!("more{k}")]).await.unwrap()[0].1, k);
    }
    assert!(
        matches!(numbers(&["one too many"]).await, Err(Error::Permanent(why)) if why.contains("12"))
    );
}

/// Pub/Sub is shared by all databases: without channel names per database, one installation would
/// receive the notices of another.
#[tokio::test]
async fn another_database_is_a_separate_installation() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let other = connect_to(
        &format!("{}1", server.url()),
        &[SOURCE],
        Retention::default(),
    )
    .await
    .unwrap();
    let (mut receiver, mut other_receiver) = (node.receiver().await, other.receiver().await);
    receiver.follow_and_wait("u:1", 1).await;
    other_receiver.follow_and_wait("u:1", 1).await;
    let theirs = other.publish("R", &["u:1"]).await;
    let ours = node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await.1, ours);
    assert_eq!(other_receiver.append().await.1, theirs);
}

/// Expiry is 2 % after the age, so that the floor passes an entry before it disappears. An
/// incomplete plan does not expire before its owner finishes it.
#[tokio::test]
async fn records_and_logs_expire_but_a_pending_plan_does_not() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            max_age: Duration::from_secs(1_000),
            ..Retention::default()
        },
    )
    .await
    .unwrap();
    let ttl = |key: &str| server.command::<i64>(&format!("PTTL {TAG}{key}"));
    let id = node.publish("R", &["u:1"]).await;
    for key in [format!("e:{id}"), "l:u:1".into()] {
        assert!(
            (1_010_000..=1_020_000).contains(&ttl(&key)),
            "{key}: {}",
            ttl(&key)
        );
    }
    let entry = after(node.head().await.position.entry);
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    let pending = node.head().await.pending.unwrap();
    assert_eq!(ttl(&format!("e:{pending}")), -1);
    node.slice(commit(entry, "R", &["u:2"]), 1, true).await;
    assert!(ttl(&format!("e:{pending}")) > 0);
}

/// A user who left before the oldest kept notification has nothing left to see, and no data
/// remains.
#[tokio::test]
async fn a_membership_is_removed_once_its_events_have_expired() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            max_age: Duration::from_secs(1),
            ..Retention::default()
        },
    )
    .await
    .unwrap();
    let change = |group: &str, joins: bool| {
        let group = name(group);
        let change = if joins {
            RecipientChange::Join { group }
        } else {
            RecipientChange::Leave { group }
        };
        let node = node.clone();
        async move {
            node.broker
                .change_recipient(&name("1"), change)
                .await
                .unwrap()
        }
    };
    change("old", true).await;
    change("old", false).await;
    let groups = async || node.broker.recipient(&name("1")).await.unwrap().groups;
    assert!(groups().await.contains_key(&name("old")));
    until(async || groups().await.is_empty()).await;
    change("new", true).await;
    let fields: Vec<String> = server.command("HKEYS pointsman:user:1");
    let groups: Vec<&String> = fields.iter().filter(|f| f.starts_with("g:")).collect();
    assert_eq!(groups, ["g:new"]);
}

/// A new partition has no earlier events. Membership there starts at its beginning for members, and
/// not at all for users who had left.
#[tokio::test]
async fn a_partition_added_later_counts_from_its_beginning_for_members() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let change = async |change| {
        node.broker
            .change_recipient(&name("1"), change)
            .await
            .unwrap()
    };
    change(RecipientChange::Join {
        group: name("stays"),
    })
    .await;
    change(RecipientChange::Join {
        group: name("left"),
    })
    .await;
    change(RecipientChange::Leave {
        group: name("left"),
    })
    .await;
    let node = connect_to(
        &server.url(),
        &[SOURCE, "pointsman:more"],
        Retention::default(),
    )
    .await
    .unwrap();
    let groups = node.broker.recipient(&name("1")).await.unwrap().groups;
    let more = PartitionNumber(1);
    assert_eq!(groups[&name("stays")][&more], Span::default());
    assert!(!groups[&name("left")].contains_key(&more));
    // Leaving closes the span there as well.
    node.broker
        .change_recipient(
            &name("1"),
            RecipientChange::Leave {
                group: name("stays"),
            },
        )
        .await
        .unwrap();
    let groups = node.broker.recipient(&name("1")).await.unwrap().groups;
    assert_eq!(
        groups[&name("stays")][&more],
        Span {
            joined: BEGIN,
            left: Some(BEGIN)
        }
    );
}

/// The expiry of a key never takes effect for a log that is written to, and reaching its limit may
/// take years.
#[tokio::test]
async fn writing_to_a_log_removes_its_expired_entries() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.publish("young", &["u:1", "all"]).await;
    let long_ago = NotificationId::at_ms(node.head().await.now_ms - 8 * 24 * 3600 * 1000);
    let logs = ["u:1", "all"].map(|log| format!("{TAG}l:{log}"));
    for log in &logs {
        let () = server.command(&format!("ZADD {log} {long_ago} {long_ago}"));
    }
    node.publish("new", &["u:1"]).await;
    assert_eq!(
        logs.map(|log| server.command::<u32>(&format!("ZCARD {log}"))),
        [2, 2],
        "the expired entry left the log that was written to"
    );
}

/// If all requested entries of a log have expired, the log counts as absent instead of ending
/// silently.
#[tokio::test]
async fn a_log_with_only_expired_entries_counts_as_absent() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let id = node.publish("a", &["u:1"]).await;
    // The key epochs for the age that was configured when it was written.
    let () = server.command(&format!("HSET {TAG}meta max_age 1"));
    until(async || node.ids("u:1", BEGIN).await.is_empty()).await;
    let page = async |before| {
        node.broker
            .page(node.p, &target("u:1"), before, 10)
            .await
            .unwrap()
    };
    let missed = page(BEGIN).await;
    assert!(
        !missed.is_present && missed.is_last && missed.floor > id,
        "{missed:?}"
    );
    assert!(
        page(id).await.is_present,
        "a reader that has the entry has missed nothing"
    );
}

/// Otherwise a key would remain for every user who was ever in a group. A user who rejoins in time
/// must not be forgotten.
#[tokio::test]
async fn a_user_who_left_all_groups_is_forgotten_after_max_age() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let pttl = || server.command::<i64>("PTTL pointsman:user:ann");
    let change = async |change| {
        node.broker
            .change_recipient(&name("ann"), change)
            .await
            .expect("change")
    };
    let (join, leave) = (
        RecipientChange::Join { group: name("ops") },
        RecipientChange::Leave { group: name("ops") },
    );
    let age_ms = i64::try_from(Retention::default().max_age.as_millis()).expect("a week");
    change(join.clone()).await;
    assert_eq!(pttl(), -1, "a member");
    change(leave.clone()).await;
    assert!(pttl() > age_ms - 60_000 && pttl() <= age_ms, "{}", pttl());
    change(join).await;
    assert_eq!(pttl(), -1, "a member again");
    change(leave).await;
    change(RecipientChange::Attributes(
        [("plan".into(), Value::Text("pro".into()))].into(),
    ))
    .await;
    assert_eq!(pttl(), -1, "has attributes");
    change(RecipientChange::Attributes(Attributes::default())).await;
    assert!(pttl() > 0, "{}", pttl());
}

/// A join that reads all memberships makes a thousand of them cost a million reads.
#[tokio::test]
async fn joining_and_leaving_cost_the_same_commands_however_many_groups_a_user_has() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let commands = async |change| {
        let () = server.command("CONFIG RESETSTAT");
        node.broker
            .change_recipient(&name("ann"), change)
            .await
            .expect("change");
        let info: String = server.command("INFO commandstats");
        let count = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
            let n: u64 = rest.split_once(',')?.0.parse().ok()?;
            let is_ours = !name.starts_with("config") && !name.starts_with("client");
            is_ours.then(|| (name.to_owned(), n))
        };
        info.lines()
            .filter_map(count)
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    let join = async |group: String| {
        commands(RecipientChange::Join {
            group: name(&group),
        })
        .await
    };
    let leave = async |group: &str| commands(RecipientChange::Leave { group: name(group) }).await;
    join("0".into()).await;
    let (first, first_left) = (join("1".into()).await, leave("1").await);
    assert!(!first.contains_key("hgetall"), "{first:?}");
    for k in 2..500 {
        join(k.to_string()).await;
    }
    assert_eq!(join("500".into()).await, first);
    assert_eq!(leave("500").await, first_left);
    assert_eq!(server.command::<u32>("HGET pointsman:user:ann joined"), 499);
    assert_eq!(server.command::<u32>("HGET pointsman:user:ann left"), 2);
}
