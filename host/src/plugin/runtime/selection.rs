//! Selects the events that a plugin is called for and the data that is passed to it. The host
//! matches types and reads payloads itself: a call that is not made costs nothing, and a payload is
//! parsed at most once for all plugins.

use std::borrow::Cow;
use std::cell::OnceCell;

use super::log::printable;
use crate::event::{Event, Payload, Value};

/// The maximum number of patterns, of attributes and of fields in a manifest.
const MAX_ENTRIES: usize = 256;
/// The maximum size of one of them, in bytes.
const MAX_ENTRY: usize = 256;

/// The selection in a plugin's manifest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Type patterns. Empty: every event.
    pub types: Vec<String>,
    /// Attribute names; `*` selects all.
    pub attributes: Vec<String>,
    /// JSON pointers.
    pub fields: Vec<String>,
    /// Whether the whole payload is passed.
    pub payload: bool,
}

impl Selection {
    /// # Errors
    /// The entry that is out of bounds or malformed.
    pub(super) fn check(&self) -> Result<(), String> {
        for (what, entries) in [
            ("types", &self.types),
            ("attributes", &self.attributes),
            ("fields", &self.fields),
        ] {
            if entries.len() > MAX_ENTRIES {
                return Err(format!(
                    "its manifest lists {} {what}; the limit is {MAX_ENTRIES}; {}",
                    entries.len(),
                    match what {
                        "types" =>
                            "use patterns such as 'order.*', or none to be called for every event",
                        "attributes" => "use '*' for all attributes",
                        _ => "select an object that contains several of them, or the whole payload",
                    }
                ));
            }
            if let Some(long) = entries.iter().find(|entry| entry.len() > MAX_ENTRY) {
                return Err(format!(
                    "its manifest has an entry of {} bytes in its {what}; the limit is {MAX_ENTRY}",
                    long.len()
                ));
            }
        }
        match self
            .fields
            .iter()
            .find(|pointer| !pointer.is_empty() && !pointer.starts_with('/'))
        {
            Some(field) => Err(format!(
                "its manifest reads the field '{}', which is not a JSON pointer: it must begin with '/'",
                field.escape_debug()
            )),
            None => Ok(()),
        }
    }

    /// A warning for each text with characters that have a meaning in other pattern languages only.
    pub(super) fn odd_texts(&self) -> Vec<String> {
        let is_odd = |c: &char| "{}^$[]()|?\\".contains(*c);
        let types = self.types.iter().filter_map(|pattern| {
            let odd = pattern.chars().find(is_odd)?;
            Some(format!(
                "the type pattern '{}' of the plugin contains '{odd}', which matches only itself; the one wildcard is '*', so list several patterns instead",
                printable(pattern)
            ))
        });
        let names = self.attributes.iter().filter(|name| *name != "*");
        let names = names.filter_map(|name| {
            let odd = name.chars().find(|c| *c == '*' || is_odd(c))?;
            Some(format!(
                "the attribute '{}' that the plugin reads contains '{odd}', which no attribute has; name each attribute, or '*' for all of them",
                printable(name)
            ))
        });
        // Any character may be part of a field's name; these stand for all of it elsewhere.
        let is_wild = |part: &str| {
            part == "*" || part == "**" || part.starts_with('[') || part.starts_with('{')
        };
        let fields = self.fields.iter().filter_map(|field| {
            let part = field.split('/').find(|part| is_wild(part))?;
            Some(format!(
                "the field '{}' that the plugin reads contains '{}', which is the name of one field and not a pattern; name each field, or a list or an object as a whole",
                printable(field),
                printable(part)
            ))
        });
        types.chain(names).chain(fields).collect()
    }

    /// Whether the plugin is to be called for events of this type.
    pub(super) fn has_type(&self, kind: &str) -> bool {
        self.types.is_empty() || self.types.iter().any(|pattern| matches(pattern, kind))
    }

    /// The attributes and fields to pass.
    pub(super) fn pick<'a>(
        &'a self,
        event: &'a Event,
        document: &'a Document,
    ) -> impl Iterator<Item = (&'a str, Value)> {
        let is_all = self.attributes.iter().any(|name| name == "*");
        let every = event.attributes.iter().filter(move |_| is_all);
        let named = self
            .attributes
            .iter()
            .filter(move |_| !is_all)
            .filter_map(|name| event.attributes.get_key_value(name));
        let attributes = every
            .chain(named)
            .map(|(name, value)| (name.as_str(), value.clone()));
        let json = if self.fields.is_empty() {
            None
        } else {
            document.json(event)
        };
        let fields = self
            .fields
            .iter()
            .filter_map(move |pointer| Some((pointer.as_str(), field(find(json?, pointer)?)?)));
        attributes.chain(fields)
    }
}

/// The payload of one event, parsed when the first plugin reads a field of it.
#[derive(Debug, Default)]
pub(super) struct Document(OnceCell<Option<serde_json::Value>>);

impl Document {
    fn json(&self, event: &Event) -> Option<&serde_json::Value> {
        let parse = || match &event.data {
            Payload::Json(text) => serde_json::from_str(&spell_large_integers(text)).ok(),
            Payload::None | Payload::Text(_) | Payload::Binary(_) => None,
        };
        self.0.get_or_init(parse).as_ref()
    }
}

/// The number of digits of the shortest integer that may not fit into a [`Value`].
const LARGE: usize = 19;

/// Turns integers that do not fit into a [`Value`] into strings of their digits. Parsed as decimals
/// they would be rounded, and an identifier would become that of someone else.
fn spell_large_integers(json: &str) -> Cow<'_, str> {
    let bytes = json.as_bytes();
    // A run of so many digits always covers one of the positions that are checked.
    let is_large = |at: usize| {
        let n_before = bytes[..at]
            .iter()
            .rev()
            .take_while(|b| b.is_ascii_digit())
            .count();
        let n_from = bytes[at..]
            .iter()
            .take_while(|b| b.is_ascii_digit())
            .count();
        n_from > 0 && n_before + n_from >= LARGE
    };
    if !(LARGE - 1..bytes.len()).step_by(LARGE).any(is_large) {
        return Cow::Borrowed(json);
    }
    let (mut spelt, mut n_copied, mut at) = (String::new(), 0, 0);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = end_of_text(bytes, at),
            b'-' | b'0'..=b'9' => {
                let end = bytes[at..]
                    .iter()
                    .position(|b| !matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E'));
                let end = end.map_or(bytes.len(), |n| at + n);
                let number = &json[at..end];
                if !number.contains(['.', 'e', 'E']) && number.parse::<i64>().is_err() {
                    spelt.extend([&json[n_copied..at], "\"", number, "\""]);
                    n_copied = end;
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    spelt.push_str(&json[n_copied..]);
    Cow::Owned(spelt)
}

/// The end of the JSON string that begins here.
fn end_of_text(json: &[u8], begin: usize) -> usize {
    let mut at = begin + 1;
    while let Some(byte) = json.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    json.len()
}

/// Evaluates a JSON pointer (RFC 6901). Equivalent to [`serde_json::Value::pointer`], which
/// allocates for every token of the pointer.
fn find<'a>(json: &'a serde_json::Value, pointer: &str) -> Option<&'a serde_json::Value> {
    if pointer.is_empty() {
        return Some(json);
    }
    pointer
        .strip_prefix('/')?
        .split('/')
        .try_fold(json, |value, word| match value {
            serde_json::Value::Object(members) if word.contains('~') => {
                members.get(&word.replace("~1", "/").replace("~0", "~"))
            }
            serde_json::Value::Object(members) => members.get(word),
            // RFC 6901 allows no leading zeros and no sign.
            serde_json::Value::Array(elements) if word == "0" || !word.starts_with(['0', '+']) => {
                elements.get(word.parse::<usize>().ok()?)
            }
            _ => None,
        })
}

/// A field of the payload as an attribute; `null` is "not set".
fn field(value: &serde_json::Value) -> Option<Value> {
    Some(match value {
        serde_json::Value::Null => return None,
        serde_json::Value::Bool(b) => Value::Flag(*b),
        serde_json::Value::Number(n) => n
            .as_i64()
            .map(Value::Integer)
            .or_else(|| n.as_f64().map(Value::Decimal))?,
        serde_json::Value::String(text) => Value::Text(text.clone()),
        list_or_object => Value::Text(list_or_object.to_string()),
    })
}

/// Whether a text matches a pattern in which `*` stands for any characters. Takes at most
/// `pattern.len() * text.len()` steps, because only the last `*` is ever retried.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut last_star = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            last_star = Some((p, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((star, from)) = last_star {
            last_star = Some((star, from + 1));
            (p, t) = (star + 1, from + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&b| b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EntryId;

    #[test]
    fn patterns_match_as_documented() {
        for (pattern, text, expect) in [
            ("order.shipped", "order.shipped", true),
            ("order.shipped", "order.shipped.late", false),
            ("order.*", "order.shipped", true),
            ("order.*", "order.", true),
            ("order.*", "order", false),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
            ("*.paid", "a.b.paid", true),
            ("*.paid", "a.paid.b", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("*ü", "Grü", true),
        ] {
            assert_eq!(matches(pattern, text), expect, "{pattern} {text}");
        }
        // Would take exponential time in a matcher that retries every star.
        assert!(!matches(
            &"*a".repeat(100),
            &format!("{}b", "a".repeat(200))
        ));
    }

    #[test]
    fn only_selected_attributes_and_fields_are_passed() {
        let document = r#"{"type":"t","a":1,"b":"x","c":true,"data":{"n":{"m":2.5},"s":"t","l":[1,2],"z":null,"big":18446744073709551615}}"#;
        let event = Event::from_json(EntryId::default(), "-", document.as_bytes()).unwrap();
        let picked = |attributes: &[&str], fields: &[&str]| {
            let owned = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
            let selection = Selection {
                types: Vec::new(),
                attributes: owned(attributes),
                fields: owned(fields),
                payload: false,
            };
            let document = Document::default();
            let picked: Vec<_> = selection
                .pick(&event, &document)
                .map(|(name, value)| (name.to_owned(), value))
                .collect();
            picked
        };
        let text = |s: &str| Value::Text(s.into());
        assert_eq!(picked(&[], &[]), []);
        assert_eq!(picked(&["b", "gone"], &[]), [("b".into(), text("x"))]);
        assert_eq!(
            picked(&["*", "b"], &[]),
            [
                ("a".into(), Value::Integer(1)),
                ("b".into(), text("x")),
                ("c".into(), Value::Flag(true))
            ]
        );
        let fields = picked(&[], &["/n/m", "/s", "/l", "/z", "/gone", "/n", "/big"]);
        let expect = [
            ("/n/m", Value::Decimal(2.5)),
            ("/s", text("t")),
            ("/l", text("[1,2]")),
            ("/n", text(r#"{"m":2.5}"#)),
            ("/big", text("18446744073709551615")),
        ];
        assert_eq!(fields, expect.map(|(name, value)| (name.to_owned(), value)));
    }

    #[test]
    fn json_pointers_are_evaluated_as_by_serde_json() {
        let json = serde_json::json!({"a": {"b": [1, {"c": 2}]}, "": 3, "x/y": 4, "m~n": {"~1": 5}, "0": 6, "l": [[7], 8]});
        let mut n_found = 0;
        for pointer in [
            "",
            "/",
            "/a",
            "/a/b",
            "/a/b/0",
            "/a/b/1/c",
            "/a/b/00",
            "/a/b/+1",
            "/a/b/-",
            "/a/b/2",
            "/a/b/99999999999999999999",
            "/a/b/",
            "a",
            "/x~1y",
            "/x/y",
            "/m~0n/~01",
            "/m~n",
            "/m~0n",
            "/0",
            "/l/0/0",
            "/l/0/01",
            "/l/1/0",
            "//",
        ] {
            let found = find(&json, pointer);
            assert_eq!(found, json.pointer(pointer), "{pointer}");
            n_found += usize::from(found.is_some());
        }
        assert_eq!(n_found, 12);
    }

    #[test]
    fn integers_out_of_range_become_strings_of_their_digits() {
        let check =
            |json: &str, expect: &str| assert_eq!(spell_large_integers(json), expect, "{json}");
        check("9223372036854775808", r#""9223372036854775808""#);
        check("-9223372036854775809", r#""-9223372036854775809""#);
        check(
            r#"{"a":[ 123456789012345678901234567890 ,1]}"#,
            r#"{"a":[ "123456789012345678901234567890" ,1]}"#,
        );
        for as_it_is in [
            "",
            "9223372036854775807",
            "-9223372036854775808",
            "-0",
            "1e30",
            "1234567890123456789012.0",
            "12345678901234567890E-2",
            r#"{"12345678901234567890":"12345678901234567890"}"#,
            r#""a\\\"12345678901234567890""#,
        ] {
            check(as_it_is, as_it_is);
        }
        // At every offset.
        for n in 0..50 {
            let (blank, large) = (" ".repeat(n), "98765432109876543210");
            check(
                &format!("{blank}[{large}]"),
                &format!("{blank}[\"{large}\"]"),
            );
        }
    }

    #[test]
    fn texts_that_look_like_other_patterns_are_warned_of() {
        let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        let fine = Selection {
            types: texts(&["order.*", "a-b/c:d"]),
            attributes: texts(&["*", "site"]),
            fields: texts(&["/a*b/$schema", "/x(1)/0"]),
            payload: false,
        };
        assert_eq!(fine.odd_texts(), Vec::<String>::new());
        let odd = Selection {
            types: texts(&["order.*", "^a", "b$"]),
            attributes: texts(&["si*"]),
            fields: texts(&["/lines/*/id", "/lines/[0]", "/{name}"]),
            payload: false,
        };
        let begin = |warning: &String| {
            let (begin, _) = warning.split_once("', which").expect("a reason");
            begin.to_owned()
        };
        assert_eq!(
            odd.odd_texts().iter().map(begin).collect::<Vec<_>>(),
            [
                "the type pattern '^a' of the plugin contains '^",
                "the type pattern 'b$' of the plugin contains '$",
                "the attribute 'si*' that the plugin reads contains '*",
                "the field '/lines/*/id' that the plugin reads contains '*",
                "the field '/lines/[0]' that the plugin reads contains '[0]",
                "the field '/{name}' that the plugin reads contains '{name}",
            ]
        );
    }

    #[test]
    fn a_selection_out_of_bounds_is_refused() {
        let check = |selection: Selection, expect: &str| {
            assert!(selection.check().unwrap_err().contains(expect))
        };
        check(
            Selection {
                types: vec!["x".into(); 257],
                ..Selection::default()
            },
            "lists 257 types; the limit is 256; use patterns such as 'order.*', or none to be called",
        );
        check(
            Selection {
                fields: vec!["/x".into(); 257],
                ..Selection::default()
            },
            "lists 257 fields; the limit is 256; select an object that contains several of them, or the whole payload",
        );
        check(
            Selection {
                attributes: vec!["x".repeat(257)],
                ..Selection::default()
            },
            "an entry of 257 bytes in its attributes",
        );
        check(
            Selection {
                fields: vec!["order".into()],
                ..Selection::default()
            },
            "'order', which is not a JSON pointer",
        );
        assert_eq!(
            Selection {
                fields: vec!["/a".into(), "".into()],
                ..Selection::default()
            }
            .check(),
            Ok(())
        );
    }
}
