//! Baton's operator: one `DisaggregatedModel` to running prefill and decode roles.
//!
//! So far the pure half that `baton up` shares: a manifest's text to an object ([`manifest`]), and an object to types that
//! cannot be wrong ([`validate`]). Nothing here opens a file or a connection.
#![forbid(unsafe_code)]

mod location;
pub mod manifest;
pub mod revision;
mod structural;
pub mod validate;
pub mod validated;
pub mod violation;

pub use revision::revision;
pub use validate::validate;
pub use validated::{Disaggregation, ModelSource, RoleSettings, Validated};
pub use violation::Violation;
