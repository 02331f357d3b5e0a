//! What an installation, not a manifest, says of the objects: images, the namespace, the kinds that the cluster knows.

use std::collections::BTreeSet;

/// What an installation says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Image of Baton's own engine.
    pub worker_image: String,
    /// Image of the routing proxy.
    pub proxy_image: String,
    /// Kinds that a cluster may lack, and this one has.
    pub kinds: BTreeSet<OptionalKind>,
    /// Namespace of the operator: its pods may read a download's progress through the network policy. None where there is no operator.
    pub operator_namespace: Option<String>,
}

/// A kind that a cluster may lack. It is looked for while the operator runs, and watched once it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OptionalKind {
    /// Replicas that span nodes.
    LeaderWorkerSet,
    /// Scraping by Prometheus Operator.
    PodMonitor,
    /// Gateway API.
    HttpRoute,
    /// Gateway API inference extension.
    InferencePool,
    /// KEDA.
    ScaledObject,
}

impl OptionalKind {
    /// Every one.
    pub const ALL: [OptionalKind; 5] = [
        OptionalKind::LeaderWorkerSet,
        OptionalKind::PodMonitor,
        OptionalKind::HttpRoute,
        OptionalKind::InferencePool,
        OptionalKind::ScaledObject,
    ];

    /// `kind`, group and version, and the resource's name in URLs.
    pub const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            OptionalKind::LeaderWorkerSet => ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1", "leaderworkersets"),
            OptionalKind::PodMonitor => ("PodMonitor", "monitoring.coreos.com/v1", "podmonitors"),
            OptionalKind::HttpRoute => ("HTTPRoute", "gateway.networking.k8s.io/v1", "httproutes"),
            OptionalKind::InferencePool => ("InferencePool", "inference.networking.k8s.io/v1", "inferencepools"),
            OptionalKind::ScaledObject => ("ScaledObject", "keda.sh/v1alpha1", "scaledobjects"),
        }
    }
}

/// The object that owns what is made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its namespace, which is that of everything it owns.
    pub namespace: String,
    /// Its uid; none where no cluster gave it one (`baton plan`, generated manifests), and then nothing refers to it.
    pub uid: Option<String>,
}
