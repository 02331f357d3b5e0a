//! The manifest's policies: which prompts go to a prefill worker, and what happens when that fails.

/// The manifest's policy, as flags spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disaggregation {
    /// Every prompt.
    Always,
    /// Prompts for which it is worth it.
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
    /// Those for which it takes less time, as far as is measured.
    Conditional {
        /// Tokens that the decode worker has not cached below which a prompt stays there whatever is measured. Where it is
        /// not given, static thresholds hold until enough is measured.
        min_uncached_prompt_tokens: Option<u64>,
    },
    /// No prompt.
    Never,
}

/// Only one of the policies has a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("only a conditional policy has a threshold")]
pub struct ThresholdError;

impl Policy {
    /// The policy with its threshold.
    ///
    /// # Errors
    /// When there is a threshold without the conditional policy.
    pub fn new(disaggregation: Disaggregation, threshold: Option<u64>) -> Result<Self, ThresholdError> {
        match (disaggregation, threshold) {
            (Disaggregation::Always, None) => Ok(Policy::Always),
            (Disaggregation::Never, None) => Ok(Policy::Never),
            (Disaggregation::Conditional, min_uncached_prompt_tokens) => {
                Ok(Policy::Conditional { min_uncached_prompt_tokens })
            }
            (Disaggregation::Always | Disaggregation::Never, Some(_)) => Err(ThresholdError),
        }
    }
}

/// What happens to a request whose prefill has failed, after its retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// It fails, so that decode workers never compute prompts.
    Never,
    /// Short prompts are computed by the decode worker, long ones fail.
    Short {
        /// The longest prompt that counts as short.
        tokens: u64,
    },
    /// The decode worker computes the prompt.
    Always,
}

/// What to do with a request whose prefill has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalOr503 {
    /// The decode worker computes the prompt.
    Local,
    /// The client is told to come back.
    Unavailable,
}

impl Fallback {
    /// What to do with a request of so many prompt tokens, cached ones included: a cache that held them when the request was
    /// planned need not hold them any longer.
    pub const fn after_prefill_failure(self, prompt_tokens: u64) -> LocalOr503 {
        match self {
            Fallback::Always => LocalOr503::Local,
            Fallback::Short { tokens } if prompt_tokens <= tokens => LocalOr503::Local,
            Fallback::Short { .. } | Fallback::Never => LocalOr503::Unavailable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_survives_its_text_form() {
        for policy in Disaggregation::ALL {
            assert_eq!(policy.to_string().parse::<Disaggregation>().expect("own form parses"), policy);
        }
        assert!("Always".parse::<Disaggregation>().is_err());
    }

    #[test]
    fn only_the_conditional_policy_takes_a_threshold() {
        let check = |disaggregation, threshold, expect| {
            assert_eq!(Policy::new(disaggregation, threshold), expect, "{disaggregation} {threshold:?}");
        };
        let conditional = |min_uncached_prompt_tokens| Ok(Policy::Conditional { min_uncached_prompt_tokens });
        check(Disaggregation::Always, None, Ok(Policy::Always));
        check(Disaggregation::Never, None, Ok(Policy::Never));
        check(Disaggregation::Conditional, None, conditional(None));
        check(Disaggregation::Conditional, Some(7), conditional(Some(7)));
        check(Disaggregation::Always, Some(7), Err(ThresholdError));
        check(Disaggregation::Never, Some(7), Err(ThresholdError));
    }

    #[test]
    fn a_failed_prefill_is_computed_locally_where_the_fallback_allows_it() {
        let check = |fallback: Fallback, prompt_tokens, expect| {
            assert_eq!(fallback.after_prefill_failure(prompt_tokens), expect, "{fallback:?} {prompt_tokens}");
        };
        check(Fallback::Always, u64::MAX, LocalOr503::Local);
        check(Fallback::Never, 0, LocalOr503::Unavailable);
        check(Fallback::Short { tokens: 512 }, 512, LocalOr503::Local);
        check(Fallback::Short { tokens: 512 }, 513, LocalOr503::Unavailable);
    }
}
