//! The controller over real HTTP.
mod openapi;
