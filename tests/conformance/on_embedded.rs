//! Opens the embedded broker for the suite: in a folder of its own, and in memory.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use pointsman::broker::embedded::Embedded;
use pointsman::broker::{Broker, Retention};
use pointsman::shutdown::Shutdown;

use super::Store;

/// The data of one installation: a folder that is removed with it, or nothing that outlives the
/// process.
pub(super) struct EmbeddedStore {
    dir: Option<PathBuf>,
    sources: Vec<String>,
    running: Mutex<Option<(Retention, Arc<Embedded>)>>,
}

impl EmbeddedStore {
    pub(super) fn durable() -> Self {
        static N: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "pointsman-conformance-{}-{}",
            std::process::id(),
            N.fetch_add(1, Ordering::Relaxed)
        );
        Self::at(Some(std::env::temp_dir().join(name)))
    }

    pub(super) fn ephemeral() -> Self {
        Self::at(None)
    }

    fn at(dir: Option<PathBuf>) -> Self {
        Self {
            dir,
            sources: vec!["pointsman:events".into(), "pointsman:more".into()],
            running: Mutex::default(),
        }
    }

    fn start(&self, retention: &Retention) -> Arc<Embedded> {
        let alarm = Shutdown::new().alarm("the writer");
        let opened = match &self.dir {
            Some(dir) => Embedded::open(dir, &self.sources, retention.clone(), alarm),
            None => Embedded::ephemeral(&self.sources, retention.clone(), alarm),
        };
        Arc::new(opened.expect("the store opens"))
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn open(&self, retention: &Retention) -> Arc<dyn Broker> {
        let mut running = self.running.lock().expect("no test panics here");
        match &*running {
            Some((same, broker)) if same == retention => Arc::clone(broker) as _,
            _ => {
                if let Some((_, broker)) = running.take() {
                    broker.close();
                }
                let broker = self.start(retention);
                *running = Some((retention.clone(), Arc::clone(&broker)));
                broker
            }
        }
    }

    async fn reopen(&self, retention: &Retention) -> Arc<dyn Broker> {
        if let Some((_, broker)) = self.running.lock().expect("no test panics here").take() {
            broker.close();
        }
        self.open(retention).await
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        if let (Some(dir), Ok(running)) = (&self.dir, self.running.get_mut()) {
            if let Some((_, broker)) = running.take() {
                broker.close();
            }
            remove(dir);
        }
    }
}

fn remove(dir: &Path) {
    // Best effort: the folder is in the system's temporary folder, which the system cleans up.
    drop(std::fs::remove_dir_all(dir));
}
