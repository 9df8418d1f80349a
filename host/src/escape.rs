//! Makes foreign text safe to print: file names, answers of plugins, events, errors that quote
//! them.
//!
//! Every log line, readiness line and command that shows such text uses these functions.

/// Whether a terminal acts on this character instead of showing it: control characters (C0, DEL and
/// C1), line and paragraph separators, and bidirectional controls, which can disguise a line as
/// another one.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// The text on one line, with every hidden character escaped as in Rust.
pub fn printable(text: &str) -> String {
    escaped(text, |c| is_hidden(c).then(|| c.escape_default().collect()))
}

/// Like [`printable`], for text that may have several lines.
pub fn printable_lines(text: &str) -> String {
    escaped(text, |c| {
        (c != '\n' && is_hidden(c)).then(|| c.escape_default().collect())
    })
}

/// JSON with the same meaning, in which the hidden characters that strings may contain are escaped.
/// Line feeds, which only separate tokens or documents, are kept.
pub fn printable_json(json: &str) -> String {
    // All hidden characters have at most four hexadecimal digits.
    escaped(json, |c| {
        (c != '\n' && is_hidden(c)).then(|| format!("\\u{:04x}", u32::from(c)))
    })
}

fn escaped(text: &str, escape: impl Fn(char) -> Option<String>) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match escape(c) {
            Some(escape) => shown.push_str(&escape),
            None => shown.push(c),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_characters_are_escaped_and_others_are_kept() {
        assert_eq!(
            printable("a\n\u{1b}[2J\u{7f}\u{9b}\u{202e}Grüße 日本"),
            "a\\n\\u{1b}[2J\\u{7f}\\u{9b}\\u{202e}Grüße 日本"
        );
        assert_eq!(printable_lines("a\n\u{9b}"), "a\n\\u{9b}");
        let json = "{\"a\":\"\u{7f}\u{9b}\u{2066}ü\"}\n";
        assert_eq!(printable_json(json), "{\"a\":\"\\u007f\\u009b\\u2066ü\"}\n");
        let meaning = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        assert_eq!(meaning(&printable_json(json)), meaning(json));
    }
}
