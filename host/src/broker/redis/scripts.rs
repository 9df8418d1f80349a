//! The Lua scripts, one file each in `scripts/`; most are prefixed with a shared prelude.
//!
//! A script is called by its hash and sent in full only if Redis does not know it (after a restart,
//! a failover or a `SCRIPT FLUSH`).

use std::sync::LazyLock;

/// A script and the hash that identifies it in Redis.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) hash: String,
    pub(super) code: String,
}

impl Script {
    fn new(code: &str) -> Self {
        Self {
            hash: redis::Script::new(code).get_hash().to_owned(),
            code: code.to_owned(),
        }
    }

    /// With the check of rights and the prelude.
    fn of_partition(source: &str) -> Self {
        Self::with(
            &[
                include_str!("scripts/require_rights.lua"),
                include_str!("scripts/prelude.lua"),
            ],
            source,
        )
    }

    /// With the check of rights, for a key that belongs to no partition.
    fn of_user(source: &str) -> Self {
        Self::with(&[include_str!("scripts/require_rights.lua")], source)
    }

    /// Inserts `parts` after the script's first line, which holds the flags and must stay first.
    fn with(parts: &[&str], source: &str) -> Self {
        let (flags, body) = source.split_once('\n').unwrap_or((source, ""));
        Self::new(&format!("{flags}\n{}\n{body}", parts.join("\n")))
    }
}

macro_rules! scripts {
    ($($(#[doc = $doc:literal])* $name:ident = $make:ident $file:literal;)+) => {
        $($(#[doc = $doc])* pub(super) static $name: LazyLock<Script> = LazyLock::new(|| Script::$make(include_str!(concat!("scripts/", $file))));)+
    };
}

scripts! {
    APPEND = of_partition "append.lua";
    ATTEMPT = of_partition "attempt.lua";
    BEGIN = of_partition "begin.lua";
    BRIDGE_APPEND = of_partition "bridge_append.lua";
    BRIDGE_LEASE = of_partition "bridge_lease.lua";
    BRIDGE_RELEASE = of_partition "bridge_release.lua";
    COMMIT = of_partition "commit.lua";
    DROP = of_partition "drop.lua";
    HEAD = of_partition "head.lua";
    LEASE = of_partition "lease.lua";
    PAGES = of_partition "pages.lua";
    REDRIVE = of_partition "redrive.lua";
    RELEASE = of_partition "release.lua";
    STATE = of_partition "state.lua";
    TICK = of_partition "tick.lua";
    /// Independent of partitions: works on any stream.
    RANGE = new "range.lua";
    /// Independent of partitions.
    RECORDS = new "records.lua";
    /// Independent of partitions.
    NUMBER = new "number.lua";
    /// Independent of partitions.
    NODES = of_user "nodes.lua";
    /// Independent of partitions.
    LIVE_NODES = new "live_nodes.lua";
    /// Independent of partitions.
    ROLLOUTS = of_user "rollouts.lua";
    /// Independent of partitions.
    SET_ROLLOUT = of_user "set_rollout.lua";
    /// Independent of partitions.
    REPORT = new "report.lua";
    /// Independent of partitions and needs no permissions beyond running scripts.
    RIGHTS = new "rights.lua";
    /// Independent of partitions.
    WRITABLE = new "writable.lua";
    /// Independent of partitions.
    DEVICE_CURSOR = of_user "device_cursor.lua";
    /// Independent of partitions.
    RECIPIENT = of_user "recipient.lua";
}
