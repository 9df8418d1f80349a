//! From a message of a channel to the fields of an entry.

use bytes::Bytes;
use serde_json::Value;

use super::message::Message;
use super::settings::{Bridge, Everyone};
use crate::broker::ChannelMessage;
use crate::event::{EntryId, Event, Name};

/// The fields of an entry.
pub(super) type Fields = Vec<(Bytes, Bytes)>;

/// Why a message does not become an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// A template finds no value.
    Unresolved(String),
    /// The event would be invalid.
    Invalid(String),
    TooLarge(String),
}

impl Bridge {
    /// Returns the fields of the entry for a message.
    ///
    /// # Errors
    /// [`Rejection`], if the message does not become an event.
    pub(super) fn fields(
        &self,
        message: &ChannelMessage,
        max_event_bytes: usize,
    ) -> Result<Fields, Rejection> {
        let channel = std::str::from_utf8(&message.channel)
            .map_err(|_| Rejection::Invalid("the name of the channel is not UTF-8".into()))?;
        let Some(body) = &message.body else {
            return Err(too_large("more than", max_event_bytes, max_event_bytes));
        };
        let captures = self.captures(channel).ok_or_else(|| {
            Rejection::Invalid("the channel does not match the pattern of the bridge".into())
        })?;
        let message = Message::new(captures, body);
        let mut fields = Draft::default();
        self.add_recipients(&message, &mut fields)?;
        let kind = self.kind.as_ref().and_then(|kind| kind.fill(&message));
        fields.set(
            "type",
            kind.unwrap_or_else(|| self.default_type.to_string()),
        );
        for (name, template) in &self.attributes {
            let list = template.pointer().and_then(|pointer| message.raw(pointer));
            let value = template.fill(&message).or_else(|| {
                let json = list?.get();
                (!matches!(json, "null" | "\"\"")).then(|| json.to_owned())
            });
            if let Some(value) = value {
                fields.set(name, value);
            }
        }
        self.add_data(&message, &mut fields)?;
        let fields = fields.0;
        let n_bytes: usize = fields
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if n_bytes > max_event_bytes {
            return Err(too_large("", n_bytes, max_event_bytes));
        }
        // An event that ingest could not read would become a dead letter. The publisher of a
        // message cannot be told, so garbage is counted here and does not crowd out dead letters.
        match Event::from_fields(EntryId::default(), "-", &fields) {
            Ok(_) => Ok(fields),
            Err(error) => Err(Rejection::Invalid(error.to_string())),
        }
    }

    fn add_recipients(&self, message: &Message<'_>, fields: &mut Draft) -> Result<(), Rejection> {
        let mut n_recipients = 0;
        for (name, template) in [("user", &self.user), ("group", &self.group)] {
            if let Some(text) = template.as_ref().and_then(|t| t.fill(message)) {
                Name::parse(&text).map_err(|why| Rejection::Invalid(why.of(name).to_string()))?;
                fields.set(name, text);
                n_recipients += 1;
            }
        }
        for (name, templates) in [("users", &self.users), ("groups", &self.groups)] {
            let names = templates.iter().flat_map(|t| t.fill_list(message));
            // One unusable name does not cost the others their notification.
            let names: Vec<String> = names.filter(|name| Name::parse(name).is_ok()).collect();
            if !names.is_empty() {
                n_recipients += names.len();
                let list = serde_json::to_string(&names).unwrap_or_default();
                fields.set(name, list);
            }
        }
        let is_for_everyone = match &self.everyone {
            None => false,
            Some(Everyone::Always) => true,
            Some(Everyone::Template(template)) => {
                let flag = template
                    .pointer()
                    .and_then(|pointer| message.value(pointer));
                flag == Some(&Value::Bool(true))
                    || template.fill(message).as_deref() == Some("true")
            }
        };
        if is_for_everyone {
            fields.set("everyone", "true".into());
            n_recipients += 1;
        }
        if n_recipients == 0 && self.names_recipients() {
            let templates = self.recipient_templates();
            return Err(unresolved(message, &templates.join(" and ")));
        }
        // Without its condition, the event would reach more users than its publisher meant.
        if let Some(template) = &self.when {
            let when = template.pointer().and_then(|pointer| message.raw(pointer));
            let when = when.filter(|when| when.get().starts_with(['{', '[']));
            let when = when.ok_or_else(|| unresolved(message, template.as_str()))?;
            fields.set("when", when.get().to_owned());
        }
        Ok(())
    }

    fn add_data(&self, message: &Message<'_>, fields: &mut Draft) -> Result<(), Rejection> {
        let content_type = match (&self.data, &message.json) {
            (Some(template), _) => {
                let missing = || unresolved(message, template.as_str());
                if let Some(pointer) = template.pointer() {
                    let value = message.raw(pointer).ok_or_else(missing)?;
                    fields.set("data", value.get().to_owned());
                    return Ok(());
                }
                let text = template.fill(message).ok_or_else(missing)?;
                fields.set("data", text);
                "text/plain"
            }
            (None, json) => {
                fields
                    .0
                    .push((Bytes::from_static(b"data"), message.body.clone()));
                if json.is_some() {
                    return Ok(());
                }
                if std::str::from_utf8(message.body).is_ok() {
                    "text/plain"
                } else {
                    "application/octet-stream"
                }
            }
        };
        fields.set("datacontenttype", content_type.into());
        Ok(())
    }
}

#[derive(Default)]
struct Draft(Fields);

impl Draft {
    fn set(&mut self, name: &str, value: String) {
        self.0
            .push((Bytes::copy_from_slice(name.as_bytes()), value.into()));
    }
}

fn unresolved(message: &Message<'_>, template: &str) -> Rejection {
    let fix = if message.is_quoted_json() {
        "the message is JSON within a JSON text; publish it with a string serializer (in Spring, StringRedisSerializer)"
    } else if message.json.is_none() {
        "the message is not JSON; publish JSON, or take the value from the channel"
    } else {
        "publish a message with this value, or correct the pointer"
    };
    Rejection::Unresolved(format!("{template} finds no value in the message; {fix}"))
}

fn too_large(more: &str, n_bytes: usize, most: usize) -> Rejection {
    let more = if more.is_empty() {
        String::new()
    } else {
        format!("{more} ")
    };
    Rejection::TooLarge(format!(
        "the message has {more}{n_bytes} bytes; the limit is {most} (ingest.max_event_bytes)"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::*;

    fn bridge(toml: &str) -> Bridge {
        let settings: Settings = toml::from_str(toml).unwrap();
        settings
            .check(None, &["events".to_owned()])
            .unwrap_or_else(|(key, why)| panic!("{key}: {why}"))
    }

    fn fields_of(
        toml: &str,
        channel: &str,
        body: &[u8],
    ) -> Result<Vec<(String, String)>, Rejection> {
        let message = ChannelMessage {
            channel: Bytes::copy_from_slice(channel.as_bytes()),
            body: Some(Bytes::copy_from_slice(body)),
        };
        let text = |bytes: Bytes| String::from_utf8_lossy(&bytes).into_owned();
        bridge(toml).fields(&message, 1_000).map(|fields| {
            let pairs = fields.into_iter();
            pairs
                .map(|(name, value)| (text(name), text(value)))
                .collect()
        })
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let pairs = pairs.iter();
        pairs
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn a_message_becomes_the_fields_that_its_templates_name() {
        let toml = "channel = 'a:*:*'\nuser = '{1}'\nusers = ['{/cc}', 'root']\ngroup = 'g-{2}'\neveryone = '{/all}'\ntype = '{/kind}'\npriority = '{/p}'\ndata = '{/message}'\n[attributes]\nwhere = '{/where}'\ntags = '{/tags}'";
        let body = br#"{"cc":[1,"2",null,"x\n"],"all":false,"kind":"k","message":{"n": 123456789012345678901234567890},"where":"eu","tags":["a"]}"#;
        assert_eq!(
            fields_of(toml, "a:7:8", body).unwrap(),
            pairs(&[
                ("user", "7"),
                ("group", "g-8"),
                ("users", r#"["1","2","root"]"#),
                ("type", "k"),
                ("tags", r#"["a"]"#),
                ("where", "eu"),
                ("data", r#"{"n": 123456789012345678901234567890}"#),
            ])
        );
    }

    #[test]
    fn a_message_that_is_not_json_becomes_text_and_one_that_is_not_utf8_bytes() {
        let toml = "channel = 'u'\nuser = 'ann'";
        let of = |body: &[u8]| fields_of(toml, "u", body).unwrap().split_off(2);
        assert_eq!(
            of(b"hello"),
            pairs(&[("data", "hello"), ("datacontenttype", "text/plain")])
        );
        assert_eq!(of(b"\"hello\""), pairs(&[("data", "\"hello\"")]));
        assert_eq!(of(b"\xff")[1].1, "application/octet-stream");
        assert_eq!(of(b"")[1].1, "text/plain");
    }

    #[test]
    fn a_message_without_what_a_bridge_needs_is_not_an_event() {
        let by_field = "channel = 'n'\nuser = '{/userId}'";
        let reason = |toml: &str, channel: &str, body: &[u8]| match fields_of(toml, channel, body) {
            Err(Rejection::Unresolved(why)) => format!("unresolved: {why}"),
            Err(Rejection::Invalid(why)) => format!("invalid: {why}"),
            Err(Rejection::TooLarge(why)) => format!("too large: {why}"),
            Ok(fields) => panic!("{fields:?}"),
        };
        for (toml, channel, body, expect) in [
            (
                by_field,
                "n",
                &b"{}"[..],
                "unresolved: {/userId} finds no value",
            ),
            (by_field, "n", b"hello", "the message is not JSON"),
            (
                by_field,
                "n",
                br#""{\"userId\":1}""#,
                "StringRedisSerializer",
            ),
            (
                by_field,
                "n",
                br#"{"userId":"a\nb"}"#,
                "invalid: user contains the control character",
            ),
            (
                "channel = 'u:*'\nuser = '{1}'",
                "u:",
                b"x",
                "unresolved: {1}",
            ),
            (
                "channel = 'c'\neveryone = true\nwhen = '{/criteria}'",
                "c",
                b"{}",
                "unresolved: {/criteria}",
            ),
            (
                "channel = 'c'\neveryone = true\nwhen = '{/criteria}'",
                "c",
                br#"{"criteria":null}"#,
                "unresolved: {/criteria}",
            ),
            (
                "channel = 'c'\nuser = 'a'\ndata = '{/message}'",
                "c",
                b"{}",
                "unresolved: {/message}",
            ),
            (
                "channel = 'c'\nuser = 'a'",
                "c",
                &[b'x'; 1_000],
                "too large: the message has 10",
            ),
        ] {
            let reason = reason(toml, channel, body);
            assert!(reason.contains(expect), "{toml}: {reason}");
        }
    }
}
