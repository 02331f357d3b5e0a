//! Writes the CustomResourceDefinition to the file named first, and the document of conditions to the one named second; without
//! arguments the definition to standard output.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut paths = std::env::args_os().skip(1);
    let definition = baton_crds::definition::yaml();
    let written = match paths.next() {
        None => std::io::stdout().write_all(definition.as_bytes()).map_err(|error| format!("standard output: {error}")),
        Some(path) => write(Path::new(&path), &definition).and_then(|()| match paths.next() {
            Some(path) => write(Path::new(&path), &baton_crds::condition::document()),
            None => Ok(()),
        }),
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

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
