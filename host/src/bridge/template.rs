//! Templates: texts with values of a message. `{0}` is the channel, `{1}` the text at the first `*`
//! of its pattern, and `{/order/id}` a value of a JSON message, by its pointer. A literal brace is
//! written twice, as in the rules of the plugin `rules`.

use serde_json::Value;

use super::message::Message;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Literal(String),
    /// 0: the channel.
    Capture(usize),
    Pointer(String),
}

impl Template {
    /// Parses a template for a channel with `n_captures` captures.
    ///
    /// # Errors
    /// The reason, followed by the fix.
    pub(super) fn parse(text: &str, n_captures: usize) -> Result<Self, String> {
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
                    "'{}' has an unmatched {brace}; write {brace}{brace} for a literal {brace}",
                    text.escape_debug()
                ));
            };
            rest = after;
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal)));
            }
            parts.push(
                part(name, n_captures)
                    .map_err(|why| format!("in '{}', {why}", text.escape_debug()))?,
            );
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        if parts.is_empty() {
            return Err("is empty; write a text or remove the key".into());
        }
        Ok(Self {
            text: text.to_owned(),
            parts,
        })
    }

    /// The template as it was written.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// The text, if it holds no value of a message.
    pub(super) fn literal(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// The pointer, if the template is a single value of a JSON message.
    pub(super) fn pointer(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [Part::Pointer(pointer)] => Some(pointer),
            _ => None,
        }
    }

    /// The text with its values. `None` if the message lacks one of them, or if one is empty or
    /// neither a text nor an integer.
    pub(super) fn fill(&self, message: &Message<'_>) -> Option<String> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Capture(n) => {
                    let capture = message.captures.get(*n).filter(|text| !text.is_empty())?;
                    text.push_str(capture);
                }
                Part::Pointer(pointer) => text.push_str(&as_text(message.value(pointer)?)?),
            }
        }
        Some(text)
    }

    /// The texts of a template that names several: the elements of a list, or the parts between
    /// commas. Unusable elements are left out.
    pub(super) fn fill_list(&self, message: &Message<'_>) -> Vec<String> {
        let list = self.pointer().and_then(|pointer| message.value(pointer));
        if let Some(Value::Array(elements)) = list {
            return elements.iter().filter_map(as_text).collect();
        }
        let text = self.fill(message).unwrap_or_default();
        let names = text.split(',').map(str::trim);
        names
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect()
    }
}

/// Ids are often numbers, and JSON keeps them as numbers.
fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Some(number.to_string()),
        _ => None,
    }
}

fn part(name: &str, n_captures: usize) -> Result<Part, String> {
    if name.starts_with('/') {
        let is_escaped =
            |(at, _): (usize, &str)| matches!(name.as_bytes().get(at + 1), Some(b'0' | b'1'));
        return if name.match_indices('~').all(is_escaped) {
            Ok(Part::Pointer(name.to_owned()))
        } else {
            Err(format!(
                "'{}' is not a valid JSON pointer; write ~0 for ~ and ~1 for / in a name",
                name.escape_debug()
            ))
        };
    }
    match name.parse::<usize>() {
        Ok(n) if n <= n_captures => Ok(Part::Capture(n)),
        Ok(n) => Err(format!(
            "{{{n}}} has no '*' in the channel, which has {n_captures}; count them from 1"
        )),
        Err(_) => Err(format!(
            "{{{}}} is not a value of a message; write {{1}} for the text at the first '*' of the channel, or a JSON pointer such as {{/userId}}",
            name.escape_debug()
        )),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn values_of_the_channel_and_of_the_message_replace_their_names() {
        let body = Bytes::from_static(br#"{"userId":42,"a":{"b~/c":"x"},"t":true,"f":1.5,"e":"","l":["1",2,null,""],"s":"a, b"}"#);
        let message = Message::new(vec!["user:7", "7"], &body);
        for (template, expect) in [
            ("plain", Some("plain")),
            ("{1}", Some("7")),
            ("{0}", Some("user:7")),
            ("{/userId}", Some("42")),
            ("u-{1}-{/a/b~0~1c}", Some("u-7-x")),
            ("{{{1}}}", Some("{7}")),
            ("{/gone}", None),
            ("x{/t}", None),
            ("{/f}", None),
            ("{/e}", None),
            ("{/l}", None),
        ] {
            let filled = Template::parse(template, 1).unwrap().fill(&message);
            assert_eq!(filled.as_deref(), expect, "{template}");
        }
        let list = |template| Template::parse(template, 1).unwrap().fill_list(&message);
        assert_eq!(list("{/l}"), ["1", "2"]);
        assert_eq!(list("{/s}"), ["a", "b"]);
        assert_eq!(list("{/gone}"), [""; 0]);
    }

    #[test]
    fn an_invalid_template_is_refused_with_the_fix() {
        for (template, fix) in [
            ("{1", "has an unmatched {; write {{"),
            ("1}", "has an unmatched }; write }}"),
            ("{2}", "count them from 1"),
            ("{userId}", "a JSON pointer such as {/userId}"),
            ("{/a~2}", "write ~0 for ~"),
            ("", "is empty; write a text"),
        ] {
            let error = Template::parse(template, 1).unwrap_err();
            assert!(error.contains(fix), "{template} gave: {error}");
        }
    }
}
