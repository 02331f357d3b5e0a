//! Baton's Kubernetes API: the `DisaggregatedModel` type, its validation rules and the generated definition.
//!
//! The type carries the fields that something acts on today; docs/api.md has the whole v1alpha1 shape and says what comes
//! with which work. Nothing here reads a file or a cluster, and nothing here decides: that is the operator's.
#![forbid(unsafe_code)]

pub mod definition;
pub mod model;
pub mod rules;

pub use model::{
    DisaggregatedModel, DisaggregatedModelSpec, DisaggregationPolicy, DisaggregationSpec, Dtype, EngineSpec, ModelSpec,
    RoleSpec, RoutingMode, RoutingSpec,
};

/// `apiVersion` of a [`DisaggregatedModel`].
pub const API_VERSION: &str = "baton.dev/v1alpha1";
/// `kind` of a [`DisaggregatedModel`].
pub const KIND: &str = "DisaggregatedModel";
