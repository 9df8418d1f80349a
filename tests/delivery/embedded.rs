//! The embedded broker as a process meets it: killed, started twice.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pointsman::broker::embedded::Embedded;
use pointsman::broker::{Broker as _, PartitionNumber, Retention};
use pointsman::event::EntryId;
use pointsman::shutdown::Shutdown;

const P: PartitionNumber = PartitionNumber(0);
/// Where [`appends_until_it_is_killed`] finds its folder.
const FOLDER: &str = "POINTSMAN_TEST_APPEND_TO";

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("pointsman-{name}-{}", std::process::id())))
    }

    fn open(&self) -> anyhow::Result<Embedded> {
        open(&self.0)
    }
}

fn open(dir: &Path) -> anyhow::Result<Embedded> {
    Embedded::open(
        dir,
        &["pointsman:events".to_owned()],
        Retention::default(),
        Shutdown::new().alarm("the writer"),
    )
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// The process that the next test kills: says what was acknowledged. Without a folder it is no such process, and does nothing.
#[tokio::test]
async fn appends_until_it_is_killed() {
    let Some(dir) = std::env::var_os(FOLDER) else {
        return;
    };
    let broker = open(Path::new(&dir)).unwrap();
    for n in 0_u32.. {
        let ids = broker
            .append(
                P,
                vec![vec![(Bytes::from_static(b"n"), Bytes::from(n.to_string()))]],
            )
            .await
            .unwrap();
        writeln!(std::io::stdout(), "acknowledged {}", ids[0]).unwrap();
    }
}

/// Again and again: SIGKILL while it writes, and the next process has the folder at once, with all that was acknowledged.
#[tokio::test]
async fn a_killed_process_leaves_everything_that_was_acknowledged() {
    let folder = Folder::new("killed");
    let mut acknowledged: Vec<EntryId> = Vec::new();
    for kill in 1..=5 {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "embedded::appends_until_it_is_killed",
                "--nocapture",
            ])
            .env(FOLDER, &folder.0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut next = || {
            lines.by_ref().map(Result::unwrap).find_map(|line| {
                line.split_once("acknowledged ")
                    .map(|(_, id)| id.parse::<EntryId>().unwrap())
            })
        };
        acknowledged.extend((0..kill * 10).map(|_| next().expect("it goes on until it is killed")));
        process.kill().unwrap();
        process.wait().unwrap();
        // What it said before it died counts as well.
        acknowledged.extend(std::iter::from_fn(next));

        let started = Instant::now();
        let broker = folder.open().unwrap();
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "it took {:?}",
            started.elapsed()
        );
        let entries = broker
            .read(P, EntryId::default(), 100_000, Duration::ZERO)
            .await
            .unwrap();
        let ids: Vec<EntryId> = entries.into_iter().map(|entry| entry.id).collect();
        assert!(
            acknowledged.iter().all(|id| ids.binary_search(id).is_ok()),
            "of {} acknowledged {} are there",
            acknowledged.len(),
            ids.len()
        );
        assert!(
            ids.len() - acknowledged.len() <= kill,
            "at most the one in flight at each kill was not acknowledged"
        );
    }
}

#[tokio::test]
async fn a_second_process_is_refused_by_name_until_the_first_has_ended() {
    let folder = Folder::new("twice");
    let first = folder.open().unwrap();
    let text = folder.open().map(drop).unwrap_err().to_string();
    let (dir, process) = (folder.0.display(), std::process::id());
    assert_eq!(
        text,
        format!(
            "the data folder {dir} is in use by the process {process}: stop it, or give another folder"
        )
    );
    drop(first);
    folder.open().unwrap();
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let file = Folder::new("file");
    std::fs::write(&file.0, "no folder").unwrap();
    let refused = open(&file.0.join("data"))
        .map(drop)
        .unwrap_err()
        .to_string();
    std::fs::remove_file(&file.0).unwrap();
    assert!(
        refused.contains(file.0.join("data").to_str().unwrap())
            && refused.contains("cannot be made"),
        "{refused}"
    );
}
