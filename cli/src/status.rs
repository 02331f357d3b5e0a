//! `baton status`: the pods of a running model, by asking each for its status.

use crate::args::StatusArgs;
use crate::client::{Client, ClientError};
use crate::run_dir::{self, PodRecord, Record};
use crate::terminal;
use crate::view::{self, Row};
use anyhow::Context as _;
use baton_wire::names::paths;
use baton_wire::status::Status;
use futures_util::future::join_all;
use std::process::ExitCode;
use std::time::Duration;

/// How long a pod may take: its proxy gives its engine 0.8 s.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Prints the table of pods. Succeeds if every pod answered.
///
/// # Errors
/// When there is nobody to ask.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let records = match (&args.url, &args.endpoints_file) {
        (Some(url), _) => vec![of_pods(vec![url.trim_end_matches('/').to_owned()])],
        (None, Some(file)) => {
            let text = std::fs::read(file).with_context(|| format!("{}", file.display()))?;
            let list: Endpoints = serde_json::from_slice(&text).with_context(|| format!("{}", file.display()))?;
            vec![of_pods(list.endpoints.into_iter().map(|address| format!("http://{address}")).collect())]
        }
        (None, None) => run_dir::running(&run_dir::base()),
    };
    anyhow::ensure!(!records.is_empty(), "no `baton up` of yours runs on this machine; name a pod with --url");
    let client = Client::new();
    let mut all_answered = true;
    for record in &records {
        if !record.name.is_empty() {
            terminal::print_line(&format!("{} at {}", record.name, record.url));
        }
        let rows = join_all(record.pods.iter().map(|pod| ask(&client, pod))).await;
        all_answered &= rows.iter().all(|row| row.status.is_ok());
        terminal::print(&view::table(&rows));
    }
    Ok(if all_answered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(serde::Deserialize)]
struct Endpoints {
    endpoints: Vec<String>,
}

/// Pods of which nothing but the address is known.
fn of_pods(urls: Vec<String>) -> Record {
    let pods = urls.into_iter().map(|url| PodRecord { name: String::new(), url, has_engine: true }).collect();
    Record { name: String::new(), url: String::new(), pods }
}

async fn ask(client: &Client, pod: &PodRecord) -> Row {
    let address = pod.url.trim_start_matches("http://").to_owned();
    let status = if pod.has_engine {
        client.get_json::<Status>(&format!("{}{}", pod.url, paths::STATUS), STATUS_TIMEOUT).await.map(Some)
    } else {
        client.get(&format!("{}{}", pod.url, paths::READY), STATUS_TIMEOUT).await.map(|_| None)
    };
    let name = status.as_ref().ok().and_then(Option::as_ref).map(|status| status.model.clone());
    let pod = if pod.name.is_empty() { name.unwrap_or_else(|| "?".to_owned()) } else { pod.name.clone() };
    Row { pod, address, status: status.map_err(|error| in_short(&error)) }
}

/// Why a pod's row is empty, without the URL that stands beside it.
fn in_short(error: &ClientError) -> String {
    match error {
        ClientError::Refused { status, message, .. } => format!("{status}: {message}"),
        ClientError::Unreachable { .. } => "no answer".to_owned(),
        ClientError::Silent { after, .. } => format!("no answer within {} s", after.as_secs()),
        ClientError::Unreadable { .. } => "the answer is no status".to_owned(),
        ClientError::Url { .. } | ClientError::Broken { .. } | ClientError::NoEvents { .. } => error.to_string(),
    }
}
