//! Text streams over small vocabularies: single facts, then any text, cut into any tokens, with any stop strings.

use super::*;
use proptest::prelude::*;

/// A byte-level vocabulary: a token is one to three bytes, or special and without text.
#[derive(Debug)]
struct Bytes(Vec<Vec<u8>>);

impl TokenText for Bytes {
    fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.0[id as usize].iter().copied()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// As SentencePiece does: a word's token brings the space before it, which is left out at the very start.
struct Words(&'static [&'static str]);

impl TokenText for Words {
    fn decode(&self, ids: &[u32]) -> String {
        let text: String = ids.iter().map(|&id| self.0[id as usize]).collect();
        text.strip_prefix(' ').map(str::to_owned).unwrap_or(text)
    }
}

/// One token a chunk, numbered from 0.
fn vocabulary(chunks: &[&[u8]]) -> (Bytes, Vec<u32>) {
    (Bytes(chunks.iter().map(|chunk| chunk.to_vec()).collect()), (0..chunks.len() as u32).collect())
}

fn stream(stops: &[&str]) -> TextStream {
    TextStream::new(&[], stops.iter().map(|&stop| stop.to_owned()).collect(), false)
}

/// The texts of the deltas of one token each, the last one from `finish`.
fn texts(mut stream: TextStream, chunks: &[&[u8]]) -> Vec<String> {
    let (tokenizer, ids) = vocabulary(chunks);
    let mut texts: Vec<String> = ids.iter().map(|&id| stream.push(&tokenizer, &[id]).text).collect();
    texts.push(stream.finish().text);
    texts
}

#[test]
fn plain_text_leaves_with_its_token() {
    assert_eq!(texts(stream(&[]), &[b"Hel", b"lo", b"!"]), ["Hel", "lo", "!", ""]);
}

#[test]
fn half_a_character_waits_for_the_other_half() {
    let smile = "😀".as_bytes();
    let chunks = [&smile[..1], &smile[1..2], &smile[2..3], &smile[3..], b"a"];
    assert_eq!(texts(stream(&[]), &chunks), ["", "", "", "😀", "a", ""]);
}

#[test]
fn half_a_character_at_the_end_leaves_as_a_replacement() {
    assert_eq!(texts(stream(&[]), &[b"a", &[0xe2, 0x82]]), ["a", "", "\u{fffd}"]);
}

#[test]
fn bytes_that_never_become_a_character_dont_wait_for_ever() {
    let chunks: Vec<&[u8]> = vec![&[0xff]; 10];
    let texts = texts(stream(&[]), &chunks);
    assert!(texts[5..].iter().any(|text| !text.is_empty()), "{texts:?}");
    assert_eq!(texts.concat(), "\u{fffd}".repeat(10));
}

#[test]
fn a_character_after_broken_bytes_is_still_whole() {
    let chunks: [&[u8]; 8] = [&[0xff], &[0xff], &[0xff], &[0xe2], &[0x82], &[0xac], b"x", b"y"];
    assert_eq!(texts(stream(&[]), &chunks).concat(), "\u{fffd}\u{fffd}\u{fffd}€xy");
}

#[test]
fn a_word_keeps_its_space_behind_the_prompt_and_loses_it_at_the_very_start() {
    let words = Words(&[" the", " cat", " sat"]);
    let text = |prompt: &[u32]| {
        let mut stream = TextStream::new(prompt, Vec::new(), false);
        [stream.push(&words, &[1]).text, stream.push(&words, &[2]).text]
    };
    assert_eq!(text(&[0]), [" cat", " sat"]);
    assert_eq!(text(&[]), ["cat", " sat"]);
}

#[test]
fn a_stop_string_across_tokens_ends_the_stream_before_it() {
    let (tokenizer, ids) = vocabulary(&[b"a\nUs", b"er", b": hi", b"more"]);
    let mut stream = stream(&["\nUser:"]);
    assert_eq!(stream.push(&tokenizer, &ids[..1]), Delta::default(), "the token may begin a stop string");
    assert_eq!(stream.push(&tokenizer, &ids[1..2]), Delta::default());
    let delta = stream.push(&tokenizer, &ids[2..]);
    assert_eq!(delta, Delta { text: "a".to_owned(), ids: vec![0, 1, 2], stop: Some(0) });
    assert!(stream.is_stopped());
    assert_eq!(stream.push(&tokenizer, &ids), Delta::default());
    assert_eq!(stream.finish(), Delta::default());
}

#[test]
fn text_held_for_a_stop_string_leaves_when_it_turns_out_to_be_none() {
    let (tokenizer, ids) = vocabulary(&[b"a", b"E", b"N", b"d"]);
    let mut stream = stream(&["END"]);
    let texts: Vec<_> = ids.iter().map(|&id| stream.push(&tokenizer, &[id]).text).collect();
    assert_eq!(texts, ["a", "", "", "ENd"]);
}

#[test]
fn text_held_for_a_stop_string_leaves_at_the_end() {
    assert_eq!(texts(stream(&["END"]), &[b"a", b"E", b"N"]), ["a", "", "", "EN"]);
}

#[test]
fn a_stop_string_is_shown_where_that_is_asked_for() {
    let (tokenizer, ids) = vocabulary(&[b"abc", b"def"]);
    let mut stream = TextStream::new(&[], vec!["cd".to_owned()], true);
    assert_eq!(stream.push(&tokenizer, &ids), Delta { text: "abcd".to_owned(), ids: vec![0, 1], stop: Some(0) });
}

#[test]
fn the_stop_string_that_is_complete_first_wins() {
    let check = |stops: &[&str], text: &str, shown: &str, index: usize| {
        let (tokenizer, ids) = vocabulary(&[text.as_bytes()]);
        let delta = stream(stops).push(&tokenizer, &ids);
        assert_eq!((delta.text.as_str(), delta.stop), (shown, Some(index)), "{stops:?} in {text:?}");
    };
    check(&["bcd", "c"], "abcd", "ab", 1);
    check(&["c", "bc"], "abcd", "a", 1);
    check(&["", "z", "d"], "abcd", "abc", 2);
}

#[test]
fn the_text_of_a_stop_token_is_not_shown_but_the_token_is_covered() {
    let (tokenizer, ids) = vocabulary(&[b"a", &[0xe2], b"<eos>"]);
    let mut stream = stream(&[]);
    stream.push(&tokenizer, &ids[..2]);
    stream.push_stop_token(2);
    assert_eq!(stream.finish(), Delta { text: "\u{fffd}".to_owned(), ids: vec![1, 2], stop: None });
}

#[test]
fn special_tokens_are_covered_without_growing_the_window() {
    let (tokenizer, _) = vocabulary(&[b"a", b"", b"b"]);
    let mut stream = stream(&[]);
    let mut covered = stream.push(&tokenizer, &[0]).ids.len();
    for _ in 0..1000 {
        covered += stream.push(&tokenizer, &[1]).ids.len();
        assert!(stream.pieces.window.len() <= 1 + UNCUT_TOKENS_MAX + 1);
    }
    let last = stream.push(&tokenizer, &[2]);
    assert_eq!((last.text.as_str(), covered + last.ids.len()), ("b", 1002));
}

/// A vocabulary over `text`'s bytes (cut at random), its ids, and how they are pushed.
fn pushes(bytes: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = (Bytes, Vec<Vec<u32>>)> {
    let special = prop::collection::vec(0usize..40, 0..4);
    let cuts = (prop::collection::vec(1usize..4, 1..40), special, prop::collection::vec(1usize..5, 1..20));
    (bytes, cuts).prop_map(|(bytes, (mut lengths, special, groups))| {
        // A special token has no text.
        special.into_iter().for_each(|index| lengths.insert(index % lengths.len(), 0));
        let mut rest = bytes.as_slice();
        let mut tokens = Vec::new();
        for &length in lengths.iter().chain(std::iter::repeat(&1)) {
            let (token, after) = rest.split_at(length.min(rest.len()));
            tokens.push(token.to_vec());
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        let ids: Vec<u32> = (0..tokens.len() as u32).collect();
        let mut rest = ids.as_slice();
        let mut pushes = Vec::new();
        for &group in groups.iter().cycle() {
            let (push, after) = rest.split_at(group.min(rest.len()));
            pushes.push(push.to_vec());
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        (Bytes(tokens), pushes)
    })
}

/// Text with characters of every length, in few letters so that stop strings occur.
fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!['a', 'b', 'c', '\n', 'é', '€', '😀', '\u{fffd}']), 0..40)
        .prop_map(|characters| characters.into_iter().collect())
}

fn stops() -> impl Strategy<Value = Vec<String>> {
    let stop = prop::collection::vec(prop::sample::select(vec!['a', 'b', 'c', 'é', '€']), 1..5);
    prop::collection::vec(stop.prop_map(|characters| characters.into_iter().collect()), 0..4)
}

/// All deltas, that of `finish` last.
fn run(tokenizer: &Bytes, pushes: &[Vec<u32>], stops: &[String], include_stop: bool) -> Vec<Delta> {
    let mut stream = TextStream::new(&[], stops.to_vec(), include_stop);
    let mut deltas: Vec<_> = pushes.iter().map(|ids| stream.push(tokenizer, ids)).collect();
    deltas.push(stream.finish());
    deltas
}

fn joined(deltas: &[Delta]) -> Delta {
    let mut whole = Delta::default();
    for delta in deltas {
        whole.text.push_str(&delta.text);
        whole.ids.extend(&delta.ids);
        whole.stop = whole.stop.or(delta.stop);
    }
    whole
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn the_deltas_joined_are_the_decoding_of_all((tokenizer, pushes) in pushes(text().prop_map(String::into_bytes))) {
        let ids: Vec<u32> = pushes.concat();
        let whole = joined(&run(&tokenizer, &pushes, &[], false));
        prop_assert_eq!(&whole.text, &tokenizer.decode(&ids));
        prop_assert_eq!(whole.ids, ids);
    }

    #[test]
    fn the_same_holds_for_bytes_that_are_no_text((tokenizer, pushes) in pushes(prop::collection::vec(
        prop::sample::select(vec![0xff, 0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x98, 0x80, b'a']), 0..40,
    ))) {
        let ids: Vec<u32> = pushes.concat();
        let whole = joined(&run(&tokenizer, &pushes, &[], false));
        prop_assert_eq!(&whole.text, &tokenizer.decode(&ids));
        prop_assert_eq!(whole.ids, ids);
    }

    #[test]
    fn every_delta_is_the_text_of_the_tokens_it_covers(
        (tokenizer, pushes) in pushes(text().prop_map(String::into_bytes)),
        stops in stops(),
    ) {
        let mut covered = Vec::new();
        let mut shown = String::new();
        for delta in run(&tokenizer, &pushes, &stops, false) {
            covered.extend(&delta.ids);
            shown.push_str(&delta.text);
            if delta.stop.is_some() {
                break;
            }
            prop_assert_eq!(&shown, &tokenizer.decode(&covered), "a continuation may begin here");
        }
    }

    #[test]
    fn how_tokens_are_pushed_makes_no_difference(
        (tokenizer, pushes) in pushes(text().prop_map(String::into_bytes)),
        stops in stops(),
        include_stop: bool,
    ) {
        let one_by_one: Vec<Vec<u32>> = pushes.concat().into_iter().map(|id| vec![id]).collect();
        let at_once = [pushes.concat()];
        let whole = joined(&run(&tokenizer, &pushes, &stops, include_stop));
        prop_assert_eq!(&whole, &joined(&run(&tokenizer, &one_by_one, &stops, include_stop)));
        prop_assert_eq!(&whole, &joined(&run(&tokenizer, &at_once, &stops, include_stop)));
    }

    #[test]
    fn the_text_ends_at_the_first_complete_stop_string(
        (tokenizer, pushes) in pushes(text().prop_map(String::into_bytes)),
        stops in stops(),
        include_stop: bool,
    ) {
        let whole = joined(&run(&tokenizer, &pushes, &stops, include_stop));
        let text = tokenizer.decode(&pushes.concat());
        // Character by character: the first end of any stop string.
        let ends = text.char_indices().map(|(start, character)| start + character.len_utf8());
        let first = ends.filter_map(|end| {
            let ending = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
            ending.map(|stop| (end, stop.len())).max_by_key(|&(_, length)| length)
        }).next();
        match first {
            None => prop_assert_eq!((whole.text, whole.stop), (text, None)),
            Some((end, length)) => {
                let shown = if include_stop { end } else { end - length };
                prop_assert_eq!(&whole.text, &text[..shown]);
                let stop = whole.stop.map(|index| stops[index].len());
                prop_assert_eq!(stop, Some(length));
            }
        }
    }
}
