//! The command line interface.
//!
//! `serve` and `dev` run a node. `check-config` and `config` only read a configuration, and the
//! commands for plugin authors need no node. Every other command talks HTTP to a running node,
//! because only one process can open an embedded store.
//!
//! Exit codes: 0 on success, 1 on failure, 64 if the arguments or the configuration are invalid.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "commands print their results to the terminal; only the library logs"
)]

use std::fs;
use std::io::Read as _;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Parser;
use pointsman::escape::{is_hidden, printable, printable_json, printable_lines};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use ureq::http::{Response, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

mod compile_plugin;
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
    /// Publish events from options or standard input
    Publish(publish::Options),
    /// Follow a user's notification stream
    Tail(tail::Options),
    /// List, show, redrive or drop dead letters
    DeadLetters(dead_letters::Options),
    /// Explain why an event did or did not reach a user
    Explain(explain::Options),
    /// Export events from a running node
    Events(events::Options),
    /// Run an in-memory node for plugin development, rebuilding plugins on save
    Dev(dev::Options),
    /// Develop plugins and manage those of a running node
    Plugin(plugin::Options),
    /// Check a configuration and its plugins without starting a node
    CheckConfig(serve::Options),
    /// Print the default configuration
    Config(config::Options),
    /// Compile the plugin on standard input, as another process of this program requests it
    #[command(hide = true)]
    CompilePlugin(compile_plugin::Options),
}

/// Parses a time in the form of RFC 3339, in milliseconds since the Unix epoch.
fn parse_time(text: &str) -> Result<u64, String> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok();
    let ms = time.and_then(|time| u64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok());
    ms.ok_or_else(|| "use the form 2026-01-01T00:00:00Z".to_owned())
}

/// Makes the process exit quietly with status 1 if standard output is a closed pipe (for example
/// `| head`). `println!` panics in that case, so only a panic hook can intercept it.
fn exit_quietly_on_closed_pipe() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if panic
            .payload_as_str()
            .is_some_and(|text| text.starts_with("failed printing to stdout: Broken pipe"))
        {
            process::exit(1);
        }
        report(panic);
    }));
}

pub(crate) fn main() -> ExitCode {
    exit_quietly_on_closed_pipe();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if error.use_stderr() {
                // It quotes the invalid value, which may have been copied from a node's answer.
                let text = error.render().to_string();
                if text.contains(|c| c != '\n' && is_hidden(c)) {
                    eprint!("{}", printable_lines(&text));
                } else {
                    error.print().ok();
                }
                return ExitCode::from(EXIT_USAGE);
            }
            // clap also returns `--help` and `--version` as errors, but prints them to stdout.
            return match error.print() {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
    };
    let outcome = match cli.command {
        Command::Serve(options) => serve::run(&options),
        Command::Publish(options) => publish::run(&options),
        Command::Tail(options) => tail::run(&options),
        Command::DeadLetters(options) => dead_letters::run(&options),
        Command::Explain(options) => explain::run(&options),
        Command::Events(options) => events::run(&options),
        Command::Dev(options) => dev::run(&options),
        Command::Plugin(options) => plugin::run(&options),
        Command::CheckConfig(options) => config::check(&options),
        Command::Config(options) => config::print(&options),
        Command::CompilePlugin(options) => return compile_plugin::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Errors quote file names and answers of nodes.
            eprintln!("pointsman: {}", printable_lines(&format!("{error:#}")));
            if error.is::<pointsman::config::Error>() {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Environment variables that set the listener addresses if `--url` is not given.
const NODE_URL: &str = "POINTSMAN_URL";
const ADMIN_URL: &str = "POINTSMAN_ADMIN_URL";
/// Environment variable that sets the API key if `--api-key` is not given.
const API_KEY: &str = "POINTSMAN_API_KEY";

/// The certificate authorities by which a command knows a node that uses TLS.
#[derive(Debug, Default, clap::Args)]
struct Trust {
    /// Certificate authority of the node, in PEM; default: the public ones
    #[arg(long, global = true, env = "POINTSMAN_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl Trust {
    /// An HTTP client that does not treat error statuses as errors. `idle` limits the wait for each
    /// read.
    ///
    /// # Errors
    /// The file cannot be read, or holds no certificate.
    fn agent(&self, idle: Duration) -> anyhow::Result<Agent> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &self.ca {
            tls = tls.root_certs(authorities(path)?);
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .tls_config(tls.build())
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_per_read(Some(idle));
        // Ignores the proxy variables of the environment: a node is always addressed directly.
        Ok(config.proxy(None).build().new_agent())
    }
}

fn authorities(path: &Path) -> anyhow::Result<RootCerts> {
    let pem = fs::read(path).with_context(|| {
        format!(
            "cannot read {}; correct --ca or POINTSMAN_CA",
            path.display()
        )
    })?;
    let items = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = items.collect();
    if certificates.is_empty() {
        bail!(
            "{} holds no certificate in PEM; correct --ca or POINTSMAN_CA",
            path.display()
        );
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

/// The application listener of a running node and the API key for it.
#[derive(Debug, clap::Args)]
struct Node {
    /// Address of the node's application listener
    #[arg(long, global = true, env = NODE_URL, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// API key of the node; not needed in dev mode
    #[arg(long, global = true, env = API_KEY, hide_env_values = true)]
    api_key: Option<String>,
    #[command(flatten)]
    trust: Trust,
}

impl Node {
    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url.trim_end_matches('/'))
    }

    fn authorization(&self) -> Option<String> {
        self.api_key.as_ref().map(|key| format!("Bearer {key}"))
    }

    /// Sends a request without a body and reads the whole response.
    fn request(
        &self,
        agent: &Agent,
        method: &str,
        path: &str,
    ) -> anyhow::Result<(StatusCode, String)> {
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

/// The admin listener of a running node and the API key for it.
#[derive(Debug, clap::Args)]
struct Admin {
    /// Address of the node's admin listener
    #[arg(long, env = ADMIN_URL, default_value = "http://127.0.0.1:8081")]
    url: String,
    /// API key of the node; not needed in dev mode
    #[arg(long, env = API_KEY, hide_env_values = true)]
    api_key: Option<String>,
    #[command(flatten)]
    trust: Trust,
}

impl Admin {
    /// Sends a request. A body is sent as `application/wasm`.
    fn request(
        &self,
        agent: &Agent,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
    ) -> anyhow::Result<Response<Body>> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let response = match body {
            // Lets the node reject a missing API key before the upload starts. Without it, a node
            // that closes the connection early would show up here as a broken pipe.
            Some(body) => agent.run(
                request
                    .header("content-type", "application/wasm")
                    .header("expect", "100-continue")
                    .body(body)?,
            ),
            None => agent.run(request.body(())?),
        };
        response.map_err(|error| no_node(&self.url, ADMIN_URL, &error))
    }
}

/// Reads the status and at most 16 MiB of the body.
fn read(response: Response<Body>) -> anyhow::Result<(StatusCode, String)> {
    let status = response.status();
    let mut text = String::new();
    response
        .into_body()
        .into_reader()
        .take(16 * 1024 * 1024)
        .read_to_string(&mut text)
        .context("the response ended early")?;
    Ok((status, text))
}

/// Returns the body of a successful response.
///
/// # Errors
/// Any other status, with the node's own error message.
fn accept((status, text): (StatusCode, String)) -> anyhow::Result<String> {
    if status.is_success() {
        return Ok(text);
    }
    bail!("{}", refusal(status, &text))
}

/// Formats an error response as one line, using the node's own message. The status is included
/// only if it is not one that the commands expect.
fn refusal(status: StatusCode, text: &str) -> String {
    let body: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let Some(error) = body["error"].as_str().map(printable) else {
        return format!(
            "unexpected response ({status}) that is not from a Pointsman node; check the address in --url"
        );
    };
    let code = body["code"].as_str().unwrap_or_default();
    if code == "unknown_path" {
        return "this listener does not serve this command; a node has an application listener and an admin listener: set the address of the other one with --url"
            .to_owned();
    }
    let fix = match code {
        "api_key_required" => Some(format!("pass --api-key or set {API_KEY}")),
        "unauthorized" => Some(
            "pass --token or set POINTSMAN_TOKEN; --user alone works only in dev mode".to_owned(),
        ),
        _ => body["fix"].as_str().map(printable),
    };
    let message = fix.map_or_else(|| error.clone(), |fix| format!("{error}; {fix}"));
    let is_expected = matches!(
        status.as_u16(),
        400 | 401 | 403 | 404 | 408 | 409 | 413 | 422 | 429 | 503
    );
    if is_expected {
        message
    } else {
        format!("the node returned {status}: {message}")
    }
}

/// The error for an unreachable node: the address tried and the settings that change it.
fn no_node(url: &str, variable: &str, error: &ureq::Error) -> anyhow::Error {
    anyhow!(
        "cannot reach a node at {url} ({error}); start one, or set its address with --url or {variable}"
    )
}

/// Formats JSON for people, still valid JSON and safe to print.
fn pretty_json(value: &serde_json::Value) -> String {
    printable_json(&format!("{value:#}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn printed_json_stays_valid_and_has_no_terminal_control_characters() {
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
    fn every_serve_option_is_a_configuration_key_and_a_variable() {
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
