//! Short-lived Ed25519 tokens that the proxy signs: the right to fetch one transfer, and to be served as a leg.
//!
//! A token is `base64url(claims JSON) "." base64url(signature)`. The key that signs is mounted in proxies alone; workers
//! hold the public half. The signed bytes start with the token's purpose, so that one kind can't be used as another.

use crate::{Epoch, Fingerprint, TransferId};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest token that is parsed: claims are under 400 bytes, so this leaves room for new ones.
pub const TOKEN_BYTES_MAX: usize = 2048;

/// The right of one consumer to fetch one transfer's KV, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferClaims {
    /// Which handover.
    pub transfer: TransferId,
    /// Which attempt at it.
    pub attempt: u32,
    /// The process that may fetch it.
    pub consumer: Epoch,
    /// The model and KV layout that both sides must have.
    pub fingerprint: Fingerprint,
    /// Bytes that may be fetched at most.
    pub byte_budget: u64,
    /// Not after this, in milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
}

/// The right to be served by the local engine as a leg.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegClaims {
    /// Path of the leg, such as `/internal/prefill`.
    pub path: String,
    /// blake3 of the request's body, in hexadecimal: a leg can't be replayed with another body.
    pub body_blake3: String,
    /// Not after this, in milliseconds since the Unix epoch.
    pub expires_unix_ms: u64,
}

/// Claims of one purpose.
pub trait Claims: Serialize + DeserializeOwned {
    /// What the signature is for; part of the signed bytes.
    const PURPOSE: &'static str;
    /// Not after this, in milliseconds since the Unix epoch.
    fn expires_unix_ms(&self) -> u64;
}

impl Claims for TransferClaims {
    const PURPOSE: &'static str = "baton-transfer-v1";
    fn expires_unix_ms(&self) -> u64 {
        self.expires_unix_ms
    }
}

impl Claims for LegClaims {
    const PURPOSE: &'static str = "baton-leg-v1";
    fn expires_unix_ms(&self) -> u64 {
        self.expires_unix_ms
    }
}

/// Why a token or a signature is refused. Deliberately says nothing of what would have been right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not two base64url parts of claims and signature.
    #[error("token is malformed")]
    Malformed,
    /// Not signed by this model's proxies.
    #[error("token's signature is not by this model's proxies")]
    BadSignature,
    /// Too late.
    #[error("token has expired")]
    Expired,
}

/// A key file that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("a key is 64 hexadecimal digits, found {found} characters")]
pub struct KeyError {
    found: usize,
}

/// Signs tokens.
pub fn sign<C: Claims>(key: &SigningKey, claims: &C) -> String {
    let claims = serde_json::to_vec(claims).expect("claims are strings and integers, which always serialise");
    let signature = key.sign(&signed_bytes(C::PURPOSE, &claims));
    format!("{}.{}", URL_SAFE_NO_PAD.encode(&claims), URL_SAFE_NO_PAD.encode(signature.to_bytes()))
}

/// Checks a token's form, signature and expiry, in that order.
///
/// # Errors
/// See [`TokenError`].
pub fn verify<C: Claims>(key: &VerifyingKey, token: &str, now_unix_ms: u64) -> Result<C, TokenError> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(TokenError::Malformed);
    }
    let (claims, signature) = token.split_once('.').ok_or(TokenError::Malformed)?;
    let claims = URL_SAFE_NO_PAD.decode(claims).map_err(|_| TokenError::Malformed)?;
    check(key, &signed_bytes(C::PURPOSE, &claims), signature)?;
    let claims: C = serde_json::from_slice(&claims).map_err(|_| TokenError::Malformed)?;
    if now_unix_ms > claims.expires_unix_ms() { Err(TokenError::Expired) } else { Ok(claims) }
}

/// Signs a status answer: the nonce makes it fresh, the key makes it one of ours.
pub fn sign_status(key: &SigningKey, nonce: &str, body: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(key.sign(&status_bytes(nonce, body)).to_bytes())
}

/// Checks a status answer's signature.
///
/// # Errors
/// [`TokenError::Malformed`] or [`TokenError::BadSignature`].
pub fn verify_status(key: &VerifyingKey, nonce: &str, body: &[u8], signature: &str) -> Result<(), TokenError> {
    check(key, &status_bytes(nonce, body), signature)
}

/// blake3 of a leg's body as [`LegClaims`] carry it.
pub fn body_blake3(body: &[u8]) -> String {
    pieces_blake3([body])
}

/// The same of a body that lies in pieces.
pub fn pieces_blake3<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = blake3::Hasher::new();
    pieces.into_iter().for_each(|piece| {
        hasher.update(piece);
    });
    hasher.finalize().to_hex().to_string()
}

/// Reads a signing key: 32 bytes in hexadecimal, white space around it ignored.
///
/// # Errors
/// When the text is anything else.
pub fn parse_signing_key(text: &str) -> Result<SigningKey, KeyError> {
    parse_key(text).map(|bytes| SigningKey::from_bytes(&bytes))
}

/// Reads a public key: 32 bytes in hexadecimal, white space around it ignored.
///
/// # Errors
/// When the text is anything else, or no point of the curve.
pub fn parse_verifying_key(text: &str) -> Result<VerifyingKey, KeyError> {
    let found = text.trim().len();
    VerifyingKey::from_bytes(&parse_key(text)?).map_err(|_| KeyError { found })
}

/// The text form that [`parse_signing_key`] and [`parse_verifying_key`] read.
pub fn key_text(bytes: &[u8; 32]) -> String {
    Fingerprint(*bytes).to_string()
}

/// A model's key pair in the text form that its files have.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyTexts {
    /// For proxies alone: what [`parse_signing_key`] reads.
    pub signing: String,
    /// For workers: what [`parse_verifying_key`] reads.
    pub public: String,
}

impl KeyTexts {
    /// The pair that 32 random bytes make.
    pub fn from_secret(secret: &[u8; 32]) -> Self {
        Self::of(&SigningKey::from_bytes(secret))
    }

    /// The pair of which the private half is known.
    pub fn of(key: &SigningKey) -> Self {
        KeyTexts { signing: key_text(&key.to_bytes()), public: key_text(&key.verifying_key().to_bytes()) }
    }
}

/// Without the private half, so that no log shows it.
impl std::fmt::Debug for KeyTexts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyTexts").field("public", &self.public).finish_non_exhaustive()
    }
}

fn parse_key(text: &str) -> Result<[u8; 32], KeyError> {
    let text = text.trim();
    text.parse::<Fingerprint>().map(|id| id.0).map_err(|_| KeyError { found: text.len() })
}

fn check(key: &VerifyingKey, bytes: &[u8], signature: &str) -> Result<(), TokenError> {
    let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Malformed)?;
    let signature = Signature::from_slice(&signature).map_err(|_| TokenError::Malformed)?;
    key.verify_strict(bytes, &signature).map_err(|_| TokenError::BadSignature)
}

fn signed_bytes(purpose: &str, claims: &[u8]) -> Vec<u8> {
    [purpose.as_bytes(), b"\0", claims].concat()
}

fn status_bytes(nonce: &str, body: &[u8]) -> Vec<u8> {
    [b"baton-status-v1\0", nonce.as_bytes(), b"\0", body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[7; 32])
    }

    fn claims() -> TransferClaims {
        TransferClaims {
            transfer: TransferId([1; 16]),
            attempt: 1,
            consumer: Epoch([2; 16]),
            fingerprint: Fingerprint([3; 32]),
            byte_budget: 1 << 40,
            expires_unix_ms: 1000,
        }
    }

    #[test]
    fn a_token_gives_its_claims_back_until_it_expires() {
        let token = sign(&key(), &claims());
        assert_eq!(verify::<TransferClaims>(&key().verifying_key(), &token, 1000), Ok(claims()));
        assert_eq!(verify::<TransferClaims>(&key().verifying_key(), &token, 1001), Err(TokenError::Expired));
    }

    #[test]
    fn any_changed_byte_or_another_key_is_refused() {
        let token = sign(&key(), &claims());
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("still ASCII");
            assert!(verify::<TransferClaims>(&key().verifying_key(), &changed, 0).is_err(), "byte {at}");
        }
        let other = SigningKey::from_bytes(&[8; 32]).verifying_key();
        assert_eq!(verify::<TransferClaims>(&other, &token, 0), Err(TokenError::BadSignature));
    }

    #[test]
    fn a_token_of_one_purpose_is_no_token_of_another() {
        let token = sign(&key(), &claims());
        assert_eq!(verify::<LegClaims>(&key().verifying_key(), &token, 0), Err(TokenError::BadSignature));
    }

    #[test]
    fn keys_survive_their_text_form() {
        let text = format!("{}\n", key_text(&key().to_bytes()));
        assert_eq!(parse_signing_key(&text).expect("own form parses").to_bytes(), key().to_bytes());
        assert!(parse_signing_key("abc").is_err());
    }

    #[test]
    fn a_pair_of_texts_is_one_key_and_shows_its_public_half_alone() {
        let texts = KeyTexts::from_secret(&[7; 32]);
        let signing = parse_signing_key(&texts.signing).expect("own form parses");
        assert_eq!(parse_verifying_key(&texts.public).expect("own form parses"), signing.verifying_key());
        assert!(!format!("{texts:?}").contains(&texts.signing));
    }

    #[test]
    fn a_status_signature_holds_for_its_nonce_and_body_only() {
        let signature = sign_status(&key(), "n1", b"body");
        let public = key().verifying_key();
        assert_eq!(verify_status(&public, "n1", b"body", &signature), Ok(()));
        assert_eq!(verify_status(&public, "n2", b"body", &signature), Err(TokenError::BadSignature));
        assert_eq!(verify_status(&public, "n1", b"bodY", &signature), Err(TokenError::BadSignature));
    }
}
