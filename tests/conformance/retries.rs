//! Guarantees of events for which a plugin requested a retry: they wait apart from dead letters,
//! become entries again once due, one step each, and carry their attempts.

use super::*;
use pointsman::broker::{DeadLetter, Entry, Lease, PartitionState, RetryPolicy};
use pointsman::event::Retry;

const BEGIN: EntryId = EntryId { ms: 0, seq: 0 };
const LONG: Duration = Duration::from_secs(60);
const PATIENT: RetryPolicy = RetryPolicy {
    retries: 5,
    timeout: Duration::from_secs(3_600),
};

/// The item of an entry for which a plugin requested a retry.
pub(super) fn retry(entry: &Entry, policy: RetryPolicy) -> Item {
    let why = DeadReason {
        reason: "the fee is not known yet".into(),
        plugin: Some("parcels".into()),
        attempts: 1,
        fields: entry.fields.clone(),
    };
    item(entry.id, Proposal::Retry(why, policy))
}

impl Node {
    /// Appends one entry. Its fields claim attempts that only the broker may count.
    pub(super) async fn claimant(&self, value: &str) -> Entry {
        let fields = vec![
            field("v", value),
            field("attempts", "9"),
            field("retries", "9"),
            field("first", "1"),
            field("due", "1"),
        ];
        let ids = self.broker.append(self.p, vec![fields.clone()]).await;
        Entry {
            id: ids.expect("append")[0],
            fields,
            oversized: None,
        }
    }

    pub(super) async fn retrying(&self) -> Vec<DeadLetter> {
        self.broker
            .retrying(self.p, BEGIN, 1_000)
            .await
            .expect("retrying")
    }

    async fn partition_state(&self) -> PartitionState {
        self.broker.state(self.p).await.expect("state")
    }

    pub(super) async fn entries(&self, after: EntryId) -> Vec<Entry> {
        self.broker
            .read(self.p, after, 1_000, Duration::ZERO)
            .await
            .expect("read")
    }

    /// Renews the lease, as the owner does, until no event waits for a retry. Returns the entries
    /// without an outcome.
    pub(super) async fn retried(&self) -> Vec<Entry> {
        until(async || {
            let lease = self.broker.lease(self.p, "owner", LONG).await;
            assert_eq!(lease.expect("lease"), Lease::Mine);
            self.retrying().await.is_empty()
        })
        .await;
        self.entries(self.head().await.position.entry).await
    }

    /// Waits until the broker's clock has reached this time.
    async fn until_ms(&self, ms: u64) {
        until(async || self.head().await.now_ms >= ms).await;
    }

    async fn outcomes(&self, items: Vec<Item>) -> Vec<Outcome> {
        let done = self.commit(items).await;
        done.into_iter().map(|(outcome, _)| outcome).collect()
    }

    /// The attempts and the due time in the newest decision.
    pub(super) async fn newest_retry(&self) -> Option<Retry> {
        let newest = self.broker.decisions(self.p, 1).await.expect("decisions");
        newest.into_iter().next().expect("a decision").3.retry
    }
}

pub(super) async fn an_event_that_waits_for_a_retry_is_listed_and_counted_apart(bench: Bench) {
    let node = bench.open().await;
    let entry = node.claimant("a").await;
    let before_ms = node.head().await.now_ms;
    assert_eq!(
        node.outcomes(vec![retry(&entry, PATIENT)]).await,
        [Outcome::Retrying]
    );
    let after_ms = node.head().await.now_ms;
    let letters = node.retrying().await;
    let [letter] = &letters[..] else {
        panic!("{letters:?}")
    };
    let due_ms = letter.due_ms.expect("a due time");
    assert!((before_ms + 1_000..=after_ms + 1_000).contains(&due_ms));
    assert_eq!(
        (letter.entry, letter.why.attempts, &*letter.why.reason),
        (entry.id, 1, "the fee is not known yet")
    );
    assert_eq!(letter.why.fields, entry.fields);
    assert_eq!(
        node.newest_retry().await,
        Some(Retry {
            attempts: 1,
            due_ms: Some(due_ms)
        })
    );
    let dead = node.broker.dead_letters(node.p, BEGIN, 10).await.unwrap();
    assert!(dead.is_empty(), "{dead:?}");
    let state = node.partition_state().await;
    assert_eq!((state.retrying, state.dead_letters, state.lag), (1, 0, 0));
    assert_eq!(node.count(Outcome::Retrying).await, 1);
    assert_eq!(node.count(Outcome::DeadLettered).await, 0);
}

pub(super) async fn only_the_owner_appends_a_retry_and_only_once_it_is_due(bench: Bench) {
    let node = bench.open().await;
    let lease = async |who| node.broker.lease(node.p, who, LONG).await.expect("lease");
    assert_eq!(lease("owner").await, Lease::Mine);
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let due_ms = node.retrying().await[0].due_ms.expect("a due time");
    node.until_ms(due_ms).await;
    assert!(matches!(lease("another").await, Lease::Others(_)));
    assert_eq!(node.retrying().await.len(), 1, "another node appended it");

    let entries = node.retried().await;
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].fields, entry.fields);
    let state = node.partition_state().await;
    assert_eq!((state.retrying, state.dead_letters, state.lag), (0, 0, 1));

    // The next one is not due before 2 s have passed, however often the lease is renewed.
    node.commit(vec![retry(&entries[0], PATIENT)]).await;
    let due_ms = node.retrying().await[0].due_ms.expect("a due time");
    let again = node.retried().await;
    assert!(
        again[0].id.ms >= due_ms,
        "{} was appended before {due_ms}",
        again[0].id
    );
}

pub(super) async fn attempts_are_carried_until_the_retries_are_used_up(bench: Bench) {
    let node = bench.open().await;
    let policy = RetryPolicy {
        retries: 2,
        ..PATIENT
    };
    let mut entry = node.claimant("a").await;
    for attempts in 1..=2 {
        assert_eq!(
            node.outcomes(vec![retry(&entry, policy)]).await,
            [Outcome::Retrying]
        );
        let committed_ms = node.head().await.now_ms;
        let letter = node.retrying().await.remove(0);
        assert_eq!(letter.why.attempts, attempts);
        let due_ms = letter.due_ms.expect("a due time");
        let delay_ms = 1_000 << (attempts - 1);
        assert!(
            due_ms <= committed_ms + delay_ms && due_ms > committed_ms + delay_ms - 1_000,
            "attempt {attempts}: due {due_ms}, committed {committed_ms}"
        );
        entry = node.retried().await.remove(0);
    }
    assert_eq!(
        node.outcomes(vec![retry(&entry, policy)]).await,
        [Outcome::DeadLettered]
    );
    let last = Retry {
        attempts: 3,
        due_ms: None,
    };
    assert_eq!(node.newest_retry().await, Some(last));
    let dead = node.broker.dead_letters(node.p, BEGIN, 10).await.unwrap();
    assert_eq!(dead.len(), 1);
    assert_eq!((dead[0].why.attempts, dead[0].due_ms), (3, None));
    assert_eq!(dead[0].why.fields, entry.fields);
    assert!(node.retrying().await.is_empty());

    // Redriven by hand, it starts anew.
    assert!(node.broker.redrive(node.p, dead[0].id).await.unwrap());
    let entry = node.retried().await.remove(0);
    node.commit(vec![retry(&entry, policy)]).await;
    assert_eq!(node.retrying().await[0].why.attempts, 1);
}

pub(super) async fn a_retry_beyond_the_timeout_is_a_dead_letter(bench: Bench) {
    let node = bench.open().await;
    let policy = |ms| RetryPolicy {
        timeout: Duration::from_millis(ms),
        ..PATIENT
    };
    let entry = node.claimant("a").await;
    assert_eq!(
        node.outcomes(vec![retry(&entry, policy(999))]).await,
        [Outcome::DeadLettered]
    );
    assert_eq!(node.newest_retry().await, None);
    let entry = node.claimant("b").await;
    assert_eq!(
        node.outcomes(vec![retry(&entry, policy(1_000))]).await,
        [Outcome::Retrying]
    );
    // The time counts from the first attempt: 1 s has passed, and the next delay is 2 s.
    let entry = node.retried().await.remove(0);
    assert_eq!(
        node.outcomes(vec![retry(&entry, policy(2_999))]).await,
        [Outcome::DeadLettered]
    );
}

/// The id of an event is remembered only with its outcome, so the publisher's retry can be decided
/// first.
pub(super) async fn a_retry_is_no_duplicate_of_itself_but_of_the_publishers_retry(bench: Bench) {
    let node = bench.open().await;
    let entry = node.claimant("a").await;
    node.commit(vec![with_id(retry(&entry, PATIENT), 1)]).await;
    let entry = node.retried().await.remove(0);
    node.commit(vec![with_id(retry(&entry, PATIENT), 1)]).await;
    let entry = node.retried().await.remove(0);
    assert_eq!(
        node.outcomes(vec![with_id(commit(entry.id, "R", &["u:1"]), 1)])
            .await,
        [Outcome::Committed]
    );
    let third = Retry {
        attempts: 3,
        due_ms: None,
    };
    assert_eq!(node.newest_retry().await, Some(third));

    let entry = node.claimant("b").await;
    node.commit(vec![with_id(retry(&entry, PATIENT), 2)]).await;
    let sent_again = node.claimant("b").await;
    assert_eq!(
        node.outcomes(vec![with_id(commit(sent_again.id, "R", &["u:1"]), 2)])
            .await,
        [Outcome::Committed]
    );
    let entry = node.retried().await.remove(0);
    assert_eq!(
        node.outcomes(vec![with_id(commit(entry.id, "R", &["u:1"]), 2)])
            .await,
        [Outcome::Duplicate]
    );
    assert_eq!(node.ids("u:1", NotificationId(0)).await.len(), 2);
}

pub(super) async fn retries_beyond_the_limit_are_dead_letters_and_none_is_trimmed(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            dead_letter_entries: 2,
            ..Retention::default()
        })
        .await;
    let mut items = Vec::new();
    for value in ["a", "b", "c"] {
        items.push(retry(&node.claimant(value).await, PATIENT));
    }
    assert_eq!(
        node.outcomes(items).await,
        [Outcome::Retrying, Outcome::Retrying, Outcome::DeadLettered]
    );
    let letters = node.broker.dead_letters(node.p, BEGIN, 10).await.unwrap();
    let reason = &letters[0].why.reason;
    assert!(reason.contains("retention.dead_letter_entries"), "{reason}");
    // An id names one dead letter, in whichever list it is.
    let mut all: Vec<EntryId> = letters.iter().map(|letter| letter.id).collect();
    all.extend(node.retrying().await.iter().map(|letter| letter.id));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 3);
    for reason in ["d", "e", "f"] {
        let entry = node.claimant(reason).await;
        node.commit(vec![dead(entry.id, reason)]).await;
    }
    let state = node.partition_state().await;
    assert_eq!(
        (state.retrying, state.dead_letters, state.dead_trimmed),
        (2, 2, 2)
    );
    assert_eq!(node.retried().await.len(), 2);
}

pub(super) async fn an_event_that_waits_for_a_retry_is_redriven_or_dropped_by_hand(bench: Bench) {
    let node = bench.open().await;
    let mut items = Vec::new();
    for value in ["a", "b", "c"] {
        items.push(retry(&node.claimant(value).await, PATIENT));
    }
    node.commit(items).await;
    let letters = node.retrying().await;
    let (first, second) = (letters[0].id, letters[1].id);
    assert!(node.broker.redrive(node.p, first).await.unwrap());
    assert!(!node.broker.redrive(node.p, first).await.unwrap());
    assert!(node.broker.drop_dead_letter(node.p, second).await.unwrap());
    assert!(!node.broker.drop_dead_letter(node.p, second).await.unwrap());
    assert_eq!(node.partition_state().await.retrying, 1);
    // The retry that was due before the others is gone, and the third one is appended all the same.
    let values: Vec<Bytes> = node
        .retried()
        .await
        .into_iter()
        .map(|entry| entry.fields[0].1.clone())
        .collect();
    assert_eq!(values, ["a", "c"]);
}

pub(super) async fn concurrent_renewals_append_each_retry_once_and_in_order(bench: Bench) {
    let node = bench.open().await;
    let mut items = Vec::new();
    for n in 0..20 {
        items.push(retry(&node.claimant(&n.to_string()).await, PATIENT));
    }
    node.commit(items).await;
    let last = node.retrying().await.pop().expect("20 letters").due_ms;
    node.until_ms(last.expect("a due time")).await;
    let renewals = (0..8).map(|_| {
        let node = node.clone();
        tokio::spawn(async move { node.broker.lease(node.p, "owner", LONG).await })
    });
    for renewal in renewals.collect::<Vec<_>>() {
        renewal.await.expect("no panic").expect("lease");
    }
    let values: Vec<String> = node
        .retried()
        .await
        .iter()
        .map(|entry| String::from_utf8_lossy(&entry.fields[0].1).into_owned())
        .collect();
    assert_eq!(
        values,
        (0..20).map(|n| n.to_string()).collect::<Vec<_>>(),
        "those that failed together keep their order"
    );
}

pub(super) async fn a_plan_in_slices_keeps_the_attempts_at_its_event(bench: Bench) {
    let node = bench.open().await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let entry = node.retried().await.remove(0);
    node.slice(commit(entry.id, "R", &["u:1"]), 0, false).await;
    node.slice(commit(entry.id, "R", &["u:2"]), 1, true).await;
    let second = Retry {
        attempts: 2,
        due_ms: None,
    };
    assert_eq!(node.newest_retry().await, Some(second));
}

/// A backlog at its limit is the publishers': retries that waited for it would starve.
pub(super) async fn a_retry_is_appended_to_a_source_at_its_backlog_limit(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            backlog_entries: 1,
            ..Retention::default()
        })
        .await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    node.claimant("b").await;
    assert_eq!(node.retried().await.len(), 2);
}

pub(super) async fn retries_and_their_attempts_survive_the_process(bench: Bench) {
    let node = bench.open().await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    drop(node);
    let node = bench.reopen().await;
    assert_eq!(node.partition_state().await.retrying, 1);
    node.retried().await;
    drop(node);
    let node = bench.reopen().await;
    let entry = node.retried().await.remove(0);
    node.commit(vec![retry(&entry, PATIENT)]).await;
    assert_eq!(node.retrying().await[0].why.attempts, 2);
}
