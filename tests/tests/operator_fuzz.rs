//! Whatever is written into a DisaggregatedModel, the operator lives, rests, says what is wrong, and heals when it is put right.
//!
//! One operator runs the models of several namespaces. In each round every slot gets a mutant, new or in place of a model that runs;
//! what the API server lets in must be judged, then all of it is corrected and must settle. First under the shipped
//! definition, then under one that checks nothing, as an older definition would have let things in, and then under the
//! shipped one again with those objects still there.

use anyhow::{Context as _, Result, bail, ensure};
use baton_crds::{DisaggregatedModel, Reason};
use baton_operator::validate;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use system_tests::api_faults::Verb;
use system_tests::kube::{ControlPlane, Namespace, Tier, say};
use system_tests::mutate::{Mutant, Mutator};
use system_tests::operator::manifest::{self, tiny, with};
use system_tests::operator::model::{Condition, Model, condition};
use system_tests::operator::{Admin, Installation, Operator, PATIENCE, Stage, Type, definition, wait};

/// Mutants that are sent, unless `BATON_FUZZ_CASES` says how many.
const CASES: usize = 1000;
/// Models at a time.
const SLOTS: usize = 80;
const NAMESPACES: usize = 4;
/// Requests of ours at once.
const AT_ONCE: usize = 8;
/// How long the operator is watched at rest, and before that left alone with the pods of the last change.
const QUIET: Duration = Duration::from_secs(5);
/// Reconciles of one model in that time: one every 5 s while something is missing, one every 2 s while something downloads, five while
/// pauses after failures still grow, and some for its pods. A hot loop makes thirty, one in each window of the queue.
const RECONCILES_MAX: usize = 12;
/// Writes of one model in that time: a status for each change of a pod.
const WRITES_MAX: usize = 8;
/// How long one round of corrections may take on a machine with other work.
const HEALED: Duration = Duration::from_secs(180);

/// What comes with a manifest, right in itself.
const METADATA: &[&str] = &[
    r#"{"labels": {"baton.dev/model": "other", "app.kubernetes.io/managed-by": "baton-operator"}}"#,
    r#"{"labels": {"example.com/long": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "a": ""}}"#,
    r#"{"annotations": {"example.com/text": "\u0000\n🦀 {{ . }}", "baton.dev/revision": "00000000"}}"#,
];

/// A place for one model after another.
struct Slot {
    number: usize,
    /// Models that were there before: names are never used again.
    index: usize,
    namespace: String,
    is_there: bool,
    /// What was changed in the model that is there; empty when it is right.
    changes: Vec<String>,
}

impl Slot {
    fn name(&self) -> String {
        format!("f{}-{}", self.number, self.index)
    }

    fn key(&self) -> (String, String) {
        (self.namespace.clone(), self.name())
    }

    /// One pod for most, two for some.
    fn base(&self) -> Value {
        let whole = tiny(&self.name());
        if self.number.is_multiple_of(4) {
            return whole;
        }
        with(whole, &json!({"spec": {"prefill": null, "disaggregation": {"policy": "Never"}}}))
    }

    /// A right manifest for what is there: its kind of source and its engine can't be changed.
    fn right(&self, there: &Value) -> Value {
        let uri = there["spec"]["model"]["uri"].as_str().unwrap_or_default();
        let uri = ["hf://org/repo", "s3://bucket/prefix", "oci://registry.example.com/model:v1"]
            .into_iter()
            .find(|right| uri.starts_with(&right[..right.find("://").map_or(0, |end| end + 3)]))
            .map_or_else(|| format!("pvc://{}/tiny", manifest::CLAIM), str::to_owned);
        let right = with(self.base(), &json!({"spec": {"model": {"uri": uri}}}));
        match there["spec"]["engine"]["type"].as_str() {
            Some(engine @ ("VLLM" | "SGLang")) => {
                let engine = json!({"type": engine, "image": "registry.example.com/engine:v1"});
                with(right, &json!({"spec": {"engine": engine}}))
            }
            _ => right,
        }
    }
}

/// Does something for each of `items`, several at once, in threads of its own.
fn each<T: Sync, R: Send>(items: &[T], act: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let act = &act;
    let chunks = items.chunks(items.len().div_ceil(AT_ONCE).max(1));
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            chunks.map(|some| scope.spawn(move || some.iter().map(act).collect::<Result<Vec<R>>>())).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(all)
    })
}

/// What the API server said to a mutant.
enum Answer {
    Taken,
    Refused(String),
}

struct Fuzz<'a> {
    admin: &'a Admin,
    operator: &'a mut Operator,
    installation: &'a Installation<'a>,
    mutator: Mutator,
    slots: Vec<Slot>,
    sent: usize,
    taken: usize,
    reasons: BTreeMap<String, usize>,
    corrected: usize,
    most_reconciles: usize,
    most_writes: usize,
}

type Models = BTreeMap<(String, String), Value>;

impl Fuzz<'_> {
    fn models(&self) -> Result<Models> {
        let mut all = Models::new();
        for object in self.admin.list(Type::MODEL, "", "")? {
            let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
            all.insert((text("namespace"), text("name")), object);
        }
        Ok(all)
    }

    /// Sends a manifest in place of what is there, or as something new.
    fn send(&self, slot: &Slot, manifest: &Value, validation: &str) -> Result<Answer> {
        let collection = format!("/apis/baton.dev/v1alpha1/namespaces/{}/disaggregatedmodels", slot.namespace);
        let mut manifest = manifest.clone();
        manifest["metadata"]["name"] = json!(slot.name());
        let answer = wait(PATIENCE, "an answer that is no conflict", || {
            let path = if slot.is_there { format!("{collection}/{}", slot.name()) } else { collection.clone() };
            let path = format!("{path}?fieldValidation={validation}");
            let sent = if slot.is_there {
                let there = self.admin.need(Type::MODEL, &slot.namespace, &slot.name())?;
                manifest["metadata"]["resourceVersion"] = there["metadata"]["resourceVersion"].clone();
                self.admin.raw("PUT", &path, Some(&manifest))
            } else {
                self.admin.raw("POST", &path, Some(&manifest))
            };
            match sent {
                Ok(_) => Ok(Some(Answer::Taken)),
                Err(kube::Error::Api(status)) if matches!(status.code, 400 | 413 | 422) => {
                    Ok(Some(Answer::Refused(status.message.clone())))
                }
                Err(error) => Err(error.into()),
            }
        })?;
        Ok(answer)
    }

    /// Sends a mutant to each slot, and another one where the API server refuses it, until `budget` are sent or a few tries
    /// are over.
    fn mutate(&mut self, budget: usize, is_lax: bool) -> Result<()> {
        const TRIES: usize = 4;
        let end = self.sent + budget;
        for slot in &mut self.slots {
            if slot.is_there && self.mutator.rng.once_in(4) {
                self.admin.delete(Type::MODEL, &slot.namespace, &slot.name())?;
                (slot.index, slot.is_there) = (slot.index + 1, false);
            }
        }
        for _ in 0..TRIES {
            let mut work = Vec::new();
            for index in 0..self.slots.len() {
                if !self.slots[index].changes.is_empty() || self.sent >= end {
                    continue;
                }
                let base = self.slots[index].base();
                let mut mutant = if is_lax { self.mutator.wild_mutant(&base) } else { self.mutator.mutant(&base) };
                if self.mutator.rng.once_in(8) {
                    let text: &&str = self.mutator.rng.one(METADATA);
                    let metadata: Value = serde_json::from_str(text)?;
                    mutant.manifest = with(mutant.manifest, &json!({ "metadata": metadata }));
                    mutant.changes.push(format!("metadata: {text}"));
                }
                self.sent += 1;
                work.push((index, mutant));
            }
            let this = &*self;
            let answers = each(&work, |(index, mutant): &(usize, Mutant)| {
                let slot = &this.slots[*index];
                let what = || format!("{:?} in {}", mutant.changes, slot.name());
                let answer = this.send(slot, &mutant.manifest, "Strict").with_context(what)?;
                // A client that does not ask for strictness gets in what is left without the unknown fields.
                match answer {
                    Answer::Refused(message) if message.contains("unknown field") => {
                        this.send(slot, &mutant.manifest, "Ignore").with_context(what)
                    }
                    answer => Ok(answer),
                }
            })?;
            for ((index, mutant), answer) in work.into_iter().zip(answers) {
                match answer {
                    Answer::Taken => {
                        self.taken += 1;
                        let slot = &mut self.slots[index];
                        (slot.is_there, slot.changes) = (true, mutant.changes);
                    }
                    Answer::Refused(message) => ensure!(!is_lax, "{:?}: {message}", mutant.changes),
                }
            }
        }
        Ok(())
    }

    /// Waits until the operator has judged everything that is there, and checks its words.
    fn judged(&mut self) -> Result<()> {
        let models = wait(HEALED, "everything is judged", || {
            let models = self.models()?;
            let open: Vec<_> = self
                .changed()
                .filter_map(|slot| {
                    let object = models.get(&slot.key())?;
                    verdict(object)
                        .is_none()
                        .then(|| format!("{:?} {:?}: {}", slot.key(), slot.changes, object["status"]))
                })
                .collect();
            ensure!(open.is_empty(), "{} are not judged, the first: {:?}", open.len(), open.first());
            Ok(Some(models))
        })?;
        for slot in self.slots.iter().filter(|slot| !slot.changes.is_empty()) {
            let object = models.get(&slot.key()).with_context(|| format!("{:?} is gone", slot.key()))?;
            let found = verdict(object).context("it was judged")?;
            check_words(object, &found).with_context(|| format!("{:?} {found:?}\n{object}", slot.changes))?;
            *self.reasons.entry(found.reason).or_default() += 1;
        }
        Ok(())
    }

    fn changed(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| !slot.changes.is_empty())
    }

    /// Looks on for a while, and bounds what the operator does for each model.
    fn rests(&mut self) -> Result<()> {
        // Not a wait for something: pods of the last change come up meanwhile, and first pauses after failures grow.
        std::thread::park_timeout(QUIET);
        let mark = self.installation.proxy.mark();
        std::thread::park_timeout(QUIET);
        let mut reconciles: BTreeMap<(String, String), usize> = BTreeMap::new();
        let mut writes: BTreeMap<String, usize> = BTreeMap::new();
        for exchange in self.installation.proxy.since(mark) {
            let request = exchange.request;
            if request.resource == "disaggregatedmodels" && request.verb == Verb::Get && !request.name.is_empty() {
                *reconciles.entry((request.namespace, request.name)).or_default() += 1;
            } else if request.is_write() && !request.is_lease() && !request.is_event() {
                *writes.entry(format!("{} {}", request.resource_and_subresource(), request.name)).or_default() += 1;
            }
        }
        if let Some((key, count)) = reconciles.iter().max_by_key(|(_, count)| **count) {
            self.most_reconciles = self.most_reconciles.max(*count);
            let changes = self.slots.iter().find(|slot| slot.key() == *key).map(|slot| &slot.changes);
            ensure!(*count <= RECONCILES_MAX, "{count} reconciles of {key:?} in {QUIET:?}: {changes:?}");
        }
        if let Some((object, count)) = writes.iter().max_by_key(|(_, count)| **count) {
            self.most_writes = self.most_writes.max(*count);
            ensure!(*count <= WRITES_MAX, "{count} writes of {object} in {QUIET:?}");
        }
        Ok(())
    }

    /// Puts everything right and waits until it has settled.
    fn correct(&mut self) -> Result<()> {
        let models = self.models()?;
        let work: Vec<(&Slot, Value)> = self
            .changed()
            .map(|slot| {
                let there = models.get(&slot.key()).with_context(|| format!("{:?} is gone", slot.key()))?;
                Ok((slot, slot.right(there)))
            })
            .collect::<Result<_>>()?;
        let this = &*self;
        each(&work, |(slot, right)| match this.send(slot, right, "Strict")? {
            Answer::Taken => Ok(()),
            Answer::Refused(message) => {
                bail!("{:?} of {:?} can't be corrected: {message}\n{}", slot.key(), slot.changes, models[&slot.key()])
            }
        })?;
        wait(HEALED, "everything that was put right has settled", || {
            let models = this.models()?;
            let open: Vec<String> = this
                .changed()
                .filter_map(|slot| {
                    let settled = models.get(&slot.key()).context("it is gone").and_then(check_settled);
                    settled.err().map(|error| format!("{:?} {:?}: {error:#}", slot.key(), slot.changes))
                })
                .collect();
            ensure!(open.is_empty(), "{} of {} have not, the first: {:?}", open.len(), work.len(), open.first());
            Ok(Some(()))
        })?;
        // Looked at in full, which takes a dozen requests each.
        let some: Vec<&Slot> = self.changed().step_by(8).collect();
        each(&some, |slot| {
            let name = slot.name();
            let model = Model::with_lws(this.admin, &slot.namespace, &name);
            model.wait_settled_for(HEALED).with_context(|| format!("{:?}", slot.changes))
        })?;
        self.corrected += work.len();
        for slot in &mut self.slots {
            slot.changes.clear();
        }
        self.lives()
    }

    /// The operator has neither ended nor panicked.
    fn lives(&mut self) -> Result<()> {
        if let Some(status) = self.operator.ended()? {
            bail!("the operator has ended with {status}");
        }
        let metrics = self.operator.metrics()?;
        ensure!(metrics.sum("baton_operator_panics_total") == 0.0, "a reconcile has panicked");
        for outcome in ["panicked", "timed-out"] {
            let count = metrics.sum_where("baton_operator_reconciles_total", &format!("\"{outcome}\""));
            ensure!(count == 0.0, "{count} reconciles {outcome}");
        }
        Ok(())
    }

    /// Rounds until `cases` more are sent; the last one is left uncorrected when it `stays`.
    fn rounds(&mut self, cases: usize, is_lax: bool, stays: bool) -> Result<()> {
        let end = self.sent + cases;
        while self.sent < end {
            let (before, begun) = (self.sent, Instant::now());
            self.mutate(end - self.sent, is_lax)?;
            ensure!(self.sent > before, "no slot takes a mutant");
            let sent = begun.elapsed();
            self.judged()?;
            self.lives()?;
            let judged = begun.elapsed();
            if self.sent >= end {
                self.rests()?;
                if stays {
                    return Ok(());
                }
            }
            let begin = Instant::now();
            let count = self.changed().count();
            self.correct()?;
            say(&format!(
                "a round of {} mutants: sent in {:.1} s, judged {:.1} s later, the {count} that were taken healed {:.1} s after that",
                self.sent - before,
                sent.as_secs_f64(),
                (judged - sent).as_secs_f64(),
                begin.elapsed().as_secs_f64()
            ));
        }
        Ok(())
    }
}

/// What the operator says of the newest generation, once it says so or no.
fn verdict(object: &Value) -> Option<Condition> {
    condition(object, "Accepted").filter(|found| {
        Some(found.observed_generation) == object["metadata"]["generation"].as_i64() && found.status != "Unknown"
    })
}

/// The operator's verdict is that of its own pure half, with a documented reason and words that name the field.
fn check_words(object: &Value, found: &Condition) -> Result<()> {
    ensure!(Reason::ALL.iter().any(|reason| reason.as_str() == found.reason), "no such reason");
    ensure!(!found.message.is_empty(), "no words");
    let mut manifest = object.clone();
    manifest.as_object_mut().context("an object")?.remove("status");
    let wrong: BTreeSet<String> = match serde_json::from_value::<DisaggregatedModel>(manifest) {
        Ok(model) => match validate(&model) {
            Ok(_) => {
                ensure!(found.reason != Reason::InvalidSpec.as_str(), "the manifest is right");
                return Ok(());
            }
            Err(violations) => violations.into_iter().map(|violation| violation.path).collect(),
        },
        // It has no type: which fields are to blame only the words can say.
        Err(_) => ["spec".to_owned(), "metadata".to_owned()].into(),
    };
    ensure!(found.reason == Reason::InvalidSpec.as_str() && found.status == "False", "wrong are {wrong:?}");
    let names = |path: &String| {
        let path: Vec<&str> = path.split(|c: char| c.is_whitespace() || c.is_control()).collect();
        found.message.starts_with(path[0])
    };
    ensure!(wrong.iter().any(names), "the message does not begin with one of {wrong:?}");
    Ok(())
}

/// Whether a right manifest is served, as far as the object says it.
fn check_settled(object: &Value) -> Result<()> {
    let status = &object["status"];
    let is = |kind: &str, wanted: &str| -> Result<()> {
        let found = condition(object, kind).with_context(|| format!("no condition {kind}"))?;
        let is_new = Some(found.observed_generation) == object["metadata"]["generation"].as_i64();
        ensure!(is_new && found.status == wanted, "{kind}: {found:?}");
        Ok(())
    };
    ensure!(status["observedGeneration"] == object["metadata"]["generation"], "an older generation: {status}");
    is("Accepted", "True")?;
    is("PrefillReady", "True")?;
    is("DecodeReady", "True")?;
    is("Progressing", "False")?;
    ensure!(condition(object, "Stalled").is_none(), "Stalled still stands: {status}");
    is("Ready", "True")
}

/// The shipped definition with a schema that takes everything.
fn lax_definition() -> Result<String> {
    let mut definition: Value = serde_yaml::from_str(&definition()?)?;
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"] =
        json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    Ok(definition.to_string())
}

/// Replaces the definition and waits until the API server goes by it.
fn define(plane: &ControlPlane, admin: &Admin, namespace: &str, text: &str, is_lax: bool) -> Result<()> {
    plane.install_crds(text)?;
    let junk = json!({
        "apiVersion": baton_crds::API_VERSION, "kind": baton_crds::KIND, "metadata": {"name": "junk"}, "spec": "junk",
    });
    let path = format!("/apis/baton.dev/v1alpha1/namespaces/{namespace}/disaggregatedmodels?dryRun=All");
    wait(PATIENCE, "the API server goes by the new definition", || match admin.raw("POST", &path, Some(&junk)) {
        Ok(_) => Ok(is_lax.then_some(())),
        Err(kube::Error::Api(status)) if status.code == 422 => Ok((!is_lax).then_some(())),
        Err(error) => Err(error.into()),
    })
}

/// Names that no rule would let in.
fn hostile_names() -> Vec<String> {
    vec![
        "a".repeat(31),
        "a".repeat(63),
        "a".repeat(64),
        "a".repeat(253),
        "a.b".to_owned(),
        "1".to_owned(),
        "1a.example.com".to_owned(),
    ]
}

fn cases() -> Result<usize> {
    match std::env::var("BATON_FUZZ_CASES") {
        Ok(text) => text.parse().context("BATON_FUZZ_CASES is a number"),
        Err(_) => Ok(CASES),
    }
}

fn seed() -> Result<u64> {
    match std::env::var("BATON_FUZZ_SEED") {
        Ok(text) => text.parse().context("BATON_FUZZ_SEED is a number"),
        Err(_) => Ok(1),
    }
}

#[test]
fn nothing_that_is_written_breaks_the_operator_and_every_correction_heals() -> Result<()> {
    let Some(stage) = Stage::shared(Tier::Behaviour { nodes: 1, lws: true })? else { return Ok(()) };
    let (plane, admin) = (stage.plane, stage.admin);
    let (cases, seed) = (cases()?, seed()?);
    let installation = Installation::for_all_namespaces(plane, admin, "fuzz")?;
    let namespaces: Vec<Namespace> =
        (0..NAMESPACES).map(|number| plane.restricted_namespace(&format!("fuzz-{number}"))).collect::<Result<_>>()?;
    for namespace in &namespaces {
        manifest::claim(admin, namespace.name())?;
    }
    let mut operator = installation.started()?;
    let pid = operator.pid();
    let slots = (0..SLOTS)
        .map(|number| Slot {
            number,
            index: 0,
            namespace: namespaces[number % NAMESPACES].name().to_owned(),
            is_there: false,
            changes: Vec::new(),
        })
        .collect();
    let mut fuzz = Fuzz {
        admin,
        operator: &mut operator,
        installation: &installation,
        mutator: Mutator::new(seed),
        slots,
        sent: 0,
        taken: 0,
        reasons: BTreeMap::new(),
        corrected: 0,
        most_reconciles: 0,
        most_writes: 0,
    };
    let place = namespaces[0].name();
    let mut begun = Instant::now();
    let mut step = |fuzz: &Fuzz<'_>, what: &str| {
        let took = std::mem::replace(&mut begun, Instant::now()).elapsed();
        say(&format!(
            "{what}: {} mutants sent so far, {} taken, {} corrected ({:.1} s)",
            fuzz.sent,
            fuzz.taken,
            fuzz.corrected,
            took.as_secs_f64()
        ));
    };

    // Most of these are refused, and cost a request.
    fuzz.rounds(cases * 2 / 3, false, false)?;
    step(&fuzz, "under the shipped definition");

    define(plane, admin, place, &lax_definition()?, true)?;
    for name in hostile_names() {
        admin.create(Type::MODEL, place, &tiny(&name))?;
    }
    fuzz.rounds(cases - fuzz.sent, true, true)?;
    fuzz.scribble()?;
    names_are_told(admin, place)?;
    step(&fuzz, "under one that checks nothing");

    // What got in is still there when the shipped definition comes back.
    define(plane, admin, place, &definition()?, false)?;
    let touched = fuzz.touch()?;
    fuzz.judged()?;
    fuzz.rests()?;
    fuzz.lives()?;
    fuzz.correct()?;
    step(&fuzz, &format!("under the shipped one again, {touched} edited beside what is wrong"));

    say(&format!(
        "at rest, at most {} reconciles and {} writes of one model in {QUIET:?}; verdicts: {:?}",
        fuzz.most_reconciles, fuzz.most_writes, fuzz.reasons
    ));
    drop(fuzz);
    ensure!(operator.pid() == pid && operator.ended()?.is_none(), "the operator was restarted");
    ensure!(!operator.log().contains("panicked"), "the log speaks of a panic");
    Ok(())
}

/// A name that can't be corrected is told of, and goes with its model.
fn names_are_told(admin: &Admin, namespace: &str) -> Result<()> {
    for name in hostile_names() {
        let model = Model::with_lws(admin, namespace, &name);
        let found = model.wait_condition(PATIENCE, "Accepted", "False", "InvalidSpec")?;
        ensure!(found.message.starts_with("metadata.name"), "{name}: {found:?}");
        model.delete()?;
    }
    Ok(())
}

impl Fuzz<'_> {
    /// Writes nonsense into some statuses, as who may write them could, and waits until the operator has put its own in the place.
    fn scribble(&mut self) -> Result<()> {
        const NONSENSE: &[&str] = &[
            r#"{"conditions": "all is well"}"#,
            r#"{"conditions": [{"type": "Accepted", "status": 7}], "roles": {}}"#,
            r#"{"conditions": null, "observedGeneration": -1, "revision": ["a"], "summary": "1/1"}"#,
            r#"{"observedGeneration": "1", "lastErrors": [null], "unknown": {"a": {}}}"#,
        ];
        let some: Vec<(&Slot, &str)> = self.changed().zip(NONSENSE.iter().copied().cycle()).take(16).collect();
        let this = &*self;
        each(&some, |(slot, text)| {
            let status: Value = serde_json::from_str(text)?;
            let patch = json!({ "status": status });
            this.admin.merge(Type::MODEL, &slot.namespace, &slot.name(), "status", &patch)?;
            Ok(())
        })?;
        self.judged()
    }

    /// Edits something right beside what is wrong, where the API server allows that; how often it did.
    fn touch(&mut self) -> Result<usize> {
        let models = self.models()?;
        let some: Vec<&Slot> =
            self.changed().filter(|slot| models[&slot.key()]["spec"]["decode"].is_object()).collect();
        let this = &*self;
        let done = each(&some, |slot| {
            let patch = json!({"spec": {"decode": {"drainTimeoutSeconds": 77}}});
            match this.admin.merge(Type::MODEL, &slot.namespace, &slot.name(), "", &patch) {
                Ok(_) => Ok(1),
                Err(kube::Error::Api(status)) if matches!(status.code, 400 | 422 | 500) => Ok(0),
                Err(error) => Err(error.into()),
            }
        })?;
        Ok(done.into_iter().sum())
    }
}
