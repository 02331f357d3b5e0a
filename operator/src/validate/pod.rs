//! A role's pod settings as Kubernetes' own types.

use super::open;
use crate::Violation;
use crate::validated::{ClaimSource, PodSettings, PodTemplate, ResourceClaim, TopologySpread};
use baton_crds::rules::{self, GPU_CLASS_LABEL};
use baton_crds::{Amount, EnvSpec, ResourceClaimSpec, RoleSpec, TolerationSpec, TopologySpreadSpec, WhenUnsatisfiable};
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, SecretKeySelector, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

/// The settings of a role without violations.
pub(super) fn settings(path: &str, spec: &RoleSpec) -> Result<PodSettings, Violation> {
    let resources = spec.resources.clone().unwrap_or_default();
    let requests = quantities(&format!("{path}.resources.requests"), &resources.requests)?;
    let mut limits = quantities(&format!("{path}.resources.limits"), &resources.limits)?;
    let mut node_selector = spec.node_selector.clone();
    if let Some(gpu) = &spec.gpu {
        if gpu.count > 0 {
            limits.insert(gpu.resource_name.clone(), Quantity(gpu.count.to_string()));
        }
        if let Some(class) = &gpu.class {
            node_selector.insert(GPU_CLASS_LABEL.to_owned(), class.clone());
        }
    }
    let spread = spec.topology_spread.iter().enumerate();
    let claims = spec.resource_claims.iter().enumerate();
    Ok(PodSettings {
        requests,
        limits,
        resource_claims: claims
            .map(|(index, claim)| resource_claim(&format!("{path}.resourceClaims[{index}]"), claim))
            .collect::<Result<_, _>>()?,
        node_selector,
        tolerations: spec.tolerations.iter().map(toleration).collect(),
        topology_spread: spread
            .map(|(index, one)| topology_spread(&format!("{path}.topologySpread[{index}]"), one))
            .collect::<Result<_, _>>()?,
        priority_class: spec.priority_class_name.clone(),
        runtime_class: spec.runtime_class_name.clone(),
        env: spec.env.iter().map(env_var).collect(),
        volumes: open::volumes(path, spec).map_err(first)?,
        volume_mounts: open::volume_mounts(path, spec).map_err(first)?,
        template: spec.pod_template.as_ref().map(|template| {
            let mut template = serde_json::to_value(template).expect("a template is made of JSON");
            // An API server sorts them, a file has them as they were written, and both are to have one revision.
            template.sort_all_objects();
            PodTemplate(template)
        }),
    })
}

fn first(violations: Vec<Violation>) -> Violation {
    violations.into_iter().next().expect("an error has at least one violation")
}

fn quantities(path: &str, amounts: &BTreeMap<String, Amount>) -> Result<BTreeMap<String, Quantity>, Violation> {
    let quantity = |(name, amount): (&String, &Amount)| match amount.text() {
        Some(text) => Ok((name.clone(), Quantity(text))),
        None => Err(Violation::new(format!("{path}.{name}"), "not an amount", "such as 2, 500m or 16Gi")),
    };
    amounts.iter().map(quantity).collect()
}

fn resource_claim(path: &str, spec: &ResourceClaimSpec) -> Result<ResourceClaim, Violation> {
    let source = match (&spec.resource_claim_name, &spec.resource_claim_template_name) {
        (Some(claim), None) => ClaimSource::Claim(claim.clone()),
        (None, Some(template)) => ClaimSource::Template(template.clone()),
        (Some(_), Some(_)) | (None, None) => return Err(super::broken(path, rules::CLAIM_HAS_ONE_SOURCE)),
    };
    Ok(ResourceClaim { name: spec.name.clone(), source })
}

fn toleration(spec: &TolerationSpec) -> Toleration {
    Toleration {
        key: spec.key.clone(),
        operator: Some(spec.operator.as_str().to_owned()),
        value: spec.value.clone(),
        effect: spec.effect.map(|effect| effect.as_str().to_owned()),
        toleration_seconds: spec.toleration_seconds,
    }
}

fn topology_spread(path: &str, spec: &TopologySpreadSpec) -> Result<TopologySpread, Violation> {
    Ok(TopologySpread {
        topology_key: spec.topology_key.clone(),
        max_skew: super::positive(&format!("{path}.maxSkew"), spec.max_skew)?,
        required: match spec.when_unsatisfiable {
            WhenUnsatisfiable::DoNotSchedule => true,
            WhenUnsatisfiable::ScheduleAnyway => false,
        },
    })
}

fn env_var(spec: &EnvSpec) -> EnvVar {
    EnvVar {
        name: spec.name.clone(),
        value: spec.value.clone(),
        value_from: spec.secret_key_ref.as_ref().map(|secret| EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: secret.name.clone(),
                key: secret.key.clone(),
                optional: None,
            }),
            ..EnvVarSource::default()
        }),
    }
}
