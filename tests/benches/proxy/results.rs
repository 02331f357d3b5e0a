//! What was measured: a cell for each workload, contestant and round, and what follows from them.

use crate::contestant::Contestant;
use crate::line;
use crate::load::Outcome;
use crate::series::Series;
use crate::workload::Workload;
use std::collections::BTreeMap;
use std::time::Duration;

/// One turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    /// CPU time a request, in microseconds.
    pub(crate) cpu_us: f64,
    pub(crate) per_second: f64,
    /// Median time to the end of an answer, in microseconds.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// Median time to the first byte of an answer's body, in microseconds.
    pub(crate) ttft_us: f64,
}

impl Cell {
    pub(crate) fn new(outcome: &Outcome, cpu: Duration) -> Self {
        Cell {
            cpu_us: cpu.as_secs_f64() * 1e6 / outcome.requests() as f64,
            per_second: outcome.per_second(),
            p50_us: outcome.whole_us(0.5),
            p99_us: outcome.whole_us(0.99),
            ttft_us: outcome.first_us(0.5),
        }
    }
}

/// A turn by round, or what went wrong in it.
type Rounds = BTreeMap<usize, Result<Cell, String>>;

/// A figure by round.
pub(crate) type ByRound = BTreeMap<usize, f64>;

#[derive(Debug, Default)]
pub(crate) struct Results {
    cells: BTreeMap<(&'static Workload, Contestant), Rounds>,
    /// Memory after the load, in millions of bytes: the most after any stage.
    resident_mb: BTreeMap<Contestant, f64>,
    lacking: BTreeMap<Contestant, String>,
}

impl Results {
    pub(crate) fn add(
        &mut self,
        workload: &'static Workload,
        contestant: Contestant,
        round: usize,
        cell: Result<Cell, String>,
    ) {
        self.cells.entry((workload, contestant)).or_default().insert(round, cell);
    }

    pub(crate) fn add_resident(&mut self, contestant: Contestant, mb: f64) {
        let most = self.resident_mb.entry(contestant).or_default();
        *most = most.max(mb);
    }

    /// It does not run. True when that is news.
    pub(crate) fn lacks(&mut self, contestant: Contestant, why: &str) -> bool {
        self.lacking.insert(contestant, why.lines().next().unwrap_or_default().to_owned()).is_none()
    }

    /// Turns in which requests failed.
    pub(crate) fn errors(&self) -> Vec<String> {
        let cells =
            self.cells.iter().flat_map(|(at, rounds)| rounds.iter().map(move |(round, cell)| (at, round, cell)));
        cells
            .filter_map(|((workload, contestant), round, cell)| {
                let error = cell.as_ref().err()?;
                Some(format!("{contestant}, {}, round {}: {error}", workload.title, round + 1))
            })
            .collect()
    }

    /// A figure of a contestant in every round.
    ///
    /// # Errors
    /// When there is none, with the reason.
    pub(crate) fn figure(
        &self,
        workload: &'static Workload,
        contestant: Contestant,
        figure: impl Fn(&Cell) -> f64,
    ) -> Result<ByRound, String> {
        let rounds = self.cells.get(&(workload, contestant)).ok_or_else(|| self.absence(contestant))?;
        let good: ByRound =
            rounds.iter().filter_map(|(round, cell)| Some((*round, figure(cell.as_ref().ok()?)))).collect();
        if good.is_empty() { Err(format!("requests through {contestant} failed in every round")) } else { Ok(good) }
    }

    /// # Errors
    /// When it was not measured, with the reason.
    pub(crate) fn resident_mb(&self, contestant: Contestant) -> Result<f64, String> {
        self.resident_mb.get(&contestant).copied().ok_or_else(|| self.absence(contestant))
    }

    fn absence(&self, contestant: Contestant) -> String {
        match self.lacking.get(&contestant) {
            Some(why) => format!("{contestant} does not run: {why}"),
            None => format!("{contestant} takes no part"),
        }
    }

    /// Everything, workload by workload.
    pub(crate) fn print(&self, contestants: &[Contestant]) {
        let mut contestants = contestants.to_vec();
        contestants.sort_unstable();
        for workload in Workload::ALL {
            line("");
            line(workload.title);
            line(&format!(
                "  {:<14}{:>24}{:>22}{:>11}{:>10}{:>10}{:>10}",
                "", "CPU us a request", "CPU to the floor's", "a second", "p50 us", "p99 us", "TTFT us"
            ));
            contestants.iter().for_each(|contestant| self.print_row(workload, *contestant));
        }
        line("");
        line("memory after the load, MB");
        for contestant in contestants {
            if let Ok(mb) = self.resident_mb(contestant) {
                line(&format!("  {contestant:<14}{mb:>24.1}"));
            }
        }
        line("");
    }

    fn print_row(&self, workload: &'static Workload, contestant: Contestant) {
        let median = |figure: fn(&Cell) -> f64| {
            let figures = self.figure(workload, contestant, figure)?;
            Series::new(figures.into_values().collect()).ok_or_else(|| "no figures".to_owned())
        };
        let row = || -> Result<String, String> {
            let times = [median(|cell| cell.p50_us)?, median(|cell| cell.p99_us)?, median(|cell| cell.ttft_us)?];
            let times: String = times.iter().map(|time| format!("{:>10.0}", time.median())).collect();
            let per_second = median(|cell| cell.per_second)?.median();
            if contestant == Contestant::Direct {
                return Ok(format!("{:>46}{per_second:>11.0}{times}", ""));
            }
            let cpu = median(|cell| cell.cpu_us)?;
            let floor = self.figure(workload, Contestant::Floor, |cell| cell.cpu_us);
            let own = self.figure(workload, contestant, |cell| cell.cpu_us)?;
            let to_floor =
                floor.and_then(|floor| ratio(&own, &floor)).map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            Ok(format!("{cpu:>24.1}{to_floor:>22}{per_second:>11.0}{times}"))
        };
        match row() {
            Ok(row) => line(&format!("  {contestant:<14}{row}")),
            Err(_) if contestant == Contestant::Direct && !workload.is_measured_direct() => {}
            // Why it does not run was said at the start, and is said again at the goals.
            Err(_) if self.lacking.contains_key(&contestant) => {
                line(&format!("  {contestant:<14}{:>24}", "does not run"))
            }
            Err(why) => line(&format!("  {contestant:<14}  {why}")),
        }
    }
}

/// One figure to another, within each round.
///
/// # Errors
/// When they share no round.
pub(crate) fn ratio(own: &ByRound, other: &ByRound) -> Result<Series, String> {
    let both = own.iter().filter_map(|(round, figure)| Some(figure / other.get(round)?)).collect();
    Series::new(both).ok_or_else(|| "no round has both".to_owned())
}
