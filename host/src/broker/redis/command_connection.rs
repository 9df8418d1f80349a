//! The connections for commands: one that everything shares, and for each partition a few for reads that wait.
//!
//! Each answer has a deadline. A connection that fails or misses it is dropped, and the next command makes another, with a pause that
//! grows while Redis stays away; in that pause commands fail at once with [`Error::Away`]. What was sent on a dropped connection may still
//! happen. The connection for notices is [`super::feed`]'s.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, Value,
};

use super::scripts::Script;
use crate::broker::{Error, Result};

/// How long a command may take, connecting included.
pub(super) const DEADLINE: Duration = Duration::from_secs(2);
/// How long connecting may take: less than the deadline, so that its failure is known before it.
const CONNECT_DEADLINE: Duration = Duration::from_millis(1_500);
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Idle connections kept for waiting reads; a partition has one owner, and a second one now and then.
const IDLE_READERS: usize = 2;

/// The pause before the attempt after `failures` failed ones, up to half of it by chance so that nodes do not come back in step.
pub(super) fn pause(failures: u32) -> Duration {
    let full = SHORTEST_PAUSE
        .saturating_mul(1 << failures.min(10))
        .min(LONGEST_PAUSE);
    full.mul_f64(rand::random_range(0.5..=1.0))
}

/// The shared connection.
pub(super) struct Link {
    client: Client,
    // Held while connecting, so that many commands make one attempt.
    state: tokio::sync::Mutex<State>,
    /// `State::generation`, to be read at any time.
    generation: AtomicU64,
}

#[derive(Default)]
struct State {
    connection: Option<MultiplexedConnection>,
    /// Which connection that is, so that only the failed one is dropped.
    generation: u64,
    failures: u32,
    not_before: Option<Instant>,
    why: String,
}

impl Link {
    pub(super) fn new(client: Client) -> Self {
        Self {
            client,
            state: tokio::sync::Mutex::default(),
            generation: AtomicU64::new(0),
        }
    }

    /// Runs a command.
    pub(super) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        self.within_deadline(async |mut connection| {
            command.query_async::<Value>(&mut connection).await
        })
        .await
        .and_then(parse)
    }

    /// Runs commands in one round trip, not in one step.
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
            run(connection).await.map_err(Failure::Redis)
        });
        let failure = match answer.await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(Failure::Known(error))) => return Err(error),
            Ok(Err(Failure::Redis(error))) if !breaks_connection(&error) => {
                return Err(explain(&error));
            }
            Ok(Err(Failure::Redis(error))) => explain(&error),
            Err(_) => Error::Away(format!("no answer within {} s", DEADLINE.as_secs())),
        };
        if let Some(generation) = used {
            let mut state = self.state.lock().await;
            if state.generation == generation {
                state.connection = None;
            }
        }
        Err(failure)
    }

    async fn connection(&self) -> Result<(MultiplexedConnection, u64), Failure> {
        let mut state = self.state.lock().await;
        if let Some(connection) = &state.connection {
            return Ok((connection.clone(), state.generation));
        }
        if state.not_before.is_some_and(|at| Instant::now() < at) {
            return Err(Failure::Known(Error::Away(state.why.clone())));
        }
        match connect(&self.client).await {
            Ok(connection) => {
                let generation = state.generation + 1;
                self.generation.store(generation, Ordering::Relaxed);
                *state = State {
                    connection: Some(connection.clone()),
                    generation,
                    ..State::default()
                };
                Ok((connection, generation))
            }
            Err(error) => {
                state.not_before = Some(Instant::now() + pause(state.failures));
                state.failures += 1;
                let error = explain(&error);
                state.why = match &error {
                    Error::Away(why) | Error::Full(why) | Error::Refused(why) => why.clone(),
                };
                Err(Failure::Known(error))
            }
        }
    }
}

enum Failure {
    /// Explained already, and no connection to drop.
    Known(Error),
    Redis(RedisError),
}

async fn connect(client: &Client) -> Result<MultiplexedConnection, RedisError> {
    // The deadline of an answer is ours, above; the library's own would cut a read that waits.
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_DEADLINE))
        .set_response_timeout(None);
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

/// Connections for reads of one partition that wait. Each read has one for itself: on a shared one, everything behind it would wait too.
///
/// One that is older than the shared connection is not used again: after a fail-over it may lead to the former primary, whose entries
/// would be committed as the new one's.
#[derive(Default)]
pub(super) struct Readers {
    /// With the generation of the shared connection when they were made.
    idle: Mutex<Vec<(u64, MultiplexedConnection)>>,
}

impl Readers {
    /// Runs a command that may wait for `wait`. A connection is given back only after its answer came: dropping the read closes it, and with
    /// it the wait at Redis.
    pub(super) async fn query<T: FromRedisValue>(
        &self,
        link: &Link,
        command: &Cmd,
        wait: Duration,
    ) -> Result<T> {
        let generation = link.generation.load(Ordering::Relaxed);
        let idle = {
            let mut idle = self.idle();
            idle.retain(|(of, _)| *of == generation);
            idle.pop()
        };
        let read = async {
            let mut connection = match idle {
                Some((_, connection)) => connection,
                None => connect(&link.client).await?,
            };
            let answer = command.query_async::<Value>(&mut connection).await;
            if !answer.as_ref().is_err_and(breaks_connection) {
                let mut idle = self.idle();
                if idle.len() < IDLE_READERS {
                    idle.push((generation, connection));
                }
            }
            answer
        };
        match tokio::time::timeout(wait + DEADLINE, read).await {
            Ok(answer) => answer.map_err(|error| explain(&error)).and_then(parse),
            Err(_) => Err(Error::Away(format!(
                "no answer within {} s",
                (wait + DEADLINE).as_secs()
            ))),
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(u64, MultiplexedConnection)>> {
        // A panic while it was held leaves a Vec that is still one.
        self.idle
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Reads an answer as what it should be.
pub(super) fn parse<T: FromRedisValue>(value: Value) -> Result<T> {
    redis::from_redis_value(value).map_err(|error| unexpected(&error))
}

/// What Redis answered is nothing that our scripts answer.
pub(super) fn unexpected(what: &dyn std::fmt::Display) -> Error {
    Error::Refused(format!(
        "its answer is not understood ({what}): look whether somebody else writes to our keys"
    ))
}

/// Whether nothing more can be expected of the connection on which this happened. One to a replica is dropped, too: the next one looks
/// the name up again, and finds the new primary.
fn breaks_connection(error: &RedisError) -> bool {
    if error.code() == Some("READONLY") {
        return true;
    }
    error.code().is_none() && !matches!(error.kind(), ErrorKind::UnexpectedReturnType)
}

/// Says whether an error is a wait, a want of memory, or a refusal, which names its fix.
pub(super) fn explain(error: &RedisError) -> Error {
    match error.code() {
        Some(
            "LOADING" | "READONLY" | "NOREPLICAS" | "MISCONF" | "MASTERDOWN" | "CLUSTERDOWN"
            | "TRYAGAIN" | "ASK" | "MOVED" | "BUSY" | "UNBLOCKED",
        ) => Error::Away(error.to_string()),
        Some("OOM") => Error::Full(format!("{error}; raise maxmemory or let the backlog drain")),
        Some("NOPERM") => Error::Refused(format!("{error}; grant it with ACL SETUSER")),
        Some("WRONGPASS" | "NOAUTH") => {
            Error::Refused(format!("{error}; correct user and password in the URL"))
        }
        Some("WRONGTYPE") => Error::Refused(format!(
            "{error}; a key of ours holds something foreign: rename or delete it"
        )),
        Some(_) => Error::Refused(error.to_string()),
        None => match error.kind() {
            ErrorKind::AuthenticationFailed => {
                Error::Refused(format!("{error}; correct user and password in the URL"))
            }
            ErrorKind::InvalidClientConfig | ErrorKind::Client => Error::Refused(error.to_string()),
            _ => Error::Away(error.to_string()),
        },
    }
}
