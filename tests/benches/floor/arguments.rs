//! The command line of the floor.

use crate::engine::Engine;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;

/// How a request is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mode {
    /// By one engine, `--decode`, with the body as it came.
    Regular,
    /// By prefill, then by decode with what prefill says: the contract of vLLM's NixlConnector.
    Vllm,
    /// By both at once, with a room to meet in: the contract of SGLang.
    Sglang,
}

/// `--mode regular|vllm|sglang --listen IP:PORT [--prefill URL[,bootstrap=PORT]] --decode URL`
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) mode: Mode,
    pub(crate) listen: SocketAddr,
    pub(crate) prefill: Option<Engine>,
    pub(crate) decode: Engine,
}

impl Arguments {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let (mut mode, mut listen, mut prefill, mut decode) = (None, None, None, None);
        while let Some(flag) = words.next() {
            // `cargo bench` gives this to every target.
            if flag == "--bench" {
                continue;
            }
            let value = words.next().with_context(|| format!("{flag} has a value"))?;
            match flag.as_str() {
                "--mode" => mode = Some(parse_mode(&value)?),
                "--listen" => listen = Some(value.parse().with_context(|| format!("--listen {value}"))?),
                "--prefill" => prefill = Some(Engine::parse(&value)?),
                "--decode" => decode = Some(Engine::parse(&value)?),
                other => bail!("no flag {other}"),
            }
        }
        let mode = mode.context("--mode is missing")?;
        if mode != Mode::Regular && prefill.is_none() {
            bail!("--prefill is missing");
        }
        Ok(Arguments {
            mode,
            listen: listen.context("--listen is missing")?,
            prefill,
            decode: decode.context("--decode is missing")?,
        })
    }
}

fn parse_mode(name: &str) -> Result<Mode> {
    match name {
        "regular" => Ok(Mode::Regular),
        "vllm" => Ok(Mode::Vllm),
        "sglang" => Ok(Mode::Sglang),
        other => bail!("--mode is regular, vllm or sglang, not {other}"),
    }
}
