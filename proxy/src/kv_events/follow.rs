//! Whose events are followed: one task for each worker that may serve a leg, begun and ended as the table changes. What else is remembered
//! of a worker is forgotten here, too, because here it is seen that another process has taken its place.
//!
//! A worker that does not answer for a while keeps its task, and what it told grows stale by itself. One that leaves the table, that
//! serves this model no more, or in whose place another process has started is forgotten.

use super::ours_stream;
use super::vllm_follower;
use super::vllm_reader::{self, Report, Source};
use crate::choose;
use crate::config::{KvEvents, VllmEvents};
use crate::connector::Connector;
use crate::eligible::{Own, Phase, eligible};
use crate::entropy;
use crate::proxy::Proxy;
use crate::workers::Worker;
use baton_wire::Epoch;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How often the table is looked at. It changes with each status, twice a second for each worker.
const INTERVAL: Duration = Duration::from_millis(250);

/// One worker that may serve, or may again.
struct Task {
    epoch: Epoch,
    /// Nothing where its kind tells nothing.
    _following: Option<AbortOnDropHandle<()>>,
}

/// What is to be done about a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// Follow this process.
    Follow(Epoch),
    /// Go on if it is followed, and begin nothing: it does not answer just now.
    Keep,
    /// Forget it.
    Drop,
}

fn wish(own: Own<'_>, worker: &Worker) -> Wish {
    let served = [Phase::Prefill, Phase::Decode].into_iter().find_map(|phase| eligible(own, worker, phase).ok());
    match (served, worker.status()) {
        (Some(status), _) => Wish::Follow(status.epoch),
        (None, Some(_)) => Wish::Drop,
        (None, None) => Wish::Keep,
    }
}

/// Keeps workers followed until it is dropped.
pub(crate) async fn run(proxy: Arc<Proxy>, settings: KvEvents) {
    let start = starter(&proxy, settings);
    let mut tasks: BTreeMap<u32, Task> = BTreeMap::new();
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let table = proxy.workers.table();
        let own = proxy.own(&table);
        let wishes: BTreeMap<u32, (Wish, &Arc<Worker>)> =
            table.workers.iter().map(|worker| (worker.number, (wish(own, worker), worker))).collect();
        tasks.retain(|number, task| {
            let stays = match wishes.get(number) {
                Some((Wish::Follow(epoch), _)) => *epoch == task.epoch,
                Some((Wish::Keep, _)) => true,
                Some((Wish::Drop, _)) | None => false,
            };
            if !stays {
                proxy.followed.forget(*number);
                choose::forget(&proxy, *number);
            }
            stays
        });
        for (number, (wish, worker)) in wishes {
            if let Wish::Follow(epoch) = wish
                && !tasks.contains_key(&number)
            {
                let following = start.as_ref().map(|start| {
                    proxy.followed.begin(number);
                    AbortOnDropHandle::new(start(Arc::clone(worker)))
                });
                tasks.insert(number, Task { epoch, _following: following });
            }
        }
        proxy.followed.sweep();
    }
}

type Starter = Box<dyn Fn(Arc<Worker>) -> tokio::task::JoinHandle<()> + Send + Sync>;

/// How a worker's task is begun; nothing where its kind tells nothing.
fn starter(proxy: &Arc<Proxy>, settings: KvEvents) -> Option<Starter> {
    let proxy = Arc::clone(proxy);
    match (proxy.connector, settings) {
        (_, KvEvents::Off) => None,
        (Connector::Baton, KvEvents::On(_)) => Some(Box::new(move |worker| {
            let proxy = Arc::clone(&proxy);
            tokio::spawn(async move { ours_stream::follow(&proxy, &worker).await })
        })),
        (Connector::VllmNixl, KvEvents::On(Some(events))) => Some(Box::new(move |worker| {
            let proxy = Arc::clone(&proxy);
            tokio::spawn(async move { follow_vllm(&proxy, &worker, events).await })
        })),
        (Connector::VllmNixl, KvEvents::On(None)) | (Connector::Sglang, KvEvents::On(_)) => None,
    }
}

/// Where an engine publishes: at the host where it, or the proxy beside it, is dialled.
fn source(host: &str, events: VllmEvents) -> Source {
    let at = |port: u16| if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    Source { publisher: at(events.port), replay: events.replay_port.map(at), topic: String::new() }
}

async fn follow_vllm(proxy: &Proxy, worker: &Worker, events: VllmEvents) {
    let source = source(worker.address().host(), events);
    let mut follower = vllm_follower::Follower::default();
    let (number, mut was_connected) = (worker.number, true);
    let report = |report: Report| match report {
        Report::Change(change) => proxy.followed.apply(number, &change),
        Report::Connected => {
            was_connected = true;
            proxy.followed.in_step(number, None);
            tracing::info!(worker = %worker.address(), "following KV events");
        }
        Report::BlockTokens(tokens) => proxy.followed.in_step(number, u32::try_from(tokens).ok()),
        Report::Disconnected(error) => {
            proxy.followed.lost(number, Instant::now());
            if std::mem::take(&mut was_connected) {
                tracing::warn!(worker = %worker.address(), "no KV events: {error}");
            }
        }
        Report::Missed | Report::Malformed => proxy.followed.resync(),
        Report::ReplayFailed(error) => {
            proxy.followed.resync();
            tracing::debug!(worker = %worker.address(), "no replay of KV events: {error}");
        }
    };
    match vllm_reader::follow(&source, &mut follower, report, entropy::quick).await {}
}

#[cfg(test)]
mod tests {
    use super::super::zmq::tests::{Peer, listener};
    use super::*;
    use crate::address::Address;
    use crate::config::{Engine, Fallback, Limits, Mode, Resilience, Selection};
    use crate::estimate::Policy;
    use crate::followed::Blocks;
    use crate::proxy::Settings;
    use crate::workers::fixtures::status;
    use crate::workers::{Link, Report as Said, Workers};
    use baton_wire::Role;
    use baton_wire::status::{State, Status};
    use ed25519_dalek::SigningKey;

    #[test]
    fn only_a_worker_that_may_serve_a_leg_is_followed_and_one_that_is_silent_is_kept() {
        let own = Own { revision: "r1", epoch: None, connector: Connector::Baton };
        let check = |report: Said, expect: Wish| {
            let address = "10.0.0.1:8000".parse().expect("an address");
            let workers = Workers::new(Some(address), &[]);
            workers.report(Link::Own, workers.table().workers[0].address(), report);
            assert_eq!(wish(own, &workers.table().workers[0]), expect);
        };
        let said = |change: fn(&mut Status)| {
            let mut status = status(Role::Prefill);
            change(&mut status);
            Said::Said(Arc::new(status))
        };
        check(said(|_| {}), Wish::Follow(Epoch([1; 16])));
        check(said(|status| status.role = Role::Decode), Wish::Follow(Epoch([1; 16])));
        check(said(|status| status.revision = "r2".into()), Wish::Drop);
        check(said(|status| status.state = State::Draining), Wish::Drop);
        check(Said::Unreachable, Wish::Keep);
        check(Said::NotAsked, Wish::Keep);
    }

    fn proxy(workers: Arc<Workers>) -> Arc<Proxy> {
        let settings = Settings {
            revision: "r1".into(),
            connector: Connector::VllmNixl,
            resilience: Resilience {
                fallback: Fallback::Always,
                enforce_disaggregation: false,
                lease: Duration::from_secs(30),
            },
            selection: Selection { prefill: Mode::KvAware, decode: Mode::KvAware },
            prefiller_header: None,
            trust_routing_hints: false,
            limits: Limits {
                body_bytes_max: 1,
                in_flight_max: 1,
                queued_max: 0,
                request_timeout: INTERVAL,
                first_token_timeout: INTERVAL,
                idle_timeout: INTERVAL,
            },
        };
        let (_, policy) = tokio::sync::watch::channel(Policy::Always);
        Arc::new(Proxy::new(settings, policy, None, SigningKey::from_bytes(&[1; 32]), workers))
    }

    #[tokio::test]
    async fn a_vllm_engine_is_known_by_the_tokens_of_its_blocks_until_it_leaves() {
        let (listener, address) = listener().await;
        let port = address.parse::<std::net::SocketAddr>().expect("an address").port();
        // Its HTTP port is another one at the same host, and nobody asks there.
        let address: Address = "127.0.0.1:9".parse().expect("an address");
        let engine =
            Engine { address: address.clone(), role: Some(Role::Prefill), bootstrap_port: None, is_tls: false };
        let workers = Arc::new(Workers::new(None, &[engine]));
        workers.report(Link::Direct, &address, Said::Said(Arc::new(status(Role::Prefill))));
        let (proxy, number) = (proxy(Arc::clone(&workers)), workers.table().workers[0].number);
        let asked = [Blocks { block_tokens: 1, prompts: vec![vllm_follower::block_hashes(1, &[7, 8], None, None)] }];
        let known = async |expect: &[(u32, u64)]| {
            let known = async {
                while proxy.followed.cached_tokens(&asked, Instant::now()).into_iter().collect::<Vec<_>>() != expect {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), known).await.expect("it is known in time");
        };
        let events = VllmEvents { port, replay_port: None };
        let following = AbortOnDropHandle::new(tokio::spawn(run(Arc::clone(&proxy), KvEvents::On(Some(events)))));
        let mut publisher = Peer::accept(&listener, "PUB").await;
        assert_eq!(publisher.message().await, ["\x01"]);
        known(&[(number, 0)]).await;
        let stored = [&[0x92, 0, 0x91, 0x96][..], b"\xabBlockStored", &[0x91, 7, 0xc0, 0x91, 7, 1, 0xc0]].concat();
        publisher.send(&[b"", &0u64.to_be_bytes(), &stored]).await;
        known(&[(number, 1)]).await;
        assert_eq!(proxy.followed.block_sizes(Instant::now()), [1]);
        let mut draining = status(Role::Prefill);
        draining.state = State::Draining;
        workers.report(Link::Direct, &address, Said::Said(Arc::new(draining)));
        known(&[]).await;
        drop(following);
    }

    #[test]
    fn an_engine_publishes_at_its_host_whatever_that_is() {
        let check = |host: &str, replay_port, publisher: &str, replay: Option<&str>| {
            let source = source(host, VllmEvents { port: 5557, replay_port });
            assert_eq!((source.publisher.as_str(), source.replay.as_deref()), (publisher, replay));
        };
        check("10.0.0.1", None, "10.0.0.1:5557", None);
        check("fd00::1", Some(5558), "[fd00::1]:5557", Some("[fd00::1]:5558"));
    }
}
