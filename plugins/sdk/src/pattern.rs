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

#[cfg(test)]
mod tests {
    use super::*;

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
