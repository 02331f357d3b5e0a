//! The id of the trace that a request belongs to, for its log lines. Nothing else is done with it: the worker exports no spans.

use axum::http::HeaderMap;
use baton_wire::Traceparent;
use baton_wire::names::headers as names;

/// The trace of a request; nothing where it has none, or one that is wrong: what is no trace id never gets into the log.
pub(super) fn of(headers: &HeaderMap) -> Option<Traceparent> {
    let mut given = headers.get_all(names::TRACEPARENT).iter();
    let (first, None) = (given.next()?, given.next()) else { return None };
    Traceparent::parse(first.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn only_one_right_header_names_a_trace() {
        const RIGHT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let check = |given: &[&'static str], expect: Option<&str>| {
            let mut map = HeaderMap::new();
            for value in given {
                map.append(names::TRACEPARENT, HeaderValue::from_static(value));
            }
            assert_eq!(of(&map).as_ref().map(Traceparent::trace_id), expect, "{given:?}");
        };
        check(&[RIGHT], Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        check(&[RIGHT, RIGHT], None);
        check(&["forged line"], None);
        check(&[], None);
    }
}
