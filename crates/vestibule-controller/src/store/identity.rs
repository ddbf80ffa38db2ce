//! Users who sign in at an identity provider.
use super::{Store, StoreError, people::user_named, row};
use crate::{oidc::Identity, people::Organisation};
use sqlx::{Any, Transaction};
use vestibule_api::{
    ids::UserId,
    people::{Role, UserView},
    time::Timestamp,
};

/// What people get who come for the first time.
#[derive(Clone, Debug)]
pub(crate) struct Newcomers {
    pub(crate) role: Role,
    pub(crate) organisation: Option<Organisation>,
}

/// Who somebody from an identity provider is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    As(UserId),
    /// There is no such user, and nobody makes one.
    Unknown,
    /// The name is that of a user with a password, or with another identity: whoever comes is not them.
    SomebodyElse,
}

impl Store {
    /// The user behind an identity. The first time it is bound to the user of that name whom an admin made without a
    /// password, or else to a new user, where `newcomers` says what such get.
    pub(crate) async fn identify(
        &self,
        identity: &Identity,
        newcomers: Option<&Newcomers>,
        now: Timestamp,
    ) -> Result<Known, StoreError> {
        let failed = || StoreError::query("find who somebody is");
        let mut tx = self.begin().await?;
        let bound = "SELECT user_id FROM user_identity WHERE issuer = $1 AND subject = $2";
        let bound = sqlx::query(bound)
            .bind(identity.issuer.clone())
            .bind(identity.subject.clone())
            .fetch_optional(&mut *tx)
            .await
            .map_err(failed())?;
        if let Some(row) = bound {
            return Ok(Known::As(row::id(&row, "user_id")?));
        }
        let user = match (
            user_named(&mut *tx, identity.name.as_str()).await?,
            newcomers,
        ) {
            (Some(user), _) if user.password_hash.is_empty() => user.id,
            (Some(_), _) => return Ok(Known::SomebodyElse),
            (None, None) => return Ok(Known::Unknown),
            (None, Some(newcomers)) => {
                let view = UserView {
                    user_id: UserId::generate(),
                    name: identity.name.clone(),
                    role: newcomers.role,
                    organisation: None,
                    created_at: now,
                    last_login_at: None,
                };
                let made = super::people::insert_user(
                    &mut *tx,
                    &view,
                    newcomers.organisation.as_ref(),
                    "",
                );
                if !made.await? {
                    return Ok(Known::SomebodyElse);
                }
                view.user_id
            }
        };
        if !bind(&mut tx, identity, user).await? {
            return Ok(Known::SomebodyElse);
        }
        self.commit(tx, None).await?;
        Ok(Known::As(user))
    }
}

/// Binds an identity to a user who has none; whether they had none.
async fn bind(
    tx: &mut Transaction<'static, Any>,
    identity: &Identity,
    user: UserId,
) -> Result<bool, StoreError> {
    let failed = || StoreError::query("remember who somebody is");
    // Holds the user's row, so that of two who come at once only one is bound.
    sqlx::query("UPDATE app_user SET revision = revision + 1 WHERE id = $1")
        .bind(user.to_string())
        .execute(&mut **tx)
        .await
        .map_err(failed())?;
    let sql = "INSERT INTO user_identity (issuer, subject, user_id) SELECT $1, $2, $3 \
               WHERE NOT EXISTS (SELECT 1 FROM user_identity WHERE user_id = $3) ON CONFLICT DO NOTHING";
    sqlx::query(sql)
        .bind(identity.issuer.clone())
        .bind(identity.subject.clone())
        .bind(user.to_string())
        .execute(&mut **tx)
        .await
        .map(|done| done.rows_affected() == 1)
        .map_err(failed())
}
