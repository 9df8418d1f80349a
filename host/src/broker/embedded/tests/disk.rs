//! A disk that fails, stalls and loses power on demand.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use redb::backends::FileBackend;
use redb::{DatabaseError, StorageBackend};

#[derive(Debug, Default)]
pub(in super::super) struct Switch {
    pub(super) is_full: AtomicBool,
    pub(super) is_broken: AtomicBool,
    /// Little free space is left.
    pub(super) is_short: AtomicBool,
    /// How often data was synced.
    pub(super) syncs: AtomicU64,
    gate: Mutex<Gate>,
    moved: Condvar,
    journal: Mutex<Option<Journal>>,
}

#[derive(Debug, Default)]
struct Gate {
    is_shut: bool,
    /// A sync is waiting at the closed gate.
    is_knocked: bool,
}

/// Tracks the possible contents of the disk after a power failure.
#[derive(Debug)]
struct Journal {
    random: StdRng,
    /// The file as of the last sync.
    durable: Vec<u8>,
    /// Sectors written since then.
    pending: Vec<(usize, Vec<u8>)>,
    /// Possible files after a power failure, each with the value of `acknowledged` at that moment.
    images: Vec<(u64, Vec<u8>)>,
    acknowledged: Arc<AtomicU64>,
}

/// The unit that a disk writes atomically, in bytes.
const SECTOR: usize = 512;

impl Switch {
    /// Blocks syncs until the returned guard is dropped.
    pub(super) fn shut(&self) -> Shut<'_> {
        *self.gate.lock().unwrap() = Gate {
            is_shut: true,
            is_knocked: false,
        };
        Shut(self)
    }

    /// From now on, records at each sync the possible contents after a power failure just before
    /// its end.
    pub(super) fn keep_images(&self, path: &Path, seed: u64, acknowledged: Arc<AtomicU64>) {
        let durable = std::fs::read(path).unwrap();
        let random = StdRng::seed_from_u64(seed);
        *self.journal.lock().unwrap() = Some(Journal {
            random,
            durable,
            pending: Vec::new(),
            images: Vec::new(),
            acknowledged,
        });
    }

    pub(super) fn take_images(&self) -> Vec<(u64, Vec<u8>)> {
        self.journal.lock().unwrap().take().unwrap().images
    }

    pub(in super::super) fn free(&self) -> u64 {
        if self.is_short.load(Ordering::SeqCst) {
            1024 * 1024
        } else {
            u64::MAX
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.is_full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the test broke the disk"));
        }
        Ok(())
    }
}

/// Keeps the gate closed. Opens it when dropped, so also if a test fails or the broker could not be
/// dropped.
pub(super) struct Shut<'a>(&'a Switch);

impl Shut<'_> {
    /// Blocks until a sync is waiting.
    pub(super) fn wait_for_knock(&self) {
        let gate = self.0.gate.lock().unwrap();
        let (_gate, waited) = self
            .0
            .moved
            .wait_timeout_while(gate, Duration::from_secs(20), |gate| !gate.is_knocked)
            .unwrap();
        assert!(!waited.timed_out(), "a sync starts");
    }
}

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        *self.0.gate.lock().unwrap() = Gate::default();
        self.0.moved.notify_all();
    }
}

impl Journal {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap();
        for (i, sector) in data.chunks(SECTOR).enumerate() {
            self.pending.push((offset + i * SECTOR, sector.to_vec()));
        }
    }

    /// Any subset of the pending sectors may have reached the disk, in any order.
    fn image(&mut self) {
        let share = [0.1, 0.5, 0.9][self.random.random_range(0..3)];
        let mut image = self.durable.clone();
        for at in 0..self.pending.len() {
            if self.random.random_bool(share) {
                let (offset, data) = &self.pending[at];
                put(&mut image, *offset, data);
            }
        }
        self.images
            .push((self.acknowledged.load(Ordering::SeqCst), image));
    }

    fn sync(&mut self) {
        self.image();
        self.image();
        for (offset, data) in std::mem::take(&mut self.pending) {
            put(&mut self.durable, offset, &data);
        }
    }
}

fn put(image: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if image.len() < offset + data.len() {
        image.resize(offset + data.len(), 0);
    }
    image[offset..offset + data.len()].copy_from_slice(data);
}

#[derive(Debug)]
pub(in super::super) struct Disk {
    file: FileBackend,
    switch: Arc<Switch>,
}

impl Disk {
    pub(in super::super) fn open(path: &Path, switch: &Arc<Switch>) -> Result<Self, DatabaseError> {
        let file = FileBackend::new(File::options().read(true).write(true).open(path)?)?;
        Ok(Self {
            file,
            switch: Arc::clone(switch),
        })
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.switch.check()?;
        if let Some(journal) = &mut *self.switch.journal.lock().unwrap() {
            journal.durable.resize(usize::try_from(len).unwrap(), 0);
        }
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut gate = self.switch.gate.lock().unwrap();
        if gate.is_shut {
            gate.is_knocked = true;
            self.switch.moved.notify_all();
            drop(
                self.switch
                    .moved
                    .wait_while(gate, |gate| gate.is_shut)
                    .unwrap(),
            );
        } else {
            drop(gate);
        }
        self.switch.check()?;
        self.switch.syncs.fetch_add(1, Ordering::SeqCst);
        if let Some(journal) = &mut *self.switch.journal.lock().unwrap() {
            journal.sync();
        }
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.switch.check()?;
        if let Some(journal) = &mut *self.switch.journal.lock().unwrap() {
            journal.write(offset, data);
        }
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}
