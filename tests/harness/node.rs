//! A real node for one test: the `pointsman` binary of this build in a process of its own, with its
//! own ports and folder.
//!
//! A test can kill, stop, pause and restart it with the same name, ports and data. Its log is kept
//! and printed if the test fails. Dropping a running [`Node`] fails the test if entries are left
//! beyond the position, unless the builder allows them: a test that ignores its events would hide a
//! loss.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::clock::ShiftedClock;
use super::http::{self, Answer};
use super::publish::Publisher;
use super::sse::{Follower, Request, Stream};
use super::{eventually, ports};

/// Time limit for readiness: a debug build compiles the bundled plugins within it even while other
/// tests use both cores.
const READY: Duration = Duration::from_secs(60);
/// Time limit for everything that should happen at once.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// The metric that counts entries beyond the position.
const LAG: &str = "pointsman_source_lag_entries";

/// A folder that is removed when dropped.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "{}-{}",
            std::process::id(),
            MADE.fetch_add(1, Ordering::Relaxed)
        );
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).expect("create a folder for a test");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove the folder {}: {error}", self.0.display());
        }
    }
}

#[derive(Clone, Debug)]
enum Store {
    Ephemeral,
    Data,
    Redis(String),
}

/// The options of a node to start. The default is `--dev --ephemeral` with the bundled plugins.
#[derive(Clone, Debug)]
pub(crate) struct Builder {
    store: Store,
    dev: bool,
    plugins: Option<PathBuf>,
    name: Option<String>,
    config: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    leftovers: bool,
    ready: bool,
    log: Option<PathBuf>,
    limits: Option<String>,
}

impl Builder {
    /// `--data`, inside the test's folder.
    pub(crate) fn data(mut self) -> Self {
        self.store = Store::Data;
        self
    }

    /// `--redis URL`.
    pub(crate) fn redis(mut self, url: impl Into<String>) -> Self {
        self.store = Store::Redis(url.into());
        self
    }

    /// Without `--dev`, so that tokens and API keys are required.
    pub(crate) fn production(mut self) -> Self {
        self.dev = false;
        self
    }

    /// `--plugins DIR` instead of the bundled plugins.
    pub(crate) fn plugins(mut self, folder: impl Into<PathBuf>) -> Self {
        self.plugins = Some(folder.into());
        self
    }

    /// The text of its `pointsman.toml`.
    pub(crate) fn config(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.config);
        self
    }

    /// Sets an environment variable.
    pub(crate) fn environment(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Runs on this clock instead of that of the machine.
    pub(crate) fn clock(mut self, clock: &ShiftedClock) -> Self {
        self.environment.extend(clock.environment());
        self
    }

    /// Sets the log file, instead of the one that [`Node::log`] reads.
    pub(crate) fn log_to(mut self, path: impl Into<PathBuf>) -> Self {
        self.log = Some(path.into());
        self
    }

    /// Lets [`Builder::start`] return as soon as the admin listener answers, ready or not.
    pub(crate) fn may_be_unready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Runs under these limits, a command of the shell such as `ulimit -v 8000000`.
    pub(crate) fn limits(mut self, command: &str) -> Self {
        self.limits = Some(command.to_owned());
        self
    }

    /// Starts the node and waits until it is ready.
    ///
    /// # Panics
    /// If it exits or is not ready in time; the log is printed.
    pub(crate) fn start(self) -> Node {
        let (listen, admin) = (ports::free(), ports::free());
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| format!("test-{}", listen.port()));
        let mut node = Node {
            builder: self,
            folder: Folder::new(),
            name,
            listen,
            admin,
            process: None,
        };
        node.launch();
        node
    }

    fn command(
        &self,
        folder: &Folder,
        name: &str,
        listen: SocketAddr,
        admin: SocketAddr,
    ) -> Command {
        let binary = env!("CARGO_BIN_EXE_pointsman");
        let mut command = match &self.limits {
            None => Command::new(binary),
            Some(limits) => {
                let mut command = Command::new("sh");
                let script = format!("{limits} && exec \"$0\" \"$@\"");
                command.args(["-c", &script, binary]);
                command
            }
        };
        command.arg("serve").args([
            "--listen",
            &listen.to_string(),
            "--admin",
            &admin.to_string(),
            "--node",
            name,
        ]);
        match &self.store {
            Store::Ephemeral => command.arg("--ephemeral"),
            Store::Data => command.arg("--data").arg(folder.path().join("data")),
            Store::Redis(url) => command.args(["--redis", url]),
        };
        command
            .arg("--plugins")
            .arg(self.plugins.clone().unwrap_or_else(super::bundled_plugins));
        if self.dev {
            command.arg("--dev");
        }
        if !self.config.is_empty() {
            let file = folder.path().join("pointsman.toml");
            fs::write(&file, &self.config).expect("write pointsman.toml");
            command.arg("--config").arg(file);
        }
        // The environment of the person who runs the tests must not configure the node.
        for (variable, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("POINTSMAN_"))
        {
            command.env_remove(variable);
        }
        command.env("POINTSMAN_PLUGINS_CACHE", super::compiled_plugins());
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.current_dir(folder.path()).stdin(Stdio::null());
        command
    }
}

/// A node process; see the head of this file.
#[derive(Debug)]
pub(crate) struct Node {
    builder: Builder,
    folder: Folder,
    name: String,
    listen: SocketAddr,
    admin: SocketAddr,
    process: Option<Child>,
}

impl Node {
    pub(crate) fn builder() -> Builder {
        Builder {
            store: Store::Ephemeral,
            dev: true,
            plugins: None,
            name: None,
            config: String::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
            leftovers: false,
            ready: true,
            log: None,
            limits: None,
        }
    }

    /// The public address, for users and publishers.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.listen
    }

    /// The admin address, for operators and probes.
    pub(crate) fn admin_addr(&self) -> SocketAddr {
        self.admin
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.listen)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().expect("the node runs").id()
    }

    /// The whole log, over all of its processes.
    pub(crate) fn log(&self) -> String {
        fs::read(self.folder.path().join("node.log"))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Starts the next process without the limits of [`Builder::limits`].
    pub(crate) fn unlimited(&mut self) {
        self.builder.limits = None;
    }

    /// Kills the process with SIGKILL, as a crash would.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().expect("the node runs");
        process.kill().expect("kill the node");
        process.wait().expect("wait for the node");
    }

    /// Sends SIGTERM and waits for the process to exit.
    ///
    /// # Panics
    /// If that takes longer than `within`.
    pub(crate) fn terminate(&mut self, within: Duration) -> ExitStatus {
        self.signal("TERM");
        let mut process = self.process.take().expect("the node runs");
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = process.try_wait().expect("wait for the node") {
                return status;
            }
            if Instant::now() > deadline {
                self.process = Some(process);
                panic!("the node does not exit within {within:?} of SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal by its name, such as `STOP` or `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.pid().to_string()])
            .status()
            .expect("run kill");
        assert!(sent.success(), "kill -s {name} failed");
    }

    /// Starts the node again after [`Node::kill`] or [`Node::terminate`], with the same name, ports
    /// and data, and waits until it is ready.
    ///
    /// # Panics
    /// Like [`Builder::start`].
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "kill or terminate it first");
        self.launch();
    }

    /// Like [`Node::restart`], but returns as soon as the admin listener answers, ready or not.
    pub(crate) fn restart_unready(&mut self) {
        self.builder.ready = false;
        self.restart();
        self.builder.ready = true;
    }

    fn launch(&mut self) {
        let log = self
            .builder
            .log
            .clone()
            .unwrap_or_else(|| self.folder.path().join("node.log"));
        let log = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("open the node's log");
        let mut command = self
            .builder
            .command(&self.folder, &self.name, self.listen, self.admin);
        command
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log);
        self.process = Some(command.spawn().expect("run pointsman"));
        let deadline = Instant::now() + READY;
        loop {
            let reply = http::send("GET", &self.admin_url("/readyz"), &[], None);
            match &reply {
                Ok(answer) if answer.status == 200 || !self.builder.ready => return,
                _ => {}
            }
            let ended = self
                .process
                .as_mut()
                .expect("it was just started")
                .try_wait()
                .expect("wait for the node");
            assert!(ended.is_none(), "the node exited with {ended:?}");
            assert!(
                Instant::now() < deadline,
                "the node is not ready within {READY:?}: {reply:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// Sends a request without a body to the public listener.
    ///
    /// # Panics
    /// If there is no response.
    pub(crate) fn request(&self, method: &str, path: &str) -> Answer {
        http::send(method, &self.url(path), &[], None)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Like [`Node::request`], with headers and a body.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        http::send(method, &self.url(path), headers, Some(body))
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Sends `GET` to the admin listener: `/healthz`, `/readyz`, `/metrics`.
    pub(crate) fn admin(&self, path: &str) -> Answer {
        http::send("GET", &self.admin_url(path), &[], None)
            .unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// The folder of the node, which holds all of its files.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Sends an admin command to the admin listener.
    ///
    /// # Panics
    /// If there is no response.
    pub(crate) fn order(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        http::send(method, &self.admin_url(path), headers, Some(body))
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Replaces its `pointsman.toml` in one step while it runs. The node must have been started
    /// with one.
    pub(crate) fn reconfigure(&self, toml: &str) {
        let draft = self.folder.path().join(".pointsman.toml");
        fs::write(&draft, toml).expect("write a draft");
        fs::rename(draft, self.folder.path().join("pointsman.toml")).expect("rename it");
    }

    /// Removes its `pointsman.toml` while it runs.
    pub(crate) fn unconfigure(&self) {
        fs::remove_file(self.folder.path().join("pointsman.toml"))
            .expect("the node has a pointsman.toml");
    }

    /// The sum of all series of a metric whose lines begin with `name`, such as
    /// `pointsman_events_total{outcome="committed"}`; 0 if there is none.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        sum_of_metric(&self.admin("/metrics").body, name).unwrap_or_default()
    }

    /// Like [`Node::metric`], but `None` if the node does not answer or has no such series.
    pub(crate) fn metric_if_up(&self, name: &str) -> Option<f64> {
        let page = http::send("GET", &self.admin_url("/metrics"), &[], None).ok()?;
        sum_of_metric(&page.body, name)
    }

    /// The resident memory of the process in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("read /proc");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("VmRSS");
        line.trim()
            .trim_end_matches(" kB")
            .parse()
            .expect("a number of KiB")
    }

    /// Adds a user to a group; events published afterwards reach the user.
    pub(crate) fn join(&self, group: &str, user: &str) {
        let answer = self.request("PUT", &format!("/v1/groups/{group}/members/{user}"));
        assert!(
            (200..300).contains(&answer.status),
            "cannot add a member: {answer:?}"
        );
    }

    pub(crate) fn publisher(&self) -> Publisher {
        Publisher::new(self.listen)
    }

    /// An open stream of a user, past its first `cursor`: every event published from now on arrives
    /// on it.
    pub(crate) fn stream(&self, user: &str) -> Stream {
        let mut stream = Request::new(self.listen, &format!("user={user}"))
            .open(SOON)
            .expect("open a stream");
        stream.next_state("cursor", SOON);
        stream
    }

    /// A client of this user that reconnects whenever it is cut and has received its first id.
    pub(crate) fn follower(&self, user: &str) -> Follower {
        Follower::start(self.listen, &format!("user={user}")).connected(SOON)
    }

    /// Waits until this process has counted `n` outcomes.
    ///
    /// # Panics
    /// If that takes longer than `within`.
    pub(crate) fn await_outcomes(&self, n: usize, within: Duration) {
        eventually(within, "every event has its outcome", || {
            (self.metric("pointsman_events_total") >= n as f64).then_some(())
        });
    }
}

/// Adds up the values of all lines of a metrics page that begin with `name`, followed by labels or
/// a value; `None` if there is none.
fn sum_of_metric(page: &str, name: &str) -> Option<f64> {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.strip_prefix('{') {
            Some(labels) => labels.split_once("} ")?.1,
            None => rest.strip_prefix(' ')?,
        };
        value.split(' ').next()?.parse::<f64>().ok()
    });
    values.reduce(|sum, value| sum + value)
}

impl Drop for Node {
    fn drop(&mut self) {
        let alive = self
            .process
            .as_mut()
            .is_some_and(|process| matches!(process.try_wait(), Ok(None)));
        // If the test is failing already, its own message counts.
        let lag = (alive && !self.builder.leftovers && !std::thread::panicking())
            .then(|| lag_in_the_end(self));
        if let Some(mut process) = self.process.take() {
            // The process may have exited by itself.
            drop(process.kill());
            drop(process.wait());
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!(
                "--- the last of {} log lines of {}:\n{}",
                lines.len(),
                self.name,
                lines[lines.len().saturating_sub(60)..].join("\n")
            );
        }
        if let Some(lag) = lag {
            assert!(
                lag == Some(0.0),
                "entries are left beyond the position (lag {lag:?}); the node's log:\n{}",
                self.log()
            );
        }
    }
}

/// Waits for the lag to become 0 and returns the last one read; `None` if the node does not answer.
fn lag_in_the_end(node: &Node) -> Option<f64> {
    let deadline = Instant::now() + SOON;
    loop {
        let lag = node.metric_if_up(LAG);
        if lag == Some(0.0) || Instant::now() > deadline {
            return lag;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
