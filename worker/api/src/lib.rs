//! What goes over the wire between proxy, worker, operator and command line: types, names, ports and limits, without any I/O.
//!
//! A name that two programs must agree on stands here once: a port, a path, a header, an environment variable, the layout
//! of a KV message. Nothing here opens a socket or reads a clock; times come in as arguments.
#![forbid(unsafe_code)]

pub mod error;
pub mod ids;
pub mod kv;
pub mod kv_events;
pub mod leg;
pub mod names;
pub mod path;
pub mod progress;
pub mod render;
pub mod role;
pub mod signing;
pub mod status;
pub mod traceparent;

pub use error::{ErrorBody, ErrorDetail};
pub use ids::{BlockHash, Epoch, Fingerprint, KvDigest, PromptHash, SessionId, TransferId};
pub use path::{Path, PathReason};
pub use role::Role;
pub use traceparent::Traceparent;
