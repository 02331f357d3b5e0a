//! What an engine-specific protocol has to say: the calls that make up a request's two legs. One file each under
//! `connector/`, pure: identifiers, keys and the time come in, bytes go out; `legs.rs` and `exchange.rs` send them.

pub(crate) mod baton;
pub(crate) mod sglang;
pub(crate) mod vllm_nixl;

use crate::api::Hints;
use baton_wire::PathReason;
use bytes::Bytes;

/// Protocol between prefill and decode engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connector {
    /// Baton's own worker: both legs together, KV by a signed transfer.
    Baton,
    /// vLLM's NixlConnector: the prefill leg's answer names the KV, which the decode leg fetches.
    VllmNixl,
    /// SGLang's bootstrap server: both legs together, met in a room.
    Sglang,
}

impl Connector {
    /// The name as flags spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Connector::Baton => "baton",
            Connector::VllmNixl => "vllm-nixl",
            Connector::Sglang => "sglang",
        }
    }
}

impl std::fmt::Display for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that is no connector's.
#[derive(Debug, thiserror::Error)]
#[error("one of baton, vllm-nixl, sglang")]
pub struct UnknownConnector;

impl std::str::FromStr for Connector {
    type Err = UnknownConnector;

    /// `nixlv2` is what llm-d calls the same protocol.
    fn from_str(text: &str) -> Result<Self, UnknownConnector> {
        match text {
            "baton" => Ok(Connector::Baton),
            "vllm-nixl" | "nixlv2" => Ok(Connector::VllmNixl),
            "sglang" => Ok(Connector::Sglang),
            _ => Err(UnknownConnector),
        }
    }
}

/// Whether the KV of such a request can be handed over by this protocol.
///
/// # Errors
/// Why not.
pub(crate) fn can_hand_over(connector: Connector, hints: &Hints<'_>) -> Result<(), PathReason> {
    match connector {
        Connector::Baton => Ok(()),
        Connector::VllmNixl => vllm_nixl::can_hand_over(hints).map_err(|reason| match reason {
            vllm_nixl::Reason::SeveralChoices | vllm_nixl::Reason::BestOf | vllm_nixl::Reason::BeamSearch => {
                PathReason::SeveralChoices
            }
            vllm_nixl::Reason::SeveralPrompts => PathReason::SeveralPrompts,
            vllm_nixl::Reason::PromptLogprobs => PathReason::PromptLogprobs,
            vllm_nixl::Reason::StoredConversation => PathReason::StoredConversation,
        }),
        Connector::Sglang => Ok(()),
    }
}

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
