//! What a manifest asks of a cluster that one machine can't give: refused where the model would not be what was asked for,
//! told once where it only would have been put elsewhere.

use baton_crds::DiscoveryMode;
use baton_operator::validated::{EngineKind, PodSettings, RoleSettings};
use baton_operator::{Replicas, Validated};
use std::collections::BTreeMap;

/// Something that one machine can't do for a manifest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LaptopError {
    /// The engine is somebody else's.
    #[error(
        "spec.engine.type: baton up runs Baton's own engine only; take type Baton, or apply the manifest to a cluster"
    )]
    ForeignEngine,
    /// Its worker is another program than ours.
    #[error(
        "spec.engine.{field}: baton up starts the baton-worker beside it, without further arguments; leave it out, or apply the manifest to a cluster"
    )]
    Engine { field: &'static str },
}

/// Checks that the processes of this machine are what the manifest means.
///
/// # Errors
/// When they can't be.
pub(crate) fn check(model: &Validated) -> Result<(), LaptopError> {
    match model.engine.kind {
        EngineKind::Vllm | EngineKind::Sglang => return Err(LaptopError::ForeignEngine),
        EngineKind::Baton => {}
    }
    if model.engine.image.is_some() {
        return Err(LaptopError::Engine { field: "image" });
    }
    if !model.engine.args.is_empty() {
        return Err(LaptopError::Engine { field: "args" });
    }
    Ok(())
}

/// The fields that say where and how a cluster puts pods, and mean nothing to processes; empty when there are none.
pub(crate) fn without_meaning(model: &Validated) -> Vec<String> {
    let roles = [("prefill", model.disaggregation.prefill()), ("decode", Some(&model.decode))];
    let mut fields: Vec<String> = roles
        .into_iter()
        .filter_map(|(name, role)| Some((name, role?)))
        .flat_map(|(name, role)| of_role(name, role))
        .collect();
    if model.colocation.is_some() {
        fields.push("spec.placement".to_owned());
    }
    match model.discovery {
        DiscoveryMode::Dns => {}
        // There is no API server to ask; the processes are told each other's addresses.
        DiscoveryMode::EndpointSlices => fields.push("spec.routing.discovery".to_owned()),
    }
    fields
}

fn of_role(name: &str, role: &RoleSettings) -> Vec<String> {
    let mut fields = Vec::new();
    if role.replicas == Replicas::External {
        fields.push(format!("spec.{name}.autoscaling"));
    }
    // What is set aside on a node is for its scheduler; a limit would be another thing, for it is enforced.
    let pod = PodSettings { requests: BTreeMap::new(), ..role.pod.clone() };
    if pod != PodSettings::default() {
        fields.push(format!("what spec.{name} says of its pods (resources, placement, env, volumes, podTemplate)"));
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_operator::manifest;

    fn validated(spec: &str) -> Validated {
        let text = format!(
            "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: m}}\nspec: {{model: {{uri: pvc://models}}{spec}}}\n"
        );
        manifest::read_one(&text).expect("a right manifest").validated
    }

    #[test]
    fn what_would_not_be_what_was_asked_for_is_refused_by_field() {
        assert_eq!(check(&validated("")), Ok(()));
        assert_eq!(check(&validated(", engine: {type: VLLM, image: v}")), Err(LaptopError::ForeignEngine));
        assert_eq!(check(&validated(", engine: {image: v}")), Err(LaptopError::Engine { field: "image" }));
        assert_eq!(check(&validated(", engine: {args: [--x]}")), Err(LaptopError::Engine { field: "args" }));
    }

    #[test]
    fn what_only_a_cluster_can_do_is_told() {
        assert_eq!(without_meaning(&validated("")), Vec::<String>::new());
        let requests = validated(", decode: {resources: {requests: {cpu: 250m}}}");
        assert_eq!(without_meaning(&requests), Vec::<String>::new());
        assert_eq!(without_meaning(&validated(", decode: {resources: {limits: {cpu: 2}}}")).len(), 1);
        let told = without_meaning(&validated(", decode: {autoscaling: {provider: External}, nodeSelector: {a: b}}"));
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[0], "spec.decode.autoscaling");
        assert_eq!(without_meaning(&validated(", routing: {discovery: EndpointSlices}")), ["spec.routing.discovery"]);
    }
}
