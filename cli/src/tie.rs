//! A child that can't outlive its parent, however that ends.
//!
//! The kernel sends a signal to a process whose parent dies, if the process has asked for it; asking has to happen in the
//! child. Doing so between fork and exec needs unsafe code, so `baton` starts itself, asks, and becomes the program.

use crate::args::ExecArgs;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

/// Why the program was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    /// There is no such signal on this system.
    #[error("cannot ask to be killed with the parent")]
    NotAsked(#[source] std::io::Error),
    /// The parent has ended before the signal was asked for.
    #[error("the process that started this one has ended")]
    Orphaned,
    /// The program can't be executed.
    #[error("cannot execute {program:?}")]
    NotExecuted {
        program: OsString,
        #[source]
        source: std::io::Error,
    },
}

/// The command that starts `program` tied to this process. `baton` is this program's own file.
pub(crate) fn command(baton: &Path, program: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new(baton);
    command.args(["__exec", "--parent", &std::process::id().to_string(), "--"]).arg(program).args(args);
    command
}

/// Becomes the program; returns only when it can't.
pub(crate) fn exec(args: &ExecArgs) -> ExecError {
    if let Err(error) = tie_to_parent(args.parent) {
        return error;
    }
    let Some((program, rest)) = args.command.split_first() else { return ExecError::Orphaned };
    let source = replace(Command::new(program).args(rest));
    ExecError::NotExecuted { program: program.clone(), source }
}

#[cfg(target_os = "linux")]
fn tie_to_parent(parent: u32) -> Result<(), ExecError> {
    // KILL rather than TERM: whoever is orphaned has nobody left to drain for.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| ExecError::NotAsked(error.into()))?;
    // The parent may have ended before the call above; then somebody else is the parent by now.
    if std::os::unix::process::parent_id() == parent { Ok(()) } else { Err(ExecError::Orphaned) }
}

#[cfg(not(target_os = "linux"))]
fn tie_to_parent(_parent: u32) -> Result<(), ExecError> {
    Err(ExecError::NotAsked(std::io::ErrorKind::Unsupported.into()))
}

fn replace(command: &mut Command) -> std::io::Error {
    use std::os::unix::process::CommandExt as _;
    command.exec()
}
