//! Which revision serves while another takes its place.
//!
//! A revision is all roles of one manifest: prefill and decode workers of different revisions never share a request, so they
//! change together. The new revision (the target) is made whole beside the old one, clients are moved when every role of it
//! is available in full, and only then does the old one go:
//!
//! ```text
//! make target  ->  every role available in full  ->  move the client Service  ->  remove what is not selected any more
//! ```
//!
//! Nothing is remembered between two reconciles. Which revisions exist is read from labelled workloads, and which of them
//! serves from the client Service's selector, so each call computes the next step alone and a call on the outcome of half a
//! step goes on from there. The serving revision is the first of these that there is:
//!
//! 1. the target, if complete;
//! 2. the selected revision, if it has a ready pair: it is left for nothing less than a complete target;
//! 3. of the others with a ready pair, the one with most pairs: clients are better off there than nowhere;
//! 4. the selected revision, if it once was complete and the target is not (it may be at zero by its autoscaler's will): its
//!    pods are likely to come back before new ones have loaded a model;
//! 5. the target. A revision that never came up is given up at once, so that its pods free the room that the target needs.
//!
//! A *ready pair* is one available replica of each role that serves requests together (decode, and prefill unless decode
//! workers serve both phases); a revision's number of pairs is that of its scarcer role. *Complete* means that each wanted role,
//! the front door included, has as many available replicas as are wanted, counted on its newest spec and without old pods; a
//! target that its autoscaler has set to 0 is complete without a pair, and takes over only from a revision that has none either.
//!
//! Old revisions are never rendered again (their manifest is gone), so a revision can serve only while all its workloads exist.

use crate::observed::Selected;
use crate::plan::{Plan, SEED_REPLICAS_MIN, Workload, WorkloadRole, replicas, wanted};
use crate::validated::Replicas;
use crate::{Validated, desired};
use std::collections::{BTreeMap, BTreeSet};

/// The next step towards `target`, from the workloads that exist and what the client Service selects.
pub fn plan(model: &Validated, target: &str, workloads: &[Workload], selected: Option<&Selected>) -> Plan {
    let revisions = Revisions::new(workloads);
    let selected = selected.map(|selected| selected.revision.as_str());
    let serving = serving(model, target, &revisions, selected);
    let left = selected.filter(|selected| revisions.of(selected).can_stand());
    let keep = [Some(serving), left].into_iter().flatten().filter(|revision| *revision != target);
    Plan {
        target: target.to_owned(),
        serving: serving.to_owned(),
        entrance: entrance(model, target, &revisions, serving),
        keep: keep.map(str::to_owned).collect::<BTreeSet<_>>(),
        seed_replicas: seeds(model, target, &revisions, serving, selected),
    }
}

/// Whether every role that the manifest wants is available in full in this one revision.
pub fn is_complete<'a>(model: &Validated, workloads: impl Iterator<Item = &'a Workload> + Clone) -> bool {
    desired::roles(model).into_iter().all(|role| {
        let workload = workloads.clone().find(|workload| workload.role == role);
        workload
            .zip(replicas(model, role))
            .is_some_and(|(workload, replicas)| workload.is_complete(wanted(replicas, Some(workload))))
    })
}

/// Requests that one revision can serve at the same time at least: the available replicas of its scarcer role. Stale counts
/// are taken as they are: a controller that is behind is no sign that pods went away.
pub fn pairs<'a>(workloads: impl Iterator<Item = &'a Workload> + Clone) -> u32 {
    Revision(workloads.map(|workload| (workload.role, workload)).collect()).pairs()
}

fn serving<'a>(model: &Validated, target: &'a str, revisions: &Revisions<'a>, selected: Option<&'a str>) -> &'a str {
    let pairs = |revision: &str| revisions.of(revision).pairs();
    let complete = is_complete(model, revisions.of(target).0.values().copied());
    if complete && pairs(target) > 0 {
        return target;
    }
    if let Some(selected) = selected.filter(|selected| pairs(selected) > 0) {
        return selected;
    }
    // The target comes last, so that it wins among equals.
    let others = revisions.names().filter(|revision| *revision != target).chain([target]);
    if let Some(other) = others
        .filter(|revision| revisions.of(revision).is_current() && pairs(revision) > 0)
        .max_by_key(|revision| pairs(revision))
    {
        return other;
    }
    selected.filter(|selected| !complete && revisions.of(selected).is_proven()).unwrap_or(target)
}

/// The front door where it is available, and the proxies beside decode workers where it is not but they could serve. While
/// nothing could serve anyway clients wait where the manifest says, so that they are not moved needlessly.
fn entrance(model: &Validated, target: &str, revisions: &Revisions<'_>, serving: &str) -> WorkloadRole {
    let revision = revisions.of(serving);
    let front_door = revision.0.get(&WorkloadRole::Proxy);
    let has_front_door =
        if serving == target { replicas(model, WorkloadRole::Proxy).is_some() } else { front_door.is_some() };
    let available = front_door.is_some_and(|front_door| front_door.available > 0);
    if has_front_door && (available || revision.pairs() == 0) { WorkloadRole::Proxy } else { WorkloadRole::Decode }
}

/// The live counts of the revision that is replaced; of the target itself, once it is the only one.
fn seeds(
    model: &Validated,
    target: &str,
    revisions: &Revisions<'_>,
    serving: &str,
    selected: Option<&str>,
) -> BTreeMap<WorkloadRole, u32> {
    let replaced = [Some(serving), selected].into_iter().flatten().filter(|revision| *revision != target);
    let sources: Vec<_> = replaced.chain([target]).map(|revision| revisions.of(revision)).collect();
    let external = desired::roles(model).into_iter().filter(|role| replicas(model, *role) == Some(Replicas::External));
    external
        .map(|role| {
            let live = sources.iter().find_map(|source| source.0.get(&role)).map(|workload| workload.desired);
            (role, live.unwrap_or(SEED_REPLICAS_MIN).max(SEED_REPLICAS_MIN))
        })
        .collect()
}

/// The workloads by revision.
struct Revisions<'a>(BTreeMap<&'a str, Revision<'a>>);

/// One revision's workloads by role.
#[derive(Clone, Default)]
struct Revision<'a>(BTreeMap<WorkloadRole, &'a Workload>);

impl<'a> Revisions<'a> {
    fn new(workloads: &'a [Workload]) -> Self {
        let mut revisions: BTreeMap<&str, Revision<'_>> = BTreeMap::new();
        for workload in workloads {
            revisions.entry(&workload.revision).or_default().0.insert(workload.role, workload);
        }
        Revisions(revisions)
    }

    fn names(&self) -> impl Iterator<Item = &'a str> {
        self.0.keys().copied()
    }

    /// Empty where there is none of that name.
    fn of(&self, revision: &str) -> Revision<'a> {
        self.0.get(revision).cloned().unwrap_or_default()
    }
}

impl Revision<'_> {
    /// The roles without which it serves nothing; none where one of them does not exist.
    fn pair(&self) -> Option<Vec<&Workload>> {
        let decode = *self.0.get(&WorkloadRole::Decode)?;
        if !decode.hands_over {
            return Some(vec![decode]);
        }
        Some(vec![*self.0.get(&WorkloadRole::Prefill)?, decode])
    }

    fn can_stand(&self) -> bool {
        self.pair().is_some()
    }

    fn pairs(&self) -> u32 {
        self.pair().and_then(|pair| pair.iter().map(|workload| workload.available).min()).unwrap_or(0)
    }

    fn is_current(&self) -> bool {
        self.pair().is_some_and(|pair| pair.iter().all(|workload| workload.current))
    }

    fn is_proven(&self) -> bool {
        self.pair().is_some_and(|pair| pair.iter().all(|workload| workload.proven))
    }
}

#[cfg(test)]
#[path = "rollout_tests.rs"]
mod tests;
