//! What the database itself says is not over: read from its file, past the controller.
use anyhow::{Context, Result};
use camino::Utf8Path;
use sqlx::{ConnectOptions as _, SqliteConnection, sqlite::SqliteConnectOptions};

/// What is open in each table, in words.
const UNFINISHED: [(&str, &str); 4] = [
    (
        "an effect is open",
        "SELECT kind || ' of ' || session_id FROM effect WHERE done_at IS NULL",
    ),
    (
        "a machine is not gone",
        "SELECT id || ' ' || state FROM machine WHERE gone_at IS NULL",
    ),
    (
        "a session has not ended",
        "SELECT id || ' ' || state FROM session \
         WHERE state NOT IN ('completed', 'failed', 'cancelled', 'expired')",
    ),
    (
        "a deadline runs",
        "SELECT id || ' ' || state FROM session WHERE deadline_at IS NOT NULL",
    ),
];

async fn open(home: &Utf8Path) -> Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(home.join("vestibule.db"))
        .read_only(true);
    options.connect().await.context("open the database's file")
}

/// Every row of which something is still to come.
pub(super) async fn unfinished(home: &Utf8Path) -> Result<Vec<String>> {
    let mut database = open(home).await?;
    let mut found = Vec::new();
    for (what, query) in UNFINISHED {
        let rows: Vec<String> = sqlx::query_scalar(query).fetch_all(&mut database).await?;
        found.extend(rows.iter().map(|row| format!("{what}: {row}")));
    }
    Ok(found)
}

/// How many sessions there have been.
pub(super) async fn sessions(home: &Utf8Path) -> Result<i64> {
    let mut database = open(home).await?;
    let count = sqlx::query_scalar("SELECT COUNT(*) FROM session");
    Ok(count.fetch_one(&mut database).await?)
}
