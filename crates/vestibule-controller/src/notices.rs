//! What controllers on one PostgreSQL database tell each other at once (LISTEN and NOTIFY): that a session has changed, and
//! that somebody may do nothing any more. The first is a hint, since everybody also looks from time to time. The second must
//! not be missed: a controller that could not listen for a while ends every view and event stream, which open anew.
use crate::core::{Shared, stopped};
use sqlx::postgres::PgListener;
use std::time::Duration;
use vestibule_api::error::Chain;

/// The channel.
pub(crate) const CHANNEL: &str = "vestibule";
/// After a connection that broke.
const AGAIN: Duration = Duration::from_secs(1);

/// Listens until the controller stops.
pub(crate) async fn listen(core: Shared) {
    if !core.store.is_shared() {
        return;
    }
    let mut stop = std::pin::pin!(stopped(core.stopping.clone()));
    loop {
        tokio::select! {
            heard = hear(&core) => {
                let error = heard.err().map(|err| Chain(&err).to_string());
                tracing::warn!(error, "notices of other controllers are not heard: views and streams open anew");
                core.live.revoke_all();
            }
            () = &mut stop => return,
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Returns when the connection broke.
async fn hear(core: &Shared) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect(&core.config.database).await?;
    listener.listen(CHANNEL).await?;
    // Whatever was said before.
    core.store.signals.wake();
    while let Some(notice) = listener.try_recv().await? {
        let mut words = notice.payload().split(' ');
        let by = words.next().and_then(|host| host.parse().ok());
        if by == Some(core.store.host()) {
            continue;
        }
        match (words.next(), words.next()) {
            (Some("session"), Some(id)) => {
                if let Ok(id) = id.parse() {
                    core.store.signals.changed(id);
                }
                core.store.signals.wake();
            }
            (Some("revoked"), Some(principal)) => core.live.revoke_principal(principal),
            // Of a newer controller.
            _ => core.store.signals.wake(),
        }
    }
    Ok(())
}
