//! The address of a server that may be dialled: `host:port`, checked once. Knows nothing of who is behind it.

use std::sync::Arc;

/// `host:port`; an IPv6 host stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(Arc<str>);

/// A text that is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an address is host:port, found {found:?}")]
pub struct AddressError {
    found: String,
}

impl Address {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host alone; an IPv6 host without its brackets.
    pub(crate) fn host(&self) -> &str {
        let host = self.0.rsplit_once(':').map_or(&*self.0, |(host, _)| host);
        host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host)
    }

    /// The same text, shared.
    pub(crate) fn name(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }
}

impl std::str::FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError { found: text.chars().take(80).collect() };
        let authority: http::uri::Authority = text.parse().map_err(|_| wrong())?;
        // `user@host:port` is an authority too; nothing of ours writes one, and it would hide the host from a reader.
        if authority.port_u16().is_none_or(|port| port == 0) || authority.host().is_empty() || text.contains('@') {
            return Err(wrong());
        }
        Ok(Address(text.into()))
    }
}

impl serde::Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_what_stands_before_the_port() {
        for (text, host) in [("10.0.0.7:8000", "10.0.0.7"), ("[::1]:8000", "::1"), ("engine.svc:8200", "engine.svc")] {
            assert_eq!(text.parse::<Address>().expect("an address").host(), host);
        }
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for text in ["10.0.0.7:8000", "[::1]:8000", "engine.svc:8200"] {
            assert_eq!(text.parse::<Address>().expect("an address").as_str(), text);
        }
        for text in ["", "10.0.0.7", ":8000", "h:0", "h:99999", "u@h:1", "http://h:1", "h:1/x", "h:1\r\nx"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
