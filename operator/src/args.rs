//! The command line, as it is typed: names, defaults and help texts, and nothing decided from them.

use std::net::SocketAddr;

/// Runs DisaggregatedModels: makes their workloads, services, keys and policies, and keeps their status true.
///
/// The cluster is the one that the pod runs in, else the one of KUBECONFIG or ~/.kube/config.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "baton-operator", version)]
pub struct Args {
    /// Image of Baton's own engine. The default is the one of this version.
    #[arg(long, value_name = "IMAGE", default_value = concat!("baton/worker:", env!("CARGO_PKG_VERSION")))]
    pub worker_image: String,
    /// Image of the routing proxy. The default is the one of this version.
    #[arg(long, value_name = "IMAGE", default_value = concat!("baton/proxy:", env!("CARGO_PKG_VERSION")))]
    pub proxy_image: String,
    /// Namespaces whose models are run, separated by commas. Then nothing is asked of the cluster as a whole, and Roles in
    /// these namespaces are rights enough. Left out or empty: all namespaces.
    #[arg(long, value_name = "NAMES", env = "WATCH_NAMESPACES", value_delimiter = ',')]
    pub watch_namespaces: Vec<String>,
    /// Whether a Lease says which of several replicas works. Turn it off only where nothing can ever start a second one.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub leader_elect: bool,
    /// Name of the Lease.
    #[arg(long, value_name = "NAME", default_value = "baton-operator")]
    pub lease_name: String,
    /// Namespace of the Lease and of the operator's pods. The default is the one that the credentials belong to.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// Who this replica is in the Lease. A replica that comes back with the same name goes on at once, so no two may have one. The
    /// default is drawn at random.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub identity: Option<String>,
    /// Where /livez, /readyz and /metrics are served.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:9090")]
    pub admin_listen: SocketAddr,
    /// How log lines look: text for people, json for collectors. What is logged: environment variable BATON_LOG.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors: one JSON object a line.
    Json,
}
