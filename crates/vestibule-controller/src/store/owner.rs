//! Whose an object is, and how many sessions somebody may have at a time.
use super::{Store, StoreError, row, session::NewSession};
use crate::people::{LOCAL, Owner};
use sqlx::{Any, Transaction, any::AnyRow};
use std::collections::HashMap;
use vestibule_api::ids::{CredentialId, MachineId, SessionId};

/// Which objects a list shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    All,
    /// Of the organisation with this id.
    Organisation(String),
    /// Of whoever has this id.
    Own(String),
}

impl Scope {
    /// Whether an object of this owner's is shown.
    pub(crate) fn has(&self, owner: &Owner) -> bool {
        match self {
            Self::All => true,
            Self::Organisation(id) => owner.organisation == *id,
            Self::Own(id) => owner.id == *id,
        }
    }

    /// Owner and organisation to compare with; empty: whatever there is.
    pub(super) fn columns(&self) -> (String, String) {
        match self {
            Self::All => (String::new(), String::new()),
            Self::Organisation(id) => (String::new(), id.clone()),
            Self::Own(id) => (id.clone(), String::new()),
        }
    }
}

/// What making a session came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    Yes,
    /// The user has so many already.
    UserFull(u32),
    /// The organisation has so many already.
    OrganisationFull(u32),
}

/// Sessions at a time; none: any number.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quota {
    pub(crate) user: Option<u32>,
    /// Where the organisation's own row says nothing.
    pub(crate) organisation: Option<u32>,
}

fn owner(row: &AnyRow) -> Result<Owner, StoreError> {
    Ok(Owner {
        id: row::text(row, "owner_id")?,
        organisation: row::text(row, "organisation_id")?,
    })
}

/// Whether another session fits, and what is in the way. Holds the rows of owner and organisation, so that no other
/// transaction counts the same sessions.
pub(super) async fn room(
    tx: &mut Transaction<'static, Any>,
    new: &NewSession,
) -> Result<Created, StoreError> {
    let failed = || StoreError::query("count somebody's sessions");
    if new.owner.id == LOCAL {
        return Ok(Created::Yes);
    }
    for sql in [
        "UPDATE app_user SET revision = revision + 1 WHERE id = $1",
        "UPDATE service_token SET revision = revision + 1 WHERE id = $1",
    ] {
        sqlx::query(sql)
            .bind(new.owner.id.clone())
            .execute(&mut **tx)
            .await
            .map_err(failed())?;
    }
    if let Some(most) = new.quota.user {
        let row = sqlx::query(
            "SELECT COUNT(*) AS live FROM session WHERE owner_id = $1 AND user_id = $2 AND deadline_at IS NOT NULL",
        )
        .bind(new.owner.id.clone())
        .bind(new.user_id.clone())
        .fetch_one(&mut **tx)
        .await
        .map_err(failed())?;
        let live: u32 = row::count(&row, "live")?;
        if live >= most {
            return Ok(Created::UserFull(live));
        }
    }
    if new.owner.organisation.is_empty() {
        return Ok(Created::Yes);
    }
    // Counted by a statement of its own: in PostgreSQL one that waited for the row counts what was there when it began to wait.
    let row = sqlx::query(
        "UPDATE organisation SET revision = revision + 1 WHERE id = $1 RETURNING COALESCE(max_live, -1) AS max_live",
    )
    .bind(new.owner.organisation.clone())
    .fetch_optional(&mut **tx)
    .await
    .map_err(failed())?;
    let Some(row) = row else {
        return Ok(Created::Yes);
    };
    let count = "SELECT COUNT(*) AS live FROM session WHERE organisation_id = $1 AND deadline_at IS NOT NULL";
    let counted = sqlx::query(count)
        .bind(new.owner.organisation.clone())
        .fetch_one(&mut **tx)
        .await
        .map_err(failed())?;
    let own = u32::try_from(row::int(&row, "max_live")?).ok();
    let live: u32 = row::count(&counted, "live")?;
    match own.or(new.quota.organisation) {
        Some(most) if live >= most => Ok(Created::OrganisationFull(live)),
        Some(_) | None => Ok(Created::Yes),
    }
}

/// Remembers whose credential the session's will be.
pub(super) async fn remember(
    tx: &mut Transaction<'static, Any>,
    credential: CredentialId,
    owner: &Owner,
) -> Result<(), StoreError> {
    if *owner == Owner::local() {
        return Ok(());
    }
    sqlx::query("INSERT INTO credential_owner (credential_id, owner_id, organisation_id) VALUES ($1, $2, $3)")
        .bind(credential.to_string())
        .bind(owner.id.clone())
        .bind(owner.organisation.clone())
        .execute(&mut **tx)
        .await
        .map(|_| ())
        .map_err(StoreError::query("remember a credential's owner"))
}

impl Store {
    /// Whose a session is, also one that retention removed.
    pub(crate) async fn session_owner(&self, id: SessionId) -> Result<Option<Owner>, StoreError> {
        sqlx::query(
            "SELECT owner_id, organisation_id FROM session WHERE id = $1 \
             UNION ALL SELECT owner_id, organisation_id FROM session_gone WHERE id = $1",
        )
        .bind(id.to_string())
        .fetch_optional(self.pool())
        .await
        .map_err(StoreError::query("look up a session's owner"))?
        .map(|row| owner(&row))
        .transpose()
    }

    /// Whose a VM is: its session's owner's; the local admin's where it has none.
    pub(crate) async fn machine_owner(&self, id: MachineId) -> Result<Option<Owner>, StoreError> {
        let Some(machine) = self.machine(id).await? else {
            return Ok(None);
        };
        let of = match machine.session_id {
            Some(session) => self.session_owner(session).await?,
            None => None,
        };
        Ok(Some(of.unwrap_or_else(Owner::local)))
    }

    /// Whose a credential is.
    pub(crate) async fn credential_owner(&self, id: CredentialId) -> Result<Owner, StoreError> {
        let found = sqlx::query(
            "SELECT owner_id, organisation_id FROM credential_owner WHERE credential_id = $1",
        )
        .bind(id.to_string())
        .fetch_optional(self.pool())
        .await
        .map_err(StoreError::query("look up a credential's owner"))?;
        found.map_or_else(|| Ok(Owner::local()), |row| owner(&row))
    }

    /// The owners of all credentials that are not the local admin's.
    pub(crate) async fn credential_owners(
        &self,
    ) -> Result<HashMap<CredentialId, Owner>, StoreError> {
        sqlx::query("SELECT credential_id, owner_id, organisation_id FROM credential_owner")
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list credentials' owners"))?
            .iter()
            .map(|row| Ok((row::id(row, "credential_id")?, owner(row)?)))
            .collect()
    }

    /// Forgets whose a removed credential was, and where.
    pub(crate) async fn forget_credential(&self, id: CredentialId) -> Result<(), StoreError> {
        for sql in [
            "DELETE FROM credential_host WHERE credential_id = $1",
            "DELETE FROM credential_owner WHERE credential_id = $1",
        ] {
            sqlx::query(sql)
                .bind(id.to_string())
                .execute(self.writer())
                .await
                .map_err(StoreError::query("forget a credential"))?;
        }
        Ok(())
    }

    /// Sessions of this owner that have not ended.
    pub(crate) async fn live_sessions_of(&self, owner: &str) -> Result<Vec<SessionId>, StoreError> {
        sqlx::query("SELECT id FROM session WHERE owner_id = $1 AND deadline_at IS NOT NULL")
            .bind(owner.to_owned())
            .fetch_all(self.pool())
            .await
            .map_err(StoreError::query("list somebody's sessions"))?
            .iter()
            .map(|row| row::id(row, "id"))
            .collect()
    }
}
