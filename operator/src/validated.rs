//! A manifest after validation: types that cannot be wrong, so that nothing after them checks again.

use baton_crds::{DiscoveryMode, Dtype, RoutingMode};
use k8s_openapi::api::core::v1::{EnvVar, Toleration, Volume, VolumeMount};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::Serialize;
use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

/// A manifest after validation.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// `metadata.name`: at most 30 characters, a DNS label.
    pub name: String,
    /// The model's name towards clients.
    pub served_name: String,
    /// Where the model directory is.
    pub source: ModelSource,
    /// What computes.
    pub engine: Engine,
    /// Number format; the model's own where absent.
    pub dtype: Option<Dtype>,
    /// Longest sequence in tokens; the model's own limit where absent.
    pub max_model_length: Option<NonZeroU32>,
    /// Which prompts are handed over, with the role that computes them.
    pub disaggregation: Disaggregation,
    /// The role that generates; without disaggregation it serves both phases.
    pub decode: RoleSettings,
    /// Where clients' requests enter.
    pub routing: Routing,
    /// How routing proxies find the model's pods.
    pub discovery: DiscoveryMode,
    /// How near each other the roles' pods are put.
    pub colocation: Option<Colocation>,
    /// Whether traffic between pods is restricted.
    pub network_policy: bool,
    /// Whether pods are scraped by way of a PodMonitor.
    pub monitor: Monitor,
}

/// Where a model directory is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum ModelSource {
    /// A path on a PersistentVolumeClaim of the same namespace.
    Claim {
        /// The claim's name.
        claim: String,
        /// Path below the volume's root, without a leading slash; empty for the root itself.
        path: String,
    },
    /// Files in an image, mounted as an image volume.
    Image {
        /// The image's reference, without the scheme.
        reference: String,
        /// Secret with which it is pulled.
        #[serde(skip)]
        pull_secret: Option<String>,
    },
    /// Downloaded into a cache volume before the engine starts.
    Download(Download),
}

/// A model that is downloaded before the engine starts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Download {
    /// `hf://ORG/REPO` or `s3://BUCKET/PREFIX`.
    pub uri: String,
    /// Branch, tag or commit, where the source has such.
    pub revision: Option<String>,
    /// Where the service is, when it is not the public one.
    pub endpoint: Option<String>,
    /// Region of the service, where it has such.
    pub region: Option<String>,
    /// Secret whose keys become the download's environment. Not part of the revision: a renewed password replaces no pod.
    #[serde(skip)]
    pub credentials_secret: Option<String>,
    /// Where the files are kept.
    pub cache: Cache,
}

/// Where downloaded files are kept.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Cache {
    /// With the pod.
    EmptyDir {
        /// Most bytes, as a quantity.
        size_limit: Option<Quantity>,
    },
    /// On a volume that pods share.
    Claim {
        /// The claim's name.
        claim: String,
    },
}

/// What computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Engine {
    /// Which program.
    pub kind: EngineKind,
    /// Its image; the installation's own where absent, which only Baton's engine has.
    pub image: Option<String>,
    /// Further arguments, after ours.
    pub args: Vec<String>,
}

/// Which program computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum EngineKind {
    /// Baton's own worker.
    Baton,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
}

/// Which prompts are handed over. The prefill role exists only where there is something for it to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Disaggregation {
    /// Every prompt.
    Always {
        /// The role that reads prompts.
        prefill: RoleSettings,
    },
    /// Prompts with enough uncached tokens.
    Conditional {
        /// The role that reads prompts.
        prefill: RoleSettings,
        /// From how many uncached tokens on.
        min_uncached_prompt_tokens: NonZeroU32,
    },
    /// None: decode workers serve both phases.
    Never,
}

impl Disaggregation {
    /// The role that reads prompts, where there is one.
    pub fn prefill(&self) -> Option<&RoleSettings> {
        match self {
            Disaggregation::Always { prefill } | Disaggregation::Conditional { prefill, .. } => Some(prefill),
            Disaggregation::Never => None,
        }
    }
}

/// One role's workers.
#[derive(Clone, Debug, PartialEq)]
pub struct RoleSettings {
    /// How many.
    pub replicas: Replicas,
    /// Pods of one replica; more than one makes it a LeaderWorkerSet.
    pub nodes_per_replica: NonZeroU32,
    /// Memory of one worker's KV cache.
    pub kv_cache_bytes: NonZeroU64,
    /// Most tokens in one step.
    pub max_batch_tokens: NonZeroU32,
    /// Most sequences that run at once.
    pub max_sequences: NonZeroU32,
    /// Longest piece of a prompt in one step; a multiple of a KV block.
    pub prefill_chunk_tokens: NonZeroU32,
    /// How long a worker may take to finish what it has.
    pub drain_timeout: Duration,
    /// Pods of the role that a voluntary disruption (a node's drain, say) may take at once.
    pub max_unavailable: u32,
    /// Where and as what its pods run.
    pub pod: PodSettings,
}

/// Who says how many replicas there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replicas {
    /// The manifest.
    Fixed(NonZeroU32),
    /// Somebody else: an autoscaler, or a person with `kubectl scale`.
    External,
}

impl Replicas {
    /// The manifest's number, where it is the manifest that says.
    pub fn fixed(self) -> Option<NonZeroU32> {
        match self {
            Replicas::Fixed(count) => Some(count),
            Replicas::External => None,
        }
    }
}

/// Where and as what a role's pods run. All of it goes into the pods as it stands, and so into the revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PodSettings {
    /// The engine container's requests.
    pub requests: BTreeMap<String, Quantity>,
    /// The engine container's limits, GPUs included.
    pub limits: BTreeMap<String, Quantity>,
    /// Devices by dynamic resource allocation.
    pub resource_claims: Vec<ResourceClaim>,
    /// Labels that a node must have, the GPU's class included.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    pub tolerations: Vec<Toleration>,
    /// How the role's pods are spread.
    pub topology_spread: Vec<TopologySpread>,
    /// Priority class.
    pub priority_class: Option<String>,
    /// Runtime class.
    pub runtime_class: Option<String>,
    /// Further environment of the engine container.
    pub env: Vec<EnvVar>,
    /// Further volumes.
    pub volumes: Vec<Volume>,
    /// Where the engine container mounts them.
    pub volume_mounts: Vec<VolumeMount>,
    /// Laid over the pod template last.
    pub template: Option<PodTemplate>,
}

/// A user's overlay of the pod template, as the manifest has it. That it reads as a pod template, and that it leaves alone what
/// identifies a pod (our labels, our containers' names and ports), was checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct PodTemplate(pub serde_json::Value);

/// A device claim of each pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ResourceClaim {
    /// The claim's name within the pod.
    pub name: String,
    /// What it refers to.
    pub source: ClaimSource,
}

/// What a device claim refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ClaimSource {
    /// One claim that all pods share.
    Claim(String),
    /// A claim made for each pod.
    Template(String),
}

/// How a role's pods are spread over one kind of place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopologySpread {
    /// Label of nodes that names the place.
    pub topology_key: String,
    /// Largest difference between two places.
    pub max_skew: NonZeroU32,
    /// Whether a pod that would break it waits (`DoNotSchedule`) or is put there all the same (`ScheduleAnyway`).
    pub required: bool,
}

/// Where clients' requests enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// At the proxy beside each decode worker.
    Sidecar,
    /// At proxies of their own.
    Standalone {
        /// How many.
        replicas: NonZeroU32,
    },
}

impl Routing {
    /// The mode without its settings.
    pub fn mode(self) -> RoutingMode {
        match self {
            Routing::Sidecar => RoutingMode::Sidecar,
            Routing::Standalone { .. } => RoutingMode::Standalone,
        }
    }
}

/// How near each other the roles' pods are put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Colocation {
    /// Label of nodes that names the place.
    pub topology_key: String,
    /// Whether a pod waits for a place near the others, or is put elsewhere.
    pub required: bool,
}

/// Whether pods are scraped by way of a PodMonitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// Where the cluster knows PodMonitors.
    Auto,
    /// In any case: its absence is told.
    Required,
    /// No.
    None,
}
