//! Where things are in this checkout: its root, its binaries, its demo model.

use std::path::{Path, PathBuf};

/// The checkout's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests' crate lies in the checkout").to_owned()
}

/// A binary of the workspace, beside the test that runs (`target/<profile>/deps/..`).
///
/// # Panics
/// When it has not been built: `make build` does that.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
    let path = profile.join(name);
    assert!(path.exists(), "{} is not built: run `make build` first", path.display());
    path
}

/// A copy of the demo model's directory, to be damaged or changed.
///
/// # Errors
/// When it can't be written.
pub fn copy_of_demo_model() -> std::io::Result<tempfile::TempDir> {
    let copy = tempfile::tempdir()?;
    for entry in std::fs::read_dir(demo_model())? {
        let entry = entry?;
        std::fs::copy(entry.path(), copy.path().join(entry.file_name()))?;
    }
    Ok(copy)
}

/// The demo model's directory.
pub fn demo_model() -> PathBuf {
    root().join("examples/models/tiny")
}
