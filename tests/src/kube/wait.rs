//! Waiting for a cluster's state.

use super::process::Ended;
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How often a state is looked at: often enough that no test waits for the look, rarely enough that looking costs little.
const PERIOD: Duration = Duration::from_millis(25);

/// Asks `look` until it gives something.
///
/// An error is not the end of it, since servers restart and objects come late; the last one is told when the time is over. Only
/// that a process of the cluster has ended by itself is final.
///
/// # Errors
/// When `look` has given nothing within `patience`.
pub async fn eventually<T, F>(patience: Duration, what: &str, mut look: F) -> Result<T>
where
    F: AsyncFnMut() -> Result<Option<T>>,
{
    let deadline = Instant::now() + patience;
    let mut last = String::from("it was not so");
    loop {
        match tokio::time::timeout_at(deadline.into(), look()).await {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => {}
            Ok(Err(error)) if error.is::<Ended>() => return Err(error.context(format!("waiting for: {what}"))),
            Ok(Err(error)) => last = format!("{error:#}"),
            Err(_) => last = "the last look did not end".to_owned(),
        }
        if Instant::now() >= deadline {
            bail!("waited {patience:?} in vain for: {what} ({last})");
        }
        tokio::time::sleep(PERIOD).await;
    }
}
