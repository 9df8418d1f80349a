//! A clock of a node that a test sets, ahead of the real time or behind it, while the node runs.
//! Needs `faketime`, which replaces the time of day of a process; the uptime stays real.

use std::fs;
use std::process::Command;
use std::time::Duration;

use super::node::Folder;

/// The clock; see the head of this file. It shows the real time until it is set.
#[derive(Debug)]
pub(crate) struct ShiftedClock {
    folder: Folder,
}

impl ShiftedClock {
    pub(crate) fn new() -> Self {
        let clock = Self {
            folder: Folder::new(),
        };
        clock.set("+0");
        clock
    }

    pub(crate) fn set_ahead(&self, by: Duration) {
        self.set(&format!("+{}", by.as_secs()));
    }

    pub(crate) fn set_behind(&self, by: Duration) {
        self.set(&format!("-{}", by.as_secs()));
    }

    pub(crate) fn set_right(&self) {
        self.set("+0");
    }

    fn set(&self, offset: &str) {
        let draft = self.folder.path().join("draft");
        fs::write(&draft, format!("{offset}\n")).expect("write the time");
        // In one step: the process may be reading it.
        fs::rename(draft, self.folder.path().join("time")).expect("replace the time");
    }

    /// The environment of a process that uses this clock.
    ///
    /// # Panics
    /// If `faketime` is not installed.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let command = ["-m", "-f", "+0", "printenv", "LD_PRELOAD"];
        let library = Command::new("faketime")
            .args(command)
            .output()
            .unwrap_or_else(|error| {
                panic!("cannot run faketime ({error}); install it: apt-get install faketime")
            });
        let library = String::from_utf8(library.stdout).expect("a path");
        let file = self.folder.path().join("time");
        [
            ("LD_PRELOAD", library.trim()),
            ("FAKETIME_TIMESTAMP_FILE", &file.to_string_lossy()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            // Only the clock: the cache of compiled plugins compares times of files.
            ("NO_FAKE_STAT", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }
}
