//! The section `[plugins.NAME]` of a configuration file, as text: taken from a proposed file, and
//! put in place of the section in the node's own file.
//!
//! A file is never changed on a guess: the changed text is parsed, and it is used only if this
//! section has the wanted values and every other key is as before. Comments and the order of the
//! rest of the file stay.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::settings::{Config, Settings};

/// The maximum size of a proposed configuration file, in bytes.
pub(super) const MAX_BYTES: usize = 1024 * 1024;

/// A section with its text.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub(super) settings: Settings,
    /// TOML with this section only.
    pub(super) text: String,
}

impl Section {
    /// Takes the section of this plugin from a configuration file. Its other sections are ignored.
    ///
    /// # Errors
    /// The file is invalid or has no such section; the text includes the fix.
    pub(super) fn parse(name: &str, file: &str) -> Result<Self, String> {
        let settings = settings_in(name, file)?;
        let settings = settings.ok_or_else(|| {
            format!("the configuration has no section [plugins.{name}]; write the new section as it would be in pointsman.toml")
        })?;
        if !settings.enabled {
            return Err(format!(
                "[plugins.{name}] has enabled = false, so there is nothing to compare; remove this key, or disable the plugin instead"
            ));
        }
        let own = Split::of(name, file).own;
        // An inline table or dotted keys have no lines of their own.
        let text = match settings_in(name, &own) {
            Ok(Some(found)) if found == settings => own,
            _ => render(name, &settings)?,
        };
        Ok(Self { settings, text })
    }

    /// The file with this section in place of the one for the same plugin, or with this section
    /// added. `None`: the file is written in a way that this cannot change safely.
    pub(super) fn replaced_in(&self, name: &str, file: &str) -> Option<String> {
        let Split { before, after, .. } = Split::of(name, file);
        let mut text = before;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text += &self.text;
        if !text.ends_with('\n') {
            text.push('\n');
        }
        text += &after;
        let mut expected = toml::from_str::<Table>(file).ok()?;
        let own = toml::from_str::<Table>(&self.text).ok()?;
        let own = own.get("plugins")?.get(name)?.clone();
        let plugins = expected
            .entry("plugins")
            .or_insert_with(|| Value::Table(Table::new()));
        plugins.as_table_mut()?.insert(name.to_owned(), own);
        (toml::from_str::<Table>(&text).ok()? == expected).then_some(text)
    }
}

/// Writes a configuration file atomically, with the permissions of the present one.
///
/// # Errors
/// It cannot be written; the text names it.
pub(super) fn write(path: &Path, text: &str) -> Result<(), String> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{file}.{:016x}", rand::random::<u64>()));
    let written = || {
        // The file may hold secrets, so that it never has wider permissions.
        let mode = fs::metadata(path)?.permissions().mode();
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(mode & 0o777)
            .open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    written().map_err(|error: std::io::Error| {
        // Best effort: the error already reports that the folder is not writable.
        drop(fs::remove_file(&draft));
        format!("{} cannot be written: {error}", path.display())
    })
}

fn settings_in(name: &str, file: &str) -> Result<Option<Settings>, String> {
    /// Other sections are ignored; they concern a node.
    #[derive(Deserialize)]
    struct PluginSections {
        #[serde(default)]
        plugins: Config,
    }
    let parsed: PluginSections = toml::from_str(file).map_err(|error| {
        let line = error
            .span()
            .map(|span| file[..span.start].matches('\n').count() + 1);
        let line = line.map_or_else(String::new, |line| format!(" in line {line}"));
        format!("the configuration is not valid{line}: {}", error.message())
    })?;
    let PluginSections { mut plugins } = parsed;
    Ok(plugins.plugins.remove(name))
}

fn render(name: &str, settings: &Settings) -> Result<String, String> {
    let section = BTreeMap::from([(name, settings)]);
    toml::to_string(&BTreeMap::from([("plugins", section)]))
        .map_err(|error| format!("the configuration cannot be written as TOML: {error}"))
}

/// The lines of a file: those of the section, those before it and those after it.
#[derive(Debug, Default)]
struct Split {
    own: String,
    before: String,
    after: String,
}

impl Split {
    fn of(name: &str, file: &str) -> Self {
        let mut split = Self::default();
        let mut is_own = false;
        // Comments directly above a header belong to its section.
        let mut comments = String::new();
        for line in file.split_inclusive('\n') {
            if line.trim_start().starts_with('#') {
                comments += line;
                continue;
            }
            if let Some(path) = header(line) {
                is_own = path.len() >= 2 && path[0] == "plugins" && path[1] == name;
            }
            split.part(is_own).push_str(&std::mem::take(&mut comments));
            split.part(is_own).push_str(line);
        }
        split.part(is_own).push_str(&comments);
        split
    }

    fn part(&mut self, is_own: bool) -> &mut String {
        if is_own {
            &mut self.own
        } else if self.own.is_empty() {
            &mut self.before
        } else {
            &mut self.after
        }
    }
}

/// The keys of a header: `[plugins.address]` or `[[plugins.address.config.rules]]`.
fn header(line: &str) -> Option<Vec<String>> {
    if !line.trim_start().starts_with('[') {
        return None;
    }
    // A header alone is a valid file, with one key at each level.
    let mut level = toml::from_str::<Table>(line).ok()?;
    let mut path = Vec::new();
    while let Some((key, value)) = level.into_iter().next() {
        path.push(key);
        level = match value {
            Value::Table(table) => table,
            Value::Array(tables) => match tables.into_iter().next() {
                Some(Value::Table(table)) => table,
                _ => break,
            },
            _ => break,
        };
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# the node\n[plugins]\norder = ['a', 'b']\n\n# who gets what\n[plugins.a]\ndeadline = '5ms'\n[[plugins.a.config.rules]]\nto = 'x' # old\n\n# the other one\n[plugins.b]\n# silent\nenabled = false\n";

    #[test]
    fn a_section_is_replaced_and_the_rest_of_the_file_stays() {
        let new = "[plugins.b]\n[plugins.a]\n# new\nconfig.rules = [\n  { to = 'y' },\n]\n";
        let section = Section::parse("a", new).unwrap();
        assert_eq!(
            section.text,
            "[plugins.a]\n# new\nconfig.rules = [\n  { to = 'y' },\n]\n"
        );
        assert_eq!(
            section.replaced_in("a", FILE).unwrap(),
            "# the node\n[plugins]\norder = ['a', 'b']\n\n[plugins.a]\n# new\nconfig.rules = [\n  { to = 'y' },\n]\n# the other one\n[plugins.b]\n# silent\nenabled = false\n"
        );
        let added = section.replaced_in("a", "[listen]\naddress = 'x'").unwrap();
        assert!(
            added.starts_with("[listen]\naddress = 'x'\n[plugins.a]\n"),
            "{added}"
        );
        assert_eq!(section.replaced_in("a", "").unwrap(), section.text);
    }

    #[test]
    fn a_file_that_cannot_be_changed_safely_is_not_changed() {
        let section = Section::parse("a", "[plugins.a]\ndeadline = '7ms'\n").unwrap();
        for file in [
            "plugins.a.deadline = '5ms'\n",
            "[plugins]\na = { deadline = '5ms' }\n",
            "[plugins.a]\nsha256 = '''\n[plugins.b]\n'''\n",
            "not TOML",
        ] {
            assert_eq!(section.replaced_in("a", file), None, "{file}");
        }
    }

    #[test]
    fn a_section_in_any_form_is_found_and_errors_name_the_line() {
        for file in [
            "plugins.a.deadline = '7ms'\n",
            "[plugins]\na = { deadline = '7ms' }\n",
            "[plugins.'a']\ndeadline = '7ms'\n",
        ] {
            let section = Section::parse("a", file).unwrap();
            let again = Section::parse("a", &section.text).unwrap();
            assert_eq!(again.settings.deadline.as_millis(), 7, "{file}");
            assert_eq!(again.settings, section.settings);
        }
        for (file, expect) in [
            ("[plugins.b]\n", "no section [plugins.a]"),
            ("[plugins.a]\nenabled = false\n", "enabled = false"),
            (
                "\n[plugins.a]\ndead_line = 1\n",
                "in line 3: unknown field `dead_line`",
            ),
        ] {
            let error = Section::parse("a", file).unwrap_err();
            assert!(error.contains(expect), "{file}: {error}");
        }
    }
}
