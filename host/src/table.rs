//! Reads a structure of a configuration from a table only, by
//! `#[serde(deserialize_with = "crate::table::deserialize")]`.
//!
//! The code that `serde` derives also reads a structure from a list, by the order in which its
//! fields are declared: `listen = ["0.0.0.0:80"]` would set whichever key comes first.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Deserializes the table. Errors within it keep their position.
///
/// # Errors
/// The value is a list or a single value: the reason and the fix. Or an error within the table.
pub(crate) fn deserialize<'de, T, D>(d: D) -> Result<T, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserialize_as("a table", d)
}

/// Like [`deserialize`], for a list of tables.
///
/// # Errors
/// As [`deserialize`].
pub(crate) fn deserialize_list<'de, T, D>(d: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct Element<T>(T);
    impl<'de, T: Deserialize<'de>> Deserialize<'de> for Element<T> {
        fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            deserialize(d).map(Self)
        }
    }
    let elements = Vec::<Element<T>>::deserialize(d)?;
    Ok(elements.into_iter().map(|Element(table)| table).collect())
}

/// Like [`deserialize`]; errors call the table `what`.
pub(crate) fn deserialize_as<'de, T, D>(what: &'static str, d: D) -> Result<T, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct Table<T>(&'static str, PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Table<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
        fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<T, A::Error> {
            Err(A::Error::custom(
                "is a list; write a table, whose keys have names: key = value",
            ))
        }
    }
    d.deserialize_map(Table(what, PhantomData))
}
