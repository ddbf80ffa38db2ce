//! Users, service tokens, organisations, and how many sessions they may have.
use super::*;
use crate::people::Organisation;
use futures_util::future::join_all;
use vestibule_api::{
    ids::{LoginName, OrganisationId, OrganisationName, TokenId, UserId},
    people::{PrincipalKind, Role, TokenView, UserView},
};

const MINUTE: Duration = Duration::from_secs(60);

async fn organisation(store: &Store, name: &str, max_live: Option<u32>) -> Organisation {
    let made = Organisation {
        id: OrganisationId::generate(),
        name: name.parse::<OrganisationName>().unwrap(),
    };
    let now = Timestamp::now();
    assert!(store.add_organisation(&made, max_live, now).await.unwrap());
    made
}

fn user(name: &str, of: Option<&Organisation>) -> UserView {
    UserView {
        user_id: UserId::generate(),
        name: name.parse::<LoginName>().unwrap(),
        role: Role::Signer,
        organisation: of.map(|of| of.name.clone()),
        created_at: Timestamp::now(),
        last_login_at: None,
    }
}

/// Makes a token whose hash is its name.
async fn token(
    store: &Store,
    name: &str,
    of: Option<&Organisation>,
    expires_at: Option<Timestamp>,
) -> TokenId {
    let view = TokenView {
        token_id: TokenId::generate(),
        name: name.parse::<LoginName>().unwrap(),
        role: Role::Operator,
        organisation: of.map(|of| of.name.clone()),
        created_by: "api:local".to_owned(),
        created_at: Timestamp::now(),
        expires_at,
        last_used_at: None,
    };
    let new = NewToken {
        view: &view,
        organisation: of,
        hash: name,
    };
    assert!(store.add_token(&new).await.unwrap());
    assert!(!store.add_token(&new).await.unwrap(), "the name is taken");
    view.token_id
}

fn owned(owner: &str, of: Option<&Organisation>, user_id: &str, quota: Quota) -> NewSession {
    NewSession {
        id: SessionId::generate(),
        provider: "codex".parse().unwrap(),
        flow: "browser".to_owned(),
        user_id: user_id.to_owned(),
        image_alias: "browser".to_owned(),
        login_timeout: Duration::from_secs(30),
        start_at_most: StartKind::Pool,
        owner: Owner {
            id: owner.to_owned(),
            organisation: of.map_or_else(String::new, |of| of.id.to_string()),
        },
        quota,
        confirm_account: true,
    }
}

async fn create(store: &Store, new: &NewSession) -> Created {
    store.create_session(new, Timestamp::now()).await.unwrap()
}

pub(in crate::store::tests) async fn users_are_known_by_name_and_by_dashboard(store: &Store) {
    assert!(!store.has_people().await.unwrap());
    let acme = organisation(store, "acme", None).await;
    let ada = user("ada", Some(&acme));
    assert!(store.add_user(&ada, Some(&acme), "hash").await.unwrap());
    let again = user("ada", None);
    assert!(!store.add_user(&again, None, "other").await.unwrap());
    assert!(store.has_people().await.unwrap());
    let row = store.user("ada").await.unwrap().unwrap();
    assert_eq!(
        (row.id, row.password_hash.as_str()),
        (ada.user_id, "hash"),
        "the first stays"
    );
    assert_eq!(
        (row.principal.kind, row.principal.organisation.clone()),
        (PrincipalKind::User, Some(acme))
    );
    assert!(store.user("eve").await.unwrap().is_none());

    let now = Timestamp::now();
    let later = now.plus(MINUTE);
    for cookie in ["here", "there"] {
        let id = Some(ada.user_id);
        store.add_login(cookie, id, later, now).await.unwrap();
    }
    let who = async |cookie: &str, at| store.principal_of_login(cookie, at).await.unwrap();
    assert_eq!(who("here", now).await, Some(row.principal.clone()));
    assert_eq!(who("here", later).await, None, "it has expired");
    store.note_login(ada.user_id, now).await.unwrap();
    let listed = store.users().await.unwrap();
    assert_eq!(
        (listed.len(), listed[0].last_login_at, &listed[0].name),
        (1, Some(now), &ada.name)
    );

    // A password that its owner changes leaves them the dashboard where they did it.
    let change = store.set_password(ada.user_id, "changed", Some("here"));
    change.await.unwrap();
    assert!(who("here", now).await.is_some() && who("there", now).await.is_none());
    let changed = store.user("ada").await.unwrap().unwrap();
    assert_eq!(changed.password_hash, "changed");
    let reset = store.set_password(ada.user_id, "reset", None);
    reset.await.unwrap();
    assert!(who("here", now).await.is_none());

    store
        .add_login("back", Some(ada.user_id), later, now)
        .await
        .unwrap();
    let remove = || store.remove_user(ada.user_id);
    assert_eq!(remove().await.unwrap(), Removed::Yes);
    assert!(who("back", now).await.is_none());
    assert_eq!(remove().await.unwrap(), Removed::Missing);
    assert!(store.users().await.unwrap().is_empty());
}

pub(in crate::store::tests) async fn a_token_is_somebody_until_it_expires(store: &Store) {
    let acme = organisation(store, "acme", None).await;
    let now = Timestamp::now();
    let expires_at = now.plus(MINUTE);
    let id = token(store, "short", Some(&acme), Some(expires_at)).await;
    let endless = token(store, "endless", None, None).await;
    let who = async |hash: &str, at| store.principal_of_token(hash, at).await.unwrap();
    let micros = |by: i64| Timestamp::from_micros(expires_at.as_micros() + by);

    let principal = who("short", now).await.unwrap();
    assert_eq!(
        (principal.kind, principal.id, principal.organisation),
        (PrincipalKind::Token, id.to_string(), Some(acme))
    );
    assert!(who("short", micros(-1)).await.is_some(), "good before");
    assert_eq!(who("short", expires_at).await, None);
    assert_eq!(who("short", micros(1)).await, None);
    let ever = now.plus(Duration::from_hours(24 * 365 * 100));
    assert!(who("endless", ever).await.is_some());
    assert_eq!(who("nobody", now).await, None);

    let listed = store.tokens().await.unwrap();
    let names: Vec<_> = listed.iter().map(|view| view.name.as_str()).collect();
    assert_eq!(names, ["endless", "short"], "the expired one is shown");
    assert_eq!(listed[1].expires_at, Some(expires_at));
    assert_eq!(listed[1].last_used_at, Some(now), "to the minute");

    assert_eq!(store.remove_token(endless).await.unwrap(), Removed::Yes);
    assert_eq!(who("endless", now).await, None);
    let again = store.remove_token(endless).await;
    assert_eq!(again.unwrap(), Removed::Missing);
}

pub(in crate::store::tests) async fn an_organisation_goes_when_nothing_is_its(store: &Store) {
    let acme = organisation(store, "acme", Some(7)).await;
    let now = Timestamp::now();
    let twin = Organisation {
        id: OrganisationId::generate(),
        name: acme.name.clone(),
    };
    assert!(!store.add_organisation(&twin, None, now).await.unwrap());
    let remove = async || store.remove_organisation(&acme.name).await.unwrap();

    let ada = user("ada", Some(&acme));
    assert!(store.add_user(&ada, Some(&acme), "hash").await.unwrap());
    assert_eq!(remove().await, Removed::InUse, "ada's");
    store.remove_user(ada.user_id).await.unwrap();
    let platform = token(store, "platform", Some(&acme), None).await;
    assert_eq!(remove().await, Removed::InUse, "a token's");
    let new = owned(
        &platform.to_string(),
        Some(&acme),
        "customer",
        Quota::default(),
    );
    assert_eq!(create(store, &new).await, Created::Yes);
    store.remove_token(platform).await.unwrap();
    assert_eq!(remove().await, Removed::InUse, "a session's");
    let listed = store.organisations().await.unwrap();
    assert_eq!(
        (listed[0].live, listed[0].max_live, listed.len()),
        (1, Some(7), 1)
    );

    // The session's credential would be its, whatever becomes of the session.
    apply(store, new.id, Event::Cancelled).await;
    assert_eq!(store.organisations().await.unwrap()[0].live, 0);
    assert_eq!(remove().await, Removed::InUse, "a credential's");
    for credential in store.credential_owners().await.unwrap().into_keys() {
        store.forget_credential(credential).await.unwrap();
    }
    assert_eq!(remove().await, Removed::Yes);
    assert_eq!(remove().await, Removed::Missing);
}

pub(in crate::store::tests) async fn quotas_count_what_is_live(store: &Store) {
    let (acme, tiny) = (
        organisation(store, "acme", None).await,
        organisation(store, "tiny", Some(1)).await,
    );
    let quota = Quota {
        user: Some(2),
        organisation: Some(3),
    };
    let first = token(store, "first", Some(&acme), None).await.to_string();
    let second = token(store, "second", Some(&acme), None).await.to_string();
    let start = async |owner: &str, user_id: &str| {
        let new = owned(owner, Some(&acme), user_id, quota);
        (create(store, &new).await, new.id)
    };
    let (_, one) = start(&first, "a").await;
    assert_eq!(start(&first, "a").await.0, Created::Yes);
    assert_eq!(start(&first, "a").await.0, Created::UserFull(2));
    assert_eq!(start(&second, "a").await.0, Created::Yes, "another's `a`");
    assert_eq!(start(&second, "b").await.0, Created::OrganisationFull(3));
    // What was refused left nothing, and what ended makes room.
    assert_eq!(
        store
            .sessions_in(SessionState::Requested)
            .await
            .unwrap()
            .len(),
        3
    );
    apply(store, one, Event::Cancelled).await;
    assert_eq!(start(&first, "a").await.0, Created::Yes);

    let small = token(store, "small", Some(&tiny), None).await.to_string();
    let of_tiny = |user_id: &str| owned(&small, Some(&tiny), user_id, quota);
    assert_eq!(create(store, &of_tiny("a")).await, Created::Yes);
    assert_eq!(
        create(store, &of_tiny("b")).await,
        Created::OrganisationFull(1),
        "its own number"
    );
    let nobodys = token(store, "nobodys", None, None).await.to_string();
    let (open, local) = (Quota::default(), Owner::local().id);
    for _ in 0..5 {
        let new = owned(&nobodys, None, "a", open);
        assert_eq!(create(store, &new).await, Created::Yes);
        let new = owned(&local, None, "a", quota);
        assert_eq!(create(store, &new).await, Created::Yes, "the local admin's");
    }
}

pub(in crate::store::tests) async fn quotas_hold_when_many_ask_at_once(store: &Store) {
    let quota = Quota {
        user: Some(2),
        organisation: Some(5),
    };
    let made = async |news: Vec<NewSession>| {
        let all = join_all(news.iter().map(|new| create(store, new))).await;
        all.iter().filter(|one| **one == Created::Yes).count()
    };
    for round in 0..4 {
        let acme = organisation(store, &format!("acme{round}"), None).await;
        let mut owners = Vec::new();
        for i in 0..4 {
            let name = format!("t{round}-{i}");
            let id = token(store, &name, Some(&acme), None).await;
            owners.push(id.to_string());
        }
        let ones = (0..8).map(|_| owned(&owners[0], Some(&acme), "a", quota));
        assert_eq!(made(ones.collect()).await, 2, "of one user");
        // Each of another token and user: nothing but the organisation is the same.
        let every = owners.iter().enumerate().flat_map(|(i, owner)| {
            let user_id = move |j: usize| format!("u{i}-{j}");
            let acme = &acme;
            (0..4).map(move |j| owned(owner, Some(acme), &user_id(j), quota))
        });
        assert_eq!(made(every.collect()).await, 3, "of one organisation");
    }
}
