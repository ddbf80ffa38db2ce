//! What lives in memory only, because it is a secret or because it is worthless after a restart: tickets, one-time codes,
//! user codes, viewers, and who waits for what.
use rand::RngCore as _;
use sha2::{Digest as _, Sha256};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, broadcast};
use vestibule_api::{
    ids::{MachineId, SessionId},
    session::{Pane, Right, ViewerView},
    time::Timestamp,
};

/// A ticket opens one WebSocket within this time.
pub(crate) const TICKET_LIFE: Duration = Duration::from_secs(30);
/// A one-time code opens the dashboard within this time.
pub(crate) const CODE_LIFE: Duration = Duration::from_secs(600);
/// More open tickets, or codes, than this are a defect of the caller's: the oldest goes.
const OPEN_LIMIT: usize = 1024;

/// 256 random bits as text for a URL (base64url, RFC 4648 section 5), and the hash under which it is remembered.
pub(crate) fn random_token() -> (String, Hash) {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let mut bytes = [0u8; 32];
    rand::rng().fill_bytes(&mut bytes);
    let token = URL_SAFE_NO_PAD.encode(bytes);
    let hash = Hash::of(&token);
    (token, hash)
}

/// SHA-256 of a token. Looking a token up by its hash takes no time that tells anything about other tokens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Hash([u8; 32]);

impl Hash {
    pub(crate) fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Equality in a time that does not depend on where the two differ.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let differ = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0u8, |differ, (a, b)| differ | (a ^ b));
        std::hint::black_box(differ) == 0
    }

    pub(crate) fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What a ticket is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    pub(crate) session: SessionId,
    pub(crate) right: Right,
    /// How the viewer stands in the list of viewers.
    pub(crate) who: String,
    /// The id of the principal that it was given to.
    pub(crate) by: String,
}

/// What is taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Revoked {
    /// Every view of the session.
    Session(SessionId),
    /// Everything that this principal opened.
    Principal(String),
    /// Everything.
    All,
}

/// Whether something that is open may stay open.
#[derive(Debug)]
pub(crate) struct Revocation {
    session: Option<SessionId>,
    principal: String,
    news: broadcast::Receiver<Revoked>,
    /// Something was revoked between the look at who asks and the beginning of `news`.
    missed: bool,
}

impl Revocation {
    /// Resolves when it may not.
    pub(crate) async fn revoked(&mut self) {
        if self.missed {
            return;
        }
        loop {
            match self.news.recv().await {
                Ok(Revoked::Session(id)) if self.session != Some(id) => {}
                Ok(Revoked::Principal(id)) if self.principal != id => {}
                // Whose news were missed is not known: rather one view too many is opened anew.
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

/// Things that can be used once, until a moment.
#[derive(Debug)]
struct Once<T> {
    open: HashMap<Hash, (T, Timestamp)>,
}

impl<T> Once<T> {
    fn add(&mut self, value: T, life: Duration, now: Timestamp) -> (String, Timestamp) {
        self.open.retain(|_, (_, until)| now < *until);
        if self.open.len() >= OPEN_LIMIT {
            let oldest = self
                .open
                .iter()
                .min_by_key(|(_, (_, until))| *until)
                .map(|(hash, _)| *hash);
            oldest.map(|hash| self.open.remove(&hash));
        }
        let (token, hash) = random_token();
        let until = now.plus(life);
        self.open.insert(hash, (value, until));
        (token, until)
    }

    fn forget(&mut self, which: impl Fn(&T) -> bool) {
        self.open.retain(|_, (value, _)| !which(value));
    }

    fn take(&mut self, token: &str, now: Timestamp) -> Option<T> {
        let (value, until) = self.open.remove(&Hash::of(token))?;
        (now < until).then_some(value)
    }
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self {
            open: HashMap::new(),
        }
    }
}

type Viewers = HashMap<(SessionId, Pane), Vec<(u64, ViewerView)>>;

#[derive(Debug)]
pub(crate) struct Live {
    tickets: Mutex<Once<Ticket>>,
    codes: Mutex<Once<()>>,
    user_codes: Mutex<HashMap<SessionId, String>>,
    viewers: Arc<Mutex<Viewers>>,
    /// Viewers until now.
    viewer_count: AtomicU64,
    revoked: broadcast::Sender<Revoked>,
    revocations: AtomicU64,
    shown: Mutex<HashSet<SessionId>>,
    /// A viewer came, or had its first frame.
    looks: Notify,
    waiting: Mutex<HashMap<SessionId, String>>,
    runner_failures: Mutex<HashMap<MachineId, u32>>,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            tickets: Mutex::default(),
            codes: Mutex::default(),
            user_codes: Mutex::default(),
            viewers: Arc::default(),
            viewer_count: AtomicU64::default(),
            revoked: broadcast::channel(256).0,
            revocations: AtomicU64::new(0),
            shown: Mutex::default(),
            looks: Notify::default(),
            waiting: Mutex::default(),
            runner_failures: Mutex::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section is one insert or remove: a panic can't leave it half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Live {
    /// A new ticket and when it expires.
    pub(crate) fn ticket(&self, ticket: Ticket, now: Timestamp) -> (String, Timestamp) {
        lock(&self.tickets).add(ticket, TICKET_LIFE, now)
    }

    /// Uses a ticket up. None: missing, used, expired, revoked, or for another session.
    pub(crate) fn take_ticket(
        &self,
        token: &str,
        session: SessionId,
        now: Timestamp,
    ) -> Option<(Ticket, Revocation)> {
        // Before the ticket is taken: what is revoked in between is heard.
        let news = self.revoked.subscribe();
        let ticket = lock(&self.tickets).take(token, now)?;
        let revocation = Revocation {
            session: Some(session),
            principal: ticket.by.clone(),
            news,
            missed: false,
        };
        (ticket.session == session).then_some((ticket, revocation))
    }

    /// How often something was revoked. Read before it is looked up who asks.
    pub(crate) fn revocations(&self) -> u64 {
        self.revocations.load(Ordering::SeqCst)
    }

    /// Whether something that `principal` opens without a ticket may stay open; `known`: [`Self::revocations`] before it was
    /// looked up who that is.
    pub(crate) fn revocation(&self, principal: &str, known: u64) -> Revocation {
        let news = self.revoked.subscribe();
        Revocation {
            session: None,
            principal: principal.to_owned(),
            news,
            missed: self.revocations() != known,
        }
    }

    /// Counted before it is said: whoever does not hear it sees that there was something.
    fn revoke(&self, what: Revoked) {
        self.revocations.fetch_add(1, Ordering::SeqCst);
        // Nobody listening is fine.
        drop(self.revoked.send(what));
    }

    /// Makes the session's tickets worth nothing and ends its views.
    pub(crate) fn revoke_session(&self, session: SessionId) {
        lock(&self.tickets).forget(|ticket| ticket.session == session);
        self.revoke(Revoked::Session(session));
    }

    /// Makes the tickets of this principal worth nothing and ends what it opened.
    pub(crate) fn revoke_principal(&self, principal: &str) {
        lock(&self.tickets).forget(|ticket| ticket.by == principal);
        self.revoke(Revoked::Principal(principal.to_owned()));
    }

    /// Makes every ticket worth nothing and ends everything that is open: who may stay is not known.
    pub(crate) fn revoke_all(&self) {
        lock(&self.tickets).forget(|_| true);
        self.revoke(Revoked::All);
    }

    /// A new one-time code for a dashboard, and when it expires.
    pub(crate) fn login_code(&self, now: Timestamp) -> (String, Timestamp) {
        lock(&self.codes).add((), CODE_LIFE, now)
    }

    /// Uses a one-time code up; whether it was one.
    pub(crate) fn take_login_code(&self, code: &str, now: Timestamp) -> bool {
        lock(&self.codes).take(code, now).is_some()
    }

    /// The code that the person compares or types. Never in the database.
    pub(crate) fn user_code(&self, session: SessionId) -> Option<String> {
        lock(&self.user_codes).get(&session).cloned()
    }

    pub(crate) fn set_user_code(&self, session: SessionId, code: String) {
        lock(&self.user_codes).insert(session, code);
    }

    /// What the session was last told that it waits for; `true` when `what` is news.
    pub(crate) fn waits_for(&self, session: SessionId, what: &str) -> bool {
        lock(&self.waiting)
            .insert(session, what.to_owned())
            .as_deref()
            != Some(what)
    }

    /// Forgets an ended session.
    pub(crate) fn forget(&self, session: SessionId) {
        lock(&self.user_codes).remove(&session);
        lock(&self.waiting).remove(&session);
        lock(&self.shown).remove(&session);
    }

    /// Counts how often a runner did not answer though it lives; `None` resets.
    pub(crate) fn unanswered(&self, machine: MachineId, answered: bool) -> u32 {
        let mut failures = lock(&self.runner_failures);
        if answered {
            failures.remove(&machine);
            return 0;
        }
        let count = failures.entry(machine).or_default();
        *count = count.saturating_add(1);
        *count
    }

    /// One more viewer, unless there are `limit`. Counted until the guard is dropped.
    pub(crate) fn viewer(
        &self,
        session: SessionId,
        view: ViewerView,
        limit: u32,
    ) -> Option<Viewer> {
        let key = (session, view.pane);
        let mut viewers = lock(&self.viewers);
        let watching = viewers.entry(key).or_default();
        if watching.len() >= usize::try_from(limit).unwrap_or(usize::MAX) {
            return None;
        }
        let id = self.viewer_count.fetch_add(1, Ordering::Relaxed);
        watching.push((id, view));
        self.looks.notify_waiters();
        Some(Viewer {
            viewers: Arc::clone(&self.viewers),
            key,
            id,
        })
    }

    /// Who watches a session, longest first.
    pub(crate) fn viewers_of(&self, session: SessionId) -> Vec<ViewerView> {
        let viewers = lock(&self.viewers);
        let mut views: Vec<_> = [Pane::Screen, Pane::Terminal]
            .into_iter()
            .filter_map(|pane| viewers.get(&(session, pane)))
            .flatten()
            .cloned()
            .collect();
        views.sort_by_key(|(id, _)| *id);
        views.into_iter().map(|(_, view)| view).collect()
    }

    /// A viewer of the session had its first frame.
    pub(crate) fn shown(&self, session: SessionId) {
        lock(&self.shown).insert(session);
        self.looks.notify_waiters();
    }

    /// Waits until somebody who looks at the session's screen has something to see: for at most `come` until somebody looks
    /// at all, and then for at most `see`.
    pub(crate) async fn first_look(&self, session: SessionId, come: Duration, see: Duration) {
        let looks =
            || lock(&self.viewers).contains_key(&(session, Pane::Screen)) || self.has_seen(session);
        if tokio::time::timeout(come, self.until(looks)).await.is_ok() {
            let sees = self.until(|| self.has_seen(session));
            let _ = tokio::time::timeout(see, sees).await;
        }
    }

    fn has_seen(&self, session: SessionId) -> bool {
        lock(&self.shown).contains(&session)
    }

    async fn until(&self, condition: impl Fn() -> bool) {
        loop {
            // Before the condition is read, so that no news falls between the two.
            let mut news = std::pin::pin!(self.looks.notified());
            news.as_mut().enable();
            if condition() {
                return;
            }
            news.await;
        }
    }

    /// Viewers of all sessions.
    pub(crate) fn viewers(&self) -> u32 {
        let count: usize = lock(&self.viewers).values().map(Vec::len).sum();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Whether somebody looks at a session's screen or terminal.
    pub(crate) fn is_watched(&self, session: SessionId) -> bool {
        let viewers = lock(&self.viewers);
        [Pane::Screen, Pane::Terminal].into_iter().any(|pane| {
            viewers
                .get(&(session, pane))
                .is_some_and(|watching| !watching.is_empty())
        })
    }
}

/// One viewer that is counted.
#[derive(Debug)]
pub(crate) struct Viewer {
    viewers: Arc<Mutex<Viewers>>,
    key: (SessionId, Pane),
    id: u64,
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let mut viewers = lock(&self.viewers);
        if let Some(watching) = viewers.get_mut(&self.key) {
            watching.retain(|(id, _)| *id != self.id);
            if watching.is_empty() {
                viewers.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(session: SessionId, right: Right) -> Ticket {
        Ticket {
            session,
            right,
            who: "ada".to_owned(),
            by: "1".to_owned(),
        }
    }

    fn somebody(pane: Pane) -> ViewerView {
        ViewerView {
            who: "ada".to_owned(),
            right: Right::View,
            pane,
            since: Timestamp::now(),
        }
    }

    #[tokio::test]
    async fn what_is_revoked_is_over() {
        let live = Live::default();
        let (session, other) = (SessionId::generate(), SessionId::generate());
        let now = Timestamp::now();
        let open = |of: SessionId| {
            let (token, _) = live.ticket(ticket(of, Right::Control), now);
            live.take_ticket(&token, of, now).unwrap().1
        };
        let (mut view, mut stays, mut events) = (
            open(session),
            open(other),
            live.revocation("1", live.revocations()),
        );
        let (unused, _) = live.ticket(ticket(session, Right::View), now);
        live.revoke_session(session);
        view.revoked().await;
        assert!(live.take_ticket(&unused, session, now).is_none());
        let still = std::future::poll_fn(|cx| {
            let of = |r: &mut Revocation, cx: &mut std::task::Context<'_>| {
                std::pin::pin!(r.revoked()).poll(cx).is_pending()
            };
            std::task::Poll::Ready(of(&mut stays, cx) && of(&mut events, cx))
        });
        assert!(still.await, "another session, and events, go on");
        live.revoke_principal("2");
        live.revoke_principal("1");
        stays.revoked().await;
        events.revoked().await;
        // One that begins to listen when it was too late.
        let known = live.revocations();
        live.revoke_principal("1");
        live.revocation("1", known).revoked().await;
    }

    #[test]
    fn a_ticket_is_for_one_session_once_for_a_while() {
        let live = Live::default();
        let (session, other) = (SessionId::generate(), SessionId::generate());
        let now = Timestamp::now();
        let ticket = ticket(session, Right::View);
        let right = |token: &str, session, now| {
            live.take_ticket(token, session, now)
                .map(|(ticket, _)| ticket.right)
        };
        let (token, until) = live.ticket(ticket.clone(), now);
        assert_eq!(right(&token, session, now), Some(Right::View));
        assert_eq!(right(&token, session, now), None, "used");
        let (token, _) = live.ticket(ticket.clone(), now);
        assert_eq!(right(&token, session, until), None, "expired");
        let (token, _) = live.ticket(ticket.clone(), now);
        assert_eq!(right(&token, other, now), None, "for another session");
        assert_eq!(right(&token, session, now), None, "a wrong try uses it up");
        assert_eq!(right("", session, now), None);
    }

    #[test]
    fn open_tickets_are_bounded() {
        let live = Live::default();
        let ticket = ticket(SessionId::generate(), Right::Control);
        let now = Timestamp::now();
        let (first, _) = live.ticket(ticket.clone(), now);
        for step in 1..=OPEN_LIMIT {
            live.ticket(ticket.clone(), now.plus(Duration::from_micros(step as u64)));
        }
        assert!(live.take_ticket(&first, ticket.session, now).is_none());
        assert_eq!(lock(&live.tickets).open.len(), OPEN_LIMIT);
    }

    #[tokio::test]
    async fn a_login_waits_for_who_looks_and_for_nobody_else() {
        const SOON: Duration = Duration::from_millis(10);
        const NEVER: Duration = Duration::from_secs(3600);
        let live = Live::default();
        let session = SessionId::generate();

        // Nobody looks: what a frame may take is not waited for.
        live.first_look(session, SOON, NEVER).await;

        // Somebody comes, and sees after a while.
        let viewer = async {
            tokio::task::yield_now().await;
            let viewer = live.viewer(session, somebody(Pane::Screen), 1);
            tokio::time::sleep(SOON).await;
            live.shown(session);
            viewer
        };
        let look = async {
            live.first_look(session, NEVER, NEVER).await;
            assert!(live.has_seen(session), "it was waited for");
        };
        let (_viewer, ()) = tokio::join!(viewer, look);
        // Who has seen something already is not waited for.
        live.first_look(session, NEVER, NEVER).await;

        // Somebody looks and never sees anything.
        let blind = SessionId::generate();
        let _viewer = live.viewer(blind, somebody(Pane::Screen), 1);
        live.first_look(blind, NEVER, SOON).await;
        assert!(!live.has_seen(blind));
        live.forget(session);
        assert!(lock(&live.shown).is_empty());
    }

    #[test]
    fn viewers_are_counted_while_they_watch() {
        let live = Live::default();
        let session = SessionId::generate();
        let first = live.viewer(session, somebody(Pane::Screen), 2);
        let second = live.viewer(session, somebody(Pane::Screen), 2);
        assert!(first.is_some() && second.is_some());
        assert!(live.viewer(session, somebody(Pane::Screen), 2).is_none());
        assert!(live.viewer(session, somebody(Pane::Terminal), 2).is_some());
        drop(first);
        assert!(live.is_watched(session));
        assert!(live.viewer(session, somebody(Pane::Screen), 2).is_some());
        assert_eq!(live.viewers_of(session).len(), 1);
        drop(second);
        assert_eq!(live.viewers(), 0);
        assert!(lock(&live.viewers).is_empty());
    }
}
