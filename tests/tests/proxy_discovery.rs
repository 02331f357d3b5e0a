//! The routing proxy as a process that watches EndpointSlices at a real API server, with the rights that docs/endpoint-slices.yaml
//! gives and no others: its workers follow what is there, a refusal and an outage leave them as they are.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use system_tests::cluster::wait;
use system_tests::engines::Door;
use system_tests::http::get;
use system_tests::kube::{ControlPlane, Namespace, Tier, say, skip};
use system_tests::repo;

const SERVICE: &str = "tiny-decode-0a1b2c3d-peers";

/// How long the API server is away: several tries of the proxy.
const OUTAGE: Duration = Duration::from_secs(4);

/// A namespace with slices that a test writes: addresses of networks that are for documents, where nobody answers.
struct Slices<'a> {
    plane: &'a ControlPlane,
    namespace: &'a Namespace,
}

impl Slices<'_> {
    fn apply(&self, objects: &str) -> Result<()> {
        self.plane.kubectl_with(&["apply", "-n", self.namespace.name(), "-f", "-"], objects)?.ok()?;
        Ok(())
    }

    fn put(&self, name: &str, address_type: &str, endpoints: Value) -> Result<()> {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": SERVICE}},
            "addressType": address_type,
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}, {"name": "admin", "port": 9090, "protocol": "TCP"}],
        });
        self.apply(&slice.to_string())
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.plane.kubectl(&["delete", "endpointslice", name, "-n", self.namespace.name()])?.ok()?;
        Ok(())
    }
}

fn ready(address: &str) -> Value {
    json!({"addresses": [address], "conditions": {"ready": true}})
}

fn workers(door: &Door) -> Result<Vec<String>> {
    let table = get(&door.admin, "/debug/workers")?.json()?;
    let rows = table["workers"].as_array().context("a table")?;
    let mut addresses: Vec<String> =
        rows.iter().map(|row| row["address"].as_str().unwrap_or_default().to_owned()).collect();
    addresses.sort();
    Ok(addresses)
}

fn become_(door: &Door, expect: &[&str]) -> Result<()> {
    let begun = Instant::now();
    let mut last = Vec::new();
    let waited = wait(&format!("the workers to be {expect:?}"), || {
        last = workers(door)?;
        Ok(last == expect)
    });
    waited.with_context(|| format!("{last:?}\n{}", door.log()))?;
    say(&format!("the workers are {expect:?} after {:?}", begun.elapsed()));
    Ok(())
}

#[test]
fn workers_follow_a_services_slices_and_outlive_a_refusal_and_an_outage() -> Result<()> {
    let Some(plane) = ControlPlane::start(Tier::Api).or_skip() else { return Ok(()) };
    let Ok(authority) = plane.authority() else {
        skip("a given cluster's API server can't be stopped");
        return Ok(());
    };
    let namespace = plane.namespace("slices")?;
    let slices = Slices { plane: &plane, namespace: &namespace };
    slices.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: tiny-decode}\n")?;
    let folder = tempfile::tempdir()?;
    let write = |name: &str, content: &str| std::fs::write(folder.path().join(name), content);
    let token = plane.kubectl(&["create", "token", "tiny-decode", "-n", namespace.name()])?.ok()?;
    write("token", token.trim())?;
    write("ca.crt", &authority.certificate())?;
    write("namespace", namespace.name())?;
    let key = folder.path().join("signing.key");
    std::fs::write(&key, "5a".repeat(32))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let url = runtime.block_on(plane.config())?.cluster_url;
    let (host, port) = (url.host().context("a host")?, url.port().context("a port")?.to_string());

    let (service, key, account) =
        (format!("{SERVICE}:http"), key.display().to_string(), folder.path().display().to_string());
    #[rustfmt::skip]
    let flags = [
        "--signing-key-file", &key, "--revision", "0a1b2c3d", "--discover-endpoint-slices", &service,
        "--service-account-folder", &account, "--kubernetes-service-host", host, "--kubernetes-service-port", &port,
    ];
    slices.put("first", "IPv4", json!([ready("192.0.2.1"), ready("192.0.2.2")]))?;
    let door = Door::launch(&flags)?;
    wait("the proxy says what it lacks", || Ok(door.log().contains("may not list and watch endpointslices")))
        .with_context(|| door.log())?;
    ensure!(workers(&door)?.is_empty(), "an account without rights was told: {}", door.log());

    let rights = std::fs::read_to_string(repo::root().join("docs/endpoint-slices.yaml"))?;
    slices.apply(&rights.replace("namespace: default", &format!("namespace: {}", namespace.name())))?;
    become_(&door, &["192.0.2.1:8000", "192.0.2.2:8000"])?;
    ensure!(door.log().matches("may not list and watch").count() == 1, "said at each try: {}", door.log());

    // One comes by another slice and family, one goes on serving while it ends, one does neither, and a name is nobody.
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    let ended = json!({"ready": false, "serving": false, "terminating": true});
    slices.put("second", "IPv6", json!([ready("2001:db8::1")]))?;
    slices.put("third", "FQDN", json!([ready("worker.example.com")]))?;
    slices.put(
        "first",
        "IPv4",
        json!([ready("192.0.2.1"), {"addresses": ["192.0.2.2"], "conditions": ending}, {"addresses": ["192.0.2.3"], "conditions": ended}]),
    )?;
    become_(&door, &["192.0.2.1:8000", "192.0.2.2:8000", "[2001:db8::1]:8000"])?;
    slices.put("first", "IPv4", json!([ready("192.0.2.4")]))?;
    slices.delete("second")?;
    become_(&door, &["192.0.2.4:8000"])?;

    plane.stop_api_server()?;
    let begun = Instant::now();
    let mut said = false;
    wait("the outage to be over", || {
        let now = workers(&door)?;
        ensure!(now == ["192.0.2.4:8000"], "the list was not kept: {now:?}");
        said |= door.log().contains("does not tell the Service's endpoints");
        Ok(begun.elapsed() > OUTAGE && said)
    })?;
    plane.start_api_server()?;
    slices.put("fourth", "IPv4", json!([ready("192.0.2.5")]))?;
    slices.delete("third")?;
    become_(&door, &["192.0.2.4:8000", "192.0.2.5:8000"])?;
    ensure!(door.log().matches("does not tell the Service's endpoints").count() == 1, "said again: {}", door.log());
    slices.delete("first")?;
    slices.delete("fourth")?;
    become_(&door, &[])?;
    ensure!(door.log().contains("nobody is behind this Service"), "{}", door.log());
    ensure!(!door.log().contains(token.trim()), "the token is in the log");
    Ok(())
}
