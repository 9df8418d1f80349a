//! The command line. `serve` and `dev` run a node, two commands look at its configuration, and those for authors of plugins need none; all
//! others talk to a running node by HTTP, because an embedded store has one process.
//!
//! Exit codes: 0, 1 when it failed, 64 when the arguments or the configuration are wrong.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what a command answers goes to its terminal; the library logs"
)]

use std::io::Read as _;
use std::panic;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Parser;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

mod config;
mod dead_letters;
mod dev;
mod events;
mod explain;
mod plugin;
mod publish;
mod render;
mod serve;
mod tail;

/// EX_USAGE of sysexits.h.
const EXIT_USAGE: u8 = 64;

/// Routes events to per-user notification streams.
#[derive(Debug, Parser)]
#[command(name = "pointsman", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run a node
    Serve(serve::Options),
    /// Send an event, from options or from standard input
    Publish(publish::Options),
    /// Print a user's notifications as they arrive
    Tail(tail::Options),
    /// List, show, redrive and drop dead letters
    Dead(dead_letters::Options),
    /// Say why an event reached a user, or not
    Explain(explain::Options),
    /// Take events out of a node
    Events(events::Options),
    /// Run a node for one's own plugins, which are rebuilt as they are saved
    Dev(dev::Options),
    /// Write, build, test and measure plugins, and look after those of a running node
    Plugin(plugin::Options),
    /// Say whether a node would start with this configuration
    CheckConfig(serve::Options),
    /// Print the configuration with every default
    Config(config::Options),
}

/// Whoever reads what a command prints may have read enough, as `head` does: then the command ends, and that is nothing to report. Printing has
/// no other way to say so than to panic.
fn end_when_nobody_reads() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if panic
            .payload_as_str()
            .is_some_and(|said| said.starts_with("failed printing to stdout: Broken pipe"))
        {
            process::exit(1);
        }
        report(panic);
    }));
}

pub(crate) fn main() -> ExitCode {
    end_when_nobody_reads();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Also the way of --help and --version.
            return match (error.print(), error.use_stderr()) {
                (Ok(()), false) => ExitCode::SUCCESS,
                (Err(_), false) => ExitCode::FAILURE,
                (_, true) => ExitCode::from(EXIT_USAGE),
            };
        }
    };
    let outcome = match cli.command {
        Command::Serve(options) => serve::run(&options),
        Command::Publish(options) => publish::run(&options),
        Command::Tail(options) => tail::run(&options),
        Command::Dead(options) => dead_letters::run(&options),
        Command::Explain(options) => explain::run(&options),
        Command::Events(options) => events::run(&options),
        Command::Dev(options) => dev::run(&options),
        Command::Plugin(options) => plugin::run(&options),
        Command::CheckConfig(options) => config::check(&options),
        Command::Config(options) => config::print(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pointsman: {error:#}");
            if error.is::<pointsman::config::Error>() {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// The variables that name the listeners of a running node, where `--url` does not.
const NODE_URL: &str = "POINTSMAN_URL";
const ADMIN_URL: &str = "POINTSMAN_ADMIN_URL";

/// How to reach a running node, for commands that publish or operate.
#[derive(Debug, clap::Args)]
struct Node {
    /// The node's address; http only
    #[arg(long, global = true, env = NODE_URL, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The key of publishers and operators; a node in dev mode asks for none
    #[arg(long, global = true, env = "POINTSMAN_KEY", hide_env_values = true)]
    key: Option<String>,
}

impl Node {
    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url.trim_end_matches('/'))
    }

    fn authorization(&self) -> Option<String> {
        self.key.as_ref().map(|key| format!("Bearer {key}"))
    }

    /// Sends a request without a body, and reads the answer.
    fn ask(&self, agent: &Agent, method: &str, path: &str) -> anyhow::Result<(StatusCode, String)> {
        let url = self.at(path);
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if let Some(authorization) = self.authorization() {
            request = request.header("authorization", authorization);
        }
        read(
            agent
                .run(request.body(())?)
                .map_err(|error| no_node(&self.url, NODE_URL, &error))?,
        )
    }
}

/// How to reach the listener for operators of a running node.
#[derive(Debug, clap::Args)]
struct Admin {
    /// The address of the node's admin listener; http only
    #[arg(long, env = ADMIN_URL, default_value = "http://127.0.0.1:8081")]
    url: String,
    /// The key of publishers and operators; a node in dev mode asks for none
    #[arg(long, env = "POINTSMAN_KEY", hide_env_values = true)]
    key: Option<String>,
}

impl Admin {
    /// Sends a request, with this body if there is one.
    fn request(
        &self,
        agent: &Agent,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
    ) -> anyhow::Result<Response<Body>> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let answered = match body {
            // Whoever has no key is told so before megabytes are on their way, and not by a pipe that breaks.
            Some(body) => agent.run(
                request
                    .header("content-type", "application/wasm")
                    .header("expect", "100-continue")
                    .body(body)?,
            ),
            None => agent.run(request.body(())?),
        };
        answered.map_err(|error| no_node(&self.url, ADMIN_URL, &error))
    }
}

/// A client whose answers of any status are answers. `idle`: how long to wait for the next bytes.
fn agent(idle: Duration) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(10)))
        .timeout_per_read(Some(idle));
    // Loopback is never behind a proxy, whatever the environment says; and a node elsewhere is reached as it is named.
    config.proxy(None).build().new_agent()
}

/// The answer's text, at most 16 MiB.
fn read(response: Response<Body>) -> anyhow::Result<(StatusCode, String)> {
    let status = response.status();
    let mut text = String::new();
    response
        .into_body()
        .into_reader()
        .take(16 * 1024 * 1024)
        .read_to_string(&mut text)
        .context("the answer broke off")?;
    Ok((status, text))
}

/// Turns a refusal into an error with what the node said.
fn accept((status, text): (StatusCode, String)) -> anyhow::Result<String> {
    if status.is_success() {
        return Ok(text);
    }
    bail!("{}", refusal(status, &text))
}

/// What a node has against it, in one line: its own sentence. The status is said only where it is none that a command reckons with.
fn refusal(status: StatusCode, text: &str) -> String {
    let body: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let Some(error) = body["error"].as_str().map(printable) else {
        return format!(
            "what answers there says {status}, which no Pointsman node would; is --url its address?"
        );
    };
    if status == StatusCode::NOT_FOUND && error.starts_with("there is nothing at") {
        return "the node has nothing of that at this address; it has one for applications and one for operators: give the other with --url"
            .to_owned();
    }
    let fix = match status {
        StatusCode::UNAUTHORIZED if error.contains("the key") => {
            Some("give --key or POINTSMAN_KEY".to_owned())
        }
        StatusCode::UNAUTHORIZED => {
            Some("give --token or POINTSMAN_TOKEN; --user is for a node in dev mode".to_owned())
        }
        _ => body["fix"].as_str().map(printable),
    };
    let said = fix.map_or_else(|| error.clone(), |fix| format!("{error}; {fix}"));
    let is_reckoned_with = matches!(
        status.as_u16(),
        400 | 401 | 403 | 404 | 408 | 409 | 413 | 422 | 429 | 503
    );
    if is_reckoned_with {
        said
    } else {
        format!("the node answered {status}: {said}")
    }
}

/// Nobody answers: which address was tried, and what names another.
fn no_node(url: &str, variable: &str, error: &ureq::Error) -> anyhow::Error {
    anyhow!(
        "no node answers at {url} ({error}); start one, or give its address with --url or {variable}"
    )
}

/// A text from elsewhere in one line that a terminal does not obey.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// JSON as people read it, and as they may paste it: JSON itself lets through characters that a terminal obeys (U+0080 to U+009F).
fn pretty_json(value: &serde_json::Value) -> String {
    let escaped = |c: char| {
        if c.is_control() && c != '\n' {
            format!("\\u{:04x}", u32::from(c))
        } else {
            c.to_string()
        }
    };
    format!("{value:#}").chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn what_is_printed_as_json_is_that_and_no_terminal_obeys_it() {
        let odd = serde_json::json!({ "a\u{9b}2J": ["\u{7f}", "ü", "\u{1b}", "\u{85}\n"] });
        let printed = pretty_json(&odd);
        assert!(
            printed.chars().all(|c| c == '\n' || !c.is_control()),
            "{printed:?}"
        );
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&printed).unwrap(),
            odd
        );
    }

    #[test]
    fn every_option_of_serve_is_a_key_and_a_variable() {
        let command = Cli::command();
        command.clone().debug_assert();
        let serve = command.find_subcommand("serve").unwrap();
        let mut options: Vec<&str> = serve
            .get_arguments()
            .filter_map(clap::Arg::get_long)
            .filter(|long| !["config", "help"].contains(long))
            .collect();
        let mut known = pointsman::config::OPTIONS.map(|(option, _)| option);
        options.sort_unstable();
        known.sort_unstable();
        assert_eq!(options, known);
    }
}
