//! Secrets with a model's keys and certificates.

use super::names;
use super::scope::{Scope, child};
use crate::child::{Child, Kind};
use crate::credentials::{Certificate, Credentials};
use crate::plan::WorkloadRole;
use baton_wire::names::files;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// The keys that Kubernetes knows in a Secret of [`TLS`].
const CERTIFICATE_KEY: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";
/// The key under which cert-manager and its readers keep who signed the certificate.
const AUTHORITY_KEY: &str = "ca.crt";

const OPAQUE: &str = "Opaque";
const TLS: &str = "kubernetes.io/tls";

/// The proxies' signing key: proxies alone mount it.
pub(super) fn signing_key(scope: &Scope<'_>, credentials: &Credentials) -> Child {
    let metadata = scope.of_model(names::signing_key(&scope.model.name));
    secret(metadata, OPAQUE, [(files::SIGNING_KEY, &credentials.signing_key)])
}

/// Its public half, in a Secret of its own so that an engine's pod has no way to the private one.
pub(super) fn signing_public(scope: &Scope<'_>, credentials: &Credentials) -> Child {
    let metadata = scope.of_model(names::signing_public(&scope.model.name));
    secret(metadata, OPAQUE, [(files::SIGNING_PUBLIC, &credentials.signing_public)])
}

/// The model's certificate authority.
pub(super) fn authority(scope: &Scope<'_>, credentials: &Credentials) -> Child {
    let Certificate { certificate_pem, key_pem } = &credentials.authority;
    let metadata = scope.of_model(names::authority(&scope.model.name));
    secret(metadata, TLS, [(CERTIFICATE_KEY, certificate_pem), (PRIVATE_KEY, key_pem)])
}

/// A role's certificate, where one was made.
pub(super) fn certificate(scope: &Scope<'_>, role: WorkloadRole, credentials: &Credentials) -> Option<Child> {
    let Certificate { certificate_pem, key_pem } = credentials.roles.get(&role)?;
    let metadata = scope.of_role(names::certificate(&scope.model.name, role), role);
    let authority = &credentials.authority.certificate_pem;
    let entries = [(CERTIFICATE_KEY, certificate_pem), (PRIVATE_KEY, key_pem), (AUTHORITY_KEY, authority)];
    Some(secret(metadata, TLS, entries))
}

/// Under `data`, because the API server never shows `stringData` again and a difference could not be seen.
fn secret<const N: usize>(metadata: ObjectMeta, kind: &str, entries: [(&str, &String); N]) -> Child {
    let data = entries.map(|(key, text)| (key.to_owned(), ByteString(text.clone().into_bytes())));
    let secret = Secret {
        metadata: metadata.clone(),
        type_: Some(kind.to_owned()),
        data: Some(data.into()),
        ..Default::default()
    };
    child(Kind::Secret, &metadata, &secret)
}
