//! TLS on both sides: certificates that are renewed while requests run, and certificates that are refused.

mod support;

use baton_proxy::app::{App, BuildError};
use baton_proxy::tls::{ServerFiles, TlsFiles, UpstreamFiles};
use baton_wire::Role;
use baton_wire::names::paths;
use http::Request;
use http_body_util::Full;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::{CLIENT_EVENTS, Decode, JSON_ANSWER, Mock, Proxy, Reply, Setup, WITHIN, completion, completion2, http2};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, in PEM.
struct Pair {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Two authorities of one name would be told apart by their signatures alone, and refused as a forgery.
        static NUMBER: AtomicUsize = AtomicUsize::new(1);
        let name = format!("authority {}", NUMBER.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        let pem = params.self_signed(&key).expect("signed").pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    fn signs(&self, until: i32) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let names = ["proxy.test", "127.0.0.1"].map(str::to_owned);
        let mut params = CertificateParams::new(names).expect("names");
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Pair { certificate, key: key.serialize_pem() }
    }

    /// One that has not expired.
    fn signs_now(&self) -> Pair {
        self.signs(2999)
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("PEM")).expect("an authority");
        roots
    }
}

impl Pair {
    fn der(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).expect("PEM");
        (vec![certificate], PrivateKeyDer::from_pem_slice(self.key.as_bytes()).expect("PEM"))
    }
}

/// A mounted Secret.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().expect("a folder"))
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let file = self.0.path().join(name);
        std::fs::write(&file, content).expect("written");
        file
    }

    fn server(&self, pair: &Pair, client_ca: Option<&Authority>) -> ServerFiles {
        ServerFiles {
            certificate: self.file("tls.crt", &pair.certificate),
            key: self.file("tls.key", &pair.key),
            client_ca: client_ca.map(|authority| self.file("client-ca.crt", &authority.pem)),
        }
    }

    fn upstream(&self, authority: &Authority, identity: Option<&Pair>) -> UpstreamFiles {
        UpstreamFiles {
            ca: self.file("upstream-ca.crt", &authority.pem),
            identity: identity
                .map(|pair| (self.file("upstream.crt", &pair.certificate), self.file("upstream.key", &pair.key))),
            server_name: None,
        }
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn client(authority: &Authority, identity: Option<&Pair>, alpn: &str) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(authority.roots());
    let mut config = match identity.map(Pair::der) {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).expect("a pair"),
    };
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    Arc::new(config)
}

async fn connect(proxy: &Proxy, config: &Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(&proxy.address).await?;
    TlsConnector::from(Arc::clone(config)).connect("proxy.test".try_into().expect("a name"), stream).await
}

/// The certificate that the proxy shows to a new connection.
async fn shown(proxy: &Proxy, config: &Arc<ClientConfig>) -> CertificateDer<'static> {
    let stream = connect(proxy, config).await.expect("a handshake");
    stream.get_ref().1.peer_certificates().expect("a certificate")[0].clone().into_owned()
}

/// One request over HTTP/1.1; the error's whole chain as text.
async fn exchange(
    proxy: &Proxy,
    config: &Arc<ClientConfig>,
    mut request: Request<Full<bytes::Bytes>>,
) -> Result<Reply, String> {
    let stream = connect(proxy, config).await.map_err(|error| error.to_string())?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(|error| format!("{error:?}"))?;
    tokio::spawn(connection);
    request.headers_mut().insert("host", "proxy.test".parse().expect("a host"));
    sender.send_request(request).await.map(Reply::of).map_err(|error| format!("{error:?}"))
}

/// A proxy with TLS before a mock.
async fn start(own: &Mock, server: ServerFiles) -> Proxy {
    Setup::new().own(own).tls(TlsFiles { server: Some(server), ..TlsFiles::default() }).start().await
}

#[tokio::test]
async fn both_versions_of_http_are_spoken_through_tls_and_the_probes_stay_plain() {
    let (own, authority, folder) = (Mock::start(Role::Decode), Authority::new(), Folder::new());
    let proxy = start(&own, folder.server(&authority.signs_now(), None)).await;
    let reply = exchange(&proxy, &client(&authority, None, "http/1.1"), completion(json!({"prompt": "a"}))).await;
    assert_eq!(reply.expect("an answer").text().await, JSON_ANSWER);
    let stream = connect(&proxy, &client(&authority, None, "h2")).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let body = json!({"prompt": "a", "stream": true});
    let answer = http2(stream).await.send_request(completion2(body)).await.expect("an answer");
    assert_eq!(Reply::of(answer).text().await, CLIENT_EVENTS);
    for path in [paths::HEALTH, paths::READY] {
        assert_eq!(proxy.admin(path).await.status, 200, "{path}");
    }
    // Plaintext on the port that speaks TLS gets no answer of HTTP.
    let mut plain = TcpStream::connect(&proxy.address).await.expect("a listening proxy");
    tokio::io::AsyncWriteExt::write_all(&mut plain, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("written");
    let mut answer = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut plain, &mut answer).await;
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
}

#[tokio::test]
async fn a_certificate_is_renewed_without_a_failed_request() {
    let (own, authority, folder) = (Mock::start(Role::Decode), Authority::new(), Folder::new());
    let first = authority.signs_now();
    let proxy = Arc::new(start(&own, folder.server(&first, None)).await);
    let config = client(&authority, None, "http/1.1");
    assert_eq!(shown(&proxy, &config).await, first.der().0[0]);
    // One answer is under way all the time.
    let go_on = Arc::new(Notify::new());
    own.decodes(Decode::Pauses(Arc::clone(&go_on)));
    let running = exchange(&proxy, &config, completion(json!({"prompt": "a", "stream": true}))).await;
    own.decodes(Decode::Answers);
    // And new connections with requests, one after the other.
    let (is_over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load = tokio::spawn({
        let (proxy, config) = (Arc::clone(&proxy), Arc::clone(&config));
        let (is_over, served) = (Arc::clone(&is_over), Arc::clone(&served));
        async move {
            while !is_over.load(Ordering::Relaxed) {
                let reply = exchange(&proxy, &config, completion(json!({"prompt": "a"}))).await;
                assert_eq!(reply.expect("an answer").status, 200);
                served.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    // A pair that can't be used changes nothing; the right one that follows does.
    folder.file("tls.crt", "rubbish");
    let before = served.load(Ordering::Relaxed);
    let more = async {
        while served.load(Ordering::Relaxed) < before + 10 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(WITHIN, more).await.expect("requests are served");
    let second = authority.signs_now();
    folder.server(&second, None);
    let renewed = async { while shown(&proxy, &config).await != second.der().0[0] {} };
    tokio::time::timeout(WITHIN, renewed).await.expect("the second certificate is shown");
    is_over.store(true, Ordering::Relaxed);
    load.await.expect("no request failed");
    go_on.notify_one();
    assert_eq!(running.expect("an answer").text().await, CLIENT_EVENTS);
}

/// The line of the metrics for a certificate that ends with the year before this one.
fn expiry(certificate: &str, until: i32) -> String {
    let timestamp = date_time_ymd(until, 1, 1).unix_timestamp();
    format!("baton_proxy_tls_certificate_expiry_timestamp_seconds{{use=\"{certificate}\"}} {timestamp}")
}

#[tokio::test]
async fn the_metrics_say_when_each_certificate_in_use_expires() {
    let (own, authority, folder) = (Mock::start(Role::Decode), Authority::new(), Folder::new());
    let server = Some(folder.server(&authority.signs(2997), None));
    let upstream = Some(folder.upstream(&authority, Some(&authority.signs(2998))));
    let proxy = Setup::new().own(&own).tls(TlsFiles { server, upstream, is_engine_tls: false }).start().await;
    proxy.metric(&expiry("server", 2997)).await;
    proxy.metric(&expiry("upstream", 2998)).await;
    // An expired one is not used, so what is used is what the metrics go on to say.
    let (expired, renewed) = (authority.signs(2021), authority.signs_now());
    folder.server(&expired, None);
    folder.upstream(&authority, Some(&renewed));
    proxy.metric(&expiry("upstream", 2999)).await;
    proxy.metric(&expiry("server", 2997)).await;
    folder.server(&renewed, None);
    proxy.metric(&expiry("server", 2999)).await;

    let plain = Setup::new().own(&own).start().await;
    let metrics = plain.admin(paths::METRICS).await.text().await;
    assert!(!metrics.contains("certificate_expiry_timestamp_seconds"), "{metrics}");
}

#[tokio::test]
async fn clients_need_a_certificate_of_the_right_authority_that_has_not_expired() {
    let (own, authority, folder) = (Mock::start(Role::Decode), Authority::new(), Folder::new());
    let (clients, strangers) = (Authority::new(), Authority::new());
    let proxy = start(&own, folder.server(&authority.signs_now(), Some(&clients))).await;
    let ask = async |identity: Option<&Pair>, alpn: &str| {
        exchange(&proxy, &client(&authority, identity, alpn), completion(json!({"prompt": "a"}))).await
    };
    assert_eq!(ask(Some(&clients.signs_now()), "http/1.1").await.expect("an answer").status, 200);
    let refused = async |identity: Option<&Pair>, expect: &str| {
        let error = ask(identity, "http/1.1").await.map(|reply| reply.status).expect_err("a refusal");
        assert!(error.contains(expect), "{error}");
    };
    refused(None, "CertificateRequired").await;
    refused(Some(&strangers.signs_now()), "UnknownCA").await;
    refused(Some(&clients.signs(2021)), "CertificateExpired").await;
    assert_eq!(own.count(paths::DECODE_LEG), 1);
    // Probes have no certificates.
    assert_eq!(proxy.admin(paths::READY).await.status, 200);
}

#[tokio::test]
async fn a_proxy_does_not_start_with_an_expired_certificate() {
    let (own, authority, folder) = (Mock::start(Role::Decode), Authority::new(), Folder::new());
    let server = folder.server(&authority.signs(2021), None);
    let config = Setup::new().own(&own).tls(TlsFiles { server: Some(server), ..TlsFiles::default() }).config();
    let error = App::build(config.0).await.map(drop).expect_err("a refusal");
    let BuildError::Tls(error) = error else { panic!("{error}") };
    assert!(error.to_string().contains("has expired") && error.to_string().contains("tls.crt"), "{error}");
}

/// A server of TLS before a worker that has none.
async fn tls_before(worker: &Mock, pair: &Pair, clients: Option<&Authority>) -> String {
    let (chain, key) = pair.der();
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.expect("versions");
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let verifier =
                rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(authority.roots()), provider());
            builder.with_client_cert_verifier(verifier.build().expect("an authority"))
        }
    };
    let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(chain, key).expect("a pair")));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let (address, worker) = (listener.local_addr().expect("bound").to_string(), worker.address.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, worker) = (acceptor.clone(), worker.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let Ok(mut worker) = TcpStream::connect(worker).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut worker).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn an_engine_is_dialled_with_tls_and_must_prove_who_it_is() {
    let (authority, strangers, clients) = (Authority::new(), Authority::new(), Authority::new());
    let identity = clients.signs_now();
    let check = async |engine: &Pair, identity: Option<&Pair>, serves: bool| {
        let mut own = Mock::start(Role::Decode);
        own.address = tls_before(&own, engine, Some(&clients)).await;
        let folder = Folder::new();
        let upstream = Some(folder.upstream(&authority, identity));
        let proxy = Setup::new().own(&own).tls(TlsFiles { server: None, upstream, is_engine_tls: true }).start().await;
        let reply = proxy.complete(json!({"prompt": "a"})).await;
        assert_eq!(reply.status, if serves { 200 } else { 503 });
        assert_eq!(own.count(paths::DECODE_LEG), usize::from(serves));
    };
    check(&authority.signs_now(), Some(&identity), true).await;
    check(&authority.signs_now(), None, false).await;
    check(&strangers.signs_now(), Some(&identity), false).await;
    check(&authority.signs(2021), Some(&identity), false).await;
}

#[tokio::test]
async fn two_pods_talk_to_each_other_with_certificates_on_both_sides() {
    let (own, authority, folder) = (Mock::start(Role::Decode), Authority::new(), Folder::new());
    let pair = authority.signs_now();
    let pod = start(&own, folder.server(&pair, Some(&authority))).await;
    let mut upstream = folder.upstream(&authority, Some(&pair));
    upstream.server_name = Some("proxy.test".into());
    let tls = TlsFiles { upstream: Some(upstream), ..TlsFiles::default() };
    let door = Setup::new().other(&pod.address).tls(tls).start().await;
    door.workers("the pod to be ready", |workers| workers.iter().all(|worker| worker["not_for_decode"].is_null()))
        .await;
    let reply = door.complete(json!({"prompt": "a", "stream": true})).await;
    assert_eq!(reply.text().await, CLIENT_EVENTS);
    assert_eq!(own.count(paths::DECODE_LEG), 1);
}
