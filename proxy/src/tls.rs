//! Certificates of the clients' port and of what this proxy dials: from the bytes of PEM files to what rustls takes, or to an
//! error that names the file and what is wrong with it. Pure; files are read and followed in `tls/reload.rs`.

pub(crate) mod reload;
pub(crate) mod stream;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is spoken on the clients' port, the preferred first.
const SERVER_ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What this proxy speaks to engines and to other pods' proxies: a leg has a connection of its own, which ends with it.
const UPSTREAM_ALPN: [&[u8]; 1] = [b"http/1.1"];

/// All that the command line says of TLS.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Of the clients' port; plaintext where there is none.
    pub server: Option<ServerFiles>,
    /// For what is dialled: other pods' proxies are dialled with TLS where it is given.
    pub upstream: Option<UpstreamFiles>,
    /// Whether the engine of this pod is dialled with TLS, too.
    pub is_engine_tls: bool,
}

/// Files of the clients' port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFiles {
    /// The certificate and those between it and its authority, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// Authorities, one of which must have signed each client's certificate; without it no client is asked for one.
    pub client_ca: Option<PathBuf>,
}

/// Files for what is dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamFiles {
    /// Authorities, one of which must have signed each server's certificate, in PEM.
    pub ca: PathBuf,
    /// Certificate and key that this proxy shows.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that each server's certificate must bear in place of the host that was dialled: pods are dialled by address.
    pub server_name: Option<String>,
}

/// Why files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("{} can't be read", file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not PEM, or lacks what it should hold.
    #[error("{} holds no {what} in PEM", file.display())]
    Pem {
        /// Which file.
        file: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What the reader said; nothing where the file is PEM of something else.
        #[source]
        source: Option<pem::Error>,
    },
    /// The certificate in a file is no X.509 that can be used.
    #[error("{} holds a certificate that can't be read", file.display())]
    Certificate {
        /// Which file.
        file: PathBuf,
    },
    /// The certificate is too old.
    #[error("the certificate in {} has expired: it was valid until {until}", file.display())]
    Expired {
        /// Which file.
        file: PathBuf,
        /// The last moment of its life.
        until: String,
    },
    /// The certificate is too new.
    #[error("the certificate in {} is not valid before {from}", file.display())]
    NotYetValid {
        /// Which file.
        file: PathBuf,
        /// The first moment of its life.
        from: String,
    },
    /// Certificate and key don't go together.
    #[error("the certificate in {} and its key can't be used together", file.display())]
    Pair {
        /// The certificate's file.
        file: PathBuf,
        /// What rustls said.
        #[source]
        source: rustls::Error,
    },
    /// An authority can't be used.
    #[error("the authorities in {} can't be used", file.display())]
    Authority {
        /// Which file.
        file: PathBuf,
        /// What rustls said.
        #[source]
        source: VerifierBuilderError,
    },
    /// A name that no certificate can bear.
    #[error("--upstream-tls-server-name {name:?} is neither a DNS name nor an IP address")]
    ServerName {
        /// What was given.
        name: String,
    },
}

/// What has been made of some files.
#[derive(Debug)]
pub(crate) struct Loaded<C> {
    pub(crate) config: Arc<C>,
    /// When the certificate that we show expires, in seconds since the Unix epoch; nothing where we show none.
    pub(crate) expires_unix_seconds: Option<i64>,
}

impl<C> Clone for Loaded<C> {
    fn clone(&self) -> Self {
        Loaded { config: Arc::clone(&self.config), expires_unix_seconds: self.expires_unix_seconds }
    }
}

/// Files that make one side's configuration.
pub(crate) trait Files {
    /// Of which side.
    type Config: std::fmt::Debug + Send + Sync + 'static;

    /// What to read, in the order in which `load` takes it.
    fn paths(&self) -> Vec<&Path>;

    /// What the files say. An expired certificate is an error, so that it never takes the place of one that works.
    ///
    /// # Errors
    /// See [`TlsError`].
    fn load(&self, contents: &[Vec<u8>], now_unix_seconds: i64) -> Result<Loaded<Self::Config>, TlsError>;
}

impl Files for ServerFiles {
    type Config = ServerConfig;

    fn paths(&self) -> Vec<&Path> {
        [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
            .collect()
    }

    fn load(&self, contents: &[Vec<u8>], now_unix_seconds: i64) -> Result<Loaded<ServerConfig>, TlsError> {
        let chain = certificates(&self.certificate, &contents[0])?;
        let expires_unix_seconds = Some(expiry(&self.certificate, &chain[0], now_unix_seconds)?);
        let key = key(&self.key, &contents[1])?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has the cipher suites of TLS 1.2 and 1.3");
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let roots = Arc::new(authorities(file, &contents[2])?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
                let failed = |source| TlsError::Authority { file: file.clone(), source };
                builder.with_client_cert_verifier(verifier.map_err(failed)?)
            }
        };
        let failed = |source| TlsError::Pair { file: self.certificate.clone(), source };
        let mut config = builder.with_single_cert(chain, key).map_err(failed)?;
        config.alpn_protocols = SERVER_ALPN.map(<[u8]>::to_vec).into();
        Ok(Loaded { config: Arc::new(config), expires_unix_seconds })
    }
}

impl Files for UpstreamFiles {
    type Config = ClientConfig;

    fn paths(&self) -> Vec<&Path> {
        let identity = self.identity.iter().flat_map(|(certificate, key)| [certificate.as_path(), key.as_path()]);
        std::iter::once(self.ca.as_path()).chain(identity).collect()
    }

    fn load(&self, contents: &[Vec<u8>], now_unix_seconds: i64) -> Result<Loaded<ClientConfig>, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has the cipher suites of TLS 1.2 and 1.3")
            .with_root_certificates(authorities(&self.ca, &contents[0])?);
        let (mut config, expires_unix_seconds) = match &self.identity {
            None => (builder.with_no_client_auth(), None),
            Some((certificate, key_file)) => {
                let chain = certificates(certificate, &contents[1])?;
                let expires = expiry(certificate, &chain[0], now_unix_seconds)?;
                let failed = |source| TlsError::Pair { file: certificate.clone(), source };
                let config = builder.with_client_auth_cert(chain, key(key_file, &contents[2])?).map_err(failed)?;
                (config, Some(expires))
            }
        };
        config.alpn_protocols = UPSTREAM_ALPN.map(<[u8]>::to_vec).into();
        Ok(Loaded { config: Arc::new(config), expires_unix_seconds })
    }
}

impl UpstreamFiles {
    /// The name that certificates must bear, where one was given.
    ///
    /// # Errors
    /// When it can't be a server's name.
    pub(crate) fn server_name(&self) -> Result<Option<ServerName<'static>>, TlsError> {
        let parse =
            |name: &String| ServerName::try_from(name.clone()).map_err(|_| TlsError::ServerName { name: name.clone() });
        self.server_name.as_ref().map(parse).transpose()
    }
}

/// Named at each use and not installed for the process: what a library beside us installs can't change what we speak.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Never empty; of a chain, the certificate itself comes first.
fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |source| TlsError::Pem { file: file.to_owned(), what: "certificate", source };
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| wrong(Some(error)))?;
    if found.is_empty() { Err(wrong(None)) } else { Ok(found) }
}

fn key(file: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    let wrong = |source| TlsError::Pem { file: file.to_owned(), what: "private key", source: Some(source) };
    PrivateKeyDer::from_pem_slice(pem).map_err(wrong)
}

fn authorities(file: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file, pem)? {
        roots.add(certificate).map_err(|_| TlsError::Certificate { file: file.to_owned() })?;
    }
    Ok(roots)
}

/// When a certificate expires, in seconds since the Unix epoch.
fn expiry(file: &Path, certificate: &CertificateDer<'_>, now_unix_seconds: i64) -> Result<i64, TlsError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|_| TlsError::Certificate { file: file.to_owned() })?;
    let (from, until) = (parsed.validity().not_before, parsed.validity().not_after);
    if now_unix_seconds > until.timestamp() {
        return Err(TlsError::Expired { file: file.to_owned(), until: until.to_string() });
    }
    if now_unix_seconds < from.timestamp() {
        return Err(TlsError::NotYetValid { file: file.to_owned(), from: from.to_string() });
    }
    Ok(until.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A certificate that signs itself, valid in these years, and its key.
    fn pair(from: i32, until: i32) -> [Vec<u8>; 2] {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(["proxy.test".to_owned()]).expect("a name");
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let certificate = params.self_signed(&key).expect("signed");
        [certificate.pem().into_bytes(), key.serialize_pem().into_bytes()]
    }

    fn files(client_ca: bool) -> ServerFiles {
        ServerFiles {
            certificate: "tls.crt".into(),
            key: "tls.key".into(),
            client_ca: client_ca.then(|| "ca.crt".into()),
        }
    }

    /// The first of January 2026.
    const NOW: i64 = 1_767_225_600;

    #[test]
    fn a_right_pair_is_taken_and_its_end_is_known() {
        let [certificate, key] = pair(2025, 2027);
        let loaded = files(false).load(&[certificate.clone(), key.clone()], NOW).expect("a right pair");
        assert_eq!(loaded.expires_unix_seconds, Some(NOW + 365 * 24 * 60 * 60));
        assert_eq!(loaded.config.alpn_protocols, [b"h2".to_vec(), b"http/1.1".to_vec()]);
        files(true).load(&[certificate.clone(), key, certificate], NOW).expect("a client's authority");
    }

    #[test]
    fn each_wrong_file_is_refused_by_its_name_and_reason() {
        let ([certificate, key], [old, old_key]) = (pair(2025, 2027), pair(2020, 2021));
        let (young, young_key) = pair(2030, 2031).into();
        let check = |contents: [&[u8]; 3], expect: &[&str]| {
            let contents = contents.map(<[u8]>::to_vec);
            let error = files(true).load(&contents, NOW).map(drop).expect_err("a wrong file").to_string();
            assert!(expect.iter().all(|text| error.contains(text)), "{error}");
        };
        check([b"", &key, &certificate], &["tls.crt", "no certificate"]);
        check([b"-----BEGIN CERTIFICATE-----\n?", &key, &certificate], &["tls.crt", "no certificate"]);
        check([&certificate, b"", &certificate], &["tls.key", "no private key"]);
        check([&certificate, &certificate, &certificate], &["tls.key", "no private key"]);
        check([&certificate, &old_key, &certificate], &["tls.crt", "its key can't be used together"]);
        check([&certificate, &key, &key], &["ca.crt", "no certificate"]);
        check([&old, &old_key, &certificate], &["tls.crt", "has expired", "Jan  1", "2021"]);
        check([&young, &young_key, &certificate], &["tls.crt", "not valid before", "2030"]);
    }

    #[test]
    fn what_is_dialled_needs_an_authority_and_may_have_an_identity() {
        let [certificate, key] = pair(2025, 2027);
        let mut files = UpstreamFiles { ca: "ca.crt".into(), identity: None, server_name: None };
        assert_eq!(
            files.load(std::slice::from_ref(&certificate), NOW).expect("an authority").expires_unix_seconds,
            None
        );
        assert_eq!(files.server_name().expect("none"), None);
        files.identity = Some(("tls.crt".into(), "tls.key".into()));
        files.load(&[certificate.clone(), certificate, key], NOW).expect("an identity");
        assert_eq!(files.paths().len(), 3);
        files.server_name = Some("not a name".into());
        assert!(files.server_name().is_err());
    }
}
