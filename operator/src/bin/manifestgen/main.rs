//! Writes the installation's generated files below the folder named by the only argument: rights, and workloads without an operator.

mod modelservice;
mod rules;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(root) = std::env::args_os().nth(1) else {
        return failed("usage: manifestgen FOLDER");
    };
    for (path, text) in rules::files().into_iter().chain(modelservice::files()) {
        let path = Path::new(&root).join(path);
        if let Err(error) = write(&path, &text) {
            return failed(&format!("{}: {error}", path.display()));
        }
    }
    ExitCode::SUCCESS
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, text)
}

fn failed(message: &str) -> ExitCode {
    // Nothing is left to be done if standard error is closed too; the exit code still tells.
    let _ = writeln!(std::io::stderr(), "manifestgen: {message}");
    ExitCode::FAILURE
}
