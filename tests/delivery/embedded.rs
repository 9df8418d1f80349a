//! The embedded broker across processes: killed, and started twice on one folder.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pointsman::broker::embedded::Embedded;
use pointsman::broker::{Retention, Sources as _};
use pointsman::event::{EntryId, PartitionNumber};
use pointsman::shutdown::Shutdown;

const P: PartitionNumber = PartitionNumber(0);
/// The variable that names the folder for [`appends_until_it_is_killed`].
const FOLDER: &str = "POINTSMAN_TEST_APPEND_TO";

/// A folder that is removed when dropped.
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

/// The process that the next test kills: prints each acknowledged entry. Without the variable it
/// returns at once, as in an ordinary test run.
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

/// Repeatedly kills the process while it writes. The next process opens the folder at once and
/// finds every acknowledged entry.
#[tokio::test]
async fn a_killed_process_leaves_every_acknowledged_entry() {
    let folder = Folder::new("killed");
    let mut acknowledged: Vec<EntryId> = Vec::new();
    for kill in 1..=5 {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "delivery::embedded::appends_until_it_is_killed",
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
        acknowledged.extend(
            (0..kill * 10).map(|_| next().expect("the process appends until it is killed")),
        );
        process.kill().unwrap();
        process.wait().unwrap();
        // Lines printed before the kill count as well.
        acknowledged.extend(std::iter::from_fn(next));

        let started = Instant::now();
        let broker = folder.open().unwrap();
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "opening took {:?}",
            started.elapsed()
        );
        let entries = broker
            .read(P, EntryId::default(), 100_000, Duration::ZERO)
            .await
            .unwrap();
        let ids: Vec<EntryId> = entries.into_iter().map(|entry| entry.id).collect();
        assert!(
            acknowledged.iter().all(|id| ids.binary_search(id).is_ok()),
            "{} entries were acknowledged, {} are stored",
            acknowledged.len(),
            ids.len()
        );
        assert!(
            ids.len() - acknowledged.len() <= kill,
            "more than one unacknowledged entry per kill"
        );
    }
}

#[tokio::test]
async fn a_second_process_gets_the_id_of_the_first_until_that_has_ended() {
    let folder = Folder::new("twice");
    let first = folder.open().unwrap();
    let text = folder.open().map(drop).unwrap_err().to_string();
    let (dir, process) = (folder.0.display(), std::process::id());
    assert_eq!(
        text,
        format!(
            "the data folder {dir} is in use by process {process}; stop it or use another folder"
        )
    );
    drop(first);
    folder.open().unwrap();
}

#[test]
fn the_error_names_a_folder_that_cannot_be_created() {
    let file = Folder::new("file");
    std::fs::write(&file.0, "no folder").unwrap();
    let refused = open(&file.0.join("data"))
        .map(drop)
        .unwrap_err()
        .to_string();
    std::fs::remove_file(&file.0).unwrap();
    assert!(
        refused.contains(file.0.join("data").to_str().unwrap())
            && refused.contains("cannot be created"),
        "{refused}"
    );
}
