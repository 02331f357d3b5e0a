//! The token ids of prompts, where a request gives them in place of text.

use crate::api::Api;
use crate::json::scan::Object;

/// The prompts of a request as token ids; nothing where any of it is text, or where a prompt is more than its tokens.
pub(crate) fn token_ids(api: Api, object: &Object) -> Option<Vec<Vec<u32>>> {
    let raw = match api {
        Api::Completions => object.given("prompt")?,
        // Pictures and sounds stand beside the tokens, and count for the names of blocks.
        Api::Generate if object.given("features").is_some() => return None,
        Api::Generate => object.given("token_ids")?,
        Api::Chat | Api::Responses | Api::Messages | Api::SglangGenerate => return None,
    };
    let one = |raw| serde_json::from_slice::<Vec<u32>>(raw).ok().map(|prompt| vec![prompt]);
    // The first sign after the bracket tells text from numbers, so that a long text is not read for nothing.
    match raw.strip_prefix(b"[")?.trim_ascii_start().first()? {
        b'0'..=b'9' => one(raw),
        b'[' => serde_json::from_slice(raw).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::scan::{DEPTH_MAX, scan};
    use bytes::Bytes;

    #[test]
    fn tokens_are_read_where_all_of_a_prompt_is_tokens() {
        let check = |api, body: &str, expect: Option<&[&[u32]]>| {
            let object = scan(&Bytes::copy_from_slice(body.as_bytes()), DEPTH_MAX).expect("valid");
            let expect = expect.map(|prompts| prompts.iter().map(|prompt| prompt.to_vec()).collect::<Vec<_>>());
            assert_eq!(token_ids(api, &object), expect, "{body}");
        };
        check(Api::Generate, r#"{"token_ids":[ 1, 2]}"#, Some(&[&[1, 2]]));
        check(Api::Generate, r#"{"token_ids":[1],"features":{"mm_hashes":{}}}"#, None);
        check(Api::Completions, r#"{"prompt":[[1,2],[3]]}"#, Some(&[&[1, 2], &[3]]));
        check(Api::Completions, r#"{"prompt":[3]}"#, Some(&[&[3]]));
        check(Api::Completions, r#"{"prompt":"3"}"#, None);
        check(Api::Completions, r#"{"prompt":["3"]}"#, None);
        check(Api::Completions, r#"{"prompt":[3,"x"]}"#, None);
        check(Api::Completions, r#"{"prompt":[-3]}"#, None);
        check(Api::Completions, r#"{"prompt":[]}"#, None);
        check(Api::Chat, r#"{"prompt":[3]}"#, None);
    }
}
