//! Baton's operator: one `DisaggregatedModel` to running prefill and decode roles.
//!
//! The pure half reads down the page: a manifest's text to an object ([`manifest`]), an object to types that cannot be wrong
//! ([`validate`]), those to what is to be done next ([`plan`]) and to objects ([`desired`]), and what came of it to a status
//! ([`status`]). `baton up` and `baton plan` share it. Reading and writing a cluster is the other half's.
#![forbid(unsafe_code)]

pub mod app;
pub mod apply;
pub mod args;
pub mod child;
pub mod client;
pub mod cluster;
pub mod config;
pub mod controller;
pub mod credentials;
pub mod desired;
pub mod differs;
pub mod error;
pub mod events;
pub mod failure;
pub mod fence;
pub mod http;
pub mod lease;
mod location;
pub mod manifest;
pub mod memory;
pub mod metrics;
pub mod mint;
pub mod observe;
pub mod observed;
pub mod plan;
pub mod progress;
pub mod queue;
pub mod rbac;
pub mod revision;
pub mod site;
pub mod status;
mod structural;
pub mod triggers;
pub mod validate;
pub mod validated;
pub mod violation;
pub mod watched;

pub use revision::revision;
pub use validate::validate;
pub use validated::{Disaggregation, ModelSource, Replicas, RoleSettings, Validated};
pub use violation::Violation;
