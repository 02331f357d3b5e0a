//! A model's status: pure, computed from what was applied and observed, never from what is hoped.
//!
//! ```text
//! pods        what keeps one pod from taking work      (from its status alone)
//! conditions  what is so and why                       (from pods, workloads, what is missing, what was refused)
//! roles       how many there are                       (from workloads)
//! last_errors the last words of containers that failed (from pods)
//! transitions what to tell people of a change          (from two statuses)
//! ```
//!
//! docs/objects.md tells people what each field counts.

mod conditions;
mod download;
mod last_errors;
mod pods;
pub(crate) mod replace;
mod roles;
pub mod transitions;
mod words;

use crate::child::{Applied, Objects};
use crate::desired::names;
use crate::failure::Failure;
use crate::observed::Observed;
use crate::plan::{Plan, Workload};
use crate::site::{Owner, Site};
use crate::{Validated, Violation};
use baton_crds::DisaggregatedModelStatus;
use k8s_openapi::jiff::Timestamp;

/// What a status is computed from.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// `metadata.generation` of the manifest that was worked on.
    pub generation: i64,
    /// The status as it stands: it knows since when each condition is what it is.
    pub previous: Option<&'a DisaggregatedModelStatus>,
    /// The time: of conditions that flip, and of nothing else.
    pub now: Timestamp,
    /// What came of the work.
    pub outcome: &'a Outcome<'a>,
    /// The installation.
    pub site: &'a Site,
    /// The model as an owner of objects.
    pub owner: &'a Owner,
    /// The model's name.
    pub name: &'a str,
}

/// What came of working on a manifest.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// It can't be acted on: nothing was read further and nothing was written.
    Invalid(&'a [Violation]),
    /// The cluster could not be read, in these words: nothing was decided.
    Unreadable(&'a str),
    /// Its objects were written, or some were refused.
    Applied {
        /// The manifest.
        model: &'a Validated,
        /// What was decided.
        plan: &'a Plan,
        /// What was read, with what was written in its place.
        observed: &'a Observed,
        /// The objects that stand as wanted.
        objects: &'a Objects<Applied>,
        /// The others.
        failures: &'a [Failure],
    },
}

/// The status that follows from `facts`.
pub fn status(facts: &Facts<'_>) -> DisaggregatedModelStatus {
    let before = facts.previous.cloned().unwrap_or_default();
    let writer = conditions::Writer { generation: facts.generation, now: facts.now, before: &before.conditions };
    match *facts.outcome {
        // What ran goes on running, so what was known of it stays, marked by its own observedGeneration as older.
        Outcome::Invalid(violations) => DisaggregatedModelStatus {
            observed_generation: Some(facts.generation),
            conditions: writer.over_before(conditions::of_violations(violations)),
            ..before
        },
        // The manifest was not acted on, so the generation stays what it was.
        Outcome::Unreadable(words) => {
            DisaggregatedModelStatus { conditions: writer.over_before(conditions::of_unreadable(words)), ..before }
        }
        Outcome::Applied { model, plan, observed, objects, failures } => {
            let workloads = observed.workloads(facts.name, facts.owner);
            let seen = Seen { model, plan, observed, objects, failures, site: facts.site, workloads: &workloads };
            let url = names::url(facts.name, &facts.owner.namespace);
            DisaggregatedModelStatus {
                observed_generation: Some(facts.generation),
                conditions: writer.in_place_of_before(conditions::of_seen(&seen, &writer, &url)),
                url: Some(url),
                revision: Some(plan.serving.clone()),
                update_revision: (plan.target != plan.serving).then(|| plan.target.clone()),
                roles: roles::roles(&seen),
                summary: Some(roles::summary(&seen)),
                download: download::slowest(&seen),
                last_errors: last_errors::last_errors(&observed.pods),
            }
        }
    }
}

/// What was decided, written and seen of a model.
#[derive(Clone, Copy)]
struct Seen<'a> {
    model: &'a Validated,
    plan: &'a Plan,
    observed: &'a Observed,
    objects: &'a Objects<Applied>,
    failures: &'a [Failure],
    site: &'a Site,
    workloads: &'a [Workload],
}

#[cfg(test)]
mod tests;
