//! The layers of a configuration, file, environment and command line, laid over each other as one table, with where each key comes from.
//!
//! What a key means and may be is `config.rs`'s: a value fits if [`RawConfig`] can be read with it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{DEFAULT_FILE, Error, OPTIONS, RawConfig};

/// The keys of which one says which broker it is: a layer that has one puts those of the layers below out of force.
const BROKER_KEYS: [&str; 3] = ["broker.redis", "broker.data", "broker.ephemeral"];

/// The layers laid over each other, with where each key comes from.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    table: Table,
    /// For the first words of an error: `--listen`, `POINTSMAN_LISTEN`, or `pointsman.toml`.
    origins: BTreeMap<String, String>,
    file: Option<PathBuf>,
}

impl Layers {
    /// Reads the file. `None`: [`DEFAULT_FILE`], where it is there.
    ///
    /// # Errors
    /// It cannot be read, or has a key or value that is none.
    pub fn file(path: Option<&Path>) -> Result<Self, Error> {
        let (path, text) = match path {
            Some(path) => (path, std::fs::read_to_string(path)),
            None => match std::fs::read_to_string(DEFAULT_FILE) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
                text => (Path::new(DEFAULT_FILE), text),
            },
        };
        let text = text.map_err(|e| {
            Error::new(
                path.display(),
                format!(
                    "cannot be read: {e}; name a file that this process may read with --config"
                ),
            )
        })?;
        Self::text(path, &text)
    }

    /// As [`Layers::file`], of a text.
    ///
    /// # Errors
    /// See there.
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

    /// Lays the environment over it. Variables whose second word is no section are left alone: an orchestrator may set
    /// `POINTSMAN_SERVICE_HOST` and the like for reasons of its own. An empty one counts as not set.
    ///
    /// # Errors
    /// A variable names no key, or has no value that the key takes.
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
        self.lay(settings.collect())
    }

    /// Lays options of the command line over it: their long names with their values.
    ///
    /// # Errors
    /// A value is none that the key takes.
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
        self.lay(settings.collect())
    }

    fn lay(mut self, settings: Vec<(String, String, String)>) -> Result<Self, Error> {
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
                    let what = fault
                        .map(|error| error.message().to_owned())
                        .unwrap_or_default();
                    return Err(Error::new(
                        format!("{origin}: {key}"),
                        format!("{what}; every key and its default: pointsman config --defaults"),
                    ));
                }
            }
            self.origins.insert(key, origin);
        }
        Ok(self)
    }

    /// What was written, all layers together.
    pub(super) fn raw(&self) -> Result<RawConfig, Error> {
        self.table
            .clone()
            .try_into()
            .map_err(|e: toml::de::Error| self.fault("configuration", e.message()))
    }

    /// An error at a key, where that key was set.
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

/// The defaults as a table: its keys are the sections.
pub(super) fn sections() -> Table {
    Table::try_from(RawConfig::default()).unwrap_or_default()
}

/// What a text of the environment or the command line may mean, likeliest first; the key's type decides.
fn readings(text: &str) -> Vec<Value> {
    let mut readings = vec![Value::String(text.to_owned())];
    // As in the file: numbers, booleans, lists.
    readings.extend(
        format!("x = {text}")
            .parse::<Table>()
            .ok()
            .and_then(|mut table| table.remove("x")),
    );
    // As everywhere else in an environment.
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

/// The line of a place in a TOML text, and the key that stands there, as far as it can be told.
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
    // What is wrong with a section as a whole is found at the bracket that opens it.
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
