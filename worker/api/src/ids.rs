//! Identifiers of fixed width, written as lower-case hexadecimal wherever a person can see them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A string that is not the hexadecimal form of an identifier.
#[derive(Debug, thiserror::Error)]
#[error("expected {expected} hexadecimal digits, found {found:?}")]
pub struct ParseIdError {
    expected: usize,
    found: String,
}

const HEX: &[u8; 16] = b"0123456789abcdef";

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $bytes]);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                // Written into place, because each request has some and formatting byte by byte shows in its cost.
                let mut digits = [0; 2 * $bytes];
                for (byte, pair) in self.0.iter().zip(digits.as_chunks_mut::<2>().0) {
                    *pair = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
                }
                f.write_str(std::str::from_utf8(&digits).expect("digits are ASCII"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let wrong = || ParseIdError { expected: $bytes * 2, found: text.chars().take(80).collect() };
                if text.len() != $bytes * 2 || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
                    return Err(wrong());
                }
                let mut id = [0u8; $bytes];
                for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
                    *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
                }
                Ok(Self(id))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_id! {
    /// One handover of one prompt's KV cache. 128 random bits, so that it cannot be guessed; minted by the proxy.
    TransferId, 16
}
hex_id! {
    /// One life of one worker process: random at start. A restart at the same address is another epoch.
    Epoch, 16
}
hex_id! {
    /// What must be equal on both sides of a handover: model weights' identity and KV layout. Never our own version,
    /// which would forbid a rolling upgrade.
    Fingerprint, 32
}
hex_id! {
    /// Chained, salted hash of one full block of a prompt: equal hashes mean equal tokens from the start on.
    BlockHash, 16
}
hex_id! {
    /// One pair of connections (control and bulk) between two workers. 128 random bits by the side that dials, so that a
    /// stranger cannot attach a bulk connection to somebody else's control connection.
    SessionId, 16
}
hex_id! {
    /// Hash of a prompt's token ids; see [`PromptHash::of`].
    PromptHash, 32
}
hex_id! {
    /// Hash over the checksums of a handover's KV blocks; see [`crate::kv::BlockChecksums`].
    KvDigest, 32
}

impl PromptHash {
    /// BLAKE3 of the token ids as little-endian `u32`. Both sides of a handover know the prompt, so equal hashes say that the
    /// KV belongs to the very tokens that the decode worker is about to continue.
    pub fn of(token_ids: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        // Hashed in pieces on the stack: a prompt may be long, and it is hashed for each request.
        for ids in token_ids.chunks(256) {
            let mut bytes = [0u8; 1024];
            for (place, id) in bytes.chunks_exact_mut(4).zip(ids) {
                place.copy_from_slice(&id.to_le_bytes());
            }
            hasher.update(&bytes[..ids.len() * 4]);
        }
        PromptHash(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_form() {
        let id = TransferId([0x0a; 16]);
        assert_eq!(id.to_string(), "0a".repeat(16));
        assert_eq!(id.to_string().parse::<TransferId>().expect("own text form parses"), id);
        let json = serde_json::to_string(&id).expect("an id serialises");
        assert_eq!(serde_json::from_str::<TransferId>(&json).expect("own JSON parses"), id);
    }

    #[test]
    fn a_prompt_hash_is_that_of_its_ids_as_little_endian_bytes() {
        let ids: Vec<u32> = (0..1000u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        for len in [0, 1, 255, 256, 257, 1000] {
            let bytes: Vec<u8> = ids[..len].iter().flat_map(|id| id.to_le_bytes()).collect();
            assert_eq!(PromptHash::of(&ids[..len]).0, *blake3::hash(&bytes).as_bytes(), "{len} ids");
        }
    }

    #[test]
    fn a_wrong_length_or_digit_is_refused_by_name() {
        for text in ["", "0a", &"g0".repeat(16), &"é".repeat(16)] {
            let error = text.parse::<TransferId>().expect_err("not an id").to_string();
            assert!(error.contains("32 hexadecimal digits"), "{error}");
        }
    }
}
