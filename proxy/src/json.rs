//! JSON that passes through the proxy: scanned once and edited in place, never parsed into a tree and written again.
//!
//! A body that was parsed and written again has other bytes than the client sent: keys move, numbers are spelled anew,
//! unknown fields may be lost. So a change here is a splice, and every byte that no change names stays as it came.

mod grammar;
pub(crate) mod scan;
pub(crate) mod splice;
pub(crate) mod usage;
pub(crate) mod usage_stream;
