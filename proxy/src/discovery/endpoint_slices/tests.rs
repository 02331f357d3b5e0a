//! What slices say, whatever their order and history, and what is left of a list when the API server fails.

use super::*;
use crate::discovery::fixtures;
use futures_util::stream;
use k8s_openapi::api::discovery::v1::EndpointConditions;
use kube::api::ObjectMeta;
use kube::core::Status;
use proptest::prelude::*;
use tokio::sync::watch;

fn endpoint(host: &str, ready: Option<bool>, serving: Option<bool>) -> Endpoint {
    let conditions = EndpointConditions { ready, serving, terminating: None };
    Endpoint { addresses: vec![host.to_owned()], conditions: Some(conditions), ..Endpoint::default() }
}

fn tcp(name: &str, port: i32) -> EndpointPort {
    EndpointPort { name: Some(name.to_owned()), port: Some(port), protocol: Some("TCP".to_owned()), app_protocol: None }
}

fn slice(name: &str, hosts: &[&str]) -> EndpointSlice {
    EndpointSlice {
        address_type: if hosts.iter().any(|host| host.contains(':')) { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: Some(hosts.iter().map(|host| endpoint(host, Some(true), Some(true))).collect()),
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        ports: Some(vec![tcp("http", 8000)]),
    }
}

fn listed(text: &str) -> BTreeSet<Address> {
    text.split_whitespace().map(|address| address.parse().expect("an address")).collect()
}

/// A slice of so many addresses, none of which is in one of another number.
fn large(number: u8, count: u16) -> EndpointSlice {
    let hosts: Vec<String> = (0..count).map(|n| format!("10.{number}.{}.{}", n >> 8, n & 255)).collect();
    slice(&format!("large-{number}"), &hosts.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn an_endpoint_is_listed_unless_it_neither_is_ready_nor_serves() {
    let (yes, no) = (Some(true), Some(false));
    for (ready, serving, expect) in [
        (yes, yes, 1),
        // Terminating, and still at work.
        (no, yes, 1),
        // Published before it is ready.
        (yes, no, 1),
        (no, no, 0),
        (None, None, 1),
        (None, no, 1),
        (no, None, 1),
    ] {
        let mut slice = slice("a", &[]);
        slice.endpoints = Some(vec![endpoint("10.0.0.1", ready, serving)]);
        assert_eq!(addresses(&slice, None).expect("usable").len(), expect, "{ready:?} {serving:?}");
    }
    let mut silent = slice("a", &["10.0.0.1"]);
    silent.endpoints = Some(vec![Endpoint { addresses: vec!["10.0.0.1".to_owned()], ..Endpoint::default() }]);
    assert_eq!(addresses(&silent, None), Ok(listed("10.0.0.1:8000")));
}

#[test]
fn an_endpoints_first_address_is_its_address() {
    let mut two = slice("a", &[]);
    let addresses_of = |hosts: &[&str]| Endpoint {
        addresses: hosts.iter().map(|&host| host.to_owned()).collect(),
        ..Endpoint::default()
    };
    two.endpoints =
        Some(vec![addresses_of(&["10.0.0.1", "10.0.0.2"]), addresses_of(&[]), addresses_of(&["worker.example"])]);
    assert_eq!(addresses(&two, None), Ok(listed("10.0.0.1:8000")));
    two.endpoints = None;
    assert_eq!(addresses(&two, None), Ok(BTreeSet::new()));
    assert_eq!(addresses(&slice("six", &["fd00::1", "fd00::1"]), None), Ok(listed("[fd00::1]:8000")));
}

#[test]
fn a_slice_that_cannot_be_dialled_is_left_out_and_says_why() {
    let check = |ports: &[EndpointPort], name: Option<&str>, expect: Result<u16, Unusable>| {
        assert_eq!(port_number(ports, name), expect, "{ports:?} {name:?}");
    };
    let udp = EndpointPort { protocol: Some("UDP".to_owned()), ..tcp("http", 8000) };
    let any = EndpointPort { port: None, ..tcp("http", 8000) };
    let plain = EndpointPort { protocol: None, name: Some(String::new()), ..tcp("", 8000) };
    check(&[tcp("http", 8000)], None, Ok(8000));
    check(&[plain], None, Ok(8000));
    check(&[tcp("http", 8000)], Some("http"), Ok(8000));
    check(&[tcp("http", 8000), tcp("admin", 9090)], Some("admin"), Ok(9090));
    check(&[tcp("http", 8000), tcp("admin", 9090)], None, Err(Unusable::SeveralPorts));
    check(&[udp.clone(), tcp("admin", 9090)], None, Ok(9090));
    check(&[udp], None, Err(Unusable::NoPort));
    check(&[tcp("http", 8000)], Some("admin"), Err(Unusable::NoPort));
    for nothing in [any, tcp("http", 0), tcp("http", 65_536), tcp("http", -1)] {
        check(&[nothing], None, Err(Unusable::NoPort));
    }
    check(&[], None, Err(Unusable::NoPort));
    let mut names = slice("a", &["10.0.0.1"]);
    names.address_type = "FQDN".to_owned();
    assert_eq!(addresses(&names, None), Err(Unusable::AddressType));
}

#[test]
fn a_list_counts_once_it_has_been_read_to_its_end() {
    let mut slices = Slices::default();
    let mut heard = |event| slices.heard(event).expect("few");
    assert_eq!(heard(Event::Init), None);
    assert_eq!(heard(Event::InitApply(slice("a", &["10.0.0.1"]))), None);
    assert_eq!(heard(Event::InitApply(slice("b", &["10.0.0.2"]))), None);
    assert_eq!(heard(Event::InitDone), Some(listed("10.0.0.1:8000 10.0.0.2:8000")));
    // The second list breaks off, and the third one no longer has `a`.
    assert_eq!(heard(Event::Init), None);
    assert_eq!(heard(Event::InitApply(slice("a", &["10.0.0.9"]))), None);
    assert_eq!(heard(Event::Init), None);
    assert_eq!(heard(Event::InitApply(slice("b", &["10.0.0.2"]))), None);
    assert_eq!(heard(Event::InitDone), Some(listed("10.0.0.2:8000")));
    assert_eq!(
        heard(Event::Delete(slice("b", &[]))),
        Some(BTreeSet::new()),
        "an answer that nobody is there is believed"
    );
}

#[test]
fn more_than_is_bearable_is_an_error_before_it_is_held() {
    let most = ENDPOINTS_MAX as u16;
    let mut slices = Slices::default();
    assert_eq!(slices.heard(Event::Apply(large(1, most))).expect("as many as may be").map(|all| all.len()), Some(1000));
    assert!(matches!(slices.heard(Event::Apply(large(2, 1))), Err(SlicesError::TooMany)));
    let mut slices = Slices::default();
    let told = (1..=4).map(|number| slices.heard(Event::InitApply(large(number, most))).is_ok());
    assert_eq!(told.collect::<Vec<_>>(), [true, true, true, false], "a list is given up before its end");
    let mut slices = Slices::default();
    let empty = |number| Event::InitApply(slice(&format!("empty-{number}"), &[]));
    assert_eq!((0..=HELD_MAX).find(|number| slices.heard(empty(*number)).is_err()), Some(HELD_MAX));
}

/// What may happen to slices of five names.
#[derive(Clone, Debug)]
enum Change {
    Apply(EndpointSlice),
    Delete(EndpointSlice),
    /// A list, and whether it is read to its end.
    Relist(Vec<EndpointSlice>, bool),
}

fn any_slice() -> impl Strategy<Value = EndpointSlice> {
    let hosts = proptest::collection::btree_map(1u8..12, (any::<Option<bool>>(), any::<Option<bool>>()), 0..5);
    ("[a-e]", any::<bool>(), hosts, 0u8..8).prop_map(|(name, is_v6, hosts, odd)| {
        let host = |number| if is_v6 { format!("fd00::{number:x}") } else { format!("10.0.0.{number}") };
        let family = if is_v6 { "IPv6" } else { "IPv4" };
        let endpoints = hosts.into_iter().map(|(number, (ready, serving))| endpoint(&host(number), ready, serving));
        EndpointSlice {
            address_type: if odd == 0 { "FQDN" } else { family }.to_owned(),
            endpoints: Some(endpoints.collect()),
            ports: if odd == 1 { None } else { Some(vec![tcp("http", 8000)]) },
            ..slice(&name, &[])
        }
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => any_slice().prop_map(Change::Apply),
        2 => any_slice().prop_map(Change::Delete),
        1 => (proptest::collection::vec(any_slice(), 0..5), any::<bool>()).prop_map(|(all, ends)| Change::Relist(all, ends)),
    ]
}

/// Addresses said plainly: of every slice that can be dialled, each endpoint that is not said to be neither ready nor serving.
fn plainly(slices: &BTreeMap<String, EndpointSlice>) -> BTreeSet<Address> {
    let dialled = slices.values().filter(|slice| slice.address_type != "FQDN" && slice.ports.is_some());
    let mut all = BTreeSet::new();
    for endpoint in dialled.flat_map(|slice| slice.endpoints.iter().flatten()) {
        let said = endpoint.conditions.clone().unwrap_or_default();
        let host = &endpoint.addresses[0];
        if (said.ready, said.serving) != (Some(false), Some(false)) {
            let text = if host.contains(':') { format!("[{host}]:8000") } else { format!("{host}:8000") };
            all.insert(text.parse().expect("an address"));
        }
    }
    all
}

proptest! {
    #[test]
    fn whatever_happens_the_addresses_are_those_of_the_slices_that_stand(changes in proptest::collection::vec(change(), 1..30)) {
        let mut slices = Slices::default();
        let mut standing: BTreeMap<String, EndpointSlice> = BTreeMap::new();
        let name = |slice: &EndpointSlice| slice.metadata.name.clone().expect("it was given one");
        for change in changes {
            let heard = match change {
                Change::Apply(slice) => {
                    standing.insert(name(&slice), slice.clone());
                    slices.heard(Event::Apply(slice))
                }
                Change::Delete(slice) => {
                    standing.remove(&name(&slice));
                    slices.heard(Event::Delete(slice))
                }
                Change::Relist(all, is_whole) => {
                    prop_assert_eq!(slices.heard(Event::Init).expect("few"), None);
                    for slice in &all {
                        prop_assert_eq!(slices.heard(Event::InitApply(slice.clone())).expect("few"), None);
                    }
                    if !is_whole {
                        continue;
                    }
                    standing = all.into_iter().map(|slice| (name(&slice), slice)).collect();
                    slices.heard(Event::InitDone)
                }
            };
            prop_assert_eq!(heard.expect("few"), Some(plainly(&standing)));
        }
    }

    #[test]
    fn how_endpoints_are_dealt_out_to_slices_does_not_matter(homes in proptest::collection::vec(0u8..4, 0..40)) {
        let host = |number: usize| format!("10.0.{}.{}", number >> 4, number & 15);
        let mut dealt: BTreeMap<u8, Vec<String>> = BTreeMap::new();
        for (number, home) in homes.iter().enumerate() {
            dealt.entry(*home).or_default().push(host(number));
        }
        let mut slices = Slices::default();
        let mut last = Some(BTreeSet::new());
        for (home, hosts) in dealt {
            let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
            last = slices.heard(Event::Apply(slice(&home.to_string(), &hosts))).expect("few");
        }
        let all: BTreeSet<Address> =
            (0..homes.len()).map(|number| format!("{}:8000", host(number)).parse().expect("an address")).collect();
        prop_assert_eq!(last, Some(all));
    }
}

fn following() -> (Following, watch::Receiver<BTreeSet<Address>>) {
    let (list, peers) = fixtures::list();
    (Following::new("tiny-decode-0a1b2c3d-peers".parse().expect("a Service"), list), peers)
}

fn refused(code: u16) -> Box<Status> {
    Status::failure("said by the API server", "Reason").with_code(code).boxed()
}

fn silent() -> watcher::Error {
    watcher::Error::InitialListFailed(kube::Error::Service("connection refused".into()))
}

async fn hear(following: &mut Following, events: Vec<Result<Event<EndpointSlice>, watcher::Error>>) {
    following.hear(pin!(stream::iter(events)), &mut DefaultBackoff::default()).await;
}

#[tokio::test(start_paused = true)]
async fn the_list_follows_the_slices_and_outlives_what_fails() {
    let (mut following, peers) = following();
    let failures: [fn() -> watcher::Error; 5] = [
        silent,
        || watcher::Error::InitialListFailed(kube::Error::Api(refused(403))),
        || watcher::Error::WatchStartFailed(kube::Error::Api(refused(500))),
        || watcher::Error::WatchError(refused(410)),
        || watcher::Error::NoResourceVersion,
    ];
    let list = |hosts: &[&str]| vec![Ok(Event::Init), Ok(Event::InitApply(slice("a", hosts))), Ok(Event::InitDone)];
    for failure in failures {
        hear(&mut following, list(&["10.0.0.1"])).await;
        assert!(!following.complaint.stands());
        let before = Instant::now();
        hear(&mut following, vec![Err(failure()), Ok(Event::Init), Err(failure()), Ok(Event::Init)]).await;
        assert_eq!(*peers.borrow(), listed("10.0.0.1:8000"), "{}", failure());
        assert_eq!(following.complaint.stands(), !is_expired(&failure()), "{}", failure());
        assert!(before.elapsed() > Duration::from_millis(500), "nobody is asked again at once");
        hear(&mut following, vec![Ok(Event::Apply(slice("b", &["10.0.0.2"])))]).await;
        assert_eq!(*peers.borrow(), listed("10.0.0.1:8000 10.0.0.2:8000"));
        assert!(!following.complaint.stands());
        hear(&mut following, vec![Ok(Event::Delete(slice("b", &[])))]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn too_many_leave_the_list_as_it_was_and_the_watch_is_given_up() {
    let (mut following, peers) = following();
    hear(&mut following, vec![Ok(Event::Apply(slice("a", &["10.0.0.1"])))]).await;
    let most = ENDPOINTS_MAX as u16;
    let after = Ok(Event::Apply(slice("c", &["10.0.0.3"])));
    hear(&mut following, vec![Ok(Event::Apply(large(2, most))), after]).await;
    assert_eq!(*peers.borrow(), listed("10.0.0.1:8000"), "what came after was not read");
    assert!(following.complaint.stands() && following.slices.now.is_empty());
}

#[test]
fn a_trouble_is_said_once_until_it_changes_or_was_quiet_for_long() {
    let (mut following, _peers) = following();
    let start = Instant::now();
    let mut said = |error: watcher::Error, after: Duration| following.complain(&error.into(), start + after);
    let forbidden = || watcher::Error::WatchError(refused(403));
    assert!(said(silent(), Duration::ZERO));
    assert!(!said(silent(), Duration::from_secs(30)));
    assert!(said(forbidden(), Duration::from_secs(31)));
    assert!(!said(forbidden(), Duration::from_secs(31) + QUIET));
    assert!(said(forbidden(), Duration::from_secs(32) + 2 * QUIET));
}

#[test]
fn a_refusal_says_what_is_lacking() {
    let said = |error: watcher::Error| SlicesError::from(error).to_string();
    let api = |code| kube::Error::Api(refused(code));
    assert!(said(watcher::Error::InitialListFailed(api(403))).contains("bind it to a Role"));
    assert!(said(watcher::Error::WatchError(refused(403))).contains("bind it to a Role"));
    assert!(said(watcher::Error::WatchStartFailed(api(401))).contains("token"));
    assert!(said(watcher::Error::WatchFailed(api(500))).contains("does not tell"));
    assert!(said(silent()).contains("does not tell"));
}

#[tokio::test]
async fn a_service_account_is_a_folder_with_three_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let api = ApiServer { address: "127.0.0.1:6443".parse().expect("an address"), account: folder.path().to_owned() };
    let lacks = async |file: &str, namespace: Option<&str>| {
        let error = connect(&api, namespace).await.map(|_| ()).expect_err("a file is missing");
        let (text, source) = (error.to_string(), std::error::Error::source(&error).map(ToString::to_string));
        assert!(format!("{text} {source:?}").contains(file), "{text} {source:?}");
    };
    let write = |file: &str, content: &str| std::fs::write(folder.path().join(file), content).expect("written");
    lacks("namespace", None).await;
    lacks("ca.crt", Some("team")).await;
    write("namespace", "team\n");
    lacks("ca.crt", None).await;
    write("ca.crt", "-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----\n");
    lacks("ca.crt", None).await;
    let key = rcgen::KeyPair::generate().expect("a key");
    let authority =
        rcgen::CertificateParams::new(Vec::new()).expect("no names").self_signed(&key).expect("a certificate");
    write("ca.crt", &authority.pem());
    lacks("token", None).await;
    write("token", "token");
    let at = async |namespace| connect(&api, namespace).await.expect("all is there").resource_url().to_owned();
    assert_eq!(at(None).await, "/apis/discovery.k8s.io/v1/namespaces/team/endpointslices");
    assert_eq!(at(Some("other")).await, "/apis/discovery.k8s.io/v1/namespaces/other/endpointslices");
}
