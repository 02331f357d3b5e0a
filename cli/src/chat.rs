//! `baton chat`: a conversation in the terminal, or with a pipe.

use crate::args::ChatArgs;
use crate::client::Client;
use crate::completion;
use crate::run_dir;
use crate::signals::Signals;
use crate::terminal;
use anyhow::Context as _;
use baton_wire::names::paths;
use serde_json::{Value, json};
use std::io::{BufRead as _, IsTerminal as _, Read as _};
use std::process::ExitCode;
use std::time::Duration;
use tokio::sync::mpsc;

/// Longest message: a quarter of what the proxy takes as a whole body, which holds all that was said before, too.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;

/// How long the list of models may take.
const MODELS_TIMEOUT: Duration = Duration::from_secs(10);

/// Talks until the input ends or `/quit`.
///
/// # Errors
/// When there is no server, or no model on it. An answer that fails is told, and the conversation goes on; with input
/// from a pipe it ends, since nobody is there to react.
pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<ExitCode> {
    let url = match args.url {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => only_running()?,
    };
    let client = Client::new();
    let model = match args.model {
        Some(model) => model,
        None => first_model(&client, &url).await?,
    };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        terminal::hint(&format!(
            "{model} at {url}: /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"
        ));
    }
    let opening: Vec<Value> = args.system.iter().map(|text| message("system", text)).collect();
    let mut messages = opening.clone();
    let mut lines = read_lines();
    let mut signals = Signals::new()?;
    loop {
        if interactive {
            terminal::print("> ");
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            () = signals.next() => None,
        };
        let Some(line) = line.transpose().context("standard input")? else { break };
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/reset" => {
                messages.clone_from(&opening);
                terminal::hint("forgotten");
                continue;
            }
            text => messages.push(message("user", text)),
        }
        let mut body = json!({
            "model": model, "messages": messages, "max_tokens": args.max_tokens,
            "stream": true, "stream_options": {"include_usage": true},
        });
        if let Some(temperature) = args.temperature {
            body["temperature"] = json!(temperature);
        }
        let mut answer = String::new();
        let endpoint = format!("{url}{}", paths::CHAT_COMPLETIONS);
        let outcome = tokio::select! {
            outcome = completion::stream(&client, &endpoint, &body, |piece| {
                terminal::print(piece);
                answer.push_str(piece);
            }) => Some(outcome),
            // Dropping the stream makes the server stop.
            () = signals.next() => None,
        };
        terminal::print_line("");
        match outcome {
            Some(Err(error)) if !interactive => return Err(error.into()),
            Some(Err(error)) => {
                terminal::error(&error.into());
                terminal::hint("your message is not part of the conversation; /reset starts a new one");
                messages.pop();
            }
            // What was said before it was stopped was said.
            Some(Ok(_)) | None => messages.push(message("assistant", &answer)),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn only_running() -> anyhow::Result<String> {
    let mut running = run_dir::running(&run_dir::base());
    match running.len() {
        0 => anyhow::bail!("no `baton up` of yours runs on this machine; name a server with --url"),
        1 => Ok(running.remove(0).url),
        _ => {
            let urls: Vec<String> = running.into_iter().map(|run| format!("{} ({})", run.url, run.name)).collect();
            anyhow::bail!("several run: choose one with --url: {}", urls.join(", "))
        }
    }
}

async fn first_model(client: &Client, url: &str) -> anyhow::Result<String> {
    #[derive(serde::Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    #[derive(serde::Deserialize)]
    struct Model {
        id: String,
    }
    let models: Models = client.get_json(&format!("{url}{}", paths::MODELS), MODELS_TIMEOUT).await?;
    let first = models.data.into_iter().next();
    Ok(first.with_context(|| format!("{url} serves no model yet"))?.id)
}

fn too_long() -> std::io::Error {
    let kib = MESSAGE_BYTES_MAX >> 10;
    std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        format!("a line is longer than {kib} KiB, the longest message"),
    )
}

/// Lines of standard input, read by a thread of its own: a read there can't be interrupted, and must not hold up the end.
/// One line waits at most; a pipe is read as fast as it is answered.
fn read_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        loop {
            let mut line = String::new();
            let read = input.by_ref().take(MESSAGE_BYTES_MAX).read_line(&mut line);
            let next = match read {
                Ok(0) => return,
                // Its rest would be taken for a message of its own.
                Ok(_) if line.len() as u64 == MESSAGE_BYTES_MAX && !line.ends_with('\n') => Err(too_long()),
                Ok(_) => Ok(line),
                Err(error) => Err(error),
            };
            let failed = next.is_err();
            if sender.blocking_send(next).is_err() || failed {
                return;
            }
        }
    });
    receiver
}
