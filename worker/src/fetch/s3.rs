//! A bucket's objects by the protocol of Amazon S3, which other stores speak too.
//!
//! Questions are signed in their URL. Below the prefix only what lies directly there is listed; another store than AWS is addressed
//! with the bucket in the path, since it seldom has a name of its own for each bucket.

use super::config::S3Source;
use super::error::FetchError;
use super::remote::{Digest, Entry, Listing};
use super::web::{Question, Refusal, Trouble, Web, hex};
use baton_wire::names::env;
use reqwest::{StatusCode, Url};
use rusty_s3::actions::ListObjectsV2;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use std::time::Duration;

/// How long a signature holds: it only has to reach the server, whose clock may be minutes off.
const SIGNATURE_TTL: Duration = Duration::from_secs(900);

/// Bytes of one page of a listing: 1,000 objects of a kilobyte of key and half one of the rest.
const PAGE_BYTES_MAX: usize = 4 << 20;

/// Pages of a listing: 10,000 objects beside each other are no model directory.
const PAGES_MAX: usize = 10;

/// Objects of a bucket.
#[derive(Debug)]
pub(super) struct S3 {
    bucket: Bucket,
    credentials: Option<Credentials>,
    prefix: String,
    region: String,
    place: String,
}

impl S3 {
    pub(super) fn new(source: &S3Source) -> Result<Self, FetchError> {
        let S3Source { endpoint, bucket, prefix, region, keys } = source;
        let place = format!("s3://{bucket}/{prefix}");
        let wrong = |why: String| FetchError::Bucket { uri: place.clone(), why };
        // A name with dots would not match AWS's certificate.
        let style = if endpoint.is_some() || bucket.contains('.') { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let endpoint = match endpoint {
            Some(endpoint) => endpoint.clone(),
            None => {
                Url::parse(&format!("https://s3.{region}.amazonaws.com")).map_err(|error| wrong(error.to_string()))?
            }
        };
        let bucket =
            Bucket::new(endpoint, style, bucket.clone(), region.clone()).map_err(|error| wrong(error.to_string()))?;
        let credentials = keys.as_ref().map(|keys| {
            let (id, secret) = (keys.id.expose(), keys.secret.expose());
            match &keys.session {
                Some(session) => Credentials::new_with_token(id, secret, session.expose()),
                None => Credentials::new(id, secret),
            }
        });
        Ok(S3 { bucket, credentials, prefix: prefix.clone(), region: region.clone(), place })
    }

    /// `s3://BUCKET/PREFIX/`.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    pub(super) async fn list(&self, web: &Web) -> Result<Listing, Trouble> {
        let mut entries = Vec::new();
        let mut token: Option<String> = None;
        for _ in 0..PAGES_MAX {
            let mut action = self.bucket.list_objects_v2(self.credentials.as_ref());
            action.with_prefix(self.prefix.as_str());
            action.with_delimiter("/");
            if let Some(token) = &token {
                action.with_continuation_token(token.as_str());
            }
            let body = web.read(&ask(action.sign(SIGNATURE_TTL), 0, None), PAGE_BYTES_MAX).await?;
            token = self.parse(&body, &mut entries)?;
            if token.is_none() {
                let revision = revision(&entries);
                return Ok(Listing { revision, entries });
            }
        }
        Err(self.wrong(format!("more than {PAGES_MAX} pages")).into())
    }

    /// Takes in a page and gives the token of the next one.
    fn parse(&self, body: &[u8], entries: &mut Vec<Entry>) -> Result<Option<String>, FetchError> {
        let text = std::str::from_utf8(body).map_err(|error| self.wrong(error.to_string()))?;
        let page = ListObjectsV2::parse_response(text).map_err(|error| self.wrong(error.to_string()))?;
        for object in page.contents {
            let Some(name) = object.key.strip_prefix(&self.prefix) else {
                return Err(self.wrong(format!("{:?} does not begin with the prefix", object.key)));
            };
            // What consoles make for a folder.
            if name.is_empty() {
                continue;
            }
            let size = object.size.ok_or_else(|| self.wrong(format!("{name:?} has no size")))?;
            // The tag of an object that was uploaded in one piece is its MD5; others have a dash in theirs.
            let digest = object.etag.as_deref().and_then(|tag| hex(tag.trim_matches('"'))).map(Digest::Md5);
            entries.push(Entry { name: name.to_owned(), size, digest, tag: object.etag });
        }
        Ok(page.next_continuation_token)
    }

    fn wrong(&self, why: String) -> FetchError {
        FetchError::Listing { what: self.place.clone(), why }
    }

    pub(super) fn question(&self, entry: &Entry, from: u64) -> Question {
        let key = format!("{}{}", self.prefix, entry.name);
        let url = self.bucket.get_object(self.credentials.as_ref(), &key).sign(SIGNATURE_TTL);
        ask(url, from, entry.tag.clone())
    }

    /// What helps against a store's no.
    pub(super) fn cure(&self, refusal: &Refusal) -> String {
        let (id, secret, session) = (env::AWS_ACCESS_KEY_ID, env::AWS_SECRET_ACCESS_KEY, env::AWS_SESSION_TOKEN);
        let named = "the Secret that spec.model.credentialsSecretRef names";
        match (refusal.code.as_deref(), refusal.status, &refusal.region) {
            (_, _, Some(region)) if *region != self.region => {
                format!("the bucket is in another region: set spec.model.region to {region}")
            }
            (Some("PermanentRedirect" | "TemporaryRedirect" | "AuthorizationHeaderMalformed"), _, _) => {
                format!("the bucket is not in region {}: set spec.model.region", self.region)
            }
            (Some("NoSuchBucket"), _, _) => {
                "there is no such bucket: check spec.model.uri, and spec.model.endpoint where one is set".to_owned()
            }
            (Some("InvalidAccessKeyId"), _, _) => format!("there is no such access key: check key {id} of {named}"),
            (Some("SignatureDoesNotMatch"), _, _) => format!("the secret is wrong: check key {secret} of {named}"),
            (Some("ExpiredToken" | "InvalidToken"), _, _) => {
                format!("the temporary keys are not valid any more: renew {id}, {secret} and {session} in {named}")
            }
            (Some("RequestTimeTooSkewed"), _, _) => "set this node's clock".to_owned(),
            (_, StatusCode::PRECONDITION_FAILED, _) => {
                "the object was replaced while it was downloaded: the next start takes the new one".to_owned()
            }
            (_, StatusCode::NOT_FOUND, _) => "it is not there: check spec.model.uri".to_owned(),
            (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) if self.credentials.is_some() => {
                format!("the keys in {named} need the rights s3:ListBucket and s3:GetObject there")
            }
            (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => format!(
                "the bucket is not public: name a Secret with keys {id} and {secret} in spec.model.credentialsSecretRef"
            ),
            _ => "check spec.model.uri and spec.model.region, and spec.model.endpoint where one is set".to_owned(),
        }
    }
}

fn ask(url: Url, from: u64, if_match: Option<String>) -> Question {
    Question { url, bearer: None, from, if_match, follow: false }
}

/// A bucket has no commits: what is there now stands for one.
fn revision(entries: &[Entry]) -> String {
    let mut lines: Vec<String> =
        entries.iter().map(|entry| format!("{:?} {} {:?}\n", entry.name, entry.size, entry.tag)).collect();
    lines.sort();
    blake3::hash(lines.concat().as_bytes()).to_hex()[..32].to_owned()
}
