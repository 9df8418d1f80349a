//! `pointsman tail`: prints a user's stream, one notification per line. After a disconnect it
//! resumes from the last id.
//!
//! The stream is parsed as any client does (HTML Living Standard, "Server-sent events"); the
//! library module `sse` writes it.

use std::io::{BufRead, BufReader, Read as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{bail, ensure};
use pointsman::delivery::subscription::Start;
use pointsman::event::Name;
use tokio::signal::unix::{SignalKind, signal};
use ureq::http::StatusCode;
use ureq::http::header::CONTENT_TYPE;

use super::{NODE_URL, Trust, no_node, printable, printable_json, read, refusal};

/// Three default heartbeat intervals of a node; a connection silent for longer is dropped.
const SILENCE: Duration = Duration::from_secs(65);
/// Maximum line length in bytes, far above that of a node's lines.
const MAX_LINE: u64 = 4 * 1024 * 1024;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Address of the node's application listener
    #[arg(long, env = NODE_URL, default_value = "http://127.0.0.1:8080")]
    url: String,
    #[command(flatten)]
    trust: Trust,
    /// User whose stream to follow; without a token, only in dev mode
    #[arg(long, required_unless_present = "token")]
    user: Option<String>,
    /// The user's token; not needed in dev mode
    #[arg(long, env = "POINTSMAN_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Start after this id, at earliest or latest, or a duration ago such as 10m. On exit, tail
    /// prints the id to continue from
    #[arg(long, value_name = "ID", value_parser = place)]
    after: Option<String>,
    /// Exit after this many notifications
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Validates `--after`. A node accepts any text and starts at the latest event if it cannot parse
/// it, so that a browser with an outdated id still gets a stream; a typo on the command line is an
/// error.
fn place(text: &str) -> Result<String, String> {
    // The user does not matter here: an id issued for another user is still a valid id.
    let nobody = Name::parse("-").map_err(|error| error.to_string())?;
    match Start::read(text, &nobody, 0) {
        Some(Start::Unknown) => {
            Err("use earliest, latest, a duration such as 90s, 10m, 2h or 7d, or the id that tail printed on exit".to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let agent = options.trust.agent(SILENCE)?;
    let url = format!("{}/v1/stream", options.url.trim_end_matches('/'));
    let mut parser = Parser {
        last_id: options.after.clone().unwrap_or_default(),
        ..Parser::default()
    };
    let (mut left, mut was_open) = (options.count.unwrap_or(u64::MAX), false);
    let last_id = Arc::default();
    print_last_id_on_interrupt(Arc::clone(&last_id));
    while left > 0 {
        let mut request = agent.get(&url).header("accept", "text/event-stream");
        // Independent of the node and the token: tail prints whole notifications.
        request = request.query("format", "notification");
        if let Some(user) = &options.user {
            request = request.query("user", user);
        }
        if let Some(token) = &options.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if !parser.last_id.is_empty() {
            request = request.header("last-event-id", &parser.last_id);
        }
        let why = match request.call() {
            // No connection so far: the address is probably wrong, and a retry would not help.
            Err(error) if !was_open => return Err(no_node(&options.url, NODE_URL, &error)),
            Err(error) => error.to_string(),
            Ok(response) if response.status() == StatusCode::NO_CONTENT => return Ok(()),
            Ok(response) if response.status() != StatusCode::OK => {
                let (status, text) = read(response)?;
                // Only these are temporary. (A browser's `EventSource` gives up on any error.)
                if !matches!(
                    status,
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
                ) {
                    bail!("{}", refusal(status, &text));
                }
                refusal(status, &text)
            }
            Ok(response) => {
                let content_type = response
                    .headers()
                    .get(CONTENT_TYPE)
                    .and_then(|value| value.to_str().ok())
                    .unwrap_or_default();
                ensure!(
                    content_type.starts_with("text/event-stream"),
                    "{url} returned '{content_type}' instead of a stream; check that this is a Pointsman node"
                );
                was_open = true;
                parser.reset();
                follow(
                    &mut BufReader::new(response.into_body().into_reader()),
                    &mut parser,
                    &mut left,
                    &last_id,
                )
            }
        };
        if left > 0 {
            let why = printable(&why);
            eprintln!("pointsman: {why}; reconnecting in {} ms", parser.retry_ms);
            std::thread::sleep(Duration::from_millis(parser.retry_ms));
        }
    }
    print_last_id(&last_id);
    Ok(())
}

/// The id of the last message, printed on exit.
type LastId = Mutex<String>;

fn print_last_id(last_id: &LastId) {
    let last_id = last_id.lock().unwrap_or_else(PoisonError::into_inner);
    if !last_id.is_empty() {
        eprintln!(
            "pointsman: to resume from here, use --after {}",
            printable(&last_id)
        );
    }
}

/// On SIGINT or SIGTERM, prints the id to continue from and exits.
fn print_last_id_on_interrupt(last_id: Arc<LastId>) {
    // Without the thread, the signals still end the process, only without the message.
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return;
    };
    std::thread::spawn(move || {
        let signal = runtime.block_on(async {
            let (mut interrupt, mut terminate) = (
                signal(SignalKind::interrupt()).ok()?,
                signal(SignalKind::terminate()).ok()?,
            );
            tokio::select! { _ = interrupt.recv() => Some(2), _ = terminate.recv() => Some(15) }
        });
        if let Some(signal) = signal {
            print_last_id(&last_id);
            // The exit status that shells use for a process killed by a signal.
            std::process::exit(128 + signal);
        }
    });
}

/// Prints notifications until the stream ends. Returns why it ended.
fn follow(
    stream: &mut impl BufRead,
    parser: &mut Parser,
    left: &mut u64,
    last_id: &LastId,
) -> String {
    let mut line = Vec::new();
    while *left > 0 {
        line.clear();
        match stream.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return "the stream ended".to_owned(),
            Ok(_) if line.last() != Some(&b'\n') => {
                return "the stream ended in the middle of a line".to_owned();
            }
            Ok(_) => {}
            Err(error) => return format!("the stream was interrupted: {error}"),
        }
        let Some(message) = parser.line(&String::from_utf8_lossy(&line)) else {
            continue;
        };
        match message.event.as_str() {
            // Carries only an id, which the parser has stored.
            "cursor" => {}
            "gap" | "reauth" | "close" => {
                eprintln!("pointsman: {}: {}", message.event, printable(&message.data))
            }
            _ => {
                *left -= 1;
                println!("{}", printable_json(&message.data.replace('\n', " ")));
            }
        }
        parser
            .last_id
            .clone_into(&mut last_id.lock().unwrap_or_else(PoisonError::into_inner));
    }
    String::new()
}

/// One dispatched block of a stream.
#[derive(Debug, PartialEq)]
struct Message {
    event: String,
    data: String,
}

/// Parser state, kept between lines and between connections.
#[derive(Debug)]
struct Parser {
    last_id: String,
    retry_ms: u64,
    event: String,
    data: Option<String>,
}

impl Default for Parser {
    fn default() -> Self {
        Self {
            last_id: String::new(),
            retry_ms: 2_000,
            event: String::new(),
            data: None,
        }
    }
}

impl Parser {
    /// Discards a block that a disconnect left incomplete.
    fn reset(&mut self) {
        self.event.clear();
        self.data = None;
    }

    fn line(&mut self, line: &str) -> Option<Message> {
        let line = line.trim_end_matches(['\n', '\r']);
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            return self.data.take().map(|data| Message { event, data });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event),
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            "id" if !value.contains('\0') => value.clone_into(&mut self.last_id),
            // Bounded, so that a wrong value from the server cannot stop reconnecting.
            "retry" => {
                self.retry_ms = value
                    .parse()
                    .map_or(self.retry_ms, |ms: u64| ms.min(300_000))
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_parsed_as_browsers_parse_it() {
        let mut parser = Parser::default();
        let stream = "retry: 150\n: hello\n\nevent: cursor\nid: c0\ndata:\n\nid: c1\ndata: {\"a\":1}\n\n:\nevent: gap\r\ndata: x\r\ndata: y\r\n\r\nid: c2\ndata: cut";
        let messages: Vec<Message> = stream
            .split_inclusive('\n')
            .filter_map(|line| parser.line(line))
            .collect();
        let message = |event: &str, data: &str| Message {
            event: event.into(),
            data: data.into(),
        };
        assert_eq!(
            messages,
            [
                message("cursor", ""),
                message("", "{\"a\":1}"),
                message("gap", "x\ny")
            ]
        );
        assert_eq!(parser.retry_ms, 150);
        parser.reset();
        assert_eq!(parser.line("\n"), None);
    }
}
