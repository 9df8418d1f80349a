//! The origins whose pages may call a node: the configured ones and, in dev mode, every loopback
//! one. The host names under which the admin listener may be called, and the senders of webhooks.

use axum::http::header::ORIGIN;
use axum::http::{HeaderMap, HeaderValue};

/// The origins that may call this node.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    listed: Vec<String>,
    loopback: bool,
    admin_hosts: Vec<String>,
    webhooks: Vec<String>,
}

impl Origins {
    /// `listed`: origins as a browser writes them; `loopback`: whether every loopback origin is
    /// allowed too.
    ///
    /// # Errors
    /// A message about the first origin that no browser would write.
    pub fn new(listed: &[String], loopback: bool) -> Result<Self, String> {
        for origin in listed {
            let host = origin
                .strip_prefix("https://")
                .or_else(|| origin.strip_prefix("http://"));
            if host.is_none_or(|host| {
                host.is_empty()
                    || host.contains(['/', '*', '@'])
                    || host
                        .chars()
                        .any(|c| c.is_ascii_uppercase() || c.is_whitespace())
            }) {
                return Err(format!(
                    "'{}' is not a valid origin; use scheme and host in lower case and nothing after them, such as https://shop.example",
                    origin.escape_debug()
                ));
            }
        }
        Ok(Self {
            listed: listed.to_vec(),
            loopback,
            admin_hosts: Vec::new(),
            webhooks: Vec::new(),
        })
    }

    /// Adds names under which the admin listener may be called, besides loopback names and IP
    /// addresses.
    ///
    /// # Errors
    /// A message about the first text that is not a host name without a port.
    pub fn with_admin_hosts(self, names: &[String]) -> Result<Self, String> {
        let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
        if let Some(wrong) = names
            .iter()
            .find(|name| name.is_empty() || !name.chars().all(is_part))
        {
            return Err(format!(
                "'{}' is not a valid host name; use a name in lower case without scheme and port, such as notify.internal",
                wrong.escape_debug()
            ));
        }
        Ok(Self {
            admin_hosts: names.to_vec(),
            ..self
        })
    }

    /// Adds the senders that may deliver webhooks, as they name themselves in
    /// `WebHook-Request-Origin`; `*` for every sender.
    ///
    /// # Errors
    /// A message about the first text that is neither a host name nor `*`.
    pub fn with_webhook_origins(self, senders: &[String]) -> Result<Self, String> {
        let is_part = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
        let is_sender = |sender: &&String| {
            *sender == "*" || (!sender.is_empty() && sender.chars().all(is_part))
        };
        if let Some(wrong) = senders.iter().find(|sender| !is_sender(sender)) {
            return Err(format!(
                "'{}' is not a valid sender of webhooks; use its host name without a scheme, such as events.example, or * for every sender",
                wrong.escape_debug()
            ));
        }
        Ok(Self {
            webhooks: senders.to_vec(),
            ..self
        })
    }

    /// Whether this sender may deliver webhooks.
    pub(super) fn allow_webhook(&self, sender: &str) -> bool {
        let mut webhooks = self.webhooks.iter();
        webhooks.any(|listed| listed == "*" || listed.eq_ignore_ascii_case(sender))
    }

    /// Whether the admin listener may be called under this host, with or without a port. A page
    /// cannot have an IP address as its origin's host unless it came from there, and a listed name
    /// is not the attacker's to rebind.
    pub(super) fn allow_admin_host(&self, authority: &str) -> bool {
        names_loopback(authority)
            || host_of(authority).is_some_and(|host| {
                host.parse::<std::net::IpAddr>().is_ok()
                    || self
                        .admin_hosts
                        .iter()
                        .any(|listed| listed.eq_ignore_ascii_case(host))
            })
    }

    /// Whether the request comes from a page that may not read the response. It may carry the
    /// user's cookie, so it must not change anything either.
    pub(super) fn are_foreign_to(&self, headers: &HeaderMap) -> bool {
        let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        match headers.get(ORIGIN) {
            Some(origin) => {
                site != Some(b"same-origin")
                    && !origin.to_str().is_ok_and(|origin| self.allow(origin))
            }
            // Requests for images or scripts, for example, carry no `Origin`.
            None => matches!(site, Some(b"cross-site" | b"same-site")),
        }
    }

    pub(super) fn allow(&self, origin: &str) -> bool {
        self.listed.iter().any(|listed| listed == origin) || (self.loopback && is_loopback(origin))
    }
}

fn is_loopback(origin: &str) -> bool {
    origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"))
        .is_some_and(names_loopback)
}

/// Whether the host, with or without a port, is a loopback name or address.
pub(super) fn names_loopback(authority: &str) -> bool {
    host_of(authority).is_some_and(|host| {
        host.eq_ignore_ascii_case("localhost")
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback())
    })
}

/// The host without brackets, port and final dot; `None` if the text is not a host and port.
fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => v6.split_once(']').unwrap_or_default(),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let is_port = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()));
    is_port.then(|| host.strip_suffix('.').unwrap_or(host))
}
