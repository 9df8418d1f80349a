//! Samples the stack of a guest while it runs, for `pointsman plugin profile`.
//!
//! A sample is taken on the thread of the call when a tick of the engine interrupts it (`deadline`),
//! so only time in the guest is seen, and a call without a tick leaves no sample.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use wasmtime::component::Component;
use wasmtime::{AsContext, GuestProfiler};

use super::deadline::TICK;

/// A handle for all instances of a plugin.
#[derive(Clone, Debug)]
pub(super) struct Profiler(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    samples: Mutex<GuestProfiler>,
    n_samples: AtomicUsize,
}

impl Profiler {
    pub(super) fn new(
        engine: &wasmtime::Engine,
        name: &str,
        component: &Component,
    ) -> wasmtime::Result<Self> {
        let samples = GuestProfiler::new_component(engine, name, TICK, component.clone(), [])?;
        Ok(Self(Arc::new(Shared {
            samples: Mutex::new(samples),
            n_samples: AtomicUsize::new(0),
        })))
    }

    /// Takes a sample of the guest that this tick interrupted.
    pub(super) fn sample(&self, store: impl AsContext) {
        let samples = self.0.samples.lock();
        let mut samples = samples.unwrap_or_else(PoisonError::into_inner);
        samples.sample(store, TICK);
        self.0.n_samples.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes the profile and returns the number of samples.
    pub(super) fn finish(self, output: impl Write) -> anyhow::Result<usize> {
        let shared = Arc::into_inner(self.0).context("an instance is still sampled")?;
        let samples = shared.samples.into_inner();
        let samples = samples.unwrap_or_else(PoisonError::into_inner);
        samples.finish(output)?;
        Ok(shared.n_samples.into_inner())
    }
}
