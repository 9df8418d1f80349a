//! The key prefix of an installation, and the names that derive from it: the keys that belong to no
//! partition, and the prefixes of the keys and channels of each partition.
//!
//! Every key, channel and consumer group that Pointsman creates begins with the prefix, so that
//! installations with different prefixes share nothing in one database. A prefix has no colon and
//! ends at the first one: otherwise the keys of the installations `a` and `a:b` could be equal.

use std::fmt;

use crate::event::Name;

const MAX_BYTES: usize = 64;

/// The prefix of all keys, channels and consumer groups of an installation (`pointsman`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// Accepts 1 to 64 ASCII letters, digits, `.`, `_` and `-`. A brace would form a hash tag, and
    /// `*`, `?` or `[` a pattern of an ACL rule.
    ///
    /// # Errors
    /// The reason, followed by the fix.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let reason = if text.is_empty() {
            "is empty".to_owned()
        } else if text.len() > MAX_BYTES {
            format!("has {} bytes", text.len())
        } else if !text.bytes().all(is_valid) {
            format!("'{}' has other characters", text.escape_debug())
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(format!(
            "{reason}; use 1 to {MAX_BYTES} letters, digits, '.', '_' or '-', such as pointsman"
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The source of an installation that names none.
    pub fn default_source(&self) -> String {
        format!("{self}:events")
    }

    /// Checks that the sources have valid keys, and that no key that Pointsman creates for them is
    /// a key of another source, of a user or of the installation.
    ///
    /// # Errors
    /// The reason, followed by the fix.
    pub fn check_sources(&self, sources: &[String]) -> Result<(), String> {
        self.partitions(sources).map(drop)
    }

    /// The prefix of the keys of each source's partition. It has the hash tag of the source, so
    /// that both share a slot.
    ///
    /// # Errors
    /// As [`Prefix::check_sources`].
    pub(super) fn partitions(&self, sources: &[String]) -> Result<Vec<String>, String> {
        let mut prefixes: Vec<String> = Vec::with_capacity(sources.len());
        for source in sources {
            let refuse = |why: &str| {
                Err(format!(
                    "source '{}' {why}; give it another key",
                    source.escape_debug()
                ))
            };
            if source.is_empty() || source.chars().any(char::is_control) {
                return refuse("is empty or has a control character");
            }
            let is_tagged = has_hash_tag(source);
            if !is_tagged && source.contains('}') {
                return refuse("has a } but no {tag}, so its keys cannot share its slot");
            }
            let prefix = if is_tagged {
                format!("{self}:{source}:")
            } else {
                format!("{self}:{{{source}}}:")
            };
            let of_others = [
                format!("{self}:user:"),
                format!("{self}:device-cursors:"),
                self.ticket(""),
                self.report(""),
            ];
            let is_of_others = |key: &str| of_others.iter().any(|own| key.starts_with(own));
            let is_of_installation =
                [self.numbers(), self.nodes(), self.rollouts()].contains(source);
            if is_of_installation || is_of_others(source) || is_of_others(&prefix) {
                return refuse("would share keys with the data of users, nodes or partitions");
            }
            prefixes.push(prefix);
        }
        for (at, prefix) in prefixes.iter().enumerate() {
            for (other, source) in sources.iter().enumerate() {
                if source.starts_with(prefix)
                    || (other != at && prefixes[other].starts_with(prefix))
                {
                    return Err(format!(
                        "sources '{}' and '{source}' would share keys; give one another key",
                        sources[at]
                    ));
                }
            }
        }
        Ok(prefixes)
    }

    /// The prefix of the channels of a partition, whose keys have the prefix `keys`. It names the
    /// database, because all databases share their channels.
    pub(super) fn channels(&self, database: i64, keys: &str) -> String {
        let rest = keys.strip_prefix(self.as_str()).unwrap_or(keys);
        format!("{self}:{database}{rest}")
    }

    /// Whether the key of a source, or a channel, begins with the prefix.
    pub fn owns(&self, source: &str) -> bool {
        source
            .strip_prefix(self.as_str())
            .is_some_and(|rest| rest.starts_with(':'))
    }

    /// The key of the partition numbers.
    pub(super) fn numbers(&self) -> String {
        format!("{self}:partitions")
    }

    /// The key of the registered nodes.
    pub(super) fn nodes(&self) -> String {
        format!("{self}:nodes")
    }

    /// The key of the roll-outs of plugins.
    pub(super) fn rollouts(&self) -> String {
        format!("{self}:rollouts")
    }

    /// The key of the report of a node.
    pub(super) fn report(&self, node: &str) -> String {
        format!("{self}:report:{node}")
    }

    /// The key of a user's attributes and memberships.
    pub(super) fn user(&self, user: &Name) -> String {
        format!("{self}:user:{user}")
    }

    /// The key of a ticket.
    pub(super) fn ticket(&self, id: &str) -> String {
        format!("{self}:ticket:{id}")
    }

    /// The key of a user's device cursors. The hash tag places it in the slot of
    /// [`Prefix::user`].
    pub(super) fn device_cursors(&self, user: &Name) -> String {
        format!("{self}:device-cursors:{{{}}}", self.user(user))
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self("pointsman".to_owned())
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a key has a hash tag as Redis defines it: the text between the first `{` and the first
/// `}` after it, unless empty.
fn has_hash_tag(key: &str) -> bool {
    key.split_once('{')
        .and_then(|(_, rest)| rest.split_once('}'))
        .is_some_and(|(tag, _)| !tag.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_without_a_meaning_in_keys_and_patterns_is_accepted() {
        for text in ["pointsman", "a", "shop-1.eu_west", &"x".repeat(64)] {
            assert_eq!(Prefix::parse(text).map(|p| p.0), Ok(text.to_owned()));
        }
        let too_long = "x".repeat(65);
        for text in [
            "", "a:b", "{a}", "a*", "a?", "[a]", "a b", "ä", "a\n", &too_long,
        ] {
            let why = Prefix::parse(text).expect_err(text);
            assert!(why.contains("; use 1 to 64 letters"), "{text:?}: {why}");
            assert!(!why.contains('\n'), "{why:?}");
        }
    }

    #[test]
    fn no_two_installations_have_a_name_in_common() {
        let user = Name::parse("{shop}:meta").unwrap();
        let sources = ["shop", "{eu}:b", "b:{eu}"].map(str::to_owned);
        let names = |prefix: &str| {
            let prefix = Prefix::parse(prefix).unwrap();
            let mut names = vec![
                prefix.numbers(),
                prefix.user(&user),
                prefix.device_cursors(&user),
            ];
            for keys in prefix.partitions(&sources).unwrap() {
                names.extend([0, 1].map(|database| prefix.channels(database, &keys)));
                names.push(keys);
            }
            names
        };
        let (one, other) = (names("a"), names("a-b"));
        for name in &one {
            assert!(name.starts_with("a:"), "{name}");
            assert!(!other.iter().any(|other| other.starts_with(name)), "{name}");
        }
        assert!(other.iter().all(|name| name.starts_with("a-b:")));
    }

    #[test]
    fn a_source_that_would_share_keys_with_users_is_refused() {
        let prefix = Prefix::default();
        for source in [
            "pointsman:user:ann",
            "pointsman:partitions",
            "pointsman:rollouts",
            "pointsman:report:notify-1",
            "report:{x}",
            "pointsman:device-cursors:{pointsman:user:ann}",
            "user:{x}",
            "device-cursors:{x}",
        ] {
            let refused = prefix.check_sources(&[source.to_owned()]);
            assert!(
                refused.is_err_and(|why| why.ends_with("; give it another key")),
                "{source}"
            );
        }
        for source in ["pointsman:events", "user:x", "shop:{eu}:orders"] {
            assert_eq!(prefix.check_sources(&[source.to_owned()]), Ok(()));
        }
    }
}
