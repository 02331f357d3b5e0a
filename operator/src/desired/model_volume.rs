//! Where a pod has the model directory: a claim, an image, or a cache that a download fills before the engine starts.

use super::engine::{Flags, literal};
use super::pod::{hardened, mount};
use super::resources;
use super::scope::Scope;
use crate::validated::{Cache, Download, ModelSource};
use baton_wire::names::{env, ports};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, ImageVolumeSource, PersistentVolumeClaimVolumeSource,
    SecretKeySelector, Volume, VolumeMount,
};

/// The init container's name.
pub(super) const DOWNLOAD: &str = "model-download";

const VOLUME: &str = "baton-model";
/// Where a volume that holds the model is.
const VOLUME_PATH: &str = "/models/volume";
/// Where a volume that downloads go to is.
const CACHE_PATH: &str = "/models/cache";

/// Characters of a source's last part that the name of its directory keeps; a file name may have 255.
const DIRECTORY_WORD_CHARS_MAX: usize = 64;
/// Hexadecimal digits that tell directories apart: 2^48 values, and a volume holds a few models.
const DIRECTORY_HASH_DIGITS: usize = 12;

/// What the model asks of a pod.
pub(super) struct ModelVolume {
    /// The volume.
    pub(super) volume: Volume,
    /// Its mount in the engine.
    pub(super) mount: VolumeMount,
    /// The model directory, as the engine sees it.
    pub(super) dir: String,
    /// What fills it, where something does.
    pub(super) download: Option<Container>,
    /// Secret with which the pod's images are pulled.
    pub(super) pull_secret: Option<String>,
}

/// The volume of the model's source.
pub(super) fn of_source(scope: &Scope<'_>) -> ModelVolume {
    match &scope.model.source {
        ModelSource::Claim { claim, path } => ModelVolume {
            // The volume itself too is read-only, so that many nodes may have it and nobody changes the owner of its files.
            volume: claimed(claim, true),
            mount: mount(VOLUME, VOLUME_PATH, true),
            dir: if path.is_empty() { VOLUME_PATH.to_owned() } else { format!("{VOLUME_PATH}/{path}") },
            download: None,
            pull_secret: None,
        },
        ModelSource::Image { reference, pull_secret } => ModelVolume {
            volume: Volume {
                name: VOLUME.to_owned(),
                image: Some(ImageVolumeSource { reference: Some(reference.clone()), pull_policy: None }),
                ..Volume::default()
            },
            mount: mount(VOLUME, VOLUME_PATH, true),
            dir: VOLUME_PATH.to_owned(),
            download: None,
            pull_secret: pull_secret.clone(),
        },
        ModelSource::Download(download) => {
            let dir = format!("{CACHE_PATH}/{}", directory(download));
            ModelVolume {
                volume: match &download.cache {
                    Cache::EmptyDir { size_limit } => Volume {
                        name: VOLUME.to_owned(),
                        empty_dir: Some(EmptyDirVolumeSource {
                            size_limit: size_limit.clone(),
                            ..EmptyDirVolumeSource::default()
                        }),
                        ..Volume::default()
                    },
                    Cache::Claim { claim } => claimed(claim, false),
                },
                mount: mount(VOLUME, CACHE_PATH, true),
                download: Some(fetch(scope, download, &dir)),
                dir,
                pull_secret: None,
            }
        }
    }
}

fn claimed(claim: &str, read_only: bool) -> Volume {
    Volume {
        name: VOLUME.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.to_owned(),
            read_only: read_only.then_some(true),
        }),
        ..Volume::default()
    }
}

/// The download. It declares no port: its admin port is the proxy's as soon as it is done, and the operator dials it by number.
fn fetch(scope: &Scope<'_>, download: &Download, dir: &str) -> Container {
    let mut args = Flags(vec!["fetch".to_owned()]);
    args.set("--uri", literal(&download.uri));
    for (flag, value) in
        [("--revision", &download.revision), ("--endpoint", &download.endpoint), ("--region", &download.region)]
    {
        if let Some(value) = value {
            args.set(flag, literal(value));
        }
    }
    args.set("--to", literal(dir));
    args.set("--admin-listen", format!("0.0.0.0:{}", ports::ADMIN));
    args.set("--log-format", "json");
    let secret = download.credentials_secret.as_deref();
    let container = Container {
        name: DOWNLOAD.to_owned(),
        // Ours also where another engine computes: it is our program that downloads.
        image: Some(scope.site.worker_image.clone()),
        args: Some(args.0),
        env: secret.map(|secret| credentials(&download.uri, secret)),
        resources: Some(resources::of_download()),
        volume_mounts: Some(vec![mount(VOLUME, CACHE_PATH, false)]),
        ..Container::default()
    };
    hardened(container)
}

/// The variables that a source's credentials are, each from the Secret's key of the same name.
fn credentials(uri: &str, secret: &str) -> Vec<EnvVar> {
    let (required, optional): (&[&str], &[&str]) = if uri.starts_with("s3://") {
        (&[env::AWS_ACCESS_KEY_ID, env::AWS_SECRET_ACCESS_KEY], &[env::AWS_SESSION_TOKEN])
    } else {
        (&[env::HF_TOKEN], &[])
    };
    let variable = |name: &&str, optional: Option<bool>| EnvVar {
        name: (*name).to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector { name: secret.to_owned(), key: (*name).to_owned(), optional }),
            ..EnvVarSource::default()
        }),
    };
    let required = required.iter().map(|name| variable(name, None));
    required.chain(optional.iter().map(|name| variable(name, Some(true)))).collect()
}

/// The directory of a download on its volume: a word that people know it by, and a hash of all that says which files it
/// holds, so that models that share a volume share what is the same and nothing else.
fn directory(download: &Download) -> String {
    let last = download.uri.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let word: String = last.chars().map(plain).take(DIRECTORY_WORD_CHARS_MAX).collect();
    let identity = (&download.uri, &download.revision, &download.endpoint, &download.region);
    let bytes = serde_json::to_vec(&identity).expect("texts always serialise");
    let hash = blake3::hash(&bytes).to_hex();
    format!("{}-{}", word.trim_start_matches('.'), &hash[..DIRECTORY_HASH_DIGITS])
}
