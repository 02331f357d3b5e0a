//! Rollouts step by step, then random histories of a small cluster.

use super::*;
use crate::child::Kind;
use crate::manifest;
use crate::observed::Selected;
use proptest::prelude::*;
use std::sync::LazyLock;

const A: &str = "aaaaaaaa";
const B: &str = "bbbbbbbb";
const C: &str = "cccccccc";

fn model(spec: &str) -> Validated {
    let text = format!(
        "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {{name: m}}\nspec: {{model: {{uri: pvc://models}}{spec}}}\n"
    );
    manifest::read_one(&text).expect("a right manifest").validated
}

fn two_roles() -> Validated {
    model(", prefill: {replicas: 2}, decode: {replicas: 3}")
}

fn external() -> Validated {
    model(", prefill: {autoscaling: {provider: External}}, decode: {autoscaling: {provider: External}}")
}

fn standalone() -> Validated {
    model(", routing: {mode: Standalone}")
}

fn unified() -> Validated {
    model(", disaggregation: {policy: Never}")
}

fn workload(revision: &str, role: WorkloadRole, desired: u32, available: u32) -> Workload {
    Workload {
        kind: Kind::Deployment,
        name: format!("m-{}-{revision}", role.as_str()),
        role,
        revision: revision.to_owned(),
        hands_over: true,
        desired,
        replicas: desired,
        updated: desired,
        ready: available,
        available,
        current: true,
        proven: available >= desired,
        replica_failure: None,
    }
}

/// A revision of `two_roles` with so many available replicas.
fn pair(revision: &str, prefill: u32, decode: u32) -> Vec<Workload> {
    vec![workload(revision, WorkloadRole::Prefill, 2, prefill), workload(revision, WorkloadRole::Decode, 3, decode)]
}

fn to(revision: &str) -> Selected {
    Selected { revision: revision.to_owned(), role: WorkloadRole::Decode }
}

/// `target` while these workloads exist and the client Service selects that revision: who serves, and what is kept.
#[track_caller]
fn check(target: &str, workloads: &[Vec<Workload>], selected: Option<&str>, serving: &str, keep: &[&str]) {
    let plan = plan(&two_roles(), target, &workloads.concat(), selected.map(to).as_ref());
    let kept: Vec<_> = plan.keep.iter().map(String::as_str).collect();
    assert_eq!((plan.target.as_str(), plan.serving.as_str(), kept.as_slice()), (target, serving, keep));
}

#[test]
fn a_first_revision_serves_at_once() {
    check(A, &[], None, A, &[]);
    check(A, &[pair(A, 0, 0)], None, A, &[]);
    check(A, &[pair(A, 0, 0)], Some(A), A, &[]);
}

#[test]
fn the_old_revision_serves_until_every_role_of_the_new_one_is_available_in_full() {
    let old = || pair(A, 2, 3);
    check(B, &[old()], Some(A), A, &[A]);
    for (prefill, decode) in [(0, 0), (2, 0), (0, 3), (1, 1), (2, 2), (1, 3)] {
        check(B, &[old(), pair(B, prefill, decode)], Some(A), A, &[A]);
    }
    check(B, &[old(), pair(B, 2, 3)], Some(A), B, &[A]);
}

#[test]
fn the_old_revision_goes_only_after_the_client_service_was_moved() {
    check(B, &[pair(A, 2, 3), pair(B, 2, 3)], Some(A), B, &[A]);
    check(B, &[pair(A, 2, 3), pair(B, 2, 3)], Some(B), B, &[]);
}

#[test]
fn a_pod_that_fails_right_after_the_move_does_not_bring_the_old_revision_back() {
    check(B, &[pair(A, 2, 3), pair(B, 2, 2)], Some(B), B, &[]);
}

// Dynamo #13620: the generation that served was deleted when the rollout was taken back.
#[test]
fn taking_a_rollout_back_keeps_what_serves() {
    check(A, &[pair(A, 2, 3), pair(B, 1, 2)], Some(A), A, &[]);
    // Even where the new one came further than the old one is at the moment.
    check(A, &[pair(A, 1, 2), pair(B, 2, 3)], Some(A), A, &[]);
}

// Dynamo #3567: old pods satisfied the count of new ones.
#[test]
fn old_pods_and_stale_counts_never_move_clients() {
    let old = || pair(A, 2, 3);
    let with = |change: fn(&mut Workload)| {
        let mut new = pair(B, 2, 3);
        change(&mut new[1]);
        new
    };
    check(B, &[old(), with(|decode| decode.current = false)], Some(A), A, &[A]);
    check(B, &[old(), with(|decode| decode.updated = 1)], Some(A), A, &[A]);
    check(B, &[old(), with(|decode| decode.replicas = 4)], Some(A), A, &[A]);
    check(B, &[old(), with(|_| ())], Some(A), B, &[A]);
}

#[test]
fn more_replicas_than_there_are_so_far_count_as_wanted() {
    // The manifest wants 3 decode replicas, but its workload was not scaled yet.
    let behind = vec![workload(B, WorkloadRole::Prefill, 2, 2), workload(B, WorkloadRole::Decode, 1, 1)];
    check(B, &[pair(A, 2, 3), behind], Some(A), A, &[A]);
}

#[test]
fn of_revisions_that_pile_up_only_the_serving_and_the_wanted_one_stay() {
    check(C, &[pair(A, 2, 3), pair(B, 1, 1), pair(C, 0, 0)], Some(A), A, &[A]);
    check(C, &[pair(A, 2, 3), pair(B, 2, 3)], Some(A), A, &[A]);
}

#[test]
fn clients_are_never_moved_from_a_pair_to_none() {
    check(B, &[pair(A, 1, 1), pair(B, 2, 0)], Some(A), A, &[A]);
    // Complete, because its autoscaler set it to 0.
    let none = vec![workload(B, WorkloadRole::Prefill, 0, 0), workload(B, WorkloadRole::Decode, 0, 0)];
    let plan = plan(&external(), B, &[pair(A, 1, 1), none].concat(), Some(&to(A)));
    assert_eq!(plan.serving, A);
}

#[test]
fn clients_without_a_pair_are_moved_to_a_revision_that_has_one() {
    check(B, &[pair(A, 2, 0), pair(B, 1, 1)], Some(A), B, &[A]);
    check(A, &[pair(A, 0, 3), pair(B, 1, 1)], Some(A), B, &[B]);
    check(C, &[pair(A, 1, 1), pair(B, 2, 3), pair(C, 1, 2)], None, B, &[B]);
    check(C, &[pair(A, 1, 1), pair(C, 1, 1)], None, C, &[]);
}

#[test]
fn a_revision_that_served_is_waited_for_and_one_that_never_came_up_is_not() {
    let proven = |mut workloads: Vec<Workload>| {
        workloads.iter_mut().for_each(|workload| workload.proven = true);
        workloads
    };
    check(B, &[proven(pair(A, 0, 0)), pair(B, 2, 0)], Some(A), A, &[A]);
    check(B, &[pair(A, 0, 0), pair(B, 0, 0)], Some(A), B, &[A]);
    // The Service was moved: now it goes, and with it what it takes from the nodes.
    check(B, &[pair(A, 0, 0), pair(B, 0, 0)], Some(B), B, &[]);
}

#[test]
fn a_controller_that_is_behind_is_no_sign_that_pods_went_away() {
    let mut stale = pair(A, 2, 3);
    stale.iter_mut().for_each(|workload| (workload.current, workload.proven) = (false, false));
    check(B, &[stale, pair(B, 1, 1)], Some(A), A, &[A]);
}

#[test]
fn a_revision_of_which_a_workload_is_gone_does_not_serve() {
    let decode_alone = pair(A, 2, 3).split_off(1);
    check(B, &[decode_alone, pair(B, 0, 0)], Some(A), B, &[]);
    check(B, &[], Some(A), B, &[]);
}

#[test]
fn decode_workers_that_serve_both_phases_need_no_prefill() {
    let old = Workload { hands_over: false, ..workload(A, WorkloadRole::Decode, 1, 1) };
    let plan_for = |model: &Validated, new: Vec<Workload>| {
        let workloads = [vec![old.clone()], new].concat();
        plan(model, B, &workloads, Some(&to(A))).serving
    };
    assert_eq!(plan_for(&two_roles(), pair(B, 2, 0)), A);
    assert_eq!(plan_for(&two_roles(), pair(B, 2, 3)), B);
    let new = |available| vec![Workload { hands_over: false, ..workload(B, WorkloadRole::Decode, 1, available) }];
    assert_eq!(plan_for(&unified(), new(0)), A);
    assert_eq!(plan_for(&unified(), new(1)), B);
}

#[test]
fn the_kind_of_workload_makes_no_difference() {
    let groups = |available| -> Vec<_> {
        pair(B, available, available)
            .into_iter()
            .map(|workload| Workload { kind: Kind::LeaderWorkerSet, desired: 1, replicas: 3, updated: 3, ..workload })
            .collect()
    };
    check(B, &[pair(A, 2, 3), groups(1)], Some(A), A, &[A]);
    check(B, &[pair(A, 2, 3), groups(3)], Some(A), B, &[A]);
}

#[test]
fn a_role_that_somebody_else_scales_starts_at_the_count_of_the_revision_it_replaces() {
    let seeds = |workloads: &[Workload], selected: Option<&str>| {
        let plan = plan(&external(), B, workloads, selected.map(to).as_ref());
        WorkloadRole::ALL.map(|role| plan.seed_replicas.get(&role).copied())
    };
    assert_eq!(seeds(&[], None), [Some(1), Some(1), None]);
    assert_eq!(seeds(&pair(A, 2, 3), Some(A)), [Some(2), Some(3), None]);
    // The live count, whoever set it and whether or not its pods are ready.
    let mut scaled = pair(A, 1, 1);
    (scaled[0].desired, scaled[1].desired) = (9, 0);
    assert_eq!(seeds(&scaled, Some(A)), [Some(9), Some(1), None], "never born at 0");
    // Once it is alone: its own.
    assert_eq!(seeds(&pair(B, 2, 3), Some(B)), [Some(2), Some(3), None]);
    // A revision that had no such role: 1.
    assert_eq!(
        seeds(&[Workload { hands_over: false, ..workload(A, WorkloadRole::Decode, 4, 4) }], Some(A)),
        [Some(1), Some(4), None]
    );
    assert!(plan(&two_roles(), B, &pair(A, 2, 3), Some(&to(A))).seed_replicas.is_empty(), "the manifest says");
}

#[test]
fn a_role_that_somebody_else_scales_is_complete_at_its_live_count() {
    let serving = |desired, available| {
        let new = vec![workload(B, WorkloadRole::Prefill, 1, 1), workload(B, WorkloadRole::Decode, desired, available)];
        plan(&external(), B, &[pair(A, 2, 3), new].concat(), Some(&to(A))).serving
    };
    assert_eq!(serving(5, 4), A);
    assert_eq!(serving(5, 5), B);
}

#[test]
fn clients_enter_by_the_front_door_once_it_is_open() {
    let entrance = |model: &Validated, target: &str, workloads: &[Workload], selected: Option<&str>| {
        plan(model, target, workloads, selected.map(to).as_ref()).entrance
    };
    let one = |revision: &str, available| {
        vec![
            workload(revision, WorkloadRole::Prefill, 1, available),
            workload(revision, WorkloadRole::Decode, 1, available),
        ]
    };
    let door = |revision: &str, available| vec![workload(revision, WorkloadRole::Proxy, 1, available)];
    let (door_wanted, none_wanted) = (standalone(), model(""));
    assert_eq!(entrance(&none_wanted, A, &[], None), WorkloadRole::Decode);
    assert_eq!(entrance(&door_wanted, A, &[], None), WorkloadRole::Proxy);
    // Sidecar to Standalone is no new revision: until the door is open, clients stay where they are served.
    assert_eq!(entrance(&door_wanted, A, &one(A, 1), Some(A)), WorkloadRole::Decode);
    assert_eq!(entrance(&door_wanted, A, &[one(A, 1), door(A, 0)].concat(), Some(A)), WorkloadRole::Decode);
    assert_eq!(entrance(&door_wanted, A, &[one(A, 1), door(A, 1)].concat(), Some(A)), WorkloadRole::Proxy);
    // And back.
    assert_eq!(entrance(&none_wanted, A, &[one(A, 1), door(A, 1)].concat(), Some(A)), WorkloadRole::Decode);
    // An older revision keeps the door that it has, and gets none.
    assert_eq!(entrance(&none_wanted, B, &[one(A, 1), door(A, 1)].concat(), Some(A)), WorkloadRole::Proxy);
    assert_eq!(entrance(&door_wanted, B, &[one(A, 1), one(B, 0), door(B, 1)].concat(), Some(A)), WorkloadRole::Decode);
}

#[test]
fn a_front_door_that_is_not_open_holds_a_rollout_up() {
    let one = |revision: &str| {
        vec![workload(revision, WorkloadRole::Prefill, 1, 1), workload(revision, WorkloadRole::Decode, 1, 1)]
    };
    let serving = |door| {
        let workloads = [one(A), one(B), vec![workload(B, WorkloadRole::Proxy, 1, door)]].concat();
        plan(&standalone(), B, &workloads, Some(&to(A))).serving
    };
    assert_eq!(serving(0), A);
    assert_eq!(serving(1), B);
}

/// A cluster as far as a rollout goes: workloads with their counts, and what the client Service selects.
#[derive(Clone, Debug, Default)]
struct World {
    workloads: Vec<Workload>,
    selected: Option<Selected>,
}

impl World {
    /// Does what a plan says, in the order in which `apply` writes, and stops after so many writes.
    fn apply(&mut self, model: &Validated, plan: &Plan, mut writes: usize) {
        let mut write = || {
            let goes_on = writes > 0;
            writes = writes.saturating_sub(1);
            goes_on
        };
        for role in desired::roles(model) {
            let replicas = replicas(model, role).expect("a role that is wanted");
            let live = self.workloads.iter_mut().find(|live| live.role == role && live.revision == plan.target);
            match (live, replicas) {
                (Some(live), Replicas::Fixed(count)) if live.desired != count.get() => {
                    if !write() {
                        return;
                    }
                    (live.desired, live.current) = (count.get(), false);
                }
                (Some(_), Replicas::Fixed(_) | Replicas::External) => {}
                (None, _) => {
                    if !write() {
                        return;
                    }
                    let desired = match replicas {
                        Replicas::Fixed(count) => count.get(),
                        Replicas::External => plan.seed_replicas[&role],
                    };
                    self.workloads.push(Workload {
                        replicas: 0,
                        updated: 0,
                        current: false,
                        proven: false,
                        hands_over: model.disaggregation.prefill().is_some(),
                        ..workload(&plan.target, role, desired, 0)
                    });
                }
            }
        }
        let wanted = Selected { revision: plan.serving.clone(), role: plan.entrance };
        if self.selected.as_ref() != Some(&wanted) {
            if !write() {
                return;
            }
            self.selected = Some(wanted);
        }
        let stays = |live: &Workload| {
            if live.revision == plan.target {
                replicas(model, live.role).is_some()
            } else {
                plan.keep.contains(&live.revision)
            }
        };
        while let Some(goes) = self.workloads.iter().position(|live| !stays(live)) {
            if !write() {
                return;
            }
            self.workloads.remove(goes);
        }
    }

    /// Every pod that is asked for becomes ready.
    fn settle(&mut self) {
        for live in &mut self.workloads {
            let all = live.desired;
            (live.replicas, live.updated, live.ready, live.available) = (all, all, all, all);
            (live.current, live.proven) = (true, true);
        }
    }

    fn pairs(&self, revision: &str) -> u32 {
        pairs(self.workloads.iter().filter(|live| live.revision == revision))
    }
}

/// What may happen between two reconciles.
#[derive(Clone, Debug)]
enum Happening {
    /// Somebody changes the manifest to one of four.
    Manifest(usize),
    /// A workload's pods come and go.
    Counts { which: usize, updated: u32, available: u32 },
    /// A workload's spec changes, or its controller is behind.
    Stale(usize),
    /// Somebody scales a workload.
    Scaled(usize, u32),
    /// Somebody deletes a workload.
    Deleted(usize),
    /// Somebody deletes the client Service, or makes it select a revision of their own choice.
    Selected(Option<usize>),
    /// The operator plans, and ends after so many writes.
    Reconcile(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        2 => (0..4usize).prop_map(Happening::Manifest),
        4 => (0..9usize, 0..4u32, 0..4u32).prop_map(|(which, updated, available)| Happening::Counts { which, updated, available }),
        1 => (0..9usize).prop_map(Happening::Stale),
        1 => (0..9usize, 0..4u32).prop_map(|(which, count)| Happening::Scaled(which, count)),
        1 => (0..9usize).prop_map(Happening::Deleted),
        1 => proptest::option::of(0..4usize).prop_map(Happening::Selected),
        6 => prop_oneof![Just(usize::MAX), 0..6usize].prop_map(Happening::Reconcile),
    ]
}

/// The manifests that somebody changes between. The first two are of one revision: the routing mode is none of its fields.
static MANIFESTS: LazyLock<[(Validated, &str); 4]> = LazyLock::new(|| {
    let with_front_door = model(", prefill: {replicas: 2}, decode: {replicas: 3}, routing: {mode: Standalone}");
    [(two_roles(), A), (with_front_door, A), (external(), B), (unified(), C)]
});

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_clients_keep_a_pair_and_the_target_wins(history in proptest::collection::vec(happening(), 0..40)) {
        let manifests = &*MANIFESTS;
        let mut world = World::default();
        let mut manifest = 0;
        for happening in history {
            let revisions = [A, B, C, "dddddddd"];
            match happening {
                Happening::Manifest(which) => manifest = which,
                Happening::Counts { which, updated, available } => {
                    if let Some(live) = world.workloads.get_mut(which) {
                        live.replicas = live.desired;
                        live.updated = updated.min(live.desired);
                        live.available = available.min(live.desired);
                        live.current = true;
                        live.proven |= live.available == live.desired && live.updated == live.desired;
                    }
                }
                Happening::Stale(which) => {
                    if let Some(live) = world.workloads.get_mut(which) {
                        live.current = false;
                    }
                }
                Happening::Scaled(which, count) => {
                    if let Some(live) = world.workloads.get_mut(which) {
                        (live.desired, live.current) = (count, false);
                    }
                }
                Happening::Deleted(which) => {
                    if which < world.workloads.len() {
                        world.workloads.remove(which);
                    }
                }
                Happening::Selected(which) => {
                    let select = |which: usize| Selected { revision: revisions[which].to_owned(), role: WorkloadRole::Decode };
                    world.selected = which.map(select);
                }
                Happening::Reconcile(writes) => {
                    let (model, target) = &manifests[manifest];
                    step(&mut world, model, target, writes)?;
                }
            }
        }

        // From here on nothing happens but that pods become ready. A role that somebody scaled to zero needs them once more:
        // it would hold the rollout up as long as clients have a pair elsewhere.
        let (model, target) = &manifests[manifest];
        world.workloads.iter_mut().for_each(|live| live.desired = live.desired.max(1));
        for _ in 0..STEPS_MAX {
            step(&mut world, model, target, usize::MAX)?;
            world.settle();
        }
        let before = format!("{world:?}");
        step(&mut world, model, target, usize::MAX)?;
        prop_assert_eq!(format!("{world:?}"), before, "a settled cluster is left alone");
        prop_assert!(world.workloads.iter().all(|live| live.revision == *target));
        prop_assert_eq!(world.workloads.len(), desired::roles(model).len());
        let selected = world.selected.expect("the client Service is there");
        let entrance = desired::entrance(model);
        prop_assert_eq!((selected.revision.as_str(), selected.role), (*target, entrance));
    }

    #[test]
    fn the_order_in_which_workloads_are_listed_makes_no_difference(
        counts in proptest::collection::vec((0..3usize, 0..3usize, 0..4u32, any::<bool>(), any::<bool>()), 0..8),
        selected in proptest::option::of(0..3usize),
    ) {
        let mut workloads: Vec<Workload> = Vec::new();
        for (revision, role, available, current, proven) in counts {
            let made = workload([A, B, C][revision], WorkloadRole::ALL[role], 2, available);
            if !workloads.iter().any(|live| live.name == made.name) {
                workloads.push(Workload { current, proven, ..made });
            }
        }
        let selected = selected.map(|which| to([A, B, C][which]));
        let model = two_roles();
        let one_way = plan(&model, B, &workloads, selected.as_ref());
        workloads.reverse();
        prop_assert_eq!(plan(&model, B, &workloads, selected.as_ref()), one_way);
    }
}

/// Steps in which a rollout is over once pods become ready: make the target, move clients, remove the rest; and one more where
/// the front door opens later than the workers.
const STEPS_MAX: usize = 4;

/// One reconcile, with what must be true of each.
fn step(world: &mut World, model: &Validated, target: &str, writes: usize) -> Result<(), TestCaseError> {
    let plan = plan(model, target, &world.workloads, world.selected.as_ref());
    let before = world.clone();
    let pairs_before = world.selected.as_ref().map_or(0, |selected| before.pairs(&selected.revision));
    prop_assert_eq!(plan.target.as_str(), target);
    prop_assert!(plan.serving == target || plan.keep.contains(&plan.serving), "what serves is made or kept");
    prop_assert!(!plan.keep.contains(target) && plan.keep.len() <= 2);
    if pairs_before > 0 {
        prop_assert!(before.pairs(&plan.serving) > 0, "clients leave a pair for none");
        let selected = before.selected.as_ref().expect("it has pairs").revision.as_str();
        let complete = is_complete(model, before.workloads.iter().filter(|live| live.revision == target));
        prop_assert!(
            plan.serving == selected || (plan.serving == target && complete),
            "clients leave a pair for an incomplete target"
        );
    } else {
        let better = before
            .workloads
            .iter()
            .find(|live| before.workloads.iter().all(|other| other.current) && before.pairs(&live.revision) > 0);
        prop_assert!(
            better.is_none() || before.pairs(&plan.serving) > 0,
            "clients stay without a pair though there is one"
        );
    }
    world.apply(model, &plan, writes);
    for old in before.workloads.iter().filter(|live| live.revision != target) {
        if let Some(now) = world.workloads.iter().find(|live| live.name == old.name) {
            prop_assert_eq!(now, old, "a workload of another revision is left as it is, or removed");
        }
    }
    if let Some(selected) = &world.selected {
        let stands = |live: &Workload| live.revision == selected.revision;
        let had = before.workloads.iter().filter(|live| stands(live)).count();
        let has = world.workloads.iter().filter(|live| stands(live)).count();
        let wanted_less = selected.revision == target || before.pairs(&selected.revision) == 0;
        prop_assert!(has >= had || wanted_less, "what clients reach is removed");
    }
    Ok(())
}
