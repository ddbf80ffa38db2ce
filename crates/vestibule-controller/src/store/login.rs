//! Dashboards that are signed in. Only the hash of a cookie is here.
use super::{Store, StoreError};
use vestibule_api::time::Timestamp;

impl Store {
    /// Remembers a cookie by its hash; forgets those that have expired.
    pub(crate) async fn add_login(
        &self,
        hash: &str,
        expires_at: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let failed = || StoreError::query("remember a dashboard's sign-in");
        sqlx::query("DELETE FROM dashboard_login WHERE expires_at <= $1")
            .bind(now.as_micros())
            .execute(&self.pool)
            .await
            .map_err(failed())?;
        sqlx::query("INSERT INTO dashboard_login (token_hash, expires_at) VALUES ($1, $2)")
            .bind(hash)
            .bind(expires_at.as_micros())
            .execute(&self.pool)
            .await
            .map(|_| ())
            .map_err(failed())
    }

    /// Whether a cookie with this hash is signed in now.
    pub(crate) async fn is_login(&self, hash: &str, now: Timestamp) -> Result<bool, StoreError> {
        sqlx::query(
            "SELECT token_hash FROM dashboard_login WHERE token_hash = $1 AND expires_at > $2",
        )
        .bind(hash)
        .bind(now.as_micros())
        .fetch_optional(&self.pool)
        .await
        .map(|row| row.is_some())
        .map_err(StoreError::query("look up a dashboard's sign-in"))
    }

    /// Signs a dashboard out.
    pub(crate) async fn remove_login(&self, hash: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM dashboard_login WHERE token_hash = $1")
            .bind(hash)
            .execute(&self.pool)
            .await
            .map(|_| ())
            .map_err(StoreError::query("forget a dashboard's sign-in"))
    }
}
