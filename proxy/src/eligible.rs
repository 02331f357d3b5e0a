//! Whether a worker may serve a phase, and if not, why not: for decisions, debug pages and the gauge of workers alike. Pure.

use crate::connector::Connector;
use crate::workers::{Link, Report, Table, Worker};
use baton_wire::Epoch;
use baton_wire::status::{State, Status};

/// A phase of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// Computing a prompt's KV for a decode worker.
    Prefill,
    /// Generating.
    Decode,
}

/// Why a worker may not serve a phase. A closed list: these are metric labels too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ineligible {
    /// It has not been asked for its status yet.
    NotAsked,
    /// It does not answer.
    Unreachable,
    /// Its answer is not signed by one of this model's proxies.
    Unsigned,
    /// Its answer is no status.
    Garbled,
    /// It is this pod, listed among its own peers.
    Itself,
    /// It serves another revision of the manifest.
    OtherRevision,
    /// It is loading its model.
    Loading,
    /// It takes no new work.
    Draining,
    /// Its role does not serve this phase.
    OtherRole,
    /// It says nowhere to fetch KV from.
    NoKvAddress,
}

impl Ineligible {
    /// The reason as JSON and metric labels spell it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Ineligible::NotAsked => "not-asked",
            Ineligible::Unreachable => "unreachable",
            Ineligible::Unsigned => "unsigned",
            Ineligible::Garbled => "garbled",
            Ineligible::Itself => "itself",
            Ineligible::OtherRevision => "other-revision",
            Ineligible::Loading => "loading",
            Ineligible::Draining => "draining",
            Ineligible::OtherRole => "other-role",
            Ineligible::NoKvAddress => "no-kv-address",
        }
    }
}

/// What a worker is compared with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own<'a> {
    /// The revision that this proxy serves.
    pub(crate) revision: &'a str,
    /// This pod's engine, once known.
    pub(crate) epoch: Option<Epoch>,
    /// How KV is handed over.
    pub(crate) connector: Connector,
}

/// Whether a worker takes new work at all, whatever its role.
pub(crate) fn takes_work<'a>(own: Own<'_>, worker: &'a Worker) -> Result<&'a Status, Ineligible> {
    let status = match &worker.report {
        Report::NotAsked => return Err(Ineligible::NotAsked),
        Report::Unreachable => return Err(Ineligible::Unreachable),
        Report::Unsigned => return Err(Ineligible::Unsigned),
        Report::Garbled => return Err(Ineligible::Garbled),
        Report::Said(status) => status,
    };
    if worker.link == Link::Peer && own.epoch == Some(status.epoch) {
        return Err(Ineligible::Itself);
    }
    if status.revision != own.revision {
        return Err(Ineligible::OtherRevision);
    }
    match status.state {
        State::Loading => Err(Ineligible::Loading),
        State::Draining => Err(Ineligible::Draining),
        State::Ready => Ok(status),
    }
}

/// Whether a worker may serve a phase.
pub(crate) fn eligible<'a>(own: Own<'_>, worker: &'a Worker, phase: Phase) -> Result<&'a Status, Ineligible> {
    let status = takes_work(own, worker)?;
    match phase {
        Phase::Decode if !status.role.decodes() => Err(Ineligible::OtherRole),
        Phase::Prefill if !status.role.prefills_for_others() => Err(Ineligible::OtherRole),
        // Other engines say where their KV is in each answer.
        Phase::Prefill if own.connector == Connector::Baton && status.kv_address.is_none() => {
            Err(Ineligible::NoKvAddress)
        }
        Phase::Decode | Phase::Prefill => Ok(status),
    }
}

/// Whether the proxy itself is ready. Beside an engine that is whether this engine takes work: a pod whose readiness waited for
/// other pods would hold up a rollout of all, and one that rested on them would get work that it can only pass on. A front door
/// is ready while a client's request could be served.
pub(crate) fn is_ready(own: Own<'_>, table: &Table) -> bool {
    match table.own() {
        Some(engine) => takes_work(own, engine).is_ok(),
        None => table.workers.iter().any(|worker| eligible(own, worker, Phase::Decode).is_ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::{Workers, fixtures};
    use baton_wire::Role;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    const OWN: Own<'static> = Own { revision: "r1", epoch: Some(Epoch([9; 16])), connector: Connector::Baton };

    fn worker(link: Link, report: Report) -> Arc<Worker> {
        let address: crate::address::Address = "10.0.0.1:8000".parse().expect("an address");
        let workers = match link {
            Link::Own => Workers::new(Some(address.clone()), &[]),
            Link::Direct => unreachable!("no test has an engine of somebody else"),
            Link::Peer => {
                let workers = Workers::new(None, &[]);
                workers.set_peers(&BTreeSet::from([address.clone()]));
                workers
            }
        };
        workers.report(link, &address, report);
        Arc::clone(&workers.table().workers[0])
    }

    fn said(role: Role, change: impl FnOnce(&mut Status)) -> Report {
        let mut status = fixtures::status(role);
        change(&mut status);
        Report::Said(Arc::new(status))
    }

    #[test]
    fn a_worker_serves_its_phases_when_nothing_speaks_against_it() {
        let check = |report: Report, phase, expect: Result<(), Ineligible>| {
            assert_eq!(eligible(OWN, &worker(Link::Peer, report), phase).map(|_| ()), expect);
        };
        let as_it_is = |_: &mut Status| ();
        check(said(Role::Decode, as_it_is), Phase::Decode, Ok(()));
        check(said(Role::Prefill, as_it_is), Phase::Prefill, Ok(()));
        check(said(Role::PrefillDecode, as_it_is), Phase::Decode, Ok(()));
        check(said(Role::PrefillDecode, as_it_is), Phase::Prefill, Ok(()));
        check(said(Role::Decode, as_it_is), Phase::Prefill, Err(Ineligible::OtherRole));
        check(said(Role::Prefill, as_it_is), Phase::Decode, Err(Ineligible::OtherRole));
        check(said(Role::Decode, |s| s.revision = "r2".into()), Phase::Decode, Err(Ineligible::OtherRevision));
        check(said(Role::Decode, |s| s.state = State::Loading), Phase::Decode, Err(Ineligible::Loading));
        check(said(Role::Decode, |s| s.state = State::Draining), Phase::Decode, Err(Ineligible::Draining));
        check(said(Role::Prefill, |s| s.kv_address = None), Phase::Prefill, Err(Ineligible::NoKvAddress));
        check(said(Role::Decode, |s| s.kv_address = None), Phase::Decode, Ok(()));
        check(Report::NotAsked, Phase::Decode, Err(Ineligible::NotAsked));
        check(Report::Unreachable, Phase::Decode, Err(Ineligible::Unreachable));
        check(Report::Unsigned, Phase::Decode, Err(Ineligible::Unsigned));
        check(Report::Garbled, Phase::Decode, Err(Ineligible::Garbled));
    }

    #[test]
    fn the_own_pod_among_the_peers_is_no_other_worker() {
        let ours = said(Role::Decode, |status| status.epoch = Epoch([9; 16]));
        let as_peer = worker(Link::Peer, ours.clone());
        assert_eq!(eligible(OWN, &as_peer, Phase::Decode).map(|_| ()), Err(Ineligible::Itself));
        let as_own = worker(Link::Own, ours);
        assert_eq!(eligible(OWN, &as_own, Phase::Decode).map(|_| ()), Ok(()));
    }

    #[test]
    fn a_pod_is_ready_with_its_engine_and_a_front_door_with_a_decode_worker() {
        let check = |workers: &[(Link, Report)], expect| {
            let workers = workers.iter().map(|(link, report)| worker(*link, report.clone())).collect();
            assert_eq!(is_ready(OWN, &Table { workers }), expect);
        };
        let as_it_is = |_: &mut Status| ();
        let loading = |status: &mut Status| status.state = State::Loading;
        let draining = |status: &mut Status| status.state = State::Draining;
        let decode = || (Link::Peer, said(Role::Decode, as_it_is));
        check(&[decode()], true);
        check(&[(Link::Peer, said(Role::Prefill, as_it_is))], false);
        check(&[], false);
        check(&[(Link::Own, said(Role::Prefill, as_it_is))], true);
        check(&[(Link::Own, said(Role::Decode, as_it_is))], true);
        check(&[(Link::Own, said(Role::Prefill, loading)), decode()], false);
        check(&[(Link::Own, said(Role::Decode, draining)), decode()], false);
        check(&[(Link::Own, Report::Unreachable), decode()], false);
    }
}
