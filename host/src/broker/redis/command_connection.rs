//! The command connection, which all commands of a node share.
//!
//! Every answer has a deadline. A connection that fails or misses the deadline is dropped, and a
//! later command opens a new one. The pause between attempts grows while Redis is unavailable;
//! during the pause, commands fail immediately with [`Error::Unavailable`]. A command that was sent
//! on a dropped connection may still take effect. The notice connection is in [`super::feed`], and
//! the connections that wait for entries are in [`super::readers`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, Value,
};

use super::scripts::Script;
use crate::backoff::Backoff;
use crate::broker::{Error, Result};

/// The deadline of a command, including the time to connect.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// The deadline for connecting. Shorter than [`DEADLINE`], so that a command reports the connection
/// error and not a timeout.
const CONNECT_DEADLINE: Duration = Duration::from_millis(1_500);

/// The pauses between attempts to connect. Shorter than the interval between ticks: after an
/// outage, at most one tick falls into a pause.
pub(super) const BACKOFF: Backoff = Backoff::new(
    Duration::from_millis(50),
    Duration::from_millis(500),
    0.5..=1.0,
);

/// The shared command connection.
pub(super) struct CommandConnection {
    client: Client,
    // Held while connecting, so that concurrent commands share one attempt.
    state: tokio::sync::Mutex<ConnectionState>,
    /// A copy of `ConnectionState::generation` that can be read without the lock.
    generation: AtomicU64,
}

struct ConnectionState {
    connection: Option<MultiplexedConnection>,
    /// Identifies the connection, so that a failed command drops only the connection it used.
    generation: u64,
    backoff: Backoff,
    not_before: Option<Instant>,
    why: String,
}

impl Default for ConnectionState {
    fn default() -> Self {
        Self {
            connection: None,
            generation: 0,
            backoff: BACKOFF,
            not_before: None,
            why: String::new(),
        }
    }
}

impl CommandConnection {
    pub(super) fn new(client: Client) -> Self {
        Self {
            client,
            state: tokio::sync::Mutex::default(),
            generation: AtomicU64::new(0),
        }
    }

    /// Identifies the connection in use. A connection that was opened under an earlier generation
    /// may lead to a former primary.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Runs a command.
    pub(super) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        self.within_deadline(async |mut connection| {
            command.query_async::<Value>(&mut connection).await
        })
        .await
        .and_then(parse)
    }

    /// Runs commands in one round trip, not atomically.
    pub(super) async fn pipeline<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T> {
        self.within_deadline(async |mut connection| {
            commands.query_async::<Value>(&mut connection).await
        })
        .await
        .and_then(parse)
    }

    /// Runs a script. `arguments` adds the number of keys, the keys and the arguments.
    pub(super) async fn eval<T: FromRedisValue>(
        &self,
        script: &Script,
        arguments: impl Fn(&mut Cmd),
    ) -> Result<T> {
        let call = |by: &str, script: &str| {
            let mut command = redis::cmd(by);
            command.arg(script);
            arguments(&mut command);
            command
        };
        let by_hash = call("EVALSHA", &script.hash);
        let answer = self.within_deadline(async |mut connection| {
            match by_hash.query_async::<Value>(&mut connection).await {
                Err(error) if error.code() == Some("NOSCRIPT") => {
                    call("EVAL", &script.code)
                        .query_async(&mut connection)
                        .await
                }
                answer => answer,
            }
        });
        answer.await.and_then(parse)
    }

    async fn within_deadline(
        &self,
        run: impl AsyncFnOnce(MultiplexedConnection) -> Result<Value, RedisError>,
    ) -> Result<Value> {
        let mut used = None;
        let answer = tokio::time::timeout(DEADLINE, async {
            let (connection, generation) = self.connection().await?;
            used = Some(generation);
            run(connection).await.map_err(CommandFailure::Redis)
        });
        let failure = match answer.await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(CommandFailure::Known(error))) => return Err(error),
            Ok(Err(CommandFailure::Redis(error))) if !breaks_connection(&error) => {
                return Err(explain(&error));
            }
            Ok(Err(CommandFailure::Redis(error))) => explain(&error),
            Err(_) => Error::Unavailable(format!("no answer within {} s", DEADLINE.as_secs())),
        };
        if let Some(generation) = used {
            let mut state = self.state.lock().await;
            if state.generation == generation {
                state.connection = None;
            }
        }
        Err(failure)
    }

    async fn connection(&self) -> Result<(MultiplexedConnection, u64), CommandFailure> {
        let mut state = self.state.lock().await;
        if let Some(connection) = &state.connection {
            return Ok((connection.clone(), state.generation));
        }
        if state.not_before.is_some_and(|at| Instant::now() < at) {
            return Err(CommandFailure::Known(Error::Unavailable(state.why.clone())));
        }
        match connect(&self.client).await {
            Ok(connection) => {
                let generation = state.generation + 1;
                self.generation.store(generation, Ordering::Relaxed);
                *state = ConnectionState {
                    connection: Some(connection.clone()),
                    generation,
                    ..ConnectionState::default()
                };
                Ok((connection, generation))
            }
            Err(error) => {
                state.not_before = Some(Instant::now() + state.backoff.pause());
                let error = explain(&error);
                state.why = match &error {
                    Error::Unavailable(why) | Error::Full(why) | Error::Permanent(why) => {
                        why.clone()
                    }
                    Error::TooManyGroups { .. } => error.to_string(),
                };
                Err(CommandFailure::Known(error))
            }
        }
    }
}

enum CommandFailure {
    /// Already explained; no connection to drop.
    Known(Error),
    Redis(RedisError),
}

async fn connect(client: &Client) -> Result<MultiplexedConnection, RedisError> {
    // `within_deadline` enforces the deadline of answers. The library's own timeout would cut off
    // blocking reads.
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_DEADLINE))
        .set_response_timeout(None);
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

/// Converts an answer into the expected type.
pub(super) fn parse<T: FromRedisValue>(value: Value) -> Result<T> {
    redis::from_redis_value(value).map_err(|error| unexpected(&error))
}

/// The error for an answer that none of our scripts and keys produces.
pub(super) fn unexpected(what: &dyn std::fmt::Display) -> Error {
    Error::Permanent(format!(
        "unexpected answer ({what}); check whether another program writes to Pointsman's keys"
    ))
}

/// Whether the connection on which this error occurred is unusable. A connection to a replica is
/// dropped as well: the next one resolves the name again and reaches the new primary.
fn breaks_connection(error: &RedisError) -> bool {
    if error.code() == Some("READONLY") {
        return true;
    }
    error.code().is_none() && !matches!(error.kind(), ErrorKind::UnexpectedReturnType)
}

/// Why Redis accepts reads but no writes, with the fix; `None` for every other error. Scripts that
/// may write are then refused before they begin.
pub(super) fn write_refusal(error: &Error) -> Option<&'static str> {
    let Error::Unavailable(why) = error else {
        return None;
    };
    if why.contains("NOREPLICAS") {
        Some(
            "Redis refuses writes, because too few replicas are connected (NOREPLICAS); start them or lower min-replicas-to-write",
        )
    } else if why.contains("MISCONF") {
        Some(
            "Redis refuses writes, because it cannot save its data (MISCONF); free disk space and read the log of Redis",
        )
    } else {
        None
    }
}

/// Classifies an error as temporary, out of memory or permanent. A permanent error names its fix.
pub(super) fn explain(error: &RedisError) -> Error {
    match error.code() {
        Some(
            "LOADING" | "READONLY" | "NOREPLICAS" | "MISCONF" | "MASTERDOWN" | "CLUSTERDOWN"
            | "TRYAGAIN" | "ASK" | "MOVED" | "BUSY" | "UNBLOCKED",
        ) => Error::Unavailable(error.to_string()),
        Some("OOM") => Error::Full(format!("{error}; raise maxmemory or let the backlog drain")),
        Some("NOPERM") => {
            let why = error.detail().unwrap_or_default();
            // Redis adds the hash of a script and the line to errors that the script raises.
            let why = why.split(" script: ").next().unwrap_or(why);
            Error::Permanent(format!("NOPERM {why}; grant it with ACL SETUSER"))
        }
        Some("WRONGPASS" | "NOAUTH") => {
            Error::Permanent(format!("{error}; correct user and password in the URL"))
        }
        Some("WRONGTYPE") => Error::Permanent(format!(
            "{error}; a key of Pointsman has the wrong type; rename or delete it"
        )),
        Some(_) => Error::Permanent(error.to_string()),
        // A parser error of the library, which describes on several lines what it expected.
        None if error.to_string().contains("end of input") => {
            Error::Unavailable("the connection was closed within an answer".into())
        }
        None => match error.kind() {
            ErrorKind::AuthenticationFailed => {
                Error::Permanent(format!("{error}; correct user and password in the URL"))
            }
            ErrorKind::InvalidClientConfig | ErrorKind::Client => {
                Error::Permanent(error.to_string())
            }
            _ => Error::Unavailable(error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The library reports the half answer as one of an unexpected type, on two lines.
    #[tokio::test]
    async fn a_connection_cut_within_an_answer_is_reported_as_such_on_one_line() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut input = Vec::new();
                while socket.read_buf(&mut input).await.is_ok_and(|n| n > 0) {
                    let text = String::from_utf8_lossy(&input).into_owned();
                    if text.contains("HGETALL") {
                        socket.write_all(b"*2\r\n$5\r\nab").await.unwrap();
                        socket.shutdown().await.unwrap();
                    }
                    // The library names itself first.
                    if text.contains("LIB-VER") {
                        socket.write_all(b"+OK\r\n+OK\r\n").await.unwrap();
                        input.clear();
                    }
                }
            }
        });
        let connection = CommandConnection::new(Client::open(url).unwrap());
        let answer: Result<Vec<String>> = connection.query(redis::cmd("HGETALL").arg("k")).await;
        match answer {
            Err(Error::Unavailable(why)) => assert!(
                why == "the connection was closed within an answer",
                "{why:?}"
            ),
            other => panic!("{other:?}"),
        }
    }
}
