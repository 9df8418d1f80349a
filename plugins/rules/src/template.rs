//! Templates: texts that contain values of the event, such as `order-{/order/id}`, `{subject}` and
//! `{region}`. Write a literal brace twice.

use std::borrow::Cow;

use pointsman_plugin::{Event, Selector, Value};

#[derive(Clone, Debug)]
pub(crate) struct Template {
    /// The text as it was written.
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
pub(crate) enum Part {
    Literal(String),
    Value(Selector),
}

impl Template {
    /// # Errors
    /// A message that names the problem and the fix.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                literal.push_str(brace);
                rest = after;
                continue;
            }
            let inner = if brace == "{" {
                rest.split_once('}')
            } else {
                None
            };
            let Some((name, after)) = inner else {
                return Err(format!(
                    "'{text}' has an unmatched {brace}; write {brace}{brace} for a literal {brace}"
                ));
            };
            rest = after;
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal)));
            }
            parts.push(Part::Value(
                Selector::parse(name).map_err(|e| format!("in '{text}', {e}"))?,
            ));
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Self {
            text: text.to_owned(),
            parts,
        })
    }

    /// Returns the text as it was written.
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Returns the text if it contains no value of the event.
    pub(crate) fn literal(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Returns the selector if the template consists of a single value.
    pub(crate) fn single(&self) -> Option<&Selector> {
        match self.parts.as_slice() {
            [Part::Value(selector)] => Some(selector),
            _ => None,
        }
    }

    pub(crate) fn selectors(&self) -> impl Iterator<Item = &Selector> {
        self.parts.iter().filter_map(|part| match part {
            Part::Literal(_) => None,
            Part::Value(selector) => Some(selector),
        })
    }

    /// Returns the text with its values filled in.
    ///
    /// # Errors
    /// A message that names the first missing value.
    pub(crate) fn fill(&self, event: &Event) -> Result<String, String> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Value(selector) => text.push_str(&found(selector, event)?.to_string()),
            }
        }
        Ok(text)
    }

    /// Returns the text with its values filled in; a missing value is replaced with an empty
    /// string.
    pub(crate) fn fill_with_gaps(&self, event: &Event) -> String {
        let filled = self.parts.iter().map(|part| match part {
            Part::Literal(literal) => Cow::Borrowed(literal.as_str()),
            Part::Value(selector) => selector
                .of(event)
                .map_or_else(Cow::default, |value| Cow::Owned(value.to_string())),
        });
        filled.collect()
    }
}

/// Returns the value of the event.
///
/// # Errors
/// A message that names the missing value.
pub(crate) fn found<'a>(selector: &Selector, event: &'a Event) -> Result<Cow<'a, Value>, String> {
    selector
        .of(event)
        .ok_or_else(|| format!("the event has no {}", selector.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::event;

    #[test]
    fn values_replace_their_selectors() {
        let event = event("t")
            .subject("s")
            .attribute("region", "eu")
            .attribute("/n", 7)
            .attribute("/list", "[1]")
            .build();
        for (template, expect) in [
            ("", Ok("")),
            ("plain", Ok("plain")),
            ("{/n}", Ok("7")),
            ("a-{region}-{/n}-b", Ok("a-eu-7-b")),
            ("{type}{subject}{source}{id}", Ok("ts/testtest-1")),
            ("{{{region}}}", Ok("{eu}")),
            ("{{region}}", Ok("{region}")),
            ("{/list}", Ok("[1]")),
            ("x{/gone}", Err("the event has no /gone")),
        ] {
            let filled = Template::parse(template).unwrap().fill(&event);
            assert_eq!(
                filled.as_deref().map_err(String::as_str),
                expect,
                "{template}"
            );
        }
        assert_eq!(
            Template::parse("a{/gone}b{/n}")
                .unwrap()
                .fill_with_gaps(&event),
            "ab7"
        );
    }

    #[test]
    fn an_invalid_template_is_rejected_with_the_fix() {
        for (template, fix) in [
            ("{/a", "has an unmatched {; write {{"),
            ("a}", "has an unmatched }; write }}"),
            ("{}", "in '{}', '' is not a valid attribute name"),
            ("{Order}", "use 1 to 64 characters"),
            ("{/a~2}", "write ~0 for ~"),
        ] {
            let error = Template::parse(template).unwrap_err();
            assert!(error.contains(fix), "{template} gave: {error}");
        }
    }
}
