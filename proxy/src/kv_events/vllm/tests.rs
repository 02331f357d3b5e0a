//! Batches as vLLM writes them, whole, changed and cut.

use super::*;
use proptest::prelude::*;

// Written by msgspec 0.22 from classes with vLLM's fields: events of all three types, and one of another tier and group.
const ARRAYS: &str = concat!(
    "93cb3ff8000000000000949cab426c6f636b53746f72656492c420000102030405060708090a0b0c0d0e0f10111213141516",
    "1718191a1b1c1d1e1fc420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3fc0940102cd012c",
    "ce0001117002c0a3475055a261649292a26164a473616c7491a2616401ae66756c6c5f617474656e74696f6ec09cab426c6f",
    "636b53746f72656491c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fc4202021222324",
    "25262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f92010202c0a3435055c0c002ae736c6964696e675f7769",
    "6e646f77cc8094ac426c6f636b52656d6f76656491c420000102030405060708090a0b0c0d0e0f101112131415161718191a",
    "1b1c1d1e1fa34750550191b0416c6c426c6f636b73436c656172656403",
);
const MAPS: &str = concat!(
    "83a27473cb3ff8000000000000a66576656e7473948ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368",
    "657392c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fc420202122232425262728292a",
    "2b2c2d2e2f303132333435363738393a3b3c3d3e3fb1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473",
    "940102cd012cce00011170aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e",
    "616d65a26164aa65787472615f6b6579739292a26164a473616c7491a26164a967726f75705f69647801b26b765f63616368",
    "655f737065635f6b696e64ae66756c6c5f617474656e74696f6e8ba474797065ab426c6f636b53746f726564ac626c6f636b",
    "5f68617368657391c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fb1706172656e745f",
    "626c6f636b5f68617368c420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3fa9746f6b656e",
    "5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c0",
    "a967726f75705f69647802b26b765f63616368655f737065635f6b696e64ae736c6964696e675f77696e646f77bc6b765f63",
    "616368655f737065635f736c6964696e675f77696e646f77cc8084a474797065ac426c6f636b52656d6f766564ac626c6f63",
    "6b5f68617368657391c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fa66d656469756d",
    "a3475055a967726f75705f6964780181a474797065b0416c6c426c6f636b73436c6561726564b2646174615f706172616c6c",
    "656c5f72616e6b03",
);
// With the fields of vLLM 0.9, whose hashes are numbers.
const FIRST_RELEASE: &str = concat!(
    "93cb3ff80000000000009396ab426c6f636b53746f72656492cf8000000000000005f9099401020304020692ac426c6f636b",
    "52656d6f766564910991b0416c6c426c6f636b73436c656172656400",
);

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("digits");
    hex.as_bytes().chunks_exact(2).map(digits).collect()
}

fn sha(first: u8) -> EngineHash {
    EngineHash(std::array::from_fn(|index| first + index as u8))
}

#[test]
fn arrays_and_maps_are_the_same_batch() {
    let (both, later) = extra_of(Some("ad"), Some("salt"));
    let expected = Batch {
        events: vec![
            Event::Stored(Stored {
                blocks: vec![sha(0), sha(32)],
                parent: None,
                token_ids: vec![1, 2, 300, 70_000],
                block_tokens: 2,
                extras: vec![both, later],
                place: Place { group: Some(1), is_device: true },
                is_prefix: true,
            }),
            Event::Stored(Stored {
                blocks: vec![sha(0)],
                parent: Some(sha(32)),
                token_ids: vec![1, 2],
                block_tokens: 2,
                extras: vec![],
                place: Place { group: Some(2), is_device: false },
                is_prefix: false,
            }),
            Event::Removed(Removed {
                blocks: vec![sha(0)],
                copies_left: None,
                place: Place { group: Some(1), is_device: true },
            }),
            Event::Cleared,
        ],
        data_parallel_rank: Some(3),
        num_unknown: 0,
    };
    assert_eq!(decode(&bytes(ARRAYS)).expect("a batch"), expected);
    assert_eq!(decode(&bytes(MAPS)).expect("a batch"), expected);
}

#[test]
fn the_first_release_is_read_too() {
    let batch = decode(&bytes(FIRST_RELEASE)).expect("a batch");
    let [Event::Stored(stored), Event::Removed(removed), Event::Cleared] = &batch.events[..] else {
        panic!("{batch:?}")
    };
    assert_eq!(stored.parent.as_ref(), removed.blocks.first());
    assert_eq!((stored.token_ids.len(), stored.block_tokens, batch.data_parallel_rank), (4, 2, Some(0)));
    assert!(stored.blocks[0] != stored.blocks[1] && stored.place.is_device && stored.is_prefix);
    assert!(stored.extras.iter().all(Option::is_some), "the adapter's number keeps its blocks apart");
}

/// A map of an event with `fields` (text to already encoded value) inside a batch of one.
fn one_event(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let text = |text: &str| [&[0xd9, text.len() as u8], text.as_bytes()].concat();
    let mut batch = vec![0x92, 0xc0, 0x91, 0x80 | fields.len() as u8];
    for (name, value) in fields {
        batch.extend(text(name));
        batch.extend_from_slice(value);
    }
    batch
}

const REMOVED: &[u8] = b"\xacBlockRemoved";
const STORED: &[u8] = b"\xabBlockStored";

#[test]
fn the_number_of_copies_left_is_read_where_an_engine_sends_it() {
    let batch = one_event(&[
        ("block_hashes", &[0x92, 1, 2]),
        ("remaining_copy_counts", &[0x92, 0, 3]),
        ("locality", &[0xa1, b'x']),
        ("type", REMOVED),
    ]);
    let Event::Removed(removed) = &decode(&batch).expect("a batch").events[0] else { panic!("not a removal") };
    assert_eq!(removed.copies_left, Some(vec![0, 3]), "the type may come last, and what is not known is passed over");
}

#[test]
fn a_salt_is_the_same_with_and_without_a_word_before_it() {
    let stored = |keys: &[u8]| {
        let batch = one_event(&[
            ("type", STORED),
            ("block_hashes", &[0x91, 1]),
            ("token_ids", &[0x91, 5]),
            ("block_size", &[1]),
            ("extra_keys", keys),
        ]);
        let Event::Stored(stored) = decode(&batch).expect("a batch").events.remove(0) else { panic!("not a store") };
        stored.extras
    };
    let expected = vec![extra_of(None, Some("s")).0];
    assert_eq!(stored(b"\x91\x91\xa1s"), expected);
    assert_eq!(stored(b"\x91\x91\x92\xaacache_salt\xa1s"), expected);
    let image = stored(b"\x91\x91\x92\xa1s\x07");
    assert!(image != expected && image[0].is_some(), "an image with its place is another thing");
    assert_eq!(stored(b"\x91\xc0"), []);
    assert_eq!(stored(b"\xc0"), []);
}

#[test]
fn an_unknown_event_is_counted_and_passed_over() {
    let batch = decode(&one_event(&[("type", b"\xa3New"), ("what", &[0x91, 0x80])])).expect("a batch");
    assert_eq!((batch.events.len(), batch.num_unknown), (0, 1));
}

#[test]
fn fields_that_do_not_fit_together_are_refused() {
    let check = |fields: &[(&str, &[u8])], expect| assert_eq!(decode(&one_event(fields)), Err(expect), "{fields:?}");
    let store = |hashes: &'static [u8], tokens: &'static [u8], size: &'static [u8]| {
        [("type", STORED), ("block_hashes", hashes), ("token_ids", tokens), ("block_size", size)]
    };
    check(&store(&[0x91, 1], &[0x93, 1, 2, 3], &[2]), MsgpackError::Type);
    check(&store(&[0x91, 1], &[0x90], &[0]), MsgpackError::Type);
    check(&store(&[0x92, 1, 2], &[0x90], b"\xcf\x80\0\0\0\0\0\0\0"), MsgpackError::Type);
    check(&store(&[0x91, 1], &[0x91, 0xff], &[1]), MsgpackError::Type);
    check(&[("type", REMOVED), ("block_hashes", &[0x91, 0xa0])], MsgpackError::Type);
    // An array that claims four thousand million elements takes no memory before it is found out.
    check(&[("type", REMOVED), ("block_hashes", b"\xdd\xff\xff\xff\xff")], MsgpackError::Truncated);
}

proptest! {
    #[test]
    fn any_bytes_are_a_batch_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn a_batch_with_any_byte_changed_is_a_batch_or_an_error(at: prop::sample::Index, byte: u8, of_maps: bool) {
        let mut batch = bytes(if of_maps { MAPS } else { ARRAYS });
        let at = at.index(batch.len());
        batch[at] = byte;
        let _ = decode(&batch);
        prop_assert!(decode(&batch[..at]).is_err(), "a part of a batch is no batch");
    }
}
