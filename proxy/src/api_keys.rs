//! Who may use the proxy: the keys of a mounted file, and the tenant that a request's key stands for. Knows no route and
//! answers nothing; `http` refuses where it finds nobody.
//!
//! The file holds digests, so that whoever reads it can use none of the keys. SHA-256 without salt or stretching is right
//! for keys that are drawn at random, as these are to be (`openssl rand -hex 32`): there is no dictionary of them.
//!
//! A digest is compared with all entries, in the same time whether and where one is equal. With digests an early end would
//! tell how many leading bytes of a stored digest are equal to one that the client can compute; by choosing keys it could
//! learn a few bytes of each digest and then test guesses at home. For a random key that is worth nothing, but somebody will
//! put a password here. What the time does tell is the length of the client's own key, and how many keys there are.
//! `api_keys/timing.rs` measures it (`make bench-api-keys`).

mod file;
#[cfg(test)]
mod timing;

pub(crate) use file::{ApiKeysError, follow, load};

use crate::admission::Class;
use http::{HeaderMap, header};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};

/// Keys in one file. Each request looks at all of them, about 10 ns each.
const KEYS_MAX: usize = 1000;

/// Bytes of a key: longer ones than anybody issues would let a client choose how much we hash.
const KEY_BYTES_MAX: usize = 512;

/// The other header that clients of this kind of API send a key in.
const X_API_KEY: &str = "x-api-key";

/// Whom a key stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tenant {
    pub(crate) name: Arc<str>,
    pub(crate) salt: Salt,
    pub(crate) priority: Class,
    /// Requests that are served at once, of all the tenant's keys together.
    pub(crate) in_flight_max: Option<usize>,
}

impl Tenant {
    /// Whose every request is where no keys are asked for.
    pub(crate) fn everybody() -> Self {
        Tenant { name: "".into(), salt: Salt(0), priority: Class::NORMAL, in_flight_max: None }
    }

    /// Whether it stands for a key.
    pub(crate) fn is_known(&self) -> bool {
        !self.name.is_empty()
    }
}

/// Keeps tenants apart in prefix caches: no block of one is found by another, so nobody can measure what others have asked.
/// The same in every proxy that has the same secret, or a tenant would miss its own blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Salt(u64);

impl Salt {
    /// The secret makes it one that nobody can compute who knows a tenant's name.
    fn new(secret: &SaltSecret, tenant: &str) -> Self {
        let hash = blake3::keyed_hash(&secret.0, tenant.as_bytes());
        let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        Salt(u64::from_le_bytes(*first))
    }

    pub(crate) const fn as_u64(self) -> u64 {
        self.0
    }
}

/// The salt as engines are told it (`cache_salt`): 16 hexadecimal digits.
impl std::fmt::Display for Salt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What all salts of a model come from.
#[derive(Clone)]
pub(crate) struct SaltSecret([u8; 32]);

impl SaltSecret {
    /// From something secret that all proxies of the model have, as the key that they sign with.
    pub(crate) fn derive(secret: &[u8]) -> Self {
        SaltSecret(blake3::derive_key("baton-proxy 2026-11 tenant salt of prefix caches", secret))
    }
}

impl std::fmt::Debug for SaltSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SaltSecret(..)")
    }
}

/// The keys that are good now.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ApiKeys(Vec<Key>);

#[derive(Clone, PartialEq, Eq)]
struct Key {
    digest: Digest,
    tenant: Arc<Tenant>,
}

/// SHA-256 of a key, as words: four comparisons instead of 32.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Digest([u64; 4]);

/// Counts only: digests are no secret and still nothing for a log.
impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

impl Digest {
    fn of(key: &[u8]) -> Self {
        Digest::from_bytes(Sha256::digest(key).into())
    }

    fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Digest(words)
    }

    fn differs(&self, other: &Self) -> u64 {
        self.0.iter().zip(other.0).fold(0, |differs, (a, b)| differs | (a ^ b))
    }
}

impl ApiKeys {
    /// How many keys there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The tenant of a request's key: `Authorization: Bearer KEY` or `x-api-key: KEY`. Nobody where there is none, or two
    /// that differ: another server on the way may have looked at the other one.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Option<Arc<Tenant>> {
        self.tenant(key(headers)?)
    }

    fn tenant(&self, key: &[u8]) -> Option<Arc<Tenant>> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return None;
        }
        let place = place(self.0.iter().map(|key| &key.digest), &Digest::of(key));
        self.0.get(place as usize).map(|key| Arc::clone(&key.tenant))
    }
}

/// Where among these the digest is; beyond them all where it is not. Looks at each of them and branches on none.
fn place<'a>(digests: impl Iterator<Item = &'a Digest>, asked: &Digest) -> u32 {
    let mut place = u32::MAX;
    for (index, digest) in (0_u32..).zip(digests) {
        place.conditional_assign(&index, digest.differs(asked).ct_eq(&0));
    }
    place
}

/// The one key that the headers hold.
fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get_all(header::AUTHORIZATION).iter().map(|value| bearer(value.as_bytes()));
    let plain = headers.get_all(X_API_KEY).iter().map(|value| Some(value.as_bytes()));
    let mut keys = bearer.chain(plain);
    let first = keys.next()??;
    keys.all(|key| key == Some(first)).then_some(first)
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(keys: &[&str]) -> ApiKeys {
        let secret = SaltSecret::derive(b"secret");
        let key = |key: &&str| {
            let name = format!("tenant-of-{key}");
            let salt = Salt::new(&secret, &name);
            let tenant = Tenant { name: name.into(), salt, priority: Class::NORMAL, in_flight_max: None };
            Key { digest: Digest::of(key.as_bytes()), tenant: tenant.into() }
        };
        ApiKeys(keys.iter().map(key).collect())
    }

    #[test]
    fn a_key_is_found_in_either_header() {
        let check = |headers: &[(&'static str, &str)], expect: Option<&str>| {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, value.parse().expect("a header value"));
            }
            let tenant = keys(&["one", "two", "three"]).authenticate(&map);
            assert_eq!(tenant.as_ref().map(|tenant| &*tenant.name), expect, "{headers:?}");
        };
        check(&[("authorization", "Bearer two")], Some("tenant-of-two"));
        check(&[("authorization", "bearer  three")], Some("tenant-of-three"));
        check(&[("x-api-key", "one")], Some("tenant-of-one"));
        check(&[("x-api-key", "one"), ("authorization", "Bearer one")], Some("tenant-of-one"));
        check(&[("x-api-key", "one"), ("authorization", "Bearer two")], None);
        check(&[("x-api-key", "one"), ("authorization", "Basic b25l")], None);
        check(&[("x-api-key", "one"), ("x-api-key", "two")], None);
        check(&[("authorization", "Bearer two"), ("authorization", "Bearer x")], None);
        check(&[("authorization", "two")], None);
        check(&[("authorization", "Bearer")], None);
        check(&[("authorization", "Bearer ")], None);
        check(&[("authorization", "Bearer four")], None);
        check(&[("x-api-key", "")], None);
        check(&[("x-api-key", "tenant-of-one")], None);
        check(&[], None);
    }

    #[test]
    fn what_is_looked_up_is_the_keys_sha_256() {
        // `printf %s abc | sha256sum`, which is how the documentation has people write the file.
        let sum: [u8; 32] = std::array::from_fn(|index| {
            let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
            u8::from_str_radix(&text[2 * index..2 * index + 2], 16).expect("hexadecimal digits")
        });
        assert!(Digest::of(b"abc") == Digest::from_bytes(sum));
    }

    #[test]
    fn every_digest_is_looked_at_whether_and_where_one_is_equal() {
        let digests: Vec<Digest> = (0..50).map(|number| Digest([number, 1, 2, 3])).collect();
        let check = |asked: Digest, expect: u32| {
            let mut looked_at = 0;
            let found = place(digests.iter().inspect(|_| looked_at += 1), &asked);
            assert_eq!((found, looked_at), (expect, digests.len()));
        };
        for index in [0, 1, 25, 49] {
            check(digests[index], index as u32);
        }
        check(Digest([50, 1, 2, 3]), u32::MAX);
        // A difference in any one bit is one.
        for bit in 0..256 {
            let mut words = digests[7].0;
            words[bit / 64] ^= 1 << (bit % 64);
            assert_ne!(digests[7].differs(&Digest(words)), 0, "bit {bit}");
        }
    }

    #[test]
    fn without_keys_nobody_is_let_in() {
        assert_eq!(keys(&[]).tenant(b"one"), None);
    }

    #[test]
    fn a_key_that_is_too_long_is_not_looked_at() {
        let (longest, longer) = ("k".repeat(KEY_BYTES_MAX), "k".repeat(KEY_BYTES_MAX + 1));
        let keys = keys(&[&longest, &longer]);
        assert!(keys.tenant(longest.as_bytes()).is_some());
        assert_eq!(keys.tenant(longer.as_bytes()), None);
    }

    #[test]
    fn a_salt_depends_on_the_tenant_and_on_the_secret_alone() {
        let secrets = [SaltSecret::derive(b"one"), SaltSecret::derive(b"two")];
        let salt = |secret: usize, tenant| Salt::new(&secrets[secret], tenant);
        assert_eq!(salt(0, "a"), salt(0, "a"));
        assert_ne!(salt(0, "a"), salt(0, "b"));
        assert_ne!(salt(0, "a"), salt(1, "a"));
        assert_eq!(Salt(0xab).to_string(), "00000000000000ab");
        assert_eq!(format!("{:?}", secrets[0]), "SaltSecret(..)");
    }

    #[test]
    fn nothing_of_a_key_is_printed() {
        assert_eq!(format!("{:?}", keys(&["one", "two"])), "ApiKeys(2)");
    }

    proptest! {
        #[test]
        fn exactly_the_keys_of_the_file_are_good(
            good in prop::collection::btree_set("[a-z0-9]{1,12}", 0..30),
            asked in "[a-z0-9]{1,12}",
        ) {
            let list: Vec<&str> = good.iter().map(String::as_str).collect();
            let keys = keys(&list);
            for key in &list {
                let tenant = keys.tenant(key.as_bytes()).expect("it is in the file");
                prop_assert_eq!(tenant.name.to_string(), format!("tenant-of-{key}"));
            }
            prop_assert_eq!(keys.tenant(asked.as_bytes()).is_some(), good.contains(&asked));
        }
    }
}
