//! The operator killed before and after every write of every change: what it left half done, the next one finishes, with
//! nothing left over, nothing made twice, and no pod started for nothing.
//!
//! Each case is one process of the operator that dies at one write: the write with a number, counted from the change, is held
//! before the API server or, once that has acted on it, behind it; the process is killed, and started again. Status and Events
//! count as writes, the Lease does not. A process that dies behind one write leaves the same as one that dies before the next, so
//! that by default each write is the last that is done, and none is; `BATON_CRASH_SIDES=both` tries both sides of every write.
//! How many writes a change takes is counted in a run that nothing disturbs, and cases go on beyond that number until a change is
//! over before its turn. Several installations take the cases in turn, each in a namespace of its own and from one end state to
//! the next, so that also what an earlier crash left would be found.

use anyhow::{Context as _, Result, ensure};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use system_tests::api_faults::{Mark, Side};
use system_tests::kube::{Tier, say};
use system_tests::mutate::Rng;
use system_tests::operator::manifest::tiny;
use system_tests::operator::subject::{
    Act, CREATE, Change, DELETE, GROW, NARROW, RECREATE, ROLL, SHRINK, Subject, WIDEN, slowly, wide,
};
use system_tests::operator::{Operator, PATIENCE, Stage};

/// Within this of leading again everything is as the manifest says, pods included: the goal, whose measure is said. A test machine
/// may be starting the pods of many cases at once, so what fails is [`WRITTEN`] and [`PATIENCE`].
const CONVERGED: Duration = Duration::from_secs(10);

/// Within this of leading again the operator has written all that the manifest asks for, in every case. Alone it takes 2 s.
const WRITTEN: Duration = Duration::from_secs(30);

/// Installations of one test that work side by side: most of a case is waiting.
const INSTALLATIONS: usize = 5;

/// Changes that lead from a model back to one like it.
struct Round {
    /// Short, for names.
    prefix: &'static str,
    /// The model that they begin from; none where the first change makes it.
    base: Option<fn(&str) -> serde_json::Value>,
    changes: &'static [Change],
}

/// Where the operator dies.
#[derive(Clone, Copy, Debug)]
struct Crash {
    /// At which write, counted from 1: of the change, or of the process where it is the second crash.
    number: usize,
    side: Side,
}

/// What came of a case.
#[derive(Debug)]
struct Ended {
    /// The change, and where it was cut off.
    what: String,
    /// Whether there was such a write.
    was_reached: bool,
    /// From the restart until all was as it should be.
    restarted: Duration,
    /// The same from when the operator led again.
    led: Duration,
}

/// An installation at work on a round.
struct Worker<'a> {
    round: &'a Round,
    subject: Subject,
    operator: Operator,
    name: String,
    time: usize,
}

impl<'a> Worker<'a> {
    fn new(stage: Stage, round: &'a Round) -> Result<Self> {
        let subject = Subject::new(stage, round.prefix)?;
        let operator = subject.installation.started()?;
        let worker = Worker { round, subject, operator, name: "m".to_owned(), time: 0 };
        if let Some(base) = round.base {
            let model = worker.subject.model(&worker.name);
            model.apply(&base(&worker.name))?;
            model.wait_settled()?;
            slowly(PATIENCE, "both pods are there", || {
                ensure!(model.pods()?.len() == 2);
                Ok(())
            })?;
            worker.subject.wait_quiet(|| false)?;
        }
        Ok(worker)
    }

    /// Does a change that nothing disturbs. How many writes it took.
    fn undisturbed(&mut self, change: &Change) -> Result<usize> {
        self.next();
        let model = self.subject.model(&self.name);
        let before = self.subject.before(&model)?;
        let mark = self.subject.installation.proxy.mark();
        change.begin(&model, self.time)?;
        self.subject.wait_done(&model, change, &before)?;
        self.subject.wait_quiet(|| false)?;
        let writes = self.subject.installation.proxy.writes_since(mark).len();
        self.clear(change)?;
        Ok(writes)
    }

    /// Does a change and kills the operator at one of its writes; then, if there is a second crash, the next operator at one of
    /// its own.
    fn crash(&mut self, change: &Change, first: Crash, second: Option<Crash>) -> Result<Ended> {
        self.next();
        let what =
            format!("{} with {first:?} {}", change.name, second.map_or_else(String::new, |s| format!("and {s:?}")));
        self.crash_unexplained(change, first, second).with_context(|| format!("{what}\n{}", self.subject.evidence()))
    }

    fn crash_unexplained(&mut self, change: &Change, first: Crash, second: Option<Crash>) -> Result<Ended> {
        let (subject, proxy) = (&self.subject, &self.subject.installation.proxy);
        let model = subject.model(&self.name);
        let before = subject.before(&model)?;
        // What is deleted is deleted while it is still being made.
        let making = if matches!(change.act, Act::Delete) { &CREATE } else { change };

        proxy.hold_write(first.number, first.side);
        let mark = proxy.mark();
        making.begin(&model, self.time)?;
        let was_reached = held_or_done(subject, || subject.check(&model, making, &before).is_ok(), mark)?;
        let write = proxy.held().map_or_else(|| "no write".to_owned(), |held| held.to_string());
        let what = format!("{}, {:?} {} ({write})", change.name, first.side, first.number);
        if matches!(change.act, Act::Delete) {
            change.begin(&model, self.time)?;
        }
        self.operator.kill()?;
        proxy.heal();
        if let Some(second) = second {
            proxy.hold_write(second.number, second.side);
            let mark = proxy.mark();
            self.operator = subject.installation.start()?;
            held_or_done(subject, || subject.check(&model, change, &before).is_ok(), mark)?;
            self.operator.kill()?;
            proxy.heal();
        }

        let mark = proxy.mark();
        let begun = Instant::now();
        self.operator = subject.installation.start()?;
        let leads = || {
            proxy
                .since(mark)
                .iter()
                .any(|one| one.request.is_lease() && one.request.is_write() && one.code == Some(200))
        };
        slowly(PATIENCE, "the operator leads again", || {
            ensure!(leads());
            Ok(())
        })?;
        let leading = begun.elapsed();
        let is_deleted = matches!(change.act, Act::Delete);
        if is_deleted {
            // There is nothing to look at, and of its pods there may have been any number.
            slowly(PATIENCE, "the model and all that was made for it is gone", || subject.check_gone(&model))?;
        } else {
            slowly(PATIENCE, "the model is looked at and written", || {
                subject.check_looked(&model, mark)?;
                subject.check_written(&model)
            })?;
            let written = begun.elapsed().saturating_sub(leading);
            ensure!(written <= WRITTEN, "written only {written:?} after leading again");
            slowly(PATIENCE, "the change is made", || subject.check_made(&model, change, &before))?;
        }
        let restarted = begun.elapsed();
        let led = restarted.saturating_sub(leading);
        if is_deleted {
            self.operator.wait_ready()?;
        } else {
            subject.wait_done(&model, change, &before)?;
        }
        subject.wait_quiet(|| false)?;
        self.clear(change)?;
        Ok(Ended { what, was_reached, restarted, led })
    }

    /// Each change is another one, and each model that is made anew has another name.
    fn next(&mut self) {
        self.time += 1;
        if self.round.base.is_none() {
            self.name = format!("m{}", self.time);
        }
    }

    /// Takes away what a change has made, where the next one makes its own.
    fn clear(&self, change: &Change) -> Result<()> {
        if matches!(change.act, Act::Create(_)) {
            self.subject.model(&self.name).delete()?;
        }
        Ok(())
    }

    /// Looks for what is left over in the whole namespace.
    fn finish(self) -> Result<()> {
        let model = self.subject.model(&self.name);
        let models = if self.round.base.is_some() { vec![model] } else { Vec::new() };
        slowly(PATIENCE, "nothing is left over", || self.subject.check_no_orphans(&models))
            .with_context(|| self.subject.evidence())
    }
}

/// Waits until a write is held, or there is none to hold: all is done and nothing more is written. Whether one is held.
fn held_or_done(subject: &Subject, mut is_done: impl FnMut() -> bool, since: Mark) -> Result<bool> {
    let proxy = &subject.installation.proxy;
    let is_held = || proxy.held().is_some();
    let mut looks = 0_u32;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if is_held() {
            return Ok(true);
        }
        looks += 1;
        // Being held is seen at once; to look whether all is done costs requests.
        if looks.is_multiple_of(8) && proxy.count_since(since) > 0 && is_done() {
            subject.wait_quiet(is_held)?;
            if is_done() || is_held() {
                return Ok(is_held());
            }
        }
        ensure!(Instant::now() < deadline, "no write is held, and the change is not done either");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Cases that are given out one by one, until one asks for a write that does not come.
struct Cases {
    next: AtomicUsize,
    /// The last write that there is for sure.
    writes: usize,
    tries_both_sides: bool,
    is_over: AtomicBool,
}

impl Cases {
    fn take(&self) -> Option<Crash> {
        let index = self.next.fetch_add(1, Ordering::SeqCst);
        let (number, side) = match (self.tries_both_sides, index) {
            (_, 0) => (1, Side::Before),
            (false, index) => (index, Side::After),
            (true, index) => (index / 2 + 1, if index.is_multiple_of(2) { Side::Before } else { Side::After }),
        };
        let is_wanted = number <= self.writes || !self.is_over.load(Ordering::SeqCst);
        is_wanted.then_some(Crash { number, side })
    }

    fn tried(&self, crash: Crash, was_reached: bool) {
        if crash.number > self.writes && !was_reached {
            self.is_over.store(true, Ordering::SeqCst);
        }
    }
}

fn killed_at_every_write(round: &Round) -> Result<()> {
    let Some(stage) = Stage::shared(Tier::Behaviour { nodes: 1, lws: true })? else { return Ok(()) };
    stage.wait_collected()?;
    let begun = Instant::now();
    let mut first = Worker::new(stage, round)?;
    let mut writes = 0;
    for change in round.changes {
        // Of a deletion nothing is written: it dies where it is being made.
        let counted = if matches!(change.act, Act::Delete) { &CREATE } else { change };
        writes = writes.max(first.undisturbed(counted).with_context(|| first.subject.evidence())?);
    }
    let tries_both_sides = std::env::var_os("BATON_CRASH_SIDES").is_some_and(|sides| sides == "both");
    let cases = Cases { next: AtomicUsize::new(0), writes, tries_both_sides, is_over: AtomicBool::new(false) };
    let ended = Mutex::new(Vec::new());
    let work = |mut worker: Worker<'_>| -> Result<()> {
        while let Some(crash) = cases.take() {
            let mut was_reached = false;
            for change in round.changes {
                let one = worker.crash(change, crash, None);
                if one.is_err() {
                    // The others need not go on.
                    cases.next.store(usize::MAX / 2, Ordering::SeqCst);
                    cases.is_over.store(true, Ordering::SeqCst);
                }
                let one = one?;
                was_reached |= one.was_reached;
                ended.lock().expect("no holder panics").push(one);
            }
            cases.tried(crash, was_reached);
        }
        worker.finish()
    };
    in_parallel(std::iter::once(Ok(first)).chain((1..INSTALLATIONS).map(|_| Worker::new(stage, round))), &work)?;

    let ended = ended.into_inner().expect("no holder panics");
    let reached = ended.iter().filter(|one| one.was_reached).count();
    judge(round.prefix, &ended, begun);
    say(&format!("{}: {writes} writes undisturbed", round.prefix));
    // Undisturbed runs differ by a few writes of statuses; most numbers must be reached all the same.
    ensure!(reached * 4 >= writes * 3, "only {reached} crashes at {writes} writes");
    Ok(())
}

/// Says the figures of all cases, and whether the slowest has held the goal.
fn judge(what: &str, ended: &[Ended], begun: Instant) {
    let reached: Vec<&Ended> = ended.iter().filter(|one| one.was_reached).collect();
    let slowest = ended.iter().max_by_key(|one| one.led);
    let (led, restarted, at) = slowest.map_or_else(Default::default, |one| (one.led, one.restarted, one.what.as_str()));
    say(&format!(
        "{what}: {} crashes, {} runs ended before their write; done at most {:.2} s after leading again, {:.2} s after the \
         restart ({at}); {:.0} s in all",
        reached.len(),
        ended.len() - reached.len(),
        led.as_secs_f64(),
        restarted.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
    ));
    say(&format!(
        "goal crash_{what}_converged_seconds {:.2} <= {} {}",
        led.as_secs_f64(),
        CONVERGED.as_secs(),
        if led <= CONVERGED { "held" } else { "missed" }
    ));
}

/// Makes workers and lets them work, each on a thread of its own; the first error of them.
fn in_parallel<'a>(
    workers: impl Iterator<Item = Result<Worker<'a>>>,
    work: &(impl Fn(Worker<'a>) -> Result<()> + Sync),
) -> Result<()> {
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for worker in workers {
            let worker = worker?;
            threads.push(scope.spawn(move || work(worker)));
        }
        let results = threads.into_iter().map(|thread| thread.join().expect("a worker returns its errors"));
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

#[test]
fn create_is_finished_after_a_crash_at_any_write() -> Result<()> {
    killed_at_every_write(&Round { prefix: "create", base: None, changes: &[CREATE] })
}

#[test]
fn scaling_is_finished_after_a_crash_at_any_write() -> Result<()> {
    killed_at_every_write(&Round { prefix: "scale", base: Some(tiny), changes: &[GROW, SHRINK] })
}

#[test]
fn a_new_revision_is_finished_after_a_crash_at_any_write() -> Result<()> {
    killed_at_every_write(&Round { prefix: "roll", base: Some(tiny), changes: &[ROLL] })
}

#[test]
fn a_switch_of_workloads_is_finished_after_a_crash_at_any_write() -> Result<()> {
    killed_at_every_write(&Round { prefix: "switch", base: Some(wide), changes: &[WIDEN, NARROW] })
}

#[test]
fn a_model_deleted_while_it_is_made_is_gone_after_a_crash_at_any_write() -> Result<()> {
    killed_at_every_write(&Round { prefix: "delete", base: None, changes: &[DELETE] })
}

#[test]
fn a_model_made_anew_at_once_is_finished_after_a_crash_at_any_write() -> Result<()> {
    killed_at_every_write(&Round { prefix: "anew", base: Some(tiny), changes: &[RECREATE] })
}

fn draw(rng: &mut Rng, writes: usize) -> Crash {
    let side = if rng.once_in(2) { Side::Before } else { Side::After };
    Crash { number: 1 + rng.below(writes), side }
}

#[test]
fn a_second_crash_in_the_midst_of_the_recovery_changes_nothing() -> Result<()> {
    const SEED: u64 = 20_260_721;
    /// Drawn below this: most changes take more writes, and a recovery fewer.
    const WRITES: (usize, usize) = (12, 6);
    /// For each round.
    const TIMES: usize = 3;
    const ROUNDS: [Round; 5] = [
        Round { prefix: "twice-create", base: None, changes: &[CREATE] },
        Round { prefix: "twice-scale", base: Some(tiny), changes: &[GROW, SHRINK] },
        Round { prefix: "twice-roll", base: Some(tiny), changes: &[ROLL] },
        Round { prefix: "twice-switch", base: Some(wide), changes: &[WIDEN, NARROW] },
        Round { prefix: "twice-anew", base: Some(tiny), changes: &[RECREATE] },
    ];
    let Some(stage) = Stage::shared(Tier::Behaviour { nodes: 1, lws: true })? else { return Ok(()) };
    let begun = Instant::now();
    say(&format!("second crashes are drawn from the seed {SEED}"));
    let ended = Mutex::new(Vec::new());
    let work = |mut worker: Worker<'_>| -> Result<()> {
        let mut rng = Rng::new(SEED ^ worker.round.prefix.bytes().map(u64::from).sum::<u64>());
        for _ in 0..TIMES {
            for change in worker.round.changes {
                let one = worker.crash(change, draw(&mut rng, WRITES.0), Some(draw(&mut rng, WRITES.1)))?;
                ended.lock().expect("no holder panics").push(one);
            }
        }
        worker.finish()
    };
    in_parallel(ROUNDS.iter().map(|round| Worker::new(stage, round)), &work)?;
    judge("twice", &ended.into_inner().expect("no holder panics"), begun);
    Ok(())
}
