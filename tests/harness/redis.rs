//! A real `redis-server` for one test: on a free port of its own, in a folder of its own, ended by its process id when dropped.
//!
//! It can be paused, killed, stopped, started again on the same port and given a new replication id, which is what a fail-over looks
//! like to a script. It knows nothing of Pointsman.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::ports;

/// Makes the database `ARGV[2]` what `ARGV[1]` is, but for the key `ARGV[3]`.
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

    /// Starts a server with more options, such as `["--maxmemory", "20mb"]` or `["--appendonly", "yes"]`.
    pub(crate) fn with(options: &[&str]) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let folder = std::env::temp_dir().join(format!(
            "pointsman-redis-{}-{}",
            std::process::id(),
            STARTED.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir_all(&folder).expect("make a folder for redis-server");
        let mut server = Self {
            port: 0,
            folder,
            options: options.iter().map(ToString::to_string).collect(),
            child: None,
        };
        // Somebody outside the tests may take it before it is bound; then the next one is tried.
        for _ in 0..10 {
            // One that is still free when a killed server comes back to it.
            server.port = ports::free().port();
            if server.launch().is_ok() {
                return server;
            }
        }
        panic!(
            "redis-server does not start: {}",
            server.launch().expect_err("it just did")
        );
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// A plain connection, for what a publisher or an operator would do.
    pub(crate) fn connection(&self) -> redis::Connection {
        redis::Client::open(self.url())
            .and_then(|client| client.get_connection())
            .expect("connect to redis-server")
    }

    /// Runs one command, written as for `redis-cli` but without quotes.
    ///
    /// # Panics
    /// If Redis refuses it.
    pub(crate) fn command<T: redis::FromRedisValue>(&self, words: &str) -> T {
        let mut command = redis::Cmd::new();
        for word in words.split_whitespace() {
            command.arg(word);
        }
        command
            .query(&mut self.connection())
            .unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    /// Changes the replication id, as a promotion or a restart does: for every script, a new life begins.
    pub(crate) fn change_replid(&self) {
        let () = self.command("DEBUG CHANGE-REPL-ID");
    }

    /// Copies everything, as a replica has it at this moment.
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

    /// What a promoted replica shows that had got no further than the last [`RedisServer::snapshot`]: the data of then, and another
    /// replication id. Connections stay, as they do where a proxy stands between; [`RedisServer::cut`] cuts them.
    pub(crate) fn fail_over(&self) {
        self.fail_over_but("");
    }

    /// The same, but one key does not go back.
    pub(crate) fn fail_over_but(&self, key: &str) {
        let mut commands = redis::pipe();
        // In one step, or somebody would write to the old life on top of what the new one has.
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

    /// Cuts all connections of a type, `normal` or `pubsub`.
    pub(crate) fn cut(&self, kind: &str) {
        let _killed: i64 = self.command(&format!("CLIENT KILL TYPE {kind} SKIPME yes"));
    }

    /// Stops the process in its tracks: connections stay open, nothing answers.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
    }

    pub(crate) fn resume(&self) {
        self.signal("CONT");
    }

    /// Kills it as a crash does.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill redis-server");
            child.wait().expect("wait for redis-server");
        }
    }

    /// Ends it in an orderly way, which saves what its options say is saved.
    pub(crate) fn stop(&mut self) {
        if self.child.is_some() {
            self.signal("TERM");
        }
        if let Some(mut child) = self.child.take() {
            child.wait().expect("wait for redis-server");
        }
    }

    /// Starts it again on the same port and folder.
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
            format!(
                "redis-server cannot be run ({error}); install it: apt-get install redis-server"
            )
        })?;
        let mut log = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let mut said = String::new();
        for line in log.by_ref().map_while(Result::ok) {
            if line.contains("Ready to accept connections") {
                // Somebody has to go on reading, or the server blocks on a full pipe.
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
        // SIGKILL ends a paused process, too.
        self.kill();
        // A folder that stays behind harms nobody, and a panic in a drop would hide why the test failed.
        drop(fs::remove_dir_all(&self.folder));
    }
}
