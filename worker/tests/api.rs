//! The worker's HTTP API against real workers in this process: the committed demo model, real sockets, port 0.
//!
//! One test program, so that the engine is linked once. Each test starts the workers that it needs.

#[path = "api/completions.rs"]
mod completions;
#[path = "../engine/tests/engine_support/mod.rs"]
mod engine_support;
#[path = "api/errors.rs"]
mod errors;
#[path = "api/fetch.rs"]
mod fetch;
#[path = "api/handoff_equality.rs"]
mod handoff_equality;
#[path = "api/kv_events.rs"]
mod kv_events;
#[path = "api/legs.rs"]
mod legs;
#[path = "api/life.rs"]
mod life;
#[path = "api/process.rs"]
mod process;
#[path = "api/resume.rs"]
mod resume;
#[path = "api/server.rs"]
mod server;
