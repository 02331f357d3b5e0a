//! From a configuration to a running proxy, and to its end: build, serve, drain.

use crate::config::{Config, PolicySource};
use crate::discovery::{self, Source};
use crate::drain::Shutdown;
use crate::http::{admin, proxy_port, serve::serve};
use crate::plan::Policy;
use crate::policy_file::{self, PolicyFileError};
use crate::proxy::Proxy;
use crate::workers::{Workers, poll};
use baton_wire::names::files::SIGNING_KEY;
use baton_wire::signing::{self, KeyError};
use std::collections::BTreeSet;
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
    routing: Routing,
    drain_timeout: Duration,
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

impl App {
    /// Reads the key and binds the ports.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub async fn build(config: Config) -> Result<Self, BuildError> {
        let Config {
            listen,
            admin_listen,
            engine,
            endpoints_file,
            discover_dns,
            signing_key_file: file,
            revision,
            policy,
            limits,
            drain_timeout,
            log_format: _,
        } = config;
        let key = match tokio::fs::read_to_string(&file).await {
            Ok(text) => signing::parse_signing_key(&text).map_err(|source| BuildError::Key { file, source })?,
            Err(source) => return Err(BuildError::ReadKey { file, source }),
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
        let workers = Arc::new(Workers::new(engine));
        let proxy = Arc::new(Proxy::new(revision, current, limits, key, workers));
        let sources = endpoints_file.map(Source::File).into_iter().chain(discover_dns.into_iter().map(Source::Dns));
        let routing = Routing { file, policy };
        Ok(App { proxy, listener, admin_listener, sources: sources.collect(), routing, drain_timeout })
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
        let App { proxy, listener, admin_listener, sources, routing, drain_timeout } = self;
        let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
        let (peers, listed) = watch::channel(BTreeSet::new());
        let key = proxy.key.verifying_key();
        let _polling = AbortOnDropHandle::new(tokio::spawn(poll::run(Arc::clone(&proxy.workers), key, listed)));
        let _discovery = AbortOnDropHandle::new(tokio::spawn(discovery::watch(sources, peers)));
        let Routing { file, policy } = routing;
        let _routing = file.map(|file| AbortOnDropHandle::new(tokio::spawn(policy_file::follow(file, policy))));
        let service = {
            let proxy = Arc::clone(&proxy);
            move |request| proxy_port(Arc::clone(&proxy), request)
        };
        let admin_service = {
            let proxy = Arc::clone(&proxy);
            move |request| admin::admin_port(Arc::clone(&proxy), request)
        };
        let _port =
            AbortOnDropHandle::new(tokio::spawn(serve(listener, service, closing.clone(), connections.clone())));
        let _admin = AbortOnDropHandle::new(tokio::spawn(serve(
            admin_listener,
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
