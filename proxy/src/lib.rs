//! Baton's routing proxy: between a client and the two workers of its request. Beside each engine as a sidecar, or alone as
//! a front door.
//!
//! ```text
//! client -> http            limits, deadline, request id
//!        -> pipeline        the order of everything below
//!           -> connector    a client's JSON to calls (pure)
//!           -> plan, pick   remote or local prefill, and by whom (pure), over a snapshot of workers
//!           -> legs         both calls at once, over upstream
//!        <- http/stream     events back to the client, our own lines taken out (sse, pure)
//! workers/poll, discovery   keep the snapshot fresh, beside all requests
//! ```
//!
//! It reads no model files, tokenises nothing and never looks into a prompt. HTTP is named in `http*` and `upstream` only.
#![forbid(unsafe_code)]

mod account;
pub mod address;
pub mod app;
pub mod args;
pub mod config;
mod connector;
mod debug;
mod decisions;
mod discovery;
pub mod drain;
mod eligible;
mod entropy;
mod failure;
mod http;
mod legs;
mod metrics;
mod pick;
mod pipeline;
pub mod plan;
pub mod policy_file;
mod proxy;
mod sse;
mod status;
mod upstream;
mod watched;
mod workers;
