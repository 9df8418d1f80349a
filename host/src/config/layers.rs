//! The layers of a configuration, file, environment and command line, merged into one table that
//! records the source of each key.
//!
//! The types of the keys come from [`RawConfig`]: a value fits if the table still deserializes with
//! it. The bounds are in `checks`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{DEFAULT_FILE, Error, OPTIONS, RawConfig};
use crate::regular_file;

/// The keys that choose the broker. A layer that sets one replaces the choice of the layers below.
const BROKER_KEYS: [&str; 3] = ["broker.redis", "broker.data", "broker.ephemeral"];

/// The merged layers, with the source of each key.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    table: Table,
    /// The place of a key for errors, `--listen` or `POINTSMAN_LISTEN`; absent for keys of the
    /// file.
    origins: BTreeMap<String, String>,
    file: Option<PathBuf>,
}

impl Layers {
    /// Reads the file. `None`: [`DEFAULT_FILE`], if it exists.
    ///
    /// # Errors
    /// The file cannot be read, or has an unknown key or an invalid value.
    pub fn file(path: Option<&Path>) -> Result<Self, Error> {
        let (path, text) = match path {
            Some(path) => (path, regular_file::read_text(path)),
            None => match regular_file::read_text(Path::new(DEFAULT_FILE)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
                text => (Path::new(DEFAULT_FILE), text),
            },
        };
        let text = text.map_err(|e| {
            Error::new(
                path.display(),
                format!(
                    "cannot be read: {e}; name a file that this process can read with --config"
                ),
            )
        })?;
        Self::text(path, &text)
    }

    /// Like [`Layers::file`], with the file's text.
    ///
    /// # Errors
    /// As [`Layers::file`].
    pub fn text(path: &Path, text: &str) -> Result<Self, Error> {
        let fault = |error: &toml::de::Error| {
            let (line, key) = error
                .span()
                .map(|span| locate(text, span.start))
                .unwrap_or_default();
            let key = if key.is_empty() {
                key
            } else {
                format!("{key}: ")
            };
            Error::new(
                format!("{}:{line}", path.display()),
                format!(
                    "{key}{}; every key and its default: pointsman config --defaults",
                    error.message()
                ),
            )
        };
        toml::from_str::<RawConfig>(text).map_err(|e| fault(&e))?;
        let table: Table = text.parse().map_err(|e| fault(&e))?;
        Ok(Self {
            table,
            origins: BTreeMap::new(),
            file: Some(path.to_owned()),
        })
    }

    /// Adds the environment as the next layer. Variables whose second word is not a section are
    /// ignored, because an orchestrator sets its own, such as `POINTSMAN_SERVICE_HOST`. An empty
    /// variable counts as unset.
    ///
    /// # Errors
    /// A variable names an unknown key, or its value is invalid for the key.
    pub fn environment(
        self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Error> {
        let settings = variables
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .filter_map(|(variable, text)| {
                let name = variable.strip_prefix("POINTSMAN_")?;
                let option = OPTIONS
                    .iter()
                    .find(|(option, _)| option.replace('-', "_").eq_ignore_ascii_case(name));
                let key = match option {
                    Some((_, key)) => (*key).to_owned(),
                    None => {
                        let (section, key) = name.split_once('_')?;
                        let section = section.to_ascii_lowercase();
                        if !sections().contains_key(&section) {
                            return None;
                        }
                        format!("{section}.{}", key.to_ascii_lowercase())
                    }
                };
                Some((variable, key, text))
            });
        self.overlay(settings.collect())
    }

    /// Adds options of the command line, by their long names, as the next layer.
    ///
    /// # Errors
    /// A value is invalid for its key.
    pub fn options<'a>(
        self,
        options: impl IntoIterator<Item = (&'a str, String)>,
    ) -> Result<Self, Error> {
        let known = |option: &str| {
            OPTIONS
                .iter()
                .find(|(name, _)| *name == option)
                .map(|(_, key)| (*key).to_owned())
        };
        let settings = options
            .into_iter()
            .filter_map(|(option, text)| Some((format!("--{option}"), known(option)?, text)));
        self.overlay(settings.collect())
    }

    fn overlay(mut self, settings: Vec<(String, String, String)>) -> Result<Self, Error> {
        let chooses = |(_, key, text): &(String, String, String)| {
            BROKER_KEYS.contains(&key.as_str()) && !["false", "0"].contains(&text.as_str())
        };
        if settings.iter().any(chooses) {
            for key in BROKER_KEYS {
                remove(&mut self.table, key);
                self.origins.remove(key);
            }
        }
        for (origin, key, text) in settings {
            let mut fault = None;
            let fits = readings(&text).into_iter().find_map(|value| {
                let mut table = self.table.clone();
                insert(&mut table, &key, value);
                match table.clone().try_into::<RawConfig>() {
                    Ok(_) => Some(table),
                    Err(error) => {
                        fault.get_or_insert(error);
                        None
                    }
                }
            });
            match (fits, fault) {
                (Some(table), _) => self.table = table,
                (None, fault) => {
                    let reason = fault
                        .map(|error| error.message().to_owned())
                        .unwrap_or_default();
                    return Err(Error::new(
                        format!("{origin}: {key}"),
                        format!("{reason}; every key and its default: pointsman config --defaults"),
                    ));
                }
            }
            self.origins.insert(key, origin);
        }
        Ok(self)
    }

    /// The configuration of all layers together.
    pub(super) fn raw(&self) -> Result<RawConfig, Error> {
        self.table
            .clone()
            .try_into()
            .map_err(|e: toml::de::Error| self.fault("configuration", e.message()))
    }

    /// An error about a key, located where the key was set.
    pub(super) fn fault(&self, key: &str, text: impl fmt::Display) -> Error {
        let origin = self.origins.iter().find(|(have, _)| {
            *have == key || (!key.contains('.') && have.starts_with(&format!("{key}.")))
        });
        let place = match (origin, &self.file) {
            (Some((_, origin)), _) => origin.clone(),
            (None, Some(file)) => file.display().to_string(),
            (None, None) => "configuration".to_owned(),
        };
        Error::new(place, format!("{key}: {text}"))
    }
}

/// The defaults as a table: its keys are the sections. The lists of tables (`[[bridge]]`) are in the
/// file only.
pub(super) fn sections() -> Table {
    let mut sections = Table::try_from(RawConfig::default()).unwrap_or_default();
    sections.retain(|_, section| section.is_table());
    sections
}

/// The possible values of a text from the environment or the command line, most likely first; the
/// type of the key decides.
fn readings(text: &str) -> Vec<Value> {
    let mut readings = vec![Value::String(text.to_owned())];
    // As in the file: a number, a boolean or a list.
    readings.extend(
        format!("x = {text}")
            .parse::<Table>()
            .ok()
            .and_then(|mut table| table.remove("x")),
    );
    // As is common for flags in an environment.
    match text {
        "1" => readings.push(Value::Boolean(true)),
        "0" => readings.push(Value::Boolean(false)),
        _ => {}
    }
    readings.push(Value::Array(
        text.split(',')
            .map(|item| Value::String(item.trim().to_owned()))
            .collect(),
    ));
    readings
}

fn insert(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                insert(section, rest, value);
            }
        }
    }
}

fn remove(table: &mut Table, key: &str) {
    if let Some((section, key)) = key.split_once('.')
        && let Some(Value::Table(section)) = table.get_mut(section)
    {
        section.remove(key);
    }
}

/// The line of an offset in a TOML text, and the key on that line, as far as it is known.
fn locate(text: &str, at: usize) -> (usize, String) {
    let before = text.get(..at).unwrap_or(text);
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default();
    let header = |line: &str| {
        line.trim()
            .strip_prefix('[')
            .and_then(|rest| rest.split(']').next())
            .map(|name| name.trim_matches('[').to_owned())
    };
    // The parser reports an error about a whole section at its opening bracket.
    let opens = text.get(at..).is_some_and(|rest| rest.starts_with('['))
        && before
            .rsplit('\n')
            .next()
            .is_some_and(|start| start.trim().is_empty());
    let section = Some(line)
        .filter(|_| opens)
        .and_then(header)
        .or_else(|| before.lines().rev().find_map(header));
    let key = line.split_once('=').map(|(key, _)| key.trim().to_owned());
    (
        number,
        [section, key]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("."),
    )
}
