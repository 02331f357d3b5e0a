//! A model's keys and certificates: those found that are still good, and new ones for the others.
//!
//! Pure but for the randomness of new keys: what was found and the time come in. A certificate is good when it reads, belongs to its
//! key, bears its role's name, was issued by the model's authority and has a third of its life left; then it is left alone, so
//! that nothing is written while nothing is due.

use crate::credentials::{Certificate, Credentials};
use crate::desired::names;
use crate::plan::WorkloadRole;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use baton_wire::names::files;
use baton_wire::signing::{KeyTexts, parse_signing_key};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;
use x509_parser::pem::parse_x509_pem;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Life of a role's certificate.
const ROLE_LIFE: Duration = DAY.saturating_mul(90);
/// Life of a model's authority: longer than a model lives, and renewed all the same.
const AUTHORITY_LIFE: Duration = DAY.saturating_mul(3650);
/// How far back a certificate's life begins, for pods whose clock is slow.
const BACKDATED: Duration = Duration::from_secs(5 * 60);
/// Longest text that is read as a certificate or key: ours have under 2 kB.
const PEM_BYTES_MAX: usize = 64 * 1024;

/// What Secrets hold; empty where a Secret or its key is missing.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Text of the proxies' signing key.
    pub signing_key: String,
    /// The authority.
    pub authority: Certificate,
    /// The roles' certificates.
    pub roles: BTreeMap<WorkloadRole, Certificate>,
}

impl Found {
    /// What Secrets hold, each looked up by its name.
    pub fn in_secrets<'a>(secret: impl Fn(&str) -> Option<&'a Value>, model: &str) -> Self {
        let text = |name: &str, key: &str| {
            let encoded = secret(name)?.get("data")?.get(key)?.as_str()?;
            String::from_utf8(STANDARD.decode(encoded).ok()?).ok()
        };
        let certificate = |name: &str| Certificate {
            certificate_pem: text(name, keys::CERTIFICATE).unwrap_or_default(),
            key_pem: text(name, keys::PRIVATE).unwrap_or_default(),
        };
        Found {
            signing_key: text(&names::signing_key(model), files::SIGNING_KEY).unwrap_or_default(),
            authority: certificate(&names::authority(model)),
            roles: WorkloadRole::ALL
                .into_iter()
                .map(|role| (role, certificate(&names::certificate(model, role))))
                .collect(),
        }
    }
}

/// Keys in a Secret of type `kubernetes.io/tls`.
mod keys {
    pub(super) const CERTIFICATE: &str = "tls.crt";
    pub(super) const PRIVATE: &str = "tls.key";
}

/// Keys and certificates to work with, and when the first of them is due again.
#[derive(Clone, Debug)]
pub struct Minted {
    /// All of a model's keys and certificates.
    pub credentials: Credentials,
    /// Time until the first is to be renewed.
    pub renew_in: Duration,
}

/// Why nothing could be made.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The system gives no randomness.
    #[error("the system gives no randomness for a key: {0}")]
    Entropy(#[source] getrandom::Error),
    /// A certificate could not be made.
    #[error("can't make a certificate for {name}: {source}")]
    Certificate {
        /// For whom.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// Keeps what is good of what was found, and makes the rest.
///
/// # Errors
/// When the system gives no randomness.
pub fn mint(
    found: &Found,
    model: &str,
    namespace: &str,
    roles: &BTreeSet<WorkloadRole>,
    now: Timestamp,
) -> Result<Minted, MintError> {
    let keys = match parse_signing_key(&found.signing_key) {
        Ok(key) => KeyTexts::of(&key),
        Err(_) => new_signing_keys()?,
    };
    let subject = format!("{model}.{namespace}");
    let (authority, issuer, mut renew_in) = match authority(&found.authority, &subject, now) {
        Some((issuer, renew_in)) => (found.authority.clone(), issuer, renew_in),
        None => new_authority(&subject, now)?,
    };
    let mut certificates = BTreeMap::new();
    for &role in roles {
        let name = format!("{}.{model}.{namespace}", role.as_str());
        let good = found.roles.get(&role).and_then(|found| {
            left(found, &name, Some(&authority.certificate_pem), now).map(|left| (found.clone(), left))
        });
        let (certificate, left) = match good {
            Some(good) => good,
            None => (new_certificate(&name, &issuer, now)?, until_renewal(ROLE_LIFE)),
        };
        renew_in = renew_in.min(left);
        certificates.insert(role, certificate);
    }
    let credentials =
        Credentials { signing_key: keys.signing, signing_public: keys.public, authority, roles: certificates };
    Ok(Minted { credentials, renew_in })
}

fn new_signing_keys() -> Result<KeyTexts, MintError> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(MintError::Entropy)?;
    Ok(KeyTexts::from_secret(&secret))
}

/// How long a new certificate stays before it is renewed: two thirds of its life, so that a month is left to notice that
/// renewing fails.
fn until_renewal(life: Duration) -> Duration {
    life * 2 / 3
}

/// The authority that was found and the time until it is due, if it is good.
fn authority(found: &Certificate, subject: &str, now: Timestamp) -> Option<(Issuer<'static, KeyPair>, Duration)> {
    let left = left(found, subject, None, now)?;
    let key = KeyPair::from_pem(&found.key_pem).ok()?;
    Some((Issuer::from_ca_cert_pem(&found.certificate_pem, key).ok()?, left))
}

/// Time until a certificate is due; none when it is no good: unreadable, another key's, another name's or another issuer's, too new or
/// too old. Without an issuer it is to be an authority, which signs itself.
fn left(found: &Certificate, name: &str, issuer_pem: Option<&str>, now: Timestamp) -> Option<Duration> {
    if found.certificate_pem.len().max(found.key_pem.len()) > PEM_BYTES_MAX {
        return None;
    }
    let (_, pem) = parse_x509_pem(found.certificate_pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let key = KeyPair::from_pem(&found.key_pem).ok()?;
    let is_keys = certificate.public_key().subject_public_key.data.as_ref() == key.public_key_raw();
    let is_issuers = match issuer_pem {
        None => certificate.is_ca() && certificate.verify_signature(None).is_ok(),
        Some(issuer) => {
            let (_, issuer) = parse_x509_pem(issuer.as_bytes()).ok()?;
            let (_, issuer) = parse_x509_certificate(&issuer.contents).ok()?;
            certificate.verify_signature(Some(issuer.public_key())).is_ok()
        }
    };
    let named = match issuer_pem {
        None => certificate.subject().iter_common_name().any(|found| found.as_str() == Ok(name)),
        Some(_) => certificate.subject_alternative_name().ok().flatten().is_some_and(|names| {
            names.value.general_names.iter().any(|found| matches!(found, GeneralName::DNSName(found) if *found == name))
        }),
    };
    let (begin, end) = (certificate.validity().not_before.timestamp(), certificate.validity().not_after.timestamp());
    let life = Duration::from_secs(u64::try_from(end.checked_sub(begin)?).ok()?);
    let age = Duration::from_secs(u64::try_from(now.as_second().checked_sub(begin)?).ok()?);
    let left = (until_renewal(life) + BACKDATED).checked_sub(age).filter(|left| !left.is_zero());
    left.filter(|_| is_keys && is_issuers && named)
}

fn new_authority(
    subject: &str,
    now: Timestamp,
) -> Result<(Certificate, Issuer<'static, KeyPair>, Duration), MintError> {
    let failed = |source| MintError::Certificate { name: subject.to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = params(subject, now, AUTHORITY_LIFE);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(failed)?;
    let made = Certificate { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() };
    Ok((made, Issuer::new(params, key), until_renewal(AUTHORITY_LIFE)))
}

fn new_certificate(name: &str, issuer: &Issuer<'_, KeyPair>, now: Timestamp) -> Result<Certificate, MintError> {
    let failed = |source| MintError::Certificate { name: name.to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = params(name, now, ROLE_LIFE);
    params.subject_alt_names = vec![rcgen::SanType::DnsName(name.to_owned().try_into().map_err(failed)?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer).map_err(failed)?;
    Ok(Certificate { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
}

fn params(name: &str, now: Timestamp, life: Duration) -> CertificateParams {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    let now = OffsetDateTime::from_unix_timestamp(now.as_second()).expect("jiff's years are fewer than time's");
    params.not_before = now - BACKDATED;
    params.not_after = now + life - BACKDATED;
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: i64 = 1_800_000_000;

    fn at(days: i64) -> Timestamp {
        Timestamp::from_second(NOW + days * 24 * 60 * 60).expect("a time of this century")
    }

    fn both() -> BTreeSet<WorkloadRole> {
        [WorkloadRole::Prefill, WorkloadRole::Decode].into()
    }

    fn minted(found: &Found, days: i64) -> Minted {
        mint(found, "tiny", "models", &both(), at(days)).expect("the system has randomness")
    }

    fn found(credentials: &Credentials) -> Found {
        Found {
            signing_key: credentials.signing_key.clone(),
            authority: credentials.authority.clone(),
            roles: credentials.roles.clone(),
        }
    }

    #[test]
    fn what_secrets_hold_is_read_by_name_and_rubbish_is_nothing() {
        let first = minted(&Found::default(), 0).credentials;
        let encoded = |text: &str| STANDARD.encode(text);
        let secrets = serde_json::json!({
            "tiny-signing-key": {"data": {"signing.key": encoded(&first.signing_key)}},
            "tiny-ca": {"data": {
                "tls.crt": encoded(&first.authority.certificate_pem),
                "tls.key": encoded(&first.authority.key_pem),
            }},
            "tiny-decode-tls": {"data": {"tls.crt": "not base64!", "tls.key": 7}},
        });
        let found = Found::in_secrets(|name| secrets.get(name), "tiny");
        assert!(found.signing_key == first.signing_key && found.authority == first.authority);
        assert!(found.roles[&WorkloadRole::Decode] == Certificate::default());
    }

    #[test]
    fn what_is_found_good_is_kept_until_two_thirds_of_its_life() {
        let first = minted(&Found::default(), 0);
        for (days, kept) in [(0, true), (1, true), (59, true), (60, false), (90, false), (400, false)] {
            let again = minted(&found(&first.credentials), days);
            assert_eq!(again.credentials == first.credentials, kept, "after {days} days");
            // The authority outlives its roles' certificates, and the signing key has no end.
            assert_eq!(again.credentials.authority, first.credentials.authority);
            assert_eq!(again.credentials.signing_key, first.credentials.signing_key);
        }
        assert!(minted(&found(&first.credentials), 2434).credentials.authority != first.credentials.authority);
    }

    #[test]
    fn the_next_renewal_is_the_first_that_is_due() {
        let first = minted(&Found::default(), 0);
        assert_eq!(first.renew_in, DAY * 60);
        assert_eq!(minted(&found(&first.credentials), 50).renew_in, DAY * 10);
    }

    #[test]
    fn the_worker_reads_the_public_half_of_what_the_proxy_reads() {
        let credentials = minted(&Found::default(), 0).credentials;
        let signing = parse_signing_key(&credentials.signing_key).expect("the proxy reads it");
        let public =
            baton_wire::signing::parse_verifying_key(&credentials.signing_public).expect("the worker reads it");
        assert_eq!(signing.verifying_key(), public);
    }

    #[test]
    fn a_certificate_bears_its_roles_name_and_is_its_authoritys() {
        let credentials = minted(&Found::default(), 0).credentials;
        let role = &credentials.roles[&WorkloadRole::Decode];
        let issuer = Some(credentials.authority.certificate_pem.as_str());
        assert!(left(role, "decode.tiny.models", issuer, at(0)).is_some());
        assert!(left(role, "prefill.tiny.models", issuer, at(0)).is_none());
        let other = minted(&Found::default(), 0).credentials.authority;
        assert!(left(role, "decode.tiny.models", Some(&other.certificate_pem), at(0)).is_none());
    }

    #[test]
    fn a_new_authority_issues_all_certificates_anew() {
        let first = minted(&Found::default(), 0).credentials;
        let lost = Found { authority: Certificate::default(), ..found(&first) };
        let second = minted(&lost, 0).credentials;
        assert!(second.authority != first.authority);
        assert!(both().iter().all(|role| second.roles[role] != first.roles[role]));
        assert_eq!(second.signing_key, first.signing_key);
    }

    #[test]
    fn a_role_that_comes_later_gets_a_certificate_and_the_others_keep_theirs() {
        let first = minted(&Found::default(), 0).credentials;
        let roles = WorkloadRole::ALL.into();
        let second =
            mint(&found(&first), "tiny", "models", &roles, at(1)).expect("the system has randomness").credentials;
        assert_eq!(second.roles.len(), 3);
        assert_eq!(second.roles[&WorkloadRole::Decode], first.roles[&WorkloadRole::Decode]);
    }

    #[test]
    fn what_is_broken_or_anothers_is_made_anew() {
        let first = minted(&Found::default(), 0).credentials;
        let decode = first.roles[&WorkloadRole::Decode].clone();
        let prefill = first.roles[&WorkloadRole::Prefill].clone();
        let broken = [
            Certificate::default(),
            Certificate { certificate_pem: "-----BEGIN".to_owned(), ..decode.clone() },
            Certificate { key_pem: prefill.key_pem.clone(), ..decode.clone() },
            Certificate { certificate_pem: "x".repeat(PEM_BYTES_MAX + 1), ..decode.clone() },
            prefill,
            first.authority.clone(),
        ];
        for (index, broken) in broken.into_iter().enumerate() {
            let mut found = found(&first);
            found.roles.insert(WorkloadRole::Decode, broken.clone());
            let again = minted(&found, 0).credentials;
            assert!(again.roles[&WorkloadRole::Decode] != broken, "case {index} was kept");
            assert_eq!(again.roles[&WorkloadRole::Prefill], first.roles[&WorkloadRole::Prefill], "case {index}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_text_in_a_secret_is_survived_and_replaced(key in ".{0,80}", certificate in ".{0,200}", private in ".{0,200}") {
            let rubbish = Certificate { certificate_pem: certificate, key_pem: private };
            let roles = both().into_iter().map(|role| (role, rubbish.clone())).collect();
            let made = minted(&Found { signing_key: key, authority: rubbish, roles }, 0);
            let again = minted(&found(&made.credentials), 0);
            prop_assert!(again.credentials == made.credentials);
        }
    }
}
