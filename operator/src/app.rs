//! The operator's process: from a configuration to the end of everything that it started.

use crate::client;
use crate::cluster::Cluster;
use crate::config::{Config, Election};
use crate::controller::{self, Context};
use crate::events::Recorder;
use crate::fence::{BootClock, Clock, Fence};
use crate::http::{self, Health};
use crate::lease::{Beat, Campaign, Elector, Standing};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::progress::ProgressReader;
use crate::queue::Queue;
use crate::site::{OptionalKind, Site};
use crate::triggers::{Synced, Watches};
use kube::{Api, Client};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long reconciles that run may go on after SIGTERM: they take well under a second, and the pod's grace period is 30 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(15);
/// Time between two looks whether the cluster knows DisaggregatedModels, from the first to the longest.
const DEFINITION_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// Triggers and due models that may wait. Both are taken at once; a full channel only slows the watches down.
const CHANNEL: usize = 1024;

/// How the process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As it was asked to, with nothing left running.
    Drained,
    /// As it was asked to, but a reconcile was cut off.
    Cut,
    /// Another replica may lead by now.
    LeaseLost,
}

/// Why the process can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No cluster.
    #[error("no cluster to work on, neither as a pod nor by KUBECONFIG: {0}")]
    NoCluster(#[source] Box<kube::Error>),
    /// The cluster's configuration can't be used.
    #[error("can't make a client for the cluster: {0}")]
    Client(#[source] Box<kube::Error>),
    /// The port is taken.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A process that is ready to run.
pub struct App {
    config: Config,
    listener: TcpListener,
    health: Arc<Health>,
    fence: Fence,
    clock: Arc<dyn Clock>,
    standing: watch::Sender<Standing>,
    metrics: Arc<Metrics>,
    /// Behind the fence.
    client: Client,
    /// For the lease alone.
    lease_client: Client,
    namespace: String,
}

impl App {
    /// Binds the admin port and makes the clients; asks the cluster nothing yet.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn build(config: Config) -> Result<Self, StartError> {
        let cluster = kube::Config::infer().await;
        let cluster = cluster.map_err(|error| StartError::NoCluster(Box::new(kube::Error::InferConfig(error))))?;
        Self::on(cluster, config).await
    }

    /// The same on a cluster that is given.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn on(cluster: kube::Config, config: Config) -> Result<Self, StartError> {
        let address = config.admin_listen;
        let listener = TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })?;
        let metrics = Arc::new(Metrics::new());
        let clock: Arc<dyn Clock> = Arc::new(BootClock);
        let unfenced = Fence::without_election();
        let fence = if config.election.is_some() { Fence::closed(clock.clone()) } else { unfenced.clone() };
        let connect = |fence: &Fence| {
            client::connect(&cluster, fence, &metrics).map_err(|error| StartError::Client(Box::new(error)))
        };
        let (client, lease_client) = (connect(&fence)?, connect(&unfenced)?);
        let namespace = config.namespace.clone().unwrap_or(cluster.default_namespace);
        let (standing, receiver) = watch::channel(Standing::Standby);
        let health = Arc::new(Health {
            clock: clock.clone(),
            lease: Arc::default(),
            queue: Arc::default(),
            standing: receiver,
            definition: false.into(),
            synced: Arc::default(),
            metrics: metrics.clone(),
        });
        Ok(App { config, listener, health, fence, clock, standing, metrics, client, lease_client, namespace })
    }

    /// Where the admin port is, after binding.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn admin_address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `stop` is cancelled or the lease is lost.
    pub async fn run(self, stop: CancellationToken) -> Ended {
        let App { config, listener, health, fence, clock, standing, metrics, client, lease_client, namespace } = self;
        let end = CancellationToken::new();
        let admin = tokio::spawn(http::serve(listener, health.clone(), end.clone()));
        let mut standing_now = standing.subscribe();
        let release = CancellationToken::new();
        let campaign = match &config.election {
            Some(Election { lease }) => {
                let campaign = Campaign {
                    api: Api::namespaced(lease_client, &namespace),
                    name: lease.clone(),
                    elector: Elector::new(config.identity.clone()),
                    fence: fence.clone(),
                    clock: clock.clone(),
                };
                tracing::info!(lease, namespace, identity = config.identity, "asking for the lease");
                Some(tokio::spawn(campaign.run(standing, health.lease.clone(), release.clone())))
            }
            None => {
                standing.send_replace(Standing::Leading);
                // Kept, because a channel whose sender is gone tells no standing.
                Some(tokio::spawn(async move { standing.closed().await }))
            }
        };
        let lost = {
            let mut standing = standing_now.clone();
            async move {
                // An error means that the campaign is over, and that is for others to wait for.
                if standing.wait_for(|standing| *standing == Standing::Lost).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let work = async {
            tokio::select! {
                leads = standing_now.wait_for(|standing| *standing == Standing::Leading) => {
                    if leads.is_err() {
                        return Ended::LeaseLost;
                    }
                }
                () = stop.cancelled() => return Ended::Drained,
            }
            metrics.leader.set(1);
            tracing::info!("leading");
            let leader =
                Leader { config: &config, client, fence, namespace, health: &health, metrics: &metrics, clock: &clock };
            leader.lead(&stop).await
        };
        let ended = tokio::select! {
            biased;
            () = lost => Ended::LeaseLost,
            ended = work => ended,
        };
        metrics.leader.set(0);
        if ended == Ended::LeaseLost {
            tracing::error!("the lease is lost, another replica may write by now: ending");
        } else {
            release.cancel();
            if config.election.is_some() {
                join(campaign).await;
            }
        }
        end.cancel();
        join(Some(admin)).await;
        ended
    }
}

async fn join<T>(task: Option<JoinHandle<T>>) {
    if let Some(task) = task
        && let Err(error) = task.await
    {
        tracing::error!(%error, "a task did not end by itself");
    }
}

/// What the replica that leads does.
struct Leader<'a> {
    config: &'a Config,
    client: Client,
    fence: Fence,
    namespace: String,
    health: &'a Arc<Health>,
    metrics: &'a Arc<Metrics>,
    clock: &'a Arc<dyn Clock>,
}

impl Leader<'_> {
    async fn lead(self, stop: &CancellationToken) -> Ended {
        let cluster = Cluster::new(self.client.clone());
        let kinds = tokio::select! {
            kinds = self.kinds(&cluster) => kinds,
            () = stop.cancelled() => return Ended::Drained,
        };
        let memory = Arc::new(Memory::new(self.metrics.clone()));
        let (trigger, triggers) = mpsc::channel(CHANNEL);
        let (due, mut dues) = mpsc::channel(CHANNEL);
        let places = self.config.places.each().len();
        let queue = Queue::new(places, triggers, due, memory.clone(), self.metrics.clone());
        let store = queue.store();
        let queue = tokio::spawn(queue.run());
        let (kinds, kinds_now) = watch::channel(kinds);
        let synced: &Arc<Synced> = &self.health.synced;
        let watches = Watches::start(&cluster, &self.config.places, &trigger, kinds, synced, self.metrics);
        tracing::info!(watches = watches.count(), places = ?self.config.places, "watching");
        let beat: Arc<Beat> = self.health.queue.clone();
        let context = Arc::new(Context {
            site: Site {
                worker_image: self.config.worker_image.clone(),
                proxy_image: self.config.proxy_image.clone(),
                kinds: BTreeSet::new(),
                operator_namespace: Some(self.namespace.clone()),
            },
            recorder: Recorder::new(self.client.clone(), &self.config.identity),
            cluster,
            kinds: kinds_now,
            progress: ProgressReader::new(baton_wire::names::ports::ADMIN),
            fence: self.fence.clone(),
            memory,
            metrics: self.metrics.clone(),
            beat,
            clock: self.clock.clone(),
        });
        let stopped = stop.clone().cancelled_owned();
        let dues = futures_util::stream::poll_fn(move |context| dues.poll_recv(context));
        let dues = futures_util::StreamExt::take_until(dues, stopped);
        let mut reconciles = tokio::spawn(controller::run(store, dues, context));
        tokio::select! {
            result = &mut reconciles => {
                // It ends when its queue does: by a stop, else by a bug that the log has.
                if let Err(error) = result {
                    tracing::error!(%error, "reconciling ended");
                }
                return if stop.is_cancelled() { Ended::Drained } else { Ended::Cut };
            }
            () = stop.cancelled() => {}
        }
        tracing::info!("stopping: what runs is finished");
        // No more triggers; the reconciles that run go on.
        drop(watches);
        drop(trigger);
        let finished = tokio::time::timeout(DRAIN_TIMEOUT, reconciles).await.is_ok();
        queue.abort();
        if finished { Ended::Drained } else { Ended::Cut }
    }

    /// Waits until the cluster knows DisaggregatedModels, and has said which optional kinds it knows.
    async fn kinds(&self, cluster: &Cluster) -> BTreeSet<OptionalKind> {
        let (mut pause, longest) = DEFINITION_PAUSE;
        loop {
            match cluster.knows_models().await {
                Ok(true) => match cluster.optional_kinds().await {
                    Ok(kinds) => {
                        self.health.definition.store(true, Ordering::Relaxed);
                        return kinds;
                    }
                    Err(error) => tracing::warn!(%error, again = ?pause, "can't ask which kinds the cluster has"),
                },
                Ok(false) => tracing::error!(
                    again = ?pause,
                    "the cluster has no DisaggregatedModel: install the CRD disaggregatedmodels.baton.dev",
                ),
                Err(error) => {
                    tracing::warn!(%error, again = ?pause, "can't ask whether the cluster has DisaggregatedModel")
                }
            }
            tokio::time::sleep(crate::lease::jittered(pause)).await;
            pause = (pause * 2).min(longest);
        }
    }
}
