//! Every bound of a handover, with the sentence that derives it. What it bounds is in [`super::producer`] and [`super::consumer`].

use std::time::Duration;

/// Exports that may be open at once. An engine runs at most a few hundred sequences (`--max-num-seqs`, 64 by default) and queues
/// about as many again; past that, prefill is so far behind that decode workers do better alone.
pub const EXPORTS_OPEN_MAX: usize = 1024;

/// Subscriptions that wait for their export. They arrive while the prefill leg is on its way, milliseconds later at most, so
/// even a full engine's worth of requests at one moment fits.
pub const SUBSCRIPTIONS_PARKED_MAX: usize = 1024;

/// Connections of one listener. A decode worker has two, so this serves 256 of them; a buffer of at most one frame (4 MiB)
/// belongs to each bulk connection.
pub const CONNECTIONS_MAX: usize = 512;

/// Connections beyond [`CONNECTIONS_MAX`] that are told why they are refused; more are just closed.
pub const REFUSALS_MAX: usize = 16;

/// Ended transfers that are remembered, so that a second SUBSCRIBE is refused at once rather than parked. Tokens live for
/// seconds: at 100 requests a second this is 40 s of them. One that is forgotten finds no export and is refused later.
pub const ENDED_REMEMBERED_MAX: usize = 4096;

/// Prefill workers that a consumer has connections to.
pub const PEERS_MAX: usize = 256;

/// Transfers that one session receives at once; each holds blocks of the pool, so the pool is the real bound.
pub const FETCHES_PER_SESSION_MAX: usize = 1024;

/// Control messages that may wait to be written to one connection. Each transfer has a handful under way (the largest, a
/// COMMIT, is under 100 KiB); a peer that lets as many pile up reads nothing any more and is given up.
pub const OUTBOX_MESSAGES_MAX: usize = 1024;

/// Payload bytes of one transfer that may be under way. Four of the largest frames: one being written, one in the sockets, one
/// being verified, one of slack, so that a sender waits for credit only if the consumer is the slower one.
pub const CREDIT_BYTES: u64 = 16 << 20;

/// How long each step may take. A struct, so that tests can shorten them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// To connect: within a cluster it is under a millisecond, and a lost SYN is repeated after one second.
    pub connect: Duration,
    /// From connection to the other side's HELLO, which needs no thought.
    pub hello: Duration,
    /// A producer says PING this often, from a task of its own: a long prefill is no reason to be silent.
    pub ping: Duration,
    /// A consumer gives a producer up that has sent nothing, not even a PING, for this long: five PINGs, so that a busy machine is
    /// not taken for a stopped process.
    pub silent: Duration,
    /// A write that makes no progress for this long ends the session: the peer does not read any more.
    pub write_stall: Duration,
    /// A lease lasts this long from its last renewal. Long enough for the subscription to arrive and for three renewals to get lost;
    /// short enough that a dead consumer's blocks are soon free. A producer gives a consumer up after the same time of silence.
    pub lease: Duration,
    /// A consumer renews its leases this often.
    pub lease_renew: Duration,
    /// However often it is renewed, a lease ends this long after the producer last computed something for it: a consumer that is alive
    /// but wedged must not keep blocks for ever, and one that has had no room for so long is as bad. Counted from the last computed
    /// layer, because until then the producer itself is what takes time.
    pub lease_cap: Duration,
    /// A consumer gives up a transfer whose producer lives but sends no frame of it: just longer than the producer's own cap, so that
    /// normally the producer's typed error arrives first.
    pub fetch_idle: Duration,
    /// A subscription waits this long for its export: as long as the lease of an export that waits for its subscription.
    pub park: Duration,
    /// A consumer closes a session that it has not used for this long.
    pub session_idle: Duration,
    /// How often leases of exports without a subscription are looked at.
    pub sweep: Duration,
    /// After an end that has to be told, the writer has this long to get the last messages out.
    pub flush: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            connect: Duration::from_secs(1),
            hello: Duration::from_secs(2),
            ping: Duration::from_secs(1),
            silent: Duration::from_secs(5),
            write_stall: Duration::from_secs(5),
            lease: Duration::from_secs(10),
            lease_renew: Duration::from_millis(2500),
            lease_cap: Duration::from_secs(120),
            fetch_idle: Duration::from_secs(125),
            park: Duration::from_secs(10),
            session_idle: Duration::from_secs(60),
            sweep: Duration::from_millis(250),
            flush: Duration::from_secs(1),
        }
    }
}

/// How much a producer takes on. A struct, so that tests can reach each bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// See [`EXPORTS_OPEN_MAX`].
    pub exports_open: usize,
    /// See [`SUBSCRIPTIONS_PARKED_MAX`].
    pub subscriptions_parked: usize,
    /// See [`CONNECTIONS_MAX`].
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            exports_open: EXPORTS_OPEN_MAX,
            subscriptions_parked: SUBSCRIPTIONS_PARKED_MAX,
            connections: CONNECTIONS_MAX,
        }
    }
}
