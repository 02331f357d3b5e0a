//! Whose events are followed: one task for each worker that may serve a leg, begun and ended as the table changes; of a vLLM engine
//! with data-parallel ranks one within it for each rank, for each has a cache and publishes at a port of its own. What else is remembered
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
use crate::prefix::Holder;
use crate::proxy::Proxy;
use crate::workers::Worker;
use baton_wire::Epoch;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How often the table is looked at. It changes with each status, twice a second for each worker.
const INTERVAL: Duration = Duration::from_millis(250);

/// One worker that may serve, or may again.
struct Task {
    epoch: Epoch,
    ranks: u32,
    /// Nothing where its kind tells nothing.
    _following: Option<AbortOnDropHandle<()>>,
}

/// What is to be done about a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// Follow this process, all its ranks.
    Follow { epoch: Epoch, ranks: u32 },
    /// Go on if it is followed, and begin nothing: it does not answer just now.
    Keep,
    /// Forget it.
    Drop,
}

fn wish(own: Own<'_>, worker: &Worker) -> Wish {
    let served = [Phase::Prefill, Phase::Decode].into_iter().find_map(|phase| eligible(own, worker, phase).ok());
    match (served, worker.status()) {
        (Some(status), _) => Wish::Follow { epoch: status.epoch, ranks: worker.rank_loads().len().max(1) as u32 },
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
                Some((Wish::Follow { epoch, ranks }, _)) => (*epoch, *ranks) == (task.epoch, task.ranks),
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
            if let Wish::Follow { epoch, ranks } = wish
                && !tasks.contains_key(&number)
            {
                let following = start.as_ref().map(|start| {
                    (0..ranks).for_each(|dp_rank| proxy.followed.begin(Holder { worker: number, dp_rank }));
                    AbortOnDropHandle::new(start(Arc::clone(worker), ranks))
                });
                tasks.insert(number, Task { epoch, ranks, _following: following });
            }
        }
        proxy.followed.sweep();
    }
}

type Starter = Box<dyn Fn(Arc<Worker>, u32) -> tokio::task::JoinHandle<()> + Send + Sync>;

/// How a worker's task is begun; nothing where its kind tells nothing.
fn starter(proxy: &Arc<Proxy>, settings: KvEvents) -> Option<Starter> {
    let proxy = Arc::clone(proxy);
    match (proxy.connector, settings) {
        (_, KvEvents::Off) => None,
        (Connector::Baton, KvEvents::On(_)) => Some(Box::new(move |worker, _| {
            let proxy = Arc::clone(&proxy);
            tokio::spawn(async move { ours_stream::follow(&proxy, &worker).await })
        })),
        (Connector::VllmNixl, KvEvents::On(Some(events))) => Some(Box::new(move |worker, ranks| {
            // Ends with the task: all ranks, or none.
            let mut each = JoinSet::new();
            for rank in 0..ranks {
                let (proxy, worker) = (Arc::clone(&proxy), Arc::clone(&worker));
                each.spawn(async move { follow_vllm(&proxy, &worker, rank, events).await });
            }
            tokio::spawn(async move { while each.join_next().await.is_some() {} })
        })),
        (Connector::VllmNixl, KvEvents::On(None)) | (Connector::Sglang, KvEvents::On(_)) => None,
    }
}

/// Where a rank of an engine publishes: at the host where the engine, or the proxy beside it, is dialled. vLLM adds the rank to both
/// ports. Nothing where a port would be past the last.
fn source(host: &str, rank: u32, events: VllmEvents) -> Option<Source> {
    let at = |port: u16| if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let of_rank = |port: u16| u16::try_from(u32::from(port) + rank).ok().map(at);
    let replay = match events.replay_port {
        None => None,
        Some(port) => Some(of_rank(port)?),
    };
    Some(Source { publisher: of_rank(events.port)?, replay, topic: String::new() })
}

async fn follow_vllm(proxy: &Proxy, worker: &Worker, rank: u32, events: VllmEvents) {
    let Some(source) = source(worker.address().host(), rank, events) else {
        return tracing::warn!(worker = %worker.address(), rank, "no KV events: its port would be above 65535");
    };
    let mut follower = vllm_follower::Follower::default();
    let (holder, mut was_connected) = (Holder { worker: worker.number, dp_rank: rank }, true);
    let report = |report: Report| match report {
        Report::Change(change) => proxy.followed.apply(holder, &change),
        Report::Connected => {
            was_connected = true;
            proxy.followed.in_step(holder, None);
            tracing::info!(worker = %worker.address(), rank, "following KV events");
        }
        Report::BlockTokens(tokens) => proxy.followed.in_step(holder, u32::try_from(tokens).ok()),
        Report::Disconnected(error) => {
            proxy.followed.lost(holder, Instant::now());
            if std::mem::take(&mut was_connected) {
                tracing::warn!(worker = %worker.address(), rank, "no KV events: {error}");
            }
        }
        Report::Missed | Report::Malformed => proxy.followed.resync(),
        Report::ReplayFailed(error) => {
            proxy.followed.resync();
            tracing::debug!(worker = %worker.address(), rank, "no replay of KV events: {error}");
        }
    };
    match vllm_reader::follow(&source, &mut follower, report, entropy::quick).await {}
}

#[cfg(test)]
mod tests {
    use super::super::zmq::tests::{Peer, listener};
    use super::*;
    use crate::address::Address;
    use crate::config::Engine;
    use crate::followed::Blocks;
    use crate::proxy::fixtures::proxy;
    use crate::workers::fixtures::status;
    use crate::workers::{Link, Report as Said, Workers};
    use baton_wire::Role;
    use baton_wire::status::{State, Status};

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
        let follow = |ranks| Wish::Follow { epoch: Epoch([1; 16]), ranks };
        check(said(|_| {}), follow(1));
        check(said(|status| status.role = Role::Decode), follow(1));
        check(said(|status| status.rank_loads = vec![0; 4]), follow(4));
        check(said(|status| status.revision = "r2".into()), Wish::Drop);
        check(said(|status| status.state = State::Draining), Wish::Drop);
        check(Said::Unreachable, Wish::Keep);
        check(Said::NotAsked, Wish::Keep);
    }

    /// One engine with this address and status.
    fn direct(address: &Address, said: Status) -> Arc<Workers> {
        let engine = Engine {
            address: address.clone(),
            role: Some(Role::Prefill),
            bootstrap_port: None,
            dp_size: None,
            is_tls: false,
        };
        let workers = Arc::new(Workers::new(None, &[engine]));
        workers.report(Link::Direct, address, Said::Said(Arc::new(said)));
        workers
    }

    async fn becomes(proxy: &Proxy, asked: &[Blocks], expect: &[(Holder, u64)]) {
        let known = async {
            loop {
                let mut known: Vec<_> = proxy.followed.cached_tokens(asked, Instant::now()).into_iter().collect();
                known.sort_unstable();
                if known == expect {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), known).await.expect("it is known in time");
    }

    /// One block of one token, at the start of a sequence.
    fn stored(token: u8) -> Vec<u8> {
        [&[0x92, 0, 0x91, 0x96][..], b"\xabBlockStored", &[0x91, token, 0xc0, 0x91, token, 1, 0xc0]].concat()
    }

    /// Two listeners at ports one after the other.
    async fn neighbours() -> [(tokio::net::TcpListener, u16); 2] {
        loop {
            let (first, address) = listener().await;
            let port = address.parse::<std::net::SocketAddr>().expect("an address").port();
            let Some(next) = port.checked_add(1) else { continue };
            if let Ok(second) = tokio::net::TcpListener::bind(("127.0.0.1", next)).await {
                return [(first, port), (second, next)];
            }
        }
    }

    #[tokio::test]
    async fn each_rank_of_a_vllm_engine_is_followed_at_its_own_port() {
        let [(first, port), (second, _)] = neighbours().await;
        let address: Address = "127.0.0.1:9".parse().expect("an address");
        let workers = direct(&address, Status { rank_loads: vec![0; 2], ..status(Role::Prefill) });
        let (proxy, worker) = (proxy(Connector::VllmNixl, Arc::clone(&workers)), workers.table().workers[0].number);
        let asked = [Blocks { block_tokens: 1, prompts: vec![vllm_follower::block_hashes(1, &[7, 8], None, None)] }];
        let events = VllmEvents { port, replay_port: None };
        let following = AbortOnDropHandle::new(tokio::spawn(run(Arc::clone(&proxy), KvEvents::On(Some(events)))));
        let mut publishers = [Peer::accept(&first, "PUB").await, Peer::accept(&second, "PUB").await];
        for publisher in &mut publishers {
            assert_eq!(publisher.message().await, ["\x01"]);
        }
        let rank = |dp_rank| Holder { worker, dp_rank };
        becomes(&proxy, &asked, &[(rank(0), 0), (rank(1), 0)]).await;
        publishers[1].send(&[b"", &0u64.to_be_bytes(), &stored(7)]).await;
        becomes(&proxy, &asked, &[(rank(0), 0), (rank(1), 1)]).await;
        publishers[0].send(&[b"", &0u64.to_be_bytes(), &stored(9)]).await;
        becomes(&proxy, &asked, &[(rank(0), 0), (rank(1), 1)]).await;
        // It turns out to have one rank: nothing that another rank held is believed any more.
        workers.report(Link::Direct, &address, Said::Said(Arc::new(status(Role::Prefill))));
        let mut publisher = Peer::accept(&first, "PUB").await;
        assert_eq!(publisher.message().await, ["\x01"]);
        becomes(&proxy, &asked, &[(rank(0), 0)]).await;
        drop(following);
    }

    #[tokio::test]
    async fn a_vllm_engine_is_known_by_the_tokens_of_its_blocks_until_it_leaves() {
        let (listener, address) = listener().await;
        let port = address.parse::<std::net::SocketAddr>().expect("an address").port();
        // Its HTTP port is another one at the same host, and nobody asks there.
        let address: Address = "127.0.0.1:9".parse().expect("an address");
        let workers = direct(&address, status(Role::Prefill));
        let (proxy, number) = (proxy(Connector::VllmNixl, Arc::clone(&workers)), workers.table().workers[0].number);
        let asked = [Blocks { block_tokens: 1, prompts: vec![vllm_follower::block_hashes(1, &[7, 8], None, None)] }];
        let known = async |expect: &[(u32, u64)]| {
            let expect: Vec<_> = expect.iter().map(|(number, tokens)| (Holder::of(*number), *tokens)).collect();
            becomes(&proxy, &asked, &expect).await;
        };
        let events = VllmEvents { port, replay_port: None };
        let following = AbortOnDropHandle::new(tokio::spawn(run(Arc::clone(&proxy), KvEvents::On(Some(events)))));
        let mut publisher = Peer::accept(&listener, "PUB").await;
        assert_eq!(publisher.message().await, ["\x01"]);
        known(&[(number, 0)]).await;
        publisher.send(&[b"", &0u64.to_be_bytes(), &stored(7)]).await;
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
        let check = |host: &str, rank, replay_port, publisher: &str, replay: Option<&str>| {
            let source = source(host, rank, VllmEvents { port: 5557, replay_port }).expect("ports are left");
            assert_eq!((source.publisher.as_str(), source.replay.as_deref()), (publisher, replay));
        };
        check("10.0.0.1", 0, None, "10.0.0.1:5557", None);
        check("fd00::1", 0, Some(5558), "[fd00::1]:5557", Some("[fd00::1]:5558"));
        check("10.0.0.1", 3, Some(6557), "10.0.0.1:5560", Some("10.0.0.1:6560"));
        let last = VllmEvents { port: 65_534, replay_port: None };
        assert!(source("h", 1, last).is_some() && source("h", 2, last).is_none());
    }
}
