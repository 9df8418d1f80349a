//! Guarantees of dead letters and of decision records, which explain the outcome of every event.

use super::*;
use pointsman::broker::{DeadLetter, DecisionSearch, Error, MAX_DEAD_LETTER_BYTES};
use pointsman::event::{ChainMember, ChainMembers, Verdict, VerdictKind};

const BEGIN: EntryId = EntryId { ms: 0, seq: 0 };

impl Node {
    async fn dead(&self) -> Vec<DeadLetter> {
        self.broker
            .dead_letters(self.p, BEGIN, 1_000)
            .await
            .expect("dead_letters")
    }
}

pub(super) async fn a_dead_letter_keeps_reason_plugin_attempts_and_raw_fields(bench: Bench) {
    let node = bench.open().await;
    let raw = |bytes: &'static [u8]| Bytes::from_static(bytes);
    let fields = vec![
        (raw(b"\xff\0 \r\n"), raw(b"\x80\0")),
        (raw(b"f:x"), raw(b"")),
        (raw(b""), raw(b"1")),
        (raw(b""), raw(b"2")),
        field("entry", "3"),
    ];
    let why = DeadReason {
        reason: "it trapped: \"ü\"\n".into(),
        plugin: Some("address".into()),
        attempts: 3,
        fields,
    };
    let entry = after(BEGIN);
    let none = DeadReason {
        reason: "no type".into(),
        plugin: None,
        attempts: 0,
        fields: vec![],
    };
    node.commit(vec![
        item(entry, Proposal::DeadLetter(why.clone())),
        item(after(entry), Proposal::DeadLetter(none.clone())),
    ])
    .await;
    let letters = node.dead().await;
    assert_eq!(
        letters
            .iter()
            .map(|letter| (letter.entry, letter.why.clone()))
            .collect::<Vec<_>>(),
        [(entry, why), (after(entry), none)]
    );
    assert_eq!(node.broker.state(node.p).await.unwrap().dead_letters, 2);
}

pub(super) async fn dead_letters_are_listed_in_pages_oldest_first(bench: Bench) {
    let node = bench.open().await;
    let entry = after(BEGIN);
    let items = (0..5)
        .map(|k| {
            dead(
                EntryId {
                    seq: entry.seq + k,
                    ..entry
                },
                &k.to_string(),
            )
        })
        .collect();
    node.commit(items).await;
    let first = node.broker.dead_letters(node.p, BEGIN, 2).await.unwrap();
    let rest = node
        .broker
        .dead_letters(node.p, first[1].id, 10)
        .await
        .unwrap();
    let reasons: Vec<_> = first
        .iter()
        .chain(&rest)
        .map(|letter| letter.why.reason.as_str())
        .collect();
    assert_eq!(reasons, ["0", "1", "2", "3", "4"]);
}

pub(super) async fn a_redriven_dead_letter_is_an_entry_again(bench: Bench) {
    let node = bench.open().await;
    let fields = vec![
        field("type", "t"),
        (Bytes::from_static(b"\xff"), Bytes::from_static(b"\0")),
    ];
    let ids = node
        .broker
        .append(node.p, vec![fields.clone()])
        .await
        .unwrap();
    let why = DeadReason {
        reason: "trap".into(),
        plugin: None,
        attempts: 1,
        fields: fields.clone(),
    };
    node.commit(vec![item(ids[0], Proposal::DeadLetter(why))])
        .await;
    let id = node.dead().await[0].id;
    assert!(node.broker.redrive(node.p, id).await.unwrap());
    assert!(
        !node.broker.redrive(node.p, id).await.unwrap(),
        "the dead letter no longer exists"
    );
    assert!(node.dead().await.is_empty());
    let entries = node
        .broker
        .read(node.p, ids[0], 10, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(
        entries
            .into_iter()
            .map(|entry| entry.fields)
            .collect::<Vec<_>>(),
        [fields]
    );
}

pub(super) async fn a_dropped_dead_letter_is_gone(bench: Bench) {
    let node = bench.open().await;
    node.commit(vec![
        dead(after(BEGIN), "a"),
        dead(after(after(BEGIN)), "b"),
    ])
    .await;
    let letters = node.dead().await;
    assert!(
        node.broker
            .drop_dead_letter(node.p, letters[0].id)
            .await
            .unwrap()
    );
    assert!(
        !node
            .broker
            .drop_dead_letter(node.p, letters[0].id)
            .await
            .unwrap()
    );
    assert_eq!(node.dead().await, letters[1..]);
}

pub(super) async fn dead_letters_over_the_limit_are_trimmed_oldest_first_and_counted(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            dead_letter_entries: 2,
            ..Retention::default()
        })
        .await;
    let entry = after(BEGIN);
    node.commit(
        (0..5)
            .map(|k| {
                dead(
                    EntryId {
                        seq: entry.seq + k,
                        ..entry
                    },
                    &k.to_string(),
                )
            })
            .collect(),
    )
    .await;
    let reasons: Vec<_> = node
        .dead()
        .await
        .into_iter()
        .map(|letter| letter.why.reason)
        .collect();
    assert_eq!(reasons, ["3", "4"]);
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.dead_letters, state.dead_trimmed), (2, 3));
}

impl Node {
    /// Appends an entry with data of `n_bytes` and commits its dead letter, as ingest does.
    async fn dead_letter_of(&self, n_bytes: usize) -> (Vec<(Bytes, Bytes)>, DeadLetter) {
        let fields = vec![
            field("type", "t"),
            field("data", &"x".repeat(n_bytes - 10)),
            field("", "1"),
        ];
        let entry = self
            .broker
            .append(self.p, vec![fields.clone()])
            .await
            .unwrap()[0];
        let position = self.head().await.position.entry;
        let read = self
            .broker
            .read(self.p, position, 1, Duration::ZERO)
            .await
            .unwrap()
            .remove(0);
        let why = DeadReason {
            reason: "it is too large".into(),
            plugin: None,
            attempts: 1,
            fields: read.fields,
        };
        let size = read.oversized.expect("it exceeds the limit");
        let proposal = Proposal::OversizedEntry { why, size };
        self.commit(vec![item(entry, proposal)]).await;
        let letters = self.dead().await;
        (fields, letters.last().expect("a dead letter").clone())
    }
}

/// Up to a limit, all fields are copied within the broker, so that the event can be redriven. Of a
/// larger entry, only what was read is kept, and it cannot be redriven.
pub(super) async fn a_dead_letter_of_a_large_entry_holds_all_its_fields_up_to_a_limit(
    bench: Bench,
) {
    let node = bench.open().await;
    let (fields, letter) = node.dead_letter_of(MAX_DEAD_LETTER_BYTES).await;
    assert!(letter.why.fields == fields, "the fields changed");
    assert_eq!(letter.oversized, None);
    assert!(node.broker.redrive(node.p, letter.id).await.unwrap());

    let position = node.head().await.position.entry;
    let redriven = node
        .broker
        .read(node.p, position, 1, Duration::ZERO)
        .await
        .unwrap();
    node.commit(vec![item(redriven[0].id, Proposal::Discard)])
        .await;
    let (fields, letter) = node.dead_letter_of(MAX_DEAD_LETTER_BYTES + 1).await;
    let size = letter.oversized.expect("it exceeds the limit");
    assert!(size.bytes > MAX_DEAD_LETTER_BYTES as u64 - 10, "{size:?}");
    assert_eq!(letter.why.fields[0], fields[0]);
    assert_eq!(letter.why.reason, "it is too large");
    let kept: usize = letter
        .why
        .fields
        .iter()
        .map(|(a, b)| a.len() + b.len())
        .sum();
    assert_eq!(kept, 1_024);
    match node.broker.redrive(node.p, letter.id).await {
        Err(Error::Permanent(why)) => assert!(why.contains("smaller parts"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(node.dead().await.len(), 1, "it is kept");
    assert!(
        node.broker
            .drop_dead_letter(node.p, letter.id)
            .await
            .unwrap()
    );
}

/// A list of dead letters does not transfer what they hold.
pub(super) async fn headers_of_dead_letters_hold_no_fields(bench: Bench) {
    let node = bench.open().await;
    let why = |reason: &str, fields| DeadReason {
        reason: reason.into(),
        plugin: Some("address".into()),
        attempts: 3,
        fields,
    };
    let (mut entry, mut items) = (BEGIN, Vec::new());
    for n in 0..20 {
        entry = after(entry);
        let fields = vec![field("data", &"x".repeat(n * 5_000))];
        items.push(item(
            entry,
            Proposal::DeadLetter(why(&n.to_string(), fields)),
        ));
    }
    node.commit(items).await;
    let headers = node
        .broker
        .dead_letter_headers(node.p, BEGIN, 1_000)
        .await
        .unwrap();
    let whole = node.dead().await;
    assert_eq!(whole.len(), 20);
    assert_eq!(whole[19].why.fields[0].1.len(), 95_000);
    let without_fields: Vec<DeadLetter> = whole
        .into_iter()
        .map(|mut letter| {
            letter.why.fields.clear();
            letter
        })
        .collect();
    assert_eq!(headers, without_fields);
}

pub(super) async fn decisions_list_each_verdict_newest_first(bench: Bench) {
    let node = bench.open().await;
    let verdict = |plugin: &str, verdict| Verdict {
        plugin: plugin.into(),
        generation: 7,
        hash: "8a6bda16014b".into(),
        config_hash: "44136fa355b3".into(),
        verdict,
        reason: "as \"it\" is".into(),
    };
    let decision = Decision {
        event_id: "ü".into(),
        event_source: "/shop".into(),
        event_type: "order.shipped".into(),
        verdicts: vec![
            verdict("discard", VerdictKind::Keep),
            verdict("address", VerdictKind::Routes),
        ],
        reason: "as \"it\" is".into(),
        slots: vec![String::new(), "e-mail".into()],
        clock_ms: 1_700_000_000_123,
        ..Decision::default()
    };
    let entry = after(BEGIN);
    let first = Item {
        decision: decision.clone(),
        ..commit(entry, "R", &["u:1"])
    };
    let done = node
        .commit(vec![first, item(after(entry), Proposal::Discard)])
        .await;
    let decisions = node.broker.decisions(node.p, 10).await.unwrap();
    assert_eq!(
        (decisions[0].0, decisions[0].1, decisions[0].2),
        (after(entry), Outcome::Discarded, None)
    );
    assert_eq!(
        decisions[1],
        (entry, Outcome::Committed, done[0].1, decision)
    );
    assert_eq!(node.broker.decisions(node.p, 1).await.unwrap().len(), 1);
}

pub(super) async fn decisions_of_one_event_are_found_among_all_kept(bench: Bench) {
    let node = bench.open().await;
    let of = |event_id: &str, entry: EntryId| {
        let decision = Decision {
            event_id: event_id.into(),
            ..Decision::default()
        };
        Item {
            decision,
            ..item(entry, Proposal::Unrouted)
        }
    };
    // More records than a broker reads at once.
    let mut entry = BEGIN;
    for batch in 0..20 {
        let mut next = |n: usize| {
            entry = after(entry);
            of(
                if (batch, n) == (0, 0) || (batch, n) == (19, 59) {
                    "wanted"
                } else {
                    "another"
                },
                entry,
            )
        };
        node.commit((0..60).map(&mut next).collect()).await;
    }
    let first = after(BEGIN);
    let found = node
        .broker
        .find_decisions(node.p, "wanted", 5)
        .await
        .unwrap();
    assert_eq!(
        found
            .decisions
            .iter()
            .map(|(entry, ..)| *entry)
            .collect::<Vec<_>>(),
        [entry, first]
    );
    assert_eq!(found.reaches_to, Some(first));
    // An entry that cannot be read as an event has only its entry id.
    let found = node
        .broker
        .find_decisions(node.p, &first.to_string(), 5)
        .await
        .unwrap();
    assert_eq!(
        found
            .decisions
            .iter()
            .map(|(_, _, _, decision)| &*decision.event_id)
            .collect::<Vec<_>>(),
        ["wanted"]
    );
    let found = node
        .broker
        .find_decisions(node.p, "another", 1)
        .await
        .unwrap();
    assert_eq!(
        (found.decisions.len(), found.reaches_to),
        (1, Some(found.decisions[0].0))
    );
    assert_eq!(
        node.broker
            .find_decisions(node.p, "absent", 5)
            .await
            .unwrap(),
        DecisionSearch {
            decisions: vec![],
            reaches_to: Some(first)
        }
    );
}

pub(super) async fn the_members_of_a_chain_are_found_among_all_kept_decisions(bench: Bench) {
    let node = bench.open().await;
    let members = |plugin: &str| ChainMembers {
        routers: vec![ChainMember {
            plugin: plugin.into(),
            generation: 3,
            hash: "8a6bda16014b".into(),
            config_hash: "44136fa355b3".into(),
        }],
        ..ChainMembers::default()
    };
    // More records than a broker reads at once, of which one lists the members.
    let mut entry = BEGIN;
    for batch in 0..6 {
        let mut next = |n: usize| {
            entry = after(entry);
            let mut item = item(entry, Proposal::Unrouted);
            item.decision.chain = if batch == 0 { "c1" } else { "c2" }.into();
            item.decision.members = match (batch, n) {
                (0, 5) => Some(members("old")),
                (1, 0) => Some(members("new")),
                _ => None,
            };
            item
        };
        node.commit((0..60).map(&mut next).collect()).await;
    }
    for (id, expect) in [
        ("c1", Some(members("old"))),
        ("c2", Some(members("new"))),
        ("c3", None),
    ] {
        assert_eq!(node.broker.find_chain(node.p, id).await.unwrap(), expect);
    }
}
