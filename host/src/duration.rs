//! Durations as configuration states them: a whole number with a unit, such as `20s`.
//!
//! The only parser of durations: keys of the file, environment variables and options use it by
//! `#[serde(with = "crate::duration")]`. It refuses a number without a unit, so that no value can
//! be read in the wrong unit, and anything above [`MAX`]. The bounds of single keys are checked by
//! `config`.

use std::fmt;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};

/// The longest duration, ten years: added to a time of any clock it still is a time.
pub const MAX: Duration = Duration::from_secs(3_650 * 24 * 3_600);

/// The units in milliseconds, longest first.
const UNITS: [(&str, u64); 5] = [
    ("d", 24 * 3_600_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// Parses a whole number with one of the units `ms`, `s`, `m`, `h` and `d`, without a space.
///
/// # Errors
/// The text is not a duration, has no unit, or is longer than [`MAX`]: the reason and the fix.
pub fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(format!(
            "'{}' is not a duration; write a whole number with a unit (ms, s, m, h or d), such as \"20s\"",
            text.escape_debug()
        ));
    }
    if unit.is_empty() {
        return Err(without_unit(number));
    }
    let Some((_, unit_ms)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(format!(
            "'{}' is not a whole number with one unit; use ms, s, m, h or d, as in \"1500ms\"",
            text.escape_debug()
        ));
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(*unit_ms))
        .map(Duration::from_millis)
        .filter(|duration| *duration <= MAX)
        .ok_or_else(|| {
            format!(
                "'{text}' is too long; give at most \"{}\", which is ten years",
                format(MAX)
            )
        })
}

fn without_unit(number: impl fmt::Display) -> String {
    format!("{number} has no unit; write \"{number}ms\", \"{number}s\", or another of m, h and d")
}

/// The duration with the longest unit of which it is a multiple. [`parse`] reads it back, except
/// for fractions of a millisecond, which are dropped.
pub fn format(duration: Duration) -> String {
    let ms = millis(duration);
    if ms == 0 {
        return "0s".to_owned();
    }
    let unit = UNITS
        .iter()
        .find(|(_, unit_ms)| ms.is_multiple_of(*unit_ms));
    let (name, unit_ms) = unit.unwrap_or(&("ms", 1));
    format!("{}{name}", ms / unit_ms)
}

/// The duration in whole milliseconds; `u64::MAX` if it is longer.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// For `#[serde(with = "crate::duration")]`.
///
/// # Errors
/// As the serializer.
pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*duration))
}

/// For `#[serde(with = "crate::duration")]`.
///
/// # Errors
/// As [`parse`]; a bare number is refused with the unit that it lacks.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    struct Text;
    impl Visitor<'_> for Text {
        type Value = Duration;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a duration with a unit, such as \"20s\"")
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<Duration, E> {
            parse(text).map_err(E::custom)
        }
        fn visit_u64<E: Error>(self, number: u64) -> Result<Duration, E> {
            Err(E::custom(without_unit(number)))
        }
        fn visit_i64<E: Error>(self, number: i64) -> Result<Duration, E> {
            parse(&number.to_string()).map_err(E::custom)
        }
    }
    deserializer.deserialize_any(Text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_every_unit_and_written_in_the_longest() {
        for (text, ms, again) in [
            ("50ms", 50, "50ms"),
            ("1500ms", 1_500, "1500ms"),
            ("20s", 20_000, "20s"),
            ("600s", 600_000, "10m"),
            ("90m", 5_400_000, "90m"),
            ("2h", 7_200_000, "2h"),
            ("48h", 172_800_000, "2d"),
            ("3650d", 315_360_000_000, "3650d"),
            ("0s", 0, "0s"),
            ("0d", 0, "0s"),
        ] {
            let duration = parse(text).unwrap();
            assert_eq!(duration, Duration::from_millis(ms), "{text}");
            assert_eq!(format(duration), again);
            assert_eq!(parse(again), Ok(duration));
        }
    }

    #[test]
    fn a_text_that_is_not_a_duration_is_refused_with_its_fix() {
        for (text, reason, fix) in [
            ("20", "20 has no unit", "write \"20ms\", \"20s\""),
            ("0", "0 has no unit", "write \"0ms\", \"0s\""),
            (
                "20 s",
                "is not a whole number with one unit",
                "as in \"1500ms\"",
            ),
            (
                "20S",
                "is not a whole number with one unit",
                "use ms, s, m, h or d",
            ),
            ("1h30m", "is not a whole number with one unit", "use ms"),
            ("1.5s", "is not a whole number with one unit", "use ms"),
            ("2w", "is not a whole number with one unit", "use ms"),
            ("", "is not a duration", "such as \"20s\""),
            ("long", "'long' is not a duration", "such as \"20s\""),
            ("-1s", "'-1s' is not a duration", "such as \"20s\""),
            (
                "3651d",
                "is too long",
                "at most \"3650d\", which is ten years",
            ),
            ("99999999999999999999d", "is too long", "ten years"),
            ("18446744073709551615h", "is too long", "ten years"),
        ] {
            let error = parse(text).unwrap_err();
            let (why, how) = error.split_once("; ").unwrap();
            assert!(why.contains(reason) && how.contains(fix), "{text}: {error}");
        }
    }

    #[test]
    fn a_bare_number_in_a_file_is_refused_with_its_unit() {
        #[derive(Debug, serde::Deserialize, serde::Serialize)]
        struct Section {
            #[serde(with = "crate::duration")]
            wait: Duration,
        }
        let section: Section = toml::from_str("wait = '2m'").unwrap();
        assert_eq!(section.wait, Duration::from_secs(120));
        assert_eq!(toml::to_string(&section).unwrap(), "wait = \"2m\"\n");
        for (text, expect) in [
            ("wait = 20", "20 has no unit; write \"20ms\", \"20s\""),
            ("wait = -1", "'-1' is not a duration"),
            ("wait = 1.5", "expected a duration with a unit"),
            ("wait = true", "expected a duration with a unit"),
        ] {
            let error = toml::from_str::<Section>(text).unwrap_err();
            assert!(error.message().contains(expect), "{text}: {error}");
            assert!(error.span().is_some(), "{text}");
        }
    }
}
