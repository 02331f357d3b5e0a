//! A manifest file, and the model directory that it points to, on this machine.
//!
//! What is right in a manifest is `baton-operator`'s; this opens the file and says where a claim's volume is here.

use crate::args::Volume;
use baton_crds::{DisaggregatedModel, DisaggregatedModelSpec, ModelSpec, rules};
use baton_operator::manifest::{self, Entry, MANIFEST_BYTES_MAX, Manifest, ReadError};
use baton_operator::{ModelSource, Validated, Violation};
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Why there is no manifest to serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    /// The file can't be opened or read.
    #[error("{}: cannot be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Nothing of that size is a manifest.
    #[error("{}: larger than {} MiB, the largest file that can hold manifests", path.display(), MANIFEST_BYTES_MAX >> 20)]
    TooLarge { path: PathBuf },
    /// It holds no right manifest; one line for each mistake.
    #[error("{}", lines.join("\n"))]
    Wrong { lines: Vec<String> },
    /// A model directory whose name gives no name to serve under.
    #[error("{}: this directory has no name to serve the model under; write a manifest", dir.display())]
    Unnamed { dir: PathBuf },
    /// The model directory is not where it should be.
    #[error("{uri}: no directory {}; say where it is with --volume {claim}=DIR or --model DIR", looked_at.display())]
    NoModelDir { uri: String, claim: String, looked_at: PathBuf },
    /// `--model` is no directory.
    #[error("--model {}: no such directory", dir.display())]
    NoSuchDir { dir: PathBuf },
    /// The model is somewhere that this command does not fetch from.
    #[error("{uri} is not on this machine, and baton up downloads nothing; say where a copy is with --model DIR")]
    NotLocal { uri: String },
    /// `--volume` for a claim that the manifest does not name.
    #[error("--volume {claim}=...: the manifest has no such claim, only {expected}")]
    UnknownClaim { claim: String, expected: String },
}

/// Reads the only `DisaggregatedModel` of a file.
///
/// # Errors
/// When it can't be read, or with everything that is wrong with it.
pub(crate) fn load(path: &Path) -> Result<Manifest, ManifestError> {
    manifest::read_one(&read(path)?).map_err(|error| wrong(path, error))
}

/// Reads every `DisaggregatedModel` of a file.
///
/// # Errors
/// When it can't be read or holds none.
pub(crate) fn load_all(path: &Path) -> Result<Vec<Entry>, ManifestError> {
    manifest::read_all(&read(path)?).map_err(|error| wrong(path, error))
}

/// The manifest of a model directory alone: one prefill and one decode worker, named after the directory.
///
/// # Errors
/// When the directory's name holds nothing that a name can be made of.
pub(crate) fn of_directory(dir: &Path) -> Result<Manifest, ManifestError> {
    let unnamed = || ManifestError::Unnamed { dir: dir.to_owned() };
    let dir = dir.canonicalize().map_err(|_| ManifestError::NoSuchDir { dir: dir.to_owned() })?;
    let served = dir.file_name().and_then(|name| name.to_str()).ok_or_else(unnamed)?;
    let name = dns_label(served).ok_or_else(unnamed)?;
    let spec = DisaggregatedModelSpec {
        model: ModelSpec {
            uri: "pvc://local".to_owned(),
            served_name: Some(served.to_owned()),
            ..ModelSpec::default()
        },
        ..DisaggregatedModelSpec::default()
    };
    let mut model = DisaggregatedModel::new(&name, spec);
    // A folder may be called what clients could not ask for; then they ask for the name that was made of it.
    if baton_operator::validate(&model).is_err() {
        model.spec.model.served_name = None;
    }
    let validated = baton_operator::validate(&model)
        .map_err(|violations| ManifestError::Wrong { lines: violations.iter().map(Violation::to_string).collect() })?;
    Ok(Manifest { model, validated })
}

/// The model directory on this machine: `model` if given, else below the claim's volume.
///
/// # Errors
/// When it is not there.
pub(crate) fn model_dir(
    validated: &Validated,
    file: Option<&Path>,
    model: Option<&Path>,
    volumes: &[Volume],
) -> Result<PathBuf, ManifestError> {
    let (claim, path) = match (&validated.source, model) {
        (ModelSource::Claim { claim, path }, _) => (claim, path),
        (ModelSource::Image { .. } | ModelSource::Download(_), Some(dir)) => {
            return existing(dir).ok_or_else(|| ManifestError::NoSuchDir { dir: dir.to_owned() });
        }
        (ModelSource::Image { reference, .. }, None) => {
            return Err(ManifestError::NotLocal { uri: format!("oci://{reference}") });
        }
        (ModelSource::Download(download), None) => {
            return Err(ManifestError::NotLocal { uri: download.uri.clone() });
        }
    };
    if let Some(other) = volumes.iter().find(|volume| &volume.claim != claim) {
        return Err(ManifestError::UnknownClaim { claim: other.claim.clone(), expected: claim.clone() });
    }
    if let Some(dir) = model {
        return existing(dir).ok_or_else(|| ManifestError::NoSuchDir { dir: dir.to_owned() });
    }
    let beside = file.and_then(Path::parent).unwrap_or(Path::new("")).join(claim);
    let volume = volumes.iter().next_back().map_or(beside, |volume| volume.dir.clone());
    let dir = volume.join(path);
    existing(&dir).ok_or_else(|| ManifestError::NoModelDir {
        uri: format!("pvc://{claim}/{path}"),
        claim: claim.clone(),
        looked_at: dir,
    })
}

/// Absolute, because workers are told it and error messages repeat it.
fn existing(dir: &Path) -> Option<PathBuf> {
    dir.canonicalize().ok().filter(|dir| dir.is_dir())
}

fn read(path: &Path) -> Result<String, ManifestError> {
    let unreadable = |source| ManifestError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(ManifestError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

fn wrong(path: &Path, error: ReadError) -> ManifestError {
    let path = path.display();
    let lines = match &error {
        ReadError::Invalid { violations } => violations.iter().map(|one| format!("{path}:{one}")).collect(),
        ReadError::NotYaml { document, source } => {
            vec![format!("{path}: document {document} is not a Kubernetes object: {source}")]
        }
        ReadError::NoModel { .. } | ReadError::SeveralModels { .. } => vec![format!("{path}: {error}")],
    };
    ManifestError::Wrong { lines }
}

/// `Qwen3-0.6B` as `qwen3-0-6b`: what Kubernetes takes as a name and we can append to.
fn dns_label(text: &str) -> Option<String> {
    let plain: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let start = plain.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    let label: String = start.chars().take(rules::NAME_CHARS_MAX).collect();
    Some(label.trim_end_matches('-').to_owned()).filter(|label| !label.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "apiVersion: baton.dev/v1alpha1\nkind: DisaggregatedModel\nmetadata: {name: tiny}\nspec: {model: {uri: 'pvc://models/a'}}\n";

    #[test]
    fn a_directory_gives_a_name_that_kubernetes_takes() {
        for (name, expect) in [
            ("Qwen3-0.6B", Some("qwen3-0-6b")),
            ("7B_chat.", Some("b-chat")),
            ("a-very-long-name-of-a-model-that-goes-on", Some("a-very-long-name-of-a-model-th")),
            ("123", None),
        ] {
            assert_eq!(dns_label(name).as_deref(), expect, "{name}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        for (called, name, served) in
            [("Qwen3-0.6B", "qwen3-0-6b", "Qwen3-0.6B"), (".my model (2)", "my-model--2", "my-model--2")]
        {
            let dir = folder.path().join(called);
            std::fs::create_dir(&dir).expect("a folder");
            let validated = of_directory(&dir).expect("a manifest").validated;
            assert_eq!((validated.name.as_str(), validated.served_name.as_str()), (name, served));
        }
    }

    #[test]
    fn a_claim_is_looked_for_beside_the_manifest_unless_told_otherwise() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("tiny.yaml");
        std::fs::write(&file, RIGHT).expect("a file");
        let validated = load(&file).expect("a right manifest").validated;
        let missing = model_dir(&validated, Some(&file), None, &[]).expect_err("no folder yet").to_string();
        assert!(missing.contains("models/a") && missing.contains("--volume models=DIR"), "{missing}");

        let beside = folder.path().join("models/a");
        let elsewhere = folder.path().join("srv/a");
        for dir in [&beside, &elsewhere] {
            std::fs::create_dir_all(dir).expect("a folder");
        }
        let canonical = |path: &Path| path.canonicalize().expect("it is there");
        assert_eq!(model_dir(&validated, Some(&file), None, &[]).expect("found"), canonical(&beside));
        let volume = Volume { claim: "models".to_owned(), dir: folder.path().join("srv") };
        assert_eq!(model_dir(&validated, Some(&file), None, &[volume]).expect("found"), canonical(&elsewhere));
        let other = Volume { claim: "model".to_owned(), dir: folder.path().to_owned() };
        assert!(model_dir(&validated, Some(&file), None, &[other]).is_err());
    }

    #[test]
    fn mistakes_are_told_with_file_line_and_field() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("tiny.yaml");
        std::fs::write(&file, RIGHT.replace("{model:", "{disaggregation: {policy: Sometimes},\n  model:"))
            .expect("a file");
        let told = load(&file).expect_err("a wrong manifest").to_string();
        let expect = format!(
            "{}:4: spec.disaggregation.policy: unknown value \"Sometimes\": one of Always, Conditional, Never",
            file.display()
        );
        assert_eq!(told, expect);
    }
}
