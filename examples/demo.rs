//! The demo: `make demo`.
//!
//! Starts a node on the embedded broker with the bundled plugins, publishes events of a small company to four people, two groups and
//! everyone, and follows the stream of each person as a browser would, cutting it now and then and coming back with the last event id.
//! Prints the address of the demo page, every notification, and in the end what became of all events that it published: exit code 0 if
//! nothing was lost or doubled, else 1.
//!
//! Runs until Ctrl-C; with `DEMO_SECONDS=30`, or without a terminal (then 30), it ends by itself. It expects the node's binary beside the
//! `examples` folder in which it lies itself, and the plugins in `build/plugins`: `make demo` sees to both.

#![expect(clippy::print_stdout, reason = "what the demo shows is its output")]

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
use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};

#[expect(dead_code, reason = "the demo needs less of the tests' client than the tests do")]
#[path = "../tests/harness/sse.rs"]
mod sse;

use sse::{Follower, Notification};

/// Who listens. The first two are in the group `ops`, the others in `shop`.
const USERS: [&str; 4] = ["ada", "bo", "chen", "dee"];
const OPS: [bool; 4] = [true, true, false, false];
const SHOP: [bool; 4] = [false, false, true, true];

/// Between two events.
const PACE: Duration = Duration::from_millis(300);

fn main() -> anyhow::Result<ExitCode> {
    let stop = stop_on_signal()?;
    let node = Node::start(&stop)?;
    let url = format!("http://{}", node.listen);
    for (user, group) in USERS.iter().zip(["ops", "ops", "shop", "shop"]) {
        let member = format!("{url}/v1/groups/{group}/members/{user}");
        ureq::put(&member).send_empty().with_context(|| format!("PUT {member}"))?;
    }
    let followers = USERS.map(|user| Follower::start(node.listen, &format!("user={user}")));
    let followers = followers.map(|follower| follower.connected(Duration::from_secs(10)));
    let end = seconds()?.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let until = seconds()?.map_or_else(|| "Ctrl-C ends it".to_owned(), |seconds| format!("it ends in {seconds} s"));
    println!("\nThe demo page: {url}/  ({until})\n");

    let mut tally = Tally::default();
    let mut next_event = Instant::now();
    let mut next_cut = Instant::now() + Duration::from_secs(3);
    while !stop.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
        if next_event <= Instant::now() {
            tally.publish(&url)?;
            next_event += PACE;
        }
        if next_cut <= Instant::now() {
            let who = rand::rng().random_range(0..USERS.len());
            let away = Duration::from_millis(rand::rng().random_range(500..3_000));
            println!("{:8}  {:5} (cut; comes back in {:.1} s with its last event id)", "", USERS[who], away.as_secs_f32());
            followers[who].cut(away);
            next_cut += Duration::from_millis(rand::rng().random_range(2_000..6_000));
        }
        tally.collect(&followers);
        std::thread::sleep(Duration::from_millis(20));
    }

    // Who is away comes back within 3 s; what is not there well after that is lost.
    let patience = Instant::now() + Duration::from_secs(15);
    while tally.count().lost > 0 && Instant::now() < patience {
        tally.collect(&followers);
        std::thread::sleep(Duration::from_millis(20));
    }
    tally.collect(&followers);
    let Count { delivered, lost, doubled } = tally.count();
    println!("\n{} published, {delivered} delivered, {lost} lost, {doubled} doubled", tally.events.len());
    if lost + doubled > 0 {
        println!("The node's log:\n{}", node.log());
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// How long to run; `None`: until Ctrl-C.
fn seconds() -> anyhow::Result<Option<u64>> {
    match std::env::var("DEMO_SECONDS") {
        Ok(text) => Ok(Some(text.parse().context("DEMO_SECONDS must be a number of seconds")?)),
        Err(_) if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() => Ok(None),
        Err(_) => Ok(Some(30)),
    }
}

/// Turns true at the first Ctrl-C or SIGTERM, so that the demo still counts up and takes its node with it.
fn stop_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};

    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        });
        set.store(true, Ordering::Relaxed);
    });
    Ok(stop)
}

/// What was published, to whom, and what of it arrived.
#[derive(Default)]
struct Tally {
    events: Vec<Fate>,
}

struct Fate {
    recipients: [bool; 4],
    arrivals: [u32; 4],
}

struct Count {
    delivered: u32,
    lost: u32,
    doubled: u32,
}

impl Tally {
    /// Publishes the next event; after a failure the same one again under the same id, until the node has it.
    fn publish(&mut self, url: &str) -> anyhow::Result<()> {
        let (mut event, recipients) = invent();
        event["specversion"] = json!("1.0");
        event["id"] = json!(format!("demo-{}", self.events.len()));
        self.events.push(Fate { recipients, arrivals: [0; 4] });
        let patience = Instant::now() + Duration::from_secs(10);
        loop {
            let request = ureq::post(format!("{url}/v1/events")).content_type("application/cloudevents+json");
            match request.send_json(&event) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > patience => return Err(error).context("POST /v1/events"),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Prints and counts what arrived.
    fn collect(&mut self, followers: &[Follower; 4]) {
        for (who, follower) in followers.iter().enumerate() {
            for notification in follower.take_notifications() {
                print(USERS[who], &notification);
                // What somebody publishes on the page is shown, but not ours to count.
                let number = notification.id.strip_prefix("demo-").and_then(|number| number.parse::<usize>().ok());
                if let Some(fate) = number.and_then(|number| self.events.get_mut(number)) {
                    fate.arrivals[who] += 1;
                }
            }
        }
    }

    /// A delivery to somebody who was not named counts as doubled, too: it is one too many.
    fn count(&self) -> Count {
        let mut count = Count { delivered: 0, lost: 0, doubled: 0 };
        for (expected, arrived) in self.events.iter().flat_map(|fate| fate.recipients.map(u32::from).into_iter().zip(fate.arrivals)) {
            count.delivered += arrived.min(expected);
            count.lost += expected.saturating_sub(arrived);
            count.doubled += arrived.saturating_sub(expected);
        }
        count
    }
}

/// A plausible event, and who should hear of it.
fn invent() -> (Value, [bool; 4]) {
    let mut random = rand::rng();
    let who = random.random_range(0..USERS.len());
    let only = |who: usize| std::array::from_fn(|n| n == who);
    let order = random.random_range(4_000..9_000);
    match random.random_range(0..10) {
        0..3 => {
            let (kind, data) =
                *[("order.placed", "total"), ("order.shipped", "parcels"), ("order.returned", "items")].choose(&mut random).expect("three");
            let data = json!({ "order": order, data: random.random_range(1..9) });
            (json!({ "type": kind, "source": "/shop", "user": USERS[who], "data": data }), only(who))
        }
        3..6 => {
            let from = USERS[(who + random.random_range(1..USERS.len())) % USERS.len()];
            let text =
                *["Lunch?", "Look at the dashboard, please", "Done!", "Who is on call?", "Ship it"].choose(&mut random).expect("five");
            (json!({ "type": "chat.message", "source": "/chat", "user": USERS[who], "data": { "from": from, "text": text } }), only(who))
        }
        6 => {
            let (kind, priority) = *[("deployment.finished", "normal"), ("deployment.started", "low"), ("deployment.failed", "urgent")]
                .choose(&mut random)
                .expect("three");
            let data = json!({ "service": "checkout", "version": format!("2.{}.0", order % 40) });
            (json!({ "type": kind, "source": "/ci", "group": "ops", "priority": priority, "data": data }), OPS)
        }
        7 => {
            let data = json!({ "article": order, "left": random.random_range(0..5) });
            (json!({ "type": "stock.low", "source": "/warehouse", "group": "shop", "priority": "high", "data": data }), SHOP)
        }
        8 => {
            // Named directly and through a group: one notification all the same.
            let data = json!({ "from": USERS[3], "text": "@ada the checkout page is slow again" });
            (json!({ "type": "chat.mention", "source": "/chat", "user": "ada", "group": "ops", "priority": "high", "data": data }), OPS)
        }
        _ => {
            let data = json!({ "text": "The coffee machine is back in service" });
            (json!({ "type": "office.news", "source": "/office", "everyone": true, "priority": "low", "data": data }), [true; 4])
        }
    }
}

/// One line a notification: when, who, how urgent, what.
fn print(user: &str, notification: &Notification) {
    let Notification { time, priority, kind, data, .. } = notification;
    let members = data.as_object().into_iter().flatten();
    let text: Vec<String> =
        members.map(|(name, value)| format!("{name} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned))).collect();
    println!("{:8}  {user:5}  {priority:6}  {kind:20}  {}", time.get(11..19).unwrap_or(time), text.join(", "));
}

/// The node, which ends with the demo.
struct Node {
    process: Child,
    folder: PathBuf,
    listen: SocketAddr,
}

impl Node {
    /// Starts it on port 8080, or on the next one that is free, and waits until it is ready.
    fn start(stop: &AtomicBool) -> anyhow::Result<Self> {
        let listen = (8080..8180).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).find(|addr| TcpListener::bind(addr).is_ok());
        let listen = listen.context("no port from 8080 to 8179 is free")?;
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let folder = std::env::temp_dir().join(format!("pointsman-demo-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let examples = std::env::current_exe()?;
        let binary = examples.parent().and_then(|folder| folder.parent()).context("the demo lies in no folder")?.join("pointsman");
        let log = File::create(folder.join("node.log"))?;
        let mut command = Command::new(&binary);
        command.args(["serve", "--dev", "--plugins", "build/plugins", "--listen", &listen.to_string(), "--admin", &admin.to_string()]);
        command.arg("--data").arg(folder.join("data"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A group of its own: Ctrl-C is for the demo, which ends the node when it has counted up.
        let process = command.process_group(0).spawn().with_context(|| format!("run {}; `make demo` builds it", binary.display()))?;
        let mut node = Self { process, folder, listen };
        let patience = Instant::now() + Duration::from_secs(60);
        while ureq::get(format!("http://{admin}/readyz")).call().is_err() {
            if let Some(status) = node.process.try_wait()? {
                bail!("the node ended ({status}):\n{}", node.log());
            }
            if stop.load(Ordering::Relaxed) || Instant::now() > patience {
                bail!("the node was not ready yet:\n{}", node.log());
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
        // In good order if it can; by force if it cannot. There is nobody to report a failure to.
        let asked = Command::new("kill").args(["-s", "TERM", &self.process.id().to_string()]).status();
        let patience = Instant::now() + Duration::from_secs(if asked.is_ok() { 10 } else { 0 });
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(self.process.kill());
        drop(self.process.wait());
        drop(fs::remove_dir_all(&self.folder));
    }
}
