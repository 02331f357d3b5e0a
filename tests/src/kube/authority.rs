//! The certificate authority of one test cluster.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use std::path::{Path, PathBuf};

/// A certificate with its key, both PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// An authority that the cluster's API server trusts and is known by.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "baton test cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        std::fs::write(folder.join("ca.crt"), issuer.pem())?;
        // Signs the tokens of service accounts.
        let tokens = KeyPair::generate()?;
        std::fs::write(folder.join("tokens.key"), tokens.serialize_pem())?;
        std::fs::write(folder.join("tokens.pub"), tokens.public_key_pem())?;
        Ok(Authority { issuer, folder: folder.to_owned() })
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate of a server that is reached by these names and addresses.
    ///
    /// # Errors
    /// When a name is none.
    pub fn server(&self, names: &[&str]) -> Result<Identity> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        self.sign(CertificateParams::new(names)?, "server", ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A certificate of a client; Kubernetes reads user and group out of it.
    pub(super) fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        let mut params = CertificateParams::new(Vec::new())?;
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        self.sign(params, user, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(&self, mut params: CertificateParams, name: &str, usage: ExtendedKeyUsagePurpose) -> Result<Identity> {
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The same as files `<name>.crt` and `<name>.key` in the cluster's folder.
    pub(super) fn write(&self, name: &str, identity: &Identity) -> Result<(PathBuf, PathBuf)> {
        let (certificate, key) = (self.folder.join(format!("{name}.crt")), self.folder.join(format!("{name}.key")));
        std::fs::write(&certificate, &identity.certificate).context("write a certificate")?;
        std::fs::write(&key, &identity.key).context("write a key")?;
        Ok((certificate, key))
    }
}
