//! Baton's worker: HTTP and KV transfer around one engine. One program for all roles: prefill, decode, or both.
//!
//! ```text
//!  proxy ──> http ──> openai (check) ──> render ──> generate ──> engine_thread ──> engine
//!              <── answer <── pieces of text <────────┘  ^               │ layers, as they complete
//!                                                        └── transfer <──┘
//! ```
//!
//! `args` -> `config` -> `worker` is how a process starts, serves and drains; `http` is the only module that names HTTP, and maps every
//! error to its status. Besides serving, the program downloads models (`fetch`) and answers a pod's probes (`probe`).

pub mod args;
pub mod config;
pub mod engine_thread;
pub mod error;
pub mod fetch;
pub mod generate;
pub mod http;
pub mod kv_events;
pub mod kv_sizing;
pub mod lifecycle;
pub mod load;
pub mod memory;
pub mod metrics;
pub mod openai;
pub mod prefill;
pub mod probe;
pub mod render;
pub mod serving;
pub mod transfer;
pub mod worker;
