//! What a download was told, checked: nothing is dialled or written before this succeeds. Secrets in it never reach a log.

use super::pace::Pace;
use crate::args::FetchArgs;
use baton_wire::names::env;
use reqwest::Url;
use reqwest::header::HeaderValue;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The public model hub.
const HUB: &str = "https://huggingface.co";

/// The region that S3 itself takes where none is said.
const REGION: &str = "us-east-1";

/// What a download was told.
#[derive(Clone, Debug)]
pub struct Config {
    /// What to download, as it was given.
    pub uri: String,
    /// Where to.
    pub to: PathBuf,
    /// Where progress is told.
    pub admin_listen: Option<SocketAddr>,
    /// Whether the log is JSON.
    pub log_json: bool,
    /// How it waits.
    pub pace: Pace,
    pub(super) source: Source,
}

/// Where it is.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Hub(HubSource),
    S3(S3Source),
}

/// A repository of a hub.
#[derive(Clone, Debug)]
pub(super) struct HubSource {
    pub(super) endpoint: Url,
    pub(super) organisation: String,
    pub(super) repository: String,
    /// As it was given.
    pub(super) revision: Option<String>,
    pub(super) token: Option<Secret>,
}

/// Objects of a bucket.
#[derive(Clone, Debug)]
pub(super) struct S3Source {
    /// Another store than AWS.
    pub(super) endpoint: Option<Url>,
    pub(super) bucket: String,
    /// Ends with a slash unless it is empty.
    pub(super) prefix: String,
    pub(super) region: String,
    pub(super) keys: Option<Keys>,
}

/// Access keys of S3.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) id: Secret,
    pub(super) secret: Secret,
    pub(super) session: Option<Secret>,
}

/// A text that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    /// For whom it is meant.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// A flag or a variable that can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The URI is none of those that are downloaded.
    #[error("--uri is {found:?}; it must be hf://ORGANISATION/MODEL or s3://BUCKET/PREFIX")]
    Uri {
        /// What it is.
        found: String,
    },
    /// The endpoint is no server.
    #[error("--endpoint is {found:?}; it must be http(s)://HOST[:PORT]")]
    Endpoint {
        /// What it is.
        found: String,
    },
    /// A flag that goes with the other scheme.
    #[error("{flag} goes with {scheme} alone")]
    WrongScheme {
        /// Which flag.
        flag: &'static str,
        /// What it goes with.
        scheme: &'static str,
    },
    /// A flag that must say something is empty.
    #[error("{flag} must not be empty")]
    Empty {
        /// Which flag.
        flag: &'static str,
    },
    /// Half of a key pair.
    #[error("{present} is set and {missing} is not: the Secret needs both keys, or neither for a public bucket")]
    HalfKeys {
        /// What is there.
        present: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// A secret that can't be sent.
    #[error(
        "{variable} holds characters that no such credential has: check the Secret's value for line breaks inside it"
    )]
    Unsendable {
        /// Which variable.
        variable: &'static str,
    },
}

impl Config {
    /// Checks flags and environment.
    ///
    /// # Errors
    /// Names the flag or the variable.
    pub fn new(args: FetchArgs, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let FetchArgs { uri, revision, to, endpoint, region, admin_listen, log_format } = args;
        if to.as_os_str().is_empty() {
            return Err(ConfigError::Empty { flag: "--to" });
        }
        if revision.as_deref() == Some("") {
            return Err(ConfigError::Empty { flag: "--revision" });
        }
        let endpoint = endpoint.map(server).transpose()?;
        let wrong = || ConfigError::Uri { found: uri.clone() };
        let source = if let Some(place) = uri.strip_prefix("hf://") {
            if region.is_some() {
                return Err(ConfigError::WrongScheme { flag: "--region", scheme: "s3://" });
            }
            let (organisation, repository) = place.split_once('/').ok_or_else(wrong)?;
            if !is_hub_name(organisation) || !is_hub_name(repository) {
                return Err(wrong());
            }
            Source::Hub(HubSource {
                endpoint: endpoint.unwrap_or_else(|| Url::parse(HUB).expect("a right URL")),
                organisation: organisation.to_owned(),
                repository: repository.to_owned(),
                revision,
                token: secret(environment, env::HF_TOKEN)?,
            })
        } else if let Some(place) = uri.strip_prefix("s3://") {
            if revision.is_some() {
                return Err(ConfigError::WrongScheme { flag: "--revision", scheme: "hf://" });
            }
            let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
            let prefix = prefix.trim_end_matches('/');
            if !is_bucket_name(bucket) || (!prefix.is_empty() && prefix.split('/').any(|part| !is_key_part(part))) {
                return Err(wrong());
            }
            let region = region.or_else(|| environment("AWS_REGION")).unwrap_or_else(|| REGION.to_owned());
            let is_region = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
            if region.is_empty() || !region.bytes().all(is_region) {
                return Err(ConfigError::Empty { flag: "--region" });
            }
            Source::S3(S3Source {
                endpoint,
                bucket: bucket.to_owned(),
                prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
                region,
                keys: keys(environment)?,
            })
        } else {
            return Err(wrong());
        };
        Ok(Config { uri, to, admin_listen, log_json: log_format == "json", pace: Pace::default(), source })
    }

    /// The revision that was asked for, where there is such a thing.
    pub(super) fn revision(&self) -> Option<&str> {
        match &self.source {
            Source::Hub(hub) => hub.revision.as_deref(),
            Source::S3(_) => None,
        }
    }
}

fn server(text: String) -> Result<Url, ConfigError> {
    let url = Url::parse(&text).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    });
    url.ok_or(ConfigError::Endpoint { found: text })
}

fn is_hub_name(name: &str) -> bool {
    let is_safe = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    !name.is_empty() && name.len() <= 96 && name.bytes().all(is_safe) && !name.starts_with('.')
}

fn is_bucket_name(name: &str) -> bool {
    let is_safe = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    (3..=63).contains(&name.len()) && name.bytes().all(is_safe) && !name.contains("..")
}

/// A step of a prefix. A URL would take dots for directions.
fn is_key_part(part: &str) -> bool {
    !part.is_empty() && part != "." && part != ".." && !part.contains(char::is_control)
}

/// A variable's value; what Secrets are written with often ends in a line break, which is no part of it.
fn secret(environment: &dyn Fn(&str) -> Option<String>, variable: &'static str) -> Result<Option<Secret>, ConfigError> {
    let value = environment(variable).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    match value {
        Some(value) if HeaderValue::from_str(&value).is_err() => Err(ConfigError::Unsendable { variable }),
        value => Ok(value.map(Secret)),
    }
}

fn keys(environment: &dyn Fn(&str) -> Option<String>) -> Result<Option<Keys>, ConfigError> {
    let id = secret(environment, env::AWS_ACCESS_KEY_ID)?;
    let secret_key = secret(environment, env::AWS_SECRET_ACCESS_KEY)?;
    let session = secret(environment, env::AWS_SESSION_TOKEN)?;
    let half = |present, missing| Err(ConfigError::HalfKeys { present, missing });
    match (id, secret_key) {
        (Some(id), Some(secret)) => Ok(Some(Keys { id, secret, session })),
        (None, None) => Ok(None),
        (Some(_), None) => half(env::AWS_ACCESS_KEY_ID, env::AWS_SECRET_ACCESS_KEY),
        (None, Some(_)) => half(env::AWS_SECRET_ACCESS_KEY, env::AWS_ACCESS_KEY_ID),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, CommandLine};
    use clap::Parser;

    fn config(flags: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let words = format!("baton-worker fetch --to /models/cache/m {flags}");
        let line = CommandLine::try_parse_from(words.split_whitespace()).expect("the command line parses");
        let Some(Command::Fetch(args)) = line.command else { panic!("no fetch") };
        Config::new(args, &|name| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_wrong_flag_or_variable_is_named() {
        let check = |flags: &str, environment: &[(&str, &str)], expect: &str| {
            let error = config(flags, environment).expect_err(flags).to_string();
            assert!(error.contains(expect), "{flags}: {error}");
        };
        check("--uri pvc://models/tiny", &[], "hf://ORGANISATION/MODEL");
        check("--uri hf://model", &[], "hf://ORGANISATION/MODEL");
        check("--uri hf://a/b/c", &[], "hf://ORGANISATION/MODEL");
        check("--uri hf://../b", &[], "hf://ORGANISATION/MODEL");
        check("--uri s3://b", &[], "s3://BUCKET/PREFIX");
        check("--uri s3://bucket/a/../b", &[], "s3://BUCKET/PREFIX");
        check("--uri s3://bucket/a --revision main", &[], "--revision goes with hf:// alone");
        check("--uri hf://a/b --region eu", &[], "--region goes with s3:// alone");
        check("--uri hf://a/b --revision=", &[], "--revision must not be empty");
        check("--uri hf://a/b --endpoint hub.local", &[], "--endpoint");
        check("--uri hf://a/b --endpoint http://user:word@hub.local", &[], "--endpoint");
        check("--uri hf://a/b", &[("HF_TOKEN", "a\nb")], "HF_TOKEN");
        check("--uri s3://bucket/a", &[("AWS_ACCESS_KEY_ID", "a")], "AWS_SECRET_ACCESS_KEY is not");
    }

    #[test]
    fn secrets_are_taken_without_their_line_breaks_and_never_shown() {
        let hub = config("--uri hf://a/b", &[("HF_TOKEN", "hf_secret\n")]).expect("right");
        let Source::Hub(HubSource { token: Some(token), .. }) = &hub.source else { panic!("a token") };
        assert_eq!(token.expose(), "hf_secret");
        let keys = [("AWS_ACCESS_KEY_ID", "secret-id"), ("AWS_SECRET_ACCESS_KEY", "secret-key")];
        let s3 = config("--uri s3://bucket/a/b/", &keys).expect("right");
        for shown in [format!("{hub:?}"), format!("{s3:?}")] {
            assert!(!shown.contains("secret-") && !shown.contains("hf_"), "{shown}");
        }
        let Source::S3(source) = s3.source else { panic!("a bucket") };
        assert_eq!((source.prefix.as_str(), source.region.as_str()), ("a/b/", "us-east-1"));
    }
}
