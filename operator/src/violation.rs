//! One thing that is wrong with a manifest: where, what, and what would be right.

/// One thing that is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{path}: {message}{}{}", if allowed.is_empty() { "" } else { ": " }, allowed)]
pub struct Violation {
    /// The field, from the manifest's top: `spec.disaggregation.policy`.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
    /// What would be right; empty where the message says all there is.
    pub allowed: String,
}

impl Violation {
    pub(crate) fn new(path: impl Into<String>, message: impl Into<String>, allowed: impl Into<String>) -> Self {
        Violation { path: path.into(), message: message.into(), allowed: allowed.into() }
    }
}
