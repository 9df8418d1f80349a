//! Applies changes of the files that hold secrets and keys while the node runs, so that a secret is
//! rotated without a restart.
//!
//! An invalid file changes nothing. The files are polled, as the configuration is (`reload`): an
//! orchestrator swaps a link to the folder of a mounted secret.

use super::reload::{FileStamp, LOOK_EVERY, stamp};
use crate::auth::{Auth, WatchedFile};
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

/// A file as the last look found it.
struct Seen {
    file: WatchedFile,
    /// At the last reload.
    applied: FileStamp,
    /// At the last look.
    before: FileStamp,
}

/// Applies changes of the files until the node shuts down.
pub(crate) async fn follow(auth: Auth, readiness: Readiness, shutdown: Shutdown) {
    let mut all: Vec<Seen> = Vec::new();
    for file in auth.watched_files() {
        // Read once more: the file may have changed since the start, before its first look.
        let now = stamp(&file.path);
        apply(&auth, &file, &readiness, false).await;
        all.push(Seen {
            file,
            applied: now,
            before: now,
        });
    }
    if all.is_empty() {
        return;
    }
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = shutdown.begun() => return,
        }
        for seen in &mut all {
            let now = stamp(&seen.file.path);
            // Unchanged in two looks, because a program may still be writing.
            if now != seen.applied && now == seen.before {
                seen.applied = now;
                apply(&auth, &seen.file, &readiness, true).await;
            }
            seen.before = now;
        }
    }
}

async fn apply(auth: &Auth, file: &WatchedFile, readiness: &Readiness, is_changed: bool) {
    let name = format!("auth.{}", file.key);
    // On the blocking pool: a file of a network may take for ever.
    let reload = {
        let (auth, file) = (auth.clone(), file.clone());
        tokio::task::spawn_blocking(move || auth.reload(&file))
    };
    let reloaded = reload.await;
    match reloaded.unwrap_or_else(|panic| Err(format!("cannot be read: {panic}"))) {
        Ok(()) => {
            if is_changed {
                let path = file.path.display();
                tracing::info!("{name} changed: {path} was read again and is in effect");
            }
            readiness.clear(&name);
        }
        Err(text) => readiness.warn(
            &name,
            format!("{text}; the content read before stays in effect"),
        ),
    }
}
