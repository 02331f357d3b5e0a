//! How far the download of the model is.

use super::Seen;
use super::words::last_line;
use baton_crds::ModelDownload;
use baton_wire::progress::{Phase, Progress};

/// The slowest of the downloads that run: the model is there when that one is done. Those that wait for another pod's work
/// count only where nobody does it.
pub(super) fn slowest(seen: &Seen<'_>) -> Option<ModelDownload> {
    let (pod, progress) = of_slowest(seen)?;
    Some(ModelDownload {
        bytes_done: whole(progress.bytes_done),
        bytes_total: (progress.bytes_total > 0).then(|| whole(progress.bytes_total)),
        percent: percent(progress),
        pod: pod.clone(),
    })
}

/// The same for a sentence, with what went wrong last.
pub(super) fn words(seen: &Seen<'_>) -> Option<String> {
    let (_, progress) = of_slowest(seen)?;
    let how_far =
        percent(progress).map_or_else(|| progress.phase.as_str().to_owned(), |percent| format!("{percent} %"));
    let error = progress.error.as_deref().map(last_line).filter(|error| !error.is_empty());
    Some(error.map_or(how_far.clone(), |error| format!("{how_far}; last error: {error}")))
}

fn of_slowest<'a>(seen: &Seen<'a>) -> Option<(&'a String, &'a Progress)> {
    let share = |progress: &Progress| percent(progress).unwrap_or(0);
    let running = seen.observed.downloads.iter().filter(|(_, progress)| !is_over(progress.phase));
    running.min_by_key(|(pod, progress)| (progress.phase == Phase::Waiting, share(progress), *pod))
}

fn is_over(phase: Phase) -> bool {
    match phase {
        Phase::Complete => true,
        Phase::Waiting | Phase::Listing | Phase::Downloading | Phase::Failed => false,
    }
}

fn percent(progress: &Progress) -> Option<i32> {
    let share = u128::from(progress.bytes_done) * 100;
    let percent = share.checked_div(u128::from(progress.bytes_total))?.min(100);
    i32::try_from(percent).ok()
}

fn whole(bytes: u64) -> i64 {
    /// The largest whole number that every JSON reader has, and the schema's limit.
    const MAX: i64 = 9_007_199_254_740_991;
    i64::try_from(bytes).unwrap_or(MAX).min(MAX)
}
