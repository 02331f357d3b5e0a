//! What is printed and where it comes from: metrics, the API server's audit, the CPU time of the control plane.

use anyhow::Result;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::time::Duration;
use system_tests::kube::ControlPlane;
use system_tests::operator::cpu_time;

/// Prints a figure.
pub(crate) fn line(text: &str) {
    // Nobody reads it where this fails.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a goal, and whether it is held: the figure is to be `target` at most.
pub(crate) fn goal(name: &str, measured: f64, target: f64) {
    let verdict = if measured <= target { "held" } else { "missed" };
    line(&format!("goal {name} {measured:.4} <= {target} {verdict}"));
}

/// Metrics in Prometheus' text form, by name and labels as written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub(crate) fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
        Metrics(samples.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect())
    }

    /// A metric's samples by their labels.
    pub(crate) fn samples<'a>(&'a self, name: &str) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.iter().filter_map(move |(sample, value)| {
            let labels = sample.strip_prefix(name)?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels, *value))
        })
    }

    /// The sum of those whose labels are meant.
    pub(crate) fn sum(&self, name: &str, meant: impl Fn(&str) -> bool) -> f64 {
        self.samples(name).filter(|(labels, _)| meant(labels)).map(|(_, value)| value).sum()
    }
}

/// A quantile of what a histogram has seen between two looks, as Prometheus reckons it: within a bucket as if evenly spread.
pub(crate) fn quantile(before: &Metrics, after: &Metrics, name: &str, quantile: f64) -> String {
    let name = format!("{name}_bucket");
    let old: BTreeMap<&str, f64> = before.samples(&name).collect();
    let mut buckets: Vec<(f64, f64)> = after
        .samples(&name)
        .filter_map(|(labels, count)| {
            let bound = labels.strip_prefix("{le=\"")?.strip_suffix("\"}")?;
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
            Some((bound, count - old.get(labels).copied().unwrap_or_default()))
        })
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let all = buckets.last().map_or(0.0, |(_, count)| *count);
    let rank = quantile * all;
    let (mut low, mut below) = (0.0, 0.0);
    for (bound, count) in buckets {
        if count >= rank && count > below {
            if bound.is_infinite() {
                return format!("over {low} s");
            }
            let within = low + (bound - low) * (rank - below) / (count - below);
            return format!("{:.1} ms (bucket {low} to {bound} s)", within * 1e3);
        }
        (low, below) = (bound, count);
    }
    "of nothing".to_owned()
}

/// Looks at the control plane.
pub(crate) struct Figures<'a> {
    plane: &'a ControlPlane,
}

impl<'a> Figures<'a> {
    pub(crate) fn new(plane: &'a ControlPlane) -> Self {
        Figures { plane }
    }

    /// CPU time of each of its processes.
    ///
    /// # Errors
    /// When one of them has ended.
    pub(crate) fn cpu(&self) -> Result<BTreeMap<String, Duration>> {
        self.plane.processes().into_iter().map(|(name, pid)| Ok((name, cpu_time(pid)?))).collect()
    }

    /// What they have taken since then, in words.
    ///
    /// # Errors
    /// When one of them has ended.
    pub(crate) fn cpu_since(&self, before: &BTreeMap<String, Duration>) -> Result<String> {
        let now = self.cpu()?;
        let taken = now.iter().map(|(name, cpu)| {
            let took = *cpu - before.get(name).copied().unwrap_or_default();
            format!("{name} {:.1} s", took.as_secs_f64())
        });
        Ok(taken.collect::<Vec<_>>().join(", "))
    }

    /// How many requests of a user the API server has recorded, watches when they began. The record is rolled over as it
    /// grows, so all of its files are read.
    ///
    /// # Errors
    /// When it can't be read.
    pub(crate) fn audited(&self, user: &str) -> Result<usize> {
        let (user, mut count) = (format!("\"username\":\"{user}\""), 0);
        for entry in std::fs::read_dir(self.plane.own_folder()?)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !(name.starts_with("audit") && name.ends_with(".log")) {
                continue;
            }
            for line in BufReader::new(File::open(&path)?).lines() {
                let line = line?;
                let is_watch = line.contains("\"verb\":\"watch\"");
                let stage = if is_watch { "\"stage\":\"ResponseStarted\"" } else { "\"stage\":\"ResponseComplete\"" };
                count += usize::from(line.contains(&user) && line.contains(stage));
            }
        }
        Ok(count)
    }
}
