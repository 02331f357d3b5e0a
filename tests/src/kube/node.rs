//! A node that really runs containers: kubelet, containerd and runc in a network and a mount namespace of their own, with
//! kube-proxy and DNS.
//!
//! The host reaches pods and Services by two routes to the node; its own firewall tables stay untouched. All mounts are made in
//! the node's mount namespace, so that they go with its last process. One such node runs on a machine at a time: its addresses
//! are fixed, and a second one waits for the first to go.

mod traces;

pub use traces::Traces;

use super::{ControlPlane, Own, SERVICES, Tier, eventually, process, skip};
use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node as Object, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The node's name.
pub const NAME: &str = "node-0";

/// The host's address on the link to the node.
const HOST: &str = "10.213.0.1";
/// The node's address.
const ADDRESS: &str = "10.213.0.2";
/// Addresses of pods.
const PODS: &str = "10.214.0.0/24";
/// The Service of the cluster's DNS.
const DNS: &str = "10.96.0.10";
/// The image that holds a pod's namespaces.
const PAUSE: &str = "docker.io/baton/pause:test";

/// Longest wait for the node: containerd and the kubelet take 3 s alone on two cores.
const READY: Duration = Duration::from_secs(90);

/// A node of a [`Tier::Node`] control plane. It ends with the control plane.
pub struct Node<'a> {
    plane: &'a ControlPlane,
    startup: Duration,
}

impl<'a> Node<'a> {
    /// Starts it and waits until it is ready; none when this machine can't have one, which is then said.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(plane: &'a ControlPlane) -> Result<Option<Self>> {
        ensure!(plane.tier == Tier::Node, "the control plane is {:?}, not for a real node", plane.tier);
        if let Some(lacking) = lacking() {
            skip(&lacking);
            return Ok(None);
        }
        let turn = File::create(std::env::temp_dir().join("baton-test-node.turn"))?;
        turn.lock()?;
        // The addresses are free again when the janitor is done, which is after this node is dropped.
        plane.own()?.processes.keep_turn(turn);
        let begun = Instant::now();
        let mut node = Node { plane, startup: Duration::ZERO };
        node.come_up().with_context(|| plane.logs())?;
        node.startup = begun.elapsed();
        Ok(Some(node))
    }

    /// How long it took to be ready.
    pub fn startup(&self) -> Duration {
        self.startup
    }

    /// The node's address.
    pub fn address(&self) -> &'static str {
        ADDRESS
    }

    /// Makes an image of an OCI archive known to the node, under the name that the archive gives it.
    ///
    /// # Errors
    /// When the archive is refused.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        let mut command = Command::new(self.plane.programs.path("ctr"));
        command.arg("--address").arg(self.socket()?).args(["--namespace", "k8s.io", "images", "import"]).arg(archive);
        process::run(command, "")?.ok().with_context(|| format!("import {}", archive.display()))?;
        Ok(())
    }

    /// What a pod's container has said so far.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn logs(&self, namespace: &str, pod: &str, container: &str) -> Result<String> {
        self.plane.kubectl(&["logs", "-n", namespace, pod, "-c", container])?.ok()
    }

    fn socket(&self) -> Result<PathBuf> {
        Ok(self.plane.own_folder()?.join("containerd.sock"))
    }

    fn come_up(&self) -> Result<()> {
        let own = self.plane.own()?;
        let holder = hold_namespaces(own)?;
        connect(own, holder)?;
        self.start_containerd(own, holder)?;
        self.start_kubelet(own, holder)?;
        self.start_proxy(own, holder)?;
        self.start_dns(own, holder)?;
        let pause = own.processes.folder().join("images");
        let mut images = Command::new(crate::repo::root().join("scripts/images"));
        images.args(["pause", "--pause-name", PAUSE, "--out"]).arg(&pause);
        process::run(images, "")?.ok().context("make the pause image")?;
        super::block_on(async || {
            eventually(READY, "containerd answers", async || {
                own.processes.check()?;
                self.import_image(&pause.join("pause.tar")).map(Some)
            })
            .await
        })?;
        self.wait_ready(own)
    }

    fn wait_ready(&self, own: &Own) -> Result<()> {
        let api_port = own.url.rsplit(':').next().context("the API server's URL has a port")?.parse::<u16>()?;
        self.plane.run(async |client| {
            // The API server does not list itself, for it does not know the address by which the node's pods reach it.
            let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
            let slice = endpoint_slice("kubernetes", HOST, &[("https", api_port, "TCP")]);
            let params = PatchParams::apply("tests").force();
            slices.patch("kubernetes", &params, &Patch::Apply(&slice)).await?;
            let services: Api<Service> = Api::namespaced(client.clone(), "kube-system");
            let ports = [("dns", 53, "UDP"), ("dns-tcp", 53, "TCP")];
            let service = json!({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": { "name": "kube-dns" },
                "spec": {
                    "clusterIP": DNS,
                    "ports": ports.map(|(name, port, protocol)| json!({ "name": name, "port": port, "protocol": protocol })),
                },
            });
            services.patch("kube-dns", &params, &Patch::Apply(&service)).await?;
            let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "kube-system");
            slices.patch("kube-dns", &params, &Patch::Apply(&endpoint_slice("kube-dns", ADDRESS, &ports))).await?;
            let nodes: Api<Object> = Api::all(client);
            eventually(READY, "the node is ready", async || {
                own.processes.check()?;
                Ok(nodes.get_opt(NAME).await?.filter(super::is_ready).map(drop))
            })
            .await
        })
    }

    fn start_containerd(&self, own: &Own, holder: u32) -> Result<()> {
        let folder = own.processes.folder();
        let cni = folder.join("cni");
        std::fs::create_dir(&cni)?;
        // Point to point and not a bridge: a packet between two pods of one bridge does not pass the node's own tables, and the
        // answer to a Service's address comes from a pod's.
        let network = json!({
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [{
                "type": "ptp",
                "ipam": {
                    "type": "host-local",
                    "dataDir": folder.join("cni-addresses"),
                    "ranges": [[{ "subnet": PODS }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        std::fs::write(cni.join("10-pods.conflist"), network.to_string())?;
        let path = |name| self.plane.programs.path(name);
        let config = format!(
            r#"version = 2
root = "{folder}/containerd/root"
state = "{folder}/containerd/state"
[grpc]
address = "{folder}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{runc}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{cni}"
"#,
            folder = folder.display(),
            runc = path("runc").display(),
            plugins = path("cni").display(),
            cni = cni.display(),
        );
        std::fs::write(folder.join("containerd.toml"), config)?;
        let arguments = [format!("--config={}", folder.join("containerd.toml").display())];
        self.spawn_inside(own, holder, "containerd", &arguments)
    }

    fn start_kubelet(&self, own: &Own, holder: u32) -> Result<()> {
        let folder = own.processes.folder();
        let kubeconfig = self.kubeconfig_from_node(own, "kubelet", &format!("system:node:{NAME}"), "system:nodes")?;
        std::fs::write(folder.join("resolv.conf"), format!("nameserver {DNS}\n"))?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": { "enabled": false },
                "webhook": { "enabled": true },
                "x509": { "clientCAFile": folder.join("ca.crt") },
            },
            "authorization": { "mode": "Webhook" },
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": cgroup_root(),
            "failCgroupV1": false,
            "failSwapOn": false,
            "clusterDNS": [DNS],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint": format!("unix://{}/containerd.sock", folder.display()),
            "evictionHard": { "memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%" },
            "imageGCHighThresholdPercent": 100,
            "makeIPTablesUtilChains": false,
            "podLogsDir": folder.join("pods"),
            "readOnlyPort": 0,
            "healthzPort": 0,
            "resolvConf": folder.join("resolv.conf"),
            "registerNode": true,
            "volumePluginDir": folder.join("volume-plugins"),
        });
        std::fs::write(folder.join("kubelet.yaml"), config.to_string())?;
        let arguments = [
            format!("--config={}", folder.join("kubelet.yaml").display()),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--root-dir={}", folder.join("kubelet").display()),
            format!("--cert-dir={}", folder.join("kubelet-certificates").display()),
            format!("--hostname-override={NAME}"),
            format!("--node-ip={ADDRESS}"),
        ];
        self.spawn_inside(own, holder, "kubelet", &arguments)
    }

    fn start_proxy(&self, own: &Own, holder: u32) -> Result<()> {
        let kubeconfig = self.kubeconfig_from_node(own, "kube-proxy", "system:kube-proxy", "system:masters")?;
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": NAME,
            "clusterCIDR": PODS,
            "clientConnection": { "kubeconfig": kubeconfig },
            // The host's settings, which a network namespace may not change.
            "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        });
        let file = own.processes.folder().join("kube-proxy.yaml");
        std::fs::write(&file, config.to_string())?;
        self.spawn_inside(own, holder, "kube-proxy", &[format!("--config={}", file.display())])
    }

    fn start_dns(&self, own: &Own, holder: u32) -> Result<()> {
        let kubeconfig = self.kubeconfig_from_node(own, "coredns", "coredns", "system:masters")?;
        let file = own.processes.folder().join("Corefile");
        // Names of elsewhere do not exist: without the template they would be refused, which clients try again and again. It has
        // a block of its own, for within one it would answer before the cluster is asked.
        let config = format!(
            "cluster.local in-addr.arpa {{\n  bind {ADDRESS}\n  errors\n  kubernetes cluster.local in-addr.arpa {{\n    \
             kubeconfig {}\n  }}\n}}\n. {{\n  bind {ADDRESS}\n  errors\n  template ANY ANY {{\n    rcode NXDOMAIN\n  \
             }}\n}}\n",
            kubeconfig.display()
        );
        std::fs::write(&file, config)?;
        self.spawn_inside(own, holder, "coredns", &[format!("-conf={}", file.display())])
    }

    fn kubeconfig_from_node(&self, own: &Own, name: &str, user: &str, group: &str) -> Result<PathBuf> {
        let path = own.kubeconfig_with_certificate(name, user, Some(group))?;
        let text = std::fs::read_to_string(&path)?;
        // The certificate does not name the link's address.
        let text = text.replace(
            "\"server\":\"https://127.0.0.1:",
            &format!("\"tls-server-name\":\"localhost\",\"server\":\"https://{HOST}:"),
        );
        std::fs::write(&path, text)?;
        Ok(path)
    }

    fn spawn_inside(&self, own: &Own, holder: u32, program: &str, arguments: &[String]) -> Result<()> {
        let file = self.plane.programs.path(program);
        let programs = file.parent().context("a program lies in a folder")?;
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &holder.to_string(), "--mount", "--net", "--"])
            .arg(&file)
            .args(arguments)
            .env("PATH", format!("{}:{path}", programs.display()));
        own.processes.spawn_command(command, program)
    }
}

/// What this machine lacks for a node.
fn lacking() -> Option<String> {
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !is_root {
        return Some("a node that runs containers needs root".to_owned());
    }
    let found = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).exists())
    };
    let missing: Vec<&str> =
        ["ip", "nsenter", "unshare", "gcc", "python3"].into_iter().filter(|name| !found(name)).collect();
    (!missing.is_empty()).then(|| format!("a node that runs containers needs {}", missing.join(", ")))
}

fn cgroup_root() -> String {
    format!("/baton-{}", std::process::id())
}

/// The host's end of the link to the node.
fn link_name() -> String {
    format!("baton{}", std::process::id())
}

/// Starts the process whose namespaces are the node's, and gives its number.
fn hold_namespaces(own: &Own) -> Result<u32> {
    let folder = own.processes.folder();
    // Some of the kubelet's and containerd's paths are fixed; here they are empty folders that nobody else sees.
    let script = format!(
        "set -e
for fixed in /run /var/log /var/lib; do mount -t tmpfs tmpfs $fixed; done
mkdir -p /run/netns /var/lib/kubelet /var/log/containers
sysctl=/proc/sys/net/ipv4
echo 1 >$sysctl/ip_forward
ip link set lo up
touch {}/held
exec sleep infinity",
        folder.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--propagation", "private", "--", "bash", "-c", &script]);
    own.processes.spawn_command(command, "node")?;
    let (_, holder) = own.processes.living().into_iter().find(|(name, _)| name == "node").context("it was started")?;
    super::block_on(async || {
        eventually(READY, "the node's namespaces", async || {
            own.processes.check()?;
            Ok(folder.join("held").exists().then_some(()))
        })
        .await
    })?;
    make_cgroups(own)?;
    Ok(holder)
}

/// Makes the group in which all pods are, so that the janitor finds their processes.
fn make_cgroups(own: &Own) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let name = cgroup_root();
    let name = name.trim_start_matches('/');
    let controllers: Vec<PathBuf> = if root.join("cgroup.controllers").exists() {
        let known = std::fs::read_to_string(root.join("cgroup.controllers"))?;
        for controller in known.split_whitespace() {
            // One that can't be handed down is one that pods do without.
            let _ = std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        vec![root.to_owned()]
    } else {
        std::fs::read_dir(root)?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    };
    for controller in controllers {
        let group = controller.join(name);
        match std::fs::create_dir(&group) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => bail!("make {}: {error}", group.display()),
        }
        own.processes.leaves("cgroup", &group.display().to_string())?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            // Version 1 starts groups with no CPU at all.
            if let Ok(parents) = std::fs::read_to_string(controller.join(file)) {
                std::fs::write(group.join(file), parents)?;
            }
        }
    }
    Ok(())
}

/// Links the host with the node's network.
fn connect(own: &Own, holder: u32) -> Result<()> {
    let link = link_name();
    let inside = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &holder.to_string(), "--net", "--", "ip"]).args(arguments);
        process::run(command, "")?.ok().with_context(|| format!("ip {arguments:?}")).map(drop)
    };
    let outside = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("ip");
        command.args(arguments);
        process::run(command, "")?.ok().with_context(|| format!("ip {arguments:?}")).map(drop)
    };
    own.processes.leaves("link", &link)?;
    outside(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &holder.to_string()])?;
    outside(&["address", "add", &format!("{HOST}/24"), "dev", &link])?;
    outside(&["link", "set", &link, "up"])?;
    inside(&["address", "add", &format!("{ADDRESS}/24"), "dev", "eth0"])?;
    inside(&["link", "set", "eth0", "up"])?;
    inside(&["route", "add", "default", "via", HOST])?;
    for range in [PODS, SERVICES] {
        outside(&["route", "add", range, "via", ADDRESS, "dev", &link])?;
    }
    Ok(())
}

fn endpoint_slice(service: &str, address: &str, ports: &[(&str, u16, &str)]) -> serde_json::Value {
    let ports: Vec<_> = ports
        .iter()
        .map(|(name, port, protocol)| json!({ "name": name, "port": port, "protocol": protocol }))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": service, "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
        "ports": ports,
    })
}
