//! How an upstream's connections are made: plain or through TLS, each within its time.

use crate::address::Address;
use crate::tls::reload::Current;
use crate::tls::stream::Stream;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::io::{Error, ErrorKind, Result};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

/// How long a connection may take to be made: inside a cluster it takes about a millisecond, and one lost SYN is sent again
/// after a second, so a longer wait would be for a host that is gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a TLS handshake may take on top: two signatures at a peer whose cores may all be busy.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// What a connection goes through.
#[derive(Clone, Debug, Default)]
pub(crate) enum Transport {
    #[default]
    Plain,
    Tls(ClientTls),
}

/// What TLS needs at our side.
#[derive(Clone, Debug)]
pub(crate) struct ClientTls {
    /// Authorities and our own certificate, as of each handshake.
    pub(crate) current: Current<ClientConfig>,
    /// The name that servers must prove in place of the host that is dialled.
    pub(crate) server_name: Option<ServerName<'static>>,
}

/// What the engine of this pod, and other pods' proxies, are reached through.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transports {
    pub(crate) own: Transport,
    pub(crate) peers: Transport,
}

impl Transport {
    /// Makes a connection.
    pub(super) async fn dial(&self, address: &Address) -> Result<Stream> {
        let stream = within(CONNECT_TIMEOUT, TcpStream::connect(address.as_str())).await?;
        stream.set_nodelay(true)?;
        match self {
            Transport::Plain => Ok(Stream::Plain(stream)),
            Transport::Tls(ClientTls { current, server_name }) => {
                let name = match server_name {
                    Some(name) => name.clone(),
                    None => host(address)?,
                };
                let connector = TlsConnector::from(current.config());
                let stream = within(HANDSHAKE_TIMEOUT, Box::pin(connector.connect(name, stream))).await?;
                Ok(Stream::Tls(Box::new(TlsStream::Client(stream))))
            }
        }
    }
}

async fn within<T>(timeout: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

/// The host of an address as the name that its server must prove.
fn host(address: &Address) -> Result<ServerName<'static>> {
    let host = address.as_str().rsplit_once(':').map_or("", |(host, _)| host);
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(host.to_owned()).map_err(|error| Error::new(ErrorKind::InvalidInput, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{Files as _, ServerFiles, UpstreamFiles};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    #[tokio::test]
    async fn no_dialled_socket_holds_small_writes_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string().parse().expect("host and port");
        let Stream::Plain(stream) = Transport::Plain.dial(&address).await.expect("somebody listens") else {
            panic!("a plain connection");
        };
        assert!(stream.nodelay().expect("a socket option"));
    }

    #[test]
    fn a_server_must_prove_the_host_that_was_dialled() {
        for (address, expect) in [("10.0.0.7:8000", "10.0.0.7"), ("[::1]:8000", "::1"), ("a.svc:1", "a.svc")] {
            let name = host(&address.parse().expect("an address")).expect("a name");
            assert_eq!(name.to_str(), expect);
        }
    }

    /// Dials a server whose certificate, which signs itself, bears this name and ends in this year.
    async fn dialled(name: &str, until: i32) -> Result<Stream> {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new([name.to_owned()]).expect("a name");
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let certificate = params.self_signed(&key).expect("signed").pem().into_bytes();
        let files = ServerFiles { certificate: "tls.crt".into(), key: "tls.key".into(), client_ca: None };
        let contents = [certificate.clone(), key.serialize_pem().into_bytes()];
        let server = files.load(&contents, 1_600_000_000).expect("in 2020 it was right");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string().parse().expect("host and port");
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a connection");
            let _stream = TlsAcceptor::from(server.config).accept(stream).await;
        });
        let files = UpstreamFiles { ca: "ca.crt".into(), identity: None, server_name: Some("worker.test".into()) };
        let current = Current::fixed(files.load(&[certificate], 0).expect("an authority"));
        let server_name = files.server_name().expect("a name");
        Transport::Tls(ClientTls { current, server_name }).dial(&address).await
    }

    #[tokio::test]
    async fn a_server_with_a_wrong_certificate_is_refused_by_an_error_that_says_why() {
        assert!(matches!(dialled("worker.test", 2999).await, Ok(Stream::Tls(_))));
        let expired = dialled("worker.test", 2021).await.expect_err("expired").to_string();
        assert!(expired.contains("certificate expired"), "{expired}");
        let other = dialled("other.test", 2999).await.expect_err("another's").to_string();
        assert!(other.contains("not valid for name"), "{other}");
    }
}
