//! The life of one worker: bind, load, serve, drain. The caller owns the configuration and the stop signal.
//!
//! HTTP answers from the first moment on, so that loading can be watched; work is taken once the model is loaded. Draining takes
//! nothing new, lets what runs finish, KV that is being fetched included, and then ends everything in the order in which it depends on
//! each other: requests, HTTP, KV port, engine.

use crate::config::Config;
use crate::engine_thread::EngineEnd;
use crate::http::{self, Identity, Worker};
use crate::lifecycle::Lifecycle;
use crate::load::{self, LoadedEngine, ModelError};
use crate::metrics::Metrics;
use crate::serving::Serving;
use crate::transfer::consumer::{Consumer, ConsumerConfig};
use crate::transfer::producer::{BlockTooLarge, Limits, Producer, ProducerConfig, Timing};
use baton_wire::Epoch;
use baton_wire::names::files::SIGNING_PUBLIC;
use baton_wire::signing::{self, KeyError};
use ed25519_dalek::VerifyingKey;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long connections and the KV port get to close once no request is left: their last bytes are on the way already.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Sockets that are bound and keys that are read: a worker that can start.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    http: TcpListener,
    kv: Option<BoundKv>,
}

#[derive(Debug)]
struct BoundKv {
    listener: TcpListener,
    key: VerifyingKey,
    advertised: SocketAddr,
}

/// Why a worker can't start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// There is no model where one should be.
    #[error(
        "--model {} is not a directory: give that of a model as it is published, with config.json, tokenizer.json and \
         *.safetensors",
        dir.display()
    )]
    NoModelDirectory {
        /// What was given.
        dir: PathBuf,
    },
    /// The key file can't be read.
    #[error(
        "--proxy-public-key-file {} can't be read: mount the Secret with the model's {SIGNING_PUBLIC} there (`baton keygen` makes one)",
        path.display()
    )]
    ReadKey {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The key file holds no key.
    #[error("--proxy-public-key-file {} holds no public key (`baton keygen` makes one)", path.display())]
    Key {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// A port can't be had.
    #[error("can't listen on {address} for {what}")]
    Listen {
        /// What for.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Why a worker ended without having been asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The model can't be served.
    #[error("can't serve the model in {}", dir.display())]
    Model {
        /// Its directory.
        dir: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<ModelError>,
    },
    /// Loading ended in a bug; the panic's message is in the log.
    #[error("loading the model in {} panicked", dir.display())]
    LoadPanicked {
        /// Its directory.
        dir: PathBuf,
    },
    /// The engine can't go on.
    #[error("the engine ended")]
    Engine(#[source] EngineEnd),
    /// The KV port's server ended.
    #[error("the KV port's server ended")]
    KvServer,
    /// The HTTP server ended.
    #[error("the HTTP server ended")]
    Http(#[source] std::io::Error),
}

impl Bound {
    /// Looks for the model, reads the key and binds both ports.
    ///
    /// # Errors
    /// [`BindError`] names the flag or the address.
    pub async fn new(config: Config) -> Result<Self, BindError> {
        if !config.model_dir.is_dir() {
            return Err(BindError::NoModelDirectory { dir: config.model_dir });
        }
        let key = config.kv.as_ref().map(|kv| read_key(&kv.proxy_public_key_file)).transpose()?;
        let http = listen("HTTP", config.http).await?;
        let kv = match config.kv.as_ref().zip(key) {
            None => None,
            Some((kv, key)) => {
                let listener = listen("KV", kv.listen).await?;
                let advertised = SocketAddr::new(kv.advertise, local_address(&listener).port());
                Some(BoundKv { listener, key, advertised })
            }
        };
        Ok(Bound { config, http, kv })
    }

    /// Where HTTP is reached: the port is the one that was found where 0 was asked for.
    pub fn http_address(&self) -> SocketAddr {
        local_address(&self.http)
    }

    /// Serves until `drain` is cancelled and what runs then has finished.
    ///
    /// # Errors
    /// When the worker can't go on.
    pub async fn run(self, drain: CancellationToken) -> Result<(), RunError> {
        let Bound { config, http: listener, kv } = self;
        let role = config.role;
        let metrics = Arc::new(Metrics::new(role, &config.revision, &config.served_model_name));
        let worker = Arc::new(Worker {
            identity: Identity {
                role,
                revision: config.revision.clone(),
                epoch: random_epoch(),
                model: config.served_model_name.clone(),
                kv_address: kv.as_ref().map(|kv| kv.advertised.to_string()),
            },
            lifecycle: Lifecycle::loading(),
            metrics,
            serving: OnceLock::new(),
        });
        tracing::info!(%role, epoch = %worker.identity.epoch, http = %local_address(&listener), "listening");

        let closing = CancellationToken::new();
        let mut server = tokio::spawn(http::serve(listener, worker.clone(), closing.clone()));

        let loading = tokio::task::spawn_blocking({
            let (config, lifecycle, metrics) = (config.clone(), worker.lifecycle.clone(), worker.metrics.clone());
            move || load::load(&config, &lifecycle, metrics)
        });
        let loaded = tokio::select! {
            loaded = loading => loaded.map_err(|_| RunError::LoadPanicked { dir: config.model_dir.clone() })?,
            () = drain.cancelled() => return Ok(()),
            ended = &mut server => return Err(RunError::Http(server_error(ended))),
        };
        let fail = |source: ModelError| RunError::Model { dir: config.model_dir.clone(), source: Box::new(source) };
        let loaded = loaded.map_err(fail)?;
        let stop = Stop { cut_off: CancellationToken::new(), closing };
        let started = start(&worker, loaded, kv, &stop).map_err(|error| fail(error.into()))?;
        let Started { serving, mut kv_server, engine_end } = started;
        // The lifecycle's `ready` is what lets requests look for it.
        worker.serving.set(serving).expect("set once, here");
        worker.lifecycle.ready();
        tracing::info!("ready");

        let outcome = tokio::select! {
            () = drain.cancelled() => Ok(()),
            end = engine_end => Err(RunError::Engine(engine_error(end))),
            ended = &mut server => return Err(RunError::Http(server_error(ended))),
            () = ended(&mut kv_server) => return Err(RunError::KvServer),
        };
        if outcome.is_ok() {
            finish_what_runs(&worker.lifecycle, config.drain_timeout, &stop.cut_off).await;
        }
        stop.closing.cancel();
        let closed = async {
            // How they end makes no difference any more.
            let _ = server.await;
            if let Some(server) = kv_server {
                let _ = server.await;
            }
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::info!("some connections did not close in time");
        }
        outcome
    }
}

/// Ends what serves, in this order.
struct Stop {
    /// Requests that still run.
    cut_off: CancellationToken,
    /// HTTP connections and the KV port.
    closing: CancellationToken,
}

/// What runs once the model is loaded.
struct Started {
    serving: Arc<Serving>,
    kv_server: Option<JoinHandle<()>>,
    engine_end: oneshot::Receiver<Result<(), EngineEnd>>,
}

/// Puts together what requests are served with, and opens the KV port.
fn start(worker: &Worker, loaded: LoadedEngine, kv: Option<BoundKv>, stop: &Stop) -> Result<Started, BlockTooLarge> {
    let epoch = worker.identity.epoch;
    let LoadedEngine { facts, eos, tokenizer, fingerprint, pool, engine, end } = loaded;
    let consumer = ConsumerConfig { epoch, fingerprint, timing: Timing::default() };
    let consumer = Consumer::new(consumer, pool.clone())?;
    let (producer, kv_server) = match kv {
        None => (None, None),
        Some(BoundKv { listener, key, advertised: _ }) => {
            let config = ProducerConfig {
                epoch,
                fingerprint,
                verifying_key: key,
                timing: Timing::default(),
                limits: Limits::default(),
            };
            let producer = Producer::new(config, pool)?;
            let serving = producer.clone();
            let closing = stop.closing.clone();
            let server = tokio::spawn(async move { serving.serve(listener, closing).await });
            (Some(producer), Some(server))
        }
    };
    let serving = Serving {
        facts,
        eos,
        tokenizer,
        renders: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
        engine,
        fingerprint,
        producer,
        consumer,
        metrics: worker.metrics.clone(),
        cut_off: stop.cut_off.clone(),
    };
    Ok(Started { serving: Arc::new(serving), kv_server, engine_end: end })
}

/// Takes nothing new and waits for what runs, but not for ever.
async fn finish_what_runs(lifecycle: &Lifecycle, timeout: Duration, cut_off: &CancellationToken) {
    lifecycle.drain();
    tracing::info!(requests = lifecycle.in_flight(), timeout_seconds = timeout.as_secs(), "draining");
    if tokio::time::timeout(timeout, lifecycle.idle()).await.is_err() {
        tracing::warn!(requests = lifecycle.in_flight(), "the drain's time is over: what still runs is cut off");
        cut_off.cancel();
        // They only have to say so to their clients.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, lifecycle.idle()).await;
    }
}

/// How the KV port's server ended; never, where there is none.
async fn ended(server: &mut Option<JoinHandle<()>>) {
    match server {
        // A panic is as much an end as any other.
        Some(server) => drop(server.await),
        None => std::future::pending().await,
    }
}

/// The thread says how it ended unless it was killed by what should not panic.
fn engine_error(end: Result<Result<(), EngineEnd>, oneshot::error::RecvError>) -> EngineEnd {
    match end {
        Ok(Err(end)) => end,
        Ok(Ok(())) | Err(_) => EngineEnd::Panicked,
    }
}

fn server_error(ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> std::io::Error {
    match ended {
        Ok(Err(error)) => error,
        Ok(Ok(())) => std::io::Error::other("it returned though nobody had asked it to"),
        Err(error) => std::io::Error::other(error),
    }
}

fn read_key(path: &Path) -> Result<VerifyingKey, BindError> {
    let text = std::fs::read_to_string(path).map_err(|source| BindError::ReadKey { path: path.to_owned(), source })?;
    signing::parse_verifying_key(&text).map_err(|source| BindError::Key { path: path.to_owned(), source })
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError::Listen { what, address, source })
}

fn local_address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound socket has an address")
}

fn random_epoch() -> Epoch {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has random numbers once it has started");
    Epoch(bytes)
}
