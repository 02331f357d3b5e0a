//! Writes the CustomResourceDefinition to the file named by the only argument, or to standard output.

use std::io::Write as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let yaml = baton_crds::definition::yaml();
    let written = match std::env::args_os().nth(1) {
        Some(path) => std::fs::write(&path, &yaml).map_err(|error| format!("{}: {error}", path.display())),
        None => std::io::stdout().write_all(yaml.as_bytes()).map_err(|error| format!("standard output: {error}")),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Nothing is left to be done if standard error is closed too; the exit code still tells.
            let _ = writeln!(std::io::stderr(), "crdgen: {message}");
            ExitCode::FAILURE
        }
    }
}
