//! A controller on a home of its own, its HTTP client, and the runners it starts.
pub(crate) mod api;
pub(crate) mod home;
pub(crate) mod people;
pub(crate) mod runner;
pub(crate) mod runners;

use std::{future::Future, time::Duration};

/// Nothing here takes longer, also on a machine that is busy with something else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Level-triggered: asks until there is an answer, and says what it waited for when there is none.
pub(crate) async fn wait_for<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let answer = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    answer
        .await
        .unwrap_or_else(|_| panic!("waited in vain for {what}"))
}
