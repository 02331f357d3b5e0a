//! A model's keys and certificates as values: what Secrets hold, without where they come from.

/// A model's keys and certificates. Private halves never enter a log or an error.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The proxies' Ed25519 signing key, as the routing proxy's `--signing-key-file` reads it.
    pub signing_key: String,
    /// Its public half, as the worker's `--proxy-public-key-file` reads it.
    pub signing_public: String,
    /// The model's own certificate authority.
    pub authority: Certificate,
    /// A certificate for each role that has pods, by workload role, with the name `<role>.<model>.<namespace>`.
    pub roles: std::collections::BTreeMap<crate::plan::WorkloadRole, Certificate>,
}

/// A certificate and its private key, both in PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Certificate {
    /// The certificate.
    pub certificate_pem: String,
    /// The key.
    pub key_pem: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").finish_non_exhaustive()
    }
}
