//! The `[[bridge]]` tables: as written ([`Settings`]), and checked ([`Bridge`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::template::Template;
use crate::broker::{BridgeAccess, Channel};
use crate::event::{EntryId, Event, Name};

/// The type of an event for which neither the bridge nor `defaults.type` has one.
const DEFAULT_TYPE: &str = "message";

/// A `[[bridge]]` table. All keys but the first four are templates (see docs/configuration.md).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The channel, or a pattern with `*`.
    pub channel: String,
    /// The name in metrics, logs and the lease; unique (the channel).
    pub name: Option<String>,
    /// Use sharded Pub/Sub (false).
    pub sharded: bool,
    /// The key of the source to which events are appended (the first source).
    pub append_to: Option<String>,
    pub user: Option<String>,
    pub users: Option<OneOrMore>,
    pub group: Option<String>,
    pub groups: Option<OneOrMore>,
    pub everyone: Option<Flag>,
    /// A condition on the attributes of recipients, as in the attribute `when`.
    pub when: Option<String>,
    pub r#type: Option<String>,
    pub id: Option<String>,
    pub source: Option<String>,
    pub subject: Option<String>,
    pub priority: Option<String>,
    pub ttl: Option<String>,
    pub collapse: Option<String>,
    pub event_name: Option<String>,
    /// The data of the event (the whole message).
    pub data: Option<String>,
    /// Further attributes of the event.
    pub attributes: BTreeMap<String, String>,
}

/// One template or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// `true`, `false` or a template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Flag {
    Fixed(bool),
    Template(String),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Everyone {
    Always,
    Template(Template),
}

/// A checked bridge.
#[derive(Clone, Debug)]
pub struct Bridge {
    name: Name,
    channel: Channel,
    append_to: String,
    pub(super) user: Option<Template>,
    pub(super) users: Vec<Template>,
    pub(super) group: Option<Template>,
    pub(super) groups: Vec<Template>,
    pub(super) everyone: Option<Everyone>,
    pub(super) when: Option<Template>,
    pub(super) kind: Option<Template>,
    pub(super) default_type: Name,
    pub(super) data: Option<Template>,
    /// The other attributes, by name.
    pub(super) attributes: BTreeMap<String, Template>,
}

impl Settings {
    /// Checks the table. `default_type` is `defaults.type`, and `sources` are the keys of the
    /// sources.
    ///
    /// # Errors
    /// The key, and the reason followed by the fix.
    pub fn check(
        self,
        default_type: Option<&Name>,
        sources: &[String],
    ) -> Result<Bridge, (&'static str, String)> {
        let channel = self.checked_channel().map_err(|why| ("channel", why))?;
        let n_captures = channel.as_str().matches('*').count();
        let n_captures = match channel {
            Channel::Pattern(_) => n_captures,
            Channel::Exact(_) | Channel::Sharded(_) => 0,
        };
        let one = |key: &'static str, text: Option<String>| {
            let template = text.map(|text| Template::parse(&text, n_captures));
            template.transpose().map_err(|why| (key, why))
        };
        let more = |key: &'static str, texts: Option<OneOrMore>| {
            let texts = match texts {
                None => Vec::new(),
                Some(OneOrMore::One(text)) => vec![text],
                Some(OneOrMore::More(texts)) => texts,
            };
            let templates = texts.iter().map(|text| Template::parse(text, n_captures));
            templates
                .collect::<Result<Vec<_>, _>>()
                .map_err(|why| (key, why))
        };
        let name = self.name.as_deref().unwrap_or(&self.channel);
        let name = Name::parse(name).map_err(|why| ("name", format!("{why}; use a short name")))?;
        let append_to = match (self.append_to, sources) {
            (Some(source), sources) if !sources.contains(&source) => {
                let fix = "name one of broker.sources";
                let why = format!("'{}' is not a source; {fix}", source.escape_debug());
                return Err(("append_to", why));
            }
            (Some(source), _) => source,
            (None, sources) => sources.first().cloned().unwrap_or_default(),
        };
        let everyone = match self.everyone {
            None | Some(Flag::Fixed(false)) => None,
            Some(Flag::Fixed(true)) => Some(Everyone::Always),
            Some(Flag::Template(text)) => one("everyone", Some(text))?.map(Everyone::Template),
        };
        let when = one("when", self.when)?;
        if when.as_ref().is_some_and(|when| when.pointer().is_none()) {
            let why = "is not a single value of the message; write a JSON pointer such as \"{/criteria}\"";
            return Err(("when", why.into()));
        }
        let mut attributes = BTreeMap::new();
        for (name, text) in self.attributes {
            let template = Template::parse(&text, n_captures).map_err(|why| ("attributes", why))?;
            check_attribute(&name).map_err(|why| ("attributes", why))?;
            attributes.insert(name, template);
        }
        for (key, text) in [
            ("id", self.id),
            ("source", self.source),
            ("subject", self.subject),
            ("priority", self.priority),
            ("ttl", self.ttl),
            ("collapse", self.collapse),
            ("event_name", self.event_name),
        ] {
            if let Some(template) = one(key, text)? {
                attributes.insert(key.to_owned(), template);
            }
        }
        let kind = one("type", self.r#type)?;
        for (key, template) in [("type", &kind)] {
            if let Some(text) = template.as_ref().and_then(Template::literal) {
                Name::parse(text).map_err(|why| (key, format!("{why}; write another type")))?;
            }
        }
        let default_type = match default_type {
            Some(name) => name.clone(),
            None => Name::parse(DEFAULT_TYPE).expect("a short text"),
        };
        Ok(Bridge {
            name,
            channel,
            append_to,
            user: one("user", self.user)?,
            users: more("users", self.users)?,
            group: one("group", self.group)?,
            groups: more("groups", self.groups)?,
            everyone,
            when,
            kind,
            default_type,
            data: one("data", self.data)?,
            attributes,
        })
    }

    fn checked_channel(&self) -> Result<Channel, String> {
        let name = self.channel.as_str();
        Name::parse(name).map_err(|why| {
            format!("{why}; name a channel, such as \"user:*\" or \"notifications\"")
        })?;
        if !name.contains('*') {
            let name = name.to_owned();
            return Ok(if self.sharded {
                Channel::Sharded(name)
            } else {
                Channel::Exact(name)
            });
        }
        if self.sharded {
            return Err(format!(
                "'{name}' is a pattern, and sharded Pub/Sub has none; name one channel, or remove sharded"
            ));
        }
        if name.chars().all(|c| c == '*') {
            return Err(format!(
                "'{name}' matches every channel, also those of Pointsman; begin it with a text, such as \"user:*\""
            ));
        }
        if name.contains("**") {
            return Err(format!("'{name}' has '**'; write one '*'"));
        }
        match name.chars().find(|c| ['?', '[', ']', '\\'].contains(c)) {
            None => Ok(Channel::Pattern(name.to_owned())),
            Some(c) => Err(format!(
                "'{name}' has '{c}', which has a meaning in patterns of Redis; use '*' only"
            )),
        }
    }
}

/// Checks the name of a further attribute.
fn check_attribute(name: &str) -> Result<(), String> {
    const KEYS: [&str; 14] = [
        "type",
        "id",
        "source",
        "subject",
        "user",
        "users",
        "group",
        "groups",
        "everyone",
        "when",
        "priority",
        "ttl",
        "collapse",
        "event_name",
    ];
    if KEYS.contains(&name) {
        return Err(format!(
            "has {name}, which is a key of the bridge; write {name} outside attributes"
        ));
    }
    let fields = [("type", "t"), (name, "1")];
    let fields = fields.map(|(name, value)| (name.to_owned().into(), value.into()));
    match Event::from_fields(EntryId::default(), "-", &fields) {
        Ok(event) if event.attributes.contains_key(name) => Ok(()),
        Ok(_) => Err(format!("has {name}, which cannot be set; remove it")),
        Err(why) => Err(format!("has an invalid name: {why}")),
    }
}

impl Bridge {
    pub fn name(&self) -> &Name {
        &self.name
    }

    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The key of the source to which it appends.
    pub fn append_to(&self) -> &str {
        &self.append_to
    }

    /// The access that it needs in Redis.
    pub fn access(&self) -> BridgeAccess {
        BridgeAccess {
            bridge: self.name.to_string(),
            channel: self.channel.clone(),
            source: self.append_to.clone(),
        }
    }

    /// The channel and the texts at each `*` of the pattern, the shortest that match; `None` if the
    /// channel does not match.
    pub(super) fn captures<'a>(&self, channel: &'a str) -> Option<Vec<&'a str>> {
        let mut captures = vec![channel];
        let Channel::Pattern(pattern) = &self.channel else {
            return (self.channel.as_str() == channel).then_some(captures);
        };
        let mut literals: Vec<&str> = pattern.split('*').collect();
        let last = literals.pop()?;
        let mut literals = literals.into_iter();
        let mut rest = channel.strip_prefix(literals.next()?)?;
        for literal in literals {
            let (capture, after) = rest.split_once(literal)?;
            captures.push(capture);
            rest = after;
        }
        captures.push(rest.strip_suffix(last)?);
        Some(captures)
    }

    /// Whether the bridge names recipients itself. Otherwise, plugins decide by other values.
    pub(super) fn names_recipients(&self) -> bool {
        !self.recipient_templates().is_empty() || self.everyone.is_some()
    }

    pub(super) fn recipient_templates(&self) -> Vec<&str> {
        let everyone = match &self.everyone {
            Some(Everyone::Template(template)) => Some(template),
            _ => None,
        };
        let templates = self.user.iter().chain(&self.users).chain(&self.group);
        let templates = templates.chain(&self.groups).chain(everyone);
        templates.map(Template::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(toml: &str) -> Result<Bridge, (&'static str, String)> {
        let settings: Settings = toml::from_str(toml).unwrap();
        settings.check(None, &["events".to_owned(), "bulk".to_owned()])
    }

    #[test]
    fn captures_are_the_texts_at_each_star() {
        let captures = |pattern: &str, channel: &str| {
            let bridge = check(&format!("channel = '{pattern}'")).unwrap();
            let captures = bridge.captures(channel)?;
            Some(
                captures[1..]
                    .iter()
                    .map(|text| (*text).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        let some = |texts: &[&str]| Some(texts.iter().map(|t| (*t).to_owned()).collect());
        assert_eq!(captures("user:*", "user:42"), some(&["42"]));
        assert_eq!(captures("user:*", "user:a:b"), some(&["a:b"]));
        assert_eq!(captures("user:*", "user:"), some(&[""]));
        assert_eq!(
            captures("*:user:*:x", "shop:user:7:x"),
            some(&["shop", "7"])
        );
        assert_eq!(captures("a*b", "ab"), some(&[""]));
        assert_eq!(captures("a*b*c", "a1b2b3c"), some(&["1", "2b3"]));
        assert_eq!(captures("user:*", "users:1"), None);
        assert_eq!(captures("notifications", "notifications"), some(&[]));
    }

    #[test]
    fn an_invalid_table_is_refused_with_the_key_and_the_fix() {
        for (toml, key, fix) in [
            ("", "channel", "is empty; name a channel"),
            (
                "channel = '*'",
                "channel",
                "also those of Pointsman; begin it with a text",
            ),
            ("channel = 'a**'", "channel", "write one '*'"),
            ("channel = 'a?*'", "channel", "use '*' only"),
            (
                "channel = 'a*'\nsharded = true",
                "channel",
                "name one channel, or remove sharded",
            ),
            ("channel = 'a*'\nuser = '{2}'", "user", "count them from 1"),
            (
                "channel = 'a'\nappend_to = 'x'",
                "append_to",
                "name one of broker.sources",
            ),
            ("channel = 'a'\nwhen = 'x'", "when", "write a JSON pointer"),
            (
                "channel = 'a'\n[attributes]\nuser = 'x'",
                "attributes",
                "write user outside attributes",
            ),
            (
                "channel = 'a'\n[attributes]\nBad = 'x'",
                "attributes",
                "has an invalid name",
            ),
            (
                "channel = 'a'\n[attributes]\ntime = 'x'",
                "attributes",
                "time",
            ),
        ] {
            let (found, why) = check(toml).expect_err(toml);
            assert_eq!(found, key, "{toml}: {why}");
            assert!(why.contains(fix), "{toml}: {why}");
        }
        assert_eq!(
            check("channel = 'a'\nappend_to = 'bulk'")
                .unwrap()
                .append_to(),
            "bulk"
        );
    }
}
