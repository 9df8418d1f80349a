//! The attributes of a recipient, stored or claimed: strings, numbers and booleans, or lists of
//! them, by name; bounded in number and size.
//!
//! Equal attributes of many recipients share one allocation and one number, if they passed through
//! a [`Pool`].

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash as _, Hasher as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use crate::event::{Malformed, Value};

/// The most attributes of a user.
const MAX_ATTRIBUTES: usize = 64;
/// The longest attribute name, in bytes.
const MAX_NAME: usize = 64;
/// The longest string value, in bytes.
const MAX_TEXT: usize = 1024;
/// The most elements of a list.
const MAX_ELEMENTS: usize = 256;
/// The most bytes of strings in a list.
const MAX_LIST_TEXT: usize = 4096;

/// The value of an attribute of a recipient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AttributeValue {
    One(Value),
    List(Box<[Value]>),
}

impl From<Value> for AttributeValue {
    fn from(value: Value) -> Self {
        Self::One(value)
    }
}

/// A recipient's attributes by name; cheap to clone. They are few and looked up often, so they are
/// stored contiguously, sorted by name: a look-up scans integers and needs no hashing.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(
    from = "BTreeMap<String, AttributeValue>",
    into = "BTreeMap<String, AttributeValue>"
)]
pub struct Attributes(Arc<Set>);

#[derive(Debug)]
struct Set {
    /// Never reused, so that it can identify the set without keeping it alive.
    number: u64,
    entries: Box<[(Key, AttributeValue)]>,
}

/// The name of an attribute, with its first bytes as a number that distinguishes most names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::event) struct Key {
    begin: u64,
    name: Box<str>,
}

impl Key {
    pub(in crate::event) fn new(name: &str) -> Self {
        Self {
            begin: begin(name),
            name: name.into(),
        }
    }

    pub(in crate::event) fn into_name(self) -> String {
        self.name.into()
    }

    pub(in crate::event) fn name(&self) -> &str {
        &self.name
    }
}

fn begin(name: &str) -> u64 {
    let mut bytes = [0; 8];
    let n = name.len().min(8);
    bytes[..n].copy_from_slice(&name.as_bytes()[..n]);
    u64::from_be_bytes(bytes)
}

impl Attributes {
    fn new(entries: Box<[(Key, AttributeValue)]>) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(Arc::new(Set {
            number: LAST.fetch_add(1, Relaxed) + 1,
            entries,
        }))
    }

    pub fn get(&self, name: &str) -> Option<&AttributeValue> {
        self.find_by(begin(name), name)
    }

    pub fn is_empty(&self) -> bool {
        self.0.entries.is_empty()
    }

    pub(in crate::event) fn find(&self, key: &Key) -> Option<&AttributeValue> {
        self.find_by(key.begin, &key.name)
    }

    fn find_by(&self, begin: u64, name: &str) -> Option<&AttributeValue> {
        self.0
            .entries
            .iter()
            .find(|(key, _)| key.begin == begin && *key.name == *name)
            .map(|(_, value)| value)
    }

    /// Attributes with the same number are equal.
    pub(in crate::event) fn number(&self) -> u64 {
        self.0.number
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (key, value) in &self.0.entries {
            key.name.hash(&mut hasher);
            let values = match value {
                AttributeValue::One(value) => std::slice::from_ref(value),
                AttributeValue::List(values) => values,
            };
            for value in values {
                match value {
                    Value::Flag(flag) => flag.hash(&mut hasher),
                    Value::Integer(integer) => integer.hash(&mut hasher),
                    Value::Decimal(decimal) => decimal.to_bits().hash(&mut hasher),
                    Value::Text(text) => text.hash(&mut hasher),
                }
            }
        }
        hasher.finish()
    }
}

impl Default for Attributes {
    fn default() -> Self {
        static NONE: LazyLock<Attributes> = LazyLock::new(|| Attributes::new(Box::default()));
        NONE.clone()
    }
}

impl PartialEq for Attributes {
    fn eq(&self, other: &Self) -> bool {
        self.0.number == other.0.number || self.0.entries == other.0.entries
    }
}

impl<V: Into<AttributeValue>> From<BTreeMap<String, V>> for Attributes {
    fn from(by_name: BTreeMap<String, V>) -> Self {
        if by_name.is_empty() {
            return Self::default();
        }
        Self::new(
            by_name
                .into_iter()
                .map(|(name, value)| (Key::new(&name), value.into()))
                .collect(),
        )
    }
}

impl From<Attributes> for BTreeMap<String, AttributeValue> {
    fn from(attributes: Attributes) -> Self {
        attributes
            .0
            .entries
            .iter()
            .map(|(key, value)| (key.name().to_owned(), value.clone()))
            .collect()
    }
}

impl<V: Into<AttributeValue>, const N: usize> From<[(String, V); N]> for Attributes {
    fn from(by_name: [(String, V); N]) -> Self {
        BTreeMap::from(by_name).into()
    }
}

/// Deduplicates equal attributes for as long as they are in use.
#[derive(Debug, Default)]
pub struct Pool(Mutex<Sets>);

#[derive(Debug, Default)]
struct Sets {
    /// By fingerprint. If two sets share a fingerprint, which is rare, only the later one is
    /// shared.
    known: HashMap<u64, Weak<Set>>,
    /// The size at which unused sets are removed.
    full: usize,
}

impl Pool {
    /// Returns the first known attributes equal to these, or these.
    pub fn share(&self, attributes: Attributes) -> Attributes {
        let mut sets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fingerprint = attributes.fingerprint();
        let known = sets
            .known
            .get(&fingerprint)
            .and_then(Weak::upgrade)
            .map(Attributes)
            .filter(|known| *known == attributes);
        if let Some(known) = known {
            return known;
        }
        if sets.known.len() >= sets.full {
            sets.known.retain(|_, set| set.strong_count() > 0);
            sets.full = 2 * sets.known.len() + 64;
        }
        sets.known
            .insert(fingerprint, Arc::downgrade(&attributes.0));
        attributes
    }
}

/// Parses attributes.
///
/// # Errors
/// [`Malformed`] names the attribute that no condition could read.
pub fn parse_attributes(
    members: serde_json::Map<String, serde_json::Value>,
) -> Result<Attributes, Malformed> {
    if members.len() > MAX_ATTRIBUTES {
        return Err(Malformed::new(format!(
            "has {} attributes; the limit is {MAX_ATTRIBUTES}",
            members.len()
        ))
        .of("the user"));
    }
    let mut attributes = BTreeMap::new();
    for (name, value) in members {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(Malformed::new(format!(
                "is not a valid attribute name; use 1 to {MAX_NAME} bytes without control characters"
            ))
            .of(format!("'{}'", name.escape_debug())));
        }
        let value = match value {
            serde_json::Value::Array(elements) => list(elements),
            value => single(value).map(AttributeValue::One),
        };
        match value {
            Ok(value) => attributes.insert(name, value),
            Err(problem) => return Err(Malformed::new(problem).of(name)),
        };
    }
    Ok(attributes.into())
}

/// # Errors
/// The problem and the fix, as a predicate of the attribute.
fn single(value: serde_json::Value) -> Result<Value, String> {
    match value {
        serde_json::Value::Bool(flag) => Ok(Value::Flag(flag)),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Ok(Value::Integer(integer)),
            // Rounding would make two different numbers equal, and a condition on one would match
            // the other.
            (None, Some(decimal))
                if decimal.fract() == 0.0 && decimal.abs() >= 9_007_199_254_740_992.0 =>
            {
                Err(
                    "is a number with too many digits to be stored exactly; send it as a string"
                        .to_owned(),
                )
            }
            (None, Some(decimal)) => Ok(Value::Decimal(decimal)),
            (None, None) => Err("is a number out of range".to_owned()),
        },
        serde_json::Value::String(text) if text.len() > MAX_TEXT => {
            Err(format!("has {} bytes; the limit is {MAX_TEXT}", text.len()))
        }
        serde_json::Value::String(text) => Ok(Value::Text(text)),
        serde_json::Value::Null | serde_json::Value::Array(_) | serde_json::Value::Object(_) => {
            Err(
                "is not a string, number, boolean or list of these; omit unknown attributes"
                    .to_owned(),
            )
        }
    }
}

/// # Errors
/// As for [`single`].
fn list(elements: Vec<serde_json::Value>) -> Result<AttributeValue, String> {
    if elements.len() > MAX_ELEMENTS {
        return Err(format!(
            "has {} elements; the limit is {MAX_ELEMENTS}",
            elements.len()
        ));
    }
    let values = elements.into_iter().enumerate().map(|(at, element)| {
        single(element).map_err(|problem| format!("has an element {at} that {problem}"))
    });
    let values = values.collect::<Result<Box<[Value]>, _>>()?;
    let text = |value: &Value| match value {
        Value::Text(text) => text.len(),
        Value::Integer(_) | Value::Decimal(_) | Value::Flag(_) => 0,
    };
    let n_bytes: usize = values.iter().map(text).sum();
    if n_bytes > MAX_LIST_TEXT {
        return Err(format!(
            "has {n_bytes} bytes of strings; the limit is {MAX_LIST_TEXT}"
        ));
    }
    Ok(AttributeValue::List(values))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_with_a_common_prefix_are_distinguished() {
        let names = [
            "",
            "a",
            "a\0",
            "abcdefgh",
            "abcdefgh\0",
            "abcdefghi",
            "abcdefghj",
        ];
        let have: Attributes = names
            .iter()
            .enumerate()
            .map(|(n, name)| ((*name).to_owned(), Value::Integer(n as i64)))
            .collect::<BTreeMap<_, _>>()
            .into();
        for (n, name) in names.iter().enumerate() {
            assert_eq!(have.get(name), Some(&Value::Integer(n as i64).into()));
        }
        assert_eq!(have.get("abcdefg"), None);
    }

    #[test]
    fn a_pool_drops_unused_attributes() {
        let pool = Pool::default();
        let of = |n: i64| pool.share(Attributes::from([("n".into(), Value::Integer(n))]));
        let first = of(0);
        for n in 1..10_000 {
            of(n);
        }
        assert_eq!(of(0).number(), first.number());
        assert_ne!(of(1).number(), first.number());
        let n_known = pool.0.lock().unwrap().known.len();
        assert!(n_known < 200, "{n_known} sets are kept");
    }

    #[test]
    fn invalid_attributes_are_rejected_and_named() {
        let check = |body: &str, expect: &str| {
            let error = parse_attributes(serde_json::from_str(body).unwrap())
                .unwrap_err()
                .to_string();
            assert!(error.contains(expect), "{body} returned: {error}");
        };
        let kinds = "is not a string, number, boolean or list of these";
        check(r#"{"plan":null}"#, &format!("plan {kinds}"));
        check(r#"{"plan":{"a":1}}"#, &format!("plan {kinds}"));
        check(
            r#"{"muted":["a",["b"]]}"#,
            &format!("muted has an element 1 that {kinds}"),
        );
        let elements = |n: usize, text: &str| json!({ "muted": vec![text; n] }).to_string();
        check(&elements(257, ""), "muted has 257 elements");
        check(
            &elements(5, &"x".repeat(1000)),
            "muted has 5000 bytes of strings; the limit is 4096",
        );
        check(
            r#"{"tenant":12345678901234567890}"#,
            "tenant is a number with too many digits",
        );
        check(r#"{"":1}"#, "'' is not a valid attribute name");
        check(r#"{"a\nb":1}"#, "is not a valid attribute name");
        check(
            &json!({ "a": "x".repeat(1025) }).to_string(),
            "a has 1025 bytes",
        );
        let many: serde_json::Map<_, _> = (0..65).map(|n| (n.to_string(), json!(n))).collect();
        check(
            &serde_json::Value::Object(many).to_string(),
            "has 65 attributes",
        );
    }
}
