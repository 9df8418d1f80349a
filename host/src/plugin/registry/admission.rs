//! Which files of the folder are plugins, by their names: a copy or a version of a plugin's file is
//! not one more plugin, and with `plugins.only_configured` only the configuration adds plugins.
//!
//! The name of a file is derived in `folder`; what a refused file means for events is in `slot`.

use super::folder;
use super::settings::Config;

/// The characters that a name may have.
pub(super) const RULE: &str = "use at most 64 letters, digits and hyphens, not starting with a hyphen or with a number and a hyphen";

/// The greatest number of edits between a name and one that it was probably meant to be.
const MAX_EDITS: usize = 2;

/// Why a name is not that of a plugin to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Inadmissible {
    /// It has other characters or is too long.
    Invalid,
    /// It ends in a version, and the configuration does not name it.
    Version,
    /// The configuration does not name it, and `only_configured` is set.
    NotConfigured,
}

/// Checks the name of a plugin that is to be loaded.
///
/// # Errors
/// Why it must not be loaded.
pub(super) fn admit(name: &str, config: &Config) -> Result<(), Inadmissible> {
    if !folder::is_name(name) {
        return Err(Inadmissible::Invalid);
    }
    if config.names(name) {
        return Ok(());
    }
    if name
        .rsplit_once('-')
        .is_some_and(|(_, last)| is_version(last))
    {
        return Err(Inadmissible::Version);
    }
    if config.only_configured {
        return Err(Inadmissible::NotConfigured);
    }
    Ok(())
}

impl Inadmissible {
    /// The reason for a file: a sentence that begins with its name and includes the fix.
    pub(super) fn of_file(&self, file: &str, name: &str) -> String {
        let base = base(name);
        match self {
            Self::Invalid => format!(
                "{file} does not have the name of a plugin, so it is not loaded; rename it to {}, or move it out of the folder ({RULE})",
                if base.is_empty() {
                    "NAME.wasm".to_owned()
                } else {
                    format!("{base}.wasm")
                }
            ),
            Self::Version => format!(
                "{file} ends in a version, which is not part of a plugin's name, so it is not loaded; rename it to {base}.wasm, move it out of the folder, or add [plugins.{name}] to the configuration if this is its name"
            ),
            Self::NotConfigured => format!(
                "{file} is not loaded, because the configuration does not name the plugin '{name}' and plugins.only_configured is set; add [plugins.{name}], or move the file out of the folder"
            ),
        }
    }

    /// The reason for an upload, with the fix.
    pub(super) fn of_upload(&self, name: &str) -> String {
        let shown = name.escape_debug();
        match self {
            Self::Invalid => format!("'{shown}' is not a valid plugin name; {RULE}"),
            Self::Version => format!(
                "'{shown}' ends in a version, which is not part of a plugin's name; upload it as '{}', or add [plugins.{shown}] to the configuration",
                base(name)
            ),
            Self::NotConfigured => format!(
                "the configuration does not name the plugin '{shown}' and plugins.only_configured is set; add [plugins.{shown}] to the configuration first"
            ),
        }
    }
}

/// The name that a copy or a version of a plugin's file was probably meant to have: `address` for
/// `address (copy)`, `address.old`, `address-1.2.0` and `address-v2`.
pub(super) fn base(name: &str) -> &str {
    let end = name
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .unwrap_or(name.len());
    let mut base = name[..end].trim_end_matches('-');
    while let Some((rest, last)) = base.rsplit_once('-')
        && is_version(last)
    {
        base = rest.trim_end_matches('-');
    }
    base
}

/// Whether a part of a name is a version: `2`, `v2`.
fn is_version(part: &str) -> bool {
    let digits = part.strip_prefix(['v', 'V']).unwrap_or(part);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// The known names that an unknown one was probably meant to be.
pub(super) fn near<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    known
        .filter(|known| base(name) == *known || edits(name, known) <= MAX_EDITS)
        .collect()
}

/// The number of characters to insert, delete or replace to turn one text into the other.
fn edits(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (n, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = n + 1;
        for (m, b) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[m + 1];
            row[m + 1] = replaced.min(diagonal + 1).min(row[m] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_or_a_version_of_a_file_is_not_one_more_plugin() {
        let config: Config = toml::from_str("order = ['route-53']\n[late]\n").unwrap();
        let admitted = |file: &str, config: &Config| admit(&folder::name_of_file(file), config);
        for (file, of) in [
            ("address (copy).wasm", "address"),
            ("address - Copy.wasm", "address"),
            ("address(1).wasm", "address"),
            ("address.old.wasm", "address"),
            ("10-address-1.2.0.wasm", "address"),
            ("my_router-1.2.0-rc.1.wasm", "my-router"),
            ("\u{e4}.wasm", ""),
        ] {
            assert_eq!(
                admitted(file, &config),
                Err(Inadmissible::Invalid),
                "{file}"
            );
            assert_eq!(base(&folder::name_of_file(file)), of, "{file}");
        }
        for (file, of) in [
            ("address-2.wasm", "address"),
            ("address_v2.wasm", "address"),
            ("address-1-2-0.wasm", "address"),
            ("10-route-54.wasm", "route"),
        ] {
            assert_eq!(
                admitted(file, &config),
                Err(Inadmissible::Version),
                "{file}"
            );
            assert_eq!(base(&folder::name_of_file(file)), of, "{file}");
        }
        for file in [
            "route-53.wasm",
            "10-late.wasm",
            "sha256.wasm",
            "10.wasm",
            "a-v.wasm",
        ] {
            assert_eq!(admitted(file, &config), Ok(()), "{file}");
        }
        let only = Config {
            only_configured: true,
            ..config
        };
        assert_eq!(admitted("late.wasm", &only), Ok(()));
        assert_eq!(
            admitted("address.wasm", &only),
            Err(Inadmissible::NotConfigured)
        );
    }

    #[test]
    fn names_at_most_two_edits_away_are_near() {
        let known = ["address", "discard", "my-router"];
        let near = |name| near(name, known.into_iter());
        assert_eq!(near("adress"), ["address"]);
        assert_eq!(near("my-ruoter"), ["my-router"]);
        assert_eq!(near("address-1-2"), ["address"]);
        assert_eq!(near("rules"), Vec::<&str>::new());
    }
}
