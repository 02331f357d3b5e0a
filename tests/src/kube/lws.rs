//! The LeaderWorkerSet controller beside a control plane: a plain process, reached by the API server at a loopback address.

use super::{ControlPlane, eventually, free_ports};
use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use kube::api::{Api, PostParams};
use serde::Deserialize as _;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest wait for its webhooks, which it serves once it has read the API.
const READY: Duration = Duration::from_secs(60);

pub(super) fn start(plane: &ControlPlane) -> Result<()> {
    let own = plane.own()?;
    let manifests = plane.programs.path("lws-manifests");
    for crd in ["leaderworkerset.x-k8s.io_leaderworkersets.yaml", "disaggregatedset.x-k8s.io_disaggregatedsets.yaml"] {
        plane.install_crds(&std::fs::read_to_string(manifests.join(crd)).with_context(|| format!("read {crd}"))?)?;
    }

    let [port] = free_ports()?;
    let folder = own.processes.folder().join("lws");
    std::fs::create_dir(&folder)?;
    let identity = own.authority.server(&["127.0.0.1"])?;
    std::fs::write(folder.join("tls.crt"), &identity.certificate)?;
    std::fs::write(folder.join("tls.key"), &identity.key)?;
    let config = json!({
        "apiVersion": "config.lws.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": { "leaderElect": false },
        "internalCertManagement": { "enable": false },
        "clientConnection": { "qps": 300, "burst": 600 },
        "metrics": { "bindAddress": "0" },
        "health": { "healthProbeBindAddress": "0" },
        "webhook": { "port": port, "host": "127.0.0.1", "certDir": folder },
    });
    std::fs::write(folder.join("config.yaml"), config.to_string())?;
    let kubeconfig = own.kubeconfig_with_certificate("lws", "lws-controller", Some("system:masters"))?;
    let mut command = std::process::Command::new(plane.programs.path("lws"));
    command.arg(format!("--config={}", folder.join("config.yaml").display())).env("KUBECONFIG", kubeconfig);
    own.processes.spawn_command(command, "lws")?;

    let webhooks =
        std::fs::read_to_string(manifests.join("webhooks.yaml")).context("read LeaderWorkerSet's webhooks")?;
    let authority = own.authority.certificate();
    plane.run(async |client| {
        eventually(READY, "the LeaderWorkerSet controller's webhooks", async || {
            own.processes.check()?;
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(()))
        })
        .await?;
        for document in serde_yaml::Deserializer::from_str(&webhooks) {
            let mut value = Value::deserialize(document)?;
            for webhook in value["webhooks"].as_array_mut().context("a list of webhooks")? {
                to_url(webhook, port, &authority)?;
            }
            let params = PostParams::default();
            if value["kind"] == "MutatingWebhookConfiguration" {
                let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
                api.create(&params, &serde_json::from_value(value)?).await?;
            } else {
                let api: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
                api.create(&params, &serde_json::from_value(value)?).await?;
            }
        }
        Ok(())
    })
}

/// Sends a webhook's requests to the process instead of a Service, and only for the pods that are its own: so do the patches of
/// LeaderWorkerSet's own installation, without which it is asked about every pod of the cluster.
fn to_url(webhook: &mut Value, port: u16, authority: &str) -> Result<()> {
    let path = webhook.pointer("/clientConfig/service/path").and_then(Value::as_str).context("a webhook's path")?;
    let of_pods = path.ends_with("-v1-pod");
    webhook["clientConfig"] = json!({
        "url": format!("https://127.0.0.1:{port}{path}"),
        "caBundle": ByteString(authority.as_bytes().to_vec()),
    });
    if of_pods {
        webhook["objectSelector"] =
            json!({ "matchExpressions": [{ "key": "leaderworkerset.sigs.k8s.io/name", "operator": "Exists" }] });
    }
    Ok(())
}
