//! What engines tell of their prefix caches, turned into [`crate::prefix::Change`]s.
//!
//! Our worker's stream is followed by [`ours::Follower`], over lines that [`lines::Lines`] cuts out of an HTTP body. vLLM's
//! comes over ZeroMQ: [`zmq::Connection`] speaks the protocol, [`vllm`] reads what it carries, [`vllm_follower::Follower`]
//! makes sense of it, and [`vllm_reader`] is the loop that connects the three. [`ours_stream`] is that loop for our worker, and
//! [`follow`] keeps one of either for each worker of the table. Only these and [`zmq`] do I/O; the rest is fed by hand in tests.

pub(crate) mod follow;
pub(crate) mod lines;
mod msgpack;
pub(crate) mod ours;
mod ours_stream;
pub(crate) mod vllm;
pub(crate) mod vllm_follower;
pub(crate) mod vllm_reader;
pub(crate) mod zmq;
