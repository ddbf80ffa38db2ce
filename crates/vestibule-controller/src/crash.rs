//! Named points between two things of which a crash may see one without the other.

/// Dies here where a test says so ([`vestibule_api::crash`]). In a simulation: others may act here, and the controller
/// may be killed.
pub(crate) async fn point(name: &'static str) {
    vestibule_api::crash::point(name);
    #[cfg(test)]
    crate::reconcile::sim::gate::pass(name).await;
}
