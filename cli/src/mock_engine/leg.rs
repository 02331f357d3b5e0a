//! What a request is to the engine that receives it.

/// What a request is to the engine that receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// Computes a prompt's KV for another engine.
    Prefill,
    /// Generates from KV that another engine computed.
    Decode,
    /// Both phases here.
    Plain,
    /// Tokenises (our contract).
    Render,
    /// Asks about the engine.
    Probe,
}

impl Leg {
    /// Every kind, in the order in which the ledger counts them.
    pub(crate) const ALL: [Leg; 5] = [Leg::Prefill, Leg::Decode, Leg::Plain, Leg::Render, Leg::Probe];

    /// As specs and the ledger spell it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Leg::Prefill => "prefill",
            Leg::Decode => "decode",
            Leg::Plain => "plain",
            Leg::Render => "render",
            Leg::Probe => "probe",
        }
    }
}
