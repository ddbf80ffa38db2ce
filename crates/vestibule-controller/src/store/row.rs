//! Columns to types and back.
use super::StoreError;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{Row as _, any::AnyRow};
use std::str::FromStr;
use vestibule_api::time::Timestamp;

fn failed(
    column: &'static str,
) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> StoreError {
    move |err| StoreError::Column { column, err }
}

pub(super) fn text(row: &AnyRow, column: &'static str) -> Result<String, StoreError> {
    row.try_get(column)
        .map_err(|err| failed(column)(err.into()))
}

pub(super) fn maybe_text(row: &AnyRow, column: &'static str) -> Result<Option<String>, StoreError> {
    row.try_get(column)
        .map_err(|err| failed(column)(err.into()))
}

pub(super) fn int(row: &AnyRow, column: &'static str) -> Result<i64, StoreError> {
    row.try_get(column)
        .map_err(|err| failed(column)(err.into()))
}

pub(super) fn count<T: TryFrom<i64>>(row: &AnyRow, column: &'static str) -> Result<T, StoreError>
where
    T::Error: std::error::Error + Send + Sync + 'static,
{
    T::try_from(int(row, column)?).map_err(|err| failed(column)(err.into()))
}

pub(super) fn time(row: &AnyRow, column: &'static str) -> Result<Timestamp, StoreError> {
    int(row, column).map(Timestamp::from_micros)
}

pub(super) fn maybe_time(
    row: &AnyRow,
    column: &'static str,
) -> Result<Option<Timestamp>, StoreError> {
    let micros: Option<i64> = row
        .try_get(column)
        .map_err(|err| failed(column)(err.into()))?;
    Ok(micros.map(Timestamp::from_micros))
}

/// A column whose text is an id.
pub(super) fn id<T: FromStr>(row: &AnyRow, column: &'static str) -> Result<T, StoreError>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text(row, column)?
        .parse()
        .map_err(|err: T::Err| failed(column)(err.into()))
}

pub(super) fn maybe_id<T: FromStr>(
    row: &AnyRow,
    column: &'static str,
) -> Result<Option<T>, StoreError>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    maybe_text(row, column)?
        .map(|text| text.parse())
        .transpose()
        .map_err(|err: T::Err| failed(column)(err.into()))
}

/// A column whose text is one word of a vocabulary.
pub(super) fn word<T>(
    row: &AnyRow,
    column: &'static str,
    parse: fn(&str) -> Option<T>,
) -> Result<T, StoreError> {
    let text = text(row, column)?;
    parse(&text).ok_or_else(|| failed(column)(format!("`{text}` is not one of its values").into()))
}

pub(super) fn json<T: DeserializeOwned>(
    row: &AnyRow,
    column: &'static str,
) -> Result<T, StoreError> {
    serde_json::from_str(&text(row, column)?).map_err(|err| failed(column)(err.into()))
}

pub(super) fn maybe_json<T: DeserializeOwned>(
    row: &AnyRow,
    column: &'static str,
) -> Result<Option<T>, StoreError> {
    maybe_text(row, column)?
        .map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|err| failed(column)(err.into()))
}

/// The text of a JSON column.
pub(super) fn to_json<T: Serialize>(column: &'static str, value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|err| failed(column)(err.into()))
}

/// A counter as the database holds it.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
