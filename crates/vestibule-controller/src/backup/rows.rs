//! The rows of one database in another: a backup holds SQLite's file, whatever the database is. Both have the same tables of
//! text and whole numbers.
use crate::store::StoreError;
use camino::Utf8Path;
use futures_util::TryStreamExt as _;
use sqlx::{
    Any, AnyConnection, AssertSqlSafe, Connection as _, Executor as _, Row as _, any::AnyRow,
};

/// Every table, in an order in which what a row refers to is there before it.
const TABLES: [&str; 13] = [
    "host",
    "organisation",
    "app_user",
    "user_identity",
    "service_token",
    "dashboard_login",
    "session",
    "session_event",
    "machine",
    "effect",
    "session_gone",
    "credential_owner",
    "credential_host",
];

fn query(what: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |err| StoreError::Query { what, err }
}

/// Opens a database and brings its tables up to date.
async fn open(url: &str, what: &str) -> Result<AnyConnection, StoreError> {
    sqlx::any::install_default_drivers();
    let failed = |err: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
        what: what.to_owned(),
        err,
    };
    let mut connection = AnyConnection::connect(url)
        .await
        .map_err(|err| failed(err.into()))?;
    sqlx::migrate!()
        .run(&mut connection)
        .await
        .map_err(|err| failed(err.into()))?;
    Ok(connection)
}

/// A column, and whether it is text.
type Column = (String, bool);

/// Of SQLite's table; the other database's has the same.
async fn columns(sqlite: &mut AnyConnection, table: &str) -> Result<Vec<Column>, StoreError> {
    let failed = query("list a table's columns");
    let rows = sqlx::query("SELECT name, type FROM pragma_table_info($1)")
        .bind(table.to_owned())
        .fetch_all(sqlite)
        .await
        .map_err(&failed)?;
    let column = |row: &AnyRow| {
        let kind: String = row.try_get("type")?;
        Ok((row.try_get("name")?, kind == "TEXT"))
    };
    rows.iter()
        .map(column)
        .collect::<Result<_, _>>()
        .map_err(failed)
}

/// Copies a table's rows.
async fn copy(
    from: &mut AnyConnection,
    to: &mut AnyConnection,
    table: &str,
    columns: &[Column],
) -> Result<(), StoreError> {
    let names: Vec<_> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(", ");
    let places: Vec<_> = (1..=columns.len()).map(|n| format!("${n}")).collect();
    let insert = format!(
        "INSERT INTO {table} ({names}) VALUES ({})",
        places.join(", ")
    );
    // Names of our own tables and columns.
    let select = sqlx::query::<Any>(AssertSqlSafe(format!("SELECT {names} FROM {table}")));
    let read = query("read rows to be copied");
    let mut rows = select.fetch(from);
    while let Some(row) = rows.try_next().await.map_err(&read)? {
        let mut row_of = sqlx::query::<Any>(AssertSqlSafe(insert.clone()));
        for (name, is_text) in columns {
            row_of = if *is_text {
                row_of.bind(
                    row.try_get::<Option<String>, _>(name.as_str())
                        .map_err(&read)?,
                )
            } else {
                row_of.bind(
                    row.try_get::<Option<i64>, _>(name.as_str())
                        .map_err(&read)?,
                )
            };
        }
        row_of
            .execute(&mut *to)
            .await
            .map_err(query("write a copied row"))?;
    }
    Ok(())
}

/// Makes an SQLite file with the rows that a PostgreSQL database has at one moment.
pub(super) async fn save(url: &str, path: &Utf8Path) -> Result<(), StoreError> {
    let mut to = open(&format!("sqlite://{path}?mode=rwc"), path.as_str()).await?;
    let mut from = open(url, "postgres").await?;
    from.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await
        .map_err(query("begin to read the database"))?;
    let mut tx = to.begin().await.map_err(query("begin to write the copy"))?;
    for table in TABLES {
        let columns = columns(&mut tx, table).await?;
        copy(&mut from, &mut tx, table, &columns).await?;
    }
    tx.commit().await.map_err(query("commit the copy"))?;
    to.close().await.map_err(query("close the copy"))?;
    from.close().await.map_err(query("close the database"))
}

/// What is to be put into a PostgreSQL database; nothing of it is there before [`Restored::commit`].
pub(super) struct Restored(AnyConnection);

impl Restored {
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        self.0
            .execute("COMMIT")
            .await
            .map_err(query("commit the restored rows"))?;
        self.0.close().await.map_err(query("close the database"))
    }
}

/// Writes an SQLite file's rows into a PostgreSQL database. None: that is not empty.
pub(super) async fn load(path: &Utf8Path, url: &str) -> Result<Option<Restored>, StoreError> {
    // An older backup's tables are brought up to date first.
    let mut from = open(&format!("sqlite://{path}"), path.as_str()).await?;
    let mut to = open(url, "postgres").await?;
    to.execute("BEGIN")
        .await
        .map_err(query("begin a transaction"))?;
    for table in TABLES {
        let any = sqlx::query::<Any>(AssertSqlSafe(format!("SELECT 1 FROM {table} LIMIT 1")));
        let any = any.fetch_optional(&mut to).await;
        if any
            .map_err(query("look whether the database is empty"))?
            .is_some()
        {
            return Ok(None);
        }
    }
    for table in TABLES {
        let columns = columns(&mut from, table).await?;
        copy(&mut from, &mut to, table, &columns).await?;
    }
    from.close().await.map_err(query("close the copy"))?;
    Ok(Some(Restored(to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_table_is_left_out() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join("x.db");
        let mut connection = open(&format!("sqlite://{path}?mode=rwc"), "x")
            .await
            .unwrap();
        let sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '\\_%' ESCAPE '\\' \
                   AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name";
        let rows = sqlx::query(sql).fetch_all(&mut connection).await.unwrap();
        let names: Vec<String> = rows.iter().map(|row| row.try_get(0).unwrap()).collect();
        let mut known = TABLES.map(str::to_owned);
        known.sort();
        assert_eq!(names, known);
    }
}
