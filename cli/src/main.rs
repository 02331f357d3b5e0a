//! The program `baton`: arguments to one of its commands, and the command's outcome to an exit code.
#![forbid(unsafe_code)]

mod args;
mod chat;
mod check;
mod client;
mod cluster;
mod completion;
mod keygen;
mod laptop;
mod manifest;
mod mock_engine;
mod plan;
mod pods;
mod process;
mod report;
mod restart;
mod run_dir;
mod signals;
mod sse;
mod status;
mod terminal;
mod tie;
mod up;
mod view;

use args::{Args, Command};
use clap::Parser as _;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let born = Instant::now();
    let outcome = match Args::parse().command {
        Command::Check(args) => check::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Keygen(args) => keygen::run(&args),
        // Replaces this process, so it returns only to say why it could not.
        Command::Exec(args) => Err(tie::exec(&args).into()),
        // Has as many threads as it is told to.
        Command::MockEngine(args) => mock_engine::run(*args),
        Command::Up(args) => with_runtime(up::run(args, born)),
        Command::Chat(args) => with_runtime(chat::run(args)),
        Command::Status(args) => with_runtime(status::run(args)),
    };
    outcome.unwrap_or_else(|error| {
        terminal::error(&error);
        ExitCode::FAILURE
    })
}

/// One thread is plenty for a few status requests a second, and it has to be this one: a child that is tied to its parent
/// ends with the thread that started it.
fn with_runtime(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}
