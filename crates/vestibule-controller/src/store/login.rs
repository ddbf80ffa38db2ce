//! Dashboards that are signed in. Only the hash of a cookie is here.
use super::{Store, StoreError};
use vestibule_api::{ids::UserId, time::Timestamp};

impl Store {
    /// Remembers a cookie by its hash, for this user or the local admin; forgets those that have expired.
    pub(crate) async fn add_login(
        &self,
        hash: &str,
        user: Option<UserId>,
        expires_at: Timestamp,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let failed = || StoreError::query("remember a dashboard's sign-in");
        sqlx::query("DELETE FROM dashboard_login WHERE expires_at <= $1")
            .bind(now.as_micros())
            .execute(self.writer())
            .await
            .map_err(failed())?;
        sqlx::query(
            "INSERT INTO dashboard_login (token_hash, expires_at, user_id) VALUES ($1, $2, $3)",
        )
        .bind(hash)
        .bind(expires_at.as_micros())
        .bind(user.map(|id| id.to_string()))
        .execute(self.writer())
        .await
        .map(|_| ())
        .map_err(failed())
    }

    /// Signs a dashboard out.
    pub(crate) async fn remove_login(&self, hash: &str) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM dashboard_login WHERE token_hash = $1")
            .bind(hash)
            .execute(self.writer())
            .await
            .map(|_| ())
            .map_err(StoreError::query("forget a dashboard's sign-in"))
    }
}
