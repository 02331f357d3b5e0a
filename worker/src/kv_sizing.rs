//! How many KV blocks a worker has: a pure decision from what was asked for, what memory there is and what one sequence needs.

use baton_engine::kv_pool::BLOCK_TOKENS;

/// Share of the available memory that is taken where nothing is asked for: three more workers can start beside this one, and
/// weights, activations and buffers find room.
const DEFAULT_SHARE_DIVISOR: u64 = 4;

/// Taken at most where nothing is asked for, in bytes: memory that is only now and then useful should be asked for.
const DEFAULT_BYTES_MAX: u64 = 2 << 30;

/// What one worker's KV cache must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Bytes of a block in all layers.
    pub block_bytes: u64,
    /// Prompt plus completion in tokens.
    pub max_model_length: usize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
}

/// Not one sequence fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvSizingError {
    /// As asked for.
    #[error(
        "--kv-cache-bytes {bytes} holds {tokens} tokens, and one sequence of {max_model_length} tokens needs {needed} bytes: raise it \
         or lower --max-model-length"
    )]
    TooSmall {
        /// Bytes asked for.
        bytes: u64,
        /// Tokens that they hold.
        tokens: u64,
        /// Tokens of a sequence.
        max_model_length: usize,
        /// Bytes that it needs.
        needed: u64,
    },
    /// Nothing was asked for, and the memory is too small.
    #[error(
        "one sequence of {max_model_length} tokens needs {needed} bytes of KV cache, and {available} bytes of memory are available: \
         lower --max-model-length or give the worker more memory"
    )]
    NoMemory {
        /// Tokens of a sequence.
        max_model_length: usize,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
}

/// Tokens that the KV cache holds, as far as its size was asked for: the longest sequence where no other length was. One block
/// at least, so that what holds nothing is refused by [`num_blocks`] with its numbers.
pub fn tokens_held(block_bytes: u64, asked: Option<u64>) -> usize {
    let blocks = asked.map_or(u64::MAX, |bytes| bytes / block_bytes).max(1);
    usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(BLOCK_TOKENS)
}

/// The number of blocks.
///
/// # Errors
/// When one sequence of full length would not fit, which would make a valid request unservable.
pub fn num_blocks(demand: Demand, asked: Option<u64>, available: u64) -> Result<usize, KvSizingError> {
    let Demand { block_bytes, max_model_length, max_num_seqs } = demand;
    let one_sequence = max_model_length.div_ceil(BLOCK_TOKENS) as u64 * block_bytes;
    let bytes = match asked {
        Some(bytes) if bytes < one_sequence => {
            let tokens = bytes / block_bytes * BLOCK_TOKENS as u64;
            return Err(KvSizingError::TooSmall { bytes, tokens, max_model_length, needed: one_sequence });
        }
        Some(bytes) => bytes,
        None if one_sequence > available => {
            return Err(KvSizingError::NoMemory { max_model_length, needed: one_sequence, available });
        }
        None => {
            let all_sequences = one_sequence.saturating_mul(max_num_seqs as u64);
            (available / DEFAULT_SHARE_DIVISOR).min(DEFAULT_BYTES_MAX).min(all_sequences).max(one_sequence)
        }
    };
    // A pool is indexed by u32.
    Ok(usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX).min(u32::MAX as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn demand(block_bytes: u64, max_model_length: usize) -> Demand {
        Demand { block_bytes, max_model_length, max_num_seqs: 64 }
    }

    #[test]
    fn a_small_model_takes_no_more_than_its_sequences_can_fill() {
        // 64 blocks a sequence, 64 sequences.
        assert_eq!(num_blocks(demand(1024, 2048), None, 1 << 40), Ok(64 * 64));
    }

    #[test]
    fn a_large_model_takes_a_quarter_and_at_most_two_gib() {
        assert_eq!(num_blocks(demand(MIB, 2048), None, 1024 * MIB), Ok(256));
        assert_eq!(num_blocks(demand(MIB, 2048), None, 1 << 40), Ok(2048));
    }

    #[test]
    fn one_sequence_always_fits_or_the_numbers_are_told() {
        assert_eq!(num_blocks(demand(MIB, 2048), None, 100 * MIB), Ok(64), "64 MiB is above the quarter, and needed");
        let error = num_blocks(demand(MIB, 2048), None, 63 * MIB).expect_err("64 MiB are needed").to_string();
        assert!(error.contains("67108864 bytes of KV") && error.contains("66060288 bytes of memory"), "{error}");
        let error = num_blocks(demand(MIB, 2048), Some(32 * MIB), 1 << 40).expect_err("half").to_string();
        assert!(error.contains("holds 1024 tokens") && error.contains("2048 tokens needs 67108864"), "{error}");
    }

    #[test]
    fn a_cache_that_holds_nothing_is_told_with_its_numbers() {
        let length = tokens_held(MIB, Some(MIB - 1));
        let error = num_blocks(demand(MIB, length), Some(MIB - 1), 1 << 40).expect_err("no block").to_string();
        assert!(error.contains("holds 0 tokens") && error.contains("32 tokens needs 1048576"), "{error}");
    }

    proptest! {
        #[test]
        fn a_length_that_the_cache_holds_always_fits_it(block_bytes in 1u64..10_000_000, asked in 10_000_000u64..1 << 42) {
            let length = tokens_held(block_bytes, Some(asked));
            prop_assert!(num_blocks(demand(block_bytes, length), Some(asked), 0).is_ok());
            prop_assert!(num_blocks(demand(block_bytes, length + 1), Some(asked), 0).is_err());
        }

        #[test]
        fn what_is_given_holds_a_sequence_and_is_within_what_was_asked_for(
            block_bytes in 1u64..10_000_000, length in 2usize..200_000, asked in proptest::option::of(1u64..1 << 42),
            available in 1u64..1 << 42,
        ) {
            let demand = demand(block_bytes, length);
            if let Ok(blocks) = num_blocks(demand, asked, available) {
                prop_assert!(blocks * BLOCK_TOKENS >= length);
                prop_assert!(blocks as u64 * block_bytes <= asked.unwrap_or(available));
            }
        }
    }
}
