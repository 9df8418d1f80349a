//! Patterns of names, such as `order.*`: `*` matches any sequence of characters, including none,
//! and every other character matches itself.

/// Whether a text matches a pattern. Takes at most (pattern length × text length) steps, because
/// only the last `*` is ever retried.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut last_star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                last_star = Some((p, t));
                p += 1;
            }
            Some(byte) if *byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => {
                let Some((star, from)) = last_star else {
                    return false;
                };
                last_star = Some((star, from + 1));
                (p, t) = (star + 1, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

/// The first character of a pattern that has a meaning in other pattern languages, and matches only
/// itself here.
pub(crate) fn odd_in_pattern(pattern: &str) -> Option<char> {
    let is_odd = |c: &char| "{}^$[]()|?\\".contains(*c);
    pattern.chars().find(is_odd)
}

/// The first part of a text that looks like a pattern, although the text is compared as it is. Fewer
/// characters than in a pattern: brackets and question marks are common in texts.
pub(crate) fn odd_in_text(text: &str) -> Option<char> {
    if text.len() < 2 {
        return None;
    }
    let has_braces = text
        .split_once('{')
        .is_some_and(|(_, rest)| rest.contains('}'));
    [
        ('*', text.contains('*')),
        ('^', text.starts_with('^')),
        ('$', text.ends_with('$')),
        ('{', has_braces),
    ]
    .into_iter()
    .find_map(|(odd, is_there)| is_there.then_some(odd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_of_other_pattern_languages_are_found() {
        for (pattern, odd) in [
            ("order.*", None),
            ("order.{a,b}", Some('{')),
            ("^order", Some('^')),
            ("order$", Some('$')),
            ("a|b", Some('|')),
        ] {
            assert_eq!(odd_in_pattern(pattern), odd, "{pattern}");
        }
        for (text, odd) in [
            ("*", None),
            ("$", None),
            ("5 $ (net)", None),
            ("why?", None),
            ("a{b", None),
            ("eu-*", Some('*')),
            ("^eu", Some('^')),
            ("eu$", Some('$')),
            ("{/order/region}", Some('{')),
        ] {
            assert_eq!(odd_in_text(text), odd, "{text}");
        }
    }

    #[test]
    fn patterns_match_part_by_part() {
        for (pattern, text, expect) in [
            ("order.*", "order.shipped", true),
            ("order.*", "order", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("*", "", true),
            ("", "x", false),
            ("a*a", "a", false),
            ("*.x", "a.x", true),
            ("**", "q", true),
            ("*ü", "Grü", true),
        ] {
            assert_eq!(matches(pattern, text), expect, "{pattern} {text}");
        }
        // A matcher that retries every `*` takes exponential time here.
        assert!(!matches(
            &"*a".repeat(100),
            &format!("{}b", "a".repeat(200))
        ));
    }
}
