//! `baton check`: every manifest of a file, validated offline.

use crate::args::CheckArgs;
use crate::{manifest, terminal};
use std::process::ExitCode;

/// Checks every `DisaggregatedModel` of the file and prints what is wrong, one line a mistake.
///
/// # Errors
/// When the file can't be read or holds no `DisaggregatedModel`.
pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let path = args.file.display();
    let mut right = true;
    for entry in manifest::load_all(&args.file)? {
        match entry.result {
            Ok(_) => terminal::print_line(&format!("{path}: {}: valid", entry.name)),
            Err(violations) => {
                right = false;
                for violation in violations {
                    terminal::print_line(&format!("{path}:{violation}"));
                }
            }
        }
    }
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
