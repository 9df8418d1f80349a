//! What tests start and talk to, from outside as users do: nodes, streams, publishers, servers of Redis.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) mod guests;
pub(crate) mod http;
pub(crate) mod node;
pub(crate) mod ports;
pub(crate) mod publish;
pub(crate) mod redis;
pub(crate) mod seed;
pub(crate) mod sse;

/// Asks again and again until there is an answer, and returns it.
///
/// # Panics
/// If there is none in time.
pub(crate) fn eventually<T>(within: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {within:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The folder of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("host/ lies in the repository")
}

/// The folder of the bundled plugins.
///
/// # Panics
/// If they are not built.
pub(crate) fn bundled_plugins() -> PathBuf {
    let folder = repository().join("build/plugins");
    assert!(folder.is_dir(), "{} is missing: run `make plugins`", folder.display());
    folder
}
