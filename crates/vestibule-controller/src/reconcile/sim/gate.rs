//! Where an action of a simulation stands still: at each named point ([`crate::crash::point`]) others may go on before it
//! does, or it never does.
use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
};

thread_local! {
    /// Whether an action is polled by [`drive`]. Tasks that it spawned do not stand still.
    static DRIVEN: Cell<bool> = const { Cell::new(false) };
    /// The point that the driven action has come to.
    static AT: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// As long as it lives, what is polled is driven: also where that panics, no longer.
struct Driven;

impl Driven {
    fn begin() -> Self {
        DRIVEN.set(true);
        Self
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        DRIVEN.set(false);
    }
}

/// How far an action came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<T> {
    Done(T),
    /// It goes on from this point when it is driven again.
    At(&'static str),
}

/// Stands still once, where an action of a simulation comes by; returns at once elsewhere.
pub(crate) async fn pass(name: &'static str) {
    let mut stood = false;
    poll_fn(|_| {
        if stood || !DRIVEN.get() {
            return Poll::Ready(());
        }
        stood = true;
        AT.set(Some(name));
        Poll::Pending
    })
    .await;
}

/// Lets an action go on to its next point or its end. Nothing else runs meanwhile but what it waits for, so that the same
/// choices give the same history.
pub(super) async fn drive<F: Future + ?Sized>(action: &mut Pin<Box<F>>) -> Step<F::Output> {
    poll_fn(|cx| {
        AT.set(None);
        let polled = {
            let _driven = Driven::begin();
            action.as_mut().poll(cx)
        };
        match (polled, AT.take()) {
            (Poll::Ready(value), _) => Poll::Ready(Step::Done(value)),
            (Poll::Pending, Some(name)) => Poll::Ready(Step::At(name)),
            (Poll::Pending, None) => Poll::Pending,
        }
    })
    .await
}
