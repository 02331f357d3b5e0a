//! The id that ties together all log lines of one request: the client's, or one of ours.

use axum::http::HeaderMap;
use baton_wire::names::headers as names;

/// Longest id that is taken over: a UUID has 36 characters.
const CHARS_MAX: usize = 128;

/// The request's id. One that could forge log lines or headers is replaced.
pub(super) fn of(headers: &HeaderMap) -> String {
    let given = headers.get(names::REQUEST_ID).and_then(|value| value.to_str().ok());
    match given.filter(|id| is_plain(id)) {
        Some(id) => id.to_owned(),
        None => mint(),
    }
}

fn is_plain(id: &str) -> bool {
    (1..=CHARS_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn mint() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has random numbers once it has started");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_plain_id_is_kept_and_any_other_is_replaced() {
        let id = |text: &str| {
            let mut map = HeaderMap::new();
            map.insert(names::REQUEST_ID, HeaderValue::from_str(text).expect("a header value"));
            of(&map)
        };
        assert_eq!(id("abc-123"), "abc-123");
        for odd in ["", "a b", &"x".repeat(CHARS_MAX + 1)] {
            assert_eq!(id(odd).len(), 32, "{odd:?}");
        }
        assert_ne!(of(&HeaderMap::new()), of(&HeaderMap::new()));
    }
}
