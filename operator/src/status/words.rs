//! Text that others wrote (kubelets, schedulers, containers), made fit for a status: bounded, and on one line where it is one
//! part of a sentence.

/// Longest message of a condition, in characters: some ten lines of a terminal, enough for what an API server says of an
/// object. Kubernetes allows 32768, but the whole status is written at each change.
pub(super) const MESSAGE_CHARS_MAX: usize = 1024;
/// Longest quotation within a message, in characters: the sentence around it must fit too.
pub(super) const QUOTE_CHARS_MAX: usize = 640;

/// At most so many characters, the end cut off.
pub(super) fn cut(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        None => text.to_owned(),
        Some(_) => text.chars().take(chars_max - 1).chain(['…']).collect(),
    }
}

/// At most so many characters, the beginning cut off: of last words the end is what counts.
pub(super) fn cut_front(text: &str, chars_max: usize) -> String {
    let count = text.chars().count();
    if count <= chars_max {
        return text.to_owned();
    }
    ['…'].into_iter().chain(text.chars().skip(count - (chars_max - 1))).collect()
}

/// On one line, without control characters and repeated blanks.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let mut line = String::with_capacity(text.len());
    for word in words {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    line
}

/// Somebody's words as part of a sentence of ours: on one line, without a full stop.
pub(super) fn quote(text: &str) -> String {
    cut(one_line(text).trim_end_matches('.'), QUOTE_CHARS_MAX)
}

/// The last line that says something: programs name the cause there before they end.
pub(super) fn last_line(text: &str) -> String {
    let last = text.lines().map(one_line).rfind(|line| !line.is_empty());
    cut_front(&last.unwrap_or_default(), QUOTE_CHARS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("äöüß", 3), "äö…");
        assert_eq!(cut_front("abc", 3), "abc");
        assert_eq!(cut_front("äöüß", 3), "…üß");
    }

    #[test]
    fn a_quotation_is_one_line_without_a_full_stop() {
        assert_eq!(quote("  no\tnodes\n available.\u{1b}[0m. "), "no nodes available. [0m");
        assert_eq!(quote(&"x".repeat(5000)).chars().count(), QUOTE_CHARS_MAX);
    }

    #[test]
    fn last_words_are_the_last_line_that_is_not_blank() {
        assert_eq!(last_line("loading\nerror: no such file\n\n  \n"), "error: no such file");
        assert_eq!(last_line(" \n"), "");
        assert_eq!(last_line(""), "");
    }
}
