//! The controller over real HTTP, with runners that are real HTTP servers on Unix sockets.
mod auth;
mod failures;
mod lifecycle;
mod openapi;
mod requests;
mod restart;
mod support;
mod views;
