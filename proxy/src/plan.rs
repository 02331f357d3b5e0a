//! Whether a prompt's KV is to be computed by a prefill worker, and if not, why not. Pure; knows no worker by name.

use baton_wire::{PathReason, Role};

/// The manifest's policy, as flags spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disaggregation {
    /// Every prompt.
    Always,
    /// Prompts with enough uncached tokens.
    Conditional,
    /// No prompt.
    Never,
}

impl Disaggregation {
    /// Every policy.
    pub const ALL: [Disaggregation; 3] = [Disaggregation::Always, Disaggregation::Conditional, Disaggregation::Never];

    /// The policy as flags spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Disaggregation::Always => "always",
            Disaggregation::Conditional => "conditional",
            Disaggregation::Never => "never",
        }
    }
}

impl std::fmt::Display for Disaggregation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Disaggregation {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        Disaggregation::ALL.into_iter().find(|p| p.as_str() == text).ok_or_else(|| UnknownPolicy(text.to_owned()))
    }
}

/// A word that is no policy.
#[derive(Debug, thiserror::Error)]
#[error("unknown policy {0:?}: one of always, conditional, never")]
pub struct UnknownPolicy(String);

/// Which prompts go to a prefill worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Every prompt.
    Always,
    /// Those with at least so many tokens that the decode worker has not cached.
    Conditional {
        /// The threshold, in tokens.
        min_uncached_prompt_tokens: u64,
    },
    /// No prompt.
    Never,
}

/// The threshold and the policy need each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("only a conditional policy has a threshold, and it must have one")]
pub struct ThresholdError;

impl Policy {
    /// The policy with its threshold.
    ///
    /// # Errors
    /// When there is a threshold without the conditional policy, or the other way round.
    pub fn new(disaggregation: Disaggregation, threshold: Option<u64>) -> Result<Self, ThresholdError> {
        match (disaggregation, threshold) {
            (Disaggregation::Always, None) => Ok(Policy::Always),
            (Disaggregation::Never, None) => Ok(Policy::Never),
            (Disaggregation::Conditional, Some(min_uncached_prompt_tokens)) => {
                Ok(Policy::Conditional { min_uncached_prompt_tokens })
            }
            (Disaggregation::Always | Disaggregation::Never, Some(_)) | (Disaggregation::Conditional, None) => {
                Err(ThresholdError)
            }
        }
    }
}

/// What the decision depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// Of the decode worker that was chosen.
    pub(crate) decode_role: Role,
    /// Tokens of all prompts of the request that the decode worker would have to compute.
    pub(crate) uncached_prompt_tokens: u64,
}

/// Where the prompt is to be computed. [`Plan::Remote`] still needs a prefill worker that can pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// On a prefill worker.
    Remote,
    /// On the decode worker itself.
    Local(PathReason),
}

/// Decides. The order of the reasons is the order of what a person would change first: the worker's role, the policy, the
/// prompt.
pub(crate) fn plan(policy: Policy, facts: Facts) -> Plan {
    let Facts { decode_role, uncached_prompt_tokens } = facts;
    if decode_role == Role::PrefillDecode {
        return Plan::Local(PathReason::Aggregated);
    }
    match policy {
        Policy::Never => Plan::Local(PathReason::PolicyNever),
        Policy::Conditional { min_uncached_prompt_tokens } if uncached_prompt_tokens < min_uncached_prompt_tokens => {
            Plan::Local(PathReason::ShortPrompt)
        }
        Policy::Conditional { .. } | Policy::Always => Plan::Remote,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(policy: Policy, decode_role: Role, uncached_prompt_tokens: u64, expect: Plan) {
        assert_eq!(plan(policy, Facts { decode_role, uncached_prompt_tokens }), expect, "{policy:?} {decode_role}");
    }

    #[test]
    fn the_policy_decides_for_a_decode_worker() {
        let conditional = Policy::Conditional { min_uncached_prompt_tokens: 256 };
        check(Policy::Always, Role::Decode, 1, Plan::Remote);
        check(Policy::Never, Role::Decode, 1 << 20, Plan::Local(PathReason::PolicyNever));
        check(conditional, Role::Decode, 255, Plan::Local(PathReason::ShortPrompt));
        check(conditional, Role::Decode, 256, Plan::Remote);
    }

    #[test]
    fn a_worker_of_both_phases_never_hands_over() {
        for policy in [Policy::Always, Policy::Never, Policy::Conditional { min_uncached_prompt_tokens: 0 }] {
            check(policy, Role::PrefillDecode, 9999, Plan::Local(PathReason::Aggregated));
        }
    }

    #[test]
    fn every_policy_survives_its_text_form() {
        for policy in Disaggregation::ALL {
            assert_eq!(policy.to_string().parse::<Disaggregation>().expect("own form parses"), policy);
        }
        assert!("Always".parse::<Disaggregation>().is_err());
    }

    proptest! {
        #[test]
        fn a_longer_prompt_never_turns_a_remote_prefill_local(threshold: u64, shorter: u64, more: u64) {
            let policy = Policy::Conditional { min_uncached_prompt_tokens: threshold };
            let at = |uncached_prompt_tokens| plan(policy, Facts { decode_role: Role::Decode, uncached_prompt_tokens });
            if at(shorter) == Plan::Remote {
                prop_assert_eq!(at(shorter.saturating_add(more)), Plan::Remote);
            }
        }
    }
}
