//! KV handoff over TCP: a prefill worker's blocks leave layer by layer while it still computes, and are verified before a
//! decode worker sees them.
//!
//! ```text
//!  engine thread ─ progress ─> [ export: watermark + lease ] ─> [ subscription: frames ] ══ bulk ═══> [ incoming: assembly ] ─> KvPool::import
//!  worker        ─ commit ──────────┘                                    └──── control (COMMIT, ERROR) ──> [ fetch ] ─> Fetched | FetchError
//! ```
//!
//! Ownership: a producer only reads its own pool and a consumer only writes its own. Neither ever learns where the other's
//! blocks are, so neither can reach into memory that has changed hands; what is left to guard is each side's own hold on its
//! blocks, which is a lease there ([`lease`]) and the life of the fetch future here ([`consumer`]).
//!
//! Pure parts (no sockets, no clocks of their own): [`watermark`], [`lease`], [`assembly`]. The protocol on the wire is
//! [`baton_wire::kv`].

pub mod assembly;
pub mod commit;
pub mod consumer;
pub mod error;
pub mod export;
pub mod lease;
pub mod limits;
pub mod producer;
mod session;
pub mod stats;

pub mod watermark;

#[cfg(test)]
mod tests;
