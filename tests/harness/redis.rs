//! A real `redis-server` for one test, on a free port and in a folder of its own. It is ended by
//! its process id when dropped.
//!
//! A test can pause, kill and stop it, start it again on the same port, and change its replication
//! id, which is how a script notices a fail-over. This module knows nothing about Pointsman.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::node::SOON;
use super::ports;

/// Makes the database `ARGV[2]` a copy of `ARGV[1]`, except for the key `ARGV[3]`.
const COPY_DATABASE: &str = "local from, to, but = ARGV[1], ARGV[2], ARGV[3]
    redis.call('SELECT', to)
    for _, key in ipairs(redis.call('KEYS', '*')) do if key ~= but then redis.call('DEL', key) end end
    redis.call('SELECT', from)
    for _, key in ipairs(redis.call('KEYS', '*')) do if key ~= but then redis.call('COPY', key, key, 'DB', to) end end";

/// A running (or, after [`RedisServer::kill`] or [`RedisServer::stop`], stopped) server.
#[derive(Debug)]
pub(crate) struct RedisServer {
    port: u16,
    folder: PathBuf,
    options: Vec<String>,
    child: Option<Child>,
}

impl RedisServer {
    /// Starts a server without persistence.
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// Starts a Redis Cluster of one node, which refuses scripts that access several slots.
    pub(crate) fn cluster() -> Self {
        // The default, 10,000 above the port, may be above the highest port.
        let bus = ports::free().port().to_string();
        let server = Self::with(&["--cluster-enabled", "yes", "--cluster-port", &bus]);
        let () = server.command("CLUSTER ADDSLOTSRANGE 0 16383");
        super::eventually(SOON, "the cluster is up", || {
            let info: String = server.command("CLUSTER INFO");
            info.contains("cluster_state:ok").then_some(())
        });
        server
    }

    /// Starts a server with more options, such as `["--maxmemory", "20mb"]` or `["--appendonly",
    /// "yes"]`.
    pub(crate) fn with(options: &[&str]) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let folder = std::env::temp_dir().join(format!(
            "pointsman-redis-{}-{}",
            std::process::id(),
            STARTED.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir_all(&folder).expect("create a folder for redis-server");
        let mut server = Self {
            port: 0,
            folder,
            options: options.iter().map(ToString::to_string).collect(),
            child: None,
        };
        // A process outside the tests may take the port before it is bound; then the next one is
        // tried.
        for _ in 0..10 {
            // `ports::free` never hands the same port out twice, so it is still free when a killed
            // server restarts.
            server.port = ports::free().port();
            if server.launch().is_ok() {
                return server;
            }
        }
        panic!(
            "redis-server does not start: {}",
            server.launch().expect_err("it just failed")
        );
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// A plain connection for the commands of a publisher or an operator.
    pub(crate) fn connection(&self) -> redis::Connection {
        redis::Client::open(self.url())
            .and_then(|client| client.get_connection())
            .expect("connect to redis-server")
    }

    /// Runs one command, written as for `redis-cli` but without quotes.
    ///
    /// # Panics
    /// If Redis returns an error.
    pub(crate) fn command<T: redis::FromRedisValue>(&self, words: &str) -> T {
        let mut command = redis::Cmd::new();
        for word in words.split_whitespace() {
            command.arg(word);
        }
        command
            .query(&mut self.connection())
            .unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    /// Changes the replication id, as a promotion or a restart does: every script then begins a new
    /// epoch.
    pub(crate) fn change_replid(&self) {
        let () = self.command("DEBUG CHANGE-REPL-ID");
    }

    /// Copies the data, as the state that a replica has reached.
    pub(crate) fn snapshot(&self) {
        redis::cmd("EVAL")
            .arg(COPY_DATABASE)
            .arg(0)
            .arg(0)
            .arg(1)
            .arg("")
            .exec(&mut self.connection())
            .expect("copy a database");
    }

    /// Simulates the promotion of a replica that had replicated up to the last
    /// [`RedisServer::snapshot`]: restores that data and changes the replication id. Connections
    /// stay open, as behind a proxy; [`RedisServer::cut`] closes them.
    pub(crate) fn fail_over(&self) {
        self.fail_over_but("");
    }

    /// Like [`RedisServer::fail_over`], except that one key keeps its present value.
    pub(crate) fn fail_over_but(&self, key: &str) {
        let mut commands = redis::pipe();
        // In one transaction: otherwise a node could write in the old epoch on top of the new data.
        commands
            .atomic()
            .cmd("EVAL")
            .arg(COPY_DATABASE)
            .arg(0)
            .arg(1)
            .arg(0)
            .arg(key)
            .cmd("DEBUG")
            .arg("CHANGE-REPL-ID");
        commands
            .exec(&mut self.connection())
            .expect("copy a database");
    }

    /// Closes all connections of a type, `normal` or `pubsub`.
    pub(crate) fn cut(&self, kind: &str) {
        let _killed: i64 = self.command(&format!("CLIENT KILL TYPE {kind} SKIPME yes"));
    }

    /// Suspends the process: connections stay open and get no replies.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
    }

    pub(crate) fn resume(&self) {
        self.signal("CONT");
    }

    /// Kills the process as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill redis-server");
            child.wait().expect("wait for redis-server");
        }
    }

    /// Shuts it down cleanly, which saves the data if its options request it.
    pub(crate) fn stop(&mut self) {
        if self.child.is_some() {
            self.signal("TERM");
        }
        if let Some(mut child) = self.child.take() {
            child.wait().expect("wait for redis-server");
        }
    }

    /// Starts it again with the same port and folder.
    pub(crate) fn restart(&mut self) {
        assert!(self.child.is_none(), "stop or kill it first");
        self.launch().expect("start redis-server again");
    }

    /// Starts the process and returns when it accepts connections.
    fn launch(&mut self) -> Result<(), String> {
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &self.port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--enable-debug-command",
            "local",
        ]);
        command.arg("--dir").arg(&self.folder).args(&self.options);
        let started = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = started.map_err(|error| {
            format!("cannot run redis-server ({error}); install it: apt-get install redis-server")
        })?;
        let mut log = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let mut said = String::new();
        for line in log.by_ref().map_while(Result::ok) {
            if line.contains("Ready to accept connections") {
                // The log must be read further, or the server blocks on a full pipe.
                std::thread::spawn(move || log.for_each(drop));
                self.child = Some(child);
                return Ok(());
            }
            said.push_str(&line);
            said.push('\n');
        }
        child.wait().expect("wait for redis-server");
        Err(said)
    }

    fn signal(&self, name: &str) {
        let child = self.child.as_ref().expect("redis-server runs");
        let sent = Command::new("kill")
            .args(["-s", name, &child.id().to_string()])
            .status()
            .expect("run kill");
        assert!(sent.success(), "kill -s {name} failed");
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // SIGKILL also ends a suspended process.
        self.kill();
        // A leftover folder does no harm, and a panic in `drop` would hide the failure of the test.
        drop(fs::remove_dir_all(&self.folder));
    }
}
