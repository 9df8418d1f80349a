//! The Lua scripts: one file each under `scripts/`, most behind a prelude that they share.
//!
//! A script is called by its hash and sent whole only where Redis does not know it (after a restart, a fail-over, a `SCRIPT FLUSH`).

use std::sync::LazyLock;

/// A script and the hash by which Redis knows it.
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

    /// The prelude stands between the script's first line, which holds its flags and must be the first, and its body.
    fn of_partition(source: &str) -> Self {
        let (flags, body) = source.split_once('\n').unwrap_or((source, ""));
        Self::new(&format!(
            "{flags}\n{}\n{body}",
            include_str!("scripts/prelude.lua")
        ))
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
    COMMIT = of_partition "commit.lua";
    HEAD = of_partition "head.lua";
    LEASE = of_partition "lease.lua";
    PAGE = of_partition "page.lua";
    REDRIVE = of_partition "redrive.lua";
    RELEASE = of_partition "release.lua";
    STATE = of_partition "state.lua";
    TICK = of_partition "tick.lua";
    /// Knows no partition.
    NUMBER = new "number.lua";
    /// Knows no partition, and needs no right but to run.
    RIGHTS = new "rights.lua";
    /// Knows no partition.
    BOOKMARK = new "bookmark.lua";
    /// Knows no partition.
    RECIPIENT = new "recipient.lua";
}
