//! From a configuration to a running proxy, and to its end: build, serve, drain.

use crate::address::Address;
use crate::api_keys::{self, ApiKeys, ApiKeysError, SaltSecret};
use crate::config::{Config, EndpointSlices, Engine, KvEvents, PolicySource};
use crate::connector::Connector;
use crate::discovery::{self, Source};
use crate::drain::Shutdown;
use crate::entropy;
use crate::estimate::Policy;
use crate::http::{admin, proxy_port, serve::serve};
use crate::kv_events;
use crate::metrics::Certificate;
use crate::policy_file::{self, PolicyFileError};
use crate::proxy::{Proxy, Settings};
use crate::tls::reload::{self, Current, Follower};
use crate::tls::{ServerFiles, TlsError, TlsFiles, UpstreamFiles};
use crate::upstream::{ClientTls, Transport, Transports};
use crate::workers::probe::Probe;
use crate::workers::{Workers, poll};
use baton_wire::Epoch;
use baton_wire::names::files::SIGNING_KEY;
use baton_wire::signing::{self, KeyError};
use ed25519_dalek::SigningKey;
use rustls::ServerConfig;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// How long connections may take, once nothing is under way any more, to hand their last bytes to the network.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// A proxy that is built and listens, and serves nobody yet.
#[derive(Debug)]
pub struct App {
    proxy: Arc<Proxy>,
    listener: TcpListener,
    admin_listener: TcpListener,
    sources: Vec<Source>,
    probes: BTreeMap<Address, Probe>,
    routing: Routing,
    kv_events: KvEvents,
    tls: Tls,
    keys: Option<KeyFile>,
    drain_timeout: Duration,
}

/// Where clients' keys stand, and those that are good now.
#[derive(Debug)]
struct KeyFile {
    file: PathBuf,
    secret: SaltSecret,
    keys: watch::Sender<Arc<ApiKeys>>,
}

/// Certificates, and what keeps them as their files have them.
#[derive(Debug, Default)]
struct Tls {
    server: Option<(Current<ServerConfig>, Follower<ServerFiles>)>,
    upstream: Option<Follower<UpstreamFiles>>,
}

impl Tls {
    /// Reads all files once; also says how workers are reached.
    async fn open(files: TlsFiles) -> Result<(Self, Transports), TlsError> {
        let TlsFiles { server, upstream, is_engine_tls } = files;
        let mut tls = Tls::default();
        if let Some(files) = server {
            tls.server = Some(reload::open(files).await?);
        }
        let Some(files) = upstream else { return Ok((tls, Transports::default())) };
        let server_name = files.server_name()?;
        let (current, follower) = reload::open(files).await?;
        tls.upstream = Some(follower);
        let peers = Transport::Tls(ClientTls { current, server_name });
        let own = if is_engine_tls { peers.clone() } else { Transport::Plain };
        Ok((tls, Transports { own, peers }))
    }
}

/// How the policy changes while requests are served.
#[derive(Debug)]
struct Routing {
    /// None where flags have said it once and for all.
    file: Option<PathBuf>,
    policy: watch::Sender<Policy>,
}

/// Why a right configuration can't be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The key file can't be read.
    #[error(
        "--signing-key-file {} can't be read: mount the Secret with the model's {SIGNING_KEY} there (`baton keygen` makes one)",
        file.display()
    )]
    ReadKey {
        /// Which file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The key file holds no key.
    #[error("--signing-key-file {} holds no key (`baton keygen` makes one)", file.display())]
    Key {
        /// Which file.
        file: PathBuf,
        /// What it holds.
        #[source]
        source: KeyError,
    },
    /// The routing file says no policy.
    #[error("--routing-file {} is not used", file.display())]
    Policy {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        source: PolicyFileError,
    },
    /// The API keys' file is missing or wrong.
    #[error("--api-keys-file can't be used")]
    ApiKeys(#[source] ApiKeysError),
    /// TLS was asked for and can't be had.
    #[error("TLS can't be set up")]
    Tls(#[source] TlsError),
    /// A port can't be listened on.
    #[error("can't listen on {address}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All that was under way was completed.
    Drained,
    /// Requests were cut off: the drain took too long, or a second signal asked for the end.
    Cut,
}

async fn read_key(file: PathBuf) -> Result<SigningKey, BuildError> {
    match tokio::fs::read_to_string(&file).await {
        Ok(text) => signing::parse_signing_key(&text).map_err(|source| BuildError::Key { file, source }),
        Err(source) => Err(BuildError::ReadKey { file, source }),
    }
}

/// How engines that are not ours are asked how they are. This pod's has an identity of this process's making, and so has each of
/// the others: engines themselves have none.
fn probes(connector: Connector, own: Vec<Engine>, direct: Vec<Engine>, revision: &str) -> BTreeMap<Address, Probe> {
    if connector == Connector::Baton {
        return BTreeMap::new();
    }
    let probe = |engine: Engine| {
        let epoch = Epoch(entropy::transfer_id().0);
        (engine.address.clone(), Probe::new(connector, engine, revision, epoch))
    };
    own.into_iter().chain(direct).map(probe).collect()
}

impl App {
    /// Reads the key and binds the ports.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub async fn build(config: Config) -> Result<Self, BuildError> {
        let Config {
            listen,
            admin_listen,
            connector,
            engine,
            direct,
            tls,
            endpoints_file,
            discover_dns,
            endpoint_slices,
            signing_key_file,
            revision,
            policy,
            resilience,
            selection,
            kv_events,
            api_keys_file,
            prefiller_header,
            trust_routing_hints,
            limits,
            drain_timeout,
            threads: _,
            log_format: _,
        } = config;
        let key = match signing_key_file {
            Some(file) => read_key(file).await?,
            // Nobody else has this key, and there is nobody to have it.
            None => SigningKey::from_bytes(&entropy::key()),
        };
        let (file, policy) = match policy {
            PolicySource::Flags(policy) => (None, policy),
            PolicySource::File(file) => match policy_file::read(&file).await {
                Ok(policy) => (Some(file), policy),
                Err(source) => return Err(BuildError::Policy { file, source }),
            },
        };
        let (policy, current) = watch::channel(policy);
        let bind =
            async |address| TcpListener::bind(address).await.map_err(|source| BuildError::Listen { address, source });
        let (listener, admin_listener) = (bind(listen).await?, bind(admin_listen).await?);
        let (tls, transports) = Tls::open(tls).await.map_err(BuildError::Tls)?;
        let own = engine.as_ref().map(|engine| engine.address.clone());
        let workers = Arc::new(Workers::over(transports, own, &direct));
        let probes = probes(connector, engine.into_iter().collect(), direct, &revision);
        let settings =
            Settings { revision, connector, resilience, selection, prefiller_header, trust_routing_hints, limits };
        let secret = SaltSecret::derive(key.as_bytes());
        let (keys, good) = match api_keys_file {
            None => (None, None),
            Some(file) => {
                let (keys, good) =
                    watch::channel(Arc::new(api_keys::load(&file, &secret).await.map_err(BuildError::ApiKeys)?));
                (Some(KeyFile { file, secret, keys }), Some(good))
            }
        };
        let proxy = Arc::new(Proxy::new(settings, current, good, key, workers));
        let slices = endpoint_slices.into_iter().flat_map(|EndpointSlices { services, api }| {
            services.into_iter().map(move |service| Source::EndpointSlices(service, api.clone()))
        });
        let names = discover_dns.into_iter().map(Source::Dns);
        let sources = endpoints_file.map(Source::File).into_iter().chain(names).chain(slices);
        let routing = Routing { file, policy };
        Ok(App {
            proxy,
            listener,
            admin_listener,
            sources: sources.collect(),
            probes,
            routing,
            kv_events,
            tls,
            keys,
            drain_timeout,
        })
    }

    /// Where it listens: for clients and peers, and for the admin port.
    ///
    /// # Errors
    /// When the system does not know.
    pub fn addresses(&self) -> std::io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.listener.local_addr()?, self.admin_listener.local_addr()?))
    }

    /// Serves until it is asked to drain, and then until nothing is under way.
    pub async fn serve(self, shutdown: Shutdown) -> Ended {
        let App { proxy, listener, admin_listener, sources, probes, routing, kv_events, tls, keys, drain_timeout } =
            self;
        let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
        let (peers, listed) = watch::channel(BTreeSet::new());
        let key = proxy.key.clone();
        let _polling = AbortOnDropHandle::new(tokio::spawn(poll::run(Arc::clone(&proxy.workers), key, probes, listed)));
        let _discovery = AbortOnDropHandle::new(tokio::spawn(discovery::watch(sources, peers)));
        let _following = AbortOnDropHandle::new(tokio::spawn(kv_events::follow::run(Arc::clone(&proxy), kv_events)));
        let Routing { file, policy } = routing;
        let _routing = file.map(|file| AbortOnDropHandle::new(tokio::spawn(policy_file::follow(file, policy))));
        let _keys = keys.map(|KeyFile { file, secret, keys }| {
            AbortOnDropHandle::new(tokio::spawn(api_keys::follow(file, secret, keys)))
        });
        let Tls { server, upstream } = tls;
        let tell = |certificate| {
            let proxy = Arc::clone(&proxy);
            move |expires_unix_seconds| proxy.metrics.certificate_expires(certificate, expires_unix_seconds)
        };
        let _upstream_tls =
            upstream.map(|files| AbortOnDropHandle::new(tokio::spawn(files.follow(tell(Certificate::Upstream)))));
        let (tls, server_files) = server.unzip();
        let _tls =
            server_files.map(|files| AbortOnDropHandle::new(tokio::spawn(files.follow(tell(Certificate::Server)))));
        let service = {
            let proxy = Arc::clone(&proxy);
            move |request| proxy_port(Arc::clone(&proxy), request)
        };
        let admin_service = {
            let proxy = Arc::clone(&proxy);
            move |request| admin::admin_port(Arc::clone(&proxy), request)
        };
        let _port =
            AbortOnDropHandle::new(tokio::spawn(serve(listener, tls, service, closing.clone(), connections.clone())));
        let _admin = AbortOnDropHandle::new(tokio::spawn(serve(
            admin_listener,
            // Probes and scrapers come without certificates, and nothing here is for clients.
            None,
            admin_service,
            closing.clone(),
            connections.clone(),
        )));

        shutdown.drain.cancelled().await;
        tracing::info!("draining: nothing new is taken, what runs is finished");
        proxy.drain.begin();
        let ended = tokio::select! {
            () = proxy.drain.finished() => Ended::Drained,
            () = tokio::time::sleep(drain_timeout) => Ended::Cut,
            () = shutdown.stop.cancelled() => Ended::Cut,
        };
        closing.cancel();
        connections.close();
        if ended == Ended::Drained {
            // Only the last bytes of finished answers are waited for; idle connections end at once.
            let flushed = tokio::time::timeout(FLUSH_TIMEOUT, connections.wait());
            tokio::select! {
                _ = flushed => {}
                () = shutdown.stop.cancelled() => {}
            }
        }
        tracing::info!(?ended, "ended");
        ended
    }
}
