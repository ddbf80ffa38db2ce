//! Fetches the credential, sealed to a key made for this one call, and seals it in the vault. Vault first, then the row.
use super::{EffectError, launch::machine_of, lost, report::cut};
use crate::{
    core::{Shared, off_runtime},
    crash::point,
    state::Event,
    store::{Applied, Facts, MachineRow, SessionRow},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hyper::Method;
use std::sync::Arc;
use vestibule_api::{
    agent::{CapturedCredential, CredentialReply, CredentialRequest},
    cause::Cause,
    finding::{Finding, Quote},
    secret::{Opener, Secret},
    session::SessionState,
};
use vestibule_vault::{Access, ContentFile, NewCredential, PutError, RemoveError};

/// Carries [`crate::state::Effect::Collect`] out.
pub(crate) async fn collect(core: &Shared, session: &SessionRow) -> Result<(), EffectError> {
    if session.state != SessionState::Capturing {
        return Ok(());
    }
    point("collect:begin").await;
    let facts = match sealed_before(core, session).await? {
        true => Facts::default(),
        false => match fetch_and_seal(core, session).await? {
            Ok(account) => Facts {
                account,
                ..Facts::default()
            },
            Err(finding) => return failed(core, session, *finding).await,
        },
    };
    point("collect:sealed").await;
    let sealed = core
        .store
        .apply(session.id, Event::CredentialSealed, &facts, core.now())
        .await?;
    match sealed {
        Applied::Moved(_) => {
            core.metrics.sealed.inc();
        }
        Applied::Ignored(illegal) if illegal.state == SessionState::Completed => {}
        // It ended meanwhile; whoever was to discard the credential may have looked before it was there.
        Applied::Ignored(_) | Applied::Missing => discard(core, session).await?,
    }
    Ok(())
}

async fn failed(core: &Shared, session: &SessionRow, finding: Finding) -> Result<(), EffectError> {
    let facts = Facts::from(finding);
    core.store
        .apply_there(session, Event::CollectFailed, &facts, core.now())
        .await?;
    Ok(())
}

/// Carries [`crate::state::Effect::Discard`] out: the session ended while its credential was on the way.
pub(crate) async fn discard(core: &Shared, session: &SessionRow) -> Result<(), EffectError> {
    let (vault, id) = (Arc::clone(&core.vault), session.credential_id);
    let access = access(session, "the session ended before it completed");
    point("discard:begin").await;
    match off_runtime(move || vault.remove(id, &access)).await? {
        Ok(()) | Err(RemoveError::NotFound(_)) => {}
        Err(err) => return Err(err.into()),
    }
    point("discard:removed").await;
    Ok(())
}

fn access(session: &SessionRow, purpose: &str) -> Access {
    Access {
        actor: format!("session:{}", session.id),
        purpose: purpose.to_owned(),
    }
}

/// Whether an earlier try got as far as the vault.
async fn sealed_before(core: &Shared, session: &SessionRow) -> Result<bool, EffectError> {
    let (vault, id, own) = (Arc::clone(&core.vault), session.credential_id, session.id);
    Ok(off_runtime(move || vault.show(id).is_ok_and(|meta| meta.session_id == own)).await?)
}

type Fetched = Result<Option<String>, Box<Finding>>;

/// The outer error may pass; the inner one means that the credential can't be had.
async fn fetch_and_seal(core: &Shared, session: &SessionRow) -> Result<Fetched, EffectError> {
    let Some(machine) = machine_of(core, session).await? else {
        return Ok(Err(Box::new(lost(quote("the session has no VM")))));
    };
    let captured = match fetch(core, &machine).await {
        Ok(Ok(captured)) => captured,
        Ok(Err(finding)) => return Ok(Err(finding)),
        Err(_) if !core.runner_alive(machine.id).await => {
            return Ok(Err(Box::new(lost(quote(
                "the VM ended before its credential was fetched",
            )))));
        }
        Err(err) => return Err(err),
    };
    point("collect:fetched").await;
    let account = captured.account.as_deref().map(cut);
    if session.confirm_account && account != session.account {
        return Ok(Err(Box::new(invalid(
            "the account is another one than its owner confirmed",
        ))));
    }
    let new = match unpack(session, &captured, account.clone()) {
        Ok(new) => new,
        Err(why) => return Ok(Err(Box::new(invalid(&why)))),
    };
    let (vault, access) = (Arc::clone(&core.vault), access(session, "captured"));
    match off_runtime(move || vault.put(&new, &access)).await? {
        Ok(_) => Ok(Ok(account)),
        // What the tool wrote is not something that the vault can hold; trying again changes nothing.
        Err(err @ PutError::Record { .. }) => Ok(Err(Box::new(invalid(
            &vestibule_api::error::Chain(&err).to_string(),
        )))),
        Err(err) => Err(err.into()),
    }
}

async fn fetch(
    core: &Shared,
    machine: &MachineRow,
) -> Result<Result<CapturedCredential, Box<Finding>>, EffectError> {
    let opener = Opener::generate();
    let request = CredentialRequest {
        seal_to: opener.key(),
    };
    let reply: CredentialReply = core
        .runner(machine.id)
        .call(Method::POST, "/agent/login/credential", Some(&request))
        .await?;
    let plain: Secret<Vec<u8>> = match opener.open(&reply.sealed) {
        Ok(plain) => plain,
        Err(err) => return Ok(Err(Box::new(invalid(&err.to_string())))),
    };
    // The error of a parser may quote what it read: it is not passed on.
    Ok(serde_json::from_slice(plain.expose())
        .map_err(|_| Box::new(invalid("what the agent sealed is not a list of files"))))
}

fn unpack(
    session: &SessionRow,
    captured: &CapturedCredential,
    account: Option<String>,
) -> Result<NewCredential, String> {
    let mut files = Vec::with_capacity(captured.files.len());
    for file in &captured.files {
        let bytes = BASE64
            .decode(&file.content)
            .map_err(|_| format!("the content of `{}` is not base64", cut(&file.rule)))?;
        files.push(ContentFile {
            path: file.path.clone(),
            mode: file.mode,
            bytes: Secret::new(bytes),
        });
    }
    Ok(NewCredential {
        credential_id: session.credential_id,
        provider: session.provider.clone(),
        user_id: session.user_id.clone(),
        session_id: session.id,
        account,
        expires_at: captured.expires_at,
        files,
    })
}

fn quote(text: &str) -> Quote {
    Quote {
        source: "report".to_owned(),
        line: None,
        text: text.to_owned(),
    }
}

fn invalid(why: &str) -> Finding {
    Finding::new(
        Cause::CredentialInvalid,
        quote(why),
        "what the agent handed over can't be sealed as a credential",
        "compare the provider pack's `credential` rules with what the tool writes",
    )
}
