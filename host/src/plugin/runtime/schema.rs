//! Checks the configuration of a plugin against the JSON Schema in its manifest.
//!
//! A library would bring thirty crates, and a schema is as hostile as the rest of a plugin: it may
//! refer to itself without end, or contain a regular expression that backtracks. Here each check
//! has a budget, and expressions take linear time.
//!
//! All keywords are enforced that restrict a value by itself: types, values, numbers, texts, lists,
//! objects, references within the schema, and combinations. Others are ignored (`format`,
//! `dependentRequired`, `unevaluatedProperties`, references elsewhere, expressions that
//! `regex-lite` does not know), as the specification allows; the plugin itself checks its
//! configuration as well.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;

use regex_lite::{Regex, RegexBuilder};
use serde_json::{Map, Value as Json};

use super::log::printable;

/// The most comparisons in one check: thousands of times those of a long configuration.
const MAX_STEPS: usize = 2_000_000;
/// The deepest nesting of schemas, also by references.
const MAX_DEPTH: usize = 96;
/// The size of a compiled expression in bytes, and the steps that it counts as: a check compiles at
/// most a hundred of them.
const MAX_EXPRESSION_BYTES: usize = 64 * 1024;
const EXPRESSION_STEPS: usize = MAX_STEPS / 100;
/// The most characters of a value in an error.
const MAX_SHOWN: usize = 64;
/// The most values or keys that an error lists.
const MAX_LISTED: usize = 24;

/// A schema, not yet trusted in any way.
pub(super) struct Schema(Json);

impl Schema {
    /// # Errors
    /// The text is not a schema, as the rest of a sentence that begins with the file name.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let schema: Json = serde_json::from_str(text)
            .map_err(|e| format!("has a config-schema that is not valid JSON: {e}"))?;
        match schema {
            Json::Object(_) | Json::Bool(_) => Ok(Self(schema)),
            _ => Err(
                "has a config-schema that is not a JSON Schema; return an object, or none"
                    .to_owned(),
            ),
        }
    }

    /// Checks a configuration.
    ///
    /// # Errors
    /// The path of the value, the reason and the fix, as the rest of a sentence that begins with
    /// the file name.
    pub(super) fn check(&self, config: &Json) -> Result<(), String> {
        let mut checker = Checker {
            root: &self.0,
            steps_left: MAX_STEPS,
            expressions: HashMap::new(),
        };
        checker
            .check(&self.0, config, &Place::ROOT)
            .map_err(|stop| match stop {
                Stop::Mismatch(Mismatch { path, reason, .. }) => {
                    let at = if path.is_empty() { "" } else { ": " };
                    let text = format!("{path}{at}{}", reason.text());
                    format!("rejects its configuration: {}", printable(&text))
                }
                Stop::Budget => {
                    "has a config-schema that takes too long to check; simplify it, or return none"
                        .to_owned()
                }
            })
    }
}

/// Where a value is in the configuration, and how deep the schema that it is checked against.
struct Place<'a> {
    parent: Option<&'a Self>,
    step: Step<'a>,
    /// The number of steps from the root of the configuration.
    n_steps: usize,
    /// The number of schemas around this one.
    depth: usize,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Same,
    Key(&'a str),
    Index(usize),
}

impl<'a> Place<'a> {
    const ROOT: Self = Self {
        parent: None,
        step: Step::Same,
        n_steps: 0,
        depth: 0,
    };

    fn then(&'a self, step: Step<'a>) -> Self {
        Self {
            parent: Some(self),
            step,
            n_steps: self.n_steps + usize::from(!matches!(step, Step::Same)),
            depth: self.depth + 1,
        }
    }

    /// Such as `rules[0].to`.
    fn path(&self) -> String {
        let mut path = self.parent.map(Place::path).unwrap_or_default();
        match self.step {
            Step::Same => {}
            Step::Key(key) if path.is_empty() => path.push_str(key),
            Step::Key(key) => path.extend([".", key]),
            Step::Index(index) => path.extend(["[", &index.to_string(), "]"]),
        }
        path
    }
}

/// Why a check ends.
enum Stop {
    Mismatch(Mismatch),
    Budget,
}

struct Mismatch {
    path: String,
    n_steps: usize,
    reason: Reason,
}

/// Reasons of alternatives are combined, if they are of one kind.
enum Reason {
    Type {
        is: &'static str,
        wanted: Vec<&'static str>,
    },
    Value {
        is: String,
        wanted: Vec<String>,
    },
    Other(String),
}

impl Reason {
    fn text(self) -> String {
        let or = |words: &[&str]| match words {
            [] => "nothing".to_owned(),
            [one] => (*one).to_owned(),
            [words @ .., last] => format!("{} or {last}", words.join(", ")),
        };
        match self {
            Self::Type { is, wanted } => format!("is {is}; write {}", or(&wanted)),
            Self::Value { is, wanted } => {
                let listed: Vec<&str> =
                    wanted.iter().take(MAX_LISTED).map(String::as_str).collect();
                format!("is {is}; use {}", or(&listed))
            }
            Self::Other(text) => text,
        }
    }
}

struct Checker<'a> {
    root: &'a Json,
    steps_left: usize,
    /// `None` for an expression that is not known.
    expressions: HashMap<&'a str, Option<Regex>>,
}

type Checked = Result<(), Stop>;

fn mismatch(place: &Place<'_>, reason: Reason) -> Checked {
    Err(Stop::Mismatch(Mismatch {
        path: place.path(),
        n_steps: place.n_steps,
        reason,
    }))
}

fn other(place: &Place<'_>, text: impl Into<String>) -> Checked {
    mismatch(place, Reason::Other(text.into()))
}

impl<'a> Checker<'a> {
    fn spend(&mut self, steps: usize) -> Checked {
        self.steps_left = self.steps_left.checked_sub(steps).ok_or(Stop::Budget)?;
        Ok(())
    }

    fn check(&mut self, schema: &'a Json, value: &Json, place: &Place<'_>) -> Checked {
        self.spend(1)?;
        if place.depth > MAX_DEPTH {
            return Err(Stop::Budget);
        }
        let schema = match schema {
            Json::Object(schema) => schema,
            Json::Bool(false) => return other(place, "is not allowed; remove it"),
            _ => return Ok(()),
        };
        if let Some(target) = schema.get("$ref").and_then(Json::as_str)
            && let Some(target) = target.strip_prefix('#')
            && let Some(target) = self.root.pointer(target)
        {
            self.check(target, value, &place.then(Step::Same))?;
        }
        self.check_type(schema, value, place)?;
        self.check_value(schema, value, place)?;
        match value {
            Json::Number(number) => check_number(schema, number, place)?,
            Json::String(text) => self.check_text(schema, text, place)?,
            Json::Array(list) => self.check_list(schema, list, place)?,
            Json::Object(members) => self.check_members(schema, members, place)?,
            Json::Null | Json::Bool(_) => {}
        }
        self.check_combinations(schema, value, place)
    }

    fn check_type(
        &mut self,
        schema: &'a Map<String, Json>,
        value: &Json,
        place: &Place<'_>,
    ) -> Checked {
        let names: Vec<&str> = match schema.get("type") {
            Some(Json::String(name)) => vec![name],
            Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).collect(),
            _ => return Ok(()),
        };
        self.spend(names.len())?;
        if names.iter().any(|name| has_type(value, name)) {
            return Ok(());
        }
        let wanted = names
            .iter()
            .filter_map(|name| type_in_words(name))
            .collect();
        let is = match value {
            Json::Null => "absent",
            Json::Bool(_) => "true or false",
            Json::Number(_) => "a number",
            Json::String(_) => "a text",
            Json::Array(_) => "a list",
            Json::Object(_) => "a table",
        };
        mismatch(place, Reason::Type { is, wanted })
    }

    fn check_value(
        &mut self,
        schema: &'a Map<String, Json>,
        value: &Json,
        place: &Place<'_>,
    ) -> Checked {
        let constant = schema.get("const").map(std::slice::from_ref);
        let listed = schema
            .get("enum")
            .and_then(Json::as_array)
            .map(Vec::as_slice);
        for wanted in [constant, listed].into_iter().flatten() {
            // Texts are compared to the end if they are equal up to there.
            let n_bytes = value.as_str().map_or(0, str::len);
            self.spend(wanted.len().saturating_mul(1 + n_bytes / 64))?;
            if !wanted.iter().any(|one| is_equal(one, value)) {
                let is = beginning(value);
                let wanted = wanted.iter().filter(|one| !one.is_null());
                let wanted = wanted.map(beginning).collect();
                return mismatch(place, Reason::Value { is, wanted });
            }
        }
        Ok(())
    }

    fn check_text(
        &mut self,
        schema: &'a Map<String, Json>,
        text: &str,
        place: &Place<'_>,
    ) -> Checked {
        let n = text.chars().count();
        check_size(schema, ["minLength", "maxLength"], n, "characters", place)?;
        match schema.get("pattern").and_then(Json::as_str) {
            Some(pattern) if !self.matches(pattern, text)? => other(
                place,
                format!("does not match {pattern}; write it in that form"),
            ),
            _ => Ok(()),
        }
    }

    /// Whether the text contains a match, or the expression is not known.
    fn matches(&mut self, pattern: &'a str, text: &str) -> Result<bool, Stop> {
        self.spend(1 + text.len() / 16)?;
        if !self.expressions.contains_key(pattern) {
            self.spend(EXPRESSION_STEPS)?;
            let expression = RegexBuilder::new(pattern)
                .size_limit(MAX_EXPRESSION_BYTES)
                .build();
            self.expressions.insert(pattern, expression.ok());
        }
        let expression = self.expressions.get(pattern).and_then(Option::as_ref);
        Ok(expression.is_none_or(|known| known.is_match(text)))
    }

    fn check_list(
        &mut self,
        schema: &'a Map<String, Json>,
        list: &[Json],
        place: &Place<'_>,
    ) -> Checked {
        check_size(
            schema,
            ["minItems", "maxItems"],
            list.len(),
            "elements",
            place,
        )?;
        if schema.get("uniqueItems") == Some(&Json::Bool(true)) {
            self.spend(list.len().saturating_mul(list.len()))?;
            let repeats = |at: &usize| list[..*at].iter().any(|one| is_equal(one, &list[*at]));
            if let Some(at) = (1..list.len()).find(repeats) {
                return other(
                    &place.then(Step::Index(at)),
                    "repeats an element; remove it",
                );
            }
        }
        // Before 2020-12, a list of schemas in `items` was what `prefixItems` is now.
        let of_items = |name| schema.get(name).and_then(Json::as_array);
        let first = of_items("prefixItems").or_else(|| of_items("items"));
        let rest = match schema.get("items") {
            Some(Json::Array(_)) => schema.get("additionalItems"),
            rest => rest,
        };
        for (at, element) in list.iter().enumerate() {
            let own = first.and_then(|first| first.get(at)).or(rest);
            if let Some(schema) = own {
                self.check(schema, element, &place.then(Step::Index(at)))?;
            }
        }
        Ok(())
    }

    fn check_members(
        &mut self,
        schema: &'a Map<String, Json>,
        members: &Map<String, Json>,
        place: &Place<'_>,
    ) -> Checked {
        let limits = ["minProperties", "maxProperties"];
        check_size(schema, limits, members.len(), "keys", place)?;
        let table = |name| schema.get(name).and_then(Json::as_object);
        let (properties, patterns) = (table("properties"), table("patternProperties"));
        for (key, value) in members {
            let place = place.then(Step::Key(key));
            if let Some(names) = schema.get("propertyNames") {
                self.check(names, &Json::String(key.clone()), &place)?;
            }
            let mut is_known = false;
            if let Some(schema) = properties.and_then(|properties| properties.get(key)) {
                is_known = true;
                self.check(schema, value, &place)?;
            }
            for (pattern, schema) in patterns.into_iter().flatten() {
                if self.matches(pattern, key)? {
                    is_known = true;
                    self.check(schema, value, &place)?;
                }
            }
            match schema.get("additionalProperties").filter(|_| !is_known) {
                Some(Json::Bool(false)) => return unknown_key(properties, &place),
                Some(schema) => self.check(schema, value, &place)?,
                None => {}
            }
        }
        let required = schema.get("required").and_then(Json::as_array);
        for key in required.into_iter().flatten().filter_map(Json::as_str) {
            self.spend(1)?;
            if !members.contains_key(key) {
                return other(place, format!("has no key '{key}'; add it"));
            }
        }
        Ok(())
    }

    fn check_combinations(
        &mut self,
        schema: &'a Map<String, Json>,
        value: &Json,
        place: &Place<'_>,
    ) -> Checked {
        let list = |name| schema.get(name).and_then(Json::as_array);
        let place = &place.then(Step::Same);
        for schema in list("allOf").into_iter().flatten() {
            self.check(schema, value, place)?;
        }
        if let Some(any) = list("anyOf") {
            self.count_matches(any, value, place)?;
        }
        if let Some(one) = list("oneOf")
            && self.count_matches(one, value, place)? > 1
        {
            return other(
                place,
                "fits several alternatives of its schema; write one of them",
            );
        }
        if let Some(not) = schema.get("not")
            && self.is_match(not, value, place)?
        {
            return other(place, "is excluded by its schema; write another value");
        }
        if let Some(condition) = schema.get("if") {
            let then = if self.is_match(condition, value, place)? {
                "then"
            } else {
                "else"
            };
            if let Some(schema) = schema.get(then) {
                self.check(schema, value, place)?;
            }
        }
        Ok(())
    }

    fn is_match(
        &mut self,
        schema: &'a Json,
        value: &Json,
        place: &Place<'_>,
    ) -> Result<bool, Stop> {
        match self.check(schema, value, place) {
            Ok(()) => Ok(true),
            Err(Stop::Mismatch(_)) => Ok(false),
            Err(stop) => Err(stop),
        }
    }

    /// Returns how many of the alternatives the value matches.
    ///
    /// # Errors
    /// The value matches none. The mismatch is that of the closest: deepest in the configuration,
    /// and of those, not of its type.
    fn count_matches(
        &mut self,
        schemas: &'a [Json],
        value: &Json,
        place: &Place<'_>,
    ) -> Result<usize, Stop> {
        let mut n_matches = 0;
        let mut closest: Option<Mismatch> = None;
        for schema in schemas {
            match self.check(schema, value, place) {
                Ok(()) => n_matches += 1,
                Err(Stop::Mismatch(mismatch)) => {
                    closest = Some(match closest {
                        None => mismatch,
                        Some(other) => closer(other, mismatch),
                    });
                }
                Err(stop) => return Err(stop),
            }
        }
        match closest {
            Some(mismatch) if n_matches == 0 => Err(Stop::Mismatch(mismatch)),
            _ => Ok(n_matches),
        }
    }
}

/// The mismatch of two alternatives that tells more, or both in one.
fn closer(mut a: Mismatch, mut b: Mismatch) -> Mismatch {
    let nearness = |mismatch: &Mismatch| {
        (
            mismatch.n_steps,
            !matches!(mismatch.reason, Reason::Type { .. }),
        )
    };
    match nearness(&a).cmp(&nearness(&b)) {
        Ordering::Greater => return a,
        Ordering::Less => return b,
        Ordering::Equal => {}
    }
    match (&mut a.reason, &mut b.reason) {
        (Reason::Type { wanted, .. }, Reason::Type { wanted: more, .. }) if a.path == b.path => {
            more.retain(|word| !wanted.contains(word));
            wanted.append(more);
        }
        (Reason::Value { wanted, .. }, Reason::Value { wanted: more, .. }) if a.path == b.path => {
            more.retain(|word| !wanted.contains(word));
            wanted.append(more);
        }
        _ => {}
    }
    a
}

fn unknown_key(properties: Option<&Map<String, Json>>, place: &Place<'_>) -> Checked {
    let known = properties.into_iter().flat_map(Map::keys);
    let known: Vec<&str> = known.take(MAX_LISTED).map(String::as_str).collect();
    let fix = match known.as_slice() {
        [] => "remove it".to_owned(),
        known => format!("use one of {}", known.join(", ")),
    };
    other(place, format!("is an unknown key; {fix}"))
}

fn has_type(value: &Json, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        "integer" => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
        }
        // An unknown type restricts nothing.
        _ => true,
    }
}

/// `None` for `null`, which a configuration in TOML cannot contain.
fn type_in_words(name: &str) -> Option<&'static str> {
    match name {
        "boolean" => Some("true or false"),
        "string" => Some("a text"),
        "array" => Some("a list"),
        "object" => Some("a table"),
        "number" => Some("a number"),
        "integer" => Some("an integer"),
        _ => None,
    }
}

/// Numbers are equal by value, at any depth.
fn is_equal(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Number(a), Json::Number(b)) => {
            a == b || a.as_f64() == b.as_f64() && is_whole(a) != is_whole(b)
        }
        (Json::Array(a), Json::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_equal(a, b))
        }
        (Json::Object(a), Json::Object(b)) => {
            let same = |(key, a): (&String, &Json)| b.get(key).is_some_and(|b| is_equal(a, b));
            a.len() == b.len() && a.iter().all(same)
        }
        _ => a == b,
    }
}

fn is_whole(number: &serde_json::Number) -> bool {
    !number.is_f64()
}

/// The beginning of a value as JSON. Most mismatches are never shown, and a value may be long.
fn beginning(value: &Json) -> String {
    struct Beginning(Vec<u8>);
    impl io::Write for Beginning {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = 4 * MAX_SHOWN - self.0.len();
            self.0.extend_from_slice(&bytes[..bytes.len().min(room)]);
            // Ends the writer: the rest is not shown.
            Ok(bytes.len().min(room))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut written = Beginning(Vec::with_capacity(4 * MAX_SHOWN));
    // An error means that there was no more room.
    serde_json::to_writer(&mut written, value).ok();
    let text = String::from_utf8_lossy(&written.0);
    text.chars().take(MAX_SHOWN).collect()
}

fn check_number(
    schema: &Map<String, Json>,
    number: &serde_json::Number,
    place: &Place<'_>,
) -> Checked {
    let Some(value) = number.as_f64() else {
        return Ok(());
    };
    type Comparison = fn(f64, f64) -> bool;
    let bounds: [(&str, Comparison, &str); 4] = [
        ("minimum", |value, bound| value >= bound, "at least"),
        ("maximum", |value, bound| value <= bound, "at most"),
        ("exclusiveMinimum", |value, bound| value > bound, "above"),
        ("exclusiveMaximum", |value, bound| value < bound, "below"),
    ];
    for (keyword, fits, words) in bounds {
        if let Some(bound) = schema.get(keyword).and_then(Json::as_f64)
            && !fits(value, bound)
        {
            return other(place, format!("is {number}; give {words} {bound}"));
        }
    }
    if let Some(step) = schema.get("multipleOf").and_then(Json::as_f64)
        && step > 0.0
        // Exact for integers; a decimal step is not, so that a small difference passes.
        && (value / step - (value / step).round()).abs() > 1e-9
    {
        return other(place, format!("is {number}; give a multiple of {step}"));
    }
    Ok(())
}

fn check_size(
    schema: &Map<String, Json>,
    [least, most]: [&str; 2],
    n: usize,
    what: &str,
    place: &Place<'_>,
) -> Checked {
    let bound = |keyword| schema.get(keyword).and_then(Json::as_u64);
    let n = n as u64;
    if let Some(least) = bound(least).filter(|least| n < *least) {
        return other(place, format!("has {n} {what}; give at least {least}"));
    }
    if let Some(most) = bound(most).filter(|most| n > *most) {
        return other(place, format!("has {n} {what}; give at most {most}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(schema: &Json, config: &Json) -> Result<(), String> {
        Schema::parse(&schema.to_string()).unwrap().check(config)
    }

    #[track_caller]
    fn fits(schema: &Json, configs: &[Json]) {
        for config in configs {
            assert_eq!(check(schema, config), Ok(()), "{schema} {config}");
        }
    }

    #[track_caller]
    fn refuses(schema: &Json, cases: &[(Json, &str)]) {
        for (config, expect) in cases {
            let reason = check(schema, config).unwrap_err();
            let expect = format!("rejects its configuration: {expect}");
            assert_eq!(reason, expect, "{schema} {config}");
        }
    }

    #[test]
    fn each_keyword_accepts_and_refuses() {
        let of = |schema: Json| json!({ "properties": { "x": schema } });
        let cases = [
            (json!(true), json!(1), None),
            (json!(false), json!(1), Some("is not allowed; remove it")),
            (json!({"type": "integer"}), json!(2.0), None),
            (
                json!({"type": "integer"}),
                json!(2.5),
                Some("is a number; write an integer"),
            ),
            (
                json!({"type": ["string", "null"]}),
                json!([1]),
                Some("is a list; write a text"),
            ),
            (json!({"const": 1}), json!(1.0), None),
            (
                json!({"enum": ["a", "b", null]}),
                json!("c"),
                Some(r#"is "c"; use "a" or "b""#),
            ),
            (json!({"minimum": 1, "maximum": 3}), json!(3), None),
            (
                json!({"minimum": 1}),
                json!(0),
                Some("is 0; give at least 1"),
            ),
            (
                json!({"exclusiveMaximum": 1}),
                json!(1),
                Some("is 1; give below 1"),
            ),
            (json!({"multipleOf": 0.1}), json!(0.3), None),
            (
                json!({"multipleOf": 5}),
                json!(7),
                Some("is 7; give a multiple of 5"),
            ),
            (
                json!({"minLength": 2}),
                json!("ü"),
                Some("has 1 characters; give at least 2"),
            ),
            (json!({"pattern": "^a+$"}), json!("aa"), None),
            (
                json!({"pattern": "^a+$"}),
                json!("ab"),
                Some("does not match ^a+$; write it in that form"),
            ),
            (json!({"pattern": "(?=a)"}), json!("b"), None),
            (
                json!({"maxItems": 1}),
                json!([1, 2]),
                Some("has 2 elements; give at most 1"),
            ),
            (
                json!({"not": {"type": "string"}}),
                json!("a"),
                Some("is excluded by its schema; write another value"),
            ),
            (
                json!({"oneOf": [{"minimum": 1}, {"minimum": 2}]}),
                json!(1),
                None,
            ),
            (
                json!({"oneOf": [{"minimum": 1}, {"minimum": 2}]}),
                json!(2),
                Some("fits several alternatives of its schema; write one of them"),
            ),
            (
                json!({"oneOf": [{"const": "a"}, {"const": "b"}]}),
                json!("c"),
                Some(r#"is "c"; use "a" or "b""#),
            ),
            (
                json!({"if": {"const": 1}, "then": {"type": "integer"}, "else": {"type": "string"}}),
                json!("a"),
                None,
            ),
            (json!({"format": "date", "unknown": 1}), json!("x"), None),
        ];
        for (schema, value, expect) in cases {
            let config = json!({ "x": value });
            match expect {
                None => fits(&of(schema), &[config]),
                Some(reason) => refuses(&of(schema), &[(config, &format!("x: {reason}"))]),
            }
        }
    }

    #[test]
    fn a_mismatch_names_its_path_and_the_fix() {
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["rules"],
            "properties": {"rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}}},
            "$defs": {"rule": {
                "type": "object", "additionalProperties": false, "required": ["to"],
                "patternProperties": {"^x-": {"type": "string"}},
                "properties": {
                    "to": {"type": "object", "additionalProperties": {"type": "string"}, "propertyNames": {"maxLength": 5}},
                    "when": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/when"}, {"type": "array", "items": {"$ref": "#/$defs/when"}}]}
                }
            }, "when": {"type": "object", "properties": {"at": {"type": "integer"}}}}
        });
        fits(
            &schema,
            &[json!({"rules": [{"to": {"user": "a"}, "x-note": "n", "when": {"at": 1}}]})],
        );
        let rule = |rule: Json| json!({ "rules": [{"to": {}}, rule] });
        refuses(
            &schema,
            &[
                (json!({}), "has no key 'rules'; add it"),
                (
                    json!({"rule": []}),
                    "rule: is an unknown key; use one of rules",
                ),
                (rule(json!({})), "rules[1]: has no key 'to'; add it"),
                (
                    rule(json!(["ann", "bob"])),
                    "rules[1]: is a list; write a table",
                ),
                (
                    rule(json!({"to": ["ann", "bob"]})),
                    "rules[1].to: is a list; write a table",
                ),
                (
                    rule(json!({"to": {"user": 5}})),
                    "rules[1].to.user: is a number; write a text",
                ),
                (
                    rule(json!({"to": {"persons": ""}})),
                    "rules[1].to.persons: has 7 characters; give at most 5",
                ),
                (
                    rule(json!({"to": {}, "x-note": 1})),
                    "rules[1].x-note: is a number; write a text",
                ),
                (
                    rule(json!({"to": {}, "when": 1})),
                    "rules[1].when: is a number; write a text, a table or a list",
                ),
                (
                    rule(json!({"to": {}, "when": {"at": "x"}})),
                    "rules[1].when.at: is a text; write an integer",
                ),
                (
                    rule(json!({"to": {}, "when": [{"at": "x"}]})),
                    "rules[1].when[0].at: is a text; write an integer",
                ),
            ],
        );
    }

    /// Each pattern compiles to megabytes, and each mismatch would print the whole configuration.
    #[test]
    fn a_hostile_schema_takes_bounded_memory_and_prints_only_the_beginning_of_a_value() {
        let patterns = |n: usize| -> Map<String, Json> {
            let pattern = |n| (format!("{n}(?:.{{200}}){{100}}"), json!(true));
            (0..n).map(pattern).collect()
        };
        let schema = json!({ "patternProperties": patterns(90) });
        assert_eq!(check(&schema, &json!({ "k": 1 })), Ok(()));
        let schema = json!({ "patternProperties": patterns(101) });
        let reason = check(&schema, &json!({ "k": 1 })).unwrap_err();
        assert!(reason.contains("takes too long to check"), "{reason}");

        let long = json!("x".repeat(1 << 20));
        assert_eq!(beginning(&long).len(), MAX_SHOWN);
        assert_eq!(beginning(&json!({ "a": 1 })), r#"{"a":1}"#);
    }

    #[test]
    fn a_hostile_schema_is_refused_within_the_budget() {
        let too_long = Err(
            "has a config-schema that takes too long to check; simplify it, or return none"
                .to_owned(),
        );
        assert_eq!(check(&json!({"$ref": "#"}), &json!({})), too_long);
        let mutual = json!({"$ref": "#/a", "a": {"anyOf": [{"$ref": "#/b"}]}, "b": {"not": {"$ref": "#/a"}}});
        assert_eq!(check(&mutual, &json!({})), too_long);
        // Each level doubles the work.
        let defs: Map<String, Json> = (0..40)
            .map(|n| {
                let next = json!({ "$ref": format!("#/{}", n + 1) });
                (
                    n.to_string(),
                    json!({ "anyOf": [next, next, {"not": next}] }),
                )
            })
            .collect();
        let mut wide = Json::Object(defs);
        wide["$ref"] = json!("#/0");
        wide["40"] = json!({"const": 1});
        assert_eq!(check(&wide, &json!({})), too_long);
        let unique = json!({"properties": {"x": {"uniqueItems": true}}});
        assert_eq!(check(&unique, &json!({"x": vec![1; 5_000]})), too_long);
        assert!(Schema::parse("[]").is_err() && Schema::parse("{").is_err());
    }
}
