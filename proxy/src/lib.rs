//! Baton's routing proxy: between a client and the two workers of its request. Beside each engine as a sidecar, or alone as
//! a front door.
//!
//! ```text
//! client -> http            limits, deadline, request id
//!        -> pipeline        the order of everything below
//!           -> connector    a client's JSON to calls (pure)
//!           -> choose       by whom, and remote or local prefill, over a snapshot of workers (select, estimate: pure)
//!           -> legs         both calls at once, over upstream
//!        <- http/stream     events back to the client, our own lines taken out (sse, pure)
//! workers/poll, discovery   keep the snapshot fresh, beside all requests
//! kv_events/follow          keeps known what workers' prefix caches hold (followed, prefix)
//! ```
//!
//! It reads no model files, tokenises nothing and never looks into a prompt. HTTP is named in `http*` and `upstream` only.
#![forbid(unsafe_code)]

mod account;
pub mod address;
mod admission;
mod api;
mod api_keys;
pub mod app;
pub mod args;
mod breaker;
mod choose;
pub mod config;
mod connector;
mod debug;
mod decisions;
mod discovery;
pub mod drain;
mod eligible;
mod entropy;
pub mod estimate;
mod failure;
mod followed;
mod forward;
mod http;
mod json;
mod kv_events;
mod ledger;
mod legs;
mod metrics;
mod payload;
mod pipeline;
pub mod policy_file;
mod prefix;
mod proxy;
mod pulse;
mod request_state;
mod select;
mod sse;
mod status;
pub mod tls;
mod trace;
mod upstream;
mod watched;
mod workers;
