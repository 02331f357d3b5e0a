//! Baton's Kubernetes API: the `DisaggregatedModel` type, its validation rules, the words of its status, the labels of what is
//! made for it, and the generated definition.
//!
//! The type carries the fields that something acts on today; docs/api.md has the whole v1alpha1 shape and says what comes
//! with which work. Nothing here reads a file or a cluster, and nothing here decides: that is the operator's.
#![forbid(unsafe_code)]

pub mod condition;
pub mod definition;
pub mod disaggregation;
pub mod engine;
pub mod labels;
pub mod model;
pub mod model_source;
pub mod observability;
pub mod placement;
pub mod pod;
pub mod role;
pub mod routing;
pub mod rules;
pub mod scalar;
pub mod security;
pub mod status;

pub use condition::{ConditionType, Reason};
pub use disaggregation::{DisaggregationPolicy, DisaggregationSpec};
pub use engine::{Dtype, EngineSpec, EngineType};
pub use labels::WorkloadRole;
pub use model::{DisaggregatedModel, DisaggregatedModelSpec};
pub use model_source::{CacheSpec, CacheType, ModelSpec, SecretRef};
pub use observability::{MonitorMode, ObservabilitySpec};
pub use placement::{ColocationMode, ColocationSpec, PlacementSpec};
pub use pod::{
    EnvSpec, GpuSpec, OverlayMetadata, PodTemplateOverlay, ResourceClaimSpec, ResourcesSpec, SecretKeyRef, TaintEffect,
    TolerationOperator, TolerationSpec, TopologySpreadSpec, VolumeMountSpec, VolumeSpec, WhenUnsatisfiable,
};
pub use role::{AutoscalingProvider, AutoscalingSpec, DisruptionSpec, RoleSpec};
pub use routing::{DiscoveryMode, RoutingMode, RoutingSpec, StandaloneSpec};
pub use scalar::Amount;
pub use security::{NetworkPolicyMode, SecuritySpec};
pub use status::{DisaggregatedModelStatus, LastError, ModelDownload, RoleStatus, StatusSummary, WorkloadRef};

/// `apiVersion` of a [`DisaggregatedModel`].
pub const API_VERSION: &str = "baton.dev/v1alpha1";
/// `kind` of a [`DisaggregatedModel`].
pub const KIND: &str = "DisaggregatedModel";
