//! llm-d's flags in terms of ours, and the prefill workers that a request's header may name: by address and port, and none
//! unless told.

use crate::args::{Args, LlmD};
use baton_wire::Role;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// A flag of llm-d's sidecar that can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum LlmDError {
    /// Ranks behind ports of their own.
    #[error("--data-parallel-size is {found}: a proxy of ours stands before one rank; give each rank a proxy")]
    Ranks {
        /// What was given.
        found: u32,
    },
    /// The allowlist.
    #[error(
        "--enable-ssrf-protection can't be turned off: say where prefill workers may be with --allow-prefiller NETWORK:PORT"
    )]
    Unprotected,
    /// TLS without a certificate.
    #[error("--secure-proxy needs --cert-path with tls.crt and tls.key: no certificate is made up here")]
    NoCertificate,
    /// A network that is none.
    #[error("--allow-prefiller is NETWORK:PORT, such as 10.0.0.0/8:8000, found {found:?}")]
    Network {
        /// What was given.
        found: String,
    },
    /// Something that goes with the header.
    #[error("{flag} goes with --prefiller-header")]
    WithoutHeader {
        /// Which flag.
        flag: &'static str,
    },
}

/// Command line with llm-d's flags put in our words.
pub(super) fn translated(mut args: Args) -> Result<Args, LlmDError> {
    let LlmD { port, vllm_port, prefiller_header: _, allow_prefiller: _, enable_prefiller_sampling: _, .. } =
        args.llm_d;
    if let Some(port) = port {
        args.listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    }
    if let Some(port) = vllm_port {
        args.engine = Some(format!("http://127.0.0.1:{port}"));
        // llm-d's sidecar stands beside decode engines alone.
        args.role.get_or_insert_with(|| Role::Decode.as_str().to_owned());
    }
    let LlmD { enable_ssrf_protection, secure_proxy, cert_path, data_parallel_size, .. } = args.llm_d.clone();
    match data_parallel_size {
        None | Some(1) => {}
        Some(found) => return Err(LlmDError::Ranks { found }),
    }
    if enable_ssrf_protection == Some(false) {
        return Err(LlmDError::Unprotected);
    }
    match (secure_proxy, cert_path) {
        (Some(true), None) => return Err(LlmDError::NoCertificate),
        (Some(true) | None, Some(folder)) => {
            args.tls_cert_file = Some(folder.join("tls.crt"));
            args.tls_key_file = Some(folder.join("tls.key"));
        }
        (Some(false), _) | (None, None) => {}
    }
    Ok(args)
}

/// Prefill workers that requests may name in `x-prefiller-host-port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillerHeader {
    /// Where they may be.
    pub allowed: Vec<AllowedPrefiller>,
    /// Whether one of a list is drawn, instead of the first.
    pub sample: bool,
}

/// A network and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowedPrefiller {
    network: IpAddr,
    bits: u8,
    port: u16,
}

impl PrefillerHeader {
    pub(super) fn of(flags: &LlmD) -> Result<Option<Self>, LlmDError> {
        let LlmD { prefiller_header, allow_prefiller, enable_prefiller_sampling, .. } = flags;
        if !prefiller_header {
            return match (allow_prefiller.is_empty(), enable_prefiller_sampling) {
                (false, _) => Err(LlmDError::WithoutHeader { flag: "--allow-prefiller" }),
                (true, Some(true)) => Err(LlmDError::WithoutHeader { flag: "--enable-prefiller-sampling" }),
                (true, None | Some(false)) => Ok(None),
            };
        }
        let allowed = allow_prefiller
            .iter()
            .map(|text| AllowedPrefiller::parse(text).ok_or_else(|| LlmDError::Network { found: text.clone() }));
        Ok(Some(PrefillerHeader {
            allowed: allowed.collect::<Result<_, _>>()?,
            sample: enable_prefiller_sampling.unwrap_or(false),
        }))
    }

    /// Whether this target may be dialled. A name never may: what it stands for could be anything a moment later.
    pub(crate) fn allows(&self, target: SocketAddr) -> bool {
        self.allowed.iter().any(|allowed| allowed.contains(target))
    }
}

impl AllowedPrefiller {
    /// `10.0.0.0/8:8000`, `10.0.0.7:8000`, `[fd00::]/8:8000`.
    fn parse(text: &str) -> Option<Self> {
        let (network, port) = text.rsplit_once(':')?;
        let (network, bits) = match network.split_once('/') {
            Some((network, bits)) => (network, Some(bits.parse::<u8>().ok()?)),
            None => (network, None),
        };
        let network: IpAddr = match network.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
            Some(inner) => IpAddr::V6(inner.parse().ok()?),
            None => IpAddr::V4(network.parse().ok()?),
        };
        let bits_max = if network.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(bits_max);
        let port: u16 = port.parse().ok()?;
        (bits <= bits_max && port != 0).then_some(AllowedPrefiller { network, bits, port })
    }

    fn contains(self, target: SocketAddr) -> bool {
        // An IPv4 address in IPv6's clothes is that IPv4 address to the kernel, so it is to us.
        let same = match (self.network, target.ip().to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                u32::from(network) & mask == u32::from(ip) & mask
            }
            (IpAddr::V6(network), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                u128::from(network) & mask == u128::from(ip) & mask
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        };
        same && self.port == target.port()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowed_network_is_compared_by_address_and_port() {
        let check = |allowed: &str, target: &str, expect: bool| {
            let allowed = AllowedPrefiller::parse(allowed).expect("a network with a port");
            assert_eq!(allowed.contains(target.parse().expect("an address")), expect, "{allowed:?} {target}");
        };
        check("10.0.0.0/8:8000", "10.255.0.1:8000", true);
        check("10.0.0.0/8:8000", "10.255.0.1:8001", false);
        check("10.0.0.0/8:8000", "11.0.0.1:8000", false);
        check("10.0.0.7:8000", "10.0.0.7:8000", true);
        check("10.0.0.7:8000", "10.0.0.8:8000", false);
        check("10.0.0.0/8:8000", "[::ffff:10.0.0.1]:8000", true);
        check("0.0.0.0/0:8000", "[fd00::1]:8000", false);
        check("0.0.0.0/0:8000", "169.254.169.254:8000", true);
        check("[fd00::]/8:8000", "[fd12::1]:8000", true);
        check("[fd00::]/8:8000", "[fe80::1]:8000", false);
        check("[::]/0:8000", "[fe80::1]:8000", true);
    }

    #[test]
    fn what_is_no_network_with_a_port_is_refused() {
        for text in
            ["", "10.0.0.0/8", "10.0.0.0/33:8000", "fd00::/8:8000", "[fd00::]/129:8000", "host:8000", "10.0.0.1:0"]
        {
            assert_eq!(AllowedPrefiller::parse(text), None, "{text:?}");
        }
    }
}
