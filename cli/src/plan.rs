//! `baton plan`: the objects that an operator would make of a manifest, by the operator's own code and without a cluster.

use crate::args::{AssumedKind, PlanArgs, PlanOutput};
use crate::{manifest, terminal};
use baton_operator::child::{Child, Kind, Objects, Planned};
use baton_operator::credentials::{Certificate, Credentials};
use baton_operator::desired::{desired, needs, roles};
use baton_operator::manifest::Manifest;
use baton_operator::plan::Plan;
use baton_operator::site::{OptionalKind, Owner, Site};
use serde_json::{Map, Value};
use std::process::ExitCode;

/// The namespace of objects that name none.
const NAMESPACE: &str = "default";
/// What stands for keys and certificates, which the operator makes when it first sees a model.
const PLACEHOLDER: &str = "<made by the operator>";

/// Prints the objects of the only `DisaggregatedModel` of the file.
///
/// # Errors
/// When the file can't be read, or with everything that is wrong with the manifest.
pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let manifest = manifest::load(&args.file)?;
    let site = site(args);
    for absent in needs(&manifest.validated).difference(&site.kinds) {
        let (kind, api_version, plural) = absent.names();
        let flag = plural.trim_end_matches('s');
        terminal::Terminal::new().note(&format!(
            "left out: the manifest needs {kind} ({api_version}), which not every cluster has; --assume {flag} prints it"
        ));
    }
    let objects = objects(&manifest, &site, args.namespace.as_deref());
    for child in objects.children() {
        match args.output {
            PlanOutput::Names => terminal::print_line(&format!("{}/{}", child.kind.as_str(), child.name)),
            PlanOutput::Yaml => terminal::print(&document(child)?),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn site(args: &PlanArgs) -> Site {
    let kinds = args.assume.iter().map(|kind| match kind {
        AssumedKind::LeaderWorkerSet => OptionalKind::LeaderWorkerSet,
        AssumedKind::PodMonitor => OptionalKind::PodMonitor,
    });
    Site {
        worker_image: args.worker_image.clone(),
        proxy_image: args.proxy_image.clone(),
        kinds: kinds.collect(),
        operator_namespace: None,
    }
}

/// What a cluster would get that has nothing of this model yet.
fn objects(manifest: &Manifest, site: &Site, namespace: Option<&str>) -> Objects<Planned> {
    let namespace = namespace.or(manifest.model.metadata.namespace.as_deref()).unwrap_or(NAMESPACE);
    let owner = Owner { namespace: namespace.to_owned(), uid: None };
    let model = &manifest.validated;
    let certificate = Certificate::default;
    let credentials = Credentials {
        roles: roles(model).into_iter().map(|role| (role, certificate())).collect(),
        ..Credentials::default()
    };
    desired(model, site, &owner, &Plan::first(model, site), &credentials)
}

/// One object as a YAML document; of a Secret its keys, with a placeholder for each value.
fn document(child: &Child) -> anyhow::Result<String> {
    let mut body = child.body.clone();
    if child.kind == Kind::Secret
        && let Some(Value::Object(data)) = body.as_object_mut().and_then(|body| body.shift_remove("data"))
    {
        let shown: Map<String, Value> = data.into_iter().map(|(key, _)| (key, PLACEHOLDER.into())).collect();
        body["stringData"] = shown.into();
    }
    Ok(format!("---\n{}", serde_yaml::to_string(&body)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {name: tiny}\nspec: {model: {uri: 'pvc://models/a'}}\n";

    fn planned(text: &str, namespace: Option<&str>) -> Objects<Planned> {
        let manifest = baton_operator::manifest::read_one(text).expect("a right manifest");
        let site = Site {
            worker_image: "worker".to_owned(),
            proxy_image: "proxy".to_owned(),
            kinds: [OptionalKind::PodMonitor].into(),
            operator_namespace: None,
        };
        objects(&manifest, &site, namespace)
    }

    fn namespaces(objects: &Objects<Planned>) -> Vec<&str> {
        let mut found: Vec<&str> =
            objects.children().iter().filter_map(|child| child.body["metadata"]["namespace"].as_str()).collect();
        found.dedup();
        found
    }

    #[test]
    fn no_key_is_shown() {
        let objects = planned(MANIFEST, None);
        let secrets: Vec<String> = objects
            .children()
            .iter()
            .filter(|child| child.kind == Kind::Secret)
            .map(|child| document(child).expect("YAML"))
            .collect();
        assert_eq!(secrets.len(), 5, "signing key and its public half, authority, a certificate for each role");
        for secret in secrets {
            assert!(secret.contains(PLACEHOLDER) && !secret.contains("\ndata:"), "{secret}");
        }
    }

    #[test]
    fn the_namespace_is_the_flags_then_the_manifests_then_the_default() {
        let named = MANIFEST.replace("{name: tiny}", "{name: tiny, namespace: team}");
        assert_eq!(namespaces(&planned(MANIFEST, None)), ["default"]);
        assert_eq!(namespaces(&planned(&named, None)), ["team"]);
        assert_eq!(namespaces(&planned(&named, Some("other"))), ["other"]);
    }

    #[test]
    fn what_is_printed_is_yaml_that_reads_as_the_same_objects() {
        let objects = planned(MANIFEST, None);
        let text: String = objects.children().iter().map(|child| document(child).expect("YAML")).collect();
        let documents: Vec<Value> = serde_yaml::Deserializer::from_str(&text)
            .map(|one| serde::Deserialize::deserialize(one).expect("a document"))
            .collect();
        let names = |value: &Value| value["metadata"]["name"].as_str().map(str::to_owned);
        let expect: Vec<_> = objects.children().iter().map(|child| Some(child.name.clone())).collect();
        assert_eq!(documents.iter().map(names).collect::<Vec<_>>(), expect);
    }
}
