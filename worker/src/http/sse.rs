//! Server-sent events as bytes, the way OpenAI's clients read them.

use baton_wire::names::sse::TOKEN_IDS_PREFIX;
use std::fmt::Write;

/// What a stream that is complete ends with.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// Appends one event. `ids` (a choice and its tokens) goes before the data as a comment, which the proxy reads and removes.
pub(super) fn event(out: &mut String, ids: Option<(u32, &[u32])>, json: &str) {
    if let Some((choice, ids)) = ids.filter(|(_, ids)| !ids.is_empty()) {
        write!(out, "{TOKEN_IDS_PREFIX}{choice} ").expect("writing to memory does not fail");
        for (at, id) in ids.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(out, "{comma}{id}").expect("writing to memory does not fail");
        }
        out.push('\n');
    }
    out.push_str("data: ");
    out.push_str(json);
    out.push_str("\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_stand_in_a_comment_of_the_same_event() {
        let mut out = String::new();
        event(&mut out, Some((1, &[7, 8])), "{}");
        event(&mut out, Some((1, &[])), "{}");
        event(&mut out, None, "{}");
        assert_eq!(out, ": baton-ids 1 7,8\ndata: {}\n\ndata: {}\n\ndata: {}\n\n");
    }
}
