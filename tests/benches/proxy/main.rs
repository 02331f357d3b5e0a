//! What the proxy costs, beside its peers and beside the least that a proxy can be, in one run with the same engines.
//!
//! `benches/proxy` builds the programs, installs the peers and runs this. The engines are mocks; they and the load share one core,
//! and whoever's turn it is has the other one alone: all others stand still meanwhile (SIGSTOP). Turns are short and rotate, so
//! that what else the machine does falls on all alike, and ratios are taken within a round.

mod answer;
mod connection;
mod contestant;
mod engines;
mod goals;
mod load;
mod process;
mod results;
mod series;
mod setup;
mod workload;

use anyhow::{Context as _, Result, ensure};
use contestant::{Contestant, Running};
use engines::Engines;
use load::Load;
use process::Process;
use results::{Cell, Results};
use setup::Setup;
use std::io::Write as _;
use std::process::ExitCode;
use workload::{Stage, Workload};

/// Prints a line.
fn line(text: &str) {
    // Nobody reads it where this fails.
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn main() -> Result<ExitCode> {
    let setup = Setup::read(std::env::args().skip(1))?;
    setup.introduce()?;
    setup.cores.stay_at_load()?;
    let mut results = Results::default();
    for stage in Stage::ALL {
        run(stage, &setup, &mut results)
            .with_context(|| format!("engines with {} ms a token", stage.token_delay_ms()))?;
    }
    results.print(&setup.contestants);
    goals::print(&results);
    line(&format!("load average at the end: {}", setup::load_average()?));
    let wrong = results.errors();
    wrong.iter().for_each(|error| line(&format!("error: {error}")));
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All workloads of one pair of engines, in as many rounds as there are.
fn run(stage: Stage, setup: &Setup, results: &mut Results) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let engines = Engines::start(setup, stage)?;
    let mut all: Vec<(Contestant, Running)> = Vec::new();
    for contestant in &setup.contestants {
        match runtime.block_on(contestant.start(setup, &engines)) {
            Ok(running) => all.push((*contestant, running)),
            Err(error) => {
                if results.lacks(*contestant, &format!("{error:#}")) {
                    line(&format!("{contestant} does not run: {error:#}"));
                }
            }
        }
    }
    for round in 0..setup.rounds {
        for workload in stage.workloads() {
            for (contestant, running) in &all {
                if *contestant == Contestant::Direct && !workload.is_measured_direct() {
                    continue;
                }
                // One that ends in the midst of a run is an error of its own turns.
                let cell = runtime.block_on(measure(setup, workload, *contestant, running, &engines));
                results.add(workload, *contestant, round, cell.map_err(|error| format!("{error:#}")));
            }
        }
        // Whoever was first in this round is last in the next one.
        if !all.is_empty() {
            all.rotate_left(1);
        }
        line(&format!("round {} of {}, {stage}: done", round + 1, setup.rounds));
    }
    for (contestant, running) in &all {
        if let Some(Ok(mb)) = running.process.as_ref().map(Process::resident_mb) {
            results.add_resident(*contestant, mb);
        }
    }
    Ok(())
}

/// One turn: the same connections are warmed up and measured.
async fn measure(
    setup: &Setup,
    workload: &'static Workload,
    contestant: Contestant,
    running: &Running,
    engines: &Engines,
) -> Result<Cell> {
    let (warm_up, time) = setup.times(workload);
    running.thaw()?;
    let before = engines.seen(contestant.contract()).await;
    let mut load = Load::new(running.address, workload);
    let warmed = load.run(warm_up).await;
    let before_turn = running.cpu()?;
    let outcome = load.run(time).await;
    let cpu = running.cpu()?.since(&before_turn);
    drop(load);
    let after = engines.seen(contestant.contract()).await;
    running.freeze()?;
    outcome.check()?;
    let sent = (warmed.requests() + outcome.requests()) as u64;
    if let (Some(before), Some(after)) = (before, after) {
        let (handed_over, violations) = (after.handed_over - before.handed_over, after.violations - before.violations);
        // Whoever spares itself the handover does something else than the others.
        ensure!(
            contestant == Contestant::Direct || handed_over >= sent,
            "{handed_over} of {sent} requests handed over"
        );
        // What peers get wrong is not ours to complain about.
        ensure!(
            !contestant.is_ours() || violations == 0,
            "{violations} of the engines' rules broken: /mock/ledger tells"
        );
    }
    Ok(Cell::new(&outcome, cpu))
}
