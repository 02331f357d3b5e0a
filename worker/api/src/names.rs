//! Ports, paths, headers and environment variables that more than one program names.

/// Ports. Every pod has the same ones; a pod is told apart by its address.
pub mod ports {
    /// The routing proxy: clients, peers' legs and peers' status.
    pub const PROXY: u16 = 8000;
    /// The engine's HTTP server: reached only inside the pod.
    pub const ENGINE: u16 = 8200;
    /// KV transfer between workers.
    pub const KV: u16 = 5600;
    /// Metrics, debug pages and progress.
    pub const ADMIN: u16 = 9090;
}

/// HTTP paths.
pub mod paths {
    /// OpenAI chat completions.
    pub const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
    /// OpenAI text completions.
    pub const COMPLETIONS: &str = "/v1/completions";
    /// OpenAI list of models.
    pub const MODELS: &str = "/v1/models";
    /// The process is alive.
    pub const HEALTH: &str = "/health";
    /// The process takes new work.
    pub const READY: &str = "/ready";
    /// Prometheus text format.
    pub const METRICS: &str = "/metrics";
    /// [`crate::progress::Progress`], on the admin port of a download.
    pub const PROGRESS: &str = "/progress";
    /// [`crate::status::Status`].
    pub const STATUS: &str = "/status";
    /// [`crate::render::RenderRequest`] to [`crate::render::RenderResponse`].
    pub const RENDER: &str = "/internal/render";
    /// The prefill leg: [`crate::leg::LegRequest`] to [`crate::leg::PrefillDone`].
    pub const PREFILL_LEG: &str = "/internal/prefill";
    /// The decode leg: [`crate::leg::LegRequest`] to the client's answer.
    pub const DECODE_LEG: &str = "/internal/decode";
    /// What the prefix cache holds, as a numbered stream of changes.
    pub const KV_EVENTS: &str = "/kv-events";
}

/// HTTP headers, lower case as HTTP/2 wants them. Those that steer are removed from what clients send.
pub mod headers {
    /// On a response: the path that the request really took ([`crate::Path`]), with the reason.
    pub const PATH: &str = "x-baton-path";
    /// On a request between proxies: a signed [`crate::signing::LegClaims`]. Such a request is served by the local engine
    /// and never forwarded again.
    pub const LEG: &str = "x-baton-leg";
    /// On a leg to the engine: `1` asks for the token ids of each SSE event in a comment line of their own, for the proxy alone.
    pub const TOKEN_IDS: &str = "x-baton-token-ids";
    /// On a status request: 16 random bytes in hexadecimal that the answer must sign.
    pub const STATUS_NONCE: &str = "x-baton-status-nonce";
    /// On a status answer: base64url Ed25519 signature over nonce and body.
    pub const STATUS_SIGNATURE: &str = "x-baton-status-signature";
    /// Ties together the log lines of one request; taken from the client or minted by the first proxy.
    pub const REQUEST_ID: &str = "x-request-id";
    /// On a response: which prefill worker (address) computed the prompt's KV, when one did.
    pub const PREFILL_WORKER: &str = "x-baton-prefill-worker";
    /// On a response: which decode worker (address) generated.
    pub const DECODE_WORKER: &str = "x-baton-decode-worker";
    /// On a request: the trace that it belongs to ([`crate::Traceparent`]).
    pub const TRACEPARENT: &str = "traceparent";
    /// On a request: what the tracing systems on its way have added for themselves.
    pub const TRACESTATE: &str = "tracestate";
    /// On a request of a trusted client: seconds by which its prefill engine serves it before what waits there.
    pub const PRIORITY_JUMP: &str = "x-baton-priority-jump";
    /// On a leg to a vLLM engine: the data-parallel rank that is to serve it.
    pub const DATA_PARALLEL_RANK: &str = "x-data-parallel-rank";
    /// Prefix of every header that is ours.
    pub const PREFIX: &str = "x-baton-";
}

/// Server-sent events between worker and proxy.
pub mod sse {
    /// Begins the mark, a comment line in every event of a leg but `[DONE]` and errors, which the proxy takes out: `<choice> <id>,<id>,…`,
    /// with the choice's number (counted over all prompts) and the ids, if any, that the event covers. From the marks of the events that
    /// it has passed on whole the proxy knows what to say in a [`crate::leg::Resume`].
    pub const TOKEN_IDS_PREFIX: &str = ": baton-ids ";
    /// Follows the choice in the mark of its first event, `<choice>;cached=<tokens> <id>,…`: prompt tokens that a prefix cache had.
    pub const CACHED: &str = ";cached=";
    /// In place of the choice in the mark of the event with the usage.
    pub const USAGE: &str = "usage";
}

/// Environment variables that our programs read where a flag is not given.
pub mod env {
    /// Log filter in `tracing` directives.
    pub const LOG: &str = "BATON_LOG";
    /// Token of the model hub, for models that not everybody may read.
    pub const HF_TOKEN: &str = "HF_TOKEN";
    /// Access key of an S3 bucket that not everybody may read.
    pub const AWS_ACCESS_KEY_ID: &str = "AWS_ACCESS_KEY_ID";
    /// Its secret half.
    pub const AWS_SECRET_ACCESS_KEY: &str = "AWS_SECRET_ACCESS_KEY";
    /// With temporary access keys: what came along with them.
    pub const AWS_SESSION_TOKEN: &str = "AWS_SESSION_TOKEN";
}

/// Names of files in what is mounted into pods.
pub mod files {
    /// The proxies' signing key, in a Secret that proxies alone mount.
    pub const SIGNING_KEY: &str = "signing.key";
    /// Its public half, for workers.
    pub const SIGNING_PUBLIC: &str = "signing.pub";
}
