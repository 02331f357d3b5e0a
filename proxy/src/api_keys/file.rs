//! The file of API keys, read while the proxy runs, so that keys are added, rotated and revoked without a restart.
//!
//! ```json
//! {"keys": [{"sha256": "<64 hex digits>", "tenant": "team-a", "priority": "high", "maxInFlight": 32}]}
//! ```
//!
//! A tenant may have many keys, as during a rotation. They share its bound and may differ in priority.

use super::{ApiKeys, Digest, KEYS_MAX, Key, Salt, SaltSecret, Tenant};
use crate::admission::Class;
use crate::watched::{self, Complaint};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often the file is read. It is compared by content, because a mounted Secret changes by a swapped link whose times say
/// nothing. The kubelet takes up to a minute to bring a Secret, so this adds nothing that counts.
const INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of the file: an entry with the longest name takes 220, with room for whitespace.
const FILE_BYTES_MAX: u64 = KEYS_MAX as u64 * 512;

/// Bytes of a tenant's name, which is a label of metrics: as many as of a Kubernetes name.
const TENANT_BYTES_MAX: usize = 63;

/// Why there are no keys at the start.
#[derive(Debug, thiserror::Error)]
#[error(
    "the API keys in {} can't be used: mount a Secret there whose file is {{\"keys\": [{{\"sha256\": \"HEX\", \"tenant\": \
     \"NAME\"}}]}}, with the digest that `printf %s KEY | sha256sum` prints",
    file.display()
)]
pub struct ApiKeysError {
    file: PathBuf,
    #[source]
    fault: Fault,
}

/// What is wrong with a file. Says nothing of what is in it but names and positions.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("it can't be read")]
    Read(#[source] std::io::Error),
    #[error("it is not {{\"keys\": [{{\"sha256\", \"tenant\", \"priority\", \"maxInFlight\"}}]}}")]
    Json(#[source] serde_json::Error),
    #[error("it has no key, so nobody would be let in")]
    NoKey,
    #[error("it has {found} keys, at most {KEYS_MAX}")]
    TooMany { found: usize },
    #[error("sha256 of key {index} is not 64 hexadecimal digits")]
    Sha256 { index: usize },
    #[error("sha256 of key {index} is that of an empty text")]
    EmptyKey { index: usize },
    #[error("sha256 of key {index} is there twice")]
    Twice { index: usize },
    #[error("tenant of key {index} is not 1 to {TENANT_BYTES_MAX} letters, digits, '-', '_' and '.'")]
    TenantName { index: usize },
    #[error("maxInFlight of key {index} is 0: leave the key out to keep a tenant out")]
    NoneInFlight { index: usize },
    #[error("maxInFlight of key {index} differs from another key's of its tenant: it bounds all of them together")]
    InFlightDiffers { index: usize },
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    keys: Vec<FileKey>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileKey {
    sha256: String,
    tenant: String,
    #[serde(default)]
    priority: Class,
    max_in_flight: Option<usize>,
}

/// The keys at the start.
///
/// # Errors
/// When there is none, or the file is wrong: a proxy that was told to check keys serves nobody without.
pub(crate) async fn load(file: &Path, secret: &SaltSecret) -> Result<ApiKeys, ApiKeysError> {
    let keys = read(file, secret).await.and_then(|keys| if keys.0.is_empty() { Err(Fault::NoKey) } else { Ok(keys) });
    keys.map_err(|fault| ApiKeysError { file: file.to_owned(), fault })
}

/// Keeps the keys as the file has them. Ends with its caller.
pub(crate) async fn follow(file: PathBuf, secret: SaltSecret, keys: watch::Sender<Arc<ApiKeys>>) {
    let mut complaint = Complaint::default();
    loop {
        refresh(&file, &secret, &keys, &mut complaint).await;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Reads the file once. One that is missing or wrong leaves the keys as they were, or a slip would lock everybody out. One
/// without a key is no slip: it revokes them all.
async fn refresh(file: &Path, secret: &SaltSecret, keys: &watch::Sender<Arc<ApiKeys>>, complaint: &mut Complaint) {
    match read(file, secret).await {
        Ok(read) => {
            complaint.is_over();
            let count = read.count();
            let differs = |now: &mut Arc<ApiKeys>| {
                let differs = **now != read;
                if differs {
                    *now = Arc::new(read);
                }
                differs
            };
            if keys.send_if_modified(differs) {
                if count == 0 {
                    tracing::warn!(file = %file.display(), "the API keys changed: there is none, so nobody is let in");
                } else {
                    tracing::info!(count, "the API keys changed");
                }
            }
        }
        Err(fault) => {
            let text = fault.to_string();
            if complaint.is_new(&text) {
                let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(file = %file.display(), cause, "the file of API keys is not used: {text}; the keys stay");
            }
        }
    }
}

async fn read(file: &Path, secret: &SaltSecret) -> Result<ApiKeys, Fault> {
    parse(&watched::read(file, FILE_BYTES_MAX).await.map_err(Fault::Read)?, secret)
}

fn parse(content: &[u8], secret: &SaltSecret) -> Result<ApiKeys, Fault> {
    let File { keys } = serde_json::from_slice(content).map_err(|error| Fault::Json(without_content(&error)))?;
    if keys.len() > KEYS_MAX {
        return Err(Fault::TooMany { found: keys.len() });
    }
    let empty = Digest::of(b"");
    let mut digests = HashSet::new();
    let mut in_flight_max = HashMap::new();
    let mut parsed = Vec::with_capacity(keys.len());
    for (index, FileKey { sha256, tenant, priority, max_in_flight }) in keys.into_iter().enumerate() {
        let digest = Digest::from_bytes(unhex(&sha256).ok_or(Fault::Sha256 { index })?);
        if digest == empty {
            return Err(Fault::EmptyKey { index });
        }
        if !digests.insert(digest) {
            return Err(Fault::Twice { index });
        }
        let of_a_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if tenant.is_empty() || tenant.len() > TENANT_BYTES_MAX || !tenant.bytes().all(of_a_name) {
            return Err(Fault::TenantName { index });
        }
        if max_in_flight == Some(0) {
            return Err(Fault::NoneInFlight { index });
        }
        let (name, max) =
            in_flight_max.entry(tenant).or_insert_with_key(|tenant| (Arc::<str>::from(&**tenant), max_in_flight));
        if *max != max_in_flight {
            return Err(Fault::InFlightDiffers { index });
        }
        let salt = Salt::new(secret, name);
        let tenant = Tenant { name: Arc::clone(name), salt, priority, in_flight_max: max_in_flight };
        parsed.push(Key { digest, tenant: Arc::new(tenant) });
    }
    Ok(ApiKeys(parsed))
}

/// An error about JSON quotes what it found, and somebody may have put a key there: only the place is kept.
fn without_content(error: &serde_json::Error) -> serde_json::Error {
    let text = format!("wrong in line {}, column {}", error.line(), error.column());
    <serde_json::Error as serde::de::Error>::custom(text)
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    let digit = |digit: u8| char::from(digit).to_digit(16);
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> SaltSecret {
        SaltSecret::derive(b"secret")
    }

    fn hex(key: &str) -> String {
        use sha2::{Digest as _, Sha256};
        Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_file_says_which_key_is_whose() {
        // The digest of "abc" as FIPS 180-4 has it.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let content = format!(
            r#"{{"keys": [
                {{"sha256": "{abc}", "tenant": "a", "priority": "high", "maxInFlight": 4}},
                {{"sha256": "{}", "tenant": "a", "priority": 0, "maxInFlight": 4}},
                {{"sha256": "{}", "tenant": "b", "maxInFlight": null}}]}}"#,
            hex("def").to_uppercase(),
            hex("ghi"),
        );
        let keys = parse(content.as_bytes(), &secret()).expect("right");
        let check = |key: &str, name: &str, priority, in_flight_max| {
            let tenant = keys.tenant(key.as_bytes()).expect("a good key");
            let salt = Salt::new(&secret(), name);
            assert_eq!(*tenant, Tenant { name: name.into(), salt, priority, in_flight_max });
        };
        check("abc", "a", Class::HIGH, Some(4));
        check("def", "a", Class::try_from(0).expect("a class"), Some(4));
        check("ghi", "b", Class::NORMAL, None);
        assert_eq!(keys.tenant(abc.as_bytes()), None, "the digest is no key");
    }

    #[test]
    fn a_wrong_file_is_refused_with_the_reason_and_without_its_content() {
        let check = |content: &str, expect: &str| {
            let fault = parse(content.as_bytes(), &secret()).expect_err("wrong");
            let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
            let text = format!("{fault}: {cause}");
            assert!(text.contains(expect), "{content}: {text}");
            assert!(!text.contains("sk-secret"), "{text}");
        };
        let key = |rest: &str| format!(r#"{{"keys": [{{"sha256": "{}", "tenant": "a"}}, {rest}]}}"#, hex("a"));
        check("", "line 1");
        check("{}", "it is not");
        check(r#"{"keys": [{"sha256": "sk-secret", "tenant": "a"}]}"#, "sha256 of key 0 is not 64");
        check(r#"{"keys": [{"sk-secret": 1}]}"#, "it is not");
        check(r#"{"keys": "sk-secret"}"#, "it is not");
        check(&key(&format!(r#"{{"sha256": "{}", "tenant": "b"}}"#, hex(""))), "key 1 is that of an empty text");
        check(&key(&format!(r#"{{"sha256": "{}", "tenant": "b"}}"#, hex("a"))), "key 1 is there twice");
        check(&key(&format!(r#"{{"sha256": "{}", "tenant": "b c"}}"#, hex("b"))), "tenant of key 1");
        check(&key(&format!(r#"{{"sha256": "{}", "tenant": "b", "maxInFlight": 0}}"#, hex("b"))), "is 0");
        check(&key(&format!(r#"{{"sha256": "{}", "tenant": "a", "maxInFlight": 1}}"#, hex("b"))), "differs");
        check(&key(&format!(r#"{{"sha256": "{}", "tenant": "b", "priority": "urgent"}}"#, hex("b"))), "it is not");
        let many: Vec<String> = (0..=KEYS_MAX).map(|_| r#"{"sha256": "", "tenant": "a"}"#.to_owned()).collect();
        check(&format!(r#"{{"keys": [{}]}}"#, many.join(",")), "1001 keys, at most 1000");
    }

    #[test]
    fn as_many_keys_as_are_allowed_fit_into_the_file() {
        let tenant = "t".repeat(TENANT_BYTES_MAX);
        let entry = |index: usize| {
            let sha256 = hex(&index.to_string());
            format!(
                "    {{\n      \"sha256\": \"{sha256}\",\n      \"tenant\": \"{tenant}\",\n      \"priority\": \
                 \"critical\",\n      \"maxInFlight\": 1000000\n    }}"
            )
        };
        let content = format!("{{\"keys\": [\n{}\n]}}", (0..KEYS_MAX).map(entry).collect::<Vec<_>>().join(",\n"));
        assert!((content.len() as u64) < FILE_BYTES_MAX, "{}", content.len());
        assert_eq!(parse(content.as_bytes(), &secret()).expect("right").count(), KEYS_MAX);
    }

    #[tokio::test]
    async fn a_start_without_keys_says_which_file_and_what_to_do() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("keys.json");
        for content in [None, Some(""), Some(r#"{"keys": []}"#)] {
            if let Some(content) = content {
                std::fs::write(&file, content).expect("written");
            }
            let error = load(&file, &secret()).await.expect_err("no key").to_string();
            assert!(error.contains(&file.display().to_string()) && error.contains("sha256sum"), "{error}");
        }
    }

    #[tokio::test]
    async fn keys_follow_the_file_and_outlive_a_broken_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("keys.json");
        let of = |key: &str| format!(r#"{{"keys": [{{"sha256": "{}", "tenant": "a"}}]}}"#, hex(key));
        std::fs::write(&file, of("old")).expect("written");
        let keys = load(&file, &secret()).await.expect("a key");
        let (sender, seen) = watch::channel(Arc::new(keys));
        let mut complaint = Complaint::default();
        let mut check = async |content: Option<String>, good: &[&str], stands: bool| {
            match &content {
                Some(content) => std::fs::write(&file, content).expect("written"),
                None => std::fs::remove_file(&file).expect("removed"),
            }
            refresh(&file, &secret(), &sender, &mut complaint).await;
            let now = seen.borrow().clone();
            let found: Vec<&str> =
                ["old", "new"].into_iter().filter(|key| now.tenant(key.as_bytes()).is_some()).collect();
            assert_eq!((found, complaint.stands()), (good.to_vec(), stands), "{content:?}");
        };
        check(Some(of("old")), &["old"], false).await;
        check(Some("{".to_owned()), &["old"], true).await;
        check(Some(of("new")), &["new"], false).await;
        check(None, &["new"], true).await;
        check(Some(String::new()), &["new"], true).await;
        check(Some(r#"{"keys": []}"#.to_owned()), &[], false).await;
        check(Some(of("old")), &["old"], false).await;
    }
}
