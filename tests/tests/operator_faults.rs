//! The operator while the API server, or the way to it, does not do what it should: watches break or expire, lists are old, writes
//! are refused or done without an answer, everything is slow, nothing answers at all. A model's whole life goes on meanwhile.
//!
//! Each trouble begins before a change and lasts while the change is made, for some seconds at most; then it ends, and within
//! [`CONVERGED`] everything is as the manifest says: exactly the objects that should be, no pod ever started that the change does
//! not need, and nothing written after that. While it lasts the operator neither ends nor asks faster than [`PER_SECOND`].

use anyhow::{Context as _, Result, ensure};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use system_tests::api_faults::{ApiRequest, Effect, FaultProxy, Verb, WatchFault};
use system_tests::kube::{Tier, say};
use system_tests::operator::subject::{Act, Change, DELETE, GROW, NARROW, ROLL, SHRINK, Subject, WIDEN, slowly, wide};
use system_tests::operator::{Operator, PATIENCE, Stage, wait};

/// Within this of a trouble's end, all is as the manifest says: the goal, whose measure is said.
const CONVERGED: Duration = Duration::from_secs(10);
/// What fails: three times as long, because a test machine may be busy with other lives.
const LOADED: Duration = Duration::from_secs(30);
/// How long a trouble lasts at most: most changes take less.
const LASTS: Duration = Duration::from_secs(4);
/// Time between two blows of a trouble that comes in blows.
const BLOW: Duration = Duration::from_millis(400);
/// Requests a second that are bearable while a trouble lasts, for one model. A reconcile is about twenty of them and there are at
/// most seven windows of the queue a second, as long as events keep coming; a loop that nothing holds up makes a thousand and more.
const PER_SECOND: f64 = 300.0;
/// Nothing is written for this long once all is done.
const STEADY: Duration = Duration::from_secs(3);

/// A model's life, with every kind of change.
const LIFE: [Change; 7] =
    [Change { name: "create", act: Act::Create(wide), starts: 2, total: 2 }, GROW, SHRINK, ROLL, WIDEN, NARROW, DELETE];

/// Something that goes wrong.
struct Trouble {
    name: &'static str,
    begin: fn(&FaultProxy),
    /// What comes again and again while it lasts.
    blow: fn(&FaultProxy),
    /// Whether every request is answered rightly in the end.
    is_mere_delay: bool,
}

const fn trouble(name: &'static str, begin: fn(&FaultProxy)) -> Trouble {
    Trouble { name, begin, blow: |_| (), is_mere_delay: false }
}

const fn blows(name: &'static str, blow: fn(&FaultProxy)) -> Trouble {
    Trouble { name, begin: |_| (), blow, is_mere_delay: false }
}

fn write(asked: &ApiRequest) -> bool {
    asked.is_write() && !asked.is_lease()
}

fn read(asked: &ApiRequest) -> bool {
    !asked.is_write() && !asked.is_lease()
}

/// What came of a trouble.
struct Ended {
    name: &'static str,
    /// Longest time from its end until all was as it should be.
    converged: Duration,
    /// Most requests a second while it lasted.
    per_second: f64,
    /// How many requests and watches it hit.
    hit: usize,
}

/// A model's whole life under one trouble.
fn live(stage: Stage, trouble: &Trouble, prefix: &str) -> Result<Ended> {
    let subject = Subject::new(stage, prefix)?;
    let mut operator = subject.installation.started()?;
    let mut ended = Ended { name: trouble.name, converged: Duration::ZERO, per_second: 0.0, hit: 0 };
    for (time, change) in LIFE.iter().enumerate() {
        pass(&subject, &mut operator, trouble, change, time, &mut ended)
            .with_context(|| format!("{} while {}\n{}", change.name, trouble.name, subject.evidence()))?;
    }
    slowly(PATIENCE, "nothing is left over", || subject.check_no_orphans(&[])).with_context(|| subject.evidence())?;
    ensure!(operator.ended()?.is_none(), "the operator has ended: {}", operator.log());
    let panics = operator.metrics()?.sum("baton_operator_panics_total");
    ensure!(panics == 0.0, "{panics} reconciles panicked");
    ensure!(ended.hit > 0 || trouble.is_mere_delay, "it has hit nothing");
    Ok(ended)
}

/// One change under a trouble.
fn pass(
    subject: &Subject,
    operator: &mut Operator,
    trouble: &Trouble,
    change: &Change,
    time: usize,
    ended: &mut Ended,
) -> Result<()> {
    let proxy = &subject.installation.proxy;
    let model = subject.model("m");
    let before = subject.before(&model)?;
    let mark = proxy.mark();
    (trouble.begin)(proxy);
    change.begin(&model, time)?;

    let begun = Instant::now();
    let mut last_blow = None::<Instant>;
    while begun.elapsed() < LASTS {
        if last_blow.is_none_or(|at| at.elapsed() >= BLOW) {
            (trouble.blow)(proxy);
            last_blow = Some(Instant::now());
            // What is made while it lasts is made right, and needs no longer trouble: three blows, or a second, were had.
            let is_made = begun.elapsed() > BLOW * 3 && subject.check_made(&model, change, &before).is_ok();
            if is_made {
                break;
            }
        }
        ensure!(operator.ended()?.is_none(), "the operator has ended: {}", operator.log());
        std::thread::park_timeout(Duration::from_millis(40));
    }
    let (requests, lasted) = (proxy.since(mark), begun.elapsed());
    ended.per_second = ended.per_second.max(requests.len() as f64 / lasted.as_secs_f64());
    ensure!(
        ended.per_second <= PER_SECOND,
        "{:.0} requests a second: {:?}",
        ended.per_second,
        proxy.totals_since(mark)
    );
    // A watch that is asked for in this time is one that broke.
    ended.hit += requests.iter().filter(|one| one.is_injected || one.request.verb == Verb::Watch).count();

    proxy.heal();
    proxy.remember_lists(true);
    let healed = Instant::now();
    slowly(PATIENCE, "the change is made", || subject.check_made(&model, change, &before))?;
    // What a deleted model leaves goes by the garbage collector, which no trouble of ours touches.
    if !matches!(change.act, Act::Delete) {
        ended.converged = ended.converged.max(healed.elapsed());
        ensure!(healed.elapsed() <= LOADED, "made only {:?} after the trouble's end", healed.elapsed());
    }
    subject.wait_done(&model, change, &before)?;
    subject.wait_quiet(|| false)?;
    proxy.remember_lists(false);
    if matches!(change.act, Act::Create(_)) {
        let mark = proxy.mark();
        // Nothing to wait for: that nothing happens is what is looked at.
        std::thread::park_timeout(STEADY);
        let written = proxy.writes_since(mark);
        ensure!(written.is_empty(), "written after all was done: {written:#?}");
    }
    Ok(())
}

/// Lives under each of these troubles, side by side.
fn live_through(troubles: &[Trouble]) -> Result<()> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let Some(stage) = Stage::shared(Tier::Behaviour { nodes: 1, lws: true })? else { return Ok(()) };
    std::thread::scope(|scope| {
        let live_one = |trouble| {
            let prefix = format!("trouble{}", NUMBER.fetch_add(1, Ordering::Relaxed));
            let ended = live(stage, trouble, &prefix)?;
            say(&format!(
                "{}: {:.0} requests a second at most, {} hit; as wanted after its end:\ngoal fault_converged_seconds {:.2} <= {} {}",
                ended.name,
                ended.per_second,
                ended.hit,
                ended.converged.as_secs_f64(),
                CONVERGED.as_secs(),
                if ended.converged <= CONVERGED { "held" } else { "missed" },
            ));
            Ok::<(), anyhow::Error>(())
        };
        let threads: Vec<_> = troubles.iter().map(|trouble| scope.spawn(move || live_one(trouble))).collect();
        let results = threads.into_iter().map(|thread| thread.join().expect("a life returns its errors"));
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

#[test]
fn broken_and_expired_watches_hide_no_change() -> Result<()> {
    live_through(&[
        blows("watches are cut", |proxy| proxy.break_watches(WatchFault::Cut)),
        blows("watches end", |proxy| proxy.break_watches(WatchFault::End)),
        blows("watches expire (410)", |proxy| proxy.break_watches(WatchFault::Expire)),
        Trouble {
            blow: |proxy| proxy.break_watches(WatchFault::End),
            ..trouble("every second watch is expired from its start", |proxy| {
                proxy.inject(Effect::ExpiredWatch, 2, |asked| asked.verb == Verb::Watch);
            })
        },
    ])
}

/// Lists as they were before the change; those that nobody asked for by then are as they are.
#[test]
fn old_lists_delete_nothing_and_double_nothing() -> Result<()> {
    live_through(&[
        trouble("lists are stale", |proxy| {
            proxy.remember_lists(false);
            proxy.inject(Effect::StaleList, 1, |asked| asked.verb == Verb::List);
        }),
        Trouble {
            blow: |proxy| proxy.break_watches(WatchFault::Expire),
            ..trouble("every third list is stale and watches expire", |proxy| {
                proxy.remember_lists(false);
                proxy.inject(Effect::StaleList, 3, |asked| asked.verb == Verb::List);
            })
        },
    ])
}

#[test]
fn refused_writes_are_tried_again_until_they_are_taken() -> Result<()> {
    live_through(&[
        trouble("a third of the writes gets 500", |proxy| proxy.inject(Effect::Answer(500), 3, write)),
        trouble("a third of the writes gets 503", |proxy| proxy.inject(Effect::Answer(503), 3, write)),
        trouble("a third of the writes gets 429", |proxy| proxy.inject(Effect::Answer(429), 3, write)),
        trouble("a third of the writes gets 409", |proxy| proxy.inject(Effect::Answer(409), 3, write)),
    ])
}

#[test]
fn writes_without_an_answer_are_done_once() -> Result<()> {
    live_through(&[
        trouble("a third of the writes is lost", |proxy| proxy.inject(Effect::Drop, 3, write)),
        trouble("a third of the writes is done and not answered", |proxy| proxy.inject(Effect::DropAfter, 3, write)),
        trouble("a third of the writes is done and answered 504", |proxy| {
            proxy.inject(Effect::AnswerAfter(504), 3, write)
        }),
    ])
}

#[test]
fn an_api_server_that_is_slow_or_answers_no_read_is_waited_for() -> Result<()> {
    live_through(&[
        Trouble {
            is_mere_delay: true,
            ..trouble("every answer takes 400 ms longer", |proxy| {
                proxy.inject(Effect::Delay(Duration::from_millis(400)), 1, |asked| asked.verb != Verb::Watch);
            })
        },
        trouble("one in forty reads gets 500", |proxy| proxy.inject(Effect::Answer(500), 40, read)),
        trouble("every read gets 503", |proxy| proxy.inject(Effect::Answer(503), 1, read)),
    ])
}

#[test]
fn an_api_server_that_is_away_for_less_than_a_lease_costs_no_restart() -> Result<()> {
    live_through(&[
        Trouble {
            blow: |proxy| proxy.break_watches(WatchFault::Cut),
            ..trouble("nothing gets through", |proxy| proxy.inject(Effect::Drop, 1, |_| true))
        },
        Trouble {
            blow: |proxy| proxy.break_watches(WatchFault::Cut),
            ..trouble("everything gets 503", |proxy| proxy.inject(Effect::Answer(503), 1, |_| true))
        },
    ])
}

/// The one end of the operator that a trouble may bring: it can't renew its lease, so it must not write any more, and says so
/// by ending. Whoever started it starts it again.
#[test]
fn an_api_server_that_is_away_for_longer_than_a_lease_ends_the_operator_and_the_next_one_goes_on() -> Result<()> {
    let Some(stage) = Stage::shared(Tier::Behaviour { nodes: 1, lws: true })? else { return Ok(()) };
    let subject = Subject::new(stage, "away")?;
    let explained = |result: Result<()>| result.with_context(|| subject.evidence());
    let proxy = &subject.installation.proxy;
    let mut operator = subject.installation.started()?;
    let model = subject.model("m");
    let before = subject.before(&model)?;
    let mark = proxy.mark();
    LIFE[0].begin(&model, 0)?;
    wait(PATIENCE, "the operator has begun", || Ok((proxy.writes_since(mark).len() >= 4).then_some(())))?;

    proxy.inject(Effect::Drop, 1, |_| true);
    proxy.break_watches(WatchFault::Cut);
    let away = Instant::now();
    let status = wait(PATIENCE, "the operator ends", || operator.ended())?;
    say(&format!("ended {:.1} s after the API server was gone: {status}", away.elapsed().as_secs_f64()));
    ensure!(!status.success(), "an end that nobody asked for is none to be content with: {status}");

    proxy.heal();
    let healed = Instant::now();
    let _operator = subject.installation.started()?;
    explained(slowly(PATIENCE, "the model is made", || subject.check_made(&model, &LIFE[0], &before)))?;
    ensure!(healed.elapsed() <= LOADED, "made only {:?} after the API server was back", healed.elapsed());
    explained(subject.wait_done(&model, &LIFE[0], &before))
}
