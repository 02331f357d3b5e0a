//! A model hub's HTTP interface: the listing of a revision, and its files at the commit that the revision was resolved to.
//!
//! `GET /api/models/ORG/REPO/revision/REV?blobs=true` answers the commit and for each file its size and, where it is a large one, its
//! SHA-256; `GET /ORG/REPO/resolve/COMMIT/FILE` answers the file or leads to it.
//! (<https://huggingface.co/docs/hub/api>)

use super::config::HubSource;
use super::error::FetchError;
use super::remote::{Digest, Entry, Listing};
use super::web::{Question, Refusal, Trouble, Web, hex};
use baton_wire::names::env;
use reqwest::{StatusCode, Url};

/// What is meant where no revision is given.
const MAIN: &str = "main";

/// Bytes of a listing: half a kilobyte for each of some ten thousand files.
const LISTING_BYTES_MAX: usize = 8 << 20;

/// A repository of a hub.
#[derive(Debug)]
pub(super) struct Hub {
    source: HubSource,
    place: String,
}

#[derive(serde::Deserialize)]
struct Model {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(serde::Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(serde::Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hub {
    pub(super) fn new(source: HubSource) -> Self {
        let place = format!("hf://{}/{}", source.organisation, source.repository);
        Hub { source, place }
    }

    /// `hf://ORG/REPO`.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    pub(super) async fn list(&self, web: &Web) -> Result<Listing, Trouble> {
        let HubSource { organisation, repository, .. } = &self.source;
        let mut url = self.url(&["api", "models", organisation, repository, "revision", self.revision()]);
        url.set_query(Some("blobs=true"));
        let body = web.read(&self.ask(url, 0), LISTING_BYTES_MAX).await?;
        Ok(self.parse(&body)?)
    }

    fn parse(&self, body: &[u8]) -> Result<Listing, FetchError> {
        let wrong = |why: String| FetchError::Listing { what: self.place.clone(), why };
        let Model { sha, siblings } = serde_json::from_slice(body).map_err(|error| wrong(error.to_string()))?;
        // It becomes part of further questions.
        if sha.is_empty() || sha.len() > 64 || !sha.bytes().all(|c| c.is_ascii_alphanumeric()) {
            return Err(wrong("the commit is none".to_owned()));
        }
        let entry = |Sibling { rfilename, size, lfs }| {
            let (linked, digest) = lfs.map_or((None, None), |Lfs { sha256, size }| (size, sha256));
            let size = linked.or(size).ok_or_else(|| wrong(format!("{rfilename:?} has no size")))?;
            let digest = digest.as_deref().and_then(hex).map(Digest::Sha256);
            Ok(Entry { name: rfilename, size, digest, tag: None })
        };
        let entries = siblings.into_iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Listing { revision: sha, entries })
    }

    pub(super) fn question(&self, revision: &str, entry: &Entry, from: u64) -> Question {
        let HubSource { organisation, repository, .. } = &self.source;
        self.ask(self.url(&[organisation, repository, "resolve", revision, &entry.name]), from)
    }

    fn ask(&self, url: Url, from: u64) -> Question {
        Question { url, bearer: self.source.token.clone(), from, if_match: None, follow: true }
    }

    /// A path of the hub; what is in a step is escaped, slashes included.
    fn url(&self, steps: &[&str]) -> Url {
        let mut url = self.source.endpoint.clone();
        url.path_segments_mut().expect("an http URL has a path").pop_if_empty().extend(steps);
        url
    }

    fn revision(&self) -> &str {
        self.source.revision.as_deref().unwrap_or(MAIN)
    }

    /// What helps against a hub's no.
    pub(super) fn cure(&self, refusal: &Refusal) -> String {
        let HubSource { organisation, repository, endpoint, .. } = &self.source;
        let page = format!("{}{organisation}/{repository}", endpoint.as_str());
        let token = env::HF_TOKEN;
        let is_gated = refusal.code.as_deref() == Some("GatedRepo") || refusal.status == StatusCode::FORBIDDEN;
        match (refusal.status, self.source.token.is_some()) {
            (_, true) if is_gated => format!(
                "the account of the token in {token} may not read it: accept the model's terms at {page} with that account, or put \
                 another token into the Secret that spec.model.credentialsSecretRef names"
            ),
            (_, false) if is_gated => format!(
                "it is not open to everybody: accept the model's terms at {page}, and name a Secret with key {token} in \
                 spec.model.credentialsSecretRef"
            ),
            (StatusCode::UNAUTHORIZED, true) => format!(
                "the token is not taken: put a valid one under key {token} into the Secret that spec.model.credentialsSecretRef \
                 names"
            ),
            (StatusCode::UNAUTHORIZED, false) => format!(
                "there is no public model of this name: check spec.model.uri, or, if it is private, name a Secret with key {token} \
                 in spec.model.credentialsSecretRef"
            ),
            (StatusCode::NOT_FOUND, _) if refusal.code.as_deref() == Some("RevisionNotFound") => {
                format!("it has no revision {:?}: check spec.model.revision", self.revision())
            }
            (StatusCode::NOT_FOUND, true) => {
                format!("there is none that the token in {token} may see: check spec.model.uri and spec.model.revision")
            }
            (StatusCode::NOT_FOUND, false) => "there is none: check spec.model.uri and spec.model.revision".to_owned(),
            _ => "check spec.model.uri, and spec.model.endpoint where one is set".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> Hub {
        Hub::new(HubSource {
            endpoint: Url::parse("https://hub.local/mirror/").expect("a URL"),
            organisation: "org".to_owned(),
            repository: "tiny".to_owned(),
            revision: Some("refs/pr/1".to_owned()),
            token: None,
        })
    }

    #[test]
    fn a_listing_has_sizes_and_the_digests_of_large_files() {
        let body = format!(
            r#"{{"sha": "0123abc", "siblings": [{{"rfilename": "config.json", "size": 7, "blobId": "x"}},
                {{"rfilename": "model.safetensors", "size": 9, "lfs": {{"sha256": "{}", "size": 9, "pointerSize": 135}}}}]}}"#,
            "ab".repeat(32)
        );
        let listing = hub().parse(body.as_bytes()).expect("a listing");
        assert_eq!(listing.revision, "0123abc");
        assert_eq!((listing.entries[0].size, listing.entries[0].digest), (7, None));
        assert_eq!((listing.entries[1].size, listing.entries[1].digest), (9, Some(Digest::Sha256([0xab; 32]))));
    }

    #[test]
    fn a_wrong_listing_is_refused_and_says_what_is_wrong() {
        for (body, expect) in [
            ("<html>", "expected value"),
            (r#"{"sha": "../x", "siblings": []}"#, "commit"),
            (r#"{"sha": "a", "siblings": [{"rfilename": "config.json"}]}"#, "config.json"),
        ] {
            let error = hub().parse(body.as_bytes()).expect_err("wrong").to_string();
            assert!(error.contains(expect) && error.contains("hf://org/tiny"), "{error}");
        }
    }

    #[test]
    fn names_are_escaped_in_paths() {
        let entry = Entry { name: "a b%/c".to_owned(), size: 1, digest: None, tag: None };
        let url = hub().question("c0", &entry, 0).url;
        assert_eq!(url.as_str(), "https://hub.local/mirror/org/tiny/resolve/c0/a%20b%25%2Fc");
        let url = hub().url(&["revision", hub().revision()]);
        assert!(url.as_str().ends_with("/revision/refs%2Fpr%2F1"), "{url}");
    }
}
