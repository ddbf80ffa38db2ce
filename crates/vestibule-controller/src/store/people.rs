//! Users, service tokens and organisations.
use super::{Store, StoreError, row};
use crate::people::{Organisation, Principal};
use sqlx::{Any, Executor, any::AnyRow};
use std::time::Duration;
use vestibule_api::{
    ids::{OrganisationName, TokenId, UserId},
    people::{OrganisationView, PrincipalKind, Role, TokenView, UserView},
    time::Timestamp,
};

/// A token's last use is written down at most so often.
const USE_NOTED_EVERY: Duration = Duration::from_secs(60);

/// What removing something came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removed {
    Yes,
    /// There is none.
    Missing,
    /// Something still belongs to it.
    InUse,
}

/// A user's row with what their password is checked against.
#[derive(Clone, Debug)]
pub(crate) struct UserRow {
    pub(crate) id: UserId,
    /// Empty: there is no password.
    pub(crate) password_hash: String,
    pub(crate) principal: Principal,
}

/// A service token to be made.
#[derive(Debug)]
pub(crate) struct NewToken<'a> {
    pub(crate) view: &'a TokenView,
    pub(crate) organisation: Option<&'a Organisation>,
    pub(crate) hash: &'a str,
}

fn organisation(row: &AnyRow) -> Result<Option<Organisation>, StoreError> {
    let id = row::maybe_id(row, "organisation_id")?;
    let name = row::maybe_id(row, "organisation")?;
    Ok(id.zip(name).map(|(id, name)| Organisation { id, name }))
}

fn principal(row: &AnyRow, kind: PrincipalKind) -> Result<Principal, StoreError> {
    Ok(Principal {
        kind,
        id: row::text(row, "id")?,
        name: row::text(row, "name")?,
        role: row::word(row, "role", Role::from_id)?,
        organisation: organisation(row)?,
    })
}

fn user(row: &AnyRow) -> Result<UserView, StoreError> {
    Ok(UserView {
        user_id: row::id(row, "id")?,
        name: row::id(row, "name")?,
        role: row::word(row, "role", Role::from_id)?,
        organisation: row::maybe_id(row, "organisation")?,
        created_at: row::time(row, "created_at")?,
        last_login_at: row::maybe_time(row, "last_login_at")?,
    })
}

fn token(row: &AnyRow) -> Result<TokenView, StoreError> {
    Ok(TokenView {
        token_id: row::id(row, "id")?,
        name: row::id(row, "name")?,
        role: row::word(row, "role", Role::from_id)?,
        organisation: row::maybe_id(row, "organisation")?,
        created_by: row::text(row, "created_by")?,
        created_at: row::time(row, "created_at")?,
        expires_at: row::maybe_time(row, "expires_at")?,
        last_used_at: row::maybe_time(row, "last_used_at")?,
    })
}

/// Makes a user; whether the name was free. An empty hash: no password.
pub(super) async fn insert_user(
    on: impl Executor<'_, Database = Any>,
    view: &UserView,
    organisation: Option<&Organisation>,
    password_hash: &str,
) -> Result<bool, StoreError> {
    sqlx::query(
        "INSERT INTO app_user (id, name, role, organisation_id, password_hash, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
    )
    .bind(view.user_id.to_string())
    .bind(view.name.as_str().to_owned())
    .bind(view.role.id())
    .bind(organisation.map(|of| of.id.to_string()))
    .bind(password_hash.to_owned())
    .bind(view.created_at.as_micros())
    .execute(on)
    .await
    .map(|done| done.rows_affected() == 1)
    .map_err(StoreError::query("make a user"))
}

/// The user of this name.
pub(super) async fn user_named(
    on: impl Executor<'_, Database = Any>,
    name: &str,
) -> Result<Option<UserRow>, StoreError> {
    let sql = "SELECT p.id, p.name, p.role, p.organisation_id, p.password_hash, o.name AS organisation \
         FROM app_user p LEFT JOIN organisation o ON o.id = p.organisation_id WHERE p.name = $1";
    sqlx::query(sql)
        .bind(name.to_owned())
        .fetch_optional(on)
        .await
        .map_err(StoreError::query("find a user"))?
        .map(|row| {
            Ok(UserRow {
                id: row::id(&row, "id")?,
                password_hash: row::text(&row, "password_hash")?,
                principal: principal(&row, PrincipalKind::User)?,
            })
        })
        .transpose()
}

impl Store {
    /// Whether there is anybody besides the local admin.
    pub(crate) async fn has_people(&self) -> Result<bool, StoreError> {
        sqlx::query("SELECT id FROM app_user UNION ALL SELECT id FROM service_token LIMIT 1")
            .fetch_optional(self.pool())
            .await
            .map(|row| row.is_some())
            .map_err(StoreError::query("look for users"))
    }

    /// Makes a user; whether the name was free.
    pub(crate) async fn add_user(
        &self,
        view: &UserView,
        organisation: Option<&Organisation>,
        password_hash: &str,
    ) -> Result<bool, StoreError> {
        insert_user(self.writer(), view, organisation, password_hash).await
    }

    /// Users by name.
    pub(crate) async fn users(&self) -> Result<Vec<UserView>, StoreError> {
        let sql = "SELECT p.id, p.name, p.role, p.created_at, p.last_login_at, o.name AS organisation \
             FROM app_user p LEFT JOIN organisation o ON o.id = p.organisation_id ORDER BY p.name";
        sqlx::query(sql)
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list users"))?
            .iter()
            .map(user)
            .collect()
    }

    /// The user of this name.
    pub(crate) async fn user(&self, name: &str) -> Result<Option<UserRow>, StoreError> {
        user_named(self.pool(), name).await
    }

    /// Removes a user and signs their dashboards out.
    pub(crate) async fn remove_user(&self, id: UserId) -> Result<Removed, StoreError> {
        let failed = || StoreError::query("remove a user");
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM dashboard_login WHERE user_id = $1")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        let gone = sqlx::query("DELETE FROM app_user WHERE id = $1")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(failed())?
            .rows_affected();
        self.tell(&mut tx, &format!("revoked {id}")).await?;
        self.commit(tx, None).await?;
        Ok(if gone == 0 {
            Removed::Missing
        } else {
            Removed::Yes
        })
    }

    /// Gives a user another password and signs their dashboards out, but for the one whose cookie has the hash `but`.
    pub(crate) async fn set_password(
        &self,
        id: UserId,
        password_hash: &str,
        but: Option<&str>,
    ) -> Result<(), StoreError> {
        let failed = || StoreError::query("change a password");
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE app_user SET password_hash = $2 WHERE id = $1")
            .bind(id.to_string())
            .bind(password_hash.to_owned())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query("DELETE FROM dashboard_login WHERE user_id = $1 AND token_hash <> $2")
            .bind(id.to_string())
            .bind(but.unwrap_or_default().to_owned())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        if but.is_none() {
            self.tell(&mut tx, &format!("revoked {id}")).await?;
        }
        self.commit(tx, None).await
    }

    /// Notes that a user signed in.
    pub(crate) async fn note_login(&self, id: UserId, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query("UPDATE app_user SET last_login_at = $2 WHERE id = $1")
            .bind(id.to_string())
            .bind(now.as_micros())
            .execute(self.writer())
            .await
            .map(|_| ())
            .map_err(StoreError::query("note a sign-in"))
    }

    /// Who has the dashboard whose cookie has this hash, if it is signed in now.
    pub(crate) async fn principal_of_login(
        &self,
        hash: &str,
        now: Timestamp,
    ) -> Result<Option<Principal>, StoreError> {
        let found = sqlx::query(
            "SELECT l.user_id, p.id, p.name, p.role, p.organisation_id, o.name AS organisation FROM dashboard_login l \
             LEFT JOIN app_user p ON p.id = l.user_id LEFT JOIN organisation o ON o.id = p.organisation_id \
             WHERE l.token_hash = $1 AND l.expires_at > $2",
        )
        .bind(hash.to_owned())
        .bind(now.as_micros())
        .fetch_optional(self.pool())
        .await
        .map_err(StoreError::query("look up a dashboard's sign-in"))?;
        let Some(row) = found else { return Ok(None) };
        Ok(Some(match row::maybe_text(&row, "user_id")? {
            None => Principal::local(),
            Some(_) => principal(&row, PrincipalKind::User)?,
        }))
    }

    /// Makes a service token; whether its name was free.
    pub(crate) async fn add_token(&self, new: &NewToken<'_>) -> Result<bool, StoreError> {
        let view = new.view;
        sqlx::query(
            "INSERT INTO service_token (id, name, role, organisation_id, token_hash, created_by, created_at, expires_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
        )
        .bind(view.token_id.to_string())
        .bind(view.name.as_str())
        .bind(view.role.id())
        .bind(new.organisation.map(|of| of.id.to_string()))
        .bind(new.hash)
        .bind(view.created_by.as_str())
        .bind(view.created_at.as_micros())
        .bind(view.expires_at.map(Timestamp::as_micros))
        .execute(self.writer())
        .await
        .map(|done| done.rows_affected() == 1)
        .map_err(StoreError::query("make a service token"))
    }

    /// Service tokens by name, also those that have expired.
    pub(crate) async fn tokens(&self) -> Result<Vec<TokenView>, StoreError> {
        let sql = "SELECT p.id, p.name, p.role, p.created_by, p.created_at, p.expires_at, p.last_used_at, \
             o.name AS organisation FROM service_token p LEFT JOIN organisation o ON o.id = p.organisation_id ORDER BY p.name";
        sqlx::query(sql)
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list service tokens"))?
            .iter()
            .map(token)
            .collect()
    }

    /// Who has the token with this hash, if it is good now. Notes the use.
    pub(crate) async fn principal_of_token(
        &self,
        hash: &str,
        now: Timestamp,
    ) -> Result<Option<Principal>, StoreError> {
        let sql = "SELECT p.id, p.name, p.role, p.organisation_id, p.last_used_at, o.name AS organisation \
             FROM service_token p LEFT JOIN organisation o ON o.id = p.organisation_id \
             WHERE p.token_hash = $1 AND (p.expires_at IS NULL OR p.expires_at > $2)";
        let found = sqlx::query(sql)
            .bind(hash.to_owned())
            .bind(now.as_micros())
            .fetch_optional(self.pool())
            .await
            .map_err(StoreError::query("look up a service token"))?;
        let Some(row) = found else { return Ok(None) };
        let used = row::maybe_time(&row, "last_used_at")?;
        if used.is_none_or(|used| used.plus(USE_NOTED_EVERY) <= now) {
            sqlx::query("UPDATE service_token SET last_used_at = $2 WHERE token_hash = $1")
                .bind(hash.to_owned())
                .bind(now.as_micros())
                .execute(self.writer())
                .await
                .map_err(StoreError::query("note a token's use"))?;
        }
        principal(&row, PrincipalKind::Token).map(Some)
    }

    /// Removes a service token: it is worth nothing from now on.
    pub(crate) async fn remove_token(&self, id: TokenId) -> Result<Removed, StoreError> {
        let mut tx = self.begin().await?;
        let gone = sqlx::query("DELETE FROM service_token WHERE id = $1")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("revoke a service token"))?
            .rows_affected();
        self.tell(&mut tx, &format!("revoked {id}")).await?;
        self.commit(tx, None).await?;
        Ok(if gone == 0 {
            Removed::Missing
        } else {
            Removed::Yes
        })
    }

    /// Makes an organisation; whether its name was free.
    pub(crate) async fn add_organisation(
        &self,
        organisation: &Organisation,
        max_live: Option<u32>,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        sqlx::query(
            "INSERT INTO organisation (id, name, max_live, created_at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        )
        .bind(organisation.id.to_string())
        .bind(organisation.name.as_str())
        .bind(max_live.map(i64::from))
        .bind(now.as_micros())
        .execute(self.writer())
        .await
        .map(|done| done.rows_affected() == 1)
        .map_err(StoreError::query("make an organisation"))
    }

    /// Organisations by name, each with its live sessions.
    pub(crate) async fn organisations(&self) -> Result<Vec<OrganisationView>, StoreError> {
        sqlx::query(
            "SELECT o.name, COALESCE(o.max_live, -1) AS max_live, o.created_at, (SELECT COUNT(*) FROM session s \
             WHERE s.organisation_id = o.id AND s.deadline_at IS NOT NULL) AS live FROM organisation o ORDER BY o.name",
        )
        .fetch_all(self.pool())
        .await
        .map_err(StoreError::query("list organisations"))?
        .iter()
        .map(|row| {
            Ok(OrganisationView {
                name: row::id(row, "name")?,
                max_live: u32::try_from(row::int(row, "max_live")?).ok(),
                created_at: row::time(row, "created_at")?,
                live: row::count(row, "live")?,
            })
        })
        .collect()
    }

    /// The organisation of this name.
    pub(crate) async fn organisation(
        &self,
        name: &OrganisationName,
    ) -> Result<Option<Organisation>, StoreError> {
        sqlx::query("SELECT id, name FROM organisation WHERE name = $1")
            .bind(name.as_str().to_owned())
            .fetch_optional(self.pool())
            .await
            .map_err(StoreError::query("find an organisation"))?
            .map(|row| {
                Ok(Organisation {
                    id: row::id(&row, "id")?,
                    name: row::id(&row, "name")?,
                })
            })
            .transpose()
    }

    /// Removes an organisation that has no user, no token, no session under way and no credential.
    pub(crate) async fn remove_organisation(
        &self,
        name: &OrganisationName,
    ) -> Result<Removed, StoreError> {
        let Some(found) = self.organisation(name).await? else {
            return Ok(Removed::Missing);
        };
        sqlx::query(
            "DELETE FROM organisation WHERE id = $1 \
             AND NOT EXISTS (SELECT 1 FROM app_user WHERE organisation_id = $1) \
             AND NOT EXISTS (SELECT 1 FROM service_token WHERE organisation_id = $1) \
             AND NOT EXISTS (SELECT 1 FROM session WHERE organisation_id = $1 AND deadline_at IS NOT NULL) \
             AND NOT EXISTS (SELECT 1 FROM credential_owner WHERE organisation_id = $1)",
        )
        .bind(found.id.to_string())
        .execute(self.writer())
        .await
        .map(|done| match done.rows_affected() {
            0 => Removed::InUse,
            _ => Removed::Yes,
        })
        .map_err(StoreError::query("remove an organisation"))
    }
}
