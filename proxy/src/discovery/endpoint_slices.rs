//! Addresses of a Service's EndpointSlices, watched at the API server: the one file of the proxy that knows Kubernetes.
//!
//! As with names, a list that is too long costs little and one that is too short takes workers away from requests. So whatever
//! fails leaves the list as it was: an API server that is away, refuses us, or has more to say than is bearable. That a Service
//! has nobody is believed at once, unlike DNS: lists are read as the API server's storage has them, not from a cache.

use super::{ENDPOINTS_MAX, List};
use crate::address::Address;
use crate::config::{ApiServer, ServicePort};
use crate::watched::{self, Complaint};
use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use kube::config::AuthInfo;
use kube::runtime::watcher::{self, DefaultBackoff, Event};
use kube::{Api, Client, Config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject as _};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::time::Instant;

/// The label by which slices say whose they are.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Seconds after which the API server ends a watch, and we begin it anew where it was. It bounds how long a connection whose
/// other side is gone without a word goes unnoticed; a thousand proxies of two Services ask 17 times a second for it.
const WATCH_SECONDS: u32 = 120;

/// The longest silence of the API server in a list or a watch: a watch's whole life, and time for its end to arrive. It sends a
/// bookmark each minute.
const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);

/// How long a connection may take to come about: the API server is near.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Slices in one page of a list: twice what the controller makes of [`ENDPOINTS_MAX`] addresses, a hundred in each.
const PAGE_SLICES: u32 = 20;

/// Slices and their addresses that are held at once: an address may stand in two slices while the controller moves it, and as
/// many slices as addresses may be nearly empty; half of that again is room.
const HELD_MAX: usize = 4 * ENDPOINTS_MAX;

/// A trouble that comes so long after the one before is another one: tries follow each other within [`READ_TIMEOUT`] and 30 s.
const QUIET: Duration = Duration::from_secs(180);

/// Longest pause between two tries, which `DefaultBackoff` reaches by itself; said for the type's sake.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Bytes of the file with the namespace: a DNS label and a line's end.
const NAMESPACE_BYTES_MAX: u64 = 65;

/// Bytes of the file with the authorities: some hundred of them.
const AUTHORITIES_BYTES_MAX: u64 = 1 << 20;

/// Why there is no newer list.
#[derive(Debug, thiserror::Error)]
enum SlicesError {
    /// A file of the service account is missing.
    #[error("{} can't be read: mount a service account's token, ca.crt and namespace there", file.display())]
    Account {
        /// Which file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The authorities are none.
    #[error("{} holds no certificates in PEM", file.display())]
    Authorities {
        /// Which file.
        file: PathBuf,
        /// What the reader said.
        #[source]
        source: pem::Error,
    },
    /// Nobody to ask with.
    #[error("the service account can't be used")]
    Client(#[source] kube::Error),
    /// The token is not known.
    #[error("the API server does not take the service account's token")]
    Unauthorized(#[source] watcher::Error),
    /// The account lacks the right.
    #[error("the service account may not list and watch endpointslices there: bind it to a Role (docs/proxy.md)")]
    Forbidden(#[source] watcher::Error),
    /// It does not answer, or not as it should.
    #[error("the API server does not tell the Service's endpoints")]
    Failed(#[source] watcher::Error),
    /// There are too many.
    #[error("the Service has more than {ENDPOINTS_MAX} endpoints")]
    TooMany,
}

impl From<watcher::Error> for SlicesError {
    fn from(error: watcher::Error) -> Self {
        match code(&error) {
            Some(401) => SlicesError::Unauthorized(error),
            Some(403) => SlicesError::Forbidden(error),
            Some(_) | None => SlicesError::Failed(error),
        }
    }
}

/// The API server's own code; none where it was something else that failed.
fn code(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status.code),
        InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) | NoResourceVersion => None,
    }
}

/// Whether only the place in history is lost from which the watch would have gone on: the list is read anew.
fn is_expired(error: &watcher::Error) -> bool {
    code(error) == Some(410)
}

/// Keeps the list as the Service's slices have it. Ends with its caller.
pub(super) async fn follow(service: ServicePort, api: ApiServer, list: List) {
    let selector = watcher::Config::default()
        .labels(&format!("{SERVICE_LABEL}={}", service.service))
        .page_size(PAGE_SLICES)
        .timeout(WATCH_SECONDS);
    let mut following = Following::new(service, list);
    let mut pauses = DefaultBackoff::default();
    loop {
        match connect(&api, following.service.namespace.as_deref()).await {
            Ok(slices) => following.hear(pin!(watcher::watcher(slices, selector.clone())), &mut pauses).await,
            Err(error) => _ = following.complain(&error, Instant::now()),
        }
        pause(&mut pauses).await;
    }
}

/// The slices of a namespace, or of the pod's own.
async fn connect(api: &ApiServer, namespace: Option<&str>) -> Result<Api<EndpointSlice>, SlicesError> {
    let read = async |name: &str, bytes_max: u64| {
        let file = api.account.join(name);
        let content = watched::read(&file, bytes_max).await;
        content.map_err(|source| SlicesError::Account { file, source })
    };
    let namespace = match namespace {
        Some(given) => given.to_owned(),
        None => String::from_utf8_lossy(&read("namespace", NAMESPACE_BYTES_MAX).await?).trim().to_owned(),
    };
    let authorities = read("ca.crt", AUTHORITIES_BYTES_MAX).await?;
    let client = Client::try_from(client_config(api, &authorities)?).map_err(SlicesError::Client)?;
    Ok(Api::namespaced(client, &namespace))
}

fn client_config(api: &ApiServer, authorities: &[u8]) -> Result<Config, SlicesError> {
    let url = format!("https://{}/", api.address).parse().expect("an address is what stands in a URL");
    let file = api.account.join("ca.crt");
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(authorities).collect();
    let certificates = certificates.map_err(|source| SlicesError::Authorities { file: file.clone(), source })?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut config = Config::new(url);
    config.root_cert = Some(certificates.iter().map(|certificate| certificate.to_vec()).collect());
    // Both are read again by the client: a token is renewed within the hour, and authorities follow each other.
    config.root_cert_file = Some(file);
    config.auth_info = AuthInfo { token_file: Some(text(&api.account.join("token"))), ..AuthInfo::default() };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    // Tried again here, where it is said, and nowhere out of sight.
    config.default_retry = false;
    Ok(config)
}

async fn pause(pauses: &mut DefaultBackoff) {
    tokio::time::sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
}

/// A Service and what has been heard of it.
struct Following {
    service: ServicePort,
    list: List,
    slices: Slices,
    complaint: Complaint,
    /// When something last went wrong.
    complained: Option<Instant>,
}

impl Following {
    fn new(service: ServicePort, list: List) -> Self {
        let slices = Slices { port: service.port.clone(), ..Slices::default() };
        Following { service, list, slices, complaint: Complaint::default(), complained: None }
    }

    /// Follows a watch, which tries again by itself, for as long as it tells no more than is bearable.
    async fn hear<S>(&mut self, mut events: Pin<&mut S>, pauses: &mut DefaultBackoff)
    where
        S: Stream<Item = Result<Event<EndpointSlice>, watcher::Error>>,
    {
        while let Some(heard) = events.next().await {
            match heard {
                Ok(event) => match self.slices.heard(event) {
                    Ok(None) => {}
                    Ok(Some(addresses)) => self.publish(addresses),
                    Err(too_many) => {
                        self.slices.forget();
                        self.complain(&too_many, Instant::now());
                        return;
                    }
                },
                Err(error) => {
                    if !is_expired(&error) {
                        self.complain(&error.into(), Instant::now());
                    }
                    pause(pauses).await;
                }
            }
        }
    }

    fn publish(&mut self, addresses: BTreeSet<Address>) {
        if !addresses.is_empty() {
            self.complaint.is_over();
        } else if self.complaint.is_new("nobody") {
            // No warning: a role's Service has no endpoints before its first pod and after its last.
            tracing::info!(service = %self.service, "nobody is behind this Service yet, or any more");
        }
        self.list.set(addresses);
    }

    /// Says what went wrong, unless that is known; whether it was said.
    fn complain(&mut self, error: &SlicesError, now: Instant) -> bool {
        // The watch does not tell that it is well again as long as nothing changes; that nothing went wrong for long does.
        if self.complained.is_some_and(|last| now.duration_since(last) > QUIET) {
            self.complaint.is_over();
        }
        self.complained = Some(now);
        let text = error.to_string();
        let is_new = self.complaint.is_new(&text);
        if is_new {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(service = %self.service, cause, "{text}; the addresses heard last stay");
        }
        is_new
    }
}

/// The slices of one Service, as far as addresses go.
#[derive(Debug, Default)]
struct Slices {
    /// The port's name, where there may be several.
    port: Option<String>,
    now: BTreeMap<String, Read>,
    /// Those of a list that has not been read to its end.
    coming: BTreeMap<String, Read>,
}

/// What a slice says.
type Read = Result<BTreeSet<Address>, Unusable>;

/// Why a slice says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Unusable {
    /// Names would have to be looked up; nothing of Kubernetes' own makes such slices.
    #[error("its addresses are neither IPv4 nor IPv6")]
    AddressType,
    /// Nothing to dial.
    #[error("it has no TCP port of that name")]
    NoPort,
    /// Several to dial.
    #[error("it has several ports: name one of them")]
    SeveralPorts,
}

impl Slices {
    /// All addresses after an event; none before a list has been read to its end.
    ///
    /// # Errors
    /// When there are too many to hold, or to list.
    fn heard(&mut self, event: Event<EndpointSlice>) -> Result<Option<BTreeSet<Address>>, SlicesError> {
        match event {
            Event::Init => self.coming.clear(),
            Event::InitApply(slice) => {
                let (name, read) = self.read(slice);
                self.coming.insert(name, read);
                return bearable(&self.coming).map(|()| None);
            }
            Event::InitDone => {
                self.now = std::mem::take(&mut self.coming);
                return union(&self.now).map(Some);
            }
            Event::Apply(slice) => {
                let (name, read) = self.read(slice);
                self.now.insert(name, read);
                bearable(&self.now)?;
                return union(&self.now).map(Some);
            }
            Event::Delete(slice) => {
                self.now.remove(slice.metadata.name.as_deref().unwrap_or_default());
                return union(&self.now).map(Some);
            }
        }
        Ok(None)
    }

    /// A slice's name and addresses; says why it has none, unless that is known of it.
    fn read(&self, slice: EndpointSlice) -> (String, Read) {
        let read = addresses(&slice, self.port.as_deref());
        let name = slice.metadata.name.unwrap_or_default();
        if let Err(why) = &read
            && self.now.get(&name) != Some(&read)
        {
            tracing::warn!(slice = name, "an EndpointSlice is left out: {why}");
        }
        (name, read)
    }

    /// Lets go of everything: a list follows.
    fn forget(&mut self) {
        self.now.clear();
        self.coming.clear();
    }
}

fn bearable(slices: &BTreeMap<String, Read>) -> Result<(), SlicesError> {
    let addresses: usize = slices.values().flatten().map(BTreeSet::len).sum();
    if slices.len() + addresses > HELD_MAX { Err(SlicesError::TooMany) } else { Ok(()) }
}

fn union(slices: &BTreeMap<String, Read>) -> Result<BTreeSet<Address>, SlicesError> {
    let all: BTreeSet<Address> = slices.values().flatten().flatten().cloned().collect();
    if all.len() > ENDPOINTS_MAX { Err(SlicesError::TooMany) } else { Ok(all) }
}

/// The addresses of a slice's endpoints.
fn addresses(slice: &EndpointSlice, port: Option<&str>) -> Read {
    if !["IPv4", "IPv6"].contains(&slice.address_type.as_str()) {
        return Err(Unusable::AddressType);
    }
    let port = port_number(slice.ports.as_deref().unwrap_or_default(), port)?;
    let endpoints = slice.endpoints.iter().flatten().filter(|endpoint| serves(endpoint));
    // The others of an endpoint are the same pod's.
    let hosts = endpoints.filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok());
    let address = |host| SocketAddr::new(host, port).to_string().parse();
    Ok(hosts.map(|host| address(host).expect("a socket address with a port is an address")).collect())
}

/// Whether an endpoint is listed. One that is terminating is, for as long as it serves: its status says that it drains, and its
/// KV is still fetched. What is not said is true, as the API has it.
fn serves(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    let is = |said: Option<bool>| said.unwrap_or(true);
    is(conditions.and_then(|said| said.ready)) || is(conditions.and_then(|said| said.serving))
}

/// The number of the port with this name, or of the only one.
fn port_number(ports: &[EndpointPort], name: Option<&str>) -> Result<u16, Unusable> {
    let is_meant = |port: &&EndpointPort| {
        port.protocol.as_deref().unwrap_or("TCP") == "TCP" && name.is_none_or(|name| port.name.as_deref() == Some(name))
    };
    let mut meant = ports.iter().filter(is_meant);
    match (meant.next(), meant.next()) {
        (Some(only), None) => {
            let number = only.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
            number.ok_or(Unusable::NoPort)
        }
        (None, _) => Err(Unusable::NoPort),
        (Some(_), Some(_)) => Err(Unusable::SeveralPorts),
    }
}

#[cfg(test)]
mod tests;
