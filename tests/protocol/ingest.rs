//! Ingest with owners that stall, are killed, race, and lose the replies to their commits. The log
//! keeps the order of the source and each entry has exactly one outcome, whichever owner processes
//! it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pointsman::broker::{Broker, Lease, Notice, Partitions as _, Sources as _};
use pointsman::event::{EntryId, NotificationId, Outcome, PartitionNumber};
use pointsman::ingest::pipeline::Pipeline;
use pointsman::ingest::worker::{Config, Ingest};
use pointsman::plugin::registry::Registry;
use pointsman::plugin::registry::rollout::CONFIRMED_FOR;
use pointsman::plugin::registry::settings::Config as Plugins;
use pointsman::telemetry::metrics::{Metrics, OutcomeLabel, SourceLabel};
use pointsman::telemetry::readiness::Readiness;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::faulty_broker::{At, Op, Puppet, Stop};
use super::fixture::{Client, SOURCE, Stage, now_ms, target, until};
use super::on_each_broker;
use crate::harness::engine;
use crate::harness::guests::core_module;
use crate::harness::node::Folder;

on_each_broker! {
    entries_read_by_a_stalled_owner_are_read_again_by_the_next,
    a_later_batch_never_overtakes_an_earlier_one,
    the_next_owner_continues_a_half_written_plan_and_does_not_plan_again,
    the_next_owner_continues_a_plan_with_slots_after_any_slice,
    four_owners_that_believe_they_hold_the_lease_commit_in_order_exactly_once,
    each_outcome_is_counted_once_when_requests_or_replies_are_lost,
    an_entry_without_an_id_is_never_a_duplicate,
    ten_thousand_named_users_do_not_disconnect_the_feed,
    a_slice_whose_reply_was_lost_is_written_once,
    each_entry_read_has_one_outcome_is_left_to_be_read_again_or_is_in_flight,
    events_that_wait_for_a_retry_are_left_to_the_next_owner,
    a_node_that_has_not_read_the_rollouts_lately_hands_its_source_over,
}

/// A pipeline with the bundled plugin `address`, which routes events to the recipients that they
/// name.
pub(super) fn address() -> Pipeline {
    static PIPELINE: OnceLock<(Pipeline, Folder)> = OnceLock::new();
    let (pipeline, _) = PIPELINE.get_or_init(|| {
        let folder = Folder::new();
        std::fs::write(folder.path().join("address.wasm"), core_module("address"))
            .expect("write a plugin");
        (pipeline(Some(&folder)), folder)
    });
    pipeline.clone()
}

fn pipeline(folder: Option<&Folder>) -> Pipeline {
    let config = Plugins {
        dir: folder.map(|folder| folder.path().to_owned()),
        ..Plugins::default()
    };
    let registry = Registry::load(engine(), config, Metrics::default()).expect("plugins");
    Pipeline::start(Arc::new(registry), true, Metrics::default()).expect("threads")
}

/// A running owner of one partition.
pub(super) struct Owner {
    task: JoinHandle<()>,
    shutdown: CancellationToken,
    counts: Counts,
}

/// The counters of one owner, as `/metrics` shows them.
#[derive(Clone)]
struct Counts {
    metrics: Metrics,
    source: SourceLabel,
}

impl Counts {
    fn read(&self) -> u64 {
        self.metrics.events_read.get_or_create(&self.source).get()
    }

    fn reread(&self) -> u64 {
        self.metrics.events_reread.get_or_create(&self.source).get()
    }

    fn outcomes(&self) -> u64 {
        Outcome::ALL
            .iter()
            .map(|outcome| {
                self.metrics
                    .events
                    .get_or_create(&OutcomeLabel {
                        outcome: outcome.as_str(),
                    })
                    .get()
            })
            .sum()
    }

    /// Entries read that have no outcome yet and were not left to be read again.
    fn in_flight(&self) -> u64 {
        self.read()
            .checked_sub(self.outcomes() + self.reread())
            .expect("no entry is counted twice")
    }
}

impl Owner {
    fn start(broker: &Arc<Puppet>, name: &str, pipeline: Pipeline) -> Self {
        Self::start_on(broker, broker.partitions()[0].number, name, pipeline)
    }

    pub(super) fn start_on(
        broker: &Arc<Puppet>,
        number: PartitionNumber,
        name: &str,
        pipeline: Pipeline,
    ) -> Self {
        let metrics = Metrics::default();
        let broker = Arc::clone(broker) as Arc<dyn Broker>;
        let partition = broker
            .partitions()
            .iter()
            .find(|partition| partition.number == number)
            .expect("the partition exists")
            .clone();
        let counts = Counts {
            metrics: metrics.clone(),
            source: SourceLabel {
                source: partition.source.clone(),
            },
        };
        let config = Config {
            lease_ttl: Duration::from_millis(300),
            ..Config::default()
        };
        let ingest = Ingest {
            broker,
            pipeline,
            metrics,
            config,
            readiness: Readiness::default(),
            node: name.to_owned(),
        };
        let shutdown = CancellationToken::new();
        Self {
            task: tokio::spawn(ingest.run(partition, shutdown.clone())),
            shutdown,
            counts,
        }
    }

    /// Ends the owner like `kill -9`: at any point, without releasing its lease.
    pub(super) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.is_err_and(|error| error.is_cancelled()));
        assert_eq!(self.counts.in_flight(), 0);
    }

    pub(super) async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("the owner stops");
        assert_eq!(self.counts.in_flight(), 0);
    }
}

fn field(name: &str, value: &str) -> (Bytes, Bytes) {
    (
        Bytes::copy_from_slice(name.as_bytes()),
        Bytes::copy_from_slice(value.as_bytes()),
    )
}

/// Appends events for everyone with these ids.
async fn append(stage: &Stage, ids: &[String]) {
    for some in ids.chunks(256) {
        let entries = some
            .iter()
            .map(|id| {
                vec![
                    field("type", "t"),
                    field("id", id),
                    field("everyone", "true"),
                ]
            })
            .collect();
        stage
            .puppet
            .broker
            .append(stage.p, entries)
            .await
            .expect("append");
    }
}

fn ids(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|k| format!("e{k}")).collect()
}

/// Waits until nothing is left beyond the position, then compares the log of everyone. It also
/// checks that no entry had a second outcome: a second commit would be counted as a duplicate.
async fn committed_once(stage: &Stage, expect: &[String]) {
    let count = drained(stage).await;
    assert_eq!(stage.log("all").await, expect);
    assert_eq!(
        (count(Outcome::Committed), count(Outcome::Duplicate)),
        (expect.len() as u64, 0)
    );
}

/// Waits until nothing is left beyond the position, and returns the count of each outcome.
async fn drained(stage: &Stage) -> impl Fn(Outcome) -> u64 {
    until("every entry is processed", async || {
        stage
            .puppet
            .broker
            .state(stage.p)
            .await
            .is_ok_and(|state| state.lag == 0)
    })
    .await;
    let outcomes = stage
        .puppet
        .broker
        .state(stage.p)
        .await
        .expect("state")
        .outcomes;
    move |outcome: Outcome| outcomes.get(&outcome).copied().unwrap_or(0)
}

/// A has read 1 to 10, then reads 11 to 20 ahead and stalls; its lease expires and B takes over.
/// When A resumes, nothing that it holds may be committed, and no entry that only A has read may be
/// lost.
async fn entries_read_by_a_stalled_owner_are_read_again_by_the_next(stage: Stage) {
    let (a, b) = (stage.another().await, stage.another().await);
    let mut stop = a.stop(At::Before(Op::Commit));
    append(&stage, &ids(0..10)).await;
    let stalled = Owner::start(&a, "a", address());
    stop.reached().await;
    // A reads ahead and then stalls completely; it does not renew its lease either.
    let mut lease = a.stop(At::Before(Op::Lease));
    append(&stage, &ids(10..20)).await;
    lease.reached().await;
    let next = Owner::start(&b, "b", address());
    drop(drained(&stage).await);
    stop.go();
    lease.go();
    append(&stage, &ids(20..30)).await;
    committed_once(&stage, &ids(0..30)).await;
    until("the commits of the stalled owner are refused", async || {
        stalled.counts.reread() >= 10
    })
    .await;
    stalled.stop().await;
    next.stop().await;
}

/// The commit of 1 to 10 is lost while 11 to 20 have been read and wait behind it. A check for
/// "newer than the position" would accept the second batch.
async fn a_later_batch_never_overtakes_an_earlier_one(stage: Stage) {
    let a = stage.another().await;
    let mut stop = a.stop(At::Before(Op::Commit));
    append(&stage, &ids(0..10)).await;
    let owner = Owner::start(&a, "a", address());
    stop.reached().await;
    let mut read = a.stop(At::After(Op::Read));
    append(&stage, &ids(10..20)).await;
    read.reached().await;
    read.go();
    stop.fail();
    committed_once(&stage, &ids(0..20)).await;
    owner.stop().await;
}

/// The logs are rolled back to 5 and the source is not, as if it lay on another primary, while the
/// owner holds 9 and 10. If their commit were accepted over the hole, 6 to 8 would be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fail_over_that_rolls_back_the_logs_leaves_no_hole() {
    let stage = Stage::redis().await;
    let a = stage.another().await;
    let owner = Owner::start(&a, "a", address());
    append(&stage, &ids(0..5)).await;
    drop(drained(&stage).await);
    stage.server().snapshot();
    append(&stage, &ids(5..8)).await;
    drop(drained(&stage).await);
    let mut stop = a.stop(At::Before(Op::Commit));
    append(&stage, &ids(8..10)).await;
    stop.reached().await;
    stage.server().fail_over_but(SOURCE);
    stop.go();
    committed_once(&stage, &ids(0..10)).await;
    owner.stop().await;
}

/// The owner dies after slice 0 of a plan. The next owner has other plugins, which would plan the
/// event differently or not at all; planning again would deliver half of each plan.
async fn the_next_owner_continues_a_half_written_plan_and_does_not_plan_again(stage: Stage) {
    let (a, b) = (stage.another().await, stage.another().await);
    let began_ms = now_ms();
    let mut stop = a.stop(At::After(Op::Slice));
    let users: Vec<String> = (0..2_500).map(|k| format!("user{k}")).collect();
    let large = vec![
        field("type", "t"),
        field("id", "large"),
        field("users", &users.join(",")),
    ];
    stage
        .puppet
        .broker
        .append(stage.p, vec![large])
        .await
        .expect("append");
    let owner = Owner::start(&a, "a", address());
    stop.reached().await;
    owner.kill().await;
    let pending = stage.head().await.pending.expect("a plan is half-written");
    // This owner has no plugins and routes nothing.
    let next = Owner::start(&b, "b", pipeline(None));
    append(&stage, &ids(0..1)).await;
    let count = drained(&stage).await;
    assert_eq!(
        (count(Outcome::Committed), count(Outcome::Unrouted)),
        (1, 1)
    );
    for user in &users {
        let page = stage
            .puppet
            .broker
            .page(
                stage.p,
                &target(&format!("u:{user}")),
                NotificationId(0),
                10,
            )
            .await
            .expect("page");
        assert_eq!(
            page.entries.iter().map(|entry| entry.0).collect::<Vec<_>>(),
            [pending],
            "{user}"
        );
    }
    assert_eq!(
        (stage.head().await.pending, stage.head().await.last),
        (None, pending)
    );
    // The owner that finished the plan did not make it: the decision names the plugins that did,
    // and their time.
    let decisions = stage
        .puppet
        .broker
        .decisions(stage.p, 10)
        .await
        .expect("decisions");
    let (.., made) = decisions
        .iter()
        .find(|(_, _, id, _)| *id == Some(pending))
        .expect("a decision");
    assert_eq!(
        made.verdicts
            .iter()
            .map(|said| (said.plugin.as_str(), said.verdict.as_str()))
            .collect::<Vec<_>>(),
        [("address", "routes")]
    );
    assert!((began_ms..=now_ms()).contains(&made.clock_ms), "{made:?}");
    next.stop().await;
}

/// A pipeline that routes each event to the recipients that it names, in two slots.
fn in_two_slots() -> Pipeline {
    static PIPELINE: OnceLock<(Pipeline, Folder)> = OnceLock::new();
    let (pipeline, _) = PIPELINE.get_or_init(|| {
        let folder = Folder::new();
        std::fs::write(folder.path().join("rules.wasm"), core_module("rules"))
            .expect("write a plugin");
        let rule = |slot: &str| {
            format!("[[plugins.rules.config.rules]]\nto.users = ['{{/users}}']\nslot = '{slot}'\n")
        };
        // The deadline is long, so that a busy machine does not fail the test.
        let text = format!(
            "[plugins.rules]\ndeadline = '1s'\n{}{}",
            rule("summary"),
            rule("detail")
        );
        let config: toml::Table = toml::from_str(&text).expect("TOML");
        let plugins = Plugins {
            dir: Some(folder.path().to_owned()),
            ..config["plugins"].clone().try_into().expect("a section")
        };
        let registry = Registry::load(engine(), plugins, Metrics::default()).expect("plugins");
        let pipeline = Pipeline::start(Arc::new(registry), true, Metrics::default());
        (pipeline.expect("threads"), folder)
    });
    pipeline.clone()
}

/// Users of a plan with two slots: the third of five slices has targets of both.
const N_IN_SLOTS: usize = 2_250;

/// Appends an event for all of them.
async fn append_for_slots(stage: &Stage, id: &str) {
    let users: Vec<String> = (0..N_IN_SLOTS).map(|k| format!("user{k}")).collect();
    let data = serde_json::json!({ "users": users }).to_string();
    let large = vec![
        field("type", "t"),
        field("id", id),
        field("datacontenttype", "application/json"),
        field("data", &data),
    ];
    let appended = stage.puppet.broker.append(stage.p, vec![large]).await;
    appended.expect("append");
}

/// Asserts that the newest of each user's `n_events` events are the notifications of both slots, with
/// ids that follow each other, and that nothing is there twice.
async fn assert_both_slots(stage: &Stage, first: NotificationId, n_events: usize) {
    let both = [first, NotificationId(first.0 + 1)];
    for k in 0..N_IN_SLOTS {
        let log = target(&format!("u:user{k}"));
        let page = stage
            .puppet
            .broker
            .page(stage.p, &log, NotificationId(0), 10);
        let page = page.await.expect("page");
        let ids: Vec<NotificationId> = page.entries.iter().map(|entry| entry.0).collect();
        assert_eq!(ids.len(), 2 * n_events, "user{k}");
        assert_eq!(ids[ids.len() - 2..], both, "user{k}");
    }
    let records = stage.puppet.broker.records(stage.p, &both).await;
    let slots = records.expect("records").into_iter().map(|record| {
        let record: serde_json::Value =
            serde_json::from_slice(&record.expect("a record")).expect("JSON");
        record["plan"][0]["slot"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    });
    assert_eq!(slots.collect::<Vec<_>>(), ["summary", "detail"]);
}

/// Lets an owner that has stopped after a slice write `n` more.
async fn after_slices(owner: &Puppet, mut stop: Stop, n: usize) -> Stop {
    for _ in 0..n {
        let next = owner.stop(At::After(Op::Slice));
        stop.go();
        stop = next;
        stop.reached().await;
    }
    stop
}

/// The owner dies after each of the slices in turn, of which one has targets of both slots. The next
/// owner, which has no plugins, completes both notifications.
async fn the_next_owner_continues_a_plan_with_slots_after_any_slice(stage: Stage) {
    let a = stage.another().await;
    for n_written in 1..=4_usize {
        let b = stage.another().await;
        let mut stop = a.stop(At::After(Op::Slice));
        append_for_slots(&stage, &format!("large{n_written}")).await;
        let owner = Owner::start(&a, "a", in_two_slots());
        stop.reached().await;
        let stop = after_slices(&a, stop, n_written - 1).await;
        owner.kill().await;
        drop(stop);
        let head = stage.head().await;
        assert_eq!(head.position.slices as usize, n_written);
        let pending = head.pending.expect("a plan is half-written");
        let next = Owner::start(&b, "b", pipeline(None));
        let count = drained(&stage).await;
        assert_eq!(count(Outcome::Committed), n_written as u64);
        next.stop().await;
        let decisions = stage.puppet.broker.decisions(stage.p, 1).await;
        let (_, _, first, made) = decisions.expect("decisions").remove(0);
        let first = first.expect("it was committed");
        // Until the end, the pending id is that of the last slot.
        assert_eq!(pending, NotificationId(first.0 + 1));
        assert_eq!(made.slots, ["summary", "detail"]);
        assert_both_slots(&stage, first, n_written).await;
    }
}

/// A fail-over takes back the second half of a plan with slots, or all of it. The owner goes on and
/// every user gets both notifications.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fail_over_within_a_plan_with_slots_loses_and_repeats_neither() {
    for n_kept in [0, 1, 3_usize] {
        let stage = Stage::redis().await;
        let a = stage.another().await;
        append_for_slots(&stage, "large").await;
        if n_kept == 0 {
            stage.server().snapshot();
        }
        let mut stop = a.stop(At::After(Op::Slice));
        let owner = Owner::start(&a, "a", in_two_slots());
        stop.reached().await;
        if n_kept > 0 {
            stop = after_slices(&a, stop, n_kept - 1).await;
            stage.server().snapshot();
            stop = after_slices(&a, stop, 2).await;
        }
        stage.server().fail_over();
        stop.go();
        // The connection stays open, so that an owner without anything to commit would not notice.
        let next = vec![field("type", "t"), field("id", "next")];
        let appended = stage.puppet.broker.append(stage.p, vec![next]).await;
        appended.expect("append");
        let count = drained(&stage).await;
        assert_eq!(
            (count(Outcome::Committed), count(Outcome::Unrouted)),
            (1, 1),
            "{n_kept} slices kept"
        );
        let decisions = stage.puppet.broker.decisions(stage.p, 9).await;
        let decisions = decisions.expect("decisions");
        // Newest first.
        let [_, (_, _, Some(first), made)] = &decisions[..] else {
            panic!("not two decisions: {decisions:?}")
        };
        assert_eq!(made.slots, ["summary", "detail"]);
        assert_both_slots(&stage, *first, 1).await;
        owner.stop().await;
    }
}

/// Four complete owners, each with its own plugins and batches, all believe that they hold the
/// lease. The compare-and-set of the position keeps them correct.
async fn four_owners_that_believe_they_hold_the_lease_commit_in_order_exactly_once(stage: Stage) {
    const ENTRIES: usize = 600;
    let mut owners = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let broker = stage.another().await;
        broker.everyone_owns();
        owners.push(Owner::start(&broker, name, address()));
    }
    for some in ids(0..ENTRIES).chunks(40) {
        append(&stage, some).await;
        tokio::task::yield_now().await;
    }
    committed_once(&stage, &ids(0..ENTRIES)).await;
    assert!(
        owners.iter().any(|owner| owner.counts.reread() > 0),
        "no owner lost a race"
    );
    for owner in owners {
        owner.stop().await;
    }
}

/// Dead letters, counters and decision records are written together with the position or not at
/// all. Written separately, a retry after a lost reply would write them twice, and a killed node
/// never.
async fn each_outcome_is_counted_once_when_requests_or_replies_are_lost(stage: Stage) {
    const ROUNDS: u64 = 5;
    let a = stage.another().await;
    let n_asked = Arc::new(AtomicUsize::new(0));
    let asked = Arc::clone(&n_asked);
    // In turn: nothing is lost, the request is lost, the reply is lost.
    a.lose(move |at| match at {
        At::Before(Op::Commit) => asked.fetch_add(1, Ordering::Relaxed) % 3 == 1,
        At::After(Op::Commit) => asked.load(Ordering::Relaxed).is_multiple_of(3),
        _ => false,
    });
    let owner = Owner::start(&a, "a", address());
    for round in 0..ROUNDS {
        let id = format!("e{round}");
        let entries = vec![
            vec![field("type", "t"), field("id", &id), field("user", "ann")],
            vec![field("type", "t"), field("id", &id), field("user", "ann")],
            vec![field("type", "t"), field("id", &format!("{id} unrouted"))],
            vec![field("user", "a type is missing")],
        ];
        stage
            .puppet
            .broker
            .append(stage.p, entries)
            .await
            .expect("append");
        let count = drained(&stage).await;
        for outcome in [
            Outcome::Committed,
            Outcome::Duplicate,
            Outcome::Unrouted,
            Outcome::DeadLettered,
        ] {
            assert_eq!(count(outcome), round + 1, "{outcome:?}");
        }
    }
    assert!(
        n_asked.load(Ordering::Relaxed) > ROUNDS as usize,
        "nothing was lost"
    );
    let letters = stage
        .puppet
        .broker
        .dead_letters(stage.p, EntryId::default(), 100)
        .await
        .expect("dead letters");
    assert_eq!(letters.len() as u64, ROUNDS);
    assert_eq!(
        stage
            .puppet
            .broker
            .decisions(stage.p, 100)
            .await
            .expect("decisions")
            .len() as u64,
        4 * ROUNDS
    );
    assert_eq!(stage.log("u:ann").await.len() as u64, ROUNDS);
    owner.stop().await;
}

/// Without an id, a retry cannot be recognised: equal entries are separate events.
async fn an_entry_without_an_id_is_never_a_duplicate(stage: Stage) {
    let a = stage.another().await;
    let owner = Owner::start(&a, "a", address());
    let same = vec![field("type", "t"), field("user", "ann"), field("data", "1")];
    stage
        .puppet
        .broker
        .append(stage.p, vec![same.clone(), same.clone(), same])
        .await
        .expect("append");
    let count = drained(&stage).await;
    assert_eq!(
        (count(Outcome::Committed), count(Outcome::Duplicate)),
        (3, 0)
    );
    owner.stop().await;
}

/// 10,000 notices with a large body would overflow the notice connection of every node, which would
/// then receive none of them. Notices are therefore small references, and the plan is written in
/// slices so that no commit takes long.
async fn ten_thousand_named_users_do_not_disconnect_the_feed(stage: Stage) {
    let hub = stage.hub();
    let mut first = Client::live(&hub, "0").await;
    let mut last = Client::live(&hub, "9999").await;
    let a = stage.another().await;
    let n_slices = Arc::new(AtomicUsize::new(0));
    let slices = Arc::clone(&n_slices);
    a.lose(move |at| {
        slices.fetch_add(usize::from(at == At::Before(Op::Slice)), Ordering::Relaxed);
        false
    });
    let owner = Owner::start(&a, "a", address());
    let users: Vec<String> = (0..10_000).map(|k: u32| k.to_string()).collect();
    let data = format!("\"{}\"", "x".repeat(120_000));
    let large = vec![
        field("type", "t"),
        field("id", "large"),
        field("users", &users.join(",")),
        field("data", &data),
    ];
    stage
        .puppet
        .broker
        .append(stage.p, vec![large])
        .await
        .expect("append");
    drop(drained(&stage).await);
    let letters = stage
        .puppet
        .broker
        .dead_letters(stage.p, EntryId::default(), 1)
        .await
        .expect("dead letters");
    assert!(letters.is_empty(), "{}", letters[0].why.reason);
    first.expect(&["large"]).await;
    last.expect(&["large"]).await;
    assert_eq!(n_slices.load(Ordering::Relaxed), 10);
    assert_eq!(stage.metrics.feed_resets.get(), 0);
    owner.stop().await;
}

/// The third slice is written and its reply is lost. Writing it again would add the event twice to
/// each of its logs.
async fn a_slice_whose_reply_was_lost_is_written_once(stage: Stage) {
    let hub = stage.hub();
    let mut client = Client::live(&hub, "user2400").await;
    let n_heard = Arc::new(AtomicUsize::new(0));
    let heard = Arc::clone(&n_heard);
    stage
        .puppet
        .sift(move |notice, _| {
            heard.fetch_add(
                usize::from(matches!(notice, Notice::Append { .. })),
                Ordering::Relaxed,
            );
            super::faulty_broker::Fate::Pass
        })
        .await;
    let a = stage.another().await;
    let mut n_slices = 0;
    a.lose(move |at| {
        n_slices += usize::from(at == At::After(Op::Slice));
        at == At::After(Op::Slice) && n_slices == 3
    });
    let owner = Owner::start(&a, "a", address());
    let users: Vec<String> = (0..3_500).map(|k| format!("user{k}")).collect();
    let large = vec![
        field("type", "t"),
        field("id", "large"),
        field("users", &users.join(",")),
    ];
    stage
        .puppet
        .broker
        .append(
            stage.p,
            vec![
                large,
                vec![
                    field("type", "t"),
                    field("id", "next"),
                    field("user", "user2400"),
                ],
            ],
        )
        .await
        .expect("append");
    let count = drained(&stage).await;
    assert_eq!(count(Outcome::Committed), 2);
    client.expect(&["large", "next"]).await;
    assert_eq!(n_heard.load(Ordering::Relaxed), 2, "one notice per event");
    owner.stop().await;
}

/// Redis refuses writes for a while, because replicas are missing or because it became a replica
/// itself. The owner waits; the event in progress does not fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_refuses_writes_delays_events_and_fails_none() {
    let stage = Stage::redis().await;
    let a = stage.another().await;
    let owner = Owner::start(&a, "a", address());
    let causes = [
        (
            "CONFIG SET min-replicas-to-write 1",
            "CONFIG SET min-replicas-to-write 0",
        ),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    ];
    for (k, (begin, end)) in causes.into_iter().enumerate() {
        let mut stop = a.stop(At::Before(Op::Commit));
        append(&stage, &ids(k..k + 1)).await;
        stop.reached().await;
        let () = stage.server().command(begin);
        let n_before = owner.counts.metrics.broker_errors.get();
        stop.go();
        until("the commit is refused repeatedly", async || {
            owner.counts.metrics.broker_errors.get() >= n_before + 2
        })
        .await;
        let () = stage.server().command(end);
        committed_once(&stage, &ids(0..k + 1)).await;
    }
    assert!(
        stage
            .puppet
            .broker
            .dead_letters(stage.p, EntryId::default(), 1)
            .await
            .expect("dead letters")
            .is_empty()
    );
    owner.stop().await;
}

/// The sum that operators check: entries read equal the five outcomes plus those in flight plus
/// those left to be read again, wherever an owner stops.
async fn each_entry_read_has_one_outcome_is_left_to_be_read_again_or_is_in_flight(stage: Stage) {
    let (a, b) = (stage.another().await, stage.another().await);
    let counts = |owner: &Owner| {
        (
            owner.counts.read(),
            owner.counts.outcomes(),
            owner.counts.reread(),
            owner.counts.in_flight(),
        )
    };
    let entries = (0..10).map(|k| match k {
        0..5 => vec![
            field("type", "t"),
            field("id", &k.to_string()),
            field("everyone", "true"),
        ],
        5 => vec![
            field("type", "t"),
            field("id", "0"),
            field("everyone", "true"),
        ],
        6..8 => vec![field("type", "t"), field("id", &k.to_string())],
        _ => vec![field("a type", "is missing")],
    });
    stage
        .puppet
        .broker
        .append(stage.p, entries.collect())
        .await
        .expect("append");
    let mut stop = a.stop(At::Before(Op::Commit));
    let first = Owner::start(&a, "a", address());
    stop.reached().await;
    assert_eq!(counts(&first), (10, 0, 0, 10));
    // The commit request is lost, then sent again.
    let mut again = a.stop(At::Before(Op::Commit));
    stop.fail();
    again.reached().await;
    assert_eq!(counts(&first), (20, 0, 10, 10));
    // The commit is written and its reply is lost: this owner does not know the outcomes.
    let mut answer = a.stop(At::After(Op::Commit));
    again.go();
    answer.reached().await;
    answer.fail();
    until(
        "the owner leaves the entries to be read again",
        async || first.counts.in_flight() == 0,
    )
    .await;
    assert_eq!(counts(&first), (20, 0, 20, 0));
    // Killed in the middle of a plan.
    let mut slice = a.stop(At::After(Op::Slice));
    let users: Vec<String> = (0..2_500).map(|k| format!("user{k}")).collect();
    let large = vec![
        field("type", "t"),
        field("id", "large"),
        field("users", &users.join(",")),
    ];
    stage
        .puppet
        .broker
        .append(stage.p, vec![large])
        .await
        .expect("append");
    slice.reached().await;
    assert_eq!(counts(&first), (21, 0, 20, 1));
    let of_the_first = first.counts.clone();
    first.kill().await;
    assert_eq!((of_the_first.reread(), of_the_first.in_flight()), (21, 0));
    // The owner that continues the plan has read the entry as well and counts its outcome.
    let second = Owner::start(&b, "b", address());
    append(&stage, &ids(20..30)).await;
    let count = drained(&stage).await;
    until("the last commit is answered", async || {
        second.counts.in_flight() == 0
    })
    .await;
    assert_eq!(counts(&second), (11, 11, 0, 0));
    assert_eq!(
        Outcome::ALL.map(&count),
        [16, 0, 2, 1, 2, 0],
        "of 21 entries"
    );
    second.stop().await;
}

/// The owner has read up to 50 when Redis fails over to position 40 with the source at 45; 46 to 50
/// are then issued again. A commit of 41 to 50 matches position 40 and would put the position ahead
/// of the source, so that new entries there would never be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_read_before_a_fail_over_is_not_committed_after_it() {
    let stage = Stage::redis().await;
    let a = stage.another().await;
    append(&stage, &ids(0..5)).await;
    stage.server().snapshot();
    append(&stage, &ids(5..10)).await;
    let mut stop = a.stop(At::Before(Op::Commit));
    let owner = Owner::start(&a, "a", address());
    stop.reached().await;
    stage.server().fail_over();
    stop.go();
    committed_once(&stage, &ids(0..5)).await;
    append(&stage, &ids(20..25)).await;
    committed_once(&stage, &[ids(0..5), ids(20..25)].concat()).await;
    assert_eq!(
        stage
            .puppet
            .broker
            .state(stage.p)
            .await
            .expect("state")
            .trimmed_unread,
        0
    );
    owner.stop().await;
}

/// A node that was stopped may come back with a version that was withdrawn meanwhile. The others no
/// longer wait for it, so it must not decide before it has read the roll-outs again.
async fn a_node_that_has_not_read_the_rollouts_lately_hands_its_source_over(stage: Stage) {
    let folder = Folder::new();
    std::fs::write(folder.path().join("address.wasm"), core_module("address"))
        .expect("write a plugin");
    let pipeline = pipeline(Some(&folder));
    let registry = Arc::clone(pipeline.registry());
    registry.require_rollouts();
    let a = stage.another().await;
    let is_left = async || {
        let lease = stage
            .puppet
            .broker
            .lease(stage.p, "other", Duration::from_secs(60));
        lease.await.expect("lease") == Lease::Mine
    };
    let hand_back = async || {
        let released = stage.puppet.broker.release(stage.p, "other");
        released.await.expect("release");
    };
    // Before it has read them for the first time.
    append(&stage, &ids(0..1)).await;
    let owner = Owner::start(&a, "a", pipeline);
    assert!(is_left().await);
    hand_back().await;
    registry.confirm_rollouts(Instant::now());
    committed_once(&stage, &ids(0..1)).await;
    // And when that was too long ago.
    let long_ago = Instant::now().checked_sub(CONFIRMED_FOR);
    registry.confirm_rollouts(long_ago.expect("the machine runs for longer"));
    append(&stage, &ids(1..2)).await;
    until("the source is left to another node", is_left).await;
    let state = stage.puppet.broker.state(stage.p).await.expect("state");
    assert_eq!(state.lag, 1);
    hand_back().await;
    registry.confirm_rollouts(Instant::now());
    committed_once(&stage, &ids(0..2)).await;
    owner.stop().await;
}

/// Retries are in the broker, not in the owner: it stops at once, and the next one appends what is
/// due.
async fn events_that_wait_for_a_retry_are_left_to_the_next_owner(stage: Stage) {
    let (a, b) = (stage.another().await, stage.another().await);
    let folder = Folder::new();
    std::fs::write(folder.path().join("unruly.wasm"), core_module("unruly"))
        .expect("write a plugin");
    let entries = ids(0..20)
        .iter()
        .map(|id| {
            vec![
                field("type", "retry"),
                field("id", id),
                field("everyone", "true"),
            ]
        })
        .collect();
    stage
        .puppet
        .broker
        .append(stage.p, entries)
        .await
        .expect("append");
    // Keeps its lease, but its renewals append nothing.
    a.lose({
        let mut n_leases = 0;
        move |at| {
            n_leases += usize::from(at == At::Before(Op::Lease));
            at == At::Before(Op::Lease) && n_leases > 1
        }
    });
    let owner = Owner::start(&a, "a", pipeline(Some(&folder)));
    until("every event waits for a retry", async || {
        let state = stage.puppet.broker.state(stage.p).await.expect("state");
        state.retrying == 20 && state.lag == 0
    })
    .await;
    owner.stop().await;
    assert!(
        matches!(
            b.lease(stage.p, "b", Duration::from_millis(1)).await,
            Ok(Lease::Mine)
        ),
        "the lease is released"
    );
    let next = Owner::start(&b, "b", address());
    until("every event is committed", async || {
        let state = stage.puppet.broker.state(stage.p).await.expect("state");
        state.retrying == 0 && state.lag == 0
    })
    .await;
    committed_once(&stage, &ids(0..20)).await;
    next.stop().await;
}
