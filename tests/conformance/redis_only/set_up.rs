//! What a Redis must be like, what sources may be called, how partitions get their numbers, and when things expire.

use super::*;
use pointsman::broker::{RecipientChange, Span};
use pointsman::event::Value;

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
async fn a_redis_as_it_should_be_gives_no_finding() {
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

/// When memory is short, such a Redis removes the keys that say what was done: the position, publishers' ids, logs.
#[tokio::test]
async fn f07_a_redis_that_may_evict_is_refused_with_the_fix() {
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

/// Each right is asked for by itself, without running the command.
#[tokio::test]
async fn missing_rights_are_named_with_the_grant() {
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
        ("-config resetchannels &other", "&{pointsman:events}:*"),
        (
            "allchannels resetkeys ~pointsman:events",
            "~{pointsman:events}:*",
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

/// The feed gives user and password, too.
#[tokio::test]
async fn a_password_is_given_on_every_connection() {
    let server = RedisServer::start();
    let () = server.command("ACL SETUSER app on >secret ~* &* +@all");
    let () = server.command("ACL SETUSER default off");
    let at = |who: &str| format!("redis://{who}127.0.0.1:{}/", server.port());
    let node = connect_to(&at("app:secret@"), &[SOURCE], Retention::default())
        .await
        .unwrap();
    let mut ear = node.ear().await;
    ear.hear("u:1", 1).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(ear.append().await, ("u:1".into(), id));
    node.append(&["a"]).await;
    assert_eq!(drain(&node).await, 1);
    for who in ["app:wrong@", ""] {
        match connect_to(&at(who), &[SOURCE], Retention::default()).await {
            Err(Error::Refused(why)) => assert!(
                why.contains("correct user and password in the URL"),
                "{why}"
            ),
            other => panic!("{who}: {:?}", other.map(|node| node.broker)),
        }
    }
}

#[tokio::test]
async fn sources_that_cannot_have_keys_of_their_own_are_refused() {
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
            Err(Error::Refused(why)) => assert!(why.contains("another key"), "{why}"),
            other => panic!("{sources:?}: {:?}", other.map(|node| node.broker)),
        }
    }
    assert!(matches!(
        connect_to("http://127.0.0.1/", &[SOURCE], Retention::default()).await,
        Err(Error::Refused(_))
    ));
    connect_to(
        &server.url(),
        &["a{b", "{t}x", "{t}y", "a"],
        Retention::default(),
    )
    .await
    .expect("these will do");
}

/// A cursor names partitions by number: one that was removed from the configuration keeps its own, and a new one gets another.
#[tokio::test]
async fn numbers_are_given_once_and_never_again() {
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
    // The list of numbers is lost; the partitions remember their own.
    let () = server.command("DEL pointsman:partitions");
    assert_eq!(
        numbers(&["c", "b"]).await.unwrap(),
        of(&[("b", 0), ("c", 2)])
    );
    for k in 3..12 {
        assert_eq!(numbers(&[&format!("more{k}")]).await.unwrap()[0].1, k);
    }
    assert!(
        matches!(numbers(&["one too many"]).await, Err(Error::Refused(why)) if why.contains("12"))
    );
}

/// Pub/Sub knows no databases: without a name of its own for each, one installation would hear the other's notices.
#[tokio::test]
async fn another_database_is_another_installation() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let other = connect_to(
        &format!("{}1", server.url()),
        &[SOURCE],
        Retention::default(),
    )
    .await
    .unwrap();
    let (mut ear, mut other_ear) = (node.ear().await, other.ear().await);
    ear.hear("u:1", 1).await;
    other_ear.hear("u:1", 1).await;
    let theirs = other.publish("R", &["u:1"]).await;
    let ours = node.publish("R", &["u:1"]).await;
    assert_eq!(ear.append().await.1, ours);
    assert_eq!(other_ear.append().await.1, theirs);
}

/// 2 % after the age, so that the floor has passed an entry before it goes; a plan that is not complete does not expire under its owner.
#[tokio::test]
async fn h08_records_and_logs_expire_after_the_age_and_a_pending_plan_never() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            max_age_s: 1_000,
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

/// Who left longer ago than anything is kept has nothing left to see, and leaves nothing behind.
#[tokio::test]
async fn a_membership_goes_when_what_it_let_in_has_gone() {
    let server = RedisServer::start();
    let node = connect_to(
        &server.url(),
        &[SOURCE],
        Retention {
            max_age_s: 1,
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
    assert_eq!(fields, ["g:new"]);
}

/// A new partition has nothing from before it; its members are members from its beginning, and who had left is none there.
#[tokio::test]
async fn a_partition_added_later_is_the_members_from_its_beginning() {
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

/// The expiry of the key never comes for a log that is written to, and its cap may be years away.
#[tokio::test]
async fn writing_to_a_log_removes_what_is_too_old() {
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
        "the old one went from the log that was written to"
    );
}

/// A log of which nothing that is asked for is young enough ends like one that is gone, and not in silence.
#[tokio::test]
async fn a_log_of_which_all_is_too_old_is_as_good_as_gone() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let id = node.publish("a", &["u:1"]).await;
    // The key lives for as long as the age was when it was written.
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
    assert!(page(id).await.is_present, "who had it has missed nothing");
}

/// Or there would be a key for everybody who ever was in a group; and whoever comes back in time must not be forgotten all the same.
#[tokio::test]
async fn who_left_all_groups_is_forgotten_after_the_age() {
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
    let age_ms = i64::try_from(Retention::default().max_age_s).expect("a week") * 1000;
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
    change(RecipientChange::Attributes([].into())).await;
    assert!(pttl() > 0, "{}", pttl());
}
