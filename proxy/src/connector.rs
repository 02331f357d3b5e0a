//! What an engine-specific protocol has to say: the calls that make up a request's two legs. One file each under
//! `connector/`, pure: identifiers, keys and the time come in, bytes go out; `legs.rs` sends them.

pub(crate) mod baton;

use bytes::Bytes;

/// One call to a worker: a `POST` of JSON.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// Where, on the worker.
    pub(crate) path: &'static str,
    /// The whole body.
    pub(crate) body: Bytes,
}

/// The calls of one attempt at a request.
#[derive(Clone, Debug)]
pub(crate) struct Legs {
    /// To the prefill worker, at the same time as the other; absent where the decode worker computes the prompt.
    pub(crate) prefill: Option<Call>,
    /// To the decode worker.
    pub(crate) decode: Call,
}
