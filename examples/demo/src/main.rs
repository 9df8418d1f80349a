//! The demo: `make demo`.
//!
//! Starts a node on the embedded broker with the bundled plugins, configured by
//! `examples/demo/pointsman.toml`. It publishes events of a small company and follows the stream of
//! each of its four people as a browser would. From time to time it cuts a stream, which then
//! resumes with its last event id. The demo prints the address of the demo page, every notification
//! and, at the end, the fate of all published events. The exit code is 0 if nothing was lost or
//! duplicated, otherwise 1.
//!
//! Runs until Ctrl-C. It ends on its own after `DEMO_SECONDS` if that is set, and after 30 s
//! without a terminal. It expects the binary of the node beside its own, and the plugins in
//! `build/plugins`; `make demo` builds both.

#![expect(clippy::print_stdout, reason = "the demo reports on standard output")]

use std::fs::{self, File};
use std::io::IsTerminal as _;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rand::Rng as _;
use serde_json::json;

#[expect(
    dead_code,
    reason = "the demo uses only part of the client that it shares with the tests"
)]
#[path = "../../../tests/harness/sse.rs"]
mod sse;
mod story;
mod tally;

use sse::{Follower, Notification};
use story::{PEOPLE, Scene, Story};
use tally::{Count, Tally};

/// The time between two events, and between two updates of the score.
const PACE: Duration = Duration::from_millis(400);
const SCORE_PACE: Duration = Duration::from_millis(900);

/// Events too frequent to print; they are counted like all others.
const NOT_PRINTED: [&str; 3] = ["match.score", "chat.typing", "report.row"];

/// In one piece, so that the demo reads from top to bottom as what it shows.
fn main() -> anyhow::Result<ExitCode> {
    let stop = stop_on_signal()?;
    println!("Starting a node, which compiles its plugins: a few seconds");
    let node = Node::start(&stop)?;
    let url = format!("http://{}", node.listen);
    for person in &PEOPLE {
        for group in person.groups {
            let member = format!("{url}/v1/groups/{group}/members/{}", person.name);
            ureq::put(&member)
                .send_empty()
                .with_context(|| format!("PUT {member}"))?;
        }
        let attributes = format!("{url}/v1/users/{}/attributes", person.name);
        let known = json!({ "plan": person.plan, "locale": person.locale });
        ureq::put(&attributes)
            .send_json(&known)
            .with_context(|| format!("PUT {attributes}"))?;
    }
    let followers = PEOPLE
        .each_ref()
        .map(|person| Follower::start(node.listen, &format!("user={}", person.name)));
    let followers = followers.map(|follower| follower.connected(Duration::from_secs(10)));
    let end = seconds()?.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let until = seconds()?.map_or_else(
        || "press Ctrl-C to stop".to_owned(),
        |seconds| format!("stops in {seconds} s"),
    );
    println!("\nThe demo page: {url}/  ({until})\n");

    let (mut story, mut tally) = (Story::default(), Tally::default());
    let (mut next_event, mut next_score) = (Instant::now(), Instant::now());
    let mut next_cut = Instant::now() + Duration::from_secs(3);
    while !stop.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
        if next_event <= Instant::now() {
            publish(&url, &mut tally, story.next())?;
            next_event += PACE;
        }
        if next_score <= Instant::now() {
            publish(&url, &mut tally, story.score())?;
            next_score += SCORE_PACE;
        }
        if next_cut <= Instant::now() {
            let who = rand::rng().random_range(0..PEOPLE.len());
            let away = Duration::from_millis(rand::rng().random_range(500..6_000));
            println!(
                "{:8}  {:5} (cut; resumes in {:.1} s with its last event id)",
                "",
                PEOPLE[who].name,
                away.as_secs_f32()
            );
            tally.cut(who, away);
            followers[who].cut(away);
            next_cut += Duration::from_millis(rand::rng().random_range(2_000..6_000));
        }
        collect(&followers, &mut tally);
        std::thread::sleep(Duration::from_millis(20));
    }

    // A stream that was cut resumes within 6 s; a notification that is missing well after that is
    // lost.
    let patience = Instant::now() + Duration::from_secs(15);
    while tally.count().lost > 0 && Instant::now() < patience {
        collect(&followers, &mut tally);
        std::thread::sleep(Duration::from_millis(20));
    }
    collect(&followers, &mut tally);
    let Count {
        delivered,
        superseded,
        expired,
        lost,
        duplicated,
    } = tally.count();
    println!(
        "\n{} published, {delivered} delivered, {lost} lost, {duplicated} duplicated",
        tally.n_published()
    );
    println!(
        "({superseded} superseded by a newer state, {expired} expired while the recipient was disconnected)"
    );
    if lost + duplicated > 0 {
        println!("The node's log:\n{}", node.log());
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// How long to run, in seconds; `None`: until Ctrl-C.
fn seconds() -> anyhow::Result<Option<u64>> {
    match std::env::var("DEMO_SECONDS") {
        Ok(text) => Ok(Some(
            text.parse()
                .context("DEMO_SECONDS must be a whole number of seconds")?,
        )),
        Err(_) if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() => Ok(None),
        Err(_) => Ok(Some(30)),
    }
}

/// Becomes true at the first Ctrl-C or SIGTERM, so that the demo can still print its counts and
/// stop its node.
fn stop_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};

    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        });
        set.store(true, Ordering::Relaxed);
    });
    Ok(stop)
}

/// Publishes an event. After a failure it retries with the same id, for up to 10 s.
fn publish(url: &str, tally: &mut Tally<4>, scene: Scene) -> anyhow::Result<()> {
    let Scene {
        mut event,
        recipients,
        collapse,
        ttl,
    } = scene;
    event["specversion"] = json!("1.0");
    event["id"] = json!(format!(
        "demo-{}",
        tally.publishes(recipients, collapse, ttl)
    ));
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        let request =
            ureq::post(format!("{url}/v1/events")).content_type("application/cloudevents+json");
        match request.send_json(&event) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > patience => {
                return Err(error).context("POST /v1/events");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Prints and counts the notifications that arrived.
fn collect(followers: &[Follower; 4], tally: &mut Tally<4>) {
    for (who, follower) in followers.iter().enumerate() {
        for notification in follower.take_notifications() {
            print(PEOPLE[who].name, &notification);
            // Events published on the demo page are printed but not counted.
            if let Some(number) = notification
                .id
                .strip_prefix("demo-")
                .and_then(|number| number.parse().ok())
            {
                tally.arrives(who, number);
            }
        }
    }
}

/// Prints a notification on one line: time, user, priority, type, router and target, data.
fn print(user: &str, notification: &Notification) {
    let Notification {
        time,
        priority,
        kind,
        by,
        to,
        data,
        ..
    } = notification;
    if NOT_PRINTED.contains(&kind.as_str()) {
        return;
    }
    let members = data.as_object().into_iter().flatten();
    let text: Vec<String> = members
        .map(|(name, value)| {
            format!(
                "{name} {}",
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned)
            )
        })
        .collect();
    let route = format!("{by} -> {to}");
    println!(
        "{:8}  {user:5}  {priority:6}  {kind:19}  {route:20}  {}",
        time.get(11..19).unwrap_or(time),
        text.join(", ")
    );
}

/// The node process, which ends with the demo.
struct Node {
    process: Child,
    folder: PathBuf,
    listen: SocketAddr,
}

impl Node {
    /// Starts the node on the first free port from 8080 and waits until it is ready.
    fn start(stop: &AtomicBool) -> anyhow::Result<Self> {
        let listen = (8080..8180)
            .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
            .find(|addr| TcpListener::bind(addr).is_ok());
        let listen = listen.context("no port from 8080 to 8179 is free")?;
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let folder = std::env::temp_dir().join(format!("pointsman-demo-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let binary = std::env::current_exe()?.with_file_name("pointsman");
        let log = File::create(folder.join("node.log"))?;
        let mut command = Command::new(&binary);
        command.args([
            "serve",
            "--dev",
            "--plugins",
            "build/plugins",
            "--listen",
            &listen.to_string(),
            "--admin",
            &admin.to_string(),
        ]);
        command
            .args(["--config", "examples/demo/pointsman.toml", "--data"])
            .arg(folder.join("data"));
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // A separate process group: Ctrl-C reaches only the demo, which stops the node after
        // printing its counts.
        let process = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("run {}; `make demo` builds it", binary.display()))?;
        let mut node = Self {
            process,
            folder,
            listen,
        };
        let patience = Instant::now() + Duration::from_secs(120);
        while ureq::get(format!("http://{admin}/readyz")).call().is_err() {
            if let Some(status) = node.process.try_wait()? {
                bail!("the node exited ({status}):\n{}", node.log());
            }
            if stop.load(Ordering::Relaxed) || Instant::now() > patience {
                bail!("the node did not become ready:\n{}", node.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(node)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("node.log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Stops the node with SIGTERM, or kills it if that fails. Errors are ignored, because
        // nothing can handle them here.
        let asked = Command::new("kill")
            .args(["-s", "TERM", &self.process.id().to_string()])
            .status();
        let patience = Instant::now() + Duration::from_secs(if asked.is_ok() { 10 } else { 0 });
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(self.process.kill());
        drop(self.process.wait());
        drop(fs::remove_dir_all(&self.folder));
    }
}
