//! The tokens of answers: token `i` of a choice is a function of the prompt's bytes, the choice and `i`, so that the same
//! prompt has the same answer from every mock, and a test can say what a stream must contain.

/// Token ids are below this, as of a small real vocabulary.
const VOCABULARY: u64 = 32_000;

/// Words of answers, each with its space, ready to stand in a JSON string.
const WORDS: [&str; 32] = [
    " the", " fox", " runs", " over", " a", " hill", " and", " sees", " one", " more", " stone", " in", " rain",
    " while", " wind", " turns", " old", " leaves", " to", " gold", " at", " dusk", " then", " sleeps", " near",
    " water", " under", " stars", " until", " light", " comes", " back",
];

/// Words that look like what a router searches streams for, and characters that it must not cut.
const AWKWARD_WORDS: [&str; 8] = [
    " \\\"usage\\\": {\\\"prompt_tokens\\\": 7}",
    " data: [DONE]",
    "\\n\\ndata: {\\\"choices\\\": []}\\n\\n",
    " : baton-ids 0 5,6",
    " caf\u{e9} \u{1f98a}",
    " \\u0000\\\\",
    " \\\"cached_tokens\\\": 1",
    " kv_transfer_params",
];

/// A prompt's bytes as one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed(pub(crate) u64);

impl Seed {
    /// Equal bytes have equal seeds; others differ but by accident. Fast rather than safe: nobody is deceived by a mock.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut hash = bytes.len() as u64;
        for word in words {
            hash = (hash.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        for byte in rest {
            hash = (hash.rotate_left(23) ^ u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        Seed(mixed(hash))
    }

    /// The id of token `index` of a choice.
    pub(crate) fn token(self, choice: u32, index: u32) -> u32 {
        let position = (u64::from(choice) << 32) | u64::from(index);
        let id = mixed(self.0 ^ mixed(position)) % VOCABULARY;
        u32::try_from(id).expect("below the vocabulary's size")
    }
}

/// A token's text, ready to stand in a JSON string.
pub(crate) fn word(token: u32, awkward: bool) -> &'static str {
    let words: &[&'static str] = if awkward { &AWKWARD_WORDS } else { &WORDS };
    words[token as usize % words.len()]
}

/// SplitMix64: each bit of the outcome depends on each bit given.
pub(crate) fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_depends_on_prompt_choice_and_place_alone() {
        let seed = Seed::of(b"\"a prompt of some bytes\"");
        assert_eq!(seed, Seed::of(b"\"a prompt of some bytes\""));
        let tokens = |seed: Seed, choice| (0..64).map(|index| seed.token(choice, index)).collect::<Vec<_>>();
        assert_eq!(tokens(seed, 0), tokens(seed, 0));
        assert_ne!(tokens(seed, 0), tokens(seed, 1));
        assert_ne!(tokens(seed, 0), tokens(Seed::of(b"\"a prompt of some bytez\""), 0));
    }

    #[test]
    fn every_word_stands_in_a_json_string() {
        for word in WORDS.iter().chain(&AWKWARD_WORDS) {
            serde_json::from_str::<String>(&format!("\"{word}\"")).unwrap_or_else(|error| panic!("{word}: {error}"));
        }
    }
}
