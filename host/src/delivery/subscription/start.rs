//! The parameters of a stream: where it begins and which of the user's notifications pass its
//! filter.

use crate::event::{Name, Notification, Priority, Route};

use super::cursor::{Cursor, CursorError};

/// Where a stream begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Where this client stopped reading.
    Cursor(Cursor),
    /// At the notifications committed from now on.
    Latest,
    /// At the oldest notification still kept.
    Earliest,
    /// At the notifications committed since this moment, in milliseconds since the Unix epoch.
    Since(u64),
    /// As [`Start::Latest`], but the client sent an unreadable position and receives a gap.
    Unknown,
}

impl Start {
    /// Parses the start of a stream: a cursor, `earliest`, `latest` or a duration ago, such as
    /// `10m` before `now_ms`, the broker's time.
    /// Any other text starts at the latest, with a gap: rejecting it would stop an `EventSource`
    /// permanently. Returns `None` for a cursor of another user, which has no meaning for this one.
    pub fn read(text: &str, user: &Name, now_ms: u64) -> Option<Self> {
        if let Some(ago_ms) = duration_ms(text) {
            return Some(Self::Since(now_ms.saturating_sub(ago_ms)));
        }
        match (text, Cursor::decode(text, user)) {
            ("latest", _) => Some(Self::Latest),
            ("earliest", _) => Some(Self::Earliest),
            (_, Ok(cursor)) => Some(Self::Cursor(cursor)),
            // Left in the browser by the user who was logged in before.
            (_, Err(CursorError::OtherUser)) => None,
            (_, Err(CursorError::Malformed)) => Some(Self::Unknown),
        }
    }
}

/// Parses `90s`, `10m`, `2h` or `7d` to milliseconds.
fn duration_ms(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit_ms: u64 = match unit {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    // A cursor has more digits than any sensible number of days.
    if number.len() > 9 || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(unit_ms)
}

/// Selects among a user's notifications those that a stream shows.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Event types, exact or ending in `*`; empty means all.
    pub types: Vec<String>,
    pub min_priority: Option<Priority>,
}

impl Filter {
    /// Whether the filter passes everything.
    pub fn is_all(&self) -> bool {
        self.types.is_empty() && self.min_priority.is_none()
    }

    pub(super) fn passes(&self, notification: &Notification, route: &Route) -> bool {
        let kind = notification.event.kind.as_str();
        let is_type = |pattern: &String| {
            pattern
                .strip_suffix('*')
                .map_or(pattern == kind, |prefix| kind.starts_with(prefix))
        };
        (self.types.is_empty() || self.types.iter().any(is_type))
            && self.min_priority.is_none_or(|min| route.priority >= min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_is_parsed_from_keyword_duration_or_own_cursor() {
        let user = Name::parse("ann").unwrap();
        let mut cursor = String::new();
        Cursor::default().encode(&user, &mut cursor);
        let read = |text: &str, user: &Name| Start::read(text, user, 1_000_000);
        assert_eq!(read("latest", &user), Some(Start::Latest));
        assert_eq!(read("earliest", &user), Some(Start::Earliest));
        assert_eq!(read("10m", &user), Some(Start::Since(400_000)));
        assert_eq!(read("10d", &user), Some(Start::Since(0)));
        assert_eq!(read(&cursor, &user), Some(Start::Cursor(Cursor::default())));
        assert_eq!(read(&cursor, &Name::parse("bob").unwrap()), None);
        for garbled in ["", "1", "m", "-1m", "99999999999m", "<script>", "\u{0}"] {
            assert_eq!(read(garbled, &user), Some(Start::Unknown), "{garbled:?}");
        }
    }
}
