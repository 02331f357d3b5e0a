//! The role of a worker: which phases of a request it serves.

use serde::{Deserialize, Serialize};

/// Which phases of a request a worker serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Reads prompts, builds their KV cache and hands it over.
    Prefill,
    /// Takes a prompt's KV cache over and generates.
    Decode,
    /// Both phases in one process (aggregated serving).
    PrefillDecode,
}

impl Role {
    /// Every role, in the order in which help texts list them.
    pub const ALL: [Role; 3] = [Role::Prefill, Role::Decode, Role::PrefillDecode];

    /// The role as it is spelled in flags, labels, metrics and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::PrefillDecode => "prefill-decode",
        }
    }

    /// Whether a worker of this role answers clients' requests (directly or as the decode leg).
    pub const fn decodes(self) -> bool {
        match self {
            Role::Decode | Role::PrefillDecode => true,
            Role::Prefill => false,
        }
    }

    /// Whether a worker of this role computes KV for others.
    pub const fn prefills_for_others(self) -> bool {
        match self {
            Role::Prefill | Role::PrefillDecode => true,
            Role::Decode => false,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Role {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Role::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| UnknownRole(text.to_owned()))
    }
}

/// A word that is not a role.
#[derive(Debug, thiserror::Error)]
#[error("unknown role {0:?}: one of prefill, decode, prefill-decode")]
pub struct UnknownRole(String);
